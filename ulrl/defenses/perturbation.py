"""What the defenses share that look for a perturbation or a trigger: the pixels' scale, and a model held still."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.training import frozen, in_mode


def pixel(data: ImageSet) -> torch.Tensor:
    """By how much a normalised value changes when a pixel goes from 0 to 1: float32 [1, C, 1, 1]."""
    return 1 / torch.tensor(data.spec.std, device=data.device).view(1, -1, 1, 1)


def mean_pixel(data: ImageSet) -> torch.Tensor:
    """The data set's mean, of pixels in [0, 1], which is 0 when normalised: float32 [1, C, 1, 1]."""
    return torch.tensor(data.spec.mean, device=data.device).view(1, -1, 1, 1)


def squash(raw: torch.Tensor) -> torch.Tensor:
    """Any number into (0, 1), as masks and patterns are searched for without a bound."""
    return (raw.tanh() + 1) / 2


@contextlib.contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in eval mode and no gradient is computed for its weights."""
    with frozen(model.parameters()), in_mode(model, training=False):
        yield
