"""The patch that a backdoor answers to, inverted on the unlearned model (RNP, Li et al., arXiv 2305.14876)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import Repair, register
from ulrl.defenses.inversion import Inverting
from ulrl.defenses.unlearning import Unlearning
from ulrl.training import Monitor, logits


class Calibrated(nn.Module):
    """A model whose mean logits on some clean samples are subtracted, so that none of its classes is ahead there."""

    def __init__(self, model: nn.Module, clean: ImageSet, amp: bool) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("usual", logits(model, clean, amp).mean(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answers: torch.Tensor = self.model(x) - self.usual
        return answers


@register("recover_trigger")
@dataclass(frozen=True)
class RecoverTrigger(Inverting, Unlearning):
    """RNP's trigger recovery: unlearn a copy of the model, and invert a trigger for the class that is left.

    1. Unlearn a copy of the model on the clean samples; the class that it gives most of them is the backdoor's.
    2. Invert for that class a mask and a pattern on that copy, as Neural Cleanse does for each class on the original.

    RNP's release has no recovery. That copy gives its class to nearly all clean samples, so that on it as it is the
    empty mask succeeds (measured); therefore its mean logits on them are subtracted first. And the ascent has to be
    gentle: at the release's rate a narrow net loses its backdoor, too. The model itself is left as it was.
    """

    repairs: ClassVar[bool] = False
    ignored: ClassVar[tuple[str, ...]] = ("client_optimizer",)  # the releases' files name unlearning's, sgd

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        unlearned = self.unlearn(model, clean, monitor)
        exposed = Calibrated(unlearned.model, clean, self.amp)
        found = self.invert(exposed, clean, monitor, [unlearned.label])
        size, reached = found.masks.sum().item(), bool(found.reached.all())
        evidence = {**unlearned.evidence, "mask_norm": size, "reached": reached}
        return Repair(model, [unlearned.label], evidence, triggers=found.triggers(clean))
