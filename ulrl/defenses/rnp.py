"""RNP: unlearn, recover by masks alone, and prune the channels that masked themselves (Li et al., arXiv 2305.14876)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import Repair, register
from ulrl.defenses.mask_pruning import MaskPruning
from ulrl.defenses.masks import clamp, masked, norm_layers
from ulrl.defenses.unlearning import Unlearning
from ulrl.options import option
from ulrl.training import Monitor, fit

_RELEASE = "RNP release"


@register("rnp")
@dataclass(frozen=True)
class RNP(MaskPruning, Unlearning):
    """Reconstructive neuron pruning.

    1. Unlearn: gradient ascent on the clean samples until their accuracy is `clean_threshold`.
    2. Recover: on the unlearned net, train nothing but a mask in [0, 1] on each normalisation channel.
    3. Prune, in the original net: the scale of the channels whose mask is at most a threshold becomes 0.

    Unlearning's rate drops in steps, as in both releases: BackdoorBench's file names a cosine in vain, with which five
    epochs forget too little for any mask to fall (BadNets: ASR 91, and 0 without).

    The threshold is the greatest at which validation accuracy holds, or `pruning_number`. The release
    stops at the curve, and BackdoorBench always prunes at 0.7. Masks are compared as they are, not cut to
    four decimals. Unlearning's gradient is bounded, as the release means to do; there the bound comes before the
    gradient and has no effect.
    """

    # BackdoorBench's file has them in vain.
    ignored: ClassVar[tuple[str, ...]] = ("epochs", "lr", "lr_scheduler", "client_optimizer")

    alpha: float = option(0.2, "weight of the loss in recovering", source=_RELEASE, low=0)
    recovering_lr: float = option(0.2, "learning rate of recovering", source=_RELEASE, low=0)
    recovering_epochs: int = option(20, "recovering epochs", source=_RELEASE, low=1)

    def check(self, model: nn.Module, clean: ImageSet) -> None:
        norm_layers(model)

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        train, validation = self.set_aside(clean)
        unlearned = self.unlearn(model, train, monitor)
        values = self._recover(unlearned.model, train, monitor)
        return self.prune(model, values, validation, monitor, unlearned.evidence)

    def _recover(self, unlearned: nn.Module, clean: ImageSet, monitor: Monitor) -> dict[str, torch.Tensor]:
        """The mask of each normalisation layer, by its dotted name, after training them alone."""
        with masked(unlearned) as masks:
            values = [m.mask for m in masks]
            # A loss times alpha is, without weight decay, a rate times alpha.
            optimizer = torch.optim.SGD(values, self.recovering_lr * self.alpha, self.sgd_momentum)
            fit(
                unlearned, self.batches(clean, "recover"), self.recovering_epochs, optimizer,
                None, monitor, "recover",
                amp=self.amp, after_step=lambda: clamp(masks),
            )  # fmt: skip
        return {path: v.detach() for path, v in zip(norm_layers(unlearned), values, strict=True)}
