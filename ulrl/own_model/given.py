"""What a user gives: a model, samples and options of a method, checked and made ready."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ulrl.data.imageset import DatasetSpec, InputSet
from ulrl.defenses.base import DEFENSES
from ulrl.errors import UserError
from ulrl.machine import eval_batch, pick_device
from ulrl.metrics import agreement, share
from ulrl.models.copying import copied
from ulrl.models.head import find_head
from ulrl.options import Schema
from ulrl.training import Monitor

Images = Any  # a tensor, an array, or any iterable of batches of them
Augment = Callable[[torch.Tensor], torch.Tensor]
Progress = bool | Callable[[str, int, int], None]

UNREADABLE, DOUBTFUL = 0.25, 0.5  # agreement with the labels beyond chance, below which no verdict is given, or a doubt
BYTES = 30.0  # no usual normalisation leaves a value as large
FAILURES = (Exception, SystemExit)  # whatever a stranger's module makes of it; sys.exit() would end us with its code


class Note(UserWarning):
    """Something about the model, the samples or a result that the user should know. Also in `report["notes"]`."""


@dataclass(frozen=True)
class Given:
    """A user's model and samples, ready for a method.

    model: of `working_copy`. clean: the samples, on the device of the copy.
    reading: how far the model's answers agree with the labels beyond chance, see `ulrl.metrics.agreement`.
    notes: what is worth saying.
    """

    model: nn.Module
    clean: InputSet
    reading: float
    notes: list[str]


def prepare(
    model: Any, images: Images, labels: Any, augment: Augment | None = None, device: str | torch.device | None = None,
    *, trains: bool = True, linear_name: str | None = None,
) -> Given:  # fmt: skip
    """Check what the user gave and make it ready. The copy of the model stands on `device`, its own where None.

    trains: whether the copy will be trained, so that it must answer in train mode, too, and with a gradient.
    linear_name: of the head, where the user named it.

    Raises:
        UserError: a model, samples or a device that do not fit; the sentence says what to do.
    """
    x, y = _samples(images, labels)
    place = _device(_network(model), device)
    subject = working_copy(model, place)
    x, y = x.to(place), y.to(place)
    classes = head_size(subject, x)
    if trains:
        _check_training(subject, x[:2], classes)
    with torch.no_grad():
        logits = torch.cat([subject(part).float() for part in x.split(eval_batch(place))])
    if not logits.isfinite().all():
        raise UserError("the model gives NaN or infinite logits for some images; check it, and their normalisation")
    if logits.min() >= 0 and logits.max() <= 1:
        last = "softmax" if ((logits.sum(1) - 1).abs() < 1e-3).all() else "sigmoid"
        raise UserError(f"the model returns probabilities, and logits are needed; take the {last} out of its forward")
    wrong = (y < 0) | (y >= classes)
    if wrong.any():
        raise UserError(
            f"label {int(y[wrong][0])} is outside of the model's {classes} classes, which are 0 to {classes - 1}"
        )
    predicted = logits.argmax(1)
    reading = agreement(predicted, y, classes)
    low, high = x.amin((0, 2, 3)), x.amax((0, 2, 3))
    std = 1 / (high - low).clamp_min(1e-6)
    mean = -low * std
    _, channels, height, width = x.shape
    spec = DatasetSpec(
        "samples", classes, channels, height, width, tuple(mean.tolist()), tuple(std.tolist()), crop_padding=0
    )
    right = share(predicted == y) or 0.0
    notes = [*_unused_head(subject, x[:2], classes, linear_name)] if trains else []
    notes += _notes(classes - len(y.unique()), classes, reading, right, low.min().item(), high.max().item())
    return Given(subject, InputSet(x, y, spec, augment and _in_shape(augment)), reading, notes)


def _in_shape(augment: Augment) -> Augment:
    """What the user's function makes of a batch, if it is one of the same shape: many a net takes another in silence.

    Raises:
        UserError: it is not.
    """

    def checked(x: torch.Tensor) -> torch.Tensor:
        made = augment(x)
        if not isinstance(made, torch.Tensor) or made.shape != x.shape:
            found = list(made.shape) if isinstance(made, torch.Tensor) else type(made).__name__
            raise UserError(f"augment makes {found} of {list(x.shape)}; it must keep the shape")
        return made

    return checked


def _notes(absent: int, classes: int, reading: float, right: float, low: float, high: float) -> list[str]:
    notes = []
    if absent:
        notes.append(f"{absent} of the model's {classes} classes have no clean sample; they may suffer in the repair")
    if max(-low, high) > BYTES:
        notes.append(
            f"images run from {low:.4g} to {high:.4g}, as if they were not normalised; "
            "that is right only for a model that does it itself"
        )
    if absent == classes - 1:
        notes.append("all samples are of one class, so whether the model reads them cannot be told; add some of others")
    elif reading < DOUBTFUL:
        notes.append(
            f"the model reads only {100 * right:.0f}% of these images right"
            f"{', about as many as by chance' if reading < UNREADABLE else ''}: are their labels, "
            "size and normalisation, and the order of the classes, those of its training?"
        )
    return notes


def say(notes: list[str]) -> list[str]:
    """Warn of each, where the caller of the caller stands, and return them."""
    for note in notes:
        warnings.warn(note, Note, stacklevel=4)  # between them stands `plain_defaults`
    return notes


def make_method(name: str, hyperparameters: Mapping[str, Any]) -> Any:
    """The defense of that name with these options.

    Raises:
        UserError: no such method or option, an unfit value, one of BackdoorBench's options that has no meaning here.
    """
    defense = DEFENSES[name]
    schema = Schema(defense)
    settings, ignored = schema.merge(("", schema.check(hyperparameters, f"the options of {name}")))
    if ignored:
        raise UserError(f"{', '.join(ignored)}: of BackdoorBench, and without a meaning for {name} here; leave it out")
    return settings.build(defense)


def make_repair(name: str, hyperparameters: Mapping[str, Any]) -> Any:
    """As `make_method`, but of those that repair a finished model.

    Raises:
        UserError: as there, and for a method that only finds, or that trains a model anew.
    """
    defense = DEFENSES[name]
    if defense.in_training:
        raise UserError(f"{name} repairs while it trains on the poisoned training set; use defense/{name}.py")
    if not defense.repairs:
        raise UserError(f"{name} only finds and repairs nothing; choose a method that repairs, or none for the default")
    return make_method(name, hyperparameters)


def make_monitor(progress: Progress) -> Monitor:
    """A monitor that shows bars (True), tells a function of (stage, steps done, steps at most), or is silent."""
    return Monitor(bar=progress is True, tell=progress if callable(progress) else None)


# The samples


def _samples(images: Images, labels: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Images float32 [N, C, H, W] and labels int64 [N], on the CPU or where they were."""
    if labels is None:
        if _is_array(images):
            raise UserError("no labels: give labels, one per image, or an iterable of (images, labels) batches")
        pairs = [tuple(pair) for pair in images if isinstance(pair, (tuple, list)) and len(pair) == 2]
        if not pairs:
            raise UserError(
                f"images, a {type(images).__name__}, yields no (images, labels) pairs; give tensors, or batches "
                "that are such pairs (of a folder: ulrl purify --images)"
            )
        images, labels = zip(*pairs, strict=True)
    x, y = joined(images, "images"), joined(labels, "labels")
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
    return x, y.detach().to(torch.int64)


