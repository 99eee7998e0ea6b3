"""The tables that runs and their summaries print."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from ulrl.report.results import FIGURES, KEYS, NO_DEFENSE, best_of, frame_of, printable, summarise


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def result_table(result: dict[str, Any]) -> RenderableType:
    """One run's `result.json` as a small table, figures in percent, and a few lines below it."""
    defended = result["kind"] == "defense"
    title = f"{result['method']} on {result['record']}" if defended else result["record"]
    table = Table(title=escape(printable(title)), title_style="bold")
    for column in ("", "ACC %", "ASR %", "RA %"):
        table.add_column(column, justify="right" if column else "left")
    for row in ("before", "after"):
        if row in result:
            name = row if defended else "trained"
            table.add_row(name, *(_percent(result[row][k]) for k in ("acc", "asr", "ra")))
    if oracle := result.get("oracle"):  # chosen by looking at the test set: never the defense's own figure
        table.add_section()
        table.add_row("(oracle)", *(_percent(oracle[k]) for k in ("acc", "asr", "ra")))
    about = [result["dataset"], result["model"]]
    lines = Table.grid(padding=(0, 2))
    if defended:
        if result["clean_samples"]:
            about.append(f"{result['clean_samples']} clean samples")
        lines.add_row("DER %", _percent(result["der"]))
        lines.add_row("flagged", escape(printable(flagged_text(result["flagged"], result.get("target")))))
    lines.add_row("on", escape(printable(", ".join(about))))
    lines.add_row("seconds", ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in result["seconds"].items()))
    return Group(table, lines)


def flagged_text(flagged: Sequence[int], target: int | None) -> str:
    """The flagged classes, and whether the attacker's target, where it is known to be one, is among them."""
    named = ", ".join(map(str, flagged)) or "none"
    if target is None:
        return named
    if target not in flagged:
        return f"{named}; the target was {target}"
    return f"{named} (the target)" if len(flagged) == 1 else f"{named} (target {target} among them)"


def comparison_table(record: str, results: list[dict[str, Any]]) -> Table:
    """Defenses on one record: mean and sample standard deviation over their runs, the best in bold.

    results: `result.json` of each run; what they were run on comes first, from the first of them.
    """
    runs = frame_of(results)
    before = runs.iloc[:1].assign(
        kind="attack", defense=NO_DEFENSE, der=math.nan, seconds=math.nan, **results[0]["before"]
    )
    summary = summarise(pd.concat([before, runs])[list(runs.columns)], "defense")
    return summary_table(summary, f"defenses on {record}")


