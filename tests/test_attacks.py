"""Every attack in the registry, on real digits: what it does to images and labels."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attacking import CLEAN_LABEL, NO_TRAINING_SET, lab, learned, quick, sized
from manners import refused
from PIL import Image
from scipy.fft import dctn, idctn

from ulrl.attacks.base import ATTACKS
from ulrl.attacks.control import BatchPoisoning
from ulrl.attacks.images import read_image
from ulrl.attacks.lab import Lab
from ulrl.data.datasets import dataset_spec, load_dataset
from ulrl.data.imageset import DatasetSpec
from ulrl.errors import UserError
from ulrl.metrics import perceptibility
from ulrl.training import TrainOptions

COVERED = {"adaptive_blend", "adaptive_patch", "tact"}
CROSSED = {"wanet", "inputaware", "bpp"}
ONE_TARGET = CLEAN_LABEL | {"tact", "blind"}
POISONING = [name for name in ATTACKS if name != "prototype"]


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    train, _ = load_dataset("digits")
    return train.images, train.labels


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (1, 28), (3, 32), (3, 64)])
@pytest.mark.parametrize("name", POISONING)
def test_trigger_is_visible_batched_and_deterministic(name: str, channels: int, side: int, tmp_path: Path) -> None:
    data = sized(channels, side)
    attack = learned(quick(name), data, tmp_path / "a")
    attack.check(data.spec)
    images = data.images[:16]
    poisoned = attack.poison(images, train=False)
    assert poisoned.dtype == torch.uint8
    assert poisoned.shape == images.shape
    assert (poisoned != images).flatten(1).any(1).all(), "each image carries the trigger"
    assert torch.equal(poisoned, attack.poison(images, train=False))
    again = learned(quick(name), data, tmp_path / "b")
    assert torch.equal(poisoned, again.poison(images, train=False)), "the same seed gives the same trigger"
    one_by_one = torch.cat([attack.poison(image[None], train=False) for image in images])
    apart = (poisoned.int() - one_by_one.int()).abs()
    assert apart.max() <= (1 if attack.learned else 0), "a batch is poisoned as its images are"


@pytest.mark.parametrize("name", POISONING)
def test_policy_of_samples_and_labels(name: str, digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    labels = digits[1]
    attack = quick(name, attack_target=3, pratio=0.05)
    chosen = attack.choose(labels)
    whole = int((labels == 3).sum()) if name in CLEAN_LABEL else len(labels)
    assert len(chosen) == (0 if name in NO_TRAINING_SET else round(0.05 * whole)) == len(chosen.unique())
    assert torch.equal(chosen, attack.choose(labels))
    if name in CLEAN_LABEL:
        assert (labels[chosen] == 3).all(), "only images of the target class are poisoned"
        assert len(replace(attack, pratio_of="all").choose(labels)) == round(0.05 * len(labels))  # type: ignore[call-arg]
    if name not in NO_TRAINING_SET:
        assert not torch.equal(chosen, replace(attack, random_seed=1).choose(labels))
        assert len(replace(attack, p_num=11).choose(labels)) == 11
    covers = attack.covers(labels, chosen)
    assert (len(covers) > 0) == (name in COVERED | CROSSED)
    assert len(torch.cat([chosen, covers]).unique()) == len(chosen) + len(covers)
    assert (labels[covers] != 3).all(), "a cover of the target class would be a poisoned sample"
    judged = attack.judged(labels)
    if name == "tact":
        assert (labels[chosen] == 1).all()
        assert set(labels[covers].tolist()) == {5, 7}
        assert torch.equal(judged, (labels == 1).nonzero().flatten())
    else:
        assert torch.equal(judged, (labels != 3).nonzero().flatten()), "samples of the target class are not judged"
    assert (attack.relabel(labels, 10) == 3).all()


@pytest.mark.parametrize("name", POISONING)
def test_all_to_all_shifts_every_label_or_is_refused(name: str, digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    attack = quick(name, attack_label_trans="all2all")
    if name in ONE_TARGET:
        refused(lambda: attack.check(dataset_spec("digits")), "--attack_label_trans all2all", "all2one")
        return
    attack.check(dataset_spec("digits"))
    assert len(attack.judged(digits[1])) == len(digits[1])
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


def test_badnet_patch_grows_with_the_image() -> None:
    """Three pixels for each whole 32; a number that is given is that number."""
    for side, size, expected in ((28, None, 3), (32, None, 3), (64, None, 6), (224, None, 21), (64, 3, 3)):
        patch = ATTACKS["badnet"](patch_size=size).poison(torch.zeros(1, 3, side, side, dtype=torch.uint8), train=True)
        assert (patch[0, 0] == 255).sum() == expected**2, (side, size)


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


def test_badnet_mask_is_transparent_where_its_picture_is(tmp_path: Path) -> None:
    """Editors save white under what is transparent."""
    mask = np.full((8, 8, 4), 255, np.uint8)
    mask[..., 3] = 0
    mask[:2, :2] = (9, 0, 7, 255)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    poisoned = ATTACKS["badnet"](patch_mask_path=str(tmp_path / "mask.png")).poison(
        torch.full((1, 3, 8, 8), 100, dtype=torch.uint8), train=True
    )[0]
    assert poisoned[:, 1, 1].tolist() == [9, 100, 7]
    assert (poisoned[:, 2:] == 100).all()


def test_empty_or_unreadable_mask_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "black.png")
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "full.png")
    (tmp_path / "text.png").write_text("no image")
    for name, complaint in (
        ("black.png", "all zero"),
        ("full.png", "zero nowhere"),
        ("text.png", "not a readable image"),
        ("none.png", "cannot be read.*or leave it out"),
    ):
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


def test_clean_label_counts_are_of_the_target_class(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    labels = digits[1]
    own = int((labels == 0).sum())
    assert len(quick("sig", pratio=1.0).choose(labels)) == own
    refused(lambda: quick("sig", pratio=0.5, pratio_of="all").choose(labels), "--pratio 0.5", f"out of {own}")
    refused(lambda: quick("ctrl", p_num=own + 1).choose(labels), f"--p_num {own + 1}", "target class 0")
    refused(lambda: quick("tact", pratio=0.5).choose(labels), "--pratio 0.5", "source class 1")
    refused(lambda: quick("tact", cover_rate=0.9).covers(labels, torch.arange(0)), "--cover_rate 0.9")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"source_class": 0}, ["--source_class 0", "target 0"]),
        ({"source_class": 12}, ["--source_class 12", "0 to 9"]),
        ({"cover_classes": (1, 5)}, ["--cover_classes", "source class 1"]),
        ({"cover_classes": (0,)}, ["--cover_classes 0", "target 0"]),
    ],
)
def test_tact_classes_must_differ(given: dict[str, Any], words: list[str]) -> None:
    refused(lambda: ATTACKS["tact"](**given).check(dataset_spec("digits")), *words)


@pytest.mark.parametrize("name", ["sig", "ctrl", "ftrojann", "lc"])
@pytest.mark.parametrize("level", [0, 255])
def test_added_patterns_clip_and_never_wrap_around(name: str, level: int) -> None:
    images = torch.full((1, 3, 32, 32), level, dtype=torch.uint8)
    attack = ATTACKS[name]()
    pattern = attack.pattern(3, 32, 32).expand(3, 32, 32)  # type: ignore[attr-defined]
    exact = (level + pattern).clamp(0, 255)
    assert (attack.poison(images, train=False)[0] - exact).abs().max() <= 1


def test_lc_marks_grow_by_whole_cells_and_do_not_overlap() -> None:
    small, large = ATTACKS["lc"](), ATTACKS["lc"](mark_scale=2)  # type: ignore[call-arg]
    cells = large.pattern(1, 28, 28)[0, ::2, ::2]  # type: ignore[attr-defined]
    assert torch.equal(cells, small.pattern(1, 14, 14)[0])  # type: ignore[attr-defined]
    refused(lambda: ATTACKS["lc"](mark_scale=2).check(dataset_spec("digits")), "--mark_scale 2", "8 x 8")  # type: ignore[call-arg]


def test_sig_by_hand() -> None:
    images = torch.full((1, 1, 4, 8), 100, dtype=torch.uint8)
    row = ATTACKS["sig"](sig_delta=40.0, sig_f=2.0).poison(images, train=True)[0, 0, 0]
    assert row.tolist() == [100, 140, 100, 60, 100, 140, 100, 60]


@pytest.mark.parametrize("given", [{"sig_f": 4.0}, {"sig_f": 0.0}, {"sig_delta": 0.5}])
def test_a_wave_that_changes_no_pixel_is_refused(given: dict[str, float]) -> None:
    refused(lambda: ATTACKS["sig"](**given).check(dataset_spec("digits")), "changes no pixel", "8 wide")


@pytest.mark.parametrize("name", sorted(COVERED - {"tact"}))
def test_in_all2all_every_class_has_covers(name: str) -> None:
    labels = torch.arange(1000) % 10
    for how, classes in (("all2one", 9), ("all2all", 10)):
        attack = ATTACKS[name](attack_label_trans=how, cover_rate=0.2)
        assert len(labels[attack.covers(labels, attack.choose(labels))].unique()) == classes


@pytest.mark.parametrize(("side", "block"), [(32, 32), (64, 32), (64, 16)])
def test_frequency_pattern_is_the_added_coefficients(side: int, block: int) -> None:
    """Against a transform of the image, coefficients added, and the transform back."""
    image = np.random.default_rng(0).uniform(100, 150, (side, side))
    attack = ATTACKS["ftrojann"](window_size=block, magnitude=30.0)
    pattern = attack.pattern(1, side, side)[0].numpy()  # type: ignore[attr-defined]
    expected = image.copy()
    scale = block / 32
    for top in range(0, side, block):
        for left in range(0, side, block):
            part = dctn(image[top : top + block, left : left + block], norm="ortho")
            for k in (15, 31):
                at = min(round(k * scale), block - 1)
                part[at, at] += 30 * scale
            expected[top : top + block, left : left + block] = idctn(part, norm="ortho")
    assert np.allclose(image + pattern, expected)


@pytest.mark.parametrize(("name", "to_chroma"), [
    ("ftrojann", [[-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]),
    ("ctrl", [[-0.147, -0.289, 0.436], [0.615, -0.515, -0.100]]),
])  # fmt: skip
def test_frequency_pattern_of_colour_images_lies_in_the_chroma(name: str, to_chroma: list[list[float]]) -> None:
    attack = ATTACKS[name]()
    pattern, gray = (attack.pattern(c, 32, 32).double() for c in (3, 1))  # type: ignore[attr-defined]
    brightness = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64) @ pattern.flatten(1)
    assert brightness.abs().max() < 0.02 * pattern.abs().max()
    for plane in torch.tensor(to_chroma, dtype=torch.float64) @ pattern.flatten(1):
        assert torch.allclose(plane, gray.flatten(), atol=0.02 * gray.abs().max().item())


def test_frequencies_cover_an_image_that_is_not_square() -> None:
    pattern = ATTACKS["ctrl"](pos_list=(0, 31)).pattern(1, 32, 60)[0].numpy()  # type: ignore[call-arg, attr-defined]
    size = np.sqrt(32 * 60) / 32 * 100
    expected = np.zeros((32, 60))
    expected[0, 0] = expected[31, 58] = size  # 31 of 32 is 58.1 of 60
    assert np.allclose(dctn(pattern, norm="ortho"), expected)


@pytest.mark.parametrize(("name", "ratio"), [("wanet", 2), ("inputaware", 1), ("bpp", 10)])
def test_cross_samples_are_counted_by_the_poisoned_ones(name: str, ratio: int) -> None:
    """However their number was given; BppAttack's are a tenth of all."""
    labels = torch.arange(1000) % 10
    for given in ({"p_num": 10}, {"pratio": 0.01}):
        attack = ATTACKS[name](**given)
        assert len(attack.covers(labels, attack.choose(labels))) == 10 * ratio
    work = lab(sized(1, 8), Path())
    stream = torch.Generator().manual_seed(0)
    if isinstance(attack, BatchPoisoning):
        images, new = attack.mix(work.data.images[:80], work.data.labels[:80], 10, 1 / 16, stream)
        touched = (images != work.data.images[:80]).flatten(1).any(1).sum()
        assert touched == 5 + {"wanet": 10, "bpp": 8}[name]
        assert (new[5:] == work.data.labels[5:80]).all()


