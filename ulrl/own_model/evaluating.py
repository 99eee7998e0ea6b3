"""Judging a model by a trigger that the user knows."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ulrl.errors import UserError
from ulrl.machine import plain_defaults
from ulrl.metrics import Judgement, share
from ulrl.own_model.given import Images, prepare, say
from ulrl.training import predict


@plain_defaults()
def evaluate(
    model: nn.Module,
    images: Images,
    labels: Any = None,
    *,
    trigger: Callable[[torch.Tensor], torch.Tensor] | None = None,
    target: int | None = None,
    device: str | torch.device | None = None,
) -> Judgement:
    """Judge a model on test samples and, where the trigger is known, on triggered ones, as a record's is judged.

    trigger: float32 [B, C, H, W], as the model expects them, in and out, on the device of the model. target: the
    attacker's label. Samples of the target class are not triggered. acc: accuracy on the samples. asr: share of
    the triggered ones that are given the target; ra: that are given their own label; both None without a trigger.
    Other arguments as for `purify`; the model is left as it is.

    Raises:
        UserError: as `purify`; a trigger without a target, or one that changes the shape of images.
    """
    if (trigger is None) != (target is None):
        raise UserError("trigger and target belong together: give both, or neither for accuracy alone")
    try:
        target = target if target is None else operator.index(target)
    except TypeError:
        raise UserError(f"target is of the type {type(target).__name__}; give the number of a class") from None
    given = prepare(model, images, labels, device=device, trains=False)
    say(given.notes)
    clean = given.clean
    acc = share(predict(given.model, clean, amp=False) == clean.labels) or 0.0
    if trigger is None or target is None:
        return Judgement(acc, None, None, len(clean), 0)
    if not 0 <= target < clean.spec.num_classes:
        raise UserError(f"target {target} is none of the model's classes, 0 to {clean.spec.num_classes - 1}")
    others = clean.subset((clean.labels != target).nonzero().flatten())
    triggered = trigger(others.images.clone())
    if not isinstance(triggered, torch.Tensor) or triggered.shape != others.images.shape:
        found = list(triggered.shape) if isinstance(triggered, torch.Tensor) else type(triggered).__name__
        raise UserError(f"the trigger makes {found} of {list(others.images.shape)}; it must keep the shape")
    classes = predict(given.model, replace(others, images=triggered.float()), amp=False)
    return Judgement(acc, share(classes == target), share(classes == others.labels), len(clean), len(others))
