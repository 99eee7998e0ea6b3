"""Whole runs of every attack: what they record, whether they take, and what a next run finds again."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from attacking import CLEAN_LABEL, NO_TRAINING_SET, learned, make, quick, sized
from manners import refused
from rich.console import Console

from ulrl.attacks.base import ATTACKS
from ulrl.configure import AttackRun, PreviewRun, configure_attack, configure_defense
from ulrl.data.datasets import load_dataset
from ulrl.record import load_record
from ulrl.report.pictures import draw
from ulrl.report.results import Run
from ulrl.report.tables import comparison_table, record_table, result_table
from ulrl.runs.attacking import run_attack, run_preview
from ulrl.runs.defending import run_defense
from ulrl.training import TrainOptions

CONFIG = Path(__file__).parent.parent / "config" / "attack"


@pytest.mark.parametrize("name", list(ATTACKS))
def test_record_holds_what_the_attack_did(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attack = quick(name, attack_target=3)
    folder, result = make(attack, tmp_path, monkeypatch, train_samples=700)
    record, (train, test) = load_record(folder), load_dataset("digits")
    assert record.attack == name
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result))
    kept = attack.with_learned(**torch.load(folder / "trigger.pt", weights_only=True))
    poisoned = record.poisoned_test(test.spec)
    assert torch.equal(poisoned.original_indices, attack.judged(test.labels))
    assert torch.equal(poisoned.original_labels, test.labels[poisoned.original_indices])
    if name == "prototype":
        assert record.bd_train is None
        assert result["after"]["asr"] is None
        assert result["evidence"]["perceptibility"] is None
        return
    assert (poisoned.labels == 3).all()
    from_record = kept.poison(test.images[poisoned.original_indices], train=False)
    assert torch.equal(poisoned.images, from_record), "the record's own parameters make the trigger again"
    draw(folder)
    assert (folder / "trigger_preview.png").stat().st_size > 1000
    of_epoch = pd.read_csv(folder / "attack_df.csv").iloc[-1]
    assert of_epoch.batch == 700 // result["options"]["batch_size"], "the rest of an epoch is left out"
    hidden = result["evidence"]["perceptibility"]
    assert 0 < hidden["linf"] <= 1
    assert hidden["l2"] >= hidden["linf"]
    assert -1 <= hidden["ssim"] < 1
    if name in NO_TRAINING_SET:
        assert record.bd_train is None
        return
    seen = record.poisoned_train(train)
    assert len(seen) == 700, "the subset that the model was trained on"
    changed = seen.labels != seen.original_labels
    assert (seen.labels[changed] == 3).all()
    assert not changed.any() or name not in CLEAN_LABEL
    listed = {kind: _index(folder / f"{kind}_index.txt") for kind in ("poison", "cover")}
    assert len(listed["poison"]) == result["evidence"]["poisoned"] > 0
    assert len(listed["cover"]) == result["evidence"]["covers"]
    touched = (seen.images != train.images[seen.original_indices]).flatten(1).any(1)
    assert set(seen.original_indices[touched].tolist()) <= listed["poison"] | listed["cover"]
    assert set(seen.original_indices[changed].tolist()) <= listed["poison"]
    assert record.bd_train is not None
    covers = set(record.bd_train.indices[record.bd_train.cover].tolist())
    assert covers == listed["cover"], "covers are told from poisoned samples"


def test_a_backdoor_that_did_not_take_is_called_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One poisoned image plants nothing; a half of them do; without a trigger there is nothing to say.

    Nor is a repair of it any evidence, and each table says so.
    """
    for attack, expected in (
        (quick("badnet", p_num=1), False),
        (quick("badnet", pratio=0.5, patch_size=4), True),
        (ATTACKS["prototype"](), None),
    ):
        caplog.clear()
        epochs = TrainOptions(epochs=3, batch_size=64, lr=0.05)
        monkeypatch.setenv("ULRL_HOME", str(tmp_path))
        options = AttackRun(dataset="digits", width=8, save_folder_name=f"{expected}", device="cpu")
        folder, result = run_attack(attack, options, epochs, bar=False)
        assert json.loads((folder / "result.json").read_text())["took"] is result["took"] is expected
        words = f"did not take: ASR {100 * (result['after']['asr'] or 0):.1f}%, below 50%"
        assert (words in caplog.text) == (words in next(folder.glob("*.log")).read_text()) == (expected is False)
        record = load_record(folder)
        method, run = configure_defense("clp", {"ratio": 0.1, "device": "cpu"}, "digits", record.model_name, quiet=True)
        _, repaired = run_defense(method, record, run, bar=False)
        for shown in (
            result_table(result),
            result_table(repaired),
            record_table(record, [Run(folder, result)]),
            record_table(record, [Run(folder / "defense" / "clp", repaired)]),  # as of BackdoorBench's, without its own
            comparison_table(folder.name, [repaired], 0),
        ):
            table = Console(file=io.StringIO(), width=120)
            table.print(shown)
            assert ("did not take" in table.file.getvalue()) == (expected is False)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "name", sorted(f.parent.name for f in CONFIG.glob("*/digits.yaml") if f.parent.name != "prototype")
)
def test_shipped_settings_for_the_digits_plant(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the default does not. Seen: 86.7 to 100%, over three seeds and two ways of rounding."""
    monkeypatch.setenv("ULRL_HOME", str(tmp_path))
    said = {"dataset": "digits", "device": "cpu", "save_folder_name": "made"}
    _, result = run_attack(*configure_attack(name, said, AttackRun, quiet=True), bar=False)
    assert result["options"]["width"] == 16
    assert result["after"]["asr"] > 0.6
    assert result["after"]["acc"] > 0.9


def _index(file: Path) -> set[int]:
    return {int(line) for line in file.read_text().split()} if file.exists() else set()


def test_unfinished_run_hands_down_what_it_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in training: the next run of that name computes nothing twice, unless its options differ."""
    cls = ATTACKS["trojannn"]
    searched: list[int] = []
    invert = cls._invert  # type: ignore[attr-defined]
    monkeypatch.setattr(cls, "_invert", lambda self, lab: searched.append(1) or invert(self, lab))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cls, "train", lambda self, model, lab: (_ for _ in ()).throw(KeyboardInterrupt()))
        make(quick("trojannn"), tmp_path, monkeypatch)
    assert not (tmp_path / "record" / "made").exists()
    assert searched == [1]
    folder, result = make(quick("trojannn"), tmp_path, monkeypatch)
    assert searched == [1]
    assert "clean model" not in result["seconds"]
    assert [p.name for p in (tmp_path / "record").iterdir()] == ["made"]
    make(quick("trojannn"), tmp_path, monkeypatch, overwrite=True)
    assert searched == [1], "a record that is replaced hands it down too"
    make(quick("trojannn", trojan_eps=0.2), tmp_path, monkeypatch, overwrite=True)
    assert searched == [1, 1]
    darker = [replace(part, images=part.images // 2) for part in load_dataset("digits")]
    monkeypatch.setattr("ulrl.runs.attacking.load_dataset", lambda *_: darker)
    make(quick("trojannn", trojan_eps=0.2), tmp_path, monkeypatch, overwrite=True)
    assert searched == [1, 1, 1], "not from pictures that have changed since"


def test_a_patch_that_adds_nothing_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where darkness excites the chosen neurons most."""
    cls, data = ATTACKS["trojannn"], sized(1, 8)
    for patch in (torch.zeros(1, 8, 8), torch.eye(8)[None]):
        monkeypatch.setattr(cls, "_invert", lambda self, lab, patch=patch: patch)
        folder = tmp_path / str(patch.any().item())
        folder.mkdir()
        caplog.clear()
        learned(quick("trojannn"), data, folder)
        assert ("--num_neuron" in caplog.text) == (not patch.any())


def test_damaged_cache_is_computed_again(tmp_path: Path) -> None:
    data = sized(1, 8)
    first = learned(quick("trojannn"), data, tmp_path)
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:50])
    assert torch.equal(first.learned["pattern"], learned(quick("trojannn"), data, tmp_path).learned["pattern"])


def test_clean_model_may_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(ATTACKS["prototype"](), tmp_path, monkeypatch, save_folder_name="clean", width=8)
    _, result = make(quick("lf"), tmp_path, monkeypatch, clean_model="clean")
    assert "clean model" not in result["seconds"]
    assert "pattern" in result["seconds"]
    refused(lambda: make(ATTACKS["badnet"](), tmp_path, monkeypatch, clean_model="clean"), "--clean_model", "badnet")
    refused(lambda: make(quick("lf"), tmp_path, monkeypatch, clean_model="nowhere"), "nowhere")
    make(ATTACKS["badnet"](), tmp_path, monkeypatch, save_folder_name="bad", width=4)
    refused(lambda: make(quick("lf"), tmp_path, monkeypatch, clean_model="bad"), "--clean_model bad", "is not clean")


def test_the_preview_of_a_seed_is_one_picture() -> None:
    """Also where the clean model that its trigger is computed against drops units at random."""
    run, training = PreviewRun(dataset="digits", model="vgg19_bn", width=8, train_samples=128), TrainOptions(epochs=1)
    attack = replace(quick("lf"), lf_steps=3)
    previews = []
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            previews.append(run_preview(attack, run, training, bar=False).poisoned)
    assert np.array_equal(*previews)


def test_lira_saves_the_classifier_of_its_second_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, result = make(quick("lira"), tmp_path, monkeypatch)
    first = torch.load(folder / "learned" / "joint.pt", weights_only=True)["tensors"]
    assert all(name.startswith("generator.") for name in torch.load(folder / "trigger.pt", weights_only=True))
    final = load_record(folder).state_dict
    assert not torch.equal(first["classifier.linear.weight"], final["linear.weight"])
    assert {"joint", "train"} <= set(result["seconds"])


def test_ready_made_images_are_taken_by_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BackdoorBench's files: one array for the whole split, here each image filled with a number of its own."""
    train, test = load_dataset("digits")
    for split, data in (("train", train), ("test", test)):
        numbers = (np.arange(len(data)) % 200).astype(np.uint8)
        np.save(tmp_path / f"{split}.npy", np.broadcast_to(numbers[:, None, None, None], (len(data), 8, 8, 1)))
    files = {f"attack_{s}_replace_imgs_path": str(tmp_path / f"{s}.npy") for s in ("train", "test")}
    folder, _ = make(ATTACKS["ssba"](**files), tmp_path, monkeypatch, train_samples=700)
    record = load_record(folder)
    shown = record.poisoned_test(test.spec)
    assert torch.equal(shown.images[:, 0, 0, 0].long(), shown.original_indices % 200)
    seen = record.poisoned_train(train)
    listed = torch.tensor(sorted(_index(folder / "poison_index.txt")))
    at = torch.isin(seen.original_indices, listed)
    assert torch.equal(seen.images[at][:, 0, 0, 0].long(), seen.original_indices[at] % 200)
    refused(lambda: ATTACKS["ssba"](attack_test_replace_imgs_path="x").check(test.spec), "give both")
    np.save(tmp_path / "train.npy", np.zeros((3, 8, 8, 1), np.uint8))
    refused(lambda: make(ATTACKS["ssba"](**files), tmp_path / "b", monkeypatch), "train.npy has 3 images")
    np.save(tmp_path / "train.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    refused(lambda: make(ATTACKS["ssba"](**files), tmp_path / "b", monkeypatch), "no readable .npy", "train.npy")


def test_same_seed_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = []
    for home, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder, _ = make(ATTACKS["badnet"](random_seed=seed), tmp_path / home, monkeypatch, random_seed=seed)
        weights.append(torch.cat([w.flatten().float() for w in load_record(folder).state_dict.values()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_global_generator_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.random.get_rng_state()
    make(ATTACKS["badnet"](), tmp_path, monkeypatch)
    assert torch.equal(before, torch.random.get_rng_state())
