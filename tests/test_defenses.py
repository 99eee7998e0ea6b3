"""Every defense in the registry repairs real small backdoors, and sees nothing but its clean samples."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from implant import implant
from torch import nn

from ulrl.attacks.base import ATTACKS
from ulrl.cli import main
from ulrl.configure import AttackRun, DefenseRun
from ulrl.data.datasets import clean_subset, load_dataset
from ulrl.data.imageset import ImageSet, PoisonedSet
from ulrl.defenses.base import DEFENSES, Defense, Repair
from ulrl.defenses.unlearning import robust_z
from ulrl.errors import UserError
from ulrl.models import load_model
from ulrl.models.head import find_head
from ulrl.options import Schema
from ulrl.record import Record, load_record
from ulrl.report.pictures import draw
from ulrl.runs import defending
from ulrl.runs.attacking import run_attack
from ulrl.runs.defending import run_defense
from ulrl.training import Monitor, TrainOptions, judge

TARGET = 7  # not 0: the released ULRL keeps the lowest flagged classes, which hides behind target 0
CONFIG = Path(__file__).parent.parent / "config" / "defense"


@dataclass(frozen=True)
class Expected:
    """What a defense with its YAML for the digits, and `given` over it, must reach on each of `records`.

    asr: ASR at most. loss: ACC lost at most. ra: RA at least. flags: the records where the target is flagged
    first. `channel` is a backdoor in one channel, for those that look for one: in a small trained net it lies in many.
    """

    asr: float = 0.15
    loss: float = 0.12
    ra: float = 0.4
    flags: tuple[str, ...] = ()
    records: tuple[str, ...] = ("badnet", "blended")
    given: Mapping[str, Any] = field(default_factory=dict)


# The bars hold for victims that differ in seed and in how their processor rounds, which was tried: what one machine
# reached is no bar.
EXPECTED = {
    "abl": Expected(asr=0.3, loss=0.3, ra=0.6, records=("badnet",)),  # of a few epochs
    "anp": Expected(asr=0.7, loss=0.5, ra=0.2, records=("badnet",)),
    "b3d": Expected(asr=1.0, loss=0.0, ra=0.0, records=("badnet",)),  # repairs nothing; what it finds: test_queries.py
    "ban": Expected(asr=0.9, ra=0.1, records=("badnet",)),  # of a few epochs
    "bnp": Expected(loss=0.3, ra=0.6, records=("channel",), given={"u": 3.0}),  # the paper's
    "bti-dbf": Expected(asr=0.8, ra=0.1, records=("badnet",)),  # of a few epochs
    "cbd": Expected(asr=0.8, loss=0.6, ra=0.2, records=("badnet",)),  # of a few epochs
    "clp": Expected(ra=0.7, records=("channel",), given={"u": 3.0}),  # the paper's
    "d3": Expected(asr=0.3, ra=0.0, records=("badnet",)),  # sends triggered images anywhere but to the target
    "detect_label": Expected(asr=1.0, loss=0.0, ra=0.0, flags=("badnet",)),  # it repairs nothing
    "ebyd": Expected(asr=1.0, ra=0.0, flags=("badnet",), records=("badnet",)),  # ends in RNP's pruning, see there
    "fp": Expected(),
    "fst": Expected(asr=0.3),
    "ft": Expected(asr=0.45),
    "ft-sam": Expected(),
    "harden": Expected(flags=("badnet",)),
    # Depends much on the victim (2 to 42 were seen); and a blended trigger is beyond the perturbation's bound.
    "i-bau": Expected(asr=0.7, ra=0.2, records=("badnet",)),
    "nad": Expected(),
    "nc": Expected(flags=("badnet",), records=("badnet",)),  # of a blended trigger it sometimes flags another class
    "nft": Expected(asr=0.3, records=("blended",)),  # a patch of two pixels stays
    "npd": Expected(asr=0.9, ra=0.0, records=("badnet",)),  # one branch of the last block is too late for a blended one
    # It prunes what clean accuracy allows, on so narrow a net next to nothing; tests/test_repairs.py holds the rest.
    "otbr": Expected(asr=1.0, ra=0.0, records=("badnet",)),
    "pam": Expected(asr=0.85, loss=0.15, ra=0.1, records=("badnet",)),  # of a few epochs
    "recover_trigger": Expected(asr=1.0, loss=0.0, ra=0.0, flags=("badnet",), records=("badnet",)),  # repairs nothing
    # More gently than the digits' settings: at their rate one draw in five left the victim as it was.
    "rnp": Expected(loss=0.15, ra=0.6, records=("channel",), given={"unlearning_lr": 0.0005}),
    "sau": Expected(),
    "ssft": Expected(asr=1.0, ra=0.0, records=("badnet",)),  # one connection of a shallow net is not enough of it
    "tsbd": Expected(asr=0.4, loss=0.3, records=("badnet",)),  # the other takes as long and tells no more
    "ulrl": Expected(asr=0.25, flags=("badnet",)),
}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    """A BadNets model of the digits, as `sh/quickstart.sh` makes it but for the target, a Blended and a clean one.

    And `channel`: that of BadNets, with the clean weights and its backdoor in one channel of them.
    """
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ULRL_HOME", str(tmp_path_factory.mktemp("backdoored")))
        badnet = ATTACKS["badnet"](attack_target=TARGET, patch_size=2)
        for name, attack in {
            "badnet": badnet, "blended": ATTACKS["blended"](attack_target=TARGET), "clean": ATTACKS["prototype"](),
        }.items():  # fmt: skip
            folder, result = run_attack(
                attack,
                AttackRun(dataset="digits", width=16, save_folder_name=name, device="cpu"),
                TrainOptions(epochs=10, batch_size=64, lr=0.05),
                bar=False,
            )
            assert name == "clean" or result["after"]["asr"] > 0.95
            assert result["after"]["acc"] > 0.95
            made[name] = load_record(folder)
    clean, train = made["clean"], load_dataset("digits")[0]
    model = load_model(clean.model_name, clean.num_classes, clean.state_dict)
    implant(model, train, badnet.poison(train.images, train=False), TARGET)  # type: ignore[arg-type]
    folder = made["badnet"].folder.with_name("channel")
    shutil.copytree(made["badnet"].folder, folder)
    made["channel"] = dataclasses.replace(made["badnet"], folder=folder, state_dict=model.state_dict())
    return made


@pytest.fixture(scope="module")
def backdoored(records: dict[str, Record]) -> Record:
    return records["badnet"]


def configured(name: str, **given: Any) -> tuple[Defense, DefenseRun]:
    """The defense and the run options of its YAML for the digits."""
    schema = Schema(DefenseRun, DEFENSES[name])
    settings, _ = schema.merge(("yaml", schema.yaml(CONFIG / name / "digits.yaml")), ("test", given))
    return settings.build(DEFENSES[name]), settings.build(DefenseRun)


def _order(name: str, record: Record, **given: Any) -> tuple[Defense, Record, DefenseRun]:
    defense, run = configured(name, **given, overwrite=True)  # tests share records
    return defense, record, run


class Locked:
    """A test set that nothing may touch while a defense runs."""

    locked = False

    def __getattribute__(self, name: str) -> Any:
        assert not Locked.locked, f"the defense reached for {name} of a test set"
        return super().__getattribute__(name)


class LockedImages(Locked, ImageSet):
    pass


class LockedPoison(Locked, PoisonedSet):
    pass


@dataclass(frozen=True)
class Outcome:
    """A run under lock and key: what it left, and the samples that the defense was handed."""

    folder: Path
    result: dict[str, Any]
    handed: ImageSet


Repaired = Callable[..., Outcome]


@pytest.fixture(scope="module")
def repaired(records: dict[str, Record], tmp_path_factory: pytest.TempPathFactory) -> Repaired:
    """Runs a defense on a record, or its row's first, once for all tests, with the test sets locked while it works."""

    @functools.cache
    def run(name: str, record: str) -> Outcome:
        handed: list[ImageSet] = []
        cls, load, poison = DEFENSES[name], defending.load_dataset, Record.poisoned_test
        original = cls.run

        def spy(self: Defense, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
            handed.append(clean)
            Locked.locked = True
            try:
                return original(self, model, clean, monitor)
            finally:
                Locked.locked = False

        def load_locked(*args: Any) -> tuple[ImageSet, ImageSet]:
            train, test = load(*args)
            return train, LockedImages(**vars(test))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cls, "run", spy)
            patch.setattr(defending, "load_dataset", load_locked)
            patch.setattr(Record, "poisoned_test", lambda *args: LockedPoison(**vars(poison(*args))))
            kept = tmp_path_factory.mktemp(name)
            folder, result = run_defense(*_order(name, records[record], **EXPECTED[name].given), bar=False)
            shutil.copytree(folder, kept, dirs_exist_ok=True)  # other tests run it anew
        return Outcome(kept, result, handed[0])

    return lambda name, record=None: run(name, record or EXPECTED[name].records[0])


