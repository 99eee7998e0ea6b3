"""CTRL (Li et al., arXiv 2210.07346): two frequencies in the chroma of images of the target class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ulrl.attacks.additive import Additive
from ulrl.attacks.base import CleanLabel, register
from ulrl.attacks.frequency import REFERENCE, coloured, cosine_pattern
from ulrl.data.imageset import DatasetSpec
from ulrl.errors import UserError
from ulrl.options import option

# One unit of U and of V (ITU-R BT.601) in red, green and blue.
UV = ((0.0, -0.395, 2.032), (1.14, -0.581, 0.0))


@register("ctrl")
@dataclass(frozen=True)
class CTRL(CleanLabel, Additive):
    """Clean-label: `magnitude` is added to the cosine coefficients (p, p) of U and V over the whole image.

    Of the brightness of a gray image, which has no U and V. Clipped at black and white, where
    BackdoorBench's pixels wrap around. On images that are not 32x32 the positions grow and shrink with the image, where
    BackdoorBench's stay, which on 64x64 are waves twice as long.
    """

    ignored: ClassVar[tuple[str, ...]] = tuple(
        ("use_dct use_yuv trigger_channels use_clean_label window_size YUV channel_list").split()
    )
    magnitude: float = option(100.0, "added to each coefficient of a 32x32 image", source="BackdoorBench", low=0)
    pos_list: tuple[int, ...] = option((15, 31), "the coefficients, each row and column", source="BackdoorBench")

    def check(self, spec: DatasetSpec) -> None:
        super().check(spec)
        if not self.pos_list or not 0 <= min(self.pos_list) <= max(self.pos_list) < REFERENCE:
            raise UserError(f"--pos_list {list(self.pos_list)}: give one or more whole numbers from 0 to 31")

    def pattern(self, channels: int, height: int, width: int) -> torch.Tensor:
        positions = [(p, p) for p in self.pos_list]
        return coloured(cosine_pattern(height, width, (height, width), positions, self.magnitude), channels, UV)
