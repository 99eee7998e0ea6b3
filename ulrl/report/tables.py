"""The table that a run prints."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from rich.markup import escape
from rich.table import Table

ORACLE = " (oracle)"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def result_table(result: dict[str, Any]) -> Table:
    """One run's `result.json` as a small table; figures in percent."""
    title = f"{result['method']} on {result['record']}" if result["kind"] == "defense" else result["record"]
    about = [result["dataset"], result["model"]]
    if result["kind"] == "defense":
        about.append(f"{result['clean_samples']} clean samples")
    table = Table(title=title, caption=", ".join(about), title_style="bold")
    for column in ("", "ACC %", "ASR %", "RA %"):
        table.add_column(column, justify="right" if column else "left")
    for row in ("before", "after"):
        if row in result:
            name = row if result["kind"] == "defense" else "trained"
            table.add_row(name, *(_percent(result[row][k]) for k in ("acc", "asr", "ra")))
    if result["kind"] == "defense":
        table.add_section()
        if oracle := result.get("oracle"):  # chosen by looking at the test set: never the defense's own figure
            table.add_row("(oracle)", *(_percent(oracle[k]) for k in ("acc", "asr", "ra")))
        table.add_row("DER %", "", _percent(result["der"]), "")
        table.add_row("flagged", "", ", ".join(map(str, result["flagged"])) or "none", "")
    table.add_section()
    for stage, seconds in result["seconds"].items():
        table.add_row(f"{stage}, s", "", f"{seconds:.1f}", "")
    return table


def comparison_table(record: str, results: list[dict[str, Any]]) -> Table:
    """Defenses on one record: mean +- sample standard deviation over their runs, in percent; the best in bold.

    results: `result.json` of each run. n is the number of runs. The oracle rows are what the test set would
    have chosen; they compete for nothing.
    """
    frame = pd.DataFrame(
        [
            {
                "method": r["method"], "seconds": r["seconds"]["total"] - r["seconds"]["judge"],
                "der": r["der"], **{k: r["after"][k] for k in ("acc", "asr", "ra")},
            }
            for r in results
        ]
        + [
            {"method": r["method"] + ORACLE, **{k: r["oracle"][k] for k in ("acc", "asr", "ra")}}
            for r in results if r.get("oracle")
        ]
    )  # fmt: skip
    figures = ["acc", "asr", "ra", "der", "seconds"]
    frame[figures] = frame[figures].astype(float)  # a clean model's record has no ASR at all
    groups = frame.groupby("method", sort=False)
    mean, deviation = (part.to_dict("index") for part in (groups[figures].mean(), groups[figures].std()))
    own = [row for method, row in mean.items() if not str(method).endswith(ORACLE)]
    best = {k: pick(row[k] for row in own) for k, pick in (("acc", max), ("asr", min), ("ra", max), ("der", max))}
    table = Table(title=f"defenses on {record}", title_style="bold", caption="mean ± sample standard deviation")
    for column in ("", "ACC %", "ASR %", "RA %", "DER %", "s", "n"):
        table.add_column(column, justify="right" if column else "left")
    before = results[0]["before"]
    table.add_row("before", *(_percent(before[k]) for k in ("acc", "asr", "ra")), "", "", "")
    table.add_section()
    for method, size in groups.size().items():
        row, cells = mean[method], []
        for key, top in best.items():
            text = _spread(row[key], deviation[method][key])
            cells.append(f"[bold]{text}[/bold]" if row in own and row[key] == top else text)
        seconds = "-" if math.isnan(row["seconds"]) else f"{row['seconds']:.1f}"
        table.add_row(escape(str(method)), *cells, seconds, str(size))
    return table


def _spread(mean: float, deviation: float) -> str:
    if math.isnan(mean):
        return "-"
    return f"{100 * mean:.2f}" + ("" if math.isnan(deviation) else f" ± {100 * deviation:.2f}")


def perceptibility_table(attack: str, dataset: str, figures: dict[str, float | None]) -> Table:
    """How visible an attack's trigger is; L2 and L-infinity of pixels in [0, 1], PSNR in dB."""
    table = Table(title=f"{attack} on {dataset}", title_style="bold")
    for name in ("L2", "Linf", "PSNR", "SSIM"):
        table.add_column(name, justify="right")
    table.add_row(*("-" if value is None else f"{value:.3f}" for value in figures.values()))
    return table
