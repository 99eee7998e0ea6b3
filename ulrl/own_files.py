"""The door for a model that is not of ours, from files: a factory, weights, and a folder of clean images."""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ulrl.configure import options_of
from ulrl.data.batches import augment, normalise
from ulrl.data.imagefiles import common_size, read_images
from ulrl.data.imageset import DatasetSpec, ImageSet
from ulrl.data.layouts import IMAGENET, by_class, height_and_width, subfolders
from ulrl.defenses.base import DEFENSES, Defense
from ulrl.errors import UserError
from ulrl.files import find_input
from ulrl.machine import pick_device
from ulrl.options import option
from ulrl.own_model import Purified, Suspicion, purify, suspect
from ulrl.own_model.given import FAILURES, head_size, working_copy
from ulrl.own_model.saving import check_weights_output
from ulrl.seeds import generator
from ulrl.untrusted.torchfiles import MOST
from ulrl.untrusted.weights import load_weights, plain_name

MISFITS = (RuntimeError, ValueError, AssertionError, IndexError)  # what a network makes of images of another shape


@dataclass(frozen=True)
class PurifyRun:
    """Where the model and the images are, and where the repaired weights go."""

    method: str = option("harden", "the defense; ulrl list names them")
    model: str = option("", "package.module:factory, a function of yours that returns the network", source="user")
    weights: str = option("", "its weights: .safetensors, or a .pt with a state_dict", source="user")
    images: str = option(
        "", "folder of clean images: a subfolder per class, in the order of torchvision's ImageFolder", source="user"
    )
    out: str | None = option(None, "file for the repaired weights, .safetensors or .pt; needed but with --check")
    overwrite: bool = option(False, "replace that file")
    check: bool = option(
        False, "stop after the diagnosis; exit code 3 when the verdict is backdoored, 4 when it is uncertain, else 0"
    )
    hold_out: float = option(0.2, "share of the images that accuracy is measured on, before and after", low=0, high=0.9)
    max_accuracy_loss: float | None = option(
        None, "share of them that may be lost; a repair that costs more is not written", low=0, high=1
    )
    img_size: tuple[int, ...] = option((), "height and width of the model's input, or one number; the images' own")
    mean: tuple[float, ...] = option(
        IMAGENET[0], "the model's normalisation, per channel, of pixels in [0, 1]; one number: gray images",
        source="ImageNet",
    )  # fmt: skip
    std: tuple[float, ...] = option(IMAGENET[1], "the deviations that belong to --mean", source="ImageNet")
    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto is the GPU where there is one")


def load(run: PurifyRun) -> tuple[nn.Module, ImageSet]:
    """The model in evaluation mode and the images, uint8, both on the device that was asked for.

    `run.model` is the user's own code and is run; the weights and images are read without running anything.

    Raises:
        UserError: a flag that does not fit, files that cannot be read, a model that does not fit
            its weights or the images.
    """
    weights = find_input(run.weights)
    if not weights.exists():
        raise UserError(f"--weights {run.weights}: there is no such file")
    if run.out is not None:
        check_weights_output(Path(run.out), overwrite=run.overwrite, given=weights, flag="--out")
    device = pick_device(run.device)
    model = _build(run.model)
    _load_weights(model, weights)
    try:
        subject = working_copy(model, device)
    except UserError as error:
        raise UserError(f"--model {run.model}: {error}") from error
    model = model.to(device).requires_grad_(True)
    model.eval()
    images = _read_folder(find_input(run.images), run).to(device)
    two = images.subset(torch.arange(min(2, len(images))))
    try:
        classes = head_size(subject, normalise(two.images, images.spec))
    except UserError as error:
        if not isinstance(error.__cause__, MISFITS):  # it took the images, or something else is wrong with it
            raise UserError(f"--model {run.model}: {error}") from error
        raise UserError(f"{error}; are --img_size and --mean, --std (one number each: gray images) its own?") from error
    return model, _with_head(images, classes, run.images)


def diagnosis(defense: Defense) -> Defense:
    """The ULRL that diagnoses: `defense` where it is one, else one with its seed."""
    return defense if defense.name == "ulrl" else DEFENSES["ulrl"](random_seed=defense.random_seed)


def diagnose(model: nn.Module, images: ImageSet, defense: Defense) -> Suspicion:
    """`suspect` with all images and the options of `diagnosis` that were given.

    Raises:
        UserError: as `suspect`.
    """
    by = diagnosis(defense)
    options = {k: v for k, v in options_of(by).items() if v != getattr(type(by), k)}
    return suspect(model, normalise(images.images, images.spec), images.labels, progress=True, **options)


def repair(model: nn.Module, images: ImageSet, defense: Defense, run: PurifyRun) -> Purified:
    """`purify` with these images.

    Training images are shifted by up to an eighth of their size, and never mirrored, since the mirror image of a
    sign or a letter may be another class.

    Raises:
        UserError: as `purify`.
    """
    draws = generator(defense.random_seed, "crop", images.device)
    return purify(
        model, normalise(images.images, images.spec), images.labels, method=defense.name, progress=True,
        hold_out=run.hold_out, max_accuracy_loss=run.max_accuracy_loss,
        augment=lambda x: augment(x, images.spec, draws), **options_of(defense),
    )  # fmt: skip