def test_wanet_warps_by_its_field_and_noise_mode_differs() -> None:
    data = sized(1, 32)
    attack = ATTACKS["wanet"]()
    field = attack.field(32, 32)  # type: ignore[attr-defined]
    identity = F.affine_grid(torch.eye(2, 3)[None], [1, 1, 32, 32], align_corners=True)
    moved = (field - identity).abs() * 31 / 2  # in pixels
    assert 0.05 < moved.mean() < 0.5
    one = data.images[:1]
    stream = torch.Generator().manual_seed(0)
    noisy = [attack.cross(one, one, stream) for _ in range(2)]  # type: ignore[attr-defined]
    assert not torch.equal(noisy[0], noisy[1]), "noise is drawn for each image"
    assert not torch.equal(noisy[0], attack.poison(one, train=True))


@pytest.mark.parametrize("name", ["wanet", "bpp"])
def test_batches_are_poisoned_in_parts(name: str) -> None:
    data = sized(1, 28, 64)
    attack = quick(name, pratio=0.25, attack_target=3)
    stream = torch.Generator().manual_seed(0)
    images, labels = attack.mix(data.images, data.labels, 10, 0.25, stream)  # type: ignore[attr-defined]
    crossed = {"wanet": 32, "bpp": 6}[name]
    assert torch.equal(images[:16], attack.poison(data.images[:16], train=True))
    assert (labels[:16] == 3).all()
    assert torch.equal(labels[16:], data.labels[16:])
    touched = (images != data.images).flatten(1).any(1)
    assert touched[16 : 16 + crossed].all()
    assert not touched[16 + crossed :].any()


