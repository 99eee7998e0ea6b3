"""SIG (Barni et al., arXiv 1902.11237): a faint sinusoid over images of the target class."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ulrl.attacks.additive import Additive
from ulrl.attacks.base import CleanLabel, register
from ulrl.data.imageset import DatasetSpec
from ulrl.errors import UserError
from ulrl.options import option


@register("sig")
@dataclass(frozen=True)
class SIG(CleanLabel, Additive):
    """Clean-label: v(i, j) = delta sin(2 pi j f / width) is added to column j, the same in every row and channel."""

    sig_delta: float = option(40.0, "amplitude in pixel values", source="BackdoorBench", low=0, high=255)
    sig_f: float = option(6.0, "periods over the width of the image", source="paper", low=0)

    def check(self, spec: DatasetSpec) -> None:
        super().check(spec)
        if self.pattern(spec.channels, spec.height, spec.width).abs().max() < 1:
            raise UserError(
                f"--sig_f {self.sig_f:g} with --sig_delta {self.sig_delta:g} changes no pixel of images {spec.width} "
                "wide; take another --sig_f or a larger --sig_delta"
            )

    def pattern(self, channels: int, height: int, width: int) -> torch.Tensor:
        columns = torch.arange(width, dtype=torch.float64)
        return (self.sig_delta * torch.sin(2 * math.pi * columns * self.sig_f / width)).expand(1, height, width)
