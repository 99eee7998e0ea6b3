"""Pruning by learned masks, the last step of RNP and ANP: which threshold, and its edit of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import Repair
from ulrl.defenses.masks import silence
from ulrl.defenses.selection import Selecting, sweep
from ulrl.options import option
from ulrl.training import Monitor


@dataclass(frozen=True)
class MaskPruning(Selecting):
    """A defense that ends by pruning the channels with a low mask, and its options for that."""

    pruning_max: float = option(0.9, "greatest threshold tried", source="BackdoorBench", low=0, high=1)
    pruning_step: float = option(0.05, "step between thresholds", source="BackdoorBench", low=0.001, high=1)
    pruning_number: float | None = option(
        None, "prune at this threshold, chosen by nothing; 0: not even masks of 0", low=0, high=1
    )

    def prune(
        self,
        model: nn.Module,
        values: dict[str, torch.Tensor],
        validation: ImageSet,
        monitor: Monitor,
        evidence: dict[str, Any],
    ) -> Repair:
        """Prune `model`, in place, at the greatest threshold that `validation` allows, or at `pruning_number`.

        values: the mask of each normalisation layer, by its dotted name.
        """
        steps = int(self.pruning_max / self.pruning_step + 1e-9)
        grid = {round(i * self.pruning_step, 6) for i in range(steps + 1)}
        thresholds = sorted(grid | {0.0 if self.pruning_number is None else self.pruning_number})

        def edit(model: nn.Module, i: int) -> None:
            silence(model, values, thresholds[i])

        swept = sweep(
            model, thresholds, edit, validation, self.acc_ratio, monitor, amp=self.amp, fixed=self.pruning_number
        )
        table = mask_table(values)
        swept.curve["pruned"] = [0, *((table["mask"] <= t).sum() for t in thresholds[1:])]
        evidence = {
            **evidence,
            "threshold": swept.strength,
            "pruned": int(swept.curve["pruned"].iloc[swept.chosen]),
            "channels": len(table),
            "validation_samples": len(validation),
        }
        return Repair(model, [], evidence, {"masks": table, "pruning": swept.curve}, swept.candidates)


def mask_table(values: dict[str, torch.Tensor]) -> pd.DataFrame:
    """One row per channel, lowest mask first."""
    layers = {path: pd.DataFrame({"mask": v.flatten().cpu().numpy()}) for path, v in values.items()}
    return pd.concat(layers, names=["layer", "channel"]).sort_values("mask", kind="stable")