def test_every_defense_has_a_row() -> None:
    assert set(EXPECTED) == set(DEFENSES)


@pytest.mark.parametrize(("name", "record"), [(name, r) for name, row in EXPECTED.items() for r in row.records])
def test_defense_repairs_a_backdoor(name: str, record: str, repaired: Repaired) -> None:
    row, result = EXPECTED[name], repaired(name, record).result
    assert result["before"]["asr"] > 0.9
    assert result["after"]["asr"] <= row.asr
    assert result["after"]["acc"] >= result["before"]["acc"] - row.loss
    assert result["after"]["ra"] >= row.ra
    assert record not in row.flags or result["flagged"][0] == TARGET


@pytest.mark.parametrize("name", EXPECTED)
def test_repaired_model_loads_into_the_plain_architecture(
    name: str, records: dict[str, Record], repaired: Repaired
) -> None:
    outcome, record = repaired(name), records[EXPECTED[name].records[0]]
    saved = torch.load(outcome.folder / "defense_result.pt", weights_only=True)
    assert set(saved) == {"model_name", "num_classes", "model"}
    assert all(w.shape == record.state_dict[k].shape for k, w in saved["model"].items())
    model = load_model(saved["model_name"], saved["num_classes"], saved["model"])  # strictly
    _, test = load_dataset("digits")
    again = judge(model, test, record.poisoned_test(test.spec))
    assert again.acc == pytest.approx(outcome.result["after"]["acc"])
    assert again.asr == pytest.approx(outcome.result["after"]["asr"])


