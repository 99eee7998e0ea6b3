"""Corruptions at random, and those that learn."""

from __future__ import annotations

import pytest
import torch

from ulrl.defenses.corruptions import KINDS, Draws, Learning, corrupt, moved

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
