"""Result files into a table: what lies under `record/`, read without trusting it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ulrl.data.datasets import SPECS
from ulrl.errors import UserError
from ulrl.files import whole_file
from ulrl.registry import nearest
from ulrl.untrusted.opening import real_path

log = logging.getLogger(__name__)

KEYS = ("dataset", "model", "attack", "pratio", "defense", "ratio", "record", "seed")
FIGURES = ("acc", "asr", "ra", "der", "seconds")
NO_DEFENSE = "no defense"
ORACLE = " (oracle)"
_LARGEST = 8 << 20  # bytes of a file that is read


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and its checked `result.json`. For a defense, `record` is the folder of its record."""

    folder: Path
    result: dict[str, Any]

    @property
    def record(self) -> Path:
        return self.folder.parent.parent if self.result["kind"] == "defense" else self.folder


def find_runs(root: Path) -> tuple[list[Run], list[str]]:
    """The runs below `root` (a folder of records, a record, or a run's own folder), and what was left out, and why.

    A damaged file is warned of and left out, as is one that leads out of `root`.

    Raises:
        UserError: `root` is not a folder.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; name one that holds records, or a record")
    runs, left_out = [], []
    for pattern in ("", "defense/*/", "*/", "*/defense/*/"):
        for file in sorted(root.glob(f"{pattern}result.json")):
            if any(part.startswith(".") for part in file.relative_to(root).parts):
                continue  # a run that has not ended, or the one that it is replacing
            try:
                real_path(file, root.resolve())
                runs.append(Run(file.parent, _checked(file)))
            except (OSError, ValueError, TypeError, KeyError, RecursionError, UserError) as error:
                left_out.append(f"{printable(str(file))}: {_why(error)}")
                log.warning("left out: %s", left_out[-1])
    return runs, left_out


def frame_of(results: Iterable[Mapping[str, Any]], pratios: Iterable[float | None] | None = None) -> pd.DataFrame:
    """One row per run, and one more per oracle choice: KEYS, FIGURES, and

    kind (attack or defense); oracle (bool); clean_samples; flagged (classes, with spaces between); and options,
    as JSON. ACC, ASR, RA and DER are fractions. What is unknown is NaN or None. seconds are without the judge's.

    results: checked `result.json`s. pratios: for each the share of poison in its record, where that is known.
    """
    rows = []
    results = list(results)
    for r, pratio in zip(results, pratios or [None] * len(results), strict=True):
        options, defended = r["options"], r["kind"] == "defense"
        row = {
            "kind": r["kind"], "dataset": r["dataset"], "model": r["model"], "attack": r["attack"], "pratio": pratio,
            "defense": r["method"] if defended else NO_DEFENSE,
            "ratio": options.get("ratio") if defended and options.get("index") is None else None,
            "record": r["record"], "seed": r["seed"], "oracle": False,
            **{k: r["after"][k] for k in ("acc", "asr", "ra")},
            "der": r["der"], "seconds": r["seconds"]["total"] - r["seconds"]["judge"],
            "clean_samples": r["clean_samples"], "flagged": " ".join(map(str, r["flagged"])),
            "options": json.dumps(options),
        }  # fmt: skip
        rows.append(row)
        if oracle := r.get("oracle"):  # chosen by looking at the test set: never the defense's own figure
            figures = {k: oracle[k] for k in ("acc", "asr", "ra")}
            rows.append(row | figures | {"oracle": True, "defense": row["defense"] + ORACLE, "der": None,
                                         "seconds": None})  # fmt: skip
    columns = ["kind", *KEYS, "oracle", *FIGURES, "clean_samples", "flagged", "options"]
    frame = pd.DataFrame(rows, columns=columns)
    numbers = {k: "float64" for k in (*FIGURES, "pratio", "ratio", "clean_samples")}
    return frame.astype({**numbers, "seed": "int64", "oracle": "bool"})


def frame_of_runs(runs: list[Run]) -> pd.DataFrame:
    """As `frame_of`; the index is the run's folder, and the ratio of poison is that of the run's record."""
    pratios = {run.folder: run.result["options"].get("pratio") for run in runs if run.result["kind"] == "attack"}
    frame = frame_of([run.result for run in runs], [_fraction(pratios.get(run.record)) for run in runs])
    folders = [str(run.folder) for run in runs for _ in range(1 + bool(run.result.get("oracle")))]
    return frame.set_axis(pd.Index(folders, name="folder", dtype="object"))


def select(frame: pd.DataFrame, where: str | None) -> pd.DataFrame:
    """The rows for which every `key=value` of `where` (with commas between) holds.

    Raises:
        UserError: not of that form, or an unknown key.
    """
    for condition in where.split(",") if where else ():
        key, equals, value = (part.strip() for part in condition.partition("="))
        if not equals:
            raise UserError(f"--where {condition!r} is not key=value")
        column = frame[_key(key, "--where")]
        if pd.api.types.is_numeric_dtype(column):
            try:
                frame = frame[column == float(value)]
            except ValueError:
                raise UserError(f"--where {key}={value}: {value!r} is not a number") from None
        else:
            frame = frame[column == value]
    return frame


def summarise(frame: pd.DataFrame, by: str) -> pd.DataFrame:
    """Mean and sample standard deviation of each figure over the runs that agree in the keys `by`.

    by: some of KEYS, with commas between. Without `defense` among them, only defended runs count: what was
    not defended, and what the test set chose, is never averaged with them. Columns: the keys, oracle (bool), n
    (runs), and for each of FIGURES <figure>_mean, _std (NaN for one run) and _n (the runs in which it is known).

    Raises:
        UserError: an unknown key.
    """
    keys = [_key(key.strip(), "--by") for key in by.split(",")]
    if "defense" not in keys:
        frame = frame[(frame.kind == "defense") & ~frame.oracle]
    groups = frame.groupby([*dict.fromkeys([*keys, "oracle"])], sort=False, dropna=False)
    figures = groups[list(FIGURES)].agg(["mean", "std", "count"])
    figures.columns = pd.Index([f"{figure}_{part}" for figure in FIGURES for part in ("mean", "std", "n")])
    summary = pd.concat([groups.size().rename("n"), figures], axis=1).reset_index()
    return summary[[*keys, "oracle", "n", *figures.columns]]


def in_order(summary: pd.DataFrame) -> pd.DataFrame:
    """Sorted by its keys, what was not defended first."""
    keys = [k for k in summary if k in KEYS]
    return summary.sort_values(
        keys, key=lambda column: column.where(column != NO_DEFENSE, "") if column.name == "defense" else column
    )


def best_of(summary: pd.DataFrame) -> pd.DataFrame:
    """Which figures are the best among the defenses that share all other keys: bool, columns acc, asr, ra, der.

    Where only one competes there is no best. An oracle's choice and an undefended model compete for nothing.
    """
    best = pd.DataFrame(False, index=summary.index, columns=["acc", "asr", "ra", "der"])
    if "defense" not in summary:
        return best
    others = [k for k in KEYS if k in summary and k != "defense"]
    own = summary[~summary.oracle & (summary.defense != NO_DEFENSE)]
    blocks = own.groupby(others, dropna=False) if others else [((), own)]
    for _, block in blocks:
        for figure, pick in (("acc", "max"), ("asr", "min"), ("ra", "max"), ("der", "max")):
            means = block[f"{figure}_mean"]
            if means.count() > 1:
                best.loc[means.index, figure] = means == means.agg(pick)
    return best


def read_table(run: Run, name: str, types: dict[str, str]) -> pd.DataFrame | None:
    """A CSV file of the run's folder with columns of these types, or None, and a warning, where it is not so."""
    file = run.folder / name
    try:
        return pd.read_csv(file).astype(types) if may_show(file, run.folder) else None
    except Exception as error:  # whatever pandas makes of a stranger's bytes
        log.warning("%s is not shown: %s", printable(str(file)), _why(error))
        return None


