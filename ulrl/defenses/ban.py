"""BAN: fine-tune under the worst noise on the neurons, which activates backdoors (Xu et al., arXiv 2405.19928)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import OnHead, Repair, register
from ulrl.defenses.bti_dbf import task_gap
from ulrl.defenses.finetuning import FineTuning
from ulrl.defenses.masks import (
    SCALE_AND_SHIFT,
    Perturbed,
    losses_under_noise,
    masked,
    noises_of,
    require_shifts,
    silence_noise,
    worst_noise,
)
from ulrl.metrics import class_shares
from ulrl.models.copying import copied
from ulrl.models.head import head_answers
from ulrl.options import option
from ulrl.seeds import generator
from ulrl.training import SCHEDULERS, Monitor, cross_entropy, head_inputs

_RELEASE = "BAN release"


@register("ban")
@dataclass(frozen=True)
class BAN(OnHead, FineTuning):
    """Detection, on a copy, then mitigation.

    Detection: a mask on what the head is given is trained so that the masked features keep the task and the rest of
    them loses it. Then noise on the scale and the shift of every normalisation channel, relative to them, goes up the
    loss of one batch in `detection_steps` steps. A class that the noisy model then gives to more than `share_threshold`
    of the clean samples, from that rest of its features alone, is flagged.

    Mitigation, per batch:

    1. noise within `noise_eps`, from a random start `noise_steps` signed steps up the loss (ANP's);
    2. one step of all weights down the clean loss + `noise_weight` * the loss under the noise.

    The noise never leaves its bound, as the paper says; in the release the lines that would cut it back are commented
    out, so that it reaches twice `noise_eps`. As there, the noise is found in train mode, and mitigation moves
    BatchNorm's statistics. The release's loop makes one epoch fewer than it is asked for.

    The release has detection in a script of its own, which prints the share of each class and decides nothing: the
    threshold is ours. Its mask is one on the last feature map, before it is averaged, trained in train mode; ours is on
    the averages, of the model as it answers, which a model of any kind has.

    A share above the threshold is no finding by itself. Seen on 1% of clean samples, two draws of them: on
    `fashion_scenes` at width 16 five of twelve targets had more than half at least once (BadNets, adaptive Blended,
    BPP, SSBA, LF), and no class of two clean nets more than 0.36. But a class of a clean VGG19-BN had 0.97, and of nine
    clean nets of width 8 on Fashion-MNIST five had a class above 0.98. On the 8x8 digits one of twelve targets was
    above the threshold, and once a wrong class, of twelve clean nets none; ten of the targets had the largest share.
    """

    batch_size: int = option(128, "clean images per step", source=_RELEASE, low=2)
    epochs: int = option(25, "fine-tuning epochs", source=_RELEASE, low=1)
    lr: float = option(0.005, "learning rate", source=_RELEASE, low=0)
    lr_scheduler: str = option("constant", "rate over the epochs", source=_RELEASE, choices=SCHEDULERS)
    noise_eps: float = option(0.3, "bound on the noise, relative to scale and shift", source=_RELEASE, low=0)
    noise_steps: int = option(1, "steps of the noise", source=_RELEASE, low=1)
    noise_weight: float = option(0.5, "weight of the loss under the noise", source=_RELEASE, low=0)

    mask_steps: int = option(400, "steps of detection's mask (Adam)", source=_RELEASE, low=1)
    mask_lr: float = option(0.01, "learning rate of detection's mask", source=_RELEASE, low=0)
    mask_weight: float = option(0.75, "weight of detection's mask's norm", source=_RELEASE, low=0)
    detection_steps: int = option(30, "steps of detection's noise", source=_RELEASE, low=1)
    share_threshold: float = option(0.5, "share of the clean samples above which a class is flagged", low=0, high=1)

    def check(self, model: nn.Module, clean: ImageSet) -> None:
        require_shifts(model)
        super().check(model, clean)

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        shares = self._shares(copied(model), clean, monitor)
        suspect = int(shares.argmax())
        flagged = [suspect] if shares[suspect] > self.share_threshold else []
        self._mitigate(model, clean, monitor)
        return Repair(model, flagged, {"shares": shares.tolist()})

    def _shares(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> torch.Tensor:
        """Which share of the clean samples `model` under noise gives each class, from the features that the task does
        not need: float64 [K]. The model's statistics move.
        """
        head = self.head(model, clean)[1]
        features = head_inputs(model, head, clean, self.amp)
        stream = generator(self.random_seed, "detect", clean.device)
        mask = torch.rand(features.shape[1], generator=stream, device=clean.device).requires_grad_()
        optimizer = torch.optim.Adam([mask], self.mask_lr)
        with monitor.stage("detect", self.mask_steps) as progress:
            for _ in range(self.mask_steps):
                drawn = torch.randint(len(clean), (self.batch_size,), generator=stream, device=clean.device)
                gap, norm = task_gap(head, features[drawn], clean.labels[drawn], mask), mask.sum()
                optimizer.zero_grad()
                (gap + self.mask_weight * norm / norm.detach().clamp_min(1e-12)).backward()
                optimizer.step()
                with torch.no_grad():
                    mask.clamp_(0, 1)
                progress.step()
        model.train()
        x, y = next(iter(self.batches(clean, "detect", augmented=False)))
        with masked(model, Perturbed, SCALE_AND_SHIFT) as masks:
            worst_noise(
                noises_of(masks), lambda: cross_entropy(model, x, y)[0], self.noise_eps, self.detection_steps, stream
            )
            noisy = head_inputs(model, head, clean, self.amp)
        classes = head_answers(head, (1 - mask.detach()) * noisy).argmax(1)
        return class_shares(classes, clean.spec.num_classes)

    def _mitigate(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> None:
        stream = generator(self.random_seed, "noise", clean.device)
        with masked(model, Perturbed, SCALE_AND_SHIFT, weights_too=True) as masks:
            noises = noises_of(masks)
            for m in masks:
                m.mask.requires_grad_(False)

            def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                steps = self.noise_steps
                attacked, loss, right = losses_under_noise(model, x, y, noises, self.noise_eps, steps, stream)
                return loss + self.noise_weight * attacked, right

            # No noise outlives a step, whatever the optimiser makes of its gradient: between steps the model is judged.
            self.finetune(model, clean, monitor, "tune", objective=objective, after_step=lambda: silence_noise(noises))
