"""From uint8 images to normalised, augmented batches, without leaving the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from ulrl.data.imageset import DatasetSpec, ImageSet, InputSet


def normalise(images: torch.Tensor, spec: DatasetSpec) -> torch.Tensor:
    """Pixels in [0, 255], uint8 or float [B, C, H, W], to float32 (x / 255 - mean) / std, channels last in memory."""
    mean, std = _statistics(spec, images.device)
    return images.to(torch.float32, memory_format=torch.channels_last, copy=True).sub_(mean).div_(std)


def pixels(x: torch.Tensor, spec: DatasetSpec) -> torch.Tensor:
    """The way back: normalised float32 [B, C, H, W] to pixels in [0, 255], float32, not cut."""
    mean, std = _statistics(spec, x.device)
    return x * std + mean


@functools.cache
def _statistics(spec: DatasetSpec, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation for pixels in [0, 255]: float32 [1, C, 1, 1], copied to the device once."""
    mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) * 255 for values in (spec.mean, spec.std))
    return mean, std


def augment(images: torch.Tensor, spec: DatasetSpec, generator: torch.Generator) -> torch.Tensor:
    """Random crop (each image its own offset, zero padding) and, where the data set has it, random flip.

    uint8 [B, C, H, W] in and out. One gather for the whole batch: an image's rows and columns are
    looked up by index, and a flip is the column index run backwards.
    """
    batch, channels, height, width = images.shape
    pad, device = spec.crop_padding, images.device
    padded = F.pad(images, (pad, pad, pad, pad))
    top, left = torch.randint(2 * pad + 1, (2, batch, 1), generator=generator, device=device)
    rows = top + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(batch, width)
    if spec.hflip:
        flip = torch.rand(batch, 1, generator=generator, device=device) < 0.5
        columns = torch.where(flip, width - 1 - columns, columns)
    columns = left + columns
    sample = torch.arange(batch, device=device).view(batch, 1, 1)
    # Advanced indices around the channel slice put channels last: [B, H, W, C].
    picked = padded[sample, :, rows.unsqueeze(2), columns.unsqueeze(1)]
    return picked.permute(0, 3, 1, 2)


class Batches:
    """One pass over an ImageSet per iteration: (x float32 [B, C, H, W] normalised, y int64 [B]).

    With a `generator` (on the set's device) the order is shuffled and, unless `augmented` is false,
    images are augmented, all drawn from that generator. Without one the order is that of the set and
    nothing is random. `mix` changes each batch before that: uint8 images and labels in and out.
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        generator: torch.Generator | None = None,
        *,
        augmented: bool = True,
        drop_last: bool = False,
        mix: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> None:
        self.data = data
        self.batch_size = batch_size
        self.generator = generator
        self.augmented = augmented and generator is not None
        self.drop_last = drop_last and len(data) >= batch_size
        self.mix = mix

    def __len__(self) -> int:
        full, rest = divmod(len(self.data), self.batch_size)
        # BatchNorm cannot train on a batch of one, so a shuffled pass leaves such a remainder out.
        keep = rest > (1 if self.generator is not None and full else 0)
        return full + (keep and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        data = self.data
        order = None
        if self.generator is not None:
            order = torch.randperm(len(data), generator=self.generator, device=data.device)
        for i in range(len(self)):
            start, stop = i * self.batch_size, (i + 1) * self.batch_size
            at = slice(start, stop) if order is None else order[start:stop]
            images, labels = data.images[at], data.labels[at]
            if self.mix is not None:
                images, labels = self.mix(images, labels)
            if isinstance(data, InputSet):
                yield (data.augment(images) if self.augmented and data.augment else images), labels
                continue
            if self.augmented:
                images = augment(images, data.spec, self.generator)  # type: ignore[arg-type]
            yield normalise(images, data.spec), labels
