"""SCALE-UP: a trigger's prediction stands when all pixels are multiplied (Guo et al., arXiv 2302.03251)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.detectors.base import Detector, Scored, register
from ulrl.errors import UserError
from ulrl.options import option
from ulrl.training import Monitor, predict


@register("scale-up")
@dataclass(frozen=True)
class ScaleUp(Detector):
    """The share of the scales at which an image, its pixels multiplied and cut at white, keeps its prediction.

    As in the paper's data-limited setting, that share is compared with its mean and deviation over the clean samples
    that are given the same class. A class with less than two of them, or whose shares are all equal, takes those of all
    classes, as the release always does.
    """

    scales: tuple[int, ...] = option((3, 5, 7, 9, 11), "factors of the pixel values", source="paper")

    def check(self, model: nn.Module, clean: ImageSet) -> None:
        if not self.scales or min(self.scales) < 1:
            raise UserError(f"--scales {' '.join(map(str, self.scales)) or 'none'}: give factors of at least 1")

    def score(self, model: nn.Module, suspects: ImageSet, clean: ImageSet, monitor: Monitor) -> Scored:
        with monitor.stage("scale", 2 * len(self.scales)) as progress:
            kept, given = self._consistency(model, suspects, progress.step)
            usual, classes = self._consistency(model, clean, progress.step)
        centre, spread = torch.empty((2, clean.spec.num_classes), device=clean.device)
        for k in range(clean.spec.num_classes):
            own = usual[classes == k]
            if len(own) < 2 or own.std() == 0:
                own = usual
            centre[k], spread[k] = own.mean(), own.std()
        return Scored((kept - centre[given]) / spread[given].clamp_min(1e-6))

    def _consistency(
        self, model: nn.Module, data: ImageSet, step: Callable[[], None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The share of the scales at which each image keeps its class, float [N], and that class, int64 [N]."""
        classes, kept = predict(model, data, self.amp), torch.zeros(len(data), device=data.device)
        for scale in self.scales:
            factor = min(scale, 255)  # a larger one makes white, too, all but what is black
            images = torch.where(data.images > 255 // factor, 255, data.images * factor)
            kept += predict(model, replace(data, images=images), self.amp) == classes
            step()
        return kept / len(self.scales), classes
