"""Images as one uint8 tensor: what every part of the library passes around."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

Self_ = TypeVar("Self_", bound="ImageSet")


@dataclass(frozen=True)
class DatasetSpec:
    """What is fixed about a data set, whichever files it is read from.

    `mean` and `std` are per channel, for pixels scaled to [0, 1]. `crop_padding` pixels of black are
    added on each side before a random crop in training; `hflip` says whether to mirror at random.
    """

    name: str
    num_classes: int
    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int = 4
    hflip: bool = False
    class_names: tuple[str, ...] = ()

    @property
    def img_size(self) -> tuple[int, int, int]:
        """(height, width, channels), the order of BackdoorBench's `img_size`."""
        return (self.height, self.width, self.channels)

    @property
    def pixels(self) -> int:
        return self.height * self.width


@dataclass(frozen=True)
class ImageSet:
    """Images and labels of one split, or of a part of it.

    images: uint8 [N, C, H, W]; labels: int64 [N], each in [0, spec.num_classes).
    """

    images: torch.Tensor
    labels: torch.Tensor
    spec: DatasetSpec

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        return self.images.device

    def _tensors(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor)}

    def to(self: Self_, device: torch.device | str) -> Self_:
        """The same set with its tensors on `device`."""
        return replace(self, **{k: v.to(device) for k, v in self._tensors().items()})

    def digest(self) -> str:
        """A SHA-256 of images and labels, in hexadecimal."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        for tensor in (self.images, self.labels):
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def subset(self: Self_, indices: torch.Tensor) -> Self_:
        """The samples at `indices` (int64 [n]), in that order."""
        indices = indices.to(self.device)
        return replace(self, **{k: v[indices] for k, v in self._tensors().items()})


@dataclass(frozen=True)
class InputSet(ImageSet):
    """Samples as some model expects them, for one that is not of ours: images float32 [N, C, H, W].

    They are neither normalised nor augmented, but by `augment`, where it is given (float32 [B, C, H, W] in
    and out). Mean and deviation of the spec say which value was black and which was white.
    """

    augment: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True)
class PoisonedSet(ImageSet):
    """Triggered images with the attacker's `labels`, and where each came from.

    original_labels: int64 [N], the true classes. original_indices: int64 [N], positions in the clean
    split.
    """

    original_labels: torch.Tensor
    original_indices: torch.Tensor

    def joined(self, other: PoisonedSet) -> PoisonedSet:
        """These samples, then those of another set on the same device."""
        mine, theirs = self._tensors(), other._tensors()
        return replace(self, **{k: torch.cat([v, theirs[k]]) for k, v in mine.items()})  # type: ignore[arg-type]
