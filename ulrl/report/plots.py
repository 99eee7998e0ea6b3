"""The pictures of one run, and figures for papers. Drawn without pyplot: no window system, no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ulrl.report.frame import NO_DEFENSE
from ulrl.report.results import printable

# Okabe and Ito's colours, told apart by colour-blind readers too.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"
PALETTE = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "os^Dv<>"


def trigger_preview(path: Path, clean: np.ndarray, poisoned: np.ndarray, titles: Sequence[str]) -> None:
    """Eight columns of clean image, poisoned image and their difference, amplified to the full range.

    clean, poisoned: uint8 [8, C, H, W], C 1 or 3; titles: a text over each column.
    """
    difference = np.abs(poisoned.astype(float) - clean)
    peak = difference.max()
    amplified = (difference * (255 / peak if peak else 0)).astype(np.uint8)
    rows = {
        "clean": clean,
        "poisoned": poisoned,
        f"difference\n(times {255 / peak if peak else 0:.1f})": amplified,
    }
    figure = Figure(figsize=(1.25 * len(clean) + 1, 4.3), layout="constrained")
    axes = figure.subplots(3, len(clean), squeeze=False)
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for ax, image in zip(row, images, strict=True):
            pixels = image.transpose(1, 2, 0)
            ax.imshow(pixels if pixels.shape[2] == 3 else pixels[:, :, 0], cmap="gray", vmin=0, vmax=255)
            ax.set_xticks([])
            ax.set_yticks([])
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=8)
    figure.savefig(path, dpi=110, format="png")


def signed_z(neurons: pd.DataFrame) -> pd.Series:
    """Each class's robust z, negative where it changed less than the median."""
    return neurons.z.where(neurons.change >= neurons.change.median(), -neurons.z)


def highest(signed: pd.Series) -> pd.Index:
    """The classes to show, at most 40, the highest z first."""
    return signed.sort_values(ascending=False).index[:40]


def neuron_ranking(
    path: Path, neurons: pd.DataFrame, threshold: float, class_names: Sequence[str], format: str = "png"
) -> None:
    """Bars of each class's robust z (negative below the median), the threshold, flagged ones marked.

    neurons: index class; columns change (L1 weight change), z, flagged.
    """
    signed = signed_z(neurons)
    order = highest(signed)
    named = [f"{k} {class_names[k]}" if class_names else str(k) for k in order]
    figure = Figure(figsize=(max(6.0, 0.32 * len(order) + 2), 3.8), layout="constrained")
    ax = figure.subplots()
    flagged = neurons.flagged[order]
    ax.bar(range(len(order)), signed[order], color=[ORANGE if mark else BLUE for mark in flagged])
    for x, (z, mark) in enumerate(zip(signed[order], flagged, strict=True)):
        if mark:
            ax.annotate("flagged", (x, z), ha="center", va="bottom", fontsize=8, color=ORANGE)
    ax.axhline(threshold, color=GREY, linestyle="--", linewidth=1)
    ax.annotate(f"threshold {threshold:g}", (len(order) - 0.5, threshold), ha="right", va="bottom", fontsize=8)
    ax.margins(y=0.12)
    ax.set_ylabel("robust z of the weight change")
    ax.set_title("Change of each class's row of the head in unlearning" + (", highest 40" if len(neurons) > 40 else ""))
    turn, end = (50, "right") if len(order) > 12 or class_names else (0, "center")
    ax.set_xticks(range(len(order)), named, rotation=turn, ha=end, rotation_mode="anchor")
    ax.spines[["top", "right"]].set_visible(False)
    _save(figure, path, format)


