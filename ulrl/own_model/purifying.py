"""Repair of a copy of a model, and what it cost on samples that were held out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from ulrl.defenses.base import Repair
from ulrl.defenses.selection import split
from ulrl.errors import UserError
from ulrl.machine import plain_defaults, threads_for
from ulrl.models.copying import copied
from ulrl.own_model.given import Augment, Images, Progress, make_monitor, make_repair, prepare, say, untied
from ulrl.own_model.saving import save_weights
from ulrl.seeds import global_stream
from ulrl.training import accuracy

HELD_OUT_AT_LEAST = 10  # samples, below which an accuracy says nothing
LOSS = 0.02  # of accuracy, above which it is said


@dataclass(frozen=True, repr=False)
class Purified:
    """A repaired model, and what was found on the way.

    model: a repaired copy, with the modes, dtypes and device of the one that was given. flagged: classes
    called suspicious, the highest score first. ranking: one row per class with the columns `change`, `z`
    and `flagged`, for methods that rank classes. report: JSON-able: method, options, samples (given), held_out
    (how many of them), classes, accuracy_before and accuracy_after (shares of those held out; of those trained on,
    where none were), returned ("repaired", or "original" by `max_accuracy_loss`), seconds per stage, evidence, notes.
    history: one row per stage and epoch. tables: further evidence by name.
    """

    model: nn.Module
    flagged: list[int]
    ranking: pd.DataFrame | None
    report: dict[str, Any]
    history: pd.DataFrame = field(repr=False)
    tables: dict[str, pd.DataFrame] = field(repr=False)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the model's weights, whole or not at all: .safetensors or, as a state_dict, .pt or .pth.

        Raises:
            UserError: a name that ends otherwise, a folder that is missing, a file that is there.
        """
        save_weights(self.model, Path(path), overwrite=overwrite)

    def summary(self) -> str:
        """Method, accuracies, flagged classes and notes, as text."""
        report = self.report
        on = f"{report['held_out']} samples held out" if report["held_out"] else "the samples it was trained on"
        lines = [
            f"{report['method']}, {report['samples'] - report['held_out']} clean samples: {report['returned']} model",
            f"accuracy  {report['accuracy_before']:.3f} before, {report['accuracy_after']:.3f} after, on {on}",
            f"flagged   {', '.join(map(str, self.flagged)) or 'none'}",
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in report["notes"])])

    __repr__ = summary


@plain_defaults()
def purify(
    model: nn.Module,
    images: Images,
    labels: Any = None,
    *,
    method: str = "harden",
    augment: Augment | None = None,
    hold_out: float = 0.2,
    max_accuracy_loss: float | None = None,
    progress: Progress = False,
    device: str | torch.device | None = None,
    **hyperparameters: Any,
) -> Purified:
    """Repair a copy of a suspicious model with a few clean samples; the given model is left untouched.

    model: maps [B, C, H, W] to logits [B, K]; any architecture whose classifier head is an `nn.Linear`, or a
    convolution of 1x1, for the methods that edit one. images: what the model expects, normalised as in its training:
    a float tensor or array [N, C, H, W], or an iterable of batches (a DataLoader). labels: int [N], or batches of
    them; None where `images` yields (images, labels). augment: float32 [B, C, H, W] in and out, applied to training
    batches. hold_out: share of the samples, in [0, 0.9], that the repair is not given and that accuracy is measured
    on before and after; none, and it is said, where that makes fewer than ten. max_accuracy_loss: the share of them
    that may be lost, in [0, 1]; a repair that costs more is thrown away, and a copy of the given model returned.
    progress: True for bars on stderr, or a function of (stage, steps done, steps at most). device: where to
    work, the model's own where None. hyperparameters: the method's options, by the names of its flags.

    The copy is trained in float32, all of it: frozen parameters take part, and are frozen again in the result.
    Nothing is written, no global generator is seeded for good, no log is configured. What is worth saying, a loss of
    more than two points of accuracy among it, stands in the report's notes and is warned of, as `ulrl.Note`.

    Raises:
        UserError: samples, labels, options or a model that do not fit; the sentence says what to do.
    """
    defense = make_repair(method, hyperparameters)
    for name, share, high in (("hold_out", hold_out, 0.9), ("max_accuracy_loss", max_accuracy_loss, 1)):
        if share is not None and not 0 <= share <= high:
            raise UserError(f"{name} is {share}; give a share from 0 to {high}")
    given = prepare(model, images, labels, augment, device, linear_name=hyperparameters.get("linear_name"))
    start, monitor, notes, clean = time.perf_counter(), make_monitor(progress), given.notes, given.clean
    defense.check(given.model, clean)
    train, held_out = clean, clean
    if enough := round(hold_out * len(clean)) >= HELD_OUT_AT_LEAST:
        train, held_out = split(clean, hold_out, defense.random_seed)
    elif hold_out:
        notes.append(f"{len(clean)} samples are too few to hold {hold_out:.0%} of them out: accuracy is of all of them")
    parts = _parts(given.model)
    with threads_for(clean.spec.pixels, clean.device), global_stream(defense.random_seed, "purify", clean.device):
        before = accuracy(given.model, held_out, defense.amp)
        repair: Repair = defense.run_checked(given.model, train, monitor)
        if other := sorted(parts ^ _parts(repair.model)):  # its weights would fit the user's network no more
            raise UserError(
                f"{method} adds parts to the model or takes some away ({', '.join(other[:3])}); a method must leave "
                "its repair in the layers that it was given"
            )
        after = accuracy(repair.model, held_out, defense.amp)
    returned = "repaired"
    if max_accuracy_loss is not None and before - after > max_accuracy_loss + 1e-9:
        returned = "original"
        notes.append(
            f"the repair was thrown away and the model is as it was given: accuracy would have gone from "
            f"{before:.3f} to {after:.3f}, more than max_accuracy_loss={max_accuracy_loss:g} allows"
        )
    elif before - after > LOSS and round((before - after) * len(held_out)) > 1:  # one image is chance
        notes.append(f"the repair cost accuracy: {before:.3f} before, {after:.3f} after, on {len(held_out)} samples")
    report = {
        "method": method,
        "options": {**vars(defense)},
        "samples": len(clean),
        "held_out": len(held_out) if enough else 0,
        "classes": clean.spec.num_classes,
        "accuracy_before": before,
        "accuracy_after": after,
        "returned": returned,
        "flagged": repair.flagged,
        "seconds": {**monitor.seconds, "total": time.perf_counter() - start},
        "evidence": repair.evidence,
        "notes": say(notes),
    }
    tables = dict(repair.tables)
    result = _as_given(repair.model, model) if returned == "repaired" else copied(model)
    return Purified(result, repair.flagged, tables.pop("neurons", None), report, pd.DataFrame(monitor.history), tables)


def _as_given(repaired: nn.Module, model: nn.Module) -> nn.Module:
    """The repaired copy with the modes, dtypes, devices and frozen parameters of the model it was made from."""
    given, originals = dict(model.named_modules()), dict(_tensors(model))
    for name, module in untied(repaired).named_modules():
        module.training = given.get(name, model).training  # which is not there where the first forward pass made it
    for name, tensor in _tensors(repaired):
        tensor.grad = None
        if name in originals:
            tensor.data = tensor.data.to(originals[name].device, originals[name].dtype)
            tensor.requires_grad_(originals[name].requires_grad)
    return repaired


def _parts(model: nn.Module) -> set[str]:
    """The names of its modules, parameters and buffers."""
    return {name for name, _ in itertools.chain(model.named_modules(), _tensors(model))}


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())
