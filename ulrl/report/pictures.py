"""The pictures of one finished run, drawn from what it wrote."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd

from ulrl.data.datasets import SPECS
from ulrl.files import whole_file
from ulrl.report import plots
from ulrl.runs.common import SAMPLES_FILE

log = logging.getLogger(__name__)


def draw(folder: Path) -> None:
    """Draw what the run in `folder` came to: an attack's trigger, or a defense's ranking and figures.

    The folder is one that this process, or one like it, has written; a stranger's is read by `report.results`.
    """
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if result["kind"] == "attack":
        if (folder / SAMPLES_FILE).exists():
            with np.load(folder / SAMPLES_FILE) as samples, whole_file(folder / "trigger_preview.png") as partial:
                plots.trigger_preview(partial, samples["clean"], samples["poisoned"], samples["titles"].tolist())
        return
    history = pd.read_csv(folder / f"{result['method']}_df.csv")
    with whole_file(folder / "acc_asr.png") as partial:
        plots.acc_asr(partial, history, result["before"], result["after"])
    if (folder / "neurons.csv").exists():
        neurons = pd.read_csv(folder / "neurons.csv", index_col="class")
        spec = SPECS.get(result["dataset"])
        names = spec.class_names if spec else ()
        with whole_file(folder / "neuron_ranking.png") as partial:
            plots.neuron_ranking(partial, neurons, result["evidence"]["z_threshold"], names)
