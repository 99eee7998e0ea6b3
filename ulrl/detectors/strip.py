"""STRIP: a trigger outlives a second image laid over it (Gao et al., arXiv 1902.06531)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.detectors.base import Detector, Scored, register
from ulrl.options import option
from ulrl.seeds import generator
from ulrl.training import Monitor, logits


@register("strip")
@dataclass(frozen=True)
class STRIP(Detector):
    """Add clean images to each image, and take the mean entropy of the predictions: it is low where a trigger decides.

    Pixel values are added and cut at white, as in the release. The score is the negative entropy, in nats.
    """

    overlays: int = option(100, "clean images laid over each image, drawn anew for each", source="paper", low=1)

    def score(self, model: nn.Module, suspects: ImageSet, clean: ImageSet, monitor: Monitor) -> Scored:
        stream = generator(self.random_seed, "overlays", suspects.device)
        entropy = torch.zeros(len(suspects), device=suspects.device)
        with monitor.stage("overlay", self.overlays) as progress:
            for _ in range(self.overlays):
                drawn = torch.randint(len(clean), (len(suspects),), generator=stream, device=suspects.device)
                # uint8 addition wraps around where the sum is less than either part: there it is white.
                added = suspects.images + clean.images[drawn]
                added[added < suspects.images] = 255
                answers = logits(model, replace(suspects, images=added), self.amp).log_softmax(1)
                entropy -= (answers.exp() * answers).sum(1)
                progress.step()
        return Scored(-entropy / self.overlays)
