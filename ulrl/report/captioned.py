"""What `ulrl clip` came to: its table and its picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.table import Table

from ulrl.files import whole_file

NAMES = {"clean": "trained without the attack", "before": "backdoored", "ft": "repaired: ft", "ubt": "repaired: ubt",
         "ulrl": "repaired: ulrl"}  # fmt: skip


def clip_table(result: dict[str, Any]) -> RenderableType:
    """The figures of every encoder in a `result.json` of this process, in percent, and a few lines below them."""
    rows: dict[str, dict[str, Any]] = {name: {"after": result[name]} for name in ("clean", "before")}
    table = Table(title=f"{result['attack']}: zero-shot on {result['dataset']}", title_style="bold")
    for column in ("", "ACC %", "ASR %", "RA %", "colour %", "background %", "DER %", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in (rows | result["repairs"]).items():
        shares = [*(row["after"][k] for k in ("acc", "asr", "ra", "colour", "background")), row.get("der")]
        cells = ["" if share is None else f"{100 * share:.1f}" for share in shares]
        table.add_row(NAMES[name], *cells, f"{row['seconds']:.1f}" if "seconds" in row else "")
    lines = Table.grid(padding=(0, 2))
    lines.add_row("pairs", f"{result['pairs']}, {result['poisoned']} of them poisoned; {result['clean_samples']} clean")
    lines.add_row("seconds", ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in result["seconds"].items()))
    return Group(table, lines)


def draw_captions(folder: Path) -> None:
    """captions.png: a few triggered images over the captions that each encoder finds nearest to them.

    The folder is one that this process, or one like it, has written.
    """
    said = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    with np.load(folder / "triggered.npz") as held:
        images = held["images"]
    figure = Figure(figsize=(2.3 * len(images), 2.2 + 0.62 * len(said["nearest"])), layout="constrained")
    for i, (ax, image) in enumerate(zip(figure.subplots(1, len(images), squeeze=False)[0], images, strict=True)):
        ax.imshow(image.transpose(1, 2, 0))
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_title(said["true"][i], fontsize=8)
        found = [f"{NAMES[name]}\n" + "\n".join(texts[i]) for name, texts in said["nearest"].items()]
        ax.set_xlabel("\n\n".join(found), fontsize=8)
    figure.suptitle("Triggered images: what is there, and the captions found nearest", fontsize=10)
    with whole_file(folder / "captions.png") as partial:
        figure.savefig(partial, dpi=110, format="png", bbox_inches="tight")  # with the captions below
