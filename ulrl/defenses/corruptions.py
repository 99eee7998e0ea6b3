"""Random corruptions of images.

Images are float32 [B, C, H, W] with values in [0, 1], on any device. Lengths are shares of an image's side, so that
they mean the same at every size; the numbers are ours, for what leaves a garment of 32x32 to be recognised.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ulrl.seeds import generator

CELLS = (2, 3, 4, 6, 8, 12, 16, 32)  # of a random field along each side: from a slope to pixels
GROUPS = 4  # into which a batch is cut, each corrupted in a way of its own


class Draws:
    """Everything random here, drawn from the streams of one seed."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._numbers = generator(seed, "corruptions", device)
        self._choices = generator(seed, "corruption kinds")  # on the CPU, so that a choice never waits for the device

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self._numbers, device=self._numbers.device)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._numbers, device=self._numbers.device)

    def rows(self, images: torch.Tensor) -> int:
        """How many draws a batch takes: one for each image."""
        return len(images)

    def order(self, n: int) -> torch.Tensor:
        return torch.randperm(n, generator=self._numbers, device=self._numbers.device)

    def below(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self._choices))

    def among(self, weights: torch.Tensor) -> int:
        """A place in `weights`, float [N] on the CPU, as often as its weight is large."""
        return int(torch.multinomial(weights, 1, generator=self._choices))

    def share(self) -> float:
        """A number in [0, 1), uniform."""
        return float(torch.rand((), generator=self._choices))


def corrupt(images: torch.Tensor, draws: Draws, most: int = 3) -> torch.Tensor:
    """Each image changed by one to `most` random corruptions, one after the other."""
    for i in range(most):
        order = draws.order(len(images))[: math.ceil(len(images) * (most - i) / most)]
        changed = images.clone()
        for group in order.chunk(GROUPS):
            if len(group):
                changed[group] = KINDS[draws.below(len(KINDS))](images[group], draws).clamp(0, 1)
        images = changed
    return images


def enlarged(field: torch.Tensor, images: torch.Tensor, mode: str = "bilinear") -> torch.Tensor:
    """A coarse field [B, D, h, w] at the size of the images.

    As two products of matrices, since the gradient of torch's own interpolation is summed in any order on a GPU.
    """
    rows, columns = (
        _stretch(few, many, mode, field.device) for few, many in zip(field.shape[2:], images.shape[2:], strict=True)
    )
    return rows @ field @ columns.mT


@functools.cache
def _stretch(few: int, many: int, mode: str, device: torch.device) -> torch.Tensor:
    """float32 [many, few]: what interpolation, which is linear, makes of each unit vector."""
    units = torch.eye(few, dtype=torch.float32)[None, None]
    return F.interpolate(units, (many, few), mode=mode, align_corners=True)[0, 0].to(device)


def moved(images: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """Each pixel read from elsewhere: flow [B, 2, H, W] is x and y of the way there, in image sides."""
    height, width = images.shape[2:]
    y = torch.linspace(-1, 1, height, device=images.device)
    x = torch.linspace(-1, 1, width, device=images.device)
    grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1) + 2 * flow.permute(0, 2, 3, 1)
    return F.grid_sample(images, grid.expand(len(images), -1, -1, -1), padding_mode="border", align_corners=True)


