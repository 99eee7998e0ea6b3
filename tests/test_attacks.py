"""Every attack in the registry, on real digits: what it does to images and labels, and what it records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from ulrl.attacks.base import ATTACKS, Attack
from ulrl.data.datasets import dataset_spec, load_dataset
from ulrl.errors import UserError
from ulrl.record import load_record
from ulrl.runs import AttackRun, run_attack
from ulrl.training import TrainOptions

POISONING = [name for name in ATTACKS if name != "prototype"]


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    train, _ = load_dataset("digits")
    return train.images, train.labels


@pytest.mark.parametrize("name", POISONING)
@pytest.mark.parametrize("channels", [1, 3])
def test_trigger_is_visible_batched_and_deterministic(
    name: str, channels: int, digits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    attack = ATTACKS[name]()
    images = digits[0][:64].expand(-1, channels, -1, -1)
    poisoned = attack.poison(images, train=False)
    assert poisoned.dtype == torch.uint8
    assert poisoned.shape == images.shape
    assert (poisoned != images).flatten(1).any(1).all(), "each image carries the trigger"
    assert torch.equal(poisoned, ATTACKS[name]().poison(images, train=False))
    one_by_one = torch.cat([attack.poison(image[None], train=False) for image in images])
    assert torch.equal(poisoned, one_by_one), "a batch is poisoned as its images are"


@pytest.mark.parametrize("name", POISONING)
def test_policy_of_samples_and_labels(name: str, digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    labels = digits[1]
    attack = ATTACKS[name](attack_target=7, pratio=0.05)
    chosen = attack.choose(labels)
    assert len(chosen) == round(0.05 * len(labels)) == len(chosen.unique())
    assert torch.equal(chosen, attack.choose(labels))
    assert not torch.equal(chosen, ATTACKS[name](attack_target=7, pratio=0.05, random_seed=1).choose(labels))
    assert len(ATTACKS[name](p_num=11).choose(labels)) == 11
    judged = attack.judged(labels)
    assert (labels[judged] != 7).all(), "samples of the target class are not judged"
    assert len(judged) == (labels != 7).sum()
    assert (attack.relabel(labels, 10) == 7).all()


@pytest.mark.parametrize("name", POISONING)
def test_all_to_all_shifts_every_label(name: str, digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    labels = digits[1]
    attack = ATTACKS[name](attack_label_trans="all2all")
    assert len(attack.judged(labels)) == len(labels)
    assert torch.equal(attack.relabel(torch.tensor([0, 3, 9]), 10), torch.tensor([1, 4, 0]))


@pytest.mark.parametrize("given", [{"pratio": 0.0}, {"pratio": 0.0001}, {"p_num": 5000}])
def test_impossible_count_is_refused(given: dict[str, float], digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    with pytest.raises(UserError, match="poisoned samples"):
        ATTACKS["badnet"](**given).choose(digits[1])


def test_badnet_patch_by_hand() -> None:
    images = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    poisoned = ATTACKS["badnet"](patch_size=2).poison(images, train=True)
    expected = images.clone()
    expected[:, :, 6:, 6:] = 255
    assert torch.equal(poisoned, expected)


def test_badnet_mask_is_transparent_where_it_is_zero(tmp_path: Path) -> None:
    """BackdoorBench's rule: per element, zero shows the image, anything else replaces it, black being 1."""
    mask = torch.zeros(8, 8, 3, dtype=torch.uint8)
    mask[0, 0], mask[0, 1], mask[1, 1, 0] = 255, 1, 9
    Image.fromarray(mask.numpy()).save(tmp_path / "mask.png")
    attack = ATTACKS["badnet"](patch_mask_path=str(tmp_path / "mask.png"))
    attack.check(dataset_spec("digits"))
    poisoned = attack.poison(torch.full((1, 3, 8, 8), 100, dtype=torch.uint8), train=True)[0]
    assert poisoned[:, 0, 0].tolist() == [255] * 3
    assert poisoned[:, 0, 1].tolist() == [1] * 3
    assert poisoned[:, 1, 1].tolist() == [9, 100, 100]
    assert (poisoned[:, 2:] == 100).all()


