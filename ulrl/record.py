"""The record on disk: a suspicious model with its poisoned data, laid out as BackdoorBench lays it out.

A record comes from a stranger: nothing in it is run, every value is checked before it is used, and
no file outside its folder is opened.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import torch
from PIL import Image

from ulrl.data.imageset import DatasetSpec, ImageSet, PoisonedSet
from ulrl.errors import UserError
from ulrl.files import home, save_torch, whole_file

RESULT_FILE = "attack_result.pt"
INFO_FILE = "info.pickle"
KEYS = ("model_name", "num_classes", "model", "data_path", "img_size", "clean_data", "bd_train", "bd_test")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PoisonState:
    """Which samples of a split are poisoned, and where their images lie.

    folder: name of the PNG folder inside the record, e.g. "bd_test_dataset".
    exposed: int64 [n], the positions in the clean split that this data set shows, in order.
    indicator: bool [N_split], which of them are poisoned.
    indices, labels, original_labels: int64 [P], the exposed poisoned samples in that order: position in
    the clean split, the attacker's label, the true one.
    files: their P images relative to `folder`, each "<digits>/<digits>.png".
    """

    folder: str
    exposed: torch.Tensor
    indicator: torch.Tensor
    indices: torch.Tensor
    labels: torch.Tensor
    original_labels: torch.Tensor
    files: tuple[str, ...]

    @property
    def cover(self) -> torch.Tensor:
        """bool [P]: samples that carry noise instead of the trigger (WaNet, input-aware, BPP).

        BackdoorBench marks them as poisoned; their label tells: it is the true one, in a set where the
        trigger changes labels. A sample of the target class keeps its label either way, so there the
        two cannot be told apart, and it counts as triggered.
        """
        kept = self.labels == self.original_labels
        targets = self.labels[~kept].unique()
        if len(targets) == 0:  # clean-label attack: every poisoned sample keeps its label
            return torch.zeros_like(kept)
        return kept & (self.original_labels != targets) if len(targets) == 1 else kept


@dataclass(frozen=True)
class Record:
    """A record whose every field has been checked; the images are read when asked for.

    state_dict: parameter name, without `module.`, to CPU tensor. dataset: name of the clean data.
    img_size: (height, width, channels). bd_train: None where the attack stores no training set (LIRA,
    Blind). attack: its name, or None where the record does not tell.
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

    def check_test(self, clean: ImageSet) -> None:
        """Raises UserError if a folder of the user's is not the one that the record was made from.

        The clean test split's size and labels tell. A published data set is told by its name.
        """
        if self.dataset == "folder":
            self._check_split(self.bd_test, clean, "test")

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
            images[i] = _read_png(root / state.files[i], inside, spec)

        _in_threads(decode, len(state.files))
        return images


def load_record(path: str | os.PathLike[str]) -> Record:
    """The record in the folder `path`.

    Raises:
        UserError: the folder or its attack_result.pt is missing, damaged, of BackdoorBench v1, or asks
            to run code.
    """
    folder = Path(os.path.abspath(path))
    file = folder / RESULT_FILE
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name the folder of a record, the one with {RESULT_FILE}")
    if not file.is_file():
        raise UserError(f"{file} is missing: not a record, or an attack that did not finish; run it again")
    for name in (RESULT_FILE, INFO_FILE, "result.json"):
        real_path(folder / name, folder.resolve())
    raw = _load_dict(file, KEYS)
    for key in ("model_name", "clean_data", "data_path"):
        _need(file, isinstance(raw[key], str), f"{key} is not a string")
    classes, size = raw["num_classes"], raw["img_size"]
    _need(file, type(classes) is int and classes > 0, "num_classes is not a positive integer")
    _need(
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
        bd_train=None if raw["bd_train"] is None else _read_state(file, "bd_train", raw["bd_train"], classes),
        bd_test=_read_state(file, "bd_test", raw["bd_test"], classes),
        attack=_attack_name(folder),
    )


def find_record(result_file: str, flag: str = "--result_file") -> Record:
    """The record that `flag` names.

    Raises:
        UserError: no name given, no such record, or one that cannot be read.
    """
    if not result_file:
        raise UserError(f"{flag} is missing: give the name of a record under record/")
    named = home() / "record" / result_file
    return load_record(named if (named / RESULT_FILE).exists() or not Path(result_file).is_dir() else Path(result_file))


