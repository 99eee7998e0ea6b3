"""The two spellings of a record: BackdoorBench's `attack_result.pt`, and `attack_result.safetensors`, without a pickle.

In the latter the weights are tensors named `model/<name>`, the arrays of `bd_train` and `bd_test` are named
`<split>/<array>`, and the header's metadata has all else as JSON under `record`. An entry of `data_dict` is
[index, path, attacker's label, true label] there.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from ulrl.errors import UserError
from ulrl.files import save_torch
from ulrl.record_folder import PLAIN
from ulrl.untrusted.torchfiles import MOST, load_torch
from ulrl.untrusted.weights import load_safetensors

SPLITS = ("bd_train", "bd_test")
ARRAYS = ("original_index_array", "poison_indicator")
NUMBERS_AND_TEXTS = ("model_name", "num_classes", "data_path", "img_size", "clean_data", "attack", "clean_test")


def load_raw(file: Path, inside: Path) -> Any:
    """The content of either file as BackdoorBench nests it, unchecked: numbers, texts, tensors, arrays, mappings.

    Raises:
        UserError: it cannot be read, or asks to run code.
    """
    if file.name != PLAIN:
        return load_torch(file, inside=inside)
    metadata, tensors = load_safetensors(file, MOST, inside)
    try:
        raw: dict[str, Any] = json.loads(metadata["record"])
        raw["model"] = {k.removeprefix("model/"): t for k, t in tensors.items() if k.startswith("model/")}
        for split in SPLITS:
            if raw[split] is not None:
                raw[split] |= {name: tensors[f"{split}/{name}"].numpy() for name in ARRAYS}
                container = raw[split]["bd_data_container"]
                container["data_dict"] = {
                    _index(index): {"path": path, "other_info": [label, original]}
                    for index, path, label, original in container["data_dict"]
                }
    except Exception as error:  # whatever is made of a stranger's texts
        raise UserError(
            f"{file} is no record in safetensors ({type(error).__name__}: {error}); convert it again"
        ) from None
    return raw


def _index(value: Any) -> int:
    """An image's index, as it is.

    Raises:
        ValueError: it is none; numbers far larger can be made to collide, and then fill a dictionary for minutes.
    """
    if type(value) is not int or not 0 <= value < 2**40:
        raise ValueError(f"{value!r} is no index of an image")
    return value


def save_plain(raw: Mapping[str, Any], file: Path) -> None:
    """Write a checked record without a pickle."""
    tensors = {f"model/{name}": weight.contiguous().clone() for name, weight in raw["model"].items()}
    about: dict[str, Any] = {key: raw[key] for key in NUMBERS_AND_TEXTS}
    for split in SPLITS:
        about[split] = None
        if (state := raw[split]) is not None:
            tensors |= {f"{split}/{name}": torch.from_numpy(state[name].copy()) for name in ARRAYS}
            about[split] = {
                k: state[k]
                for k in ("getitem_all", "getitem_all_switch", "save_folder_path")
                if isinstance(state.get(k), (bool, str))
            }
            about[split]["bd_data_container"] = {
                "save_folder_path": state["bd_data_container"].get("save_folder_path"),
                "save_file_format": ".png",
                "data_dict": [
                    [index, sample["path"], *sample["other_info"]]
                    for index, sample in state["bd_data_container"]["data_dict"].items()
                ],
            }
    file.write_bytes(safetensors.torch.save(tensors, {"format": "pt", "record": json.dumps(about)}))


def save_pickle(raw: Mapping[str, Any], keys: Sequence[str], file: Path) -> None:
    """Write a checked record as BackdoorBench reads it."""
    content = {key: raw[key] for key in keys} | {"img_size": tuple(raw["img_size"])}
    for split in SPLITS:
        if content[split] is not None:
            content[split] |= {name: content[split][name].copy() for name in ARRAYS}
    with _arrays_of_numpy_1():
        save_torch(content, file)


@contextlib.contextmanager
def _arrays_of_numpy_1() -> Iterator[None]:
    """Inside the block a pickled array asks for the name that its maker has in numpy 1, too, with which BackdoorBench's
    own environment reads it; numpy 2 knows both.
    """
    maker = np.empty(0).__reduce__()[0]
    own = maker.__module__
    maker.__module__ = "numpy.core.multiarray"
    try:
        yield
    finally:
        maker.__module__ = own
