"""Corruptions that lead a model astray: some of many random ones, and ones that learn to.

Images are as in `corruptions`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ulrl.defenses.corruptions import KINDS, Draws, enlarged, image, moved
from ulrl.seeds import generator

STEPS = (0.5, 0.35, 0.25, 0.18, 0.12, 0.09)  # aside, round by round, in search of what leads astray


class _Near(Draws):
    """What one seed draws, the same for every image, after some steps aside, each (seed, size in [0, 1]).

    Each number comes from a normal one, z, of which a step makes sqrt(1 - size^2) z + size z' (preconditioned
    Crank-Nicolson, arXiv 1202.0709): what is drawn stays as likely as before, however many steps there are.
    """

    def __init__(self, seed: int, device: torch.device, steps: Sequence[tuple[int, float]]) -> None:
        super().__init__(seed, device)
        self._steps = [(generator(way, "corruptions", device), size) for way, size in steps]

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.special.ndtr(self.normal(*shape))

    def normal(self, *shape: int) -> torch.Tensor:
        drawn = super().normal(*shape)
        for numbers, size in self._steps:
            aside = torch.randn(shape, generator=numbers, device=numbers.device)
            drawn = math.sqrt(1 - size**2) * drawn + size * aside
        return drawn

    def rows(self, images: torch.Tensor) -> int:
        return 1


@dataclass(frozen=True)
class Fixed:
    """A corruption that does the same to every image; only what fills a patch may be cut from one of them.

    seed: of all that is drawn for it. steps: (seed, size) of those from there to its neighbours.
    """

    kind: Callable[[torch.Tensor, Draws], torch.Tensor]
    seed: int
    steps: tuple[tuple[int, float], ...] = ()

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.kind(images, _Near(self.seed, images.device, self.steps)).clamp(0, 1)

    def near(self, draws: Draws, size: float) -> Fixed:
        """One like it, for which each number that is drawn goes a step aside. size: of the step, from 0 (none) to 1
        (drawn anew)."""
        return Fixed(self.kind, self.seed, (*self.steps, (draws.below(2**31), size)))


@torch.no_grad()
def leading(
    answers: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, labels: torch.Tensor, draws: Draws,
    tries: int, *, each: int = 16, at_once: int = 8, per_class: int = 3, most: int = 30,
) -> dict[Fixed, float]:  # fmt: skip
    """Of `tries` corruptions those that lead a model furthest to a class, up to `per_class` to each and of these the
    `most` that lead furthest, and how far they do.

    A third is drawn at random, every kind equally often but for pictures that are blended in, which each batch would
    draw from its own. The others are, in rounds of smaller and smaller steps, near those that lead furthest by then.

    A backdoor answers to one warp, one wave or one colour field alone. If each image drew its own, hardly any would
    meet that one in a few hundred epochs; but among some hundreds there is one like it, and steps from there reach it.

    Args:
        answers: probabilities [B, K] of corrupted images.
        labels: int64 [N], of `images`. A corruption leads to a class by as much as it makes the class more probable, in
            the mean over those of `each` images that are of other classes.
    """
    kinds = [kind for kind in dict.fromkeys(KINDS) if kind is not image]
    plain = torch.cat([answers(part) for part in images.split(each * at_once)])
    others = (F.one_hot(labels, plain.shape[1]) == 0).float()
    tried: list[Fixed] = []
    leads: list[torch.Tensor] = []  # [*, K] each

    def attempt(ways: list[Fixed]) -> dict[Fixed, float]:
        for start in range(0, len(ways), at_once):
            some, now = draws.order(len(images))[:each], ways[start : start + at_once]
            changed = answers(torch.cat([way(images[some]) for way in now])).unflatten(0, (len(now), -1))
            leads.append(((changed - plain[some]) * others[some]).sum(1) / others[some].sum(0).clamp_min(1))
        tried.extend(ways)
        together = torch.cat(leads)
        best = together.topk(min(per_class, len(tried)), 0)
        order = best.values.flatten().argsort(descending=True)[:most]
        far = together.amax(1).tolist()
        return {tried[i]: far[i] for i in best.indices.flatten()[order].tolist()}

    a_round = 2 * tries // (3 * len(STEPS))
    first = tries - a_round * len(STEPS)
    found = attempt([Fixed(kinds[i % len(kinds)], draws.below(2**31)) for i in range(first)])
    for size in STEPS:
        ways = list(found)
        found = attempt([ways[i % len(ways)].near(draws, size) for i in range(a_round)])
    return found


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
