"""Repair of a record from Python, as `python defense/NAME.py` does it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ulrl.configure import configure_defense, defense_schema
from ulrl.machine import plain_defaults
from ulrl.models import load_model
from ulrl.own_model import Purified
from ulrl.record import load_defense_result, load_record
from ulrl.report.pictures import draw
from ulrl.report.results import check_result
from ulrl.report.tables import result_table
from ulrl.runs.defending import run_once
from ulrl.untrusted.texts import read_csv


@dataclass(frozen=True, repr=False)
class PurifiedRecord(Purified):
    """As `ulrl.Purified`, and `folder`, where it was written. report: the run's `result.json`, with ACC, ASR and RA.

    found: it lay in the record already and was not run now, so all of it is the word of whoever made that.
    """

    folder: Path
    found: bool

    def summary(self) -> str:
        """The table that the command line prints."""
        text = io.StringIO()
        Console(file=text, width=100).print(result_table(self.report))
        lines = [line.rstrip() for line in text.getvalue().splitlines()]
        return "\n".join(
            [*lines, "found in the record, and not run now; overwrite=True runs it"] if self.found else lines
        )

    __repr__ = summary


@plain_defaults()
def purify_record(
    record: str | Path, *, method: str = "harden", progress: bool = True, **options: Any
) -> PurifiedRecord:
    """Repair a record's model, judge it, and write the results into the record; what is there already is read.

    record: its name under record/, or the path of its folder. options: by the names of the flags of
    `python defense/NAME.py`, over those of the options files; `overwrite=True` replaces results with other options.

    Raises:
        UserError: no such record, method or option; data that is not there; results with other options.
    """
    opened = load_record(record)
    given = defense_schema(method).check(options, f"the options of {method}")
    defense, run = configure_defense(method, given, opened.dataset, opened.model_name, quiet=True)
    folder, now = run_once(defense, opened, run, bar=progress, draw=draw)
    result = check_result(folder / "result.json")
    weights = load_defense_result(folder, opened)
    model = load_model(opened.model_name, opened.num_classes, weights, opened.img_size[2])
    inside = opened.folder.resolve()
    history = read_csv(curves := folder / f"{method}_df.csv", inside)
    tables = {file.stem: read_csv(file, inside) for file in folder.glob("*.csv") if file != curves}
    tables = {name: table.set_index(table.columns[0]) for name, table in tables.items()}
    return PurifiedRecord(
        model, result["flagged"], tables.pop("neurons", None), result, history, tables, folder, not now
    )
