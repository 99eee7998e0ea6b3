"""FT-SAM: fine-tuning with adaptive sharpness-aware minimisation (Zhu et al., arXiv 2304.11823)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import Repair, register
from ulrl.defenses.finetuning import FineTuning
from ulrl.options import option
from ulrl.training import Monitor, Sam


@register("ft-sam")
@dataclass(frozen=True)
class FTSAM(FineTuning):
    """Fine-tune against the worst weights within an ellipsoid that is longest along the largest weights.

    The neurons of a backdoor have large weights, which plain fine-tuning hardly moves; the climb is in
    proportion to the weights, so those are shrunk first.

    Unlike BackdoorBench's code, the learning rate falls once per epoch and over all of them (there it
    rises and falls every 200 steps), and what YAML says of the radius is heeded.
    """

    # In BackdoorBench's YAML rho_min is rho_max and alpha 0; its script heeds no rho, and is adaptive by default.
    ignored: ClassVar[tuple[str, ...]] = ("rho_min", "alpha", "rho", "adaptive", "print_freq")

    rho_max: float = option(2.0, "radius of the climb, in the scale of the weights", source="FT-SAM paper", low=0)
    label_smoothing: float = option(0.1, "label smoothing", source="BackdoorBench", low=0, high=1)

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        classes = clean.spec.num_classes
        # BackdoorBench's leaves the true class 1 - s; of torch's the true class gets a share, too.
        smoothing = min(1.0, self.label_smoothing * classes / (classes - 1))

        def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = model(x)
            return F.cross_entropy(logits, y, label_smoothing=smoothing), logits.detach().argmax(1) == y

        self.finetune(model, clean, monitor, "finetune", objective=objective, sam=Sam(self.rho_max, adaptive=True))
        return Repair(model)