def _is_array(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or hasattr(value, "__array__")


def _tensor(value: Any) -> torch.Tensor:
    """torch's own way asks a pandas Series for its value at the label 0, and takes no array with a negative stride."""
    if hasattr(value, "__array__") and not isinstance(value, torch.Tensor):
        value = np.require(value, requirements=["C", "W"])
    return torch.as_tensor(value)


def joined(value: Any, what: str) -> torch.Tensor:
    """A tensor, an array, a list of numbers, or batches of any of these, as one tensor."""
    try:
        if _is_array(value):
            return _tensor(value)
        parts = [_tensor(part) for part in value]
        if not parts:
            raise UserError(f"there are no {what}")
        return torch.stack(parts) if parts[0].ndim in (0, 3) else torch.cat(parts)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{what} cannot be read as one array: {' '.join(str(error).split())}") from None


# The model


def _network(model: Any) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, (str, os.PathLike)):
        what = f"{os.fspath(model)!r}, a path; build the network and load the file into it, or use `ulrl purify`"
    elif isinstance(model, Mapping):
        what = "a dictionary of weights; build the network, call its load_state_dict with them, and give the network"
    elif isinstance(model, type):
        what = f"the class {model.__name__}; make one, {model.__name__}(...), with its trained weights"
    elif callable(model):
        what = f"the function {getattr(model, '__name__', model)!s}; give the nn.Module that it returns or calls"
    else:
        what = f"of the type {type(model).__name__}"
    raise UserError(f"the model must be a torch.nn.Module and is {what}")


