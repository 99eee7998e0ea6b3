"""Corruptions of images: random ones, those of them that lead a model astray, and ones that learn to.

Images are float32 [B, C, H, W] with values in [0, 1], on any device. Lengths are shares of an image's side, so that
they mean the same at every size; the numbers are ours, for what leaves a garment of 32x32 to be recognised.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ulrl.seeds import generator

CELLS = (2, 3, 4, 6, 8, 12, 16, 32)  # of a random field along each side: from a slope to pixels
GROUPS = 4  # into which a batch is cut, each corrupted in a way of its own


class Draws:
    """Everything random here, drawn from the streams of one seed. shared: whatever is drawn for some images is the
    same for each of them."""

    def __init__(self, seed: int, device: torch.device, shared: bool = False) -> None:
        self.shared = shared
        self._numbers = generator(seed, "corruptions", device)
        self._choices = generator(seed, "corruption kinds")  # on the CPU, so that a choice never waits for the device

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self._numbers, device=self._numbers.device)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._numbers, device=self._numbers.device)

    def rows(self, images: torch.Tensor) -> int:
        """For how many images something is drawn: for each, or one for all."""
        return 1 if self.shared else len(images)

    def order(self, n: int) -> torch.Tensor:
        return torch.randperm(n, generator=self._numbers, device=self._numbers.device)

    def below(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self._choices))


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
    """A coarse field [B, D, h, w] at the size of the images."""
    return F.interpolate(field, images.shape[2:], mode=mode, align_corners=True)


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


def _image(images: torch.Tensor, draws: Draws) -> torch.Tensor:
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
    filled = images.lerp(fillings[draws.below(4)]().expand_as(images), 0.4 + 0.6 * draws.uniform(batch, 1, 1, 1))
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
    gamma, contrast = (2 * draws.uniform(2, batch, 1, 1, 1) - 1) * torch.tensor([0.6, 0.5]).view(2, 1, 1, 1, 1).to(
        images
    )
    gain, offset = 2 * draws.uniform(2, batch, channels, 1, 1) - 1
    bent = images.clamp(1e-4, 1) ** gamma.exp()
    mean = bent.mean((1, 2, 3), True)
    return ((bent - mean) * contrast.exp() + mean) * (1 + 0.3 * gain) + 0.15 * offset


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
    _field, _field, _image, _patch, _patch, _warp, _warp, _wave, _levels, _tone, _noise, _filter, _focus,
)  # fmt: skip


@dataclass(frozen=True)
class Fixed:
    """A corruption that does the same to every image. seed: of all that is drawn for it."""

    kind: Callable[[torch.Tensor, Draws], torch.Tensor]
    seed: int

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.kind(images, Draws(self.seed, images.device, shared=True)).clamp(0, 1)


@torch.no_grad()
def leading(
    answers: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, labels: torch.Tensor, draws: Draws,
    tries: int, *, each: int = 16, at_once: int = 8, per_class: int = 3, most: int = 30,
) -> list[Fixed]:  # fmt: skip
    """Of `tries` random corruptions those that lead a model furthest to a class: up to `per_class` to each, and of
    these the `most` that lead furthest. Every kind is tried equally often, but for pictures that are blended in, which
    each batch would draw from its own.

    A backdoor answers to one warp, one wave or one colour field alone, which hardly any image of a few hundred epochs
    would meet if each drew its own; its neighbours are found among some hundreds.

    Args:
        answers: probabilities [B, K] of corrupted images.
        labels: int64 [N], of `images`. A corruption leads to a class by as much as it makes the class more probable, in
            the mean over those of `each` images that are of other classes.
    """
    kinds = [kind for kind in dict.fromkeys(KINDS) if kind is not _image]
    plain = answers(images)
    others = (F.one_hot(labels, plain.shape[1]) == 0).float()
    ways, ahead = [], []
    for start in range(0, tries, at_once):
        some = draws.order(len(images))[:each]
        now = [Fixed(kinds[i % len(kinds)], draws.below(2**31)) for i in range(start, min(start + at_once, tries))]
        changed = answers(torch.cat([way(images[some]) for way in now])).unflatten(0, (len(now), -1))
        ahead.append(((changed - plain[some]) * others[some]).sum(1) / others[some].sum(0).clamp_min(1))
        ways += now
    by_class = torch.cat(ahead).topk(min(per_class, len(ways)), 0)
    order = by_class.values.flatten().argsort(descending=True)[:most]
    return [ways[i] for i in dict.fromkeys(by_class.indices.flatten()[order].tolist())]


@dataclass
class _Lesson:
    """One corruption with a parameter. kind: blend, patch (its corner at `at`) or warp."""

    kind: str
    parameter: torch.Tensor
    at: tuple[int, int] = (0, 0)
    age: int = 0


class Learning:
    """A few corruptions shared by many images, each of which climbs the loss that it causes, then is drawn anew.

    They are blended-in pictures, patches at one place, and warps. Their gradients come with those of the weights,
    at no cost (universal adversarial training, arXiv 1811.11304): `step` after each backward pass.
    A backdoor's trigger is the corruption with the steepest way up.
    """

    def __init__(self, draws: Draws, count: int = 8, life: int = 15, rate: float = 0.1, blend: float = 0.3) -> None:
        self._draws, self._life, self._rate, self._blend = draws, life, rate, blend
        self._lessons: list[_Lesson | None] = [None] * count
        self._ages = [i * life // count for i in range(count)]  # so that they are not all drawn anew at once

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        """Each of the corruptions on its part of the images, if there are any; differentiable in their parameters."""
        if not len(images):
            return images
        changed = []
        for i, part in enumerate(images.tensor_split(min(len(self._lessons), len(images)))):
            lesson = self._lessons[i]
            if lesson is None:
                lesson = self._lessons[i] = self._drawn(("blend", "patch", "warp", "patch")[i % 4], part, self._ages[i])
                self._ages[i] = 0
            changed.append(self._changed(part, lesson))
        return torch.cat(changed)

    @torch.no_grad()
    def step(self) -> None:
        """A step of each up the gradient that the last backward pass left, which it loses."""
        for i, lesson in enumerate(self._lessons):
            if lesson is None or lesson.parameter.grad is None:
                continue
            climb = lesson.parameter.grad.sign() * self._rate
            if lesson.kind == "warp":
                lesson.parameter.add_(3 * climb).clamp_(-2, 2)
            else:
                lesson.parameter.add_(climb).clamp_(0, 1)
            lesson.parameter.grad = None
            lesson.age += 1
            if lesson.age >= self._life:
                self._lessons[i] = None

    def _drawn(self, kind: str, images: torch.Tensor, age: int) -> _Lesson:
        _, channels, height, width = images.shape
        if kind == "blend":
            cells = min((4, 8, 16, 32)[self._draws.below(4)], height, width)
            return _Lesson(kind, self._draws.uniform(1, channels, cells, cells).requires_grad_(), age=age)
        if kind == "warp":
            cells = (3, 4, 6)[self._draws.below(3)]
            return _Lesson(kind, (0.5 * self._draws.normal(1, 2, cells, cells)).requires_grad_(), age=age)
        size = max(1, (2 + self._draws.below(6)) * min(height, width) // 32)
        at = self._draws.below(height - size + 1), self._draws.below(width - size + 1)
        return _Lesson(kind, self._draws.uniform(1, channels, size, size).requires_grad_(), at, age)

    def _changed(self, images: torch.Tensor, lesson: _Lesson) -> torch.Tensor:
        some = self._draws.uniform(len(images), 1, 1, 1)
        if lesson.kind == "blend":
            return images.lerp(enlarged(lesson.parameter, images).expand_as(images), self._blend * some)
        if lesson.kind == "warp":  # a parameter of 1 is a pixel of 32
            return moved(images, enlarged(lesson.parameter, images, "bicubic") * (0.5 + 0.5 * some) / 32)
        (top, left), size = lesson.at, lesson.parameter.shape[-1]
        changed = images.clone()
        changed[:, :, top : top + size, left : left + size] = lesson.parameter
        return changed
