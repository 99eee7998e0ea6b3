"""BAN: fine-tune under the worst noise on the neurons, which activates backdoors (Xu et al., arXiv 2405.19928)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import Repair, register
from ulrl.defenses.finetuning import FineTuning
from ulrl.defenses.masks import SCALE_AND_SHIFT, Perturbed, masked, require_shifts, worst_noise
from ulrl.options import option
from ulrl.seeds import generator
from ulrl.training import SCHEDULERS, Monitor, cross_entropy

_RELEASE = "BAN release"


@register("ban")
@dataclass(frozen=True)
class BAN(FineTuning):
    """The mitigation of BAN: per batch,

    1. noise within `noise_eps` on the scale and the shift of every normalisation channel, relative to them, from a
       random start `noise_steps` signed steps up the loss (ANP's);
    2. one step of all weights down the clean loss + `noise_weight` * the loss under the noise.

    The noise never leaves its bound, as the paper says; in the release the line that would cut it back is commented
    out, so that it reaches twice `noise_eps`. As there, all passes are in train mode and move BatchNorm's
    statistics. The release's loop makes one epoch fewer than it is asked for. BAN's detection, by the answers of the
    noisy model to what a mask leaves of the features, is not here: no class is flagged.
    """

    batch_size: int = option(128, "clean images per step", source=_RELEASE, low=2)
    epochs: int = option(25, "fine-tuning epochs", source=_RELEASE, low=1)
    lr: float = option(0.005, "learning rate", source=_RELEASE, low=0)
    lr_scheduler: str = option("constant", "rate over the epochs", source=_RELEASE, choices=SCHEDULERS)
    noise_eps: float = option(0.3, "bound on the noise, relative to scale and shift", source=_RELEASE, low=0)
    noise_steps: int = option(1, "steps of the noise", source=_RELEASE, low=1)
    noise_weight: float = option(0.5, "weight of the loss under the noise", source=_RELEASE, low=0)

    def check(self, model: nn.Module, clean: ImageSet) -> None:
        require_shifts(model)

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        stream = generator(self.random_seed, "noise", clean.device)
        with masked(model, Perturbed, SCALE_AND_SHIFT, frozen=False) as masks:
            noises: list[torch.Tensor] = [m.noise for m in masks if isinstance(m, Perturbed)]
            for m in masks:
                m.mask.requires_grad_(False)

            def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                worst_noise(noises, lambda: cross_entropy(model, x, y)[0], self.noise_eps, self.noise_steps, stream)
                attacked, _ = cross_entropy(model, x, y)
                with torch.no_grad():
                    torch._foreach_zero_(noises)
                loss, right = cross_entropy(model, x, y)
                return loss + self.noise_weight * attacked, right

            self.finetune(model, clean, monitor, "tune", objective=objective, after_step=lambda: _silent(noises))
        return Repair(model)


@torch.no_grad()
def _silent(noises: list[torch.Tensor]) -> None:
    """No noise outlives a step, whatever the optimiser made of its gradient: between steps the model is judged."""
    torch._foreach_zero_(noises)