def test_empty_or_unreadable_mask_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "black.png")
    (tmp_path / "text.png").write_text("no image")
    for name, complaint in (("black.png", "all zero"), ("text.png", "cannot read"), ("none.png", "cannot read")):
        with pytest.raises(UserError, match=complaint):
            ATTACKS["badnet"](patch_mask_path=str(tmp_path / name)).check(dataset_spec("digits"))


def test_blended_formula_and_its_two_opacities(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 200).save(tmp_path / "grey.png")
    attack = ATTACKS["blended"](
        attack_trigger_img_path=str(tmp_path / "grey.png"),
        attack_train_blended_alpha=0.1,
        attack_test_blended_alpha=0.5,
    )
    images = torch.full((1, 1, 8, 8), 101, dtype=torch.uint8)
    assert attack.poison(images, train=True).unique().tolist() == [110]  # floor(90.9 + 20)
    assert attack.poison(images, train=False).unique().tolist() == [150]  # floor(50.5 + 100)


def test_blended_pattern_follows_the_seed() -> None:
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    first, second = (ATTACKS["blended"](random_seed=s).poison(images, train=True) for s in (0, 1))
    assert not torch.equal(first, second)
    assert first.amax() == 51  # a fifth of 255: the pattern uses the whole range


def make(attack: Attack, home: Path, monkeypatch: pytest.MonkeyPatch, **run: object) -> tuple[Path, dict]:
    monkeypatch.setenv("ULRL_HOME", str(home))
    options = AttackRun(dataset="digits", width=4, save_folder_name="made", device="cpu", **run)
    return run_attack(attack, options, TrainOptions(epochs=1, batch_size=64), bar=False)


@pytest.mark.parametrize("name", list(ATTACKS))
def test_record_holds_what_the_attack_did(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attack = ATTACKS[name](attack_target=3)
    folder, result = make(attack, tmp_path, monkeypatch, train_samples=700)
    record, (train, test) = load_record(folder), load_dataset("digits")
    assert record.attack == name
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result))
    poisoned = record.poisoned_test(test.spec)
    assert torch.equal(poisoned.original_indices, attack.judged(test.labels))
    assert torch.equal(poisoned.images, attack.poison(test.images[poisoned.original_indices], train=False))
    assert torch.equal(poisoned.original_labels, test.labels[poisoned.original_indices])
    if name == "prototype":
        assert record.bd_train is None
        assert result["after"]["asr"] is None
        return
    assert (folder / "trigger_preview.png").stat().st_size > 1000
    seen = record.poisoned_train(train)
    assert len(seen) == 700, "the subset that the model was trained on"
    changed = seen.labels != seen.original_labels
    assert (seen.labels[changed] == 3).all()
    touched = (seen.images != train.images[seen.original_indices]).flatten(1).any(1)
    assert touched.sum() == result["evidence"]["poisoned"] == 70
    assert changed[~touched].sum() == 0


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


def test_badnet_mask_of_another_size_stays_crisp(tmp_path: Path) -> None:
    mask = Image.new("RGB", (32, 32))
    mask.paste((255, 255, 255), (29, 29, 32, 32))
    mask.save(tmp_path / "mask.png")
    attack = ATTACKS["badnet"](patch_mask_path=str(tmp_path / "mask.png"))
    poisoned = attack.poison(torch.zeros(1, 1, 28, 28, dtype=torch.uint8), train=True)
    assert poisoned.unique().tolist() == [0, 255]


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.3, 0.7])
def test_blending_a_picture_with_itself_changes_nothing(alpha: float, tmp_path: Path) -> None:
    greys = torch.arange(256, dtype=torch.uint8).view(16, 16)
    Image.fromarray(greys.numpy()).save(tmp_path / "greys.png")
    attack = ATTACKS["blended"](attack_trigger_img_path=str(tmp_path / "greys.png"), attack_train_blended_alpha=alpha)
    assert torch.equal(attack.poison(greys[None, None], train=True)[0, 0], greys)
