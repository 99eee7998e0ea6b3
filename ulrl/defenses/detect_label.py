"""Which class a backdoor leads to: the one that remains when the clean task is unlearned (RNP, arXiv 2305.14876)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import Repair, register
from ulrl.defenses.unlearning import Unlearning
from ulrl.training import Monitor


@register("detect_label")
@dataclass(frozen=True)
class DetectLabel(Unlearning):
    """RNP's backdoor label detection: unlearn a copy of the model on the clean samples, and flag the class
    that it then gives most of them. The model itself is left as it was.

    A class is flagged whether or not there is a backdoor; `detected_share` says how many agree on it, and
    without a backdoor they agree as well.
    """

    repairs: ClassVar[bool] = False
    ignored: ClassVar[tuple[str, ...]] = ("client_optimizer",)  # the releases' files name unlearning's, sgd

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        unlearned = self.unlearn(model, clean, monitor)
        return Repair(model, [unlearned.label], unlearned.evidence)
