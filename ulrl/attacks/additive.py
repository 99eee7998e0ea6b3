"""Triggers that add one fixed pattern to every image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ulrl.attacks.base import Attack
from ulrl.attacks.images import whole_pixels
from ulrl.data.imageset import DatasetSpec


@dataclass(frozen=True)
class Additive(Attack):
    """x + pattern, clipped to [0, 255] and cut to whole pixel values. A subclass gives the pattern."""

    def pattern(self, channels: int, height: int, width: int) -> torch.Tensor:
        """float [channels, height, width], or what broadcasts to it, in pixel values."""
        raise NotImplementedError

    def poison(self, images: torch.Tensor, *, train: bool) -> torch.Tensor:
        pattern = self.pattern(*images.shape[1:]).to(images.device, torch.float32)
        return whole_pixels(images.float().add_(pattern))

    def parameters(self, spec: DatasetSpec) -> Mapping[str, torch.Tensor]:
        return {"pattern": self.pattern(spec.channels, spec.height, spec.width).float(), **self.learned}