def neurons_of(run: Run) -> pd.DataFrame | None:
    """The ranking of classes that unlearning gave: index class; columns change, z, flagged."""
    types = {"class": "int64", "change": "float64", "z": "float64", "flagged": "bool"}
    table = read_table(run, "neurons.csv", types)
    if table is None or not table["class"].is_unique or not np.isfinite(table[["change", "z"]]).all(axis=None):
        return None
    return table.set_index("class")


def class_names(run: Run) -> tuple[str, ...]:
    """The names of the classes of the run's data set, where it is one that is known here."""
    spec = SPECS.get(run.result["dataset"])
    return spec.class_names if spec else ()


def load_ranking(folder: Path) -> tuple[pd.DataFrame, float, tuple[str, ...]]:
    """Neuron ranking, its threshold, and the classes' names of the run in `folder`.

    Raises:
        UserError: no run there, or one without a ranking.
    """
    run = next((run for run in find_runs(folder)[0] if run.folder == folder), None)
    table = neurons_of(run) if run else None
    threshold = run.result["evidence"].get("z_threshold") if run else None
    if run is None or table is None or threshold is None or not _is_number(threshold):
        raise UserError(
            f"{folder} is not the folder of a defense that ranks neurons; name one, such as record/NAME/defense/ulrl"
        )
    return table, threshold, class_names(run)