def write_record(
    folder: Path,
    *,
    final_name: str,
    model_name: str,
    num_classes: int,
    state_dict: Mapping[str, torch.Tensor],
    spec: DatasetSpec,
    poisoned_test: PoisonedSet,
    n_test: int,
    poisoned_train: PoisonedSet | None,
    n_train: int,
    train_indices: torch.Tensor,
    info: Mapping[str, Any],
) -> None:
    """Write a record that BackdoorBench reads too into `folder`, empty, to be renamed `final_name`.

    poisoned_train: only the poisoned training samples, or None where the attack has none to show.
    n_test, n_train: sizes of the clean splits. train_indices: int64 [n], the positions in the clean
    training split that the model was trained on. info: the attack's options, builtins only.
    """
    bd_test, bd_train = f"./record/{final_name}/bd_test_dataset", f"./record/{final_name}/bd_train_dataset"
    train_state = None
    if poisoned_train is not None:
        train_state = _write_state(folder, bd_train, poisoned_train, n_train)
        save_torch(train_state["poison_indicator"], folder / "train_poison_index_list.pickle")
        train_state["original_index_array"] = train_indices.numpy()
    save_torch(dict(info), folder / INFO_FILE)
    result = {
        "model_name": model_name,
        "num_classes": num_classes,
        "model": _on_cpu(state_dict),
        "data_path": f"./data/{spec.name}",
        "img_size": spec.img_size,
        "clean_data": spec.name,
        "bd_train": train_state,
        "bd_test": _write_state(folder, bd_test, poisoned_test, n_test),
    }
    save_torch(result, folder / RESULT_FILE)


def write_defense_result(
    path: Path, *, model_name: str, num_classes: int, state_dict: Mapping[str, torch.Tensor]
) -> None:
    """Write a repaired model as BackdoorBench's defense_result.pt."""
    with whole_file(path) as partial:
        result = {"model_name": model_name, "num_classes": num_classes, "model": _on_cpu(state_dict)}
        save_torch(result, partial)


def load_defense_result(folder: Path, record: Record) -> dict[str, torch.Tensor]:
    """The weights in the `defense_result.pt` of a defense's folder: parameter name to CPU tensor.

    Raises:
        UserError: it is missing, damaged, not of `record`'s architecture, or asks to run code.
    """
    file = folder / "defense_result.pt"
    if not file.is_file():
        raise UserError(f"{file} is missing: not the folder of a defense, or one that did not finish; run it again")
    real_path(file, record.folder.resolve())
    raw = _load_dict(file, ("model_name", "num_classes", "model"))
    same = (raw["model_name"], raw["num_classes"]) == (record.model_name, record.num_classes)
    _need(file, same, f"is of another architecture than {record.name}")
    return _state_dict(file, raw["model"])


# Reading what may be hostile: the pickle


def _load_dict(file: Path, keys: Sequence[str]) -> dict[str, Any]:
    raw = _load(file)
    _need(file, type(raw) is dict, "holds no dict")
    missing = [key for key in keys if key not in raw]
    _need(file, not missing, f"lacks {', '.join(missing)}")
    content: dict[str, Any] = raw
    return content


def _state_dict(file: Path, model: Any) -> dict[str, torch.Tensor]:
    _need(
        file,
        isinstance(model, dict) and all(isinstance(k, str) and _is_weight(v) for k, v in model.items()),
        "model is not a state dict (names to dense CPU tensors)",
    )
    return {_modern_name(name): weight.detach() for name, weight in model.items()}


def _need(file: Path, condition: bool, complaint: str) -> None:
    if not condition:
        raise UserError(
            f"{file} is not a BackdoorBench record: {complaint}; fetch it again, or re-save it with "
            "BackdoorBench v2 or main"
        )


class _Dtype:
    """Stands in for `numpy.dtype` while unpickling: a plain number's type, never objects or records."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if not re.fullmatch("[biuf][1248]", code):
            raise ValueError(f"an array of {code!r}, not of numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Sequence[Any]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands in for `numpy.ndarray` while unpickling."""

    values = np.empty(0)

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, bool, bytes]) -> None:
        _, shape, dtype, _, raw = state
        self.values = np.frombuffer(raw, dtype.dtype).reshape(shape)


def _reconstruct(cls: type, shape: tuple[int, ...], code: bytes) -> _Array:
    return _Array()


def _scalar(dtype: _Dtype, raw: bytes) -> int | float:
    return np.frombuffer(raw, dtype.dtype).item()


