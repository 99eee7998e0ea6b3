"""Result files: what lies under `record/`, read without trusting it."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ulrl.data.datasets import SPECS
from ulrl.errors import UserError, one_line
from ulrl.untrusted.opening import TEXT, real_path
from ulrl.untrusted.texts import read_csv, read_json

log = logging.getLogger(__name__)
LARGEST = 1e15  # of a number: sums of such are numbers still


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and its checked `result.json`. For a defense, `record` is the folder of its record,
    where it lies in one: what says to be a defense's may lie anywhere.
    """

    folder: Path
    result: dict[str, Any]

    @property
    def record(self) -> Path:
        return self.folder.parent.parent if self._in_record else self.folder

    @property
    def record_name(self) -> str:
        """That of the record's folder, which may have been renamed since; of a defense that lies in none, the old."""
        if self.result["kind"] == "defense" and not self._in_record:
            return str(self.result["record"])
        return os.path.basename(os.path.abspath(self.record))

    @property
    def _in_record(self) -> bool:
        return self.result["kind"] == "defense" and self.folder.parent.name == "defense"


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
            except (OSError, ValueError, TypeError, KeyError, UserError) as error:
                why = str(error) if isinstance(error, UserError) else f"{file}: {_why(error)}"
                left_out.append(one_line(why))
                log.warning("left out: %s", left_out[-1])
    return runs, left_out


def read_table(run: Run, name: str, types: dict[str, str]) -> pd.DataFrame | None:
    """A CSV file of the run's folder with columns of these types, or None, and a warning, where it is not so."""
    file = run.folder / name
    try:
        return read_csv(file).astype(types) if may_show(file, run.folder) else None
    except Exception as error:  # whatever pandas makes of a stranger's bytes
        log.warning("%s is not shown: %s", brief(str(file)), _why(error))
        return None


# What classes are ranked by: the z of unlearning, and what Harden names them by besides.
RANKED_BY = {"z": "robust z of the weight change", "evidence": "evidence", "excess": "excess"}


def neurons_of(run: Run) -> pd.DataFrame | None:
    """The ranking of classes: index class; columns change, flagged, z, and what there is of RANKED_BY besides."""
    types = {"class": "int64", "change": "float64", "z": "float64", "flagged": "bool"}
    table = read_table(run, "neurons.csv", types)
    own = [name for name in RANKED_BY if table is not None and name in table]
    if own:
        table = read_table(run, "neurons.csv", {**types, **dict.fromkeys(own, "float64")})
    if table is None or table.empty or not table["class"].is_unique:
        return None
    if not (table[["change", *own]].abs() < LARGEST).all(axis=None):
        return None
    return table.set_index("class")


def class_names(run: Run) -> tuple[str, ...]:
    """The names of the classes of the run's data set, where it is one that is known here."""
    spec = SPECS.get(run.result["dataset"])
    return spec.class_names if spec else ()


def thresholds(result: dict[str, Any]) -> dict[str, float]:
    """Of each sign that flags classes in this run: above what it does."""
    found = {sign: result["evidence"].get(f"{sign}_threshold") for sign in RANKED_BY}
    return {sign: bound for sign, bound in found.items() if _is_number(bound)}


def load_ranking(folder: Path) -> tuple[pd.DataFrame, dict[str, float], tuple[str, ...], int | None]:
    """Neuron ranking, its thresholds, the classes' names, and the true target of the run in `folder`.

    Raises:
        UserError: no run there, or one without a ranking.
    """
    run = next((run for run in find_runs(folder)[0] if run.folder == folder), None)
    table = neurons_of(run) if run else None
    bounds = thresholds(run.result) if run else {}
    if run is None or table is None or not bounds:
        raise UserError(
            f"{folder} is not the folder of a defense that ranks neurons; name one, such as record/NAME/defense/ulrl"
        )
    return table, bounds, class_names(run), run.result.get("target")


def may_show(file: Path, folder: Path) -> bool:
    """Whether it is there, small enough, and in `folder` itself, also after following links."""
    if file.parent != folder or not file.is_file():  # a method's name may hold slashes
        return False
    real_path(file, folder.resolve())
    return file.stat().st_size <= TEXT


def brief(text: str) -> str:
    """A stranger's text for a table, a page or a line of a log: harmless, on one line, of at most 200 letters."""
    return one_line(text, 200)


def _why(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"lacks {error}"
    return brief(" ".join(str(error).split())) or type(error).__name__


def check_result(file: Path) -> dict[str, Any]:
    """The content of a `result.json`.

    Raises:
        UserError: it is not one.
    """
    try:
        return _checked(file)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({_why(error)}); remove its folder, and it is run again") from None


def _checked(file: Path) -> dict[str, Any]:
    """A `result.json` whose every value that is read elsewhere has the right type.

    Raises:
        UserError, ValueError, TypeError, KeyError: it is not one.
    """
    r = read_json(file)
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
    _need(isinstance(r.get("repairs", True), bool), "repairs is neither true nor false")
    _need(r.get("target") is None or _is_count(r["target"]), "target is not a class")
    _need(
        r.get("took") in (True, False, None) and not _is_number(r.get("took")), "took is neither true, false nor null"
    )
    if found := r.get("trigger"):
        figures = [found[figure] for figure in ("class", "cosine", "iou")]
        _need(all(value is None or _is_number(value) for value in figures), "trigger has what is no number")
        _fraction(found["turned"])
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
    return type(value) in (int, float) and abs(value) < LARGEST


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