def acc_asr(path: Path, history: pd.DataFrame, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """ACC, ASR and RA before and after; beside it their course over the epochs, where that was measured.

    before, after: acc, asr and ra, fractions or None.
    history: columns stage, epoch and, when judged by epoch, test_acc, test_asr, test_ra.
    """
    judged = history.dropna(subset=["test_acc"]) if "test_acc" in history else history.iloc[:0]
    figure = Figure(figsize=(9.5 if len(judged) else 4.5, 3.6), layout="constrained")
    axes: Sequence[Axes] = figure.subplots(1, 2 if len(judged) else 1, squeeze=False)[0]
    names = [n for n in ("acc", "asr", "ra") if before[n] is not None]
    for offset, (title, figures, colour) in enumerate((("before", before, GREY), ("after", after, BLUE))):
        heights = [figures[n] or 0.0 for n in names]
        bars = axes[0].bar([i + 0.4 * offset for i in range(len(names))], heights, 0.38, color=colour, label=title)
        axes[0].bar_label(bars, [f"{h:.1%}" for h in heights], fontsize=8, padding=2)
    axes[0].set_xticks([i + 0.2 for i in range(len(names))], [n.upper() for n in names])
    axes[0].set_ylim(0, 1.12)
    axes[0].legend(loc="upper right", ncols=2, fontsize=8)
    if len(judged):
        steps = range(len(judged))
        for name, colour, style in (("acc", BLUE, "-"), ("asr", ORANGE, "--"), ("ra", GREY, ":")):
            if f"test_{name}" in judged and judged[f"test_{name}"].notna().any():
                axes[1].plot(steps, judged[f"test_{name}"], style, color=colour, label=name.upper(), marker=".")
        labels = [f"{stage} {epoch}" for stage, epoch in zip(judged.stage, judged.epoch, strict=True)]
        every = max(1, len(labels) // 10)
        axes[1].set_xticks(list(steps)[::every], labels[::every], rotation=45, ha="right", fontsize=8)
        axes[1].set_ylim(-0.03, 1.03)
        axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=110, format="png")


def asr_against_acc(path: Path, runs: pd.DataFrame, format: str) -> None:
    """Each run a point, each defense a colour and a shape; the best are at the upper left.

    runs: as `frame_of` makes it; runs without an ASR, and what the test set chose, are left out.
    """
    runs = runs[~runs.oracle].dropna(subset=["acc", "asr"])
    figure = Figure(figsize=(5.2, 3.9), layout="constrained")
    ax = figure.subplots()
    names = defenses_of(runs)
    for i, name in enumerate(names, start=-(NO_DEFENSE in names)):  # the report gives each the same colour
        own = runs[runs.defense == name]
        colour, marker = PALETTE[i % len(PALETTE)], MARKERS[(i + i // len(PALETTE)) % len(MARKERS)]
        if name == NO_DEFENSE:
            colour, marker = GREY, "P"
        ax.scatter(
            100 * own.asr, 100 * own.acc, s=26, c=colour, marker=marker, alpha=0.85, linewidths=0, label=_plain(name)
        )
    ax.set_xlabel("ASR %, lower is better")
    ax.set_ylabel("ACC %, higher is better")
    ax.set_xlim(-3, 103)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False, columnspacing=1, handletextpad=0.2)
    _save(figure, path, format)


def heatmap(path: Path, runs: pd.DataFrame, metric: str, format: str) -> None:
    """Attack by defense, the mean of `metric` (acc, asr, ra or der) in percent; hatched where there is no run."""
    runs = runs[~runs.oracle]
    table = runs.assign(attack=runs.attack.fillna("?")).pivot_table(metric, "attack", "defense", dropna=False)
    table = table.reindex(columns=defenses_of(runs))
    figure = Figure(figsize=(1.6 + 0.62 * len(table.columns), 1.2 + 0.34 * len(table)), layout="constrained")
    ax = figure.subplots()
    ax.set_facecolor("white")
    ax.patch.set(hatch="////", edgecolor="#cccccc", linewidth=0)
    # A mesh keeps its edges at any size, where an image would be resampled.
    mesh = ax.pcolormesh(100 * table, cmap="cividis", vmin=0, vmax=100, edgecolors="white", linewidth=1)
    for (i, j), value in np.ndenumerate(100 * table.to_numpy()):
        if not np.isnan(value):
            colour = "black" if value > 50 else "white"
            ax.text(j + 0.5, i + 0.5, f"{value:.1f}", ha="center", va="center", fontsize=7, color=colour)
    ticks = np.arange(len(table.columns)) + 0.5
    ax.set_xticks(ticks, map(_plain, table.columns), rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    ax.set_yticks(np.arange(len(table)) + 0.5, map(_plain, table.index), fontsize=8)
    ax.tick_params(length=0)
    ax.invert_yaxis()
    bar = figure.colorbar(mesh, ax=ax, label=f"{metric.upper()} %", shrink=0.8)
    bar.solids.set(rasterized=False, edgecolor="face")  # type: ignore[union-attr]
    _save(figure, path, format)


def tsne(path: Path, features: Mapping[str, np.ndarray], groups: np.ndarray, class_names: Sequence[str], format: str,
         seed: int = 0) -> None:  # fmt: skip
    """t-SNE of the same samples' features in several models, one panel each.

    features: by the panel's title, float [N, D]. groups: int64 [N], the class of a clean sample, -1 for a
    triggered one. N at least 4.
    """
    from sklearn.manifold import TSNE  # a second to import, which no other figure needs

    figure = Figure(figsize=(4.2 * len(features), 4.6), layout="constrained")
    axes = figure.subplots(1, len(features), squeeze=False)[0]
    perplexity = min(30.0, (len(groups) - 1) / 3)
    classes = [k for k in np.unique(groups) if k >= 0]
    for ax, (title, values) in zip(axes, features.items(), strict=True):
        at = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(values)
        for i, k in enumerate(classes):
            mine = at[groups == k]
            colour, marker = PALETTE[i % len(PALETTE)], MARKERS[(i // len(PALETTE)) % len(MARKERS)]
            name = class_names[k] if class_names else str(k)
            ax.scatter(*mine.T, s=9, c=colour, marker=marker, alpha=0.7, linewidths=0, label=name, zorder=1)
        ax.scatter(*at[groups < 0].T, s=14, c="black", marker="x", linewidths=0.7, label="triggered", zorder=2)
        ax.set_title(title, fontsize=10)
        ax.set_xticks([])
        ax.set_yticks([])
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=6, fontsize=8, frameon=False, markerscale=1.8)
    _save(figure, path, format)


def defenses_of(runs: pd.DataFrame) -> list[str]:
    """The defenses of some runs by name; what was not defended comes first."""
    return sorted(runs.defense.unique(), key=lambda name: (name != NO_DEFENSE, name))


def _plain(text: str) -> str:
    """A name for Matplotlib, to which dollar signs are formulas and a leading underscore hides a label."""
    return " " * text.startswith("_") + printable(text).replace("$", r"\$")


def _save(figure: Figure, path: Path, format: str) -> None:
    with matplotlib.rc_context({"pdf.fonttype": 42, "svg.fonttype": "none"}):  # text stays text
        figure.savefig(path, dpi=110 if format == "png" else 300, format=format)