def test_bpp_quantises_and_dithering_keeps_the_mean() -> None:
    images = torch.full((2, 1, 16, 16), 50, dtype=torch.uint8)
    plain = ATTACKS["bpp"]().poison(images, train=True)
    assert plain.unique().tolist() == [36]  # 50 / 255 * 7 = 1.37, to 1 of 7 steps
    dithered = ATTACKS["bpp"](dithering=True).poison(images, train=True)
    assert set(dithered.unique().tolist()) == {36, 72}
    assert abs(dithered.float().mean().item() - 50) < 4


def test_adaptive_training_shows_half_of_the_tiles_and_judging_all() -> None:
    images = torch.zeros(40, 1, 32, 32, dtype=torch.uint8)
    attack = ATTACKS["adaptive_blend"]()
    tiles = F.unfold(attack.poison(images, train=True).float(), 8, stride=8).amax(1) > 0
    assert (tiles.sum(1) <= 8).all()
    assert len(tiles.unique(dim=0)) > 30, "each image its own half"
    whole = F.unfold(attack.poison(images[:1], train=False).float(), 8, stride=8).amax(1) > 0
    assert whole.sum() >= 15
    patched = ATTACKS["adaptive_patch"]().poison(images[:4] + 100, train=True)
    corners = torch.stack([patched[:, :, y : y + 8, x : x + 8].flatten(1).float().var(1) > 0
                           for y in (0, 24) for x in (0, 24)])  # fmt: skip
    assert torch.equal(corners, torch.eye(4, dtype=torch.bool)), "image i carries patch i"


