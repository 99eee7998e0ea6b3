"""NC: Neural Cleanse, triggers found by inversion and unlearned (Wang et al., IEEE S&P 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import torch
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import Repair, register
from ulrl.defenses.finetuning import FineTuning
from ulrl.defenses.inversion import Inverting
from ulrl.defenses.unlearning import robust_z
from ulrl.options import option
from ulrl.seeds import generator
from ulrl.training import Monitor, cross_entropy

_PAPER = "paper"


@register("nc")
@dataclass(frozen=True)
class NC(Inverting, FineTuning):
    """Find for every class the smallest patch that turns any image into it, and unlearn the suspicious ones.

    1. Invert: per class a mask and a pattern, by Adam on cross-entropy + cost * |mask|_1, where the cost rises while
       the patch succeeds and falls while it does not.
    2. Judge: classes whose mask is smaller than the median by more than `z_threshold` robust deviations.
    3. Unlearn: fine-tune with the found patch on `unlearning_ratio` of the images, under their true labels.
       No suspicious class: the model stays as it was.

    BackdoorBench saves the backdoored model instead of the one that it fine-tuned; here the repaired model
    is the result. Fine-tuning is as long as there; the paper's is one epoch over 10 % of the training images.
    """

    ignored: ClassVar[tuple[str, ...]] = (
        "early_stop", "EPSILON", "to_file", "n_times_test", "use_norm", "cleaning_ratio",
    )  # fmt: skip

    batch_size: int = option(256, "clean images per step", source="BackdoorBench", low=2)  # else that of the inversion
    z_threshold: float = option(2.0, "classes with a larger robust z are suspicious", source=_PAPER, low=0)
    unlearning_ratio: float = option(0.2, "share of images that get a patch", source=_PAPER, low=0, high=1)

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        found = self.invert(model, clean, monitor)
        sizes, reached = found.masks.flatten(1).sum(1).cpu(), found.reached.cpu()
        z, median, mad = robust_z(sizes)
        suspicious = (z > self.z_threshold) & (sizes < median) & reached
        table = pd.DataFrame(
            {
                "mask_norm": sizes.numpy(),
                "z": z.numpy(),
                "reached": reached.numpy(),
                "flagged": suspicious.numpy(),
            }
        )
        table.index.name = "class"
        flagged = table[table.flagged].sort_values("z", ascending=False).index.tolist()
        if flagged:
            self._unlearn(model, found.masks[flagged], found.patterns[flagged], clean, monitor)
        evidence = {"z_threshold": self.z_threshold, "median": median, "mad": mad, "reached": int(reached.sum())}
        return Repair(model, flagged, evidence, {"masks": table}, triggers=found.triggers(clean))

    def _unlearn(
        self, model: nn.Module, masks: torch.Tensor, patterns: torch.Tensor, clean: ImageSet, monitor: Monitor
    ) -> None:
        stream = generator(self.random_seed, "stamp", clean.device)

        def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            stamped = torch.rand(len(y), generator=stream, device=y.device) < self.unlearning_ratio
            which = torch.randint(len(masks), (len(y),), generator=stream, device=y.device)
            return cross_entropy(model, torch.lerp(x, patterns[which], masks[which] * stamped[:, None, None, None]), y)

        self.finetune(model, clean, monitor, "unlearn", objective=objective)
