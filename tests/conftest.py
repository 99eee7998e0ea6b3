"""What several test files share: one tiny record and two nets of a user's, trained once per session."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from own_nets import TARGET, stamp, trained
from sklearn.datasets import load_digits
from torch import nn

from ulrl import seeds
from ulrl.cli import attack_main

TINY = "--dataset digits --width 4 --epochs 1 --device cpu".split()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="all cases of tests/hostile, not only the quick ones")
    parser.addoption("--draws", help="a word: all streams of randomness draw otherwise, as with other seeds")


def pytest_configure(config: pytest.Config) -> None:
    if word := config.getoption("--draws"):
        draw = seeds.stream_seed
        seeds.stream_seed = lambda seed, stream: draw(seed, f"{word}:{stream}")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the cache of the user who runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def trained_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ULRL_HOME that holds record/tiny: BadNets on the digits. Copy it rather than change it."""
    home = tmp_path_factory.mktemp("trained")
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        patch.setenv("ULRL_HOME", str(home))
        with pytest.raises(SystemExit) as left:
            attack_main("badnet", [*TINY, "--save_folder_name", "tiny"])
    assert left.value.code == 0, said.getvalue()[-2000:]
    return home


# A net of the user's own, which knows the digits; see own_nets.py.


@pytest.fixture(scope="session")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """In [-1, 1], shuffled."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.from_numpy(images[order] / 8 - 1).float().view(-1, 1, 8, 8)
    return x, torch.from_numpy(labels[order]).long()


@pytest.fixture(scope="session")
def backdoored(digits: tuple[torch.Tensor, torch.Tensor]) -> nn.Module:
    """A seventh of its training images carry a gray pixel and the label 7."""
    x, y = digits[0][:1200].clone(), digits[1][:1200].clone()
    x[:180], y[:180] = stamp(x[:180]), TARGET
    return trained(x, y)


@pytest.fixture(scope="session")
def innocent(digits: tuple[torch.Tensor, torch.Tensor]) -> nn.Module:
    return trained(digits[0][:1200], digits[1][:1200])


@pytest.fixture(scope="session")
def clean(digits: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Two hundred that it was not trained on."""
    return digits[0][1200:1400], digits[1][1200:1400]


# Folders


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ULRL_HOME; the working directory is another one."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    monkeypatch.setenv("ULRL_HOME", str(home))
    monkeypatch.chdir(elsewhere)
    return home


@pytest.fixture
def tiny_home(trained_home: Path, empty_home: Path) -> Path:
    """A ULRL_HOME of this test's own, with record/tiny in it."""
    shutil.copytree(trained_home / "record", empty_home / "record")
    return empty_home
