"""FTrojan (Wang et al., arXiv 2111.10991): a mid and a high frequency in the chroma of every block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ulrl.attacks.additive import Additive
from ulrl.attacks.base import register
from ulrl.attacks.frequency import CHROMA, REFERENCE, coloured, cosine_pattern
from ulrl.data.imageset import DatasetSpec
from ulrl.errors import UserError
from ulrl.options import option


@register("ftrojann")
@dataclass(frozen=True)
class FTrojan(Additive):
    """`magnitude` is added to the cosine coefficients (p, p) of Cb and Cr; of the brightness of a gray image.

    Exact, where BackdoorBench rounds the image to whole YCrCb values on the way there and back.

    Not the frequency-domain poisoning of Yue et al. (arXiv 2207.04209), which is not built: its text was not at hand,
    and no release of it was found. Of its settings this is nearest to the one with changed labels, `ctrl` to clean
    labels; the one without labels is for self-supervised training.
    """

    ignored: ClassVar[tuple[str, ...]] = tuple("YUV channel_list".split())
    magnitude: float = option(30.0, "added to each coefficient of a 32x32 block", source="BackdoorBench", low=0)
    window_size: int = option(32, "side of a block; at most the image's", source="BackdoorBench", low=2)
    pos_list: tuple[int, ...] = option((15, 15, 31, 31), "row and column of each coefficient", source="BackdoorBench")

    def check(self, spec: DatasetSpec) -> None:
        super().check(spec)
        if not self.pos_list or len(self.pos_list) % 2 or not 0 <= min(self.pos_list) <= max(self.pos_list) < REFERENCE:
            raise UserError(f"--pos_list {list(self.pos_list)}: give pairs of row and column, each from 0 to 31")

    def pattern(self, channels: int, height: int, width: int) -> torch.Tensor:
        positions = list(zip(self.pos_list[::2], self.pos_list[1::2], strict=True))
        side = min(self.window_size, height, width)
        plane = cosine_pattern(height, width, (side, side), positions, self.magnitude)
        return coloured(plane, channels, CHROMA)
