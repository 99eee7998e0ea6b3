"""The door for a model that is not of ours: any network, in memory, and some clean samples for it."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from ulrl.data.imageset import DatasetSpec, InputSet
from ulrl.defenses.base import DEFENSES, Repair
from ulrl.defenses.universal import STEPS, smallest_universal
from ulrl.errors import UserError
from ulrl.machine import eval_batch
from ulrl.options import Schema
from ulrl.seeds import generator, global_stream
from ulrl.training import Monitor, accuracy

Images = Any  # a tensor, an array, or any iterable of batches of them
Augment = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Purified:
    """A repaired model, and what was found on the way.

    model: a repaired copy, with the modes, dtypes and device of the one that was given. flagged: classes
    called suspicious, the highest score first. ranking: one row per class with the columns `change`, `z`
    and `flagged`, for methods that rank classes. report: JSON-able: method, options, samples, classes,
    accuracy_before and accuracy_after (shares of the given samples, on which the repair has trained), seconds
    per stage, evidence, notes. history: one row per stage and epoch. tables: further evidence by name.
    """

    model: nn.Module
    flagged: list[int]
    ranking: pd.DataFrame | None
    report: dict[str, Any]
    history: pd.DataFrame = field(repr=False)
    tables: dict[str, pd.DataFrame] = field(repr=False)


@dataclass(frozen=True)
class Suspicion:
    """A diagnosis; see `suspect`.

    verdict: "backdoored", "clean" or "uncertain". label: the most suspicious class. z: its robust z in the
    ranking. reach: the norm of the smallest universal perturbation found that leads to it, as a share of the
    median over the classes that were compared. ranking: one row per class: change, z, flagged, perturbation
    (the norm, where the range of the samples is 1; infinite where none was found, missing where none was
    searched) and reach. report: JSON-able.
    """

    verdict: str
    label: int
    z: float
    reach: float
    ranking: pd.DataFrame
    report: dict[str, Any]


def purify(
    model: nn.Module,
    images: Images,
    labels: Any = None,
    *,
    method: str = "ulrl",
    augment: Augment | None = None,
    **hyperparameters: Any,
) -> Purified:
    """Repair a copy of a suspicious model with a few clean samples; the given model is left untouched.

    model: maps [B, C, H, W] to logits [B, K]; any architecture whose classifier head is an `nn.Linear` for
    the methods that edit one. images: what the model expects, normalised as in its training: a float tensor or
    array [N, C, H, W], or an iterable of batches (a DataLoader). labels: int [N], or batches of them; None
    where `images` yields (images, labels). augment: float32 [B, C, H, W] in and out, applied to training
    batches. hyperparameters: the method's options, by the names of its flags.

    The copy is trained in float32, all of it: frozen parameters take part, and are frozen again in the result.
    Nothing is written, no global generator is seeded for good, no log is configured.

    Raises:
        UserError: samples, labels, options or a model that do not fit; the sentence says what to do.
    """
    defense = _method(method, hyperparameters)
    given = _samples(images, labels, augment)
    start, monitor = time.perf_counter(), Monitor()
    with global_stream(defense.random_seed, "purify", _device(model)):
        subject, clean, notes = _prepare(model, given)
        before = accuracy(subject, clean, defense.amp)
        repair: Repair = defense.run(subject, clean, monitor)
        after = accuracy(repair.model, clean, defense.amp)
    report = {
        "method": method,
        "options": {**vars(defense)},
        "samples": len(clean),
        "classes": clean.spec.num_classes,
        "accuracy_before": before,
        "accuracy_after": after,
        "flagged": repair.flagged,
        "seconds": {**monitor.seconds, "total": time.perf_counter() - start},
        "evidence": repair.evidence,
        "notes": notes,
    }
    tables = dict(repair.tables)
    repaired = _as_given(repair.model, model)
    return Purified(
        repaired, repair.flagged, tables.pop("neurons", None), report, pd.DataFrame(monitor.history), tables
    )


def _method(name: str, hyperparameters: dict[str, Any]) -> Any:
    defense = DEFENSES[name]
    if defense.in_training:
        raise UserError(f"{name} repairs while it trains on the poisoned training set; use defense/{name}.py")
    schema = Schema(defense)
    settings, _ = schema.merge(("", schema.check(hyperparameters, f"the options of {name}")))
    return settings.build(defense)


# What the user gave


def _samples(images: Images, labels: Any, augment: Augment | None) -> tuple[torch.Tensor, torch.Tensor, Augment | None]:
    """Images float32 [N, C, H, W] and labels int64 [N], on the CPU or where they were."""
    if labels is None:
        if _is_array(images):
            raise UserError("no labels: give labels, one per image, or an iterable of (images, labels) batches")
        pairs = [tuple(pair) for pair in images if isinstance(pair, (tuple, list)) and len(pair) == 2]
        if not pairs:
            raise UserError("images yields no (images, labels) pairs; give the labels too")
        images, labels = zip(*pairs, strict=True)
    x, y = _joined(images, "images"), _joined(labels, "labels")
    if not x.dtype.is_floating_point:
        raise UserError(
            f"images are {str(x.dtype).removeprefix('torch.')}; give them as the model expects them: "
            "floating point, scaled and normalised as in its training"
        )
    if x.ndim != 4 or not x.numel():
        raise UserError(f"images have the shape {list(x.shape)}, not [N, C, H, W] with N > 0")
    if y.dtype.is_floating_point or y.dtype == torch.bool or y.shape != x.shape[:1]:
        raise UserError(f"labels are {y.dtype} {list(y.shape)}; give one whole number for each of the {len(x)} images")
    if len(x) < 2:
        raise UserError("one sample is too few to train on")
    x = x.detach().float()
    if not x.isfinite().all():
        raise UserError("images hold NaN or infinite values; remove those samples")
    return x, y.detach().to(torch.int64), augment


def _is_array(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or hasattr(value, "__array__")


def _joined(value: Any, what: str) -> torch.Tensor:
    """A tensor, an array, a list of numbers, or batches of any of these, as one tensor."""
    try:
        if _is_array(value):
            return torch.as_tensor(value)
        parts = [torch.as_tensor(part) for part in value]
        if not parts:
            raise UserError(f"there are no {what}")
        return torch.stack(parts) if parts[0].ndim in (0, 3) else torch.cat(parts)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{what} cannot be read as one array: {' '.join(str(error).split())}") from None


# The model


def _device(model: nn.Module) -> torch.device:
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    if tensor is None:
        raise UserError("the model has no parameters, so there is nothing to repair")
    return tensor.device


def _prepare(
    model: nn.Module, given: tuple[torch.Tensor, torch.Tensor, Augment | None]
) -> tuple[nn.Module, InputSet, list[str]]:
    """A float32 copy of the model, all of it trainable, the samples as its clean set, and what is worth saying."""
    x, y, augment = given
    try:
        subject = copy.deepcopy(model).float().requires_grad_(True)
        subject.train()
        subject.eval()
    except Exception as error:  # whatever a stranger's module makes of it
        raise UserError(
            f"the model cannot be copied and switched between training and evaluation "
            f"({type(error).__name__}: {' '.join(str(error).split())}); give the plain nn.Module it was made from"
        ) from error
    device = _device(subject)
    x, y = x.to(device), y.to(device)
    classes = head_size(subject, x)
    with torch.no_grad():
        finite = all(subject(part).isfinite().all() for part in x.split(eval_batch(device)))
    if not finite:
        raise UserError("the model gives NaN or infinite logits for some images; check it, and their normalisation")
    wrong = (y < 0) | (y >= classes)
    if wrong.any():
        raise UserError(
            f"label {int(y[wrong][0])} is outside of the model's {classes} classes, which are 0 to {classes - 1}"
        )
    notes = []
    if absent := classes - len(y.unique()):
        notes.append(f"{absent} of the model's {classes} classes have no clean sample; they may suffer in the repair")
    low, high = x.amin((0, 2, 3)), x.amax((0, 2, 3))
    std = 1 / (high - low).clamp_min(1e-6)
    mean = -low * std
    _, channels, height, width = x.shape
    spec = DatasetSpec(
        "samples", classes, channels, height, width, tuple(mean.tolist()), tuple(std.tolist()), crop_padding=0
    )
    return subject, InputSet(x, y, spec, augment), notes


def head_size(model: nn.Module, x: torch.Tensor) -> int:
    """The K of the logits [B, K] that a model makes of the first two of the samples `x`, float [N, C, H, W].

    Raises:
        UserError: it fails on them, or its output is something else.
    """
    try:
        first = model(x[:2])
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"the model fails on a batch of {list(x[:2].shape)} ({reason})") from error
    if not isinstance(first, torch.Tensor) or first.ndim != 2 or len(first) != len(x[:2]) or first.shape[1] < 2:
        shape = list(first.shape) if isinstance(first, torch.Tensor) else type(first).__name__
        raise UserError(f"the model's output is {shape}, not logits [B, K]; wrap it in a module that returns them")
    if not first.requires_grad:
        raise UserError("the model's output carries no gradient; take torch.no_grad() or detach() out of its forward")
    return first.shape[1]


def _as_given(repaired: nn.Module, model: nn.Module) -> nn.Module:
    """The repaired copy with the modes, dtypes and frozen parameters of the model it was made from."""
    for ours, theirs in zip(repaired.modules(), model.modules(), strict=True):
        ours.training = theirs.training
    for tensor, original in zip(_tensors(repaired), _tensors(model), strict=True):
        tensor.data = tensor.data.to(original.dtype)
        tensor.requires_grad_(original.requires_grad)
        tensor.grad = None
    return repaired


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    return itertools.chain(model.parameters(), model.buffers())


# Diagnosis

SEARCH_SAMPLES = 32
SEARCH_CLASSES = 10
# Shares of the median norm, set on the first half of the models of bench/suspect_rates.py; see `suspect`.
NEAR, FAR = 0.25, 0.5


def suspect(
    model: nn.Module, images: Images, labels: Any = None, *, augment: Augment | None = None, **hyperparameters: Any
) -> Suspicion:
    """Say which class of a model is most suspicious, and whether that is evidence of a backdoor. Repairs nothing.

    Two pieces of evidence are wanted, as either alone is seen in models without a backdoor: that ULRL's ranking
    (whose options are the hyperparameters) flags the class, and that the class is near, as a trigger is a short
    way to it from every image. For the ten classes of the largest z (all, when there are no more) the smallest
    universal perturbation is searched, on up to 32 of the images; a class's reach is the norm of its perturbation
    as a share of their median. The verdict is

    - "backdoored" when a flagged class has a reach below 0.25;
    - "clean" when no class has, and no flagged class has one of 0.5 or less;
    - "uncertain" otherwise, and when a perturbation was found for less than half of the classes searched.

    How often it is right, on 24 small models that the thresholds were not set on (bench/suspect_rates.py, narrow
    nets on Fashion-MNIST, 600 clean images): of 12 clean models 0 were called backdoored, 11 clean, 1 uncertain. Of
    the 10 with BadNets, Blended or TrojanNN 8 were called backdoored, with the right class, and 2 uncertain. Both
    with SIG were called clean, as was a ResNet-18 trained on 5,000 images whose target was flagged at a reach of
    0.56: "clean" is no proof.

    Arguments as for `purify`.

    Raises:
        UserError: as `purify`.
    """
    defense = _method("ulrl", hyperparameters)
    given = _samples(images, labels, augment)
    start, monitor = time.perf_counter(), Monitor()
    with global_stream(defense.random_seed, "purify", _device(model)):
        subject, clean, notes = _prepare(model, given)
        ranking, unlearned, _ = defense.diagnose(subject, clean, monitor)
        order = torch.from_numpy(ranking.z.where(ranking.change > ranking.change.median(), 0).to_numpy(copy=True))
        classes = order.argsort(descending=True, stable=True)[:SEARCH_CLASSES].to(clean.device)
        drawn = torch.randperm(len(clean), generator=generator(defense.random_seed, "search"))[:SEARCH_SAMPLES]
        with monitor.stage("search", STEPS) as progress:
            norms = smallest_universal(subject, clean.subset(drawn), classes, progress, amp=defense.amp)
    ranking["perturbation"] = pd.Series(norms.cpu().double().numpy(), index=classes.tolist())
    usual = ranking.perturbation.median()
    ranking["reach"] = ranking.perturbation / usual if usual < float("inf") else float("nan")
    label, reach, verdict = _verdict(ranking)
    report = {
        "verdict": verdict,
        "label": label,
        "z": float(ranking.z[label]),
        "reach": reach,
        "samples": len(clean),
        "classes": clean.spec.num_classes,
        "options": {**vars(defense)},
        "seconds": {**monitor.seconds, "total": time.perf_counter() - start},
        "evidence": unlearned.evidence,
        "notes": notes,
    }
    return Suspicion(verdict, label, report["z"], reach, ranking, report)


def _verdict(ranking: pd.DataFrame) -> tuple[int, float, str]:
    """The class to look at, its reach and the verdict, by the table in `suspect`."""
    reach = ranking.reach.to_numpy()
    if np.isnan(reach).all():
        return int(ranking.z.argmax()), float("nan"), "uncertain"
    nearest = flagged = int(np.nanargmin(reach))
    if (marked := ranking.flagged.to_numpy() & ~np.isnan(reach)).any():
        flagged = int(np.nanargmin(np.where(marked, reach, np.nan)))
    label, verdict = nearest, "clean"
    if marked[flagged] and reach[flagged] < NEAR:
        label, verdict = flagged, "backdoored"
    elif reach[nearest] < NEAR:
        verdict = "uncertain"
    elif marked[flagged] and reach[flagged] <= FAR:
        label, verdict = flagged, "uncertain"
    return label, float(reach[label]), verdict
