"""RNP's sample detection: who has unlearned the clean task still knows the poisoned (Li et al., arXiv 2305.14876)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.defenses.unlearning import Unlearning
from ulrl.detectors.base import Detector, Scored, register
from ulrl.training import Monitor, logits


@register("rnp")
@dataclass(frozen=True)
class RNPSamples(Detector, Unlearning):
    """Unlearn a copy of the model on the clean samples; the score is the negative loss under it, with the given label.

    Only the backdoor is left in the unlearned model, so poisoned samples have a low loss, and clean ones a high one.
    """

    ignored: ClassVar[tuple[str, ...]] = ("client_optimizer",)  # the releases' files name unlearning's, sgd

    def score(self, model: nn.Module, suspects: ImageSet, clean: ImageSet, monitor: Monitor) -> Scored:
        unlearned = self.unlearn(model, clean, monitor)
        losses = F.cross_entropy(logits(unlearned.model, suspects, self.amp), suspects.labels, reduction="none")
        return Scored(-losses, unlearned.evidence)
