"""Choosing a defense's strength without an oracle: by accuracy on clean samples that were set aside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import pandas as pd
import torch
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import Defense
from ulrl.errors import UserError
from ulrl.models.copying import copied
from ulrl.options import option
from ulrl.seeds import generator
from ulrl.training import Monitor, predict

Set = TypeVar("Set", bound=ImageSet)
Edit = Callable[[nn.Module, int], None]


@dataclass(frozen=True)
class Selecting(Defense):
    """A defense that chooses its strength on clean samples that it set aside, and its options for that."""

    val_ratio: float = option(0.2, "share of the clean samples set aside to choose by", low=0, high=0.9)
    acc_ratio: float = option(0.05, "accuracy on them that may be lost", low=0, high=1)

    def set_aside(self, clean: ImageSet) -> tuple[ImageSet, ImageSet]:
        """The clean samples to train on, and those to choose by."""
        return split(clean, self.val_ratio, self.random_seed)


def split(clean: Set, share: float, seed: int) -> tuple[Set, Set]:
    """The clean samples in two disjoint parts, at random: for training, and `share` of them for validation.

    Each keeps the order of `clean`; validation has one sample at least.

    Raises:
        UserError: fewer than two samples are left to train on.
    """
    size = max(1, round(share * len(clean)))
    if len(clean) - size < 2:
        raise UserError(
            f"{len(clean)} clean samples, {size} of them held out, leave fewer than 2 to train on; give more of them "
            "(of a record: raise --ratio), or hold a smaller share out"
        )
    order = torch.randperm(len(clean), generator=generator(seed, "validation"))
    return clean.subset(order[size:].sort().values), clean.subset(order[:size].sort().values)


def within(accuracies: Sequence[float], tolerance: float) -> int:
    """The index of the greatest strength before the first that costs more than `tolerance`.

    accuracies: one per strength, rising, the first of which changes nothing. The cost is absolute,
    against that first one.
    """
    floor = accuracies[0] - tolerance - 1e-9  # a loss of just the tolerance is allowed, whatever the rounding
    return next((i for i, accuracy in enumerate(accuracies) if accuracy < floor), len(accuracies)) - 1


@dataclass(frozen=True)
class Sweep:
    """Which strength was chosen, and what each gave on validation (index strength; accuracy, chosen)."""

    chosen: int
    strength: float
    curve: pd.DataFrame
    candidates: Callable[[], Iterator[tuple[float, nn.Module]]]


def sweep(
    model: nn.Module,
    strengths: Sequence[float],
    edit: Edit,
    validation: ImageSet,
    tolerance: float,
    monitor: Monitor,
    *,
    amp: bool,
    fixed: float | None = None,
    prepare: Callable[[nn.Module], None] | None = None,
    finish: Callable[[nn.Module], None] | None = None,
) -> Sweep:
    """Edit `model` step by step, judge each strength once on `validation`, and leave it at the chosen one.

    strengths: rising; the first edits nothing. edit: given a model at strengths[i - 1] and i, takes
    it to strengths[i] in place. The chosen strength is that of `within`, or `fixed`, which is one of them.
    prepare: called with a copy of each edited model before that is judged, such as to measure its statistics anew.
    finish: what follows the choice (fine-tuning), called with a copy of each of the candidates; the caller does it to
    `model`.
    """
    original = copied(model)

    def walk(walking: nn.Module, then: Callable[[nn.Module], None] | None) -> Iterator[nn.Module]:
        for i in range(len(strengths)):
            if i:
                edit(walking, i)
            candidate = walking if then is None else copied(walking)
            if then is not None:
                then(candidate)
            yield candidate

    hits: list[torch.Tensor] = []
    with monitor.stage("select", len(strengths)) as progress:
        for candidate in walk(model, prepare):
            hits.append((predict(candidate, validation, amp) == validation.labels).double().mean())
            progress.step()
        accuracies = torch.stack(hits).tolist()
        chosen = within(accuracies, tolerance) if fixed is None else list(strengths).index(fixed)
        _copy_weights(original, model)
        for i in range(1, chosen + 1):
            edit(model, i)

    curve = pd.DataFrame({"accuracy": accuracies}, index=pd.Index(strengths, name="strength"))
    curve["chosen"] = [i == chosen for i in range(len(hits))]
    return Sweep(chosen, strengths[chosen], curve, lambda: zip(strengths, walk(copied(original), finish), strict=True))


@torch.no_grad()
def _copy_weights(source: nn.Module, target: nn.Module) -> None:
    tensors = [(*model.parameters(), *model.buffers()) for model in (target, source)]
    for ours, theirs in zip(*tensors, strict=True):
        expanded = any(step == 0 and size > 1 for step, size in zip(ours.stride(), ours.shape, strict=True))
        if not expanded:  # else torch cannot write into it, so nothing has changed it
            ours.copy_(theirs)
