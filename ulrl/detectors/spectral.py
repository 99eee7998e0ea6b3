"""Spectral signatures: poisoned images lead the spectrum of their class's features (Tran et al., arXiv 1811.00636)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.detectors.base import Detector, Scored, register
from ulrl.detectors.features import features_by_class
from ulrl.models.head import find_head
from ulrl.training import Monitor


@register("spectral")
@dataclass(frozen=True)
class Spectral(Detector):
    """Per label, the squared projection of an image's centred features on their first right singular vector.

    The features are those that the head is given. The paper then removes 1.5 times the expected number of poisoned
    images from each class; here the scores are the answer, as they are.
    """

    ignored: ClassVar[tuple[str, ...]] = (*Detector.ignored, "percentile")

    def check(self, model: nn.Module, clean: ImageSet) -> None:
        find_head(model, clean.spec.num_classes)

    def score(self, model: nn.Module, suspects: ImageSet, clean: ImageSet, monitor: Monitor) -> Scored:
        scores = torch.zeros(len(suspects), device=suspects.device)
        with monitor.stage("decompose", suspects.spec.num_classes) as progress:
            for _, at, features in features_by_class(model, suspects, self.amp):
                centred = features - features.mean(0)
                _, _, directions = torch.linalg.svd(centred, full_matrices=False)
                scores[at] = (centred @ directions[0]).square()
                progress.step()
        return Scored(scores)
