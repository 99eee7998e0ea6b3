"""BppAttack (Wang et al., arXiv 2205.13383): the image in fewer shades."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ulrl.attacks.base import register
from ulrl.attacks.control import BatchPoisoning
from ulrl.attacks.images import whole_pixels
from ulrl.options import option


@register("bpp")
@dataclass(frozen=True)
class Bpp(BatchPoisoning):
    """Pixels are quantised to `squeeze_num` shades, with Floyd-Steinberg dithering when asked for.

    Negative samples get the quantisation residue of another image and keep their label. The paper's
    contrastive loss is left out, as it is by BackdoorBench.
    """

    ignored: ClassVar[tuple[str, ...]] = tuple("random_rotation random_crop grid_rescale".split())
    squeeze_num: int = option(8, "shades that are left", source="BackdoorBench", low=2, high=255)
    dithering: bool = option(False, "spread each pixel's error over its neighbours", source="BackdoorBench")
    neg_ratio: float = option(0.1, "negative samples, as a share of all", source="BackdoorBench", low=0, high=1)

    def cross_share(self, share: float) -> float:
        return self.neg_ratio

    def poison(self, images: torch.Tensor, *, train: bool) -> torch.Tensor:
        return whole_pixels(self._dithered(images.float()) if self.dithering else self._quantised(images.float()))

    def cross(self, images: torch.Tensor, others: torch.Tensor, stream: torch.Generator) -> torch.Tensor:
        return whole_pixels(images + (self.poison(others, train=True).float() - others))

    def _quantised(self, values: torch.Tensor) -> torch.Tensor:
        steps = self.squeeze_num - 1
        return (values / 255 * steps).round() / steps * 255

    def _dithered(self, values: torch.Tensor) -> torch.Tensor:
        """Pixel by pixel in reading order, all images at once; float [B, C, H, W] in and out."""
        height, width = values.shape[2:]
        rest = torch.nn.functional.pad(values, (1, 1, 0, 1))  # the errors of border pixels fall into the margin
        for y in range(height):
            for x in range(1, width + 1):
                old = rest[:, :, y, x].clone()
                rest[:, :, y, x] = self._quantised(old).clamp(0, 255)
                error = old - rest[:, :, y, x]
                for dy, dx, weight in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                    rest[:, :, y + dy, x + dx] += error * (weight / 16)
        return rest[:, :, :height, 1 : width + 1]
