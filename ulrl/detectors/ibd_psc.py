"""IBD-PSC: a trigger's prediction stands when the net's own scales are amplified (Hou et al., arXiv 2405.09786)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.defenses.masks import norm_layers
from ulrl.detectors.base import Detector, Scored, register
from ulrl.options import option
from ulrl.training import Monitor, accuracy, logits, predict


@register("ibd-psc")
@dataclass(frozen=True)
class IBDPSC(Detector):
    """The mean confidence in the model's own prediction over nets whose last normalisation layers are amplified.

    Scale and shift of the last k layers are multiplied, where k is the least at which more than `error` of the clean
    samples are read wrong; the copies have k, k + 1, ... layers amplified, as in the paper (one more each in
    its release). Where no k does that, the copies are the most amplified ones.
    """

    copies: int = option(5, "amplified nets", source="paper", low=1)
    amplification: float = option(1.5, "factor of scale and shift", source="paper", low=1)
    error: float = option(0.6, "share of clean samples that the first copy must misread", source="paper", low=0, high=1)

    def check(self, model: nn.Module, clean: ImageSet) -> None:
        norm_layers(model)

    @torch.no_grad()
    def score(self, model: nn.Module, suspects: ImageSet, clean: ImageSet, monitor: Monitor) -> Scored:
        given, amplified = predict(model, suspects, self.amp), copy.deepcopy(model)
        layers: list[list[torch.Tensor]] = [
            list(layer.parameters(recurse=False)) for layer in reversed(norm_layers(amplified).values())
        ]
        last, first = max(0, len(layers) - self.copies), None
        confidence, copies = torch.zeros(len(suspects), device=suspects.device), 0
        with monitor.stage("amplify", len(layers)) as progress:
            for i, parameters in enumerate(layers):
                torch._foreach_mul_(parameters, self.amplification)
                if first is None and (i >= last or 1 - accuracy(amplified, clean, self.amp) > self.error):
                    first = i
                if first is not None:
                    confidence += logits(amplified, suspects, self.amp).softmax(1).gather(1, given[:, None])[:, 0]
                    copies += 1
                progress.step()
                if copies == self.copies:
                    progress.reached()
                    break
        return Scored(confidence / copies, {"first_amplified": (first or 0) + 1, "copies": copies})
