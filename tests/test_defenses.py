"""Every defense in the registry repairs a real small backdoor, and sees nothing but its clean samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from ulrl.attacks.base import ATTACKS
from ulrl.data.datasets import clean_subset, load_dataset
from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import DEFENSES, Defense, Repair
from ulrl.defenses.unlearning import robust_z
from ulrl.errors import UserError
from ulrl.models import load_model
from ulrl.models.head import find_head
from ulrl.options import Schema
from ulrl.record import Record, load_record
from ulrl.runs.attacking import AttackRun, run_attack
from ulrl.runs.defending import DefenseRun, run_defense
from ulrl.training import Monitor, TrainOptions, judge

TARGET = 7  # not 0: the released ULRL keeps the lowest flagged classes, which hides behind target 0
CONFIG = Path(__file__).parent.parent / "config" / "defense"


@pytest.fixture(scope="module")
def backdoored(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """A BadNets model of the digits, as `sh/quickstart.sh` makes it but for the target."""
    home = tmp_path_factory.mktemp("backdoored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ULRL_HOME", str(home))
        folder, result = run_attack(
            ATTACKS["badnet"](attack_target=TARGET, patch_size=2),
            AttackRun(dataset="digits", width=16, save_folder_name="digits", device="cpu"),
            TrainOptions(epochs=10, batch_size=64, lr=0.05),
            bar=False,
        )
    assert result["after"]["asr"] > 0.95
    assert result["after"]["acc"] > 0.95
    return load_record(folder)


def configured(name: str, **given: Any) -> tuple[Defense, DefenseRun]:
    """The defense and the run options of its YAML for the digits."""
    schema = Schema(DefenseRun, DEFENSES[name])
    settings, _ = schema.merge(("yaml", schema.yaml(CONFIG / name / "digits.yaml")), ("test", given))
    return settings.build(DEFENSES[name]), settings.build(DefenseRun)


@pytest.mark.parametrize("name", list(DEFENSES))
def test_defense_repairs_a_backdoor(name: str, backdoored: Record) -> None:
    folder, result = run_defense(*_order(name, backdoored), bar=False)
    assert result["before"]["asr"] > 0.95
    assert result["after"]["asr"] < 0.1
    assert result["after"]["acc"] > result["before"]["acc"] - 0.08
    assert result["after"]["ra"] > 0.4
    assert result["der"] > 0.9
    assert result["flagged"][0] == TARGET
    assert result["seconds"]["total"] > result["seconds"]["judge"] > 0
    saved = torch.load(folder / "defense_result.pt", weights_only=True)
    assert set(saved) == {"model_name", "num_classes", "model"}
    model = load_model(saved["model_name"], saved["num_classes"], saved["model"])  # strictly
    _, test = load_dataset("digits")
    again = judge(model, test, backdoored.poisoned_test(test.spec))
    assert again.acc == pytest.approx(result["after"]["acc"])
    assert again.asr == pytest.approx(result["after"]["asr"])
    assert json.loads((folder / "result.json").read_text())["after"] == result["after"]
    used = [int(line) for line in (folder / "index.txt").read_text().split()]
    assert used == clean_subset(1437, 0.1, 0).tolist()
    assert {"acc_asr.png", f"{name}_df.csv"} <= {p.name for p in folder.iterdir()}


def _order(name: str, record: Record, **given: Any) -> tuple[Defense, Record, DefenseRun]:
    defense, run = configured(name, **given)
    return defense, record, run


@pytest.mark.parametrize("name", list(DEFENSES))
def test_same_seed_and_index_file_same_repair(name: str, backdoored: Record, tmp_path: Path) -> None:
    folder, first = run_defense(*_order(name, backdoored), bar=False)
    index = tmp_path / "index.txt"
    index.write_bytes((folder / "index.txt").read_bytes())
    weights = torch.load(folder / "defense_result.pt", weights_only=True)["model"]
    folder, second = run_defense(*_order(name, backdoored, index=str(index), eval_every=5), bar=False)
    again = torch.load(folder / "defense_result.pt", weights_only=True)["model"]
    assert all(torch.equal(weights[k], again[k]) for k in weights), "judging by epoch changes nothing"
    assert (first["after"], first["flagged"]) == (second["after"], second["flagged"])
    history = pd.read_csv(folder / f"{name}_df.csv")
    assert history.test_asr.notna().sum() == (history.epoch % 5 == 0).sum() > 0


@pytest.mark.parametrize("name", list(DEFENSES))
def test_defense_is_handed_only_the_clean_samples(
    name: str, backdoored: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ImageSet] = []
    original = DEFENSES[name].run

    def spy(self: Defense, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        seen.append(clean)
        return original(self, model, clean, monitor)

    monkeypatch.setattr(DEFENSES[name], "run", spy)
    run_defense(*_order(name, backdoored), bar=False)
    train, _ = load_dataset("digits")
    expected = train.subset(clean_subset(len(train), 0.1, 0))
    assert torch.equal(seen[0].images, expected.images)
    assert torch.equal(seen[0].labels, expected.labels)
    assert type(seen[0]) is ImageSet


def test_ulrl_ranking_file_names_the_target(backdoored: Record) -> None:
    folder, _ = run_defense(*_order("ulrl", backdoored), bar=False)
    neurons = pd.read_csv(folder / "neurons.csv", index_col="class")
    assert len(neurons) == 10
    assert neurons.z.idxmax() == neurons.change.idxmax() == TARGET
    assert neurons.flagged[TARGET]
    assert (neurons.z[neurons.flagged] > 3.5).all()
    assert (folder / "neuron_ranking.png").stat().st_size > 1000


@pytest.mark.parametrize(("policy", "rows"), [("finetune", 0), ("top1", 1), ("abort", 0)])
def test_ulrl_without_a_suspicious_row(policy: str, rows: int, backdoored: Record) -> None:
    folder, result = run_defense(*_order("ulrl", backdoored, on_empty=policy, z_threshold=1e6), bar=False)
    assert result["flagged"] == []
    assert result["evidence"]["on_empty"] == policy
    assert len(result["evidence"]["reinitialised"]) == rows
    weights = torch.load(folder / "defense_result.pt", weights_only=True)["model"]
    unchanged = all(torch.equal(weights[k], w) for k, w in backdoored.state_dict.items())
    assert unchanged == (policy == "abort")
    assert "no suspicious class" in next(folder.glob("*.log")).read_text()


def test_ulrl_keeps_the_highest_z_not_the_lowest_class(backdoored: Record) -> None:
    """Three rows stand out; the release would keep classes 1 and 4, whatever their z."""
    before = nn.Linear(8, 10)
    after = nn.Linear(8, 10)
    shift = torch.tensor([1.0, 50.0, 1.1, 0.9, 60.0, 1.0, 1.2, 0.8, 1.05, 70.0])
    with torch.no_grad():
        after.weight.copy_(before.weight + shift[:, None])
    neurons, _ = DEFENSES["ulrl"]()._rank(before, after)  # type: ignore[attr-defined]
    assert neurons.index[neurons.flagged].tolist() == [4, 9]
    assert neurons.change.to_numpy() == pytest.approx(8 * shift.numpy(), rel=1e-4)


def test_robust_z_against_the_formula() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0])
    z, median, mad = robust_z(values)
    assert (median, mad) == (3.0, 1.0)
    assert z.tolist() == pytest.approx([2 / 1.4826, 1 / 1.4826, 0, 1 / 1.4826, 97 / 1.4826])
    assert robust_z(torch.tensor([1.0, 2.0, 3.0, 10.0]))[1] == 2.5, "the mean of the middle two"


def test_robust_z_with_a_mad_of_zero() -> None:
    z, _, _ = robust_z(torch.tensor([1.0, 1, 1, 1, 5]))
    assert torch.isfinite(z).all()
    assert z[4] > 3.5
    assert (z[:4] == 0).all()
    assert (robust_z(torch.zeros(5))[0] == 0).all()


def test_head_is_found_by_itself_or_by_dotted_name() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 7), nn.ModuleDict({"inner": nn.Linear(7, 10)}), nn.Linear(10, 3))
    assert find_head(net, 10)[0] == "2.inner"
    assert find_head(net, 3) == ("3", net[3])
    assert find_head(net, 10, "2.inner")[1] is net[2]["inner"]
    with pytest.raises(UserError, match=r"known: 2\.inner"):
        find_head(net, 10, "linear")
    with pytest.raises(UserError, match="5 outputs"):
        find_head(net, 5)


def test_clean_model_is_not_harmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULRL_HOME", str(tmp_path))
    folder, _ = run_attack(
        ATTACKS["prototype"](),
        AttackRun(dataset="digits", width=16, save_folder_name="clean", device="cpu"),
        TrainOptions(epochs=8, batch_size=64, lr=0.05),
        bar=False,
    )
    _, result = run_defense(*_order("ulrl", load_record(folder)), bar=False)
    assert result["before"]["asr"] is None
    assert result["der"] is None
    assert result["after"]["acc"] > result["before"]["acc"] - 0.08


@pytest.mark.parametrize("link", ["defense", "defense/ulrl"])
def test_nothing_is_written_through_a_link_of_the_record(link: str, backdoored: Record, tmp_path: Path) -> None:
    record, outside = tmp_path / "record", tmp_path / "outside"
    shutil.copytree(backdoored.folder, record, ignore=shutil.ignore_patterns("defense"))
    outside.mkdir()
    (record / link).parent.mkdir(exist_ok=True)
    (record / link).symlink_to(outside)
    with pytest.raises(UserError, match="is a link"):
        run_defense(*_order("ulrl", load_record(record)), bar=False)
    assert not any(outside.iterdir())