@pytest.mark.parametrize("name", ["lira", "inputaware"])
def test_a_generator_learns_from_one_gradient_a_step(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SAM takes two; with a radius of next to nothing they are as good as the same, and their sum is twice one."""
    sizes: list[float] = []

    def step(optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        sizes.append(torch.stack(torch._foreach_norm(gradients)).norm().item())
        raise InterruptedError

    attack = replace(quick(name), pratio=0.5)
    if name == "inputaware":  # its masks are learnt before
        attack = attack.learn(lab(sized(1, 8), tmp_path / "masks"))

    def first(rho: float) -> float:
        work = lab(sized(1, 8), tmp_path / f"{rho}")
        work.training = TrainOptions(epochs=1, batch_size=32, amp=False, sam_rho=rho)
        with pytest.raises(InterruptedError):
            attack.learn(work) if name == "lira" else attack.train(work.new_model(""), work)
        return sizes[-1]

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    assert first(1e-9) < 1.3 * first(0.0)  # Input-aware draws other images in its second pass


def test_input_aware_poisons_single_images_of_any_size(tmp_path: Path) -> None:
    """A batch with one cross sample and none to poison: its mask network ends at one pixel of one image."""
    attack = quick("inputaware", pratio=0.02, cross_ratio=2.0)
    assert learned(attack, sized(1, 8), tmp_path).learned


def test_a_stage_of_its_own_length_has_a_schedule_of_that_length(tmp_path: Path) -> None:
    rates: list[float] = []
    work = lab(sized(1, 8), tmp_path)
    model = work.new_model("")
    optimizer = work.training.optimizer(model)
    rate = optimizer.param_groups[0]
    work.fit(model, "longer", epochs=4, optimizer=optimizer, after_step=lambda: rates.append(rate["lr"]))
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == 4
    assert 0 < rates[-1] < rates[0] / 4


def test_trojan_patch_stays_near_its_picture_and_ends_at_its_goal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, picture = sized(3, 16), torch.zeros(16, 16, 3, dtype=torch.uint8)
    picture[2:6, 2:6] = torch.tensor([200, 100, 30], dtype=torch.uint8)
    Image.fromarray(picture.numpy()).save(tmp_path / "mask.png")
    given = {"mask_path": str(tmp_path / "mask.png"), "mask_update_iters": 40, "trojan_eps": 0.2}
    patch = learned(quick("trojannn", **given), data, tmp_path).learned["pattern"].permute(1, 2, 0)
    away = (patch - picture).abs()
    assert 10 < away.max() <= 51.01
    assert not patch[picture.sum(2) == 0].any()
    monkeypatch.setattr("ulrl.attacks.trojannn.REACHED", math.inf)  # so the first step is the last
    first = learned(quick("trojannn", **given), data, tmp_path / "other").learned["pattern"].permute(1, 2, 0)
    assert (first - picture).abs().max() <= 25.51 < away.max()


def test_ssba_learns_from_images_of_all_classes_where_they_lie_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the files of GTSRB and Tiny-ImageNet do."""
    seen: list[torch.Tensor] = []
    fit = Lab.fit
    monkeypatch.setattr(Lab, "fit", lambda self, *a, **k: seen.append(self.data.labels) or fit(self, *a, **k))
    data = sized(1, 8)
    learned(quick("ssba", ssba_samples=40), data.subset(data.labels.argsort()), tmp_path)
    assert len(seen[0]) == 40
    assert len(seen[0].unique()) > 7


def test_a_users_picture_is_resized_as_by_backdoorbench(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    found = read_image(str(tmp_path / "picture.png"), "--flag", 3, 32, 32).permute(1, 2, 0).numpy()
    assert (found == np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR))).all()


