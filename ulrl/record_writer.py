"""Writing a record that BackdoorBench reads too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ulrl.data.imageset import DatasetSpec, ImageSet, PoisonedSet
from ulrl.files import in_threads, save_torch, whole_file
from ulrl.record import INFO_FILE
from ulrl.record_folder import PICKLE as RESULT_FILE


def write_record(
    folder: Path,
    *,
    final_name: str,
    model_name: str,
    num_classes: int,
    state_dict: Mapping[str, torch.Tensor],
    spec: DatasetSpec,
    poisoned_test: PoisonedSet,
    clean_test: ImageSet,
    poisoned_train: PoisonedSet | None,
    n_train: int,
    train_indices: torch.Tensor,
    info: Mapping[str, Any],
) -> None:
    """Write a record that BackdoorBench reads too into `folder`, empty, to be renamed `final_name`.

    poisoned_train: only the poisoned training samples, or None where the attack has none to show. clean_test: the whole
    split, of which a digest stays. n_train: size of the clean training split. train_indices: int64 [n], the positions
    in it that the model was trained on. info: the attack's options, builtins only.
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
        "bd_test": _write_state(folder, bd_test, poisoned_test, len(clean_test)),
        "clean_test": clean_test.digest(),
    }
    save_torch(result, folder / RESULT_FILE)


def write_defense_result(
    path: Path, *, model_name: str, num_classes: int, state_dict: Mapping[str, torch.Tensor]
) -> None:
    """Write a repaired model as BackdoorBench's defense_result.pt."""
    with whole_file(path) as partial:
        result = {"model_name": model_name, "num_classes": num_classes, "model": _on_cpu(state_dict)}
        save_torch(result, partial)


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

    in_threads(encode, len(samples))
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


def _on_cpu(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight.detach().cpu() for name, weight in state_dict.items()}