def may_show(file: Path, folder: Path) -> bool:
    """Whether it is there, small enough, and in `folder` itself, also after following links."""
    if file.parent != folder or not file.is_file():  # a method's name may hold slashes
        return False
    real_path(file, folder.resolve())
    return file.stat().st_size <= _LARGEST


def printable(text: str) -> str:
    """A stranger's text for a terminal: what is not printable, such as an escape code, is spelled out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _key(name: str, flag: str) -> str:
    if name not in KEYS:
        raise UserError(f"{flag}: unknown key {name!r}{nearest(name, list(KEYS))}")
    return name


def _why(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"lacks {error}"
    return printable(" ".join(str(error).split())) or type(error).__name__


def _checked(file: Path) -> dict[str, Any]:
    """A `result.json` whose every value that is read elsewhere has the right type.

    Raises:
        OSError, ValueError, TypeError, KeyError, RecursionError: it is not one.
    """
    if file.stat().st_size > _LARGEST:
        raise ValueError(f"is larger than {_LARGEST} bytes")
    r = json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_number, parse_float=_finite)
    json.dumps(r, ensure_ascii=False).encode()  # half a surrogate pair cannot be printed
    _need(isinstance(r, dict) and r.get("kind") in ("attack", "defense"), "is of no known kind")
    for key in ("method", "record", "dataset", "model"):
        _need(isinstance(r[key], str), f"{key} is not a text")
    _need(r["attack"] is None or isinstance(r["attack"], str), "attack is not a text")
    for key in ("options", "evidence", "environment", "seconds"):
        _need(isinstance(r[key], dict), f"{key} is not a mapping")
    for key in ("ratio", "pratio"):
        _fraction(r["options"].get(key))
    _need(_is_count(r["seed"]), "seed is not a whole number")
    _need(r["clean_samples"] is None or _is_count(r["clean_samples"]), "clean_samples is not a whole number")
    _need(isinstance(r["flagged"], list) and all(map(_is_count, r["flagged"])), "flagged is not a list of classes")
    _need({"total", "judge"} <= set(r["seconds"]), "seconds lack total or judge")
    _need(all(_is_number(v) for v in r["seconds"].values()), "seconds are not numbers")
    _fraction(r["der"])
    for key in ("before", "after", "oracle"):
        if key == "after" or r.get(key) is not None or (key, r["kind"]) == ("before", "defense"):
            for figure in ("acc", "asr", "ra"):
                _fraction(r[key][figure])
    result: dict[str, Any] = r
    return result


def _need(condition: bool, complaint: str) -> None:
    if not condition:
        raise ValueError(complaint)


def _fraction(value: Any) -> float | None:
    _need(value is None or (_is_number(value) and 0 <= value <= 1), f"{value!r} is not a fraction")
    return None if value is None else float(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is no number")


def _finite(text: str) -> float:
    value = float(text)
    _need(math.isfinite(value), f"{text} is no number")
    return value


def export_frame(frame: pd.DataFrame, path: Path) -> None:
    """Write what `frame_of_runs` made, a row per run, as Parquet or CSV by the name's ending.

    Raises:
        UserError: another ending.
    """
    if path.suffix not in (".parquet", ".csv"):
        raise UserError(f"--export {path}: the name must end in .parquet or .csv")
    with whole_file(path) as partial:
        if path.suffix == ".csv":
            frame.to_csv(partial)
        else:
            frame.to_parquet(partial)