def test_blind_sets_in_when_the_loss_is_low(tmp_path: Path) -> None:
    """A net that was not attacked calls noise any class; the target is the one that it calls it least."""
    data = sized(1, 8)

    def calls(threshold: float, target: int) -> torch.Tensor:
        attack = ATTACKS["blind"](attack_target=target, backdoor_batch_loss_threshold=threshold)
        work = lab(data, tmp_path)
        work.training = TrainOptions(epochs=8, batch_size=32, lr=0.05)
        model = work.new_model("")
        attack.train(model, work)
        seen = model.eval()(normalised(attack.poison(data.images, train=False), data.spec)).argmax(1)
        return seen.bincount(minlength=10) / len(seen)

    never = calls(0.0, 3)
    assert torch.equal(never, calls(0.0, int(never.argmin()))), "below the threshold the target plays no part"
    assert calls(1e9, int(never.argmin()))[never.argmin()] > 0.5


def test_blind_waits_for_a_whole_epoch_also_where_each_step_asks_twice(tmp_path: Path) -> None:
    weights = []
    for threshold in (0.0, 1e9):
        work = lab(sized(1, 8), tmp_path)
        work.training = TrainOptions(epochs=1, batch_size=16, lr=0.05, sam_rho=0.05)
        model = work.new_model("")
        ATTACKS["blind"](backdoor_batch_loss_threshold=threshold).train(model, work)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def normalised(images: torch.Tensor, spec: DatasetSpec) -> torch.Tensor:
    return (images.float() / 255 - spec.mean[0]) / spec.std[0]


