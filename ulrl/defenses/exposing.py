"""A stage of EBYD: expose a backdoor by unlearning the clean task in steps so small that the backdoor outlives it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ulrl.defenses.unlearning import Unlearning
from ulrl.options import option

_RELEASE = "EBYD release"


@dataclass(frozen=True)
class Exposing(Unlearning):
    """Clean unlearning as EBYD does it (arXiv 2410.19427): by Adam, at a rate of 1e-5.

    The release's bound on the gradient comes before the gradient and has no effect; here it has. It goes on for all its
    epochs; here it ends when no more is to be unlearned.
    """

    unlearning_lr: float = option(1e-5, "learning rate of exposing (Adam)", source=_RELEASE, low=0)
    steplr_milestones: tuple[int, ...] = option((20,), "epochs after which the rate drops", source=_RELEASE)
    clean_threshold: float = option(
        0.1, "expose until accuracy on the clean samples is at most this", source=_RELEASE, low=0, high=1
    )

    def ascent_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), self.unlearning_lr, weight_decay=self.wd)