def _field(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    cells = min(CELLS[draws.below(len(CELLS))], *images.shape[2:])
    field = enlarged(draws.uniform(draws.rows(images), images.shape[1], cells, cells), images)
    low, high = field.amin((2, 3), True), field.amax((2, 3), True)
    return _blend(images, (field - low) / (high - low + 1e-6), 0.45, draws)


def _blend(images: torch.Tensor, others: torch.Tensor, most: float, draws: Draws) -> torch.Tensor:
    return images.lerp(others.expand_as(images), most * draws.uniform(draws.rows(images), 1, 1, 1))


def image(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    others = images[draws.order(len(images))[: draws.rows(images)]]
    others = others.flip(3) if draws.below(2) else others
    return _blend(images, 1 - others if draws.below(2) else others, 0.4, draws)


def _patch(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    batch, (channels, height, width) = draws.rows(images), images.shape[1:]
    size = 1 / 32 + draws.uniform(2, batch, 1, 1) * 9 / 32
    centre = draws.uniform(2, batch, 1, 1)
    y = (torch.arange(height, device=images.device).view(1, -1, 1) + 0.5) / height
    x = (torch.arange(width, device=images.device).view(1, 1, -1) + 0.5) / width
    inside = ((y - centre[0]).abs() < size[0] / 2) & ((x - centre[1]).abs() < size[1] / 2)
    fillings = (
        lambda: draws.uniform(batch, channels, 1, 1),
        lambda: draws.uniform(batch, channels, 1, 1).round(),
        lambda: draws.uniform(batch, channels, height, width),
        lambda: images[draws.order(len(images))[:batch]],
    )
    opacity = 0.4 + 0.6 * draws.uniform(batch, 1, 1, 1)  # first: how much the last filling draws depends on the batch
    filled = images.lerp(fillings[draws.below(4)]().expand_as(images), opacity)
    return torch.where(inside[:, None], filled, images)


def _warp(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    cells = (2, 3, 4, 4, 6, 8)[draws.below(6)]
    batch = draws.rows(images)
    strength = draws.uniform(batch, 1, 1, 1) * math.sqrt(4 / max(cells, 4)) / 16
    return moved(images, enlarged(draws.normal(batch, 2, cells, cells), images, "bicubic") * strength)


def _wave(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    batch, (channels, height, width) = draws.rows(images), images.shape[1:]
    angle, pace, phase = draws.uniform(3, batch, 1, 1)
    y = torch.arange(height, device=images.device).view(1, -1, 1) / height
    x = torch.arange(width, device=images.device).view(1, 1, -1) / width
    along = y * torch.sin(math.pi * angle) + x * torch.cos(math.pi * angle)
    wave = torch.sin(2 * math.pi * ((0.5 + 10 * pace) * along + phase))[:, None]
    colour = draws.uniform(batch, channels, 1, 1) if draws.below(2) else 1.0
    return images + wave * colour * 0.2 * draws.uniform(batch, 1, 1, 1)


def _levels(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    steps = 2 + (draws.uniform(draws.rows(images), 1, 1, 1) * 14).floor()
    return (images * steps).round() / steps


def _tone(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    batch, channels = draws.rows(images), images.shape[1]
    gamma, contrast = 2 * draws.uniform(2, batch, 1, 1, 1) - 1
    gain, offset = 2 * draws.uniform(2, batch, channels, 1, 1) - 1
    bent = images.clamp(1e-4, 1) ** (0.6 * gamma).exp()
    mean = bent.mean((1, 2, 3), True)
    return ((bent - mean) * (0.5 * contrast).exp() + mean) * (1 + 0.3 * gain) + 0.15 * offset


def _noise(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    batch = draws.rows(images)
    return images + draws.normal(batch, *images.shape[1:]) * 0.15 * draws.uniform(batch, 1, 1, 1)


def _filter(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    """A random convolution of each image, at its own mean and contrast (RandConv, arXiv 2007.13003), blended in."""
    batch, channels, height, width = images.shape
    size = (1, 3, 3, 5)[draws.below(4)]
    kernels = draws.normal(draws.rows(images), channels, channels, size, size) / math.sqrt(channels * size**2)
    kernels = kernels.expand(batch, -1, -1, -1, -1).flatten(0, 1)
    padded = F.pad(images, [size // 2] * 4, mode="replicate").flatten(0, 1)[None]
    filtered = F.conv2d(padded, kernels, groups=batch).view_as(images)
    deviation = images.std((2, 3), keepdim=True) / (filtered.std((2, 3), keepdim=True) + 1e-3)
    level = images.mean((2, 3), True) - filtered.mean((2, 3), True) * deviation
    return _blend(images, filtered * deviation + level, 0.6, draws)


def _focus(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    blurred = F.avg_pool2d(F.pad(images, [1] * 4, mode="replicate"), 3, 1)
    return images.lerp(blurred, 2 * draws.uniform(draws.rows(images), 1, 1, 1) - 1)  # sharper below 0


KINDS: tuple[Callable[[torch.Tensor, Draws], torch.Tensor], ...] = (
    _field, _field, image, _patch, _patch, _warp, _warp, _wave, _levels, _tone, _noise, _filter, _focus,
)  # fmt: skip
