"""Garments over photographs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import peer_data as peer
import pytest
import torch

from ulrl.data import scenes
from ulrl.data.datasets import SPECS, load_dataset
from ulrl.errors import UserError


def garments(count: int) -> np.ndarray:
    return np.random.PCG64(5).random_raw(count * 28 * 28).astype(np.uint8).reshape(count, 28, 28)


def test_the_bytes_are_the_same_everywhere() -> None:
    digests = [
        hashlib.sha256(scenes.scenes(garments(60), 0, test=test).data).hexdigest()[:16] for test in (False, True)
    ]
    assert digests == ["7f303a2265f1d86b", "bcad1d9f35ee639a"]


def test_backgrounds_of_tests_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    photograph = np.zeros((120, 200, 3), np.uint8)
    photograph[:, 150:] = (90, 160, 230)  # the right quarter
    monkeypatch.setattr(scenes, "_photographs", lambda: [photograph])
    black = np.zeros((40, 28, 28), np.uint8)  # nothing of the garment shows
    assert scenes.scenes(black, 0, test=False).max() == 0
    assert (scenes.scenes(black, 0, test=True) == photograph[0, -1]).all()


def test_a_background_is_a_shrunken_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ramp that rises by 2 per column, and stays one, at every size and either way round."""
    ramp = np.broadcast_to(np.arange(100, dtype=np.uint8)[None, :, None] * 2, (40, 100, 3))
    monkeypatch.setattr(scenes, "_photographs", lambda: [ramp])
    made = scenes.scenes(np.zeros((50, 28, 28), np.uint8), 0, test=False).astype(int)
    steps = np.diff(made[:, 0, :, 0], axis=1)
    slope = (made[:, 0, -1, 0] - made[:, 0, 0, 0]) / 31
    assert (made == made[:, :1, :, :1]).all()  # rows alike, gray
    assert ((slope < 0) | (slope > 0)).all()
    assert (slope < 0).any()
    assert (slope > 0).any()
    assert (np.abs(steps - slope[:, None]) <= 2).all()
    assert np.abs(slope).min() >= 2 * 32 / 32 - 0.1
    assert np.abs(slope).max() <= 2 * 40 / 32 + 0.1  # the photograph is 40 high


def test_garments_lie_over_photographs() -> None:
    cloth = np.zeros((200, 28, 28), np.uint8)
    cloth[:, 4:24, 4:24] = 64  # from this gray on opaque
    dressed = scenes.scenes(cloth, 3, test=False)
    bare = scenes.scenes(np.zeros_like(cloth), 3, test=False)
    changed = (dressed != bare).any(-1)
    rows, columns = changed.any(2).sum(1), changed.any(1).sum(1)
    assert rows.max() == 20
    assert columns.max() == 20
    flat = dressed[:, 14:18, 14:18]  # inside the garment, wherever it lies
    assert (flat == flat[:, :1, :1]).all()
    assert flat[:, 0, 0].std(0).min() > 5  # colours differ
    assert len(np.unique(changed.any(2).argmax(1))) == 5  # places too


def test_the_data_set_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = peer.write_mnist(tmp_path / "fashion_mnist" / "FashionMNIST" / "raw", 12, 7, zipped=False)
    read = load_dataset("fashion_scenes", str(tmp_path))
    for data, part, size in zip(read, ("train", "t10k"), (12, 7), strict=True):
        assert data.spec == SPECS["fashion_scenes"]
        assert data.images.shape == (size, 3, 32, 32)
        assert data.labels.tolist() == held[f"{part}-labels-idx1-ubyte"].tolist()
    monkeypatch.setattr(scenes, "scenes", lambda *_, **__: pytest.fail("made again"))
    again = load_dataset("fashion_scenes", str(tmp_path))
    assert all(torch.equal(a.images, b.images) for a, b in zip(read, again, strict=True))


def test_other_garments_are_not_taken_from_the_cache() -> None:
    first, second = garments(5), garments(6)[1:]
    made = [scenes.cached_scenes(g, 0, test=False) for g in (first, second, first)]
    assert (made[0] == made[2]).all()
    assert (made[1] == scenes.scenes(second, 0, test=False)).all()


def test_other_photographs_are_not_taken_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of another version of the packages that ship them."""
    for photograph in ("coffee.png", "chelsea.png"):
        monkeypatch.setattr(scenes, "PHOTOGRAPHS", {"skimage": ("data", [photograph])})
        assert (scenes.cached_scenes(garments(5), 0, test=False) == scenes.scenes(garments(5), 0, test=False)).all()


def test_a_missing_photograph_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "PHOTOGRAPHS", {"skimage": ("data", ["nowhere.png"])})
    with pytest.raises(UserError, match=r"nowhere\.png"):
        scenes.scenes(garments(1), 0, test=False)


def test_what_was_drawn_is_what_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which photograph and which tint, beyond a block too."""
    flat = [np.full((64, 200, 3), 20 * k, np.uint8) for k in range(5)]
    monkeypatch.setattr(scenes, "_photographs", lambda: flat)
    n = scenes.BLOCK + 50
    cloth = np.zeros((n, 28, 28), np.uint8)
    cloth[:, 4:24, 4:24] = 64
    made = scenes.scenes(cloth, 3, test=True).astype(int)
    photograph, tint = scenes.drawn_facts(n, 3, test=True)
    assert (made[:, 0, 0] == 20 * photograph[:, None]).all()
    worn = made[:, 15, 15]  # inside every garment: offset + 64 tint / 255
    assert np.abs(np.diff(worn) - np.diff(64 * tint // 255)).max() <= 1  # 64 is opaque
