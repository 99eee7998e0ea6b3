"""What is in a stranger's file, and a record without a pickle: `ulrl inspect` and `ulrl convert`."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ulrl.errors import UserError, one_line
from ulrl.files import check_folder_name, save_torch, whole_folder
from ulrl.options import option
from ulrl.record import INFO_FILE, KEYS, Record, load_record
from ulrl.record_folder import PICKLE, PLAIN, result_file
from ulrl.record_formats import SPLITS, load_raw, save_pickle, save_plain
from ulrl.untrusted.images import png_bytes
from ulrl.untrusted.opening import TEXT, opened, real_path
from ulrl.untrusted.torchfiles import MOST, Other, load_torch, look_into
from ulrl.untrusted.weights import load_safetensors

log = logging.getLogger(__name__)

KEPT = ("result.json", "attack_df.csv", "attack_df_summary.csv", "trigger_preview.png", "neuron_ranking.png")
LISTED = 40  # tensors


@dataclass(frozen=True)
class ConvertOptions:
    """Which spelling, and where it goes."""

    to: str = option(
        "safetensors", "safetensors: no pickle in it; pickle: BackdoorBench's own", choices=("safetensors", "pickle")
    )
    out: str | None = option(None, "name of the new record, beside the old one; else <old>_safetensors or _pickle")
    overwrite: bool = option(False, "replace the new record where it is there already")


def convert(record: Record, options: ConvertOptions) -> Path:
    """Write a record in the other spelling, with its images and results, without what defenses made; its folder.

    Raises:
        UserError: it is of that spelling, an image is missing or leads out, or the new record is there already.
    """
    old = result_file(record.folder)
    if (old.name == PLAIN) == (options.to == "safetensors"):
        raise UserError(f"{record.folder} is of that spelling already; name another --to")
    inside = record.folder.resolve()
    name = options.out or f"{record.name}_{options.to}"
    check_folder_name(name, "--out")
    new = record.folder.parent / name
    with whole_folder(new, overwrite=options.overwrite) as partial:
        raw = {**load_raw(old, inside), "attack": record.attack, "clean_test": record.clean_test}
        for split in SPLITS:
            if (state := getattr(record, split)) is not None:  # the samples that were looked at, no others
                container = raw[split]["bd_data_container"]
                container["data_dict"] = {i: container["data_dict"][i] for i in state.indices.tolist()}
        if options.to == "safetensors":
            save_plain(raw, partial / PLAIN)
        else:
            save_pickle(raw, (*KEYS, "clean_test"), partial / PICKLE)
            save_torch({"attack": record.attack}, partial / INFO_FILE)
        for state in (record.bd_train, record.bd_test):
            if state is None:
                continue
            if not (record.folder / state.folder).is_dir():
                log.warning("%s has no folder %s; nor has the new record its images", record.name, state.folder)
                continue
            for file in state.files:
                most = png_bytes(*record.img_size[:2])
                _copy(record.folder / state.folder / file, partial / state.folder / file, most, inside)
        for kept in KEPT:
            if os.path.lexists(record.folder / kept):
                _copy(record.folder / kept, partial / kept, TEXT, inside)
        load_record(partial)  # it can be opened before it takes its name
    return new


def _copy(source: Path, target: Path, most: int, inside: Path) -> None:
    with opened(source, most, inside) as content:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            copy = target.open("xb")
        except (FileExistsError, NotADirectoryError):  # both splits name it, or it is named as a file of the record
            raise UserError(f"{source} is named as another file of the new record; unpack the old one again") from None
        with copy:
            shutil.copyfileobj(content, copy)


def inspect_file(file: Path) -> tuple[list[str], bool]:
    """Lines that say what a record, checkpoint or weights file holds, and whether it can be opened safely.

    Nothing in it is run: names that a pickle asks for are found by reading its opcodes.

    Raises:
        UserError: it is not there, or no file; of a record, it leads out of that.
    """
    if file.is_dir():
        inside, file = file.resolve(), result_file(file)
        real_path(file, inside)
    lines, asked = [one_line(str(file))], []
    with opened(file, MOST) as content:
        lines.append(f"{os.fstat(content.fileno()).st_size} bytes")
    try:
        if file.suffix == ".safetensors":
            _, held = load_safetensors(file, MOST)
            lines.append("safetensors: no pickle in it")
        else:
            about = look_into(file)
            asked = about["names"]
            lines.append(f"{about['kind']}, {about['members']} " + ("members" if about["kind"] == "zip" else "pickles"))
            lines += [one_line(f"asks for {name}") for name in asked[:LISTED]]
            held = load_torch(file)
    except Exception as error:
        return [*lines, one_line(f"verdict: not safe to open, or damaged: {error}")], False
    tensors = list(_tensors("", held))
    total = sum(tensor.nbytes for _, tensor in tensors)
    lines.append(f"{len(tensors)} tensors, {total / 1e6:.1f} MB")
    lines += ["  " + one_line(f"{name}: {str(t.dtype)[6:]} {list(t.shape)}") for name, t in tensors[:LISTED]]
    if len(tensors) > LISTED:
        lines.append(f"  and {len(tensors) - LISTED} more")
    lines += ["  " + one_line(f"{name}: {other.what}, which is not read") for name, other in _others("", held)][:LISTED]
    if isinstance(held, dict) and set(KEYS) <= set(held):
        lines.append(one_line(f"a record of {held['model_name']} on {held['clean_data']}"))
    return [*lines, "verdict: plain data; opening it runs nothing"], True


def _tensors(name: str, value: Any) -> Any:
    return _leaves(name, value, torch.Tensor)


def _others(name: str, value: Any) -> Any:
    return _leaves(name, value, Other)


def _leaves(name: str, value: Any, kind: type) -> Any:
    """(where, value) of each value of that kind."""
    if isinstance(value, kind):
        yield name or "the whole", value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}" if name else str(key), inner, kind)
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _leaves(f"{name}[{i}]", inner, kind)
