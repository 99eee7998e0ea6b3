"""The pictures of one run, and figures for papers. Drawn without pyplot: no window system, no global state.

paper: for a column of a paper: 3.3 inches wide, no title, and no text below 7 points.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from ulrl.errors import UserError, one_line
from ulrl.report.frame import NO_DEFENSE
from ulrl.report.looks import BLUE, GREY, ORANGE, PALETTE, SHAPES, looks_of
from ulrl.report.pooling import in_order, summarise
from ulrl.report.results import RANKED_BY, brief

MARKERS = tuple(SHAPES.values())
PAPER_WIDTH, PAPER_FONT = 3.3, 7.0  # inches, the width of a column; points, what is still read in print


def trigger_preview(path: Path, clean: np.ndarray, poisoned: np.ndarray, titles: Sequence[str], title: str) -> None:
    """Eight columns of clean image, poisoned image and their difference, amplified to the full range.

    clean, poisoned: uint8 [8, C, H, W], C 1 or 3; titles: a text over each column; title: one over all.
    """
    difference = np.abs(poisoned.astype(float) - clean)
    peak = difference.max()
    amplified = (difference * (255 / peak if peak else 0)).astype(np.uint8)
    rows = {
        "clean": clean,
        "poisoned": poisoned,
        f"difference\n(times {255 / peak if peak else 0:.1f})": amplified,
    }
    figure = Figure(figsize=(1.25 * len(clean) + 1, 4.6), layout="constrained")
    axes = figure.subplots(3, len(clean), squeeze=False)
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for ax, image in zip(row, images, strict=True):
            _show(ax, image)
    for ax, text in zip(axes[0], titles, strict=True):
        ax.set_title("\n".join(map(_plain, text.split("\n"))), fontsize=8)
    figure.suptitle(_plain(title), fontsize=11)
    _save(figure, path)


def recovered_triggers(path: Path, rows: Mapping[str, Mapping[str, np.ndarray]], title: str) -> None:
    """Per row of found triggers: an image, it with the true trigger, with the found one, and both masks.

    rows: by a text beside the row, what `ulrl.runs.triggers` writes: clean, poisoned and pattern uint8 [C, H, W],
    true_mask bool and mask float [H, W].
    """
    figure = Figure(figsize=(6.4, 1.3 * len(rows) + 0.6), layout="constrained")
    axes = figure.subplots(len(rows), 5, squeeze=False)
    for row, (name, found) in zip(axes, rows.items(), strict=True):
        clean, mask = found["clean"].astype(float), found["mask"]
        stamped = (clean + mask * (found["pattern"] - clean)).astype(np.uint8)
        shown = (found["clean"], found["poisoned"], stamped, 255 * found["true_mask"][None], 255 * mask[None])
        row[0].set_ylabel(_plain(name), rotation=0, ha="right", va="center", fontsize=8)
        for ax, image in zip(row, shown, strict=True):
            _show(ax, image)
    for ax, text in zip(axes[0], ("image", "true trigger", "found trigger", "true mask", "found mask"), strict=True):
        ax.set_title(text, fontsize=8)
    figure.suptitle(_plain(title), fontsize=10)
    _save(figure, path)


def signed_z(neurons: pd.DataFrame) -> pd.Series:
    """Each class's robust z, negative where it changed less than the median."""
    return neurons.z.where(neurons.change >= neurons.change.median(), -neurons.z)


def highest(signed: pd.Series, target: int | None, count: int = 40) -> list[int]:
    """The classes to show, the highest z first: at most `count`, and the true target wherever it is."""
    order = signed.sort_values(ascending=False).index.tolist()
    return order[:count] + [k for k in order[count:] if k == target]


def signs_of(neurons: pd.DataFrame) -> dict[str, pd.Series]:
    """Those of RANKED_BY that there are, z signed."""
    return {sign: neurons[sign] for sign in RANKED_BY if sign in neurons} | {"z": signed_z(neurons)}


