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

from ulrl.metrics import TOOK
from ulrl.record import Record
from ulrl.report.frame import FIGURES, KEYS, NO_DEFENSE, frame_of, measured_to_take
from ulrl.report.pooling import best_of, notes_of, summarise
from ulrl.report.results import Run, brief


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def result_table(result: dict[str, Any]) -> RenderableType:
    """One run's `result.json` as a small table, figures in percent, and a few lines below it."""
    defended = result["kind"] == "defense"
    title = f"{result['method']} on {result['record']}" if defended else result["record"]
    table = Table(title=escape(brief(title)), title_style="bold")
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
        lines.add_row("flagged", escape(brief(flagged_text(result["flagged"], result.get("target")))))
        if found := result.get("trigger"):
            cosine, iou = ("-" if found[k] is None else f"{found[k]:.2f}" for k in ("cosine", "iou"))
            figures = f"cosine {cosine}, IoU {iou}, turns {_percent(found['turned'])} %"
            lines.add_row("trigger", f"found for class {found['class']}: {figures}")
    if measured_to_take(result) is False:
        so = ", so this is no evidence" if defended else ""
        lines.add_row("backdoor", f"did not take: ASR below {100 * TOOK:g}%{so}")
    lines.add_row("on", escape(brief(", ".join(about))))
    lines.add_row("seconds", ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in result["seconds"].items()))
    return Group(table, lines)