def summary_table(summary: pd.DataFrame, title: str) -> Table:
    """What `summarise` made, for the terminal; a key with one value for all lines stands below, not in a column."""
    shared = [k for k in summary if k in KEYS and len(summary) > 1 and summary[k].nunique(dropna=False) == 1]
    about = ", ".join(_key_text(summary[k].iloc[0]) for k in shared)
    cells, bold = (part.drop(columns=shared) for part in summary_cells(summary))
    caption = "mean ± sample standard deviation" + (f"\n{escape(printable(about))}" if about else "")
    table = Table(
        title=escape(printable(title)), title_style="bold", caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for column in map(str, cells):
        if column in HEADS.values():  # on a narrow terminal these break, before the deviation
            table.add_column(column, justify="right")
        else:
            table.add_column(column, overflow="fold", no_wrap=cells[column].str.len().max() < 15)
    before = cells.iloc[0, 0] if len(cells) else ""
    for row, marks in zip(cells.itertuples(index=False), bold.itertuples(index=False), strict=True):
        if cells.columns[0] != "defense" and row[0] != before:
            table.add_section()
        before = row[0]
        texts = [escape(printable(text)).replace("± ", "±") for text in row]
        table.add_row(*(f"[bold]{text}[/bold]" if mark else text for text, mark in zip(texts, marks, strict=True)))
    return table


def summary_markdown(summary: pd.DataFrame) -> str:
    """The same as a table of Markdown."""
    cells, bold = summary_cells(summary)
    marked = cells.map(lambda text: re.sub(r"([\\`*_{}\[\]<>|~])", r"\\\1", printable(text)))
    marked = marked.where(~bold, "**" + marked + "**")
    rule = ["---:" if column in HEADS.values() else "---" for column in cells]
    return "".join(f"| {' | '.join(row)} |\n" for row in (map(str, cells), rule, *marked.to_numpy().tolist()))


def summary_latex(summary: pd.DataFrame) -> str:
    """The same for a paper: a `tabular` with booktabs' rules."""
    cells, bold = summary_cells(summary)
    style = cells.map(printable).rename(columns=lambda name: name.replace("%", r"\%")).style.hide(axis="index")
    style = style.format(escape="latex").format(
        lambda text: str(text).replace("±", r"$\pm$"), subset=[c for c in style.columns if c not in KEYS]
    )
    style = style.apply(lambda _: bold.to_numpy().choose(["", "textbf:--rwrap;"]), axis=None)
    alignment = "".join("l" if column in KEYS else "r" for column in cells)
    return style.to_latex(hrules=True, column_format=alignment)


HEADS = {"acc": "ACC %", "asr": "ASR %", "ra": "RA %", "der": "DER %", "seconds": "s", "n": "n"}


def summary_cells(summary: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Texts for the keys and figures, and which of them are the best; both of one shape. Missing is "-"."""
    cells = pd.DataFrame({k: summary[k].map(_key_text) for k in summary if k in KEYS}, dtype="object")
    for figure in FIGURES:
        parts = (summary[f"{figure}_{part}"] for part in ("mean", "std", "n"))
        scale = 1 if figure == "seconds" else 100
        cells[HEADS[figure]] = [
            _spread(mean, deviation, scale) + (f" (n {known})" if 0 < known < n else "")
            for mean, deviation, known, n in zip(*parts, summary.n, strict=True)
        ]
    cells["n"] = summary.n.astype(str)
    best = best_of(summary)
    bold = pd.DataFrame(False, index=cells.index, columns=cells.columns)
    for figure in map(str, best):
        bold[HEADS[figure]] = best[figure]
    return cells, bold


def _key_text(value: Any) -> str:
    if pd.isna(value):
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _spread(mean: float, deviation: float, scale: float) -> str:
    if math.isnan(mean):
        return "-"
    places = 1 if scale == 1 else 2
    return f"{scale * mean:.{places}f}" + ("" if math.isnan(deviation) else f" ± {scale * deviation:.{places}f}")


def suspicion_table(ranking: pd.DataFrame, names: Sequence[str], verdict: str) -> Table:
    """The most suspicious classes of `ulrl.suspect`, the highest z first; `-` where no perturbation was searched."""
    table = Table(title="suspicious classes", caption=escape(printable(verdict)), title_style="bold")
    for column in ("class", "z", "flagged", "reach"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for label in ranking.z.argsort()[::-1][:10].tolist():
        row = ranking.iloc[label]
        reach = "-" if math.isnan(row.reach) else f"{row.reach:.2f}"
        table.add_row(escape(printable(names[label])), f"{row.z:.1f}", "yes" if row.flagged else "", reach)
    return table


def accuracy_table(before: float, after: float, samples: str, flagged: Sequence[str]) -> Table:
    """What a repair cost; samples says on which."""
    table = Table(title="repaired", title_style="bold", caption=samples, min_width=len(samples))
    for column in ("ACC before %", "ACC after %", "flagged"):
        table.add_column(column, justify="right")
    table.add_row(_percent(before), _percent(after), escape(printable(", ".join(flagged) or "none")))
    return table


def perceptibility_table(attack: str, dataset: str, figures: dict[str, float | None]) -> Table:
    """How visible an attack's trigger is; L2 and L-infinity of pixels in [0, 1], PSNR in dB."""
    table = Table(title=f"{attack} on {dataset}", title_style="bold")
    for name in ("L2", "Linf", "PSNR", "SSIM"):
        table.add_column(name, justify="right")
    table.add_row(*("-" if value is None else f"{value:.3f}" for value in figures.values()))
    return table