# Numpy's own functions trust what they unpickle: a dtype's state can declare raw bytes to be object
# pointers, torch lets it through, and a look at the array kills the process (tried). A record needs plain
# numbers only, so its numpy names are bound to stand-ins that know nothing else. An empty array is
# pickled with a call of `bytes`.
_RECORD_GLOBALS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Array, "numpy.ndarray"),
    (_Dtype, "numpy.dtype"),
    (bytes, "builtins.bytes"),
    *((_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
_globals_lock = threading.Lock()


@contextlib.contextmanager
def _only_record_globals() -> Iterator[None]:
    """Torch's default list plus ours, and nothing that the application added to it."""
    with _globals_lock:
        added = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            torch.serialization.add_safe_globals(_RECORD_GLOBALS)
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(added)


_PICKLED_IMAGES = (
    "keeps its images as pickled Python objects (a BackdoorBench v1 record, or one made in RAM mode), which "
    "cannot be opened safely; re-save it with BackdoorBench v2 or main, which write PNG files"
)


def _load(file: Path) -> Any:
    """What a torch file holds, its arrays as `_Array`; nothing in it is run."""
    try:
        with _only_record_globals():
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch makes of a stranger's bytes
        name = re.search(r"GLOBAL (\S+)", str(error))
        if name is None:
            problem = f"is no readable torch file ({type(error).__name__}); if it is damaged, fetch it again"
        elif name[1].startswith("PIL."):
            problem = _PICKLED_IMAGES
        else:
            problem = (
                f"asks to run {name[1]!r}, which no record needs, and was refused; do not trust it, and get "
                "the record from a source you know"
            )
        raise UserError(f"{file} {problem}") from error


def _is_weight(value: Any) -> bool:
    return (
        type(value) in (torch.Tensor, torch.nn.Parameter)
        and value.device.type == "cpu"
        and value.layout is torch.strided
        and not (value.is_quantized or value.is_nested)
        and value.untyped_storage().nbytes() >= value.nbytes  # a stride of 0 makes gigabytes of a few bytes
    )


def _modern_name(name: str) -> str:
    """Without DataParallel's prefix, and with the names of today's torchvision ViT."""
    name = name.removeprefix("module.")
    return name.replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3.")


def _read_state(file: Path, key: str, raw: Any, num_classes: int) -> PoisonState:
    """Check and decode the value of bd_train or bd_test."""
    _need(file, type(raw) is dict, f"{key} is not a dict")
    if "x" in raw:
        raise UserError(f"{file} {_PICKLED_IMAGES}")
    container, exposed = raw.get("bd_data_container"), raw.get("original_index_array")
    indicator = raw.get("poison_indicator")
    _need(file, type(container) is dict, f"{key} has no bd_data_container")
    samples, folder = container.get("data_dict"), container.get("save_folder_path", "")
    _need(file, type(samples) is dict, f"{key} has no data_dict")
    if folder is None:
        raise UserError(f"{file} {_PICKLED_IMAGES}")
    # Stored paths begin wherever the record was made; only their last parts mean anything here.
    folder = PureWindowsPath(folder).name if isinstance(folder, str) else ""
    _need(
        file,
        re.fullmatch(r"\w[\w.-]*", folder) is not None,
        f"save_folder_path of {key} names no plain folder",
    )
    _need(
        file,
        isinstance(indicator, _Array) and indicator.values.ndim == 1 and bool(np.isin(indicator.values, (0, 1)).all()),
        f"poison_indicator of {key} is not an array of 0 and 1",
    )
    _need(
        file,
        isinstance(exposed, _Array)
        and exposed.values.ndim == 1
        and (exposed.values.dtype.kind in "iu" or exposed.values.size == 0)
        and bool(((exposed.values >= 0) & (exposed.values < len(indicator.values))).all())
        and len(np.unique(exposed.values)) == len(exposed.values),
        f"original_index_array of {key} is not an array of different positions in the split",
    )
    shown, poisoned = exposed.values.astype(np.int64), indicator.values.astype(bool)
    indices = shown[poisoned[shown]]
    labels, files = np.empty((2, len(indices)), np.int64), []
    for i, index in enumerate(indices.tolist()):
        label, original, image = _read_sample(file, f"sample {index} of {key}", samples.get(index), num_classes)
        labels[:, i] = label, original
        files.append(image)
    return PoisonState(
        folder=folder,
        exposed=torch.from_numpy(shown),
        indicator=torch.from_numpy(poisoned),
        indices=torch.from_numpy(indices),
        labels=torch.from_numpy(labels[0]),
        original_labels=torch.from_numpy(labels[1]),
        files=tuple(files),
    )


def _read_sample(file: Path, what: str, entry: Any, num_classes: int) -> tuple[int, int, str]:
    """(attacker's label, true label, "<digits>/<digits>.png") of a data_dict entry."""
    _need(file, type(entry) is dict, f"{what} has no entry in data_dict")
    path, labels = entry.get("path"), entry.get("other_info")
    image = "/".join(PureWindowsPath(path).parts[-2:]) if isinstance(path, str) else ""
    _need(
        file,
        re.fullmatch(r"[0-9]+/[0-9]+\.png", image) is not None,
        f"path of {what} does not end in <label>/<index>.png",
    )
    _need(
        file,
        isinstance(labels, (list, tuple))
        and len(labels) == 2
        and all(type(label) is int and 0 <= label < num_classes for label in labels),
        f"other_info of {what} is not two labels below {num_classes}",
    )
    return labels[0], labels[1], image


def _attack_name(folder: Path) -> str | None:
    """From BackdoorBench's info.pickle, else from our result.json; nice to know, so never fatal."""
    sources: tuple[tuple[str, str, Callable[[Path], Any]], ...] = (
        (INFO_FILE, "attack", _load),
        ("result.json", "method", lambda file: json.loads(file.read_text(encoding="utf-8"))),
    )
    for name, key, read in sources:
        file = folder / name
        if file.is_file():
            try:
                attack = read(file)[key]
            except Exception as error:  # not what decides whether the record is readable
                log.warning("%s does not tell the attack's name: %s", file, error)
            else:
                if isinstance(attack, str):
                    return attack
    return None


# Images and writing


def real_path(file: Path, inside: Path) -> Path:
    """Where `file` really lies; refused when that is not `inside`."""
    real = Path(os.path.realpath(file))
    if not real.is_relative_to(inside):
        raise UserError(f"{file} leads out of the record, to {real}, and was not opened; put the file itself there")
    return real


def _read_png(file: Path, inside: Path, spec: DatasetSpec) -> torch.Tensor:
    """uint8 [C, H, W]."""
    real = real_path(file, inside)
    if not os.path.isfile(real):
        raise UserError(f"{file} is missing; unpack the whole record again")
    try:
        with Image.open(real, formats=["PNG"]) as png:
            width, height = png.size  # from the header: nothing is decoded before it is found to fit
            if (width, height) == (spec.width, spec.height):
                pixels = np.array(png.convert("L" if spec.channels == 1 else "RGB"))
                return torch.from_numpy(pixels).view(height, width, spec.channels).permute(2, 0, 1)
    except Exception as error:  # whatever PIL makes of a stranger's bytes
        raise UserError(f"{file} is not a readable PNG ({type(error).__name__}); unpack the record again") from error
    raise UserError(
        f"{file} is {height} x {width} pixels, but {spec.name} has {spec.height} x {spec.width}; unpack the "
        "record again"
    )


def _write_state(folder: Path, save_folder_path: str, poisoned: PoisonedSet, n: int) -> dict[str, Any]:
    """Write the PNG files, and return the state of a data set that shows the poisoned samples only."""
    poisoned = poisoned.to("cpu")
    root = folder / Path(save_folder_path).name
    root.mkdir()
    for label in poisoned.original_labels.unique().tolist():
        (root / str(label)).mkdir()
    columns = (poisoned.original_indices, poisoned.labels, poisoned.original_labels)
    samples = torch.stack(columns, dim=1).tolist()
    pixels = poisoned.images.permute(0, 2, 3, 1).numpy()
    if poisoned.spec.channels == 1:
        pixels = pixels[..., 0]  # PIL takes a gray image as [H, W]

    def encode(i: int) -> None:
        index, _, original = samples[i]
        Image.fromarray(pixels[i]).save(root / f"{original}/{index}.png")

    _in_threads(encode, len(samples))
    indicator = np.zeros(n)
    indicator[poisoned.original_indices.numpy()] = 1
    return {
        "bd_data_container": {
            "save_folder_path": save_folder_path,
            "data_dict": {
                index: {
                    "path": f"{save_folder_path}/{original}/{index}.png",
                    "other_info": [label, original],
                }
                for index, label, original in samples
            },
            "save_file_format": ".png",
        },
        "getitem_all": True,
        "getitem_all_switch": False,
        "original_index_array": np.flatnonzero(indicator),
        "poison_indicator": indicator,
        "save_folder_path": save_folder_path,
    }


def _in_threads(work: Callable[[int], None], n: int) -> None:
    """`work(0)` to `work(n - 1)`; PIL lets threads run side by side while it codes."""
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(work, range(n)):
            pass


def _on_cpu(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight.detach().cpu() for name, weight in state_dict.items()}
