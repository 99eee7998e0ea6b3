"""The pictures of bench.successor's and bench.valley's figures, in docs/."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from bench.pages import FOLDER
from ulrl.files import whole_file
from ulrl.report.frame import NO_DEFENSE
from ulrl.report.looks import GREY, looks_of

DOCS = FOLDER.parent / "docs"
SHOWN = ("ulrl", "d3", "harden")  # the released method, the next best, and its successor


def sight(runs: pd.DataFrame) -> Figure:
    """ASR and RA on each record: as the victim has it, after some repairs, beside the clean nets' own.

    runs: as of bench.quality, of one share of clean images; the mean over them is shown.
    """
    records = runs[runs.defense == "harden"].sort_values("clean_ra").record.unique()
    names = runs.drop_duplicates("record").set_index("record").attack.loc[records]
    of_record = runs.groupby("record").mean(numeric_only=True).loc[records]
    looks = looks_of(SHOWN)
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    for ax, figure_name, title in zip(figure.subplots(1, 2, sharey=True), ("asr", "ra"), ("ASR", "RA"), strict=True):
        places = range(len(records))
        clean = 100 * of_record[f"clean_{figure_name}"]
        ax.barh(places, clean, height=0.8, color=GREY, alpha=0.25, label="a clean net")
        before = looks[NO_DEFENSE]
        ax.plot(100 * of_record[f"{figure_name}_before"], places, before.marker, color="black", label="backdoored")
        for defense in SHOWN:
            figures = 100 * runs[runs.defense == defense].groupby("record")[figure_name].mean().reindex(records)
            look = looks[defense]
            ax.plot(figures, places, look.marker, color=look.colour, label=defense, markersize=7, alpha=0.9)
        ax.set(title=f"{title}, percent", xlim=(-3, 103), yticks=list(places), yticklabels=list(names))
        ax.grid(axis="x", alpha=0.3)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def valley(runs: pd.DataFrame) -> Figure:
    """ACC, ASR and RA on the way from a victim's weights to each of its repairs'; runs: of bench.valley."""
    looks = looks_of(runs.defense)
    figure = Figure(figsize=(9, 3), layout="constrained")
    for ax, name in zip(figure.subplots(1, 3, sharex=True), ("acc", "asr", "ra"), strict=True):
        for defense, way in runs.groupby("defense"):
            look = looks[str(defense)]
            ax.plot(way.share, 100 * way[name], marker=look.marker, color=look.colour, label=defense, markersize=4)
        ax.set(title=f"{name.upper()}, percent", xticks=(0, 0.5, 1), xticklabels=("backdoored", "half way", "repaired"))
        ax.grid(axis="y", alpha=0.3)
    ax.legend(frameon=False)
    return figure


def save(figure: Figure, name: str) -> Path:
    """To docs/, the same bytes for the same figures."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110, metadata={"Software": None})
    with whole_file(DOCS / name) as partial:
        partial.write_bytes(drawn.getvalue())
    return DOCS / name
