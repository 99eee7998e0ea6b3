"""Diagnosis of a model that can only be asked: a function, a service behind HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F

from ulrl.defenses.b3d import B3D, Ask
from ulrl.defenses.base import Trigger
from ulrl.errors import UserError
from ulrl.machine import plain_defaults
from ulrl.own_model.given import Progress, joined, make_method, make_monitor


@dataclass(frozen=True, repr=False)
class Queried:
    """What `suspect_by_queries` found.

    flagged: the suspicious classes, the smallest trigger first. ranking: index class; columns mask_norm (in pixels),
    ratio (to the median), reached (whether a trigger was found at all), flagged. triggers: mask and pattern by class.
    queries: how many images were sent. usual: the mean of the clean images, [C, H, W]. report: JSON-able.
    """

    flagged: list[int]
    ranking: pd.DataFrame
    triggers: dict[int, Trigger]
    queries: int
    usual: torch.Tensor = field(repr=False)
    report: dict[str, Any] = field(repr=False)

    def __repr__(self) -> str:
        found, searched = int(self.ranking.reached.sum()), len(self.ranking)
        said = f"suspicious: {', '.join(map(str, self.flagged))}" if self.flagged else "no suspicious class"
        if not self.flagged and found < searched / 2:  # a mask that fools nobody has no size to compare by
            said = f"undecided: a trigger was found for {found} of {searched} classes; raise queries"
        return f"{said}; {self.queries} queries\n{self.ranking.sort_values('ratio').head().round(2).to_string()}"

    def careful(self, ask: Ask, images: torch.Tensor) -> torch.Tensor:
        """Labels, int64 [B], of images, float32 [B, C, H, W] in [0, 1], by a model in which a backdoor was found.

        An image that is given a suspicious class is asked again with the clean images' mean where that class's trigger
        lies and a pixel around it, as what was found is often a part of the trigger; the second answer counts. This
        costs one query more for each of them, and it is for triggers that leave most of an image alone. It is our
        reading of the paper's strategy, whose details we did not have.
        """
        labels = _labels(ask(images), images.device)
        for k in self.flagged:
            given = labels == k
            if given.any():
                hidden = F.max_pool2d(self.triggers[k].mask, 3, 1, 1).to(images)
                covered = torch.lerp(images[given], self.usual.to(images), hidden)
                labels[given] = _labels(ask(covered), images.device)
        return labels


@plain_defaults()
def suspect_by_queries(
    ask: Ask,
    images: Any,
    num_classes: int,
    *,
    classes: Sequence[int] | None = None,
    progress: Progress = False,
    **hyperparameters: Any,
) -> Queried:
    """Look for a backdoor in a model that answers queries and shows nothing else (B3D, arXiv 2103.13127).

    ask: given images, float32 [B, C, H, W] in [0, 1], on the device of `images`, returns labels, whole numbers [B], or
    scores, [B, K], logits or probabilities; with scores fewer queries are needed. images: some hundred clean ones in
    that form, a tensor or an array. classes: those to search, all of them where None; at least three, as a trigger is
    small only beside others. hyperparameters: options of B3D; `queries` bounds how many images are sent.

    Raises:
        UserError: images or options that do not fit, answers that are neither labels nor scores.
    """
    x = joined(images, "images")
    if x.ndim != 4 or not x.is_floating_point() or not len(x) or x.min() < 0 or x.max() > 1:
        raise UserError("images must be floats [N, C, H, W] in [0, 1]; divide bytes by 255")
    searched = sorted(set(range(num_classes) if classes is None else classes))
    if len(searched) < 3 or searched[0] < 0 or searched[-1] >= num_classes:
        raise UserError(
            f"classes {searched}: give three or more of the {num_classes}, each from 0 to {num_classes - 1}"
        )
    method: B3D = make_method("b3d", hyperparameters)
    scan = method.scan(ask, x.float(), num_classes, make_monitor(progress), searched)
    report = {"flagged": scan.flagged, "queries": scan.queries, "classes": searched, "options": {**vars(method)}}
    return Queried(scan.flagged, scan.table, scan.triggers, scan.queries, x.float().mean(0), report)


def _labels(answers: torch.Tensor, device: torch.device) -> torch.Tensor:
    answers = torch.as_tensor(answers).to(device)
    return (answers.argmax(1) if answers.ndim == 2 else answers).long().clone()
