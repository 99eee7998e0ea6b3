"""Adaptive attacks (Qi et al., ICLR 2023): a weak part of the trigger in training, all of it in judging."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ulrl.attacks.base import Covered, register
from ulrl.attacks.blended import Picture
from ulrl.attacks.images import whole_pixels
from ulrl.data.imageset import DatasetSpec
from ulrl.options import option
from ulrl.seeds import generator

TILES = 4  # per side


@register("adaptive_blend")
@dataclass(frozen=True)
class AdaptiveBlend(Covered, Picture):
    """A picture in 16 tiles: each training image, poisoned or cover, shows half of them, faintly.

    Judged images show the whole picture, less faintly.
    """

    attack_train_blended_alpha: float = option(0.15, "opacity in training", source="backdoor-toolbox", low=0, high=1)
    attack_test_blended_alpha: float = option(0.2, "opacity in judging", source="backdoor-toolbox", low=0, high=1)

    def poison(self, images: torch.Tensor, *, train: bool) -> torch.Tensor:
        alpha = self.attack_train_blended_alpha if train else self.attack_test_blended_alpha
        picture = self.picture(*images.shape[1:]).to(images.device, torch.float32)
        opacity: torch.Tensor | float = alpha
        if train:
            stream = generator(self.random_seed, "tiles", images.device)
            score = torch.rand(len(images), TILES * TILES, generator=stream, device=images.device)
            shown = (score.argsort(1) < TILES * TILES // 2).view(-1, 1, TILES, TILES).float()
            opacity = alpha * torch.nn.functional.interpolate(shown, images.shape[2:])
        return whole_pixels(images + (picture - images.float()) * opacity)


# Where each patch sits, in eighths of the image (row, column), and its opacity in training.
_PATCHES = ((0, 0, 0.5), (0, 6, 0.2), (6, 0, 0.5), (6, 6, 0.3))
_JUDGED = (0, 2)


@register("adaptive_patch")
@dataclass(frozen=True)
class AdaptivePatch(Covered):
    """Four faint patches, of which a training image, poisoned or cover, carries one; a judged image carries
    two of them, opaque.

    The patches are drawn from the seed, in the corners of the image, a quarter of its side large.
    """

    cover_rate: float = option(
        0.006, "share of the training images that carry a patch and keep their label",
        source="backdoor-toolbox", low=0, high=1,
    )  # fmt: skip

    def _patches(self, channels: int, height: int, width: int) -> torch.Tensor:
        """float32 [4, channels + 1, height, width]: each patch, and in the last channel where it is."""
        tall, wide = height // 4, width // 4
        cells = torch.rand(len(_PATCHES), channels, 4, 4, generator=generator(self.random_seed, "patches")) > 0.5
        planes = torch.zeros(len(_PATCHES), channels + 1, height, width)
        for plane, colours, (row, column, _) in zip(planes, cells, _PATCHES, strict=True):
            top, left = row * height // 8, column * width // 8
            drawn = torch.nn.functional.interpolate(colours[None].float(), (tall, wide))[0]
            plane[:, top : top + tall, left : left + wide] = torch.cat([255 * drawn, torch.ones(1, tall, wide)])
        return planes

    def poison(self, images: torch.Tensor, *, train: bool) -> torch.Tensor:
        planes = self._patches(*images.shape[1:]).to(images.device)
        patches, opacity = planes[:, :-1], planes[:, -1:]
        if train:
            which = torch.arange(len(images), device=images.device) % len(_PATCHES)
            strength = torch.tensor([alpha for _, _, alpha in _PATCHES], device=images.device).view(-1, 1, 1, 1)
            patches, opacity = patches[which], (opacity * strength)[which]
        else:
            patches, opacity = patches[list(_JUDGED)].sum(0), opacity[list(_JUDGED)].sum(0)
        return whole_pixels(images + (patches - images.float()) * opacity)

    def parameters(self, spec: DatasetSpec) -> Mapping[str, torch.Tensor]:
        return {"patches": self._patches(spec.channels, spec.height, spec.width)}
