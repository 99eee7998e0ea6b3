"""What a run on a record is given: its clean samples, and a folder for its results."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ulrl.configure import RecordRun, options_of
from ulrl.data.datasets import clean_subset, dataset_spec
from ulrl.data.imageset import DatasetSpec
from ulrl.errors import UserError
from ulrl.files import check_folder_name, find_input
from ulrl.record import Record
from ulrl.untrusted.opening import read_text


def check_named(record: Record, run: RecordRun) -> None:
    """Raises UserError where the run names a data set or an architecture that is not the record's."""
    for flag, named, recorded in (
        ("dataset", run.dataset, record.dataset),
        ("model", run.model, record.model_name),
    ):
        if named is not None and named != recorded:
            raise UserError(
                f"--{flag} {named} (or that key in YAML) contradicts the record {record.name}, "
                f"which says {recorded}; leave it out"
            )


def record_spec(record: Record, dataset_path: str) -> DatasetSpec:
    """The facts of the record's data set, as it lies where the user says.

    Raises:
        UserError: it is of a folder of the user's own that was not named, or is none.
    """
    unnamed = record.dataset == "folder" and dataset_path == RecordRun.dataset_path
    try:
        spec = dataset_spec(record.dataset, dataset_path, record.img_size[:2])
    except UserError:
        if not unnamed:
            raise
    else:
        if not unnamed or spec.num_classes == record.num_classes:
            return spec
    raise UserError(f"the record {record.name} is of your own folder of images; name it with --dataset_path")


def results_folder(record: Record, kind: str, name: str) -> Path:
    """Where the results of that name go: below `kind`, a folder of the record; asked before the work.

    Raises:
        UserError: the name is not plain, one of the folders is a link, or they cannot be written to.
    """
    check_folder_name(name, "--save_folder_name")
    final = record.folder / kind / name
    for place in (final.parent, final):
        if place.is_symlink():  # a downloaded record could lead the writing anywhere
            raise UserError(f"{place} is a link, and results are written into the record only; remove it")
    within = final.parent if final.parent.exists() else record.folder
    if not os.access(within, os.W_OK):
        raise UserError(
            f"{within} cannot be written to, and results go into the record; copy the record, and name the copy"
        )
    return final


def result_options(method: Any, run: RecordRun) -> dict[str, Any]:
    """The options that say how a result came about; whether it replaced another does not."""
    return {k: v for k, v in options_of(method, run).items() if k != "overwrite"}


def clean_index(run: RecordRun, size: int) -> torch.Tensor:
    """The clean samples to use: those listed in `--index`, or a draw of `ratio`. int64 [n], n at least 2.

    Raises:
        UserError: a list that cannot be used, or a single sample.
    """
    index = clean_subset(size, run.ratio, run.random_seed) if run.index is None else _listed(run.index, size)
    if len(index) == 1:
        raise UserError("one clean sample is too few to train on; raise --ratio, or list more in --index")
    return index


def _listed(name: str, size: int) -> torch.Tensor:
    file = find_input(name)
    try:
        index = [int(word) for word in read_text(file).split()]
    except (UserError, ValueError) as error:
        raise UserError(f"--index {file}: not a readable list of whole numbers ({error})") from None
    if not index or min(index) < 0 or max(index) >= size or len(set(index)) < len(index):
        raise UserError(f"--index {file}: give different indices, each from 0 to {size - 1}, at least one")
    return torch.tensor(index, dtype=torch.int64)