@pytest.mark.parametrize("name", EXPECTED)
def test_results_of_a_run(name: str, repaired: Repaired) -> None:
    folder, result = repaired(name).folder, repaired(name).result
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result))
    assert result["seconds"]["total"] > result["seconds"]["judge"] > 0
    assert (folder / f"{name}_df.csv").exists()
    draw(folder)
    assert (folder / "acc_asr.png").stat().st_size > 1000
    assert (folder / "index.txt").exists() == (result["clean_samples"] > 0) == (not DEFENSES[name].in_training)


@pytest.mark.parametrize("name", [name for name in EXPECTED if not DEFENSES[name].in_training])
def test_defense_is_handed_only_the_clean_samples(name: str, repaired: Repaired) -> None:
    """Exactly those of index.txt, in memory of their own; the test sets raise when touched meanwhile."""
    outcome = repaired(name)
    index = torch.tensor([int(line) for line in (outcome.folder / "index.txt").read_text().split()])
    train, _ = load_dataset("digits")
    ratio = configured(name)[1].ratio
    assert torch.equal(index, clean_subset(len(train), ratio, 0))
    handed, expected = outcome.handed, train.subset(index)
    assert type(handed) is ImageSet
    assert torch.equal(handed.images, expected.images)
    assert torch.equal(handed.labels, expected.labels)
    assert handed.images.untyped_storage().nbytes() == expected.images.numel()


@pytest.mark.parametrize("name", [name for name in EXPECTED if DEFENSES[name].in_training])
def test_in_training_defense_is_handed_the_poisoned_training_set(
    name: str, backdoored: Record, repaired: Repaired
) -> None:
    """As it is: nothing says which samples are poisoned."""
    train, _ = load_dataset("digits")
    handed, poisoned = repaired(name).handed, backdoored.poisoned_train(train)
    assert type(handed) is ImageSet
    assert torch.equal(handed.images, poisoned.images)
    assert torch.equal(handed.labels, poisoned.labels)


def brief(name: str) -> dict[str, Any]:
    """Options of a run of one epoch, round and step of everything that has them."""
    fields = [f.name for f in dataclasses.fields(DEFENSES[name])]
    once = {f: 1 for f in fields if "epoch" in f or "round" in f or "iter" in f or f.endswith("steps")}
    return {**once, "queries": 6400} if name == "b3d" else once


@pytest.mark.parametrize("name", EXPECTED)
def test_same_seed_and_index_file_same_repair(name: str, backdoored: Record, tmp_path: Path) -> None:
    folder, first = run_defense(*_order(name, backdoored, **brief(name)), bar=False)
    weights = [torch.load(folder / "defense_result.pt", weights_only=True)["model"]]
    given: dict[str, Any] = {**brief(name), "eval_every": 1}
    if not DEFENSES[name].in_training:
        given["index"] = str(tmp_path / "index.txt")
        (tmp_path / "index.txt").write_bytes((folder / "index.txt").read_bytes())
    folder, second = run_defense(*_order(name, backdoored, **given), bar=False)
    weights.append(torch.load(folder / "defense_result.pt", weights_only=True)["model"])
    history = pd.read_csv(folder / f"{name}_df.csv")
    assert name == "b3d" or history.test_asr.notna().all()  # b3d has no epochs
    assert (first["after"], first["flagged"]) == (second["after"], second["flagged"])
    assert all(torch.equal(w, weights[1][k]) for k, w in weights[0].items()), "judging by epoch changes nothing"