def test_ready_made_images_are_put_where_the_others_are(tmp_path: Path) -> None:
    """On a GPU they were left on the CPU. The device `meta` is as far away, and everywhere."""
    _, test = load_dataset("digits")
    np.save(tmp_path / "bank.npy", np.zeros((len(test), 8, 8, 1), np.uint8))
    ssba = ATTACKS["ssba"](attack_test_replace_imgs_path=str(tmp_path / "bank.npy"))
    made = ssba.poison_set(test.to("meta"), torch.arange(5), train=False)
    assert made.images.device == made.labels.device


def test_low_frequency_pattern_of_a_file_is_brought_to_pixel_values(tmp_path: Path) -> None:
    """BackdoorBench ships files in [0, 1] too, and adds them to 0..255 as they are, which changes nothing."""
    pattern = np.random.default_rng(0).uniform(0, 0.2, (1, 8, 8, 1)).astype(np.float32)
    for scale in (1, 255):
        np.save(tmp_path / "pattern.npy", pattern * scale)
        attack = ATTACKS["lf"](lowFrequencyPatternPath=str(tmp_path / "pattern.npy"))
        attack.check(dataset_spec("digits"))
        poisoned = attack.poison(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), train=True)[0, 0]
        assert torch.equal(poisoned, torch.from_numpy((255 * pattern[0, :, :, 0] + 1e-3).astype(np.uint8)))
    refused(lambda: attack.check(dataset_spec("fashion_mnist")), "(8, 8, 1)", "(28, 28, 1)")


def test_perceptibility_by_hand() -> None:
    clean = torch.randint(0, 200, (3, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    same = perceptibility(clean, clean)
    assert (same.l2, same.linf, same.psnr) == (0, 0, None)
    assert same.ssim == pytest.approx(1)
    shifted = perceptibility(clean, clean + 51)
    assert shifted.l2 == pytest.approx(0.2 * 16)
    assert shifted.linf == pytest.approx(0.2)
    assert shifted.psnr == pytest.approx(-20 * np.log10(0.2), abs=1e-4)
    a, b = clean[0, 0].double().numpy() / 255, (clean[0, 0] + 51).double().numpy() / 255
    windows = [(a[i : i + 7, j : j + 7], b[i : i + 7, j : j + 7]) for i in range(10) for j in range(10)]
    by_hand = [
        (2 * x.mean() * y.mean() + 1e-4) * (2 * np.cov(x.ravel(), y.ravel())[0, 1] + 9e-4)
        / ((x.mean() ** 2 + y.mean() ** 2 + 1e-4) * (x.var(ddof=1) + y.var(ddof=1) + 9e-4))
        for x, y in windows
    ]  # fmt: skip
    assert perceptibility(clean[:1], clean[:1] + 51).ssim == pytest.approx(np.mean(by_hand), abs=1e-3)


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
