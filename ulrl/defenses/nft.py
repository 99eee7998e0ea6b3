"""NFT: train masks on the channels, and nothing else, with MixUp, neural mask fine-tuning (arXiv 2407.10052)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import Defense, Repair, register
from ulrl.defenses.mask_pruning import mask_table
from ulrl.defenses.masks import Mask, masked, norm_layers, scale
from ulrl.models.copying import copied
from ulrl.options import option
from ulrl.seeds import generator
from ulrl.training import Monitor, fit

_RELEASE = "NFT release"


@register("nft")
@dataclass(frozen=True)
class NFT(Defense):
    """Train a mask on the scale of each normalisation channel, ones at first, and multiply it in (Karim et al.).

    Each batch is mixed with itself in another order, by one share drawn uniformly (MixUp with alpha 1). The loss is
    the mixed cross-entropy + `penalty` / (clean samples per class) * sum |1 - mask|. After every step the masks of
    the l-th layer (from 1) are cut to [`alpha` * exp(-`beta` * l), 1]: later layers may lose more of their channels.

    As in the release the masks sit on BatchNorm's scale, BatchNorm's statistics move, and the rate falls to
    `lr_min` on a cosine; there it does so in five stairs, and batches are drawn with replacement. Its training loop
    adds to two names that it never sets, so that it cannot have run as it stands.
    """

    steps: int = option(1000, "steps, rounded to whole passes over the clean samples", source=_RELEASE, low=1)
    lr: float = option(0.05, "learning rate of the masks", source=_RELEASE, low=0)
    lr_min: float = option(0.02, "where it ends", source=_RELEASE, low=0)
    sgd_momentum: float = option(0.95, "momentum of the masks", source=_RELEASE, low=0, high=1)
    penalty: float = option(0.001, "weight of the distance of the masks from 1", source=_RELEASE, low=0)
    alpha: float = option(0.8, "least mask, before it shrinks with depth", source=_RELEASE, low=0, high=1)
    beta: float = option(0.5, "how fast it shrinks", source=_RELEASE, low=0)

    def check(self, model: nn.Module, clean: ImageSet) -> None:
        norm_layers(model)

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        batches = self.batches(clean, "mask")
        epochs = max(1, round(self.steps / len(batches)))
        stream = generator(self.random_seed, "mix", clean.device)
        weight = self.penalty * clean.spec.num_classes / len(clean)
        learning = copied(model)  # a masked model has its tensors in another order afterwards
        with masked(learning) as masks:

            def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                share = torch.rand((), generator=stream, device=x.device)
                order = torch.randperm(len(x), generator=stream, device=x.device)
                logits = model(share * x + (1 - share) * x[order])
                mixed = share * F.cross_entropy(logits, y) + (1 - share) * F.cross_entropy(logits, y[order])
                given = logits.detach().argmax(1)
                distance = torch.stack([(1 - m.mask).abs().sum() for m in masks]).sum()
                return mixed + weight * distance, torch.where(share >= 0.5, given == y, given == y[order])

            optimizer = torch.optim.SGD([m.mask for m in masks], self.lr, self.sgd_momentum)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, self.lr_min)
            fit(
                learning, batches, epochs, optimizer, schedule, monitor, "mask",
                amp=self.amp, objective=objective, after_step=lambda: self._cut(masks),
            )  # fmt: skip
            values = [m.mask.detach() for m in masks]
        model.load_state_dict(learning.state_dict())  # BatchNorm's statistics
        by_layer = dict(zip(norm_layers(model), values, strict=True))
        scale(model, by_layer)
        table = mask_table(by_layer)
        evidence = {"channels": len(table), "mean_mask": float(table["mask"].mean())}
        return Repair(model, evidence=evidence, tables={"masks": table})

    @torch.no_grad()
    def _cut(self, masks: list[Mask]) -> None:
        for layer, m in enumerate(masks, 1):
            m.mask.clamp_(self.alpha * math.exp(-self.beta * layer), 1)
