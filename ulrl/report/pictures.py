"""The pictures of one finished run, drawn from what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from ulrl.data.datasets import SPECS
from ulrl.files import whole_file
from ulrl.report import plots
from ulrl.report.results import thresholds
from ulrl.runs.common import SAMPLES_FILE
from ulrl.runs.triggers import TRIGGER_FILE

THUMBNAIL_HEIGHT = 64  # pixels, of small images


def draw(folder: Path) -> None:
    """Draw what the run in `folder` came to: an attack's trigger, or a defense's ranking and figures.

    The folder is one that this process, or one like it, has written; a stranger's is read by `report.results`.
    """
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if result["kind"] == "attack":
        if (folder / SAMPLES_FILE).exists():
            with np.load(folder / SAMPLES_FILE) as samples, whole_file(folder / "trigger_preview.png") as partial:
                plots.trigger_preview(
                    partial, samples["clean"], samples["poisoned"], samples["titles"].tolist(), _title(result)
                )
                _thumbnail(folder / "trigger_thumbnail.png", samples["clean"][0], samples["poisoned"][0])
        return
    history = pd.read_csv(folder / f"{result['method']}_df.csv")
    with whole_file(folder / "acc_asr.png") as partial:
        plots.acc_asr(partial, history, result["before"], result["after"])
    if (folder / TRIGGER_FILE).exists():
        with np.load(folder / TRIGGER_FILE) as found, whole_file(folder / "trigger.png") as partial:
            title = f"{result['method']} on {result['record']}, class {result['trigger']['class']}"
            plots.recovered_triggers(partial, {"": dict(found)}, title)
    if (folder / "neurons.csv").exists():
        neurons = pd.read_csv(folder / "neurons.csv", index_col="class")
        spec = SPECS.get(result["dataset"])
        names = spec.class_names if spec else ()
        with whole_file(folder / "neuron_ranking.png") as partial:
            plots.neuron_ranking(partial, neurons, thresholds(result), names, result.get("target"))


def _title(result: dict[str, Any]) -> str:
    asr = result["after"]["asr"]
    title = f"{result['attack']} on {result['dataset']}" + ("" if asr is None else f", ASR {100 * asr:.1f} %")
    return title + (": the backdoor did not take" if result.get("took") is False else "")


def _thumbnail(path: Path, clean: np.ndarray, poisoned: np.ndarray) -> None:
    """One image, the same with the trigger, and their difference amplified, side by side. uint8 [C, H, W] each."""
    difference = np.abs(poisoned.astype(float) - clean)
    amplified = (difference * (255 / max(difference.max(), 1))).astype(np.uint8)
    gap = np.full((*clean.shape[:2], max(1, clean.shape[2] // 16)), 255, np.uint8)
    strip = np.concatenate([clean, gap, poisoned, gap, amplified], axis=2)
    colours = np.broadcast_to(strip, (3, *strip.shape[1:])).transpose(1, 2, 0)
    times = max(1, THUMBNAIL_HEIGHT // clean.shape[1])
    with whole_file(path) as partial:
        Image.fromarray(colours.repeat(times, 0).repeat(times, 1)).save(partial, "PNG")