# The flags


def _build(named: str) -> nn.Module:
    """What the user's factory returns. Modules are looked for in the current directory too, as by `python -m`."""
    module, _, factory = named.partition(":")
    if not re.fullmatch(r"[\w.]+:[\w.]+", named):
        raise UserError(f"--model {named}: write package.module:factory, as in my_models:resnet")
    import ulrl.tv  # noqa: F401 - so that torchvision also imports beside a CPU-only torch, in their code or in timm's

    here = os.getcwd()
    sys.path.insert(0, here)  # for good, as their code may import more when it runs
    try:
        model = functools.reduce(getattr, factory.split("."), importlib.import_module(module.removesuffix(".py")))()  # type: ignore[operator]
    except FAILURES as error:
        raise UserError(f"--model {named} fails ({type(error).__name__}: {error}); mend it, or name another") from error
    finally:
        os.chdir(here)  # where the files are that the other flags name
    if not isinstance(model, nn.Module):
        raise UserError(f"--model {named} returns a {type(model).__name__}, not a torch.nn.Module")
    return model


def _load_weights(model: nn.Module, file: Path) -> None:
    """Load weights strictly, whatever wrapper is around the network or was when they were saved. Nothing in the file
    is run.
    """
    names = {plain_name(k): k for k, w in model.state_dict().items() if isinstance(w, torch.Tensor)}
    own = {plain: model.state_dict()[k] for plain, k in names.items()}
    if meta := next((k for k, w in own.items() if w.is_meta), None):
        raise UserError(f"--model: {meta} is on the meta device, where tensors hold no numbers; make it on the CPU")
    if lazy := next((k for k, w in own.items() if is_lazy(w)), None):
        raise UserError(f"--model: {lazy} has no shape yet; let the factory run a batch through its lazy layers")
    size = sum(w.nbytes for w in own.values())
    try:
        weights = load_weights(file, max(MOST, 8 * size))  # an optimizer's state may lie beside them
    except UserError as error:
        raise UserError(f"--weights {error}") from None
    for name, w in own.items():  # safetensors keep shared weights under one of their names
        twin = next((k for k in weights if k in own and own[k].data_ptr() == w.data_ptr()), None)
        if name not in weights and twin is not None and own[twin].shape == w.shape:
            weights[name] = weights[twin]
    wrong = [k for k in {**own, **weights} if k not in own or k not in weights or own[k].shape != weights[k].shape]
    if wrong:
        unknown = [k for k in weights if k not in own][:2]
        ask = "does the factory make as many classes?"
        if unknown and unknown[0] not in wrong[:4]:  # a prefix, such as a wrapper's, or another network
            ask = f"the file has {', '.join(unknown)}; save the weights of the factory's own network, under its names"
        raise UserError(f"--weights {file} does not fit --model: see {', '.join(wrong[:4])}; {ask}")
    weights = {names[k]: w for k, w in weights.items()}
    model.load_state_dict(weights, strict=False)  # all are there, but for what is no tensor


# The images


def _read_folder(root: Path, run: PurifyRun) -> ImageSet:
    if not root.is_dir():
        raise UserError(f"--images {run.images}: there is no such folder")
    names = subfolders(root)
    if len(names) < 2:
        raise UserError(f"--images {root} does not hold a subfolder per class")
    samples = by_class(root, names, some=True, flag="--images")
    if len({label for _, label in samples}) < 2:
        raise UserError(f"--images {root} holds images of one class only, which tell nothing; add some of the others")
    if len(run.mean) != len(run.std) or len(run.mean) not in (1, 3) or min(run.std) <= 0:
        raise UserError("--mean and --std take three numbers each, or one for gray images; deviations are positive")
    height, width = height_and_width(run.img_size) if run.img_size else common_size([file for file, _ in samples])
    spec = DatasetSpec(
        "folder", len(names), len(run.mean), height, width, run.mean, run.std,
        crop_padding=max(1, min(height, width) // 8), class_names=tuple(names),
    )  # fmt: skip
    return read_images(samples, root, spec)


def _with_head(images: ImageSet, classes: int, named: str) -> ImageSet:
    """The images with labels for a head of that many classes.

    A subfolder per class, an empty one for a class without images, gives labels in the order of the names. Where there
    are fewer, their names must be the classes' numbers.
    """
    spec, names = images.spec, images.spec.class_names
    if len(names) == classes:
        return images
    numbers = [int(name) for name in names if name.isdecimal()]
    if len(numbers) < len(names) or len(set(numbers)) < len(names) or max(numbers) >= classes:
        raise UserError(
            f"--images {named} holds {len(names)} subfolders and the model has {classes} classes; make a subfolder for "
            "each class, empty where there are no images, or name the subfolders by the classes' numbers, from 0"
        )
    by_number = tuple(str(c) for c in range(classes))
    labels = torch.tensor(numbers, device=images.device)[images.labels]
    return replace(images, labels=labels, spec=replace(spec, num_classes=classes, class_names=by_number))
