"""The table that a run prints."""

from __future__ import annotations

from typing import Any

from rich.table import Table


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
        table.add_row("DER %", "", _percent(result["der"]), "")
        table.add_row("flagged", "", ", ".join(map(str, result["flagged"])) or "none", "")
    table.add_section()
    for stage, seconds in result["seconds"].items():
        table.add_row(f"{stage}, s", "", f"{seconds:.1f}", "")
    return table


def perceptibility_table(attack: str, dataset: str, figures: dict[str, float | None]) -> Table:
    """How visible an attack's trigger is; L2 and L-infinity of pixels in [0, 1], PSNR in dB."""
    table = Table(title=f"{attack} on {dataset}", title_style="bold")
    for name in ("L2", "Linf", "PSNR", "SSIM"):
        table.add_column(name, justify="right")
    table.add_row(*("-" if value is None else f"{value:.3f}" for value in figures.values()))
    return table
