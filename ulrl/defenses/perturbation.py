"""What the defenses share that look for a perturbation of the pixels: its scale, and a model held still."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.training import in_mode


def pixel(data: ImageSet) -> torch.Tensor:
    """By how much a normalised value changes when a pixel goes from 0 to 1: float32 [1, C, 1, 1]."""
    return 1 / torch.tensor(data.spec.std, device=data.device).view(1, -1, 1, 1)


@contextlib.contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in eval mode and no gradient is computed for its weights."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        with in_mode(model, training=False):
            yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
