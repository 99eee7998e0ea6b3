"""ABL: anti-backdoor learning, on the poisoned training set itself (Li et al., arXiv 2110.11571)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from ulrl.data.batches import Batches
from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import Defense, Repair, register
from ulrl.errors import UserError
from ulrl.machine import autocast, eval_batch
from ulrl.options import option
from ulrl.seeds import global_stream
from ulrl.training import Monitor, cross_entropy, fit, make_optimizer, make_scheduler


@register("abl")
@dataclass(frozen=True)
class ABL(Defense):
    """Train a fresh model on a training set that may be poisoned, so that the backdoor is not learnt.

    1. Tune: train, without augmentation, with a batch's loss held at `gamma` (local gradient ascent) or at
       `flooding`; only what is learnt fastest, the poisoned samples, falls far below.
    2. Isolate the `isolation_ratio` of the samples with the lowest loss.
    3. Fine-tune on the others (the rate falls to a tenth after two thirds of the epochs).
    4. Unlearn: gradient ascent on the isolated ones, until the model gives none of them its label.

    The architecture is that of the model it is given, the weights are drawn anew. The paper writes the ascent
    of stage 1 per sample, which (measured) holds the poisoned ones back as well; as in the release, the
    sign is that of a batch. Fine-tuning is the release's addition; its rates (the release begins at 0.1) and the
    augmentation in stage 4 (the release has none) are those that BackdoorBench runs with, whatever its YAML
    says. The end of stage 4 is ours: the loss that it drives up has no bound.
    """

    ignored: ClassVar[tuple[str, ...]] = (
        "epochs", "lr_scheduler", "client_optimizer", "sgd_momentum", "wd", "finetuning_ascent_model",
    )  # fmt: skip

    in_training: ClassVar[bool] = True

    batch_size: int = option(64, "images per step", source="paper", low=2)
    tuning_epochs: int = option(20, "epochs of stage 1", source="paper", low=1)
    finetuning_epochs: int = option(60, "epochs of stage 3", source="ABL release", low=1)
    unlearning_epochs: int = option(20, "epochs of stage 4 at most", source="BackdoorBench", low=1)
    lr: float = option(0.1, "learning rate of stage 1", source="paper", low=0)
    lr_finetuning_init: float = option(0.01, "learning rate of stage 3 at first", source="BackdoorBench", low=0)
    lr_unlearning_init: float = option(5e-4, "learning rate of stage 4", source="ABL release", low=0)
    momentum: float = option(0.9, "momentum (Nesterov)", source="paper", low=0, high=1)
    weight_decay: float = option(1e-4, "weight decay", source="paper", low=0)
    gradient_ascent_type: str = option("LGA", "loss of stage 1", source="paper", choices=("LGA", "Flooding"))
    gamma: float = option(0.5, "LGA: loss at which a batch is held", source="paper", low=0)
    flooding: float = option(0.5, "Flooding: loss at which a batch is held", source="paper", low=0)
    isolation_ratio: float = option(0.01, "share of the samples to isolate", source="paper", low=0, high=0.5)

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        """`clean` is the poisoned training set."""
        isolated = round(self.isolation_ratio * len(clean))
        if isolated < 2:
            raise UserError(f"--isolation_ratio {self.isolation_ratio} of {len(clean)} images is less than two")
        model = fresh_weights(model, self.random_seed, "initialisation")
        self._fit(model, clean, monitor, "tune")
        losses = _losses(model, clean, self.amp)
        order = losses.argsort(stable=True)
        self._fit(model, clean.subset(order[isolated:]), monitor, "finetune")
        self._fit(model, clean.subset(order[:isolated]), monitor, "unlearn")
        chosen = order[:isolated]
        table = pd.DataFrame({"label": clean.labels[chosen].cpu().numpy(), "loss": losses[chosen].cpu().numpy()})
        table.index = pd.Index(chosen.cpu().numpy(), name="sample")
        counts = table["label"].value_counts()
        evidence = {"isolated": isolated, "isolated_by_class": {str(k): int(n) for k, n in counts.items()}}
        return Repair(model, evidence=evidence, tables={"isolated": table})

    def _fit(self, model: nn.Module, data: ImageSet, monitor: Monitor, stage: str) -> None:
        lr, epochs = {
            "tune": (self.lr, self.tuning_epochs),
            "finetune": (self.lr_finetuning_init, self.finetuning_epochs),
            "unlearn": (self.lr_unlearning_init, self.unlearning_epochs),
        }[stage]
        optimizer = make_optimizer(model, "sgd", lr, self.momentum, self.weight_decay, nesterov=True)
        batches = self.batches(data, stage, augmented=stage != "tune")
        milestones = (round(epochs * 2 / 3),) if stage == "finetune" else ()
        fit(
            model, batches, epochs, optimizer,
            make_scheduler(optimizer, "MultiStepLR", epochs, milestones), monitor, stage, amp=self.amp,
            objective=self._held if stage == "tune" else cross_entropy, ascend=stage == "unlearn",
            stop=(lambda accuracy: accuracy == 0) if stage == "unlearn" else None,
        )  # fmt: skip

    def _held(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The objective of stage 1."""
        loss, right = cross_entropy(model, x, y)
        if self.gradient_ascent_type == "LGA":
            return (loss - self.gamma).sign() * loss, right
        return (loss - self.flooding).abs() + self.flooding, right


def fresh_weights(model: nn.Module, seed: int, stream: str) -> nn.Module:
    """The architecture of `model` with weights drawn anew; parameters outside of torch's layers are N(0, 0.02)."""
    device = next(model.parameters()).device
    fresh = copy.deepcopy(model).cpu()
    with global_stream(seed, stream):
        for module in fresh.modules():
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if reset is not None:
                reset()
            else:
                for p in module.parameters(recurse=False):
                    nn.init.normal_(p, std=0.02)
    return fresh.to(device)


@torch.no_grad()
def _losses(model: nn.Module, data: ImageSet, amp: bool) -> torch.Tensor:
    """The cross-entropy of each image, as it is, in eval mode: float32 [N]."""
    model.eval()
    with autocast(data.device, amp):
        losses = [
            F.cross_entropy(model(x).float(), y, reduction="none") for x, y in Batches(data, eval_batch(data.device))
        ]
    return torch.cat(losses)
