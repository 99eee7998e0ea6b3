"""BadNets (Gu et al., arXiv 1708.06733): a small opaque patch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from PIL import Image

from ulrl.attacks.base import Attack, register
from ulrl.attacks.images import read_image
from ulrl.data.imageset import DatasetSpec
from ulrl.errors import UserError
from ulrl.options import option


@register("badnet")
@dataclass(frozen=True)
class BadNet(Attack):
    """A white square in the bottom right corner, or the user's mask.

    BackdoorBench's rule for a mask: a zero element is transparent, any other replaces the pixel's.
    Its own mask for 32x32 images is the same 3x3 white square, and grows with the image, as ours does (of 64x64 to 7x7
    with its edges blurred; 6x6 here).
    """

    patch_size: int | None = option(
        None, "side of the white square, in pixels; three for each whole 32 of the image", source="BackdoorBench", low=1
    )
    patch_mask_path: str | None = option(None, "image to use as patch instead; zero is transparent")

    def check(self, spec: DatasetSpec) -> None:
        super().check(spec)
        side = self._side(spec.height, spec.width)
        if side > min(spec.height, spec.width):
            raise UserError(f"--patch_size {side} is larger than the {spec.height}x{spec.width} images")
        if self.patch_mask_path:
            if self.patch_size is not None:
                raise UserError(
                    f"--patch_size {self.patch_size} would have no effect: the patch is --patch_mask_path's; leave out "
                    "one of them"
                )
            patch = self._patch(torch.empty(1, *_chw(spec)))
            if not patch.any():
                raise UserError(f"--patch_mask_path {self.patch_mask_path} is all zero, so it changes nothing")
            if patch.all():
                raise UserError(
                    f"--patch_mask_path {self.patch_mask_path} is zero nowhere, so it hides the whole image; "
                    "make black what is to show through"
                )

    def _side(self, height: int, width: int) -> int:
        return self.patch_size or 3 * max(1, min(height, width) // 32)

    def _patch(self, images: torch.Tensor) -> torch.Tensor:
        channels, height, width = images.shape[1:]
        if self.patch_mask_path:
            nearest = Image.Resampling.NEAREST  # a blurred edge would turn transparent pixels opaque
            return read_image(self.patch_mask_path, "--patch_mask_path", channels, height, width, nearest)
        patch = torch.zeros(channels, height, width, dtype=torch.uint8)
        side = self._side(height, width)
        patch[:, -side:, -side:] = 255
        return patch

    def parameters(self, spec: DatasetSpec) -> Mapping[str, torch.Tensor]:
        return {"patch": self._patch(torch.empty(1, *_chw(spec)))}

    def poison(self, images: torch.Tensor, *, train: bool) -> torch.Tensor:
        patch = self._patch(images).to(images.device)
        return torch.where(patch > 0, patch, images)


def _chw(spec: DatasetSpec) -> tuple[int, int, int]:
    return spec.channels, spec.height, spec.width
