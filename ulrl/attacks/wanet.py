"""WaNet (Nguyen and Tran, arXiv 2102.10369): the image is warped by a smooth fixed field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from ulrl.attacks.base import register
from ulrl.attacks.control import BatchPoisoning
from ulrl.attacks.images import whole_pixels
from ulrl.data.imageset import DatasetSpec
from ulrl.options import option
from ulrl.seeds import generator


@register("wanet")
@dataclass(frozen=True)
class WaNet(BatchPoisoning):
    """Pixels are moved along a field: k x k random vectors of mean size 1, enlarged, times s / 2 pixels.

    Cross samples (noise mode) are warped by the field and a random vector at every pixel, drawn anew for
    each, of up to half a pixel; they keep their label.
    """

    ignored: ClassVar[tuple[str, ...]] = tuple("random_rotation random_crop grid_rescale".split())
    s: float = option(0.5, "strength of the warp", source="paper", low=0)
    k: int = option(4, "vectors along each side of the field", source="paper", low=2)
    cross_ratio: float = option(2.0, "noise-mode samples for each poisoned one", source="paper", low=0)

    def cross_share(self, share: float) -> float:
        return share * self.cross_ratio

    def field(self, height: int, width: int) -> torch.Tensor:
        """Where each pixel is taken from, (x, y) in [-1, 1]: float32 [1, height, width, 2]."""
        vectors = torch.rand(1, 2, self.k, self.k, generator=generator(self.random_seed, "field")) * 2 - 1
        smooth = F.interpolate(vectors / vectors.abs().mean(), (height, width), mode="bicubic", align_corners=True)
        x, y = torch.meshgrid(torch.linspace(-1, 1, width), torch.linspace(-1, 1, height), indexing="xy")
        warp = self.s * smooth.permute(0, 2, 3, 1) / torch.tensor([width, height])
        return (torch.stack([x, y], -1) + warp).clamp(-1, 1)

    def poison(self, images: torch.Tensor, *, train: bool) -> torch.Tensor:
        return _warped(images, self.field(*images.shape[2:]).to(images.device).expand(len(images), -1, -1, -1))

    def cross(self, images: torch.Tensor, others: torch.Tensor, stream: torch.Generator) -> torch.Tensor:
        height, width = images.shape[2:]
        noise = torch.rand(len(images), height, width, 2, generator=stream, device=images.device) * 2 - 1
        size = torch.tensor([width, height], device=images.device)
        return _warped(images, (self.field(height, width).to(images.device) + noise / size).clamp(-1, 1))

    def parameters(self, spec: DatasetSpec) -> Mapping[str, torch.Tensor]:
        return {"field": self.field(spec.height, spec.width)}


def _warped(images: torch.Tensor, field: torch.Tensor) -> torch.Tensor:
    """uint8 [B, C, H, W] read at the places of `field` [B, H, W, 2], bilinear."""
    return whole_pixels(F.grid_sample(images.float(), field, align_corners=True))
