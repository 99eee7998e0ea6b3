"""EBYD's sample detection: Cognitive Distillation on the exposed model (Li et al., arXiv 2410.19427)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.defenses.exposing import Exposing
from ulrl.detectors.base import Scored, register
from ulrl.detectors.cd import CognitiveDistillation
from ulrl.training import Monitor


@register("ebyd")
@dataclass(frozen=True)
class ExposedDistillation(CognitiveDistillation, Exposing):
    """Expose the backdoor by unlearning the clean task with Adam, and score by the masks that keep those answers."""

    ignored: ClassVar[tuple[str, ...]] = ("cd_p", "client_optimizer")

    def score(self, model: nn.Module, suspects: ImageSet, clean: ImageSet, monitor: Monitor) -> Scored:
        exposed = self.unlearn(model, clean, monitor)
        return replace(super().score(exposed.model, suspects, clean, monitor), evidence=exposed.evidence)