@pytest.mark.parametrize("name", ["rnp", "anp", "clp"])
def test_oracle_is_a_column_of_its_own(name: str, backdoored: Record) -> None:
    """Judged afterwards: what the defense chose is the same with and without it."""
    plain = run_defense(*_order(name, backdoored, **brief(name)), bar=False)[1]
    folder, result = run_defense(*_order(name, backdoored, **brief(name), report_oracle=True), bar=False)
    assert result["after"] == plain["after"]
    assert "oracle" not in plain
    table = pd.read_csv(folder / "oracle.csv")
    assert len(table) > 10
    allowed = table[table.acc >= 0.9 * result["before"]["acc"]]
    if result["oracle"] is None:
        assert allowed.empty
    else:
        assert result["oracle"]["asr"] == allowed.asr.min()
        assert "test" in result["oracle"]["rule"]


def test_comparison_runs_each_defense_with_each_seed_once(
    backdoored: Record, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ULRL_HOME", str(backdoored.folder.parent.parent))
    command = ["compare", "badnet", "--defenses", "ft,fst", "--seeds", "2", "--device", "cpu"]
    tables = []
    for _ in range(2):
        with pytest.raises(SystemExit) as left:
            main(command)
        assert left.value.code == 0
        tables.append(capsys.readouterr().out)
    rows = tables[0].splitlines()
    assert tables[1].splitlines()[: len(rows)] == rows, "the second time, seconds and all come from the files"
    assert "4 of 4 runs lay in the record already" in " ".join(tables[1].split()), "which may be a stranger's"
    assert "already" not in tables[0]
    runs = {p.parent.name: json.loads(p.read_text()) for p in backdoored.folder.glob("defense/*_seed?/result.json")}
    assert set(runs) == {f"{name}_0.1_seed{seed}" for name in ("ft", "fst") for seed in (0, 1)}
    asr = [100 * runs[f"ft_0.1_seed{seed}"]["after"]["asr"] for seed in (0, 1)]
    row = next(line for line in tables[0].splitlines() if line.split()[:1] == ["ft"])
    assert f"{sum(asr) / 2:.2f} ±{abs(asr[0] - asr[1]) / 2**0.5:.2f}" in row
    assert row.split()[-1] == "2"


@pytest.mark.parametrize("name", ["ebyd", "nc", "recover_trigger"])
def test_found_trigger_is_like_the_true_one(name: str, repaired: Repaired) -> None:
    """Which is a white square of 2x2 in the lower right corner."""
    outcome = repaired(name, "badnet")
    judged = outcome.result["trigger"]
    assert judged["class"] == TARGET
    assert judged["cosine"] > 0.35
    # The others seek on an unlearned model: how far what they find turns the original is chance, 1% was seen.
    assert judged["turned"] > 0.25 or name != "nc"
    with np.load(outcome.folder / "trigger.npz") as found:
        assert found["true_mask"].sum() == found["true_mask"][-2:, -2:].sum() > 0
        assert found["mask"][-3:, -3:].sum() > found["mask"].sum() / 3
    draw(outcome.folder)
    assert (outcome.folder / "trigger.png").stat().st_size > 1000


def test_ulrl_ranking_file_names_the_target(repaired: Repaired) -> None:
    folder = repaired("ulrl").folder
    neurons = pd.read_csv(folder / "neurons.csv", index_col="class")
    assert len(neurons) == 10
    assert neurons.z.idxmax() == neurons.change.idxmax() == TARGET
    assert neurons.flagged[TARGET]
    assert (neurons.z[neurons.flagged] > 3.5).all()
    draw(folder)
    assert (folder / "neuron_ranking.png").stat().st_size > 1000


@pytest.mark.parametrize(("policy", "rows"), [("finetune", 0), ("top1", 1), ("abort", 0)])
def test_ulrl_without_a_suspicious_row(policy: str, rows: int, backdoored: Record) -> None:
    given = {"on_empty": policy, "z_threshold": 1e6, "relearn_epochs": 1}
    folder, result = run_defense(*_order("ulrl", backdoored, **given), bar=False)
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


def test_clean_model_is_not_harmed(records: dict[str, Record]) -> None:
    _, result = run_defense(*_order("ulrl", records["clean"]), bar=False)
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
