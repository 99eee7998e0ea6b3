"""The pictures of one run. Drawn without pyplot, so no window system and no global state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ulrl.metrics import Judgement

# Okabe and Ito's colours, told apart by colour-blind readers too.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"


def trigger_preview(path: Path, clean: torch.Tensor, poisoned: torch.Tensor, titles: Sequence[str]) -> None:
    """Eight columns of clean image, poisoned image and their difference, amplified to the full range.

    clean, poisoned: uint8 [8, C, H, W], C 1 or 3; titles: a text over each column.
    """
    difference = (poisoned.float() - clean.float()).abs()
    peak = difference.max().item()
    amplified = (difference * (255 / peak if peak else 0)).to(torch.uint8)
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
            pixels = image.cpu().permute(1, 2, 0).numpy()
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


def neuron_ranking(path: Path, neurons: pd.DataFrame, threshold: float, class_names: Sequence[str]) -> None:
    """Bars of each class's robust z (negative below the median), the threshold, flagged ones marked.

    neurons: index class; columns change (L1 weight change), z, flagged.
    """
    signed = signed_z(neurons)
    order = highest(signed)
    named = [f"{k} {class_names[k]}" if class_names else str(k) for k in order]
    figure = Figure(figsize=(max(6.0, 0.32 * len(order) + 2), 3.8), layout="constrained")
    ax = figure.subplots()
    flagged = neurons.flagged[order]
    ax.bar(named, signed[order], color=[ORANGE if mark else BLUE for mark in flagged])
    for x, (z, mark) in enumerate(zip(signed[order], flagged, strict=True)):
        if mark:
            ax.annotate("flagged", (x, z), ha="center", va="bottom", fontsize=8, color=ORANGE)
    ax.axhline(threshold, color=GREY, linestyle="--", linewidth=1)
    ax.annotate(f"threshold {threshold:g}", (len(order) - 0.5, threshold), ha="right", va="bottom", fontsize=8)
    ax.margins(y=0.12)
    ax.set_ylabel("robust z of the weight change")
    ax.set_title("Change of each class's row of the head in unlearning" + (", highest 40" if len(neurons) > 40 else ""))
    ax.tick_params(axis="x", rotation=60 if len(order) > 12 or class_names else 0)
    figure.savefig(path, dpi=110, format="png")


def acc_asr(path: Path, history: pd.DataFrame, before: Judgement, after: Judgement) -> None:
    """ACC, ASR and RA before and after; beside it their course over the epochs, where that was measured.

    history: columns stage, epoch and, when judged by epoch, test_acc, test_asr, test_ra.
    """
    judged = history.dropna(subset=["test_acc"]) if "test_acc" in history else history.iloc[:0]
    figure = Figure(figsize=(9.5 if len(judged) else 4.5, 3.6), layout="constrained")
    axes: Sequence[Axes] = figure.subplots(1, 2 if len(judged) else 1, squeeze=False)[0]
    names = [n for n in ("acc", "asr", "ra") if getattr(before, n) is not None]
    for offset, (title, figures, colour) in enumerate((("before", before, GREY), ("after", after, BLUE))):
        heights = [getattr(figures, n) or 0.0 for n in names]
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
