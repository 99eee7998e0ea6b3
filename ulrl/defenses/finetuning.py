"""The last stage of many defenses: fine-tune on the clean samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import Defense
from ulrl.options import option
from ulrl.training import (
    OPTIMIZERS,
    SCHEDULERS,
    Monitor,
    Objective,
    Sam,
    cross_entropy,
    fit,
    make_optimizer,
    make_scheduler,
)

_BENCH = "BackdoorBench"


@dataclass(frozen=True)
class FineTuning(Defense):
    """A defense that fine-tunes, and its options for that. Defaults are BackdoorBench's for CIFAR-10."""

    batch_size: int = option(256, "clean images per step", source=_BENCH, low=2)
    epochs: int = option(100, "fine-tuning epochs", source=_BENCH, low=1)
    lr: float = option(0.01, "learning rate", source=_BENCH, low=0)
    lr_scheduler: str = option("CosineAnnealingLR", "rate over the epochs", source=_BENCH, choices=SCHEDULERS)
    steplr_milestones: tuple[int, ...] = option((), "MultiStepLR: epochs after which the rate drops")
    steplr_gamma: float = option(0.1, "MultiStepLR: factor of each drop", source=_BENCH, low=0)
    client_optimizer: str = option("sgd", "optimiser", source=_BENCH, choices=OPTIMIZERS)
    sgd_momentum: float = option(0.9, "momentum of sgd", source=_BENCH, low=0, high=1)
    wd: float = option(5e-4, "weight decay", source=_BENCH, low=0)

    def finetune(
        self,
        model: nn.Module,
        clean: ImageSet,
        monitor: Monitor,
        stage: str,
        *,
        epochs: int | None = None,
        lr: float | None = None,
        objective: Objective = cross_entropy,
        clip: float | None = None,
        sam: Sam | None = None,
        after_step: Callable[[], None] | None = None,
    ) -> None:
        """Train every weight of `model`, in place, for `self.epochs` at `self.lr`, or as named."""
        epochs, lr = epochs or self.epochs, self.lr if lr is None else lr
        optimizer = make_optimizer(model, self.client_optimizer, lr, self.sgd_momentum, self.wd)
        scheduler = make_scheduler(optimizer, self.lr_scheduler, epochs, self.steplr_milestones, self.steplr_gamma)
        fit(
            model, self.batches(clean, stage), epochs, optimizer, scheduler, monitor, stage, amp=self.amp,
            objective=objective, clip=clip, sam=sam, after_step=after_step,
        )  # fmt: skip


def hold_norm(weight: torch.Tensor) -> Callable[[], None]:
    """A function of no arguments that scales `weight`, in place, back to the L2 norm that it has now."""
    norm = weight.detach().norm()

    @torch.no_grad()
    def hold() -> None:
        weight.mul_(norm / weight.norm().clamp_min(1e-12))

    return hold
