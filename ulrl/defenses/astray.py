"""Corruptions that lead a model astray: some of many random ones, and ones that learn to.

Images are as in `corruptions`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ulrl.defenses.corruptions import KINDS, Draws, enlarged, image, moved


@dataclass(frozen=True)
class Fixed:
    """A corruption that does the same to every image, but that a patch may be cut from one of them. seed: of all that
    is drawn for it."""

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
    kinds = [kind for kind in dict.fromkeys(KINDS) if kind is not image]
    plain = torch.cat([answers(part) for part in images.split(each * at_once)])
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
