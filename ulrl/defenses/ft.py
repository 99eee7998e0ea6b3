"""FT: fine-tuning on the clean samples, the baseline of every other defense."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import Repair, register
from ulrl.defenses.finetuning import FineTuning
from ulrl.training import Monitor


@register("ft")
@dataclass(frozen=True)
class FT(FineTuning):
    """Train every weight on the clean samples, as BackdoorBench does."""

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        self.finetune(model, clean, monitor, "finetune")
        return Repair(model)