def neuron_ranking(
    path: Path, neurons: pd.DataFrame, thresholds: Mapping[str, float], class_names: Sequence[str], target: int | None,
    format: str = "png", paper: bool = False,
) -> None:  # fmt: skip
    """Bars of each class's robust z (negative below the median), the flagged and the true target marked, and
    below them those of its other signs; at each the threshold above which it flags a class, if it does.

    neurons: index class; columns change (L1 weight change), z, flagged, and evidence and excess if it is Harden's.
    thresholds: by sign. target: None where it is not one, or not known.
    """
    panels = signs_of(neurons)
    order = highest(panels["z"], target, 15 if paper else 40)
    named = [f"{k} {class_names[k]}" if 0 <= k < len(class_names) else str(k) for k in order]
    width, height = (PAPER_WIDTH, 2.3) if paper else (max(6.0, 0.32 * len(order) + 2), 3.8)
    figure = Figure(figsize=(width, height * (0.4 + 0.6 * len(panels))), layout="constrained")
    axes: list[Axes] = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0].tolist()
    for ax, (sign, heights) in zip(axes, panels.items(), strict=True):
        for words, colour, own in (("flagged", ORANGE, True), ("not flagged", BLUE, False)):
            places = [x for x, k in enumerate(order) if neurons.flagged[k] == own]
            if places:
                ax.bar(places, [heights[order[x]] for x in places], color=colour, label=words)
        if target in order:
            at = order.index(target)
            ax.bar(at, heights[target], facecolor="none", edgecolor="black", linewidth=1.4, label="true target")
        ax.margins(y=0.12)
        if sign in thresholds:
            bound = thresholds[sign]
            ax.axhline(bound, color=GREY, linestyle="--", linewidth=1, label=f"threshold {bound:g}")
        ax.set_ylabel(RANKED_BY[sign])
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=8, frameon=False)
    if not paper:
        one = "Change of each class's row of the head in unlearning"
        axes[0].set_title(one if len(panels) == 1 else "Signs of a backdoor, by class")
    if len(order) < len(neurons):
        axes[-1].set_xlabel(f"class, highest {len(order)} of {len(neurons)}")
    turn, end = (50, "right") if len(order) > 12 or class_names else (0, "center")
    axes[-1].set_xticks(range(len(order)), named, rotation=turn, ha=end, rotation_mode="anchor")
    _save(figure, path, format, paper)


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
        heights = [100 * (figures[n] or 0.0) for n in names]
        bars = axes[0].bar([i + 0.4 * offset for i in range(len(names))], heights, 0.38, color=colour, label=title)
        axes[0].bar_label(bars, [f"{h:.1f}" for h in heights], fontsize=8, padding=2)
    axes[0].set_xticks([i + 0.2 for i in range(len(names))], [n.upper() for n in names])
    axes[0].set_ylim(0, 115)
    axes[0].set_ylabel("%")
    axes[0].legend(loc="upper right", ncols=2, fontsize=8)
    if len(judged):
        steps = range(len(judged))
        for name, colour, style in (("acc", BLUE, "-"), ("asr", ORANGE, "--"), ("ra", GREY, ":")):
            if f"test_{name}" in judged and judged[f"test_{name}"].notna().any():
                axes[1].plot(steps, 100 * judged[f"test_{name}"], style, color=colour, label=name.upper(), marker=".")
        labels = [f"{stage} {epoch}" for stage, epoch in zip(judged.stage, judged.epoch, strict=True)]
        every = max(1, len(labels) // 10)
        axes[1].set_xticks(list(steps)[::every], labels[::every], rotation=45, ha="right", fontsize=8)
        axes[1].set_ylim(-3, 103)
        axes[1].set_ylabel("% of the test images")
        axes[1].legend(fontsize=8)
    _save(figure, path)


def asr_against_acc(path: Path, runs: pd.DataFrame, format: str, paper: bool = False) -> None:
    """Each run a point, each defense its look; the best are at the upper left.

    runs: as `frame_of` makes it; left out are runs without an ASR, what the test set chose, what another run repeats,
    and records whose backdoor did not take.

    Raises:
        UserError: none is left.
    """
    failed = runs.took.eq(False).fillna(False).astype(bool)
    runs = runs[~(runs.oracle | runs.repeat | failed)].dropna(subset=["acc", "asr"])
    if runs.empty:
        raise UserError(
            "there is no run to draw: each lacks an ASR, or is an oracle's, or of a backdoor that did not take"
        )
    names = sorted(runs.defense.unique(), key=lambda name: (name != NO_DEFENSE, name))
    columns = 3 if paper else 5
    height = 2.4 + 0.14 * -(-len(names) // columns) if paper else 3.9
    figure = Figure(figsize=(PAPER_WIDTH if paper else 5.2, height), layout="constrained")
    ax = figure.subplots()
    looks = looks_of(names)
    for name in names:
        own, look = runs[runs.defense == name], looks[name]
        ax.scatter(
            100 * own.asr, 100 * own.acc, s=14 if paper else 26, c=look.colour, marker=look.marker, alpha=0.85,
            linewidths=0, label=_plain(name),
        )  # fmt: skip
    ax.set_xlabel("ASR %, lower is better")
    ax.set_ylabel("ACC %, higher is better")
    ax.set_xlim(-3, 103)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(
        loc="outside lower center", ncols=columns, fontsize=8, frameon=False, columnspacing=1, handletextpad=0.2
    )
    _save(figure, path, format, paper)


def heatmap(path: Path, runs: pd.DataFrame, metric: str, format: str, paper: bool = False) -> None:
    """Attack by defense, the mean of `metric` (acc, asr, ra or der) in percent; hatched where there is no run.

    What has other options is a row or a column of its own. For a paper the longer side stands.

    Raises:
        UserError: no run but an oracle's.
    """
    if runs.oracle.all():
        raise UserError("there is no run to draw: what the test set chose is no defense's own figure")
    lines = in_order(summarise(runs[~runs.oracle], "dataset,model,attack,defense"))
    several = [key for key in ("dataset", "model") if lines[key].nunique() > 1]
    rows = lines.attack.fillna("?") + [_beside(line, [*several, "record_variant"]) for _, line in lines.iterrows()]
    columns = lines.defense + [_beside(line, ["variant"], failed=False) for _, line in lines.iterrows()]
    table = lines.assign(row=rows, column=columns).pivot_table(
        f"{metric}_mean", "row", "column", dropna=False, sort=False, observed=True
    )
    table = table[sorted(table.columns, key=lambda name: (name != NO_DEFENSE, name))]
    if paper and len(table.columns) > len(table):
        table = table.T
    across, down = len(table.columns), len(table)
    beside = [_folded(str(name), 18, 48) if paper else _folded(str(name), 36, 96) for name in table.index]
    below = [_folded(str(name), 28, 28) if paper else _folded(str(name), 36, 72) for name in table.columns]
    # Names of any length and number of lines find their room around the cells: in inches at 7 or 8 points.
    letter, line = (0.055, 0.11) if paper else (0.065, 0.13)
    longest = letter * max(len(part) for name in below for part in name.split("\n"))
    room = max(letter * max(len(part) for name in beside for part in name.split("\n")), 0.8 * longest)
    cell = max(0.17 if paper else 0.34, line * (1 + max(name.count("\n") for name in beside)) + 0.04)
    size = (PAPER_WIDTH if paper else 1.2 + room + 0.62 * across, 0.6 + 0.8 * longest + cell * down)
    figure = Figure(figsize=size, layout="constrained")
    ax = figure.subplots()
    ax.set_facecolor("white")
    ax.patch.set(hatch="////", edgecolor="#cccccc", linewidth=0)
    # A mesh keeps its edges at any size, where an image would be resampled.
    mesh = ax.pcolormesh(100 * table, cmap="cividis", vmin=0, vmax=100, edgecolors="white", linewidth=1)
    places = 0 if paper else 1  # in a column's cells three digits find room, and beyond 10 columns none
    for (i, j), value in np.ndenumerate(100 * table.to_numpy()):
        if not np.isnan(value) and not (paper and across > 10):
            colour = "black" if value > 47 else "white"  # where both are read as well
            ax.text(j + 0.5, i + 0.5, f"{value:.{places}f}", ha="center", va="center", fontsize=7, color=colour)
    ticks = np.arange(across) + 0.5
    ax.set_xticks(ticks, below, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    ax.set_yticks(np.arange(down) + 0.5, beside, fontsize=8)
    ax.tick_params(length=0)
    ax.invert_yaxis()
    bar = figure.colorbar(mesh, ax=ax, label=f"{metric.upper()} %", shrink=0.8, pad=0.02, aspect=30 if paper else 20)
    bar.solids.set(rasterized=False, edgecolor="face")  # type: ignore[union-attr]
    _save(figure, path, format, paper, None if paper else "tight")


def _folded(name: str, width: int, longest: int) -> str:
    """A name in lines of `width` letters; of one that is longer than `longest`, the middle is left out."""
    return "\n".join(map(_plain, textwrap.wrap(one_line(name, longest), width))) or " "


def _beside(line: pd.Series, columns: Sequence[str], failed: bool = True) -> str:
    """What sets a row or a column of the heat map apart, in brackets."""
    words = [str(line[column]) for column in columns if line[column]] + ["did not take"] * (failed and line.failed)
    return f" ({', '.join(words)})" if words else ""


def tsne(path: Path, features: Mapping[str, np.ndarray], groups: np.ndarray, class_names: Sequence[str], format: str,
         paper: bool = False, seed: int = 0) -> None:  # fmt: skip
    """t-SNE of the same samples' features in several models, one panel each.

    features: by the panel's title, float [N, D]. groups: int64 [N], the class of a clean sample, -1 for a
    triggered one. N at least 4.
    """
    from sklearn.manifold import TSNE  # a second to import, which no other figure needs

    width = PAPER_WIDTH / len(features) if paper else 4.2
    figure = Figure(figsize=(width * len(features), 1.15 * width + 0.4), layout="constrained")
    axes = figure.subplots(1, len(features), squeeze=False)[0]
    perplexity = min(30.0, (len(groups) - 1) / 3)
    classes = [k for k in np.unique(groups) if k >= 0]
    for ax, (title, values) in zip(axes, features.items(), strict=True):
        at = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(values)
        for i, k in enumerate(classes):
            mine = at[groups == k]
            colour, marker = PALETTE[i % len(PALETTE)], MARKERS[(i // len(PALETTE)) % len(MARKERS)]
            name = _plain(class_names[k]) if class_names else str(k)
            ax.scatter(
                *mine.T, s=4 if paper else 9, c=colour, marker=marker, alpha=0.7, linewidths=0, label=name, zorder=1
            )
        ax.scatter(
            *at[groups < 0].T, s=6 if paper else 14, c="black", marker="x", linewidths=0.7, label="triggered", zorder=2
        )
        ax.set_title(title, fontsize=10)  # which model it is, so it stays in a paper
        ax.set_xticks([])
        ax.set_yticks([])
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=4 if paper else 6,
        fontsize=8,
        frameon=False,
        markerscale=1.8,
        columnspacing=1,
        handletextpad=0.2,
    )
    _save(figure, path, format, paper)


def _show(ax: Axes, image: np.ndarray) -> None:
    """image: [C, H, W] in [0, 255], C 1 or 3."""
    pixels = image.transpose(1, 2, 0)
    ax.imshow(pixels if pixels.shape[2] == 3 else pixels[:, :, 0], cmap="gray", vmin=0, vmax=255)
    ax.set_xticks([])
    ax.set_yticks([])


def _plain(text: str) -> str:
    """A name for Matplotlib, to which dollar signs are formulas and a leading underscore hides a label."""
    return " " * text.startswith("_") + brief(text).replace("$", r"\$")


def _save(
    figure: Figure, path: Path, format: str = "png", paper: bool = False, box: Literal["tight"] | None = None
) -> None:
    """box: tight, where names of wide letters may want more room than there is."""
    if paper:
        for text in figure.findobj(Text):
            text.set_fontsize(PAPER_FONT)
    with (
        matplotlib.rc_context({"pdf.fonttype": 42, "svg.fonttype": "none"}),
        warnings.catch_warnings(),
    ):  # text stays text
        warnings.filterwarnings("ignore", "constrained_layout not applied")
        figure.savefig(path, dpi=300 if paper or format != "png" else 110, format=format, bbox_inches=box)