def _device(model: nn.Module, wanted: str | torch.device | None) -> torch.device:
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    if tensor is None:
        raise UserError("the model has no parameters, so there is nothing to repair")
    if tensor.is_meta:
        raise UserError("the model is on the meta device, where tensors hold no numbers; make it on the CPU")
    if wanted is None:
        return tensor.device
    try:
        return pick_device(str(wanted))
    except UserError as error:
        raise UserError(str(error).removeprefix("--")) from None


def working_copy(model: nn.Module, device: torch.device) -> nn.Module:
    """A float32 copy on `device`, all of it trainable, in eval mode. It changes no images that it is given: a net that
    normalises them in place is given copies, until `untied`.

    Raises:
        UserError: torch cannot copy it, or it cannot be switched between its modes.
    """
    if isinstance(model, torch.jit.ScriptModule):  # on which torch would warn first, and then fail
        raise UserError("the model is a TorchScript program; give the plain nn.Module it was made from")
    try:
        subject = copied(model).float().requires_grad_(True).to(device)
        subject.train()  # which returns nothing where a user's own `train` does not
        subject.eval()
        subject.register_forward_pre_hook(_spare, prepend=True)
    except FAILURES as error:
        raise UserError(
            f"the model cannot be copied and switched between training and evaluation "
            f"({_reason(error)}); give the plain nn.Module it was made from"
        ) from error
    return subject


def _spare(_: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(images.clone() for images in given)


def untied(subject: nn.Module) -> nn.Module:
    """A `working_copy`, or a copy of one, without what `working_copy` added."""
    for key, hook in list(subject._forward_pre_hooks.items()):
        if hook is _spare:
            del subject._forward_pre_hooks[key]
    return subject


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@torch.no_grad()  # with a gradient, an answer that the model keeps could not be copied by others
def head_size(model: nn.Module, x: torch.Tensor) -> int:
    """The K of the logits [B, K] that a model makes of the first two of the samples `x`, float [N, C, H, W].

    Raises:
        UserError: it fails on them, or its output is something else.
    """
    try:
        first = model(x[:2])
    except FAILURES as error:
        raise UserError(f"the model fails on a batch of {list(x[:2].shape)} ({_reason(error)})") from error
    if not isinstance(first, torch.Tensor) or first.ndim != 2 or len(first) != len(x[:2]) or first.shape[1] < 2:
        shape = list(first.shape) if isinstance(first, torch.Tensor) else type(first).__name__
        raise UserError(f"the model's output is {shape}, not logits [B, K]; wrap it in a module that returns them")
    return first.shape[1]


def _check_training(model: nn.Module, x: torch.Tensor, classes: int) -> None:
    """A step of two samples in train mode, of a copy and with the global generators put back.

    Raises:
        UserError: the answer is no logits there, or no gradient of it reaches the images.
    """
    if not torch.is_grad_enabled():
        raise UserError("gradients are switched off here; call it outside of torch.no_grad() and inference_mode()")
    subject, x, gradient = copied(model), x.clone().requires_grad_(True), None
    subject.train()
    devices = [x.device] if x.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            answer = subject(x)
        fits = isinstance(answer, torch.Tensor) and answer.shape == (len(x), classes)
        if fits and answer.requires_grad:
            (gradient,) = torch.autograd.grad(answer.sum(), x, allow_unused=True)
    except FAILURES as error:
        raise UserError(f"the model fails in train mode ({_reason(error)})") from error
    if not fits:
        shape = list(answer.shape) if isinstance(answer, torch.Tensor) else type(answer).__name__
        raise UserError(
            f"the model's output is {shape} in train mode, not logits [B, {classes}] as in eval mode; wrap it in a "
            "module that returns them in both"
        )
    if gradient is None:
        only = "only what comes behind could be repaired" if answer.requires_grad else "nothing could be repaired"
        raise UserError(
            f"the model's output carries no gradient back to the images, so {only}; take torch.no_grad() or detach() "
            "out of its forward"
        )


def _unused_head(model: nn.Module, x: torch.Tensor, classes: int, named: str | None) -> list[str]:
    """A note where what `find_head` takes for the head has no part in the answers."""
    try:
        name, head = find_head(model, classes, named)
    except UserError:
        return []  # said by the methods that need one
    gradients: Sequence[torch.Tensor | None] = torch.autograd.grad(model(x).sum(), head.weight, allow_unused=True)
    if gradients[0] is not None:  # also where its weight is taken, and the layer not called
        return []
    return [f"{name} has an output per class but no part in the answers; name the true head with linear_name, or a "
            "method that edits the head changes nothing"]  # fmt: skip