def detection_table(record: str, results: Sequence[dict[str, Any]]) -> RenderableType:
    """What sample detectors came to on a record: their `result.json`s, the best first."""
    table = Table(title=escape(brief(record)), title_style="bold")
    for column in ("", "AUROC", "recall % at 1% FPR", "poisoned", "images", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    for result in sorted(results, key=lambda r: -(r["auroc"] or 0.0)):
        auroc = "-" if result["auroc"] is None else f"{result['auroc']:.3f}"
        counts = (str(result[k]) for k in ("n_poisoned", "n_images"))
        seconds = f"{result['seconds']['total']:.1f}"
        table.add_row(result["method"], auroc, _percent(result["recall_at_1_fpr"]), *counts, seconds)
    return table


def record_table(record: Record, runs: Sequence[Run]) -> RenderableType:
    """What is planted in a record, how well it works, its pictures, and what defenses have come to so far.

    runs: those of the record; its own is missing where BackdoorBench made it.
    """
    labels = record.bd_test.labels[~record.bd_test.cover].unique().tolist()
    planted = "an attack without a name" if record.attack is None else record.attack
    planted += f", target {labels[0]}" if len(labels) == 1 else ""
    planted += f"; {len(record.bd_test.labels)} triggered test images" if labels else ", so nothing: a clean model"
    about = Table.grid(padding=(0, 2))
    about.add_row("planted", escape(brief(planted)))
    about.add_row("on", escape(brief(f"{record.dataset}, {record.num_classes} classes, {record.model_name}")))
    caption = "as the files in the record say; nothing was run now"
    table = Table(title=escape(brief(record.name)), title_style="bold", caption=caption)
    for column in ("", "ACC %", "ASR %", "RA %", "DER %", "flagged"):
        table.add_column(column, justify="right" if column.endswith("%") else "left")
    if any(measured_to_take(run.result) is False for run in runs):
        about.add_row("backdoor", f"did not take: ASR below {100 * TOOK:g}%")
    for run in runs:
        result, figures = run.result, [_percent(run.result["after"][k]) for k in ("acc", "asr", "ra")]
        if result["kind"] == "attack":
            table.add_row("no defense", *figures, "", "")
            continue
        flagged = flagged_text(result["flagged"], labels[0] if len(labels) == 1 else None)
        name = escape(brief(run.folder.name))
        table.add_row(name, *figures, _percent(result["der"]), escape(brief(flagged)))
    pictures = sorted(p.relative_to(record.folder).as_posix() for p in record.folder.glob("*.png"))
    pictures += sorted(p.relative_to(record.folder).as_posix() for p in record.folder.glob("defense/*/*.png"))
    about.add_row("in", escape(brief(str(record.folder))))
    about.add_row("pictures", escape(brief(", ".join(pictures) or "none")))
    return Group(about, table if runs else "no run has been judged here yet")


def flagged_text(flagged: Sequence[int], target: int | None) -> str:
    """The flagged classes, and whether the attacker's target, where it is known to be one, is among them."""
    named = ", ".join(map(str, flagged)) or "none"
    if target is None:
        return named
    if target not in flagged:
        return f"{named}; the target was {target}"
    return f"{named} (the target)" if len(flagged) == 1 else f"{named} (target {target} among them)"


def comparison_table(record: str, results: list[dict[str, Any]], found: int) -> Table:
    """Defenses on one record: mean and sample standard deviation over their runs, the best in bold.

    results: `result.json` of each run; what they were run on comes first, from the first of them. found: how many
    were not run now. They may have come with a stranger's record, so that is said below.
    """
    runs = frame_of(results)
    before = runs.iloc[:1].assign(
        kind="attack", defense=NO_DEFENSE, settings="", repairs=True, der=math.nan, seconds=math.nan,
        **{figure: results[0]["before"][figure] for figure in ("acc", "asr", "ra")},
    )  # fmt: skip
    summary = summarise(pd.concat([before, runs])[list(runs.columns)], "defense")
    table = summary_table(summary, f"defenses on {record}")
    if found:
        lay = f"{found} of {len(results)} runs lay in the record already, and are the word of whoever made them"
        table.caption = f"{table.caption}\n{lay}; --overwrite runs them again"
    return table


def summary_table(summary: pd.DataFrame, title: str) -> Table:
    """What `summarise` made, for the terminal; a key with one value for all lines stands below, not in a column."""
    cells, bold = summary_cells(summary)
    shared = [k for k in cells if k in KEYS and len(cells) > 1 and cells[k].nunique() == 1]
    about = ", ".join(cells[k].iloc[0] for k in shared)
    cells, bold = cells.drop(columns=shared), bold.drop(columns=shared)
    caption = "\n".join(escape(brief(text)) for text in (SPREAD, about, *notes_of(summary)) if text)
    table = Table(
        title=escape(brief(title)), title_style="bold", caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
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
        texts = [escape(brief(text)).replace("± ", "±") for text in row]
        table.add_row(*(f"[bold]{text}[/bold]" if mark else text for text, mark in zip(texts, marks, strict=True)))
    return table


def summary_markdown(summary: pd.DataFrame) -> str:
    """The same as a table of Markdown, and below it what has to be known besides."""
    cells, bold = summary_cells(summary)

    def spelled(text: str) -> str:
        return re.sub(r"([\\`*_{}\[\]<>|~])", r"\\\1", brief(text))

    marked = cells.map(spelled)
    marked = marked.where(~bold, "**" + marked + "**")
    rule = ["---:" if column in HEADS.values() else "---" for column in cells]
    table = "".join(f"| {' | '.join(row)} |\n" for row in (map(str, cells), rule, *marked.to_numpy().tolist()))
    return table + "".join(f"\n{spelled(note)}\n" for note in (SPREAD, *notes_of(summary)))


def summary_latex(summary: pd.DataFrame) -> str:
    """The same for a paper: a `tabular` with booktabs' rules; what has to be known besides is comments below it."""
    cells, bold = summary_cells(summary)
    style = cells.map(brief).rename(columns=lambda name: name.replace("%", r"\%")).style.hide(axis="index")
    style = style.format(escape="latex").format(
        lambda text: str(text).replace("±", r"$\pm$"), subset=[c for c in style.columns if c not in KEYS]
    )
    style = style.apply(lambda _: bold.to_numpy().choose(["", "textbf:--rwrap;"]), axis=None)
    alignment = "".join("l" if column in KEYS else "r" for column in cells)
    table = style.to_latex(hrules=True, column_format=alignment)
    return table + "".join(f"% {brief(note)}\n" for note in (SPREAD, *notes_of(summary)))


SPREAD = "mean ± sample standard deviation over the n runs; over the records where they are several"
HEADS = {
    "acc": "ACC %", "asr": "ASR %", "ra": "RA %", "der": "DER %", "seconds": "s", "n": "n", "records": "records"
}  # fmt: skip


def summary_cells(summary: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Texts for the keys and figures, and which of them are the best; both of one shape. Missing is "-".

    What sets a line apart besides its keys (an option, that a backdoor did not take, that nothing is repaired) is said
    beside the key.
    """
    keys = [k for k in summary if k in KEYS]
    cells = pd.DataFrame({k: summary[k].map(_key_text) for k in keys}, dtype="object")
    beside = next((k for k in ("attack", "record") if k in keys), keys[-1])
    for key, words in (
        ("defense", summary.variant), ("attack", summary.record_variant),
        ("defense", summary.repairs.map({True: "", False: "finds only"})),
        (beside, summary.failed.map({True: "did not take", False: ""})),
    ):  # fmt: skip
        if key in keys:
            cells[key] += words.map(lambda text: f" ({text})" if text else "").astype("object")
    for figure in FIGURES:
        parts = (summary[f"{figure}_{part}"] for part in ("mean", "std", "n"))
        scale = 1 if figure == "seconds" else 100
        cells[HEADS[figure]] = [
            _spread(mean, deviation, scale) + (f" (n {known})" if 0 < known < n else "")
            for mean, deviation, known, n in zip(*parts, summary.n, strict=True)
        ]
    for count in ("n", "records"):
        if count == "n" or (summary.records > 1).any():
            cells[HEADS[count]] = summary[count].astype(str)
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
    """The most suspicious classes of `ulrl.suspect`, the most evidence first; `-` for what was not searched."""
    title, caption = "classes, most suspicious first", brief(verdict)
    table = Table(title=title, caption=escape(caption), title_style="bold", min_width=len(caption))
    shown = ("reach", "cover", "lead", "evidence", "z")
    for column in ("class", *shown):
        table.add_column(column, justify="left" if column == "class" else "right")
    for label in ranking.evidence.argsort()[::-1][:10].tolist():
        row = ranking.iloc[label]
        figures = ["-" if math.isnan(row[key]) else f"{row[key]:.{1 if key == 'z' else 2}f}" for key in shown]
        table.add_row(escape(brief(names[label])), *figures)
    return table


def accuracy_table(report: dict[str, Any], flagged: Sequence[str]) -> Table:
    """What a repair cost, by the report of `ulrl.purify`."""
    about = f"on {report['held_out']} clean images that were held out"
    if not report["held_out"]:
        about = f"on the {report['samples']} clean images that it was repaired with"
    table = Table(title="repaired", title_style="bold", caption=about, min_width=len(about))
    for column in ("ACC before %", "ACC after %", "flagged"):
        table.add_column(column, justify="right")
    named = escape(brief(", ".join(flagged) or "none"))
    table.add_row(_percent(report["accuracy_before"]), _percent(report["accuracy_after"]), named)
    return table


def perceptibility_table(attack: str, dataset: str, figures: dict[str, float | None]) -> Table:
    """How visible an attack's trigger is; L2 and L-infinity of pixels in [0, 1], PSNR in dB."""
    table = Table(title=f"{attack} on {dataset}", title_style="bold")
    for name in ("L2", "Linf", "PSNR", "SSIM"):
        table.add_column(name, justify="right")
    table.add_row(*("-" if value is None else f"{value:.3f}" for value in figures.values()))
    return table
