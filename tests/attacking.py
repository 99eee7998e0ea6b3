"""Attacks made quick, a few digits for them, and whole runs of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ulrl.attacks.base import ATTACKS, Attack
from ulrl.attacks.lab import Lab
from ulrl.configure import AttackRun
from ulrl.data.datasets import load_dataset
from ulrl.data.imageset import DatasetSpec, ImageSet
from ulrl.models import build_model
from ulrl.runs.attacking import run_attack
from ulrl.training import Monitor, TrainOptions

CLEAN_LABEL = {"sig", "lc", "ctrl"}
NO_TRAINING_SET = {"prototype", "lira", "blind"}

# What makes a learning attack quick; rates that give whole samples on the few digits.
QUICK: dict[str, dict[str, Any]] = {
    "lc": {"pgd_steps": 3},
    "lf": {"lf_steps": 3, "lf_images": 64},
    "trojannn": {"mask_update_iters": 5},
    "ssba": {"ssba_epochs": 1, "ssba_samples": 64},
    "inputaware": {"clean_train_epochs": 1, "generator_width": 4},
    "lira": {"both_train_epochs": 1, "generator_width": 4, "eps": 0.1},
    "adaptive_blend": {"pratio": 0.05, "cover_rate": 0.05},
    "adaptive_patch": {"pratio": 0.05, "cover_rate": 0.05},
    "tact": {"pratio": 0.05, "cover_rate": 0.05},
}


def quick(name: str, **given: Any) -> Attack:
    return ATTACKS[name](**{**QUICK.get(name, {}), **given})


def sized(channels: int, side: int, count: int = 96) -> ImageSet:
    """Digits of another size, gray or coloured at random."""
    train, _ = load_dataset("digits")
    part = train.subset(torch.arange(count))
    images = F.interpolate(part.images.float(), (side, side), mode="bilinear")
    tint = torch.rand(count, channels, 1, 1, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.5
    spec = DatasetSpec(f"digits{side}", 10, channels, side, side, (0.3,) * channels, (0.4,) * channels)
    return ImageSet((images * tint).to(torch.uint8), part.labels, spec)


def lab(data: ImageSet, cache: Path, key: str = "") -> Lab:
    def new_model(stream: str) -> torch.nn.Module:
        return build_model("preactresnet18", 10, data.spec.channels, 4, stream=stream)

    training = TrainOptions(epochs=1, batch_size=32)
    return Lab(data, torch.arange(len(data)), training, Monitor(), new_model, None, cache, lambda: key)


def learned(attack: Attack, data: ImageSet, cache: Path) -> Attack:
    """The attack with all that its trigger needs, learned on a few images."""
    attack = attack.learn(lab(data, cache))
    if attack.trigger_from_training:
        work = lab(data, cache)
        attack = attack.train(work.new_model(""), work)
    return attack


def make(attack: Attack, home: Path, monkeypatch: pytest.MonkeyPatch, **run: object) -> tuple[Path, dict[str, Any]]:
    monkeypatch.setenv("ULRL_HOME", str(home))
    options = AttackRun(**{"dataset": "digits", "width": 4, "save_folder_name": "made", "device": "cpu", **run})  # type: ignore[arg-type]
    return run_attack(attack, options, TrainOptions(epochs=1, batch_size=64), bar=False)
