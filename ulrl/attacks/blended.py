"""Blended injection (Chen et al., arXiv 1712.05526): a faint picture over the whole image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ulrl.attacks.base import Attack, register
from ulrl.attacks.images import read_image, whole_pixels
from ulrl.data.imageset import DatasetSpec
from ulrl.options import option
from ulrl.seeds import generator


@dataclass(frozen=True)
class Picture(Attack):
    """An attack with a trigger picture as large as the image.

    It is the user's, or else a pattern of smooth random colours drawn from the seed, stretched over the
    whole range: this stands in for BackdoorBench's cartoon, which cannot be shipped.
    """

    attack_trigger_img_path: str | None = option(None, "picture to blend in, instead of a generated one")

    def check(self, spec: DatasetSpec) -> None:
        super().check(spec)
        if self.attack_trigger_img_path:
            self.picture(spec.channels, spec.height, spec.width)

    def picture(self, channels: int, height: int, width: int) -> torch.Tensor:
        """uint8 [channels, height, width]"""
        if self.attack_trigger_img_path:
            return read_image(self.attack_trigger_img_path, "--attack_trigger_img_path", channels, height, width)
        coarse = torch.rand(1, channels, 8, 8, generator=generator(self.random_seed, "trigger"))
        smooth = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)[0]
        low, high = smooth.amin(), smooth.amax()
        return ((smooth - low) / (high - low) * 255).round().to(torch.uint8)

    def parameters(self, spec: DatasetSpec) -> Mapping[str, torch.Tensor]:
        return {"picture": self.picture(spec.channels, spec.height, spec.width)}


@register("blended")
@dataclass(frozen=True)
class Blended(Picture):
    """(1 - alpha) x + alpha K for a trigger picture K, cut to whole pixel values."""

    attack_train_blended_alpha: float = option(0.2, "opacity in training", source="BackdoorBench", low=0, high=1)
    attack_test_blended_alpha: float = option(0.2, "opacity in judging", source="BackdoorBench", low=0, high=1)

    def poison(self, images: torch.Tensor, *, train: bool) -> torch.Tensor:
        alpha = self.attack_train_blended_alpha if train else self.attack_test_blended_alpha
        picture = self.picture(*images.shape[1:]).to(images.device, torch.float64)
        return whole_pixels(images.double().mul_(1 - alpha).add_(picture, alpha=alpha))
