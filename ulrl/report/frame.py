"""Finished runs as one table, a row each, which knows what was run twice and on which record."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ulrl.errors import UserError, csv_cell, printable
from ulrl.files import whole_file
from ulrl.metrics import took
from ulrl.registry import nearest
from ulrl.report.results import Run

KEYS = ("dataset", "model", "attack", "pratio", "defense", "ratio", "record", "seed")
FIGURES = ("acc", "asr", "ra", "der", "seconds")
NO_DEFENSE = "no defense"
ORACLE = " (oracle)"
# Options that say where things lie, what is watched, or what stands in a column of its own.
_NO_SETTING = frozenset(
    "random_seed dataset model dataset_path device eval_every report_oracle yaml_path bd_yaml_path result_file "
    "save_folder_name overwrite".split()
)


def frame_of(
    results: Iterable[Mapping[str, Any]], makers: Iterable[Mapping[str, Any] | None] | None = None
) -> pd.DataFrame:
    """One row per run, and one more per oracle choice: KEYS, FIGURES, and

    kind (attack or defense); oracle (bool); clean_samples; flagged (classes, with spaces between); options, as
    JSON; settings and record_settings: the options of the defense and of what made its record, without seeds and
    folders, as JSON ("" of an attack, and where nothing is known); origin, the same text for the same record; took
    (whether the record's backdoor did, or NA); repairs (bool: or only finds something); repeat (bool): an earlier row
    has the same record, settings and seed. ACC, ASR, RA and DER are fractions. What is unknown is NaN or None. seconds
    are without the judge's.

    results: checked `result.json`s. makers: for each that of the attack that made its record, where that is known.
    """
    rows = []
    results = list(results)
    for r, maker in zip(results, makers or [None] * len(results), strict=True):
        options, defended = r["options"], r["kind"] == "defense"
        maker = maker if defended else r
        made = _settings(maker["options"], record=True) if maker else ""
        of = [r["dataset"], r["model"], r["attack"]]
        row = {
            "kind": r["kind"], "dataset": r["dataset"], "model": r["model"], "attack": r["attack"],
            "pratio": _pratio(maker) if maker else None,
            "defense": r["method"] if defended else NO_DEFENSE,
            "ratio": options.get("ratio") if defended and options.get("index") is None else None,
            "record": r["record"], "seed": r["seed"], "oracle": False,
            **{k: r["after"][k] for k in ("acc", "asr", "ra")},
            "der": r["der"], "seconds": r["seconds"]["total"] - r["seconds"]["judge"],
            "clean_samples": r["clean_samples"], "flagged": " ".join(map(str, r["flagged"])),
            "options": json.dumps(options), "settings": _settings(options) if defended else "",
            "record_settings": made,
            "origin": json.dumps([*of, made, maker["seed"]] if maker else [*of, r["record"]]),
            "took": _took(r, maker), "repairs": r.get("repairs", True),
        }  # fmt: skip
        rows.append(row)
        if oracle := r.get("oracle"):  # chosen by looking at the test set: never the defense's own figure
            figures = {k: oracle[k] for k in ("acc", "asr", "ra")}
            rows.append(row | figures | {"oracle": True, "defense": row["defense"] + ORACLE, "der": None,
                                         "seconds": None})  # fmt: skip
    columns = ["kind", *KEYS, "oracle", *FIGURES, "clean_samples", "flagged", "options", "settings",
               "record_settings", "origin", "took", "repairs"]  # fmt: skip
    frame = pd.DataFrame(rows, columns=columns)
    numbers = {k: "float64" for k in (*FIGURES, "pratio", "ratio", "clean_samples")}
    frame = frame.astype({**numbers, "seed": "int64", "oracle": "bool", "took": "boolean", "repairs": "bool"})
    return _with_repeats(frame)


def _pratio(maker: Mapping[str, Any]) -> float | None:
    """The option; of a run that was given `p_num` instead, the share that this is; None where nothing was poisoned."""
    options, (poisoned, of) = maker["options"], (maker["evidence"].get(key) for key in ("poisoned", "train_samples"))
    if poisoned == 0:
        return None
    if options.get("p_num") is None:
        return options.get("pratio")
    return poisoned / of if type(poisoned) is type(of) is int and 0 < poisoned <= of else None


def _took(result: Mapping[str, Any], maker: Mapping[str, Any] | None) -> bool | None:
    """As what made the record says; else, as of BackdoorBench's, what it was measured to be before the defense."""
    if maker and maker.get("took") is not None:
        return bool(maker["took"])
    return measured_to_take(result)


def measured_to_take(result: Mapping[str, Any]) -> bool | None:
    """Whether the backdoor of a run's record works, by the run's own figures; as `took`."""
    return took(result["before" if result["kind"] == "defense" else "after"]["asr"])


def _with_repeats(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(repeat=frame.duplicated(["defense", "settings", "origin", "seed"]))


def frame_of_runs(runs: list[Run]) -> pd.DataFrame:
    """As `frame_of`; the index is the run's folder, a record is called as its folder is, and what made it is looked up
    among the runs."""
    made = {run.folder: run.result for run in runs if run.result["kind"] == "attack"}
    frame = frame_of([run.result for run in runs], [made.get(run.record) for run in runs])
    of_row = [run for run in runs for _ in range(1 + bool(run.result.get("oracle")))]
    names = pd.Series([printable(run.record_name) for run in of_row], frame.index, dtype="object")  # may be no UTF-8
    folders = [str(run.folder) for run in of_row]
    return frame.assign(record=names).set_axis(pd.Index(folders, name="folder", dtype="object"))


def select(frame: pd.DataFrame, where: str | None) -> pd.DataFrame:
    """The rows for which every `key=value` of `where` (with commas between) holds.

    Raises:
        UserError: not of that form, or an unknown key.
    """
    for condition in where.split(",") if where else ():
        key, equals, value = (part.strip() for part in condition.partition("="))
        if not equals:
            raise UserError(f"--where {condition!r} is not key=value")
        column = frame[known_key(key, "--where")]
        if pd.api.types.is_numeric_dtype(column):
            try:
                frame = frame[column == float(value)]
            except ValueError:
                raise UserError(f"--where {key}={value}: {value!r} is not a number") from None
        else:
            frame = frame[column == value]
    return _with_repeats(frame)  # what it repeats may have gone


def known_key(name: str, flag: str) -> str:
    if name not in KEYS:
        raise UserError(f"{flag}: unknown key {name!r}{nearest(name, list(KEYS))}")
    return name


def export_frame(frame: pd.DataFrame, path: Path) -> None:
    """Write what `frame_of_runs` made, a row per run, as Parquet or CSV by the name's ending.

    Raises:
        UserError: another ending.
    """
    if path.suffix not in (".parquet", ".csv"):
        raise UserError(f"--export {path}: the name must end in .parquet or .csv")
    with whole_file(path) as partial:
        if path.suffix == ".csv":
            harmless_cells(frame).to_csv(partial)
        else:
            frame.rename(index=printable).to_parquet(partial)  # a folder's name may be no UTF-8


def _settings(options: Mapping[str, Any], record: bool = False) -> str:
    """What was run, whatever its seed: the same text for the same options; what is None may as well be absent.

    record: the options made one. Of the data set `folder`, the path is then what the data are.
    """
    dropped = _NO_SETTING - {"dataset_path"} if record and options.get("dataset") == "folder" else _NO_SETTING
    if options.get("index") is not None:
        dropped |= {"ratio"}  # it has no effect then
    kept = {name: value for name, value in options.items() if name not in dropped and value is not None}
    return json.dumps(kept, sort_keys=True)


def harmless_cells(table: pd.DataFrame) -> pd.DataFrame:
    """The table for a CSV file: a text that a spreadsheet would take for a formula is marked as text."""
    texts = table.map(lambda cell: csv_cell(cell) if isinstance(cell, str) else cell)
    return texts.rename(index=lambda name: csv_cell(name) if isinstance(name, str) else name)
