"""Which samples of a record are poisoned: what `bd_train` and `bd_test` hold, every value checked before it is used."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import torch

from ulrl.errors import UserError
from ulrl.untrusted.torchfiles import PICKLED_IMAGES


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


def read_state(file: Path, key: str, raw: Any, num_classes: int) -> PoisonState:
    """Check and decode the value of bd_train or bd_test."""
    need(file, type(raw) is dict, f"{key} is not a dict")
    if "x" in raw:
        raise UserError(f"{file} {PICKLED_IMAGES}")
    container, exposed = raw.get("bd_data_container"), raw.get("original_index_array")
    indicator = raw.get("poison_indicator")
    need(file, type(container) is dict, f"{key} has no bd_data_container")
    samples, folder = container.get("data_dict"), container.get("save_folder_path", "")
    need(file, type(samples) is dict, f"{key} has no data_dict")
    if folder is None:
        raise UserError(f"{file} {PICKLED_IMAGES}")
    # Stored paths begin wherever the record was made; only their last parts mean anything here.
    folder = PureWindowsPath(folder).name if isinstance(folder, str) else ""
    need(
        file,
        re.fullmatch(r"\w[\w.-]{0,59}", folder) is not None,
        f"save_folder_path of {key} names no plain folder",
    )
    need(
        file,
        isinstance(indicator, np.ndarray)
        and indicator.ndim == 1
        and indicator.dtype.kind in "biuf"
        and bool(np.isin(indicator, (0, 1)).all()),
        f"poison_indicator of {key} is not an array of 0 and 1",
    )
    need(
        file,
        isinstance(exposed, np.ndarray)
        and exposed.ndim == 1
        and (exposed.dtype.kind in "iu" or exposed.size == 0)
        and bool(((exposed >= 0) & (exposed < len(indicator))).all())
        and len(np.unique(exposed)) == len(exposed),
        f"original_index_array of {key} is not an array of different positions in the split",
    )
    shown, poisoned = exposed.astype(np.int64), indicator.astype(bool)
    indices = shown[poisoned[shown]]
    labels, files = np.empty((2, len(indices)), np.int64), []
    for i, index in enumerate(indices.tolist()):
        label, original, image = _read_sample(file, f"sample {index} of {key}", samples.get(index), num_classes)
        labels[:, i] = label, original
        files.append(image)
    need(file, len(set(files)) == len(files), f"two samples of {key} name the same image")
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
    need(file, type(entry) is dict, f"{what} has no entry in data_dict")
    path, labels = entry.get("path"), entry.get("other_info")
    image = "/".join(PureWindowsPath(path).parts[-2:]) if isinstance(path, str) else ""
    need(
        file,
        re.fullmatch(r"[0-9]+/[0-9]+\.png", image) is not None,
        f"path of {what} does not end in <label>/<index>.png",
    )
    need(
        file,
        isinstance(labels, (list, tuple))
        and len(labels) == 2
        and all(type(label) is int and 0 <= label < num_classes for label in labels),
        f"other_info of {what} is not two labels below {num_classes}",
    )
    return labels[0], labels[1], image


def need(file: Path, condition: bool, complaint: str) -> None:
    if not condition:
        raise UserError(
            f"{file} is not a BackdoorBench record: {complaint}; fetch it again, or re-save it with "
            "BackdoorBench v2 or main"
        )
