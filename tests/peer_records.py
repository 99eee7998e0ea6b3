"""Records as BackdoorBench writes them, built from the format's description alone, not by our writer."""

from __future__ import annotations

import io
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

CLASSES, HEIGHT, WIDTH = 4, 6, 5
N_TRAIN, N_TEST = 12, 9
TARGET = 0


def clean_split(n: int) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 [n, H, W, 3], labels int64 [n]) of the made-up data set."""
    images = np.random.default_rng(n).integers(0, 256, (n, HEIGHT, WIDTH, 3), dtype=np.uint8)
    return images, np.arange(n) % CLASSES


def poison(images: np.ndarray) -> np.ndarray:
    return 255 - images


def state(
    folder: Path,
    split: str,
    n: int,
    poisoned: list[int],
    exposed: list[int],
    *,
    prefix: str,
    numpy_keys: bool,
) -> dict[str, Any]:
    """Write the PNG files of an all-to-one attack, and return the value of bd_train or bd_test."""
    images, labels = clean_split(n)
    samples: dict[Any, Any] = {}
    for index in poisoned:
        name = f"{labels[index]}/{index}.png"
        file = folder / split / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(poison(images[index])).save(file)
        samples[np.int64(index) if numpy_keys else index] = {
            "path": f"{prefix}/{split}/{name}",
            "other_info": [TARGET, int(labels[index])],
        }
    indicator = np.zeros(n)
    indicator[poisoned] = 1
    return {
        "bd_data_container": {
            "save_folder_path": f"{prefix}/{split}",
            "data_dict": samples,
            "save_file_format": ".png",
        },
        "getitem_all": True,
        "getitem_all_switch": False,
        "original_index_array": np.array(exposed, dtype=np.int64),
        "poison_indicator": indicator,
        "save_folder_path": f"{prefix}/{split}",
    }


def content(
    folder: Path, *, prefix: str = "./record/badnet_0_1", numpy_keys: bool = True, module_prefix: str = ""
) -> dict[str, Any]:
    """Write the record's PNG files, and return what its attack_result.pt holds."""
    _, labels = clean_split(N_TEST)
    poisoned_test = np.flatnonzero(labels != TARGET).tolist()
    how: dict[str, Any] = {"prefix": prefix, "numpy_keys": numpy_keys}
    weights = {"fc.weight": torch.arange(8.0).view(4, 2), "fc.bias": torch.zeros(4)}
    return {
        "model_name": "preactresnet18",
        "num_classes": CLASSES,
        "model": OrderedDict((module_prefix + name, weight) for name, weight in weights.items()),
        "data_path": "../data/toy",
        "img_size": (HEIGHT, WIDTH, 3),
        "clean_data": "toy",
        "bd_train": state(folder, "bd_train_dataset", N_TRAIN, [1, 4, 7], list(range(N_TRAIN)), **how),
        "bd_test": state(folder, "bd_test_dataset", N_TEST, poisoned_test, poisoned_test, **how),
    }


def v1_content() -> dict[str, Any]:
    images, labels = clean_split(2)
    pickled = {"x": [Image.fromarray(image) for image in images], "y": labels, "original_index": np.arange(2)}
    return {
        "model_name": "preactresnet18",
        "num_classes": CLASSES,
        "model": OrderedDict(),
        "data_path": "./data/toy",
        "img_size": (HEIGHT, WIDTH, 3),
        "clean_data": "toy",
        "bd_train": {"x": None, "y": None, "original_index": None},
        "bd_test": {**pickled, "original_targets": labels},
    }


def ram_mode(result: dict[str, Any]) -> dict[str, Any]:
    """The same record with its test images pickled instead of written."""
    images, labels = clean_split(N_TEST)
    test = result["bd_test"]
    test["save_folder_path"] = test["bd_data_container"]["save_folder_path"] = None
    test["bd_data_container"]["data_dict"] = {
        int(i): (Image.fromarray(images[i]), TARGET, int(labels[i])) for i in test["original_index_array"]
    }
    return result


class Call:
    """Pickles as a call of `function`, made when the pickle is opened."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.reduced = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.reduced


def touching(file: Path) -> Call:
    return Call(os.system, f"touch {file}")


def save(result: object, file: Path, numpy_core: str = "_core") -> None:
    """`torch.save`, as under numpy 2 (`_core`) or numpy 1 (`core`)."""
    torch.save(result, file)
    rewrite(file, lambda pickle: re.sub(rb"numpy\._?core\.", f"numpy.{numpy_core}.".encode(), pickle))


def rewrite(file: Path, change: Callable[[bytes], bytes]) -> None:
    """Change the pickle inside a torch file, checksums and all."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name.endswith("/data.pkl") else data)
    file.write_bytes(buffer.getvalue())


def items(state: dict[str, Any], clean: list[tuple[np.ndarray, int]]) -> list[tuple[bytes, int, int, int, int]]:
    """What BackdoorBench's own data set yields: (pixels, label, original index, poisoned?, true label)."""
    found = []
    for j in state["original_index_array"][np.arange(len(state["original_index_array"]))]:
        if state["poison_indicator"][j] == 0:
            image, label = clean[j]
            found.append((image.tobytes(), label, int(j), 0, label))
        else:
            sample = state["bd_data_container"]["data_dict"][j]
            label, original = sample["other_info"]
            found.append((np.asarray(Image.open(sample["path"])).tobytes(), label, int(j), 1, original))
    return found
