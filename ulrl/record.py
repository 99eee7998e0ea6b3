"""The record on disk: a suspicious model with its poisoned data, laid out as BackdoorBench lays it out.

A record comes from a stranger: nothing in it is run, every value is checked before it is used, and
no file outside its folder is opened.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ulrl.data.imageset import DatasetSpec, ImageSet, PoisonedSet
from ulrl.errors import UserError
from ulrl.files import in_threads
from ulrl.poison_state import PoisonState, need, read_state
from ulrl.record_folder import record_folder, result_file
from ulrl.record_formats import load_raw
from ulrl.untrusted.images import read_png
from ulrl.untrusted.opening import real_path
from ulrl.untrusted.texts import read_json
from ulrl.untrusted.torchfiles import load_torch
from ulrl.untrusted.weights import check_weights, plain_name

INFO_FILE = "info.pickle"
KEYS = ("model_name", "num_classes", "model", "data_path", "img_size", "clean_data", "bd_train", "bd_test")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """A record whose every field has been checked; the images are read when asked for.

    state_dict: parameter name, without `module.`, to CPU tensor. dataset: name of the clean data.
    img_size: (height, width, channels). bd_train: None where the attack stores no training set (LIRA,
    Blind). attack: its name, or None where the record does not tell. clean_test: the digest of the clean test split, or
    None where another's tool made the record.
    """

    folder: Path
    model_name: str
    num_classes: int
    state_dict: dict[str, torch.Tensor]
    dataset: str
    data_path: str
    img_size: tuple[int, int, int]
    bd_train: PoisonState | None
    bd_test: PoisonState
    attack: str | None
    clean_test: str | None

    @property
    def name(self) -> str:
        return self.folder.name

    def poisoned_test(self, spec: DatasetSpec) -> PoisonedSet:
        """The poisoned test images, uint8 [P, C, H, W]; P is 0 in the record of a clean model.

        Raises:
            UserError: an image is missing, damaged, of another size, or outside the record; or `spec`
                is not of the record's data set.
        """
        state = self.bd_test
        images = self._images(state, spec)
        return PoisonedSet(images, state.labels, spec, state.original_labels, state.indices)

    def poisoned_train(self, clean: ImageSet) -> PoisonedSet:
        """The training set as the attacker left it, on `clean`'s device: `clean` (the whole clean
        training split) with images and labels of the poisoned samples replaced.

        Raises:
            UserError: as `poisoned_test`; the record stores no training set, or `clean` is not the
                split it was made from.
        """
        state, spec = self.bd_train, clean.spec
        if state is None:
            raise UserError(
                f"{self.folder} stores no poisoned training set (bd_train is None), which this method "
                "needs; choose another record, or a defense that works from clean samples"
            )
        self._check_split(state, clean, "training")
        poisoned = state.indicator[state.exposed].to(clean.device)
        whole = clean.subset(state.exposed)
        images, labels = whole.images, whole.labels.clone()  # a subset is a copy
        images[poisoned] = self._images(state, spec).to(clean.device)
        labels[poisoned] = state.labels.to(clean.device)
        return PoisonedSet(images, labels, spec, whole.labels, state.exposed.to(clean.device))

    def triggered_train(self) -> torch.Tensor:
        """Positions in the clean training split, int64 [P], of the samples that were poisoned, covers left out."""
        return torch.empty(0, dtype=torch.int64) if (state := self.bd_train) is None else state.indices[~state.cover]

    def check_test(self, clean: ImageSet) -> None:
        """Raises UserError if `clean`, a whole clean test split, is not the one that the record was made from.

        Its size and the true labels of the triggered images tell, at their places in it. (These leave the target's
        class out, of which all that is known is where it is not.) Of a folder of the user's, which is divided anew as
        images are added, the digest does, too, where the record has it; the pixels of a published data set may be
        decoded otherwise elsewhere.
        """
        self._check_split(self.bd_test, clean, "test")
        if self.dataset == "folder" and self.clean_test not in (None, clean.digest()):
            raise UserError(
                f"{self.folder} was made from other {clean.spec.name} test images; point --dataset_path to the "
                "data it was made from, as it was"
            )

    def _check_split(self, state: PoisonState, clean: ImageSet, split: str) -> None:
        if len(clean) != len(state.indicator) or not torch.equal(
            clean.labels[state.indices.to(clean.device)].cpu(), state.original_labels
        ):
            raise UserError(
                f"{self.folder} was not made from this {clean.spec.name} {split} split (their sizes or labels "
                "differ); point --dataset_path to the data it was made from"
            )

    def _images(self, state: PoisonState, spec: DatasetSpec) -> torch.Tensor:
        """uint8 [P, C, H, W], decoded by a pool of threads."""
        if (spec.img_size, spec.num_classes) != (self.img_size, self.num_classes):
            raise UserError(
                f"{self.folder} holds images of {self.img_size} in {self.num_classes} classes, but "
                f"{spec.name} has {spec.img_size} in {spec.num_classes}; point --dataset_path to the record's own data"
            )
        images = torch.empty(len(state.files), spec.channels, spec.height, spec.width, dtype=torch.uint8)
        root = self.folder / state.folder
        if state.files and not os.path.isdir(root):
            raise UserError(
                f"{root} is missing, and with it the {len(state.files)} poisoned images; unpack the whole record again"
            )
        inside = self.folder.resolve()

        def decode(i: int) -> None:
            images[i] = _pixels(root / state.files[i], inside, spec)

        in_threads(decode, len(state.files))
        return images


def load_record(record: str | os.PathLike[str], flag: str = "record") -> Record:
    """The record of that name under record/, or the one in the folder of that path. flag: what named it, for messages.

    Raises:
        UserError: the folder or its attack_result.pt is missing, damaged, of BackdoorBench v1, or asks
            to run code.
    """
    folder = record_folder(os.fspath(record), flag)
    file = result_file(folder)
    inside = folder.resolve()
    for name in (file.name, INFO_FILE, "result.json"):
        real_path(folder / name, inside)
    raw = _load_dict(file, inside, KEYS)
    for key in ("model_name", "clean_data", "data_path"):
        need(file, isinstance(raw[key], str), f"{key} is not a string")
    classes, size = raw["num_classes"], raw["img_size"]
    need(file, type(classes) is int and classes > 0, "num_classes is not a positive integer")
    need(
        file,
        isinstance(size, (tuple, list)) and len(size) == 3 and all(type(n) is int and n > 0 for n in size),
        "img_size is not three positive integers",
    )
    return Record(
        folder=folder,
        model_name=raw["model_name"],
        num_classes=classes,
        state_dict=_state_dict(file, raw["model"]),
        dataset=raw["clean_data"],
        data_path=raw["data_path"],
        img_size=(size[0], size[1], size[2]),
        bd_train=None if raw["bd_train"] is None else read_state(file, "bd_train", raw["bd_train"], classes),
        bd_test=read_state(file, "bd_test", raw["bd_test"], classes),
        attack=raw["attack"] if _is_name(raw.get("attack")) else _attack_name(folder, inside),
        clean_test=raw["clean_test"] if isinstance(raw.get("clean_test"), str) else None,
    )


def load_defense_result(folder: Path, record: Record) -> dict[str, torch.Tensor]:
    """The weights in the `defense_result.pt` of a defense's folder: parameter name to CPU tensor.

    Raises:
        UserError: it is missing, damaged, not of `record`'s architecture, or asks to run code.
    """
    file = folder / "defense_result.pt"
    if not os.path.lexists(file):
        raise UserError(f"{file} is missing: not the folder of a defense, or one that did not finish; run it again")
    raw = _load_dict(file, record.folder.resolve(), ("model_name", "num_classes", "model"))
    name, classes = raw["model_name"], raw["num_classes"]
    same = isinstance(name, str) and type(classes) is int  # an array would compare number by number
    same = same and (name, classes) == (record.model_name, record.num_classes)
    need(file, same, f"is of another architecture than {record.name}")
    return _state_dict(file, raw["model"])


def _load_dict(file: Path, inside: Path, keys: Sequence[str]) -> dict[str, Any]:
    raw = load_raw(file, inside)
    need(file, type(raw) is dict, "holds no dict")
    missing = [key for key in keys if key not in raw]
    need(file, not missing, f"lacks {', '.join(missing)}")
    content: dict[str, Any] = raw
    return content


def _state_dict(file: Path, model: Any) -> dict[str, torch.Tensor]:
    need(file, isinstance(model, dict), "model is not a state dict (names to dense CPU tensors)")
    need(file, all(isinstance(name, str) for name in model), "model is not a state dict (names to dense CPU tensors)")
    return check_weights(file, {_modern_name(name): weight for name, weight in model.items()}, len(model))


def _pixels(file: Path, inside: Path, spec: DatasetSpec) -> torch.Tensor:
    """uint8 [C, H, W]."""
    if not os.path.lexists(file):
        raise UserError(f"{file} is missing; unpack the whole record again")
    pixels = read_png(file, (spec.height, spec.width), inside, gray=spec.channels == 1)
    return torch.from_numpy(pixels).view(spec.height, spec.width, spec.channels).permute(2, 0, 1)


def _modern_name(name: str) -> str:
    """Plain, and with the names of today's torchvision ViT."""
    return plain_name(name).replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3.")


def _attack_name(folder: Path, inside: Path) -> str | None:
    """From BackdoorBench's info.pickle, else from our result.json; nice to know, so never fatal."""
    for name, key, read in ((INFO_FILE, "attack", load_torch), ("result.json", "method", read_json)):
        file = folder / name
        if os.path.lexists(file):
            try:
                held = read(file, inside=inside)
                need(file, isinstance(held, dict), "holds no dict")
                attack = held[key]
            except (UserError, KeyError) as error:  # not what decides whether it is readable
                log.warning("%s does not tell the attack's name: %s", file, error)
            else:
                if _is_name(attack):
                    return str(attack)
    return None


def _is_name(value: Any) -> bool:
    """Whether it may stand in the results of a run, which would else be too large to be read again, or no UTF-8."""
    return isinstance(value, str) and len(value) <= 200 and value.isprintable()
