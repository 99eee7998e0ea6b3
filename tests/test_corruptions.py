"""Corruptions at random, and those that learn."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ulrl.defenses.astray import Fixed, Learning, _Near, leading
from ulrl.defenses.corruptions import KINDS, Draws, _patch, corrupt, enlarged, moved

CPU = torch.device("cpu")
SHAPES = [(24, 3, 32, 32), (24, 1, 8, 8), (1, 3, 16, 12)]


def images(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_kind_changes_images_of_any_size(shape: tuple[int, ...]) -> None:
    plain = images(*shape)
    for kind in set(KINDS):
        for seed in range(4):
            changed = kind(plain, Draws(seed, CPU))
            assert changed.shape == plain.shape
            assert changed.isfinite().all()
        if len(plain) > 1:  # one alone may be blended with itself, or missed by its patch
            assert not torch.equal(changed, plain), kind


@pytest.mark.parametrize("shape", SHAPES)
def test_corrupt_keeps_range_and_seed(shape: tuple[int, ...]) -> None:
    plain = images(*shape)
    once, again, other = (corrupt(plain, Draws(seed, CPU)) for seed in (3, 3, 4))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert once.min() >= 0
    assert once.max() <= 1


def test_every_image_is_corrupted() -> None:
    plain = images(200, 3, 32, 32)
    same = (corrupt(plain, Draws(0, CPU)) == plain).flatten(1).all(1)
    assert same.float().mean() < 0.1  # a patch may miss, and a blend be faint


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("few", "many"), [((3, 3), (32, 32)), ((1, 4), (9, 5)), ((8, 8), (8, 8)), ((6, 4), (3, 2))])
def test_a_field_is_enlarged_as_torch_does_it(mode: str, few: tuple[int, int], many: tuple[int, int]) -> None:
    field = images(2, 3, *few)
    ours = enlarged(field, images(2, 1, *many), mode)
    assert torch.allclose(ours, F.interpolate(field, many, mode=mode, align_corners=True), atol=1e-5)


def test_moved_reads_each_pixel_from_elsewhere() -> None:
    plain = images(2, 3, 9, 9)
    flow = torch.zeros(2, 2, 9, 9)
    assert torch.allclose(moved(plain, flow), plain, atol=1e-5)
    flow[:, 0] = 1 / 8  # of a side, that is one of the 8 steps between 9 pixels, along x
    assert torch.allclose(moved(plain, flow)[..., :-1], plain[..., 1:], atol=1e-5)


def test_learning_corruptions_climb_the_loss() -> None:
    """The loss rises with brightness in one corner: blends become bright there, and patches that lie there."""
    plain = images(64, 3, 16, 16) * 0.5
    learning = Learning(Draws(0, CPU), life=1000)
    seen = []
    for _ in range(20):
        changed = learning.apply(plain)
        loss = changed[:, :, :8, :8].mean()
        seen.append(loss.item())
        loss.backward()
        learning.step()
    assert min(seen[-5:]) > max(seen[:2])
    assert changed.min() >= 0
    assert changed.max() <= 1


def test_learning_corruptions_start_anew() -> None:
    """Without it they would stay where the net has learnt not to be fooled."""
    plain = images(64, 3, 16, 16)
    far = []
    for life in (3, 1000):
        learning = Learning(Draws(0, CPU), life=life)
        for _ in range(30):
            changed = learning.apply(plain)
            changed.mean().backward()
            learning.step()
        far.append(changed.mean().item())
    assert far[0] < far[1] - 0.01


def test_fewer_images_than_corruptions() -> None:
    learning = Learning(Draws(0, CPU))
    for size in (3, 1, 20):
        learning.apply(images(size, 1, 8, 8)).sum().backward()
        learning.step()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_fixed_corruption_does_the_same_to_every_image(shape: tuple[int, ...]) -> None:
    """However many there are, unless it takes pictures from among them."""
    plain = images(1, *shape[1:]).expand(shape)
    for kind in set(KINDS):
        for seed in range(4):
            changed = Fixed(kind, seed)(plain)
            assert changed.shape == plain.shape
            assert torch.allclose(changed, changed[:1].expand(shape), atol=1e-6), kind
            if kind.__name__ not in ("image", "_patch"):
                assert torch.allclose(changed[:1], Fixed(kind, seed)(plain[:1]), atol=1e-6), kind


def test_what_is_drawn_for_a_fixed_one_does_not_hang_on_the_batch() -> None:
    """A patch may be cut from any image of it: laid over the black one, white ones show how thickly."""
    x, compared = torch.ones(16, 3, 8, 8), 0
    x[0] = 0
    for seed in range(300):
        way = Fixed(_patch, seed)
        many, few = way(x)[0], way(x[:2])[0]
        if many.any() and few.any():  # else it was cut from the black one itself
            assert torch.equal(many, few), seed
            compared += 1
    assert compared > 100


def test_what_leads_astray_is_found_from_where_chance_does_not_lead() -> None:
    """A net that calls 1 what is a fifth brighter in the upper half than in the lower."""
    plain, labels = images(60, 1, 32, 32), torch.arange(60) % 3

    def answers(x: torch.Tensor) -> torch.Tensor:
        slope = x[:, :, :16].mean((1, 2, 3)) - x[:, :, 16:].mean((1, 2, 3))
        return torch.stack([0 * slope, 60 * (slope - 0.2), 0 * slope], 1).softmax(1)

    by_chance = [answers(Fixed(kind, seed)(plain))[:, 1].mean() for seed in range(70) for kind in set(KINDS)]
    assert max(by_chance) < 0.1
    for seed in range(3):
        found = leading(answers, plain, labels, Draws(seed, CPU), 600, per_class=1)
        assert 1 <= len(found) <= 3
        led = [(answers(way(plain)) - answers(plain)).mean(0)[1].item() for way in found]
        assert max(led) > 0.15
        assert max(found.values()) == pytest.approx(max(led), abs=0.2)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_near_differs_by_little(shape: tuple[int, ...]) -> None:
    """The more, the longer the step; and after many steps it is as likely as if it were drawn anew."""
    plain, draws = images(*shape), Draws(2, CPU)
    for kind in [kind for kind in KINDS if kind.__name__ not in ("image", "_patch", "_levels")]:
        away = []
        for size in (0, 0.02, 1):
            pairs = [(Fixed(kind, seed), Fixed(kind, seed).near(draws, size)) for seed in range(12)]
            away.append(sum((one(plain) - other(plain)).abs().mean().item() for one, other in pairs))
        assert away[0] < 1e-5
        assert away[0] < away[1] < away[2] / 2, kind
    far = Fixed(KINDS[0], 0)
    for _ in range(50):
        far = far.near(draws, 0.3)
    numbers = _Near(far.seed, CPU, far.steps).uniform(4000)
    assert abs(numbers.mean() - 0.5) < 0.03
    assert abs(numbers.std() - math.sqrt(1 / 12)) < 0.02


@pytest.mark.parametrize("tries", [1, 8, 21])
def test_no_more_are_kept_than_were_tried(tries: int) -> None:
    plain = images(5, 3, 8, 8)
    found = leading(lambda x: x.mean((2, 3)).softmax(1), plain, torch.tensor([0, 1, 2, 0, 0]), Draws(1, CPU), tries)
    assert 1 <= len(found) <= min(tries, 9)
    assert all(far <= 1 for far in found.values())
