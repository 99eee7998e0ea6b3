"""Cognitive Distillation: a trigger is all that a prediction needs of an image (Huang et al., arXiv 2301.10908)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ulrl.data.batches import Batches
from ulrl.data.imageset import ImageSet
from ulrl.defenses.perturbation import mean_pixel, pixel, squash, still
from ulrl.detectors.base import Detector, Scored, register
from ulrl.machine import autocast, eval_batch
from ulrl.options import option
from ulrl.seeds import generator
from ulrl.training import Monitor

_RELEASE = "release"


@register("cd")
@dataclass(frozen=True)
class CognitiveDistillation(Detector):
    """Per image the smallest mask under which the logits stay as they are; a small one is suspicious.

    What the mask hides is a colour drawn anew at each step. Adam minimises the mean |change of a logit| +
    gamma |mask|_1 + beta (its total variation, squared, per pixel). The score is the negative sum of the mask.
    """

    ignored: ClassVar[tuple[str, ...]] = (*Detector.ignored, "cd_p")  # always 1

    cd_num_steps: int = option(100, "steps", source="paper", low=1)
    cd_lr: float = option(0.1, "learning rate of the masks (Adam)", source="paper", low=0)
    cd_gamma: float = option(0.01, "weight of a mask's sum", source="paper", low=0)
    cd_beta: float = option(1.0, "weight of its total variation", source=_RELEASE, low=0)

    def score(self, model: nn.Module, suspects: ImageSet, clean: ImageSet, monitor: Monitor) -> Scored:
        batches = Batches(suspects, eval_batch(suspects.device))
        device, stream = suspects.device, generator(self.random_seed, "hidden", suspects.device)
        mean, scale = mean_pixel(suspects), pixel(suspects)
        sizes = []
        with still(model), monitor.stage("distil", len(batches) * self.cd_num_steps) as progress:
            for x, _ in batches:
                raw = torch.ones(len(x), 1, *x.shape[2:], device=device, requires_grad=True)
                optimizer = torch.optim.Adam([raw], self.cd_lr, betas=(0.1, 0.1))
                with torch.no_grad(), autocast(device, self.amp):
                    wanted = model(x).float()
                for _ in range(self.cd_num_steps):
                    mask = squash(raw)
                    drawn = torch.rand(len(x), x.shape[1], 1, 1, generator=stream, device=device)
                    with autocast(device, self.amp):
                        answers = model(torch.lerp((drawn - mean) * scale, x, mask)).float()
                    changed = (answers - wanted).abs().mean(1)
                    loss = changed + self.cd_gamma * mask.flatten(1).sum(1) + self.cd_beta * _variation(mask)
                    optimizer.zero_grad()
                    loss.sum().backward()  # each mask has a gradient of its own
                    optimizer.step()
                    progress.step()
                sizes.append(squash(raw.detach()).flatten(1).sum(1))
        return Scored(-torch.cat(sizes))


def _variation(mask: torch.Tensor) -> torch.Tensor:
    """The squared differences of neighbours, summed, per pixel: [B, 1, H, W] to [B]."""
    down, across = mask.diff(dim=2), mask.diff(dim=3)
    return (down.square().flatten(1).sum(1) + across.square().flatten(1).sum(1)) / mask[0].numel()
