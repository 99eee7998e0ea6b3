"""Harden: keep the answers to plain images, and learn to give them whatever lies over the image."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn

from ulrl.data.batches import normalise, pixels
from ulrl.data.imageset import DatasetSpec, ImageSet
from ulrl.defenses.base import Repair, register
from ulrl.defenses.corruptions import Draws, Learning, corrupt
from ulrl.defenses.finetuning import FineTuning
from ulrl.defenses.ulrl import ULRL, flagged_classes, redraw
from ulrl.models.head import find_head
from ulrl.options import option
from ulrl.training import Monitor, fit, make_optimizer, make_scheduler

_NEVER = -1e4  # the logit of a class that is left out


@register("harden")
@dataclass(frozen=True)
class Harden(FineTuning):
    """Fine-tune on plain and corrupted clean images, towards the labels and the model's own answers to the plain ones.

    A backdoor is a corruption that the model obeys. Of each batch one half stays plain; of the other one part is
    corrupted at random (fields, other images, patches, warps, waves, tones, levels, noise, filters) and one part by
    corruptions that learn what hurts (see `corruptions`), of which the trigger is the steepest. The loss is

        `label_weight` * cross-entropy + KL(original on the plain image || model)
        + `keep_weight` * KL at temperature `temperature` over the plain half.

    The original is asked about plain images only, so it never answers a trigger; the last term holds the function
    where there is nothing to mend, without which two to three points of accuracy are lost. The classes that ULRL's
    diagnosis flags have their rows of the head drawn anew beforehand, `alpha` times their cosine with what they were is
    added, and on images of other classes they are left out of both divergences: how much of its target the original
    sees there is part of the backdoor, and brings it back. Without a flagged class, or with a wrong one,
    the rest works all the same. At the end BatchNorm's statistics are taken anew from plain images.

    The weights and the corruptions were chosen by ASR and accuracy on four development records (BadNets, Blended,
    WaNet, SSBA on fashion_scenes, see docs/method.md), and are the same for all; a run sees clean samples only.
    """

    batch_size: int = option(128, "clean images per step, half of them corrupted", low=2)
    epochs: int = option(60, "epochs", low=1)
    lr: float = option(0.04, "learning rate", low=0)
    label_weight: float = option(1.0, "weight of the labels", low=0)
    keep_weight: float = option(3.0, "weight of keeping the softened answers to plain images", low=0)
    temperature: float = option(4.0, "softness of those answers", low=1)
    learning_share: float = option(0.5, "share of the corruptions that learn", low=0, high=1)
    init: bool = option(True, "draw the flagged classes' rows of the head anew")
    alpha: float = option(0.5, "weight of the redrawn rows' cosine with what they were", low=0)
    clip: float = option(5.0, "bound on the gradient norm", low=0)
    linear_name: str | None = option(None, "dotted name of the classifier head, found when not given")

    def check(self, model: nn.Module, clean: ImageSet) -> None:
        find_head(model, clean.spec.num_classes, self.linear_name)

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        name, head = find_head(model, clean.spec.num_classes, self.linear_name)
        original = copy.deepcopy(model).eval().requires_grad_(False)
        diagnosis = ULRL(
            batch_size=self.batch_size, amp=self.amp, random_seed=self.random_seed, linear_name=self.linear_name
        )
        neurons, unlearned, spread = diagnosis.diagnose(model, clean, monitor)
        flagged = flagged_classes(neurons)
        suspicious = torch.zeros(clean.spec.num_classes, dtype=torch.bool, device=clean.device)
        suspicious[flagged] = True
        likeness = redraw(head, flagged if self.init else [], self.random_seed)
        draws = Draws(self.random_seed, clean.device)
        learning = Learning(draws)

        def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            plain = len(x) // 2
            with torch.autocast(x.device.type, enabled=False):
                corrupted = self._corrupt(x[plain:], clean.spec, draws, learning)
            hidden = suspicious & ~suspicious[y][:, None]
            answers = original(x).float().masked_fill(hidden, _NEVER)
            logits = model(torch.cat([x[:plain], corrupted])).float()
            told = logits.masked_fill(hidden, _NEVER)
            loss = self.label_weight * F.cross_entropy(logits, y) + _divergence(told, answers, 1)
            kept = _divergence(told[:plain], answers[:plain], self.temperature) * plain / len(x)
            return loss + self.keep_weight * kept + self.alpha * likeness(), logits.detach().argmax(1) == y

        optimizer = make_optimizer(model, self.client_optimizer, self.lr, self.sgd_momentum, self.wd)
        scheduler = make_scheduler(optimizer, self.lr_scheduler, self.epochs, self.steplr_milestones, self.steplr_gamma)
        fit(
            model, self.batches(clean, "harden"), self.epochs, optimizer, scheduler, monitor, "harden", amp=self.amp,
            objective=objective, clip=self.clip or None, after_step=learning.step,
        )  # fmt: skip
        statistics = self.batches(clean, "statistics")
        update_bn((batch for _ in range(3) for batch in statistics), model)
        evidence = {"head": name, **unlearned.evidence, "reinitialised": flagged if self.init else [], **spread}
        return Repair(model, flagged, evidence, {"neurons": neurons})

    def _corrupt(self, x: torch.Tensor, spec: DatasetSpec, draws: Draws, learning: Learning) -> torch.Tensor:
        """Normalised images in and out: the first at random, the last `learning_share` by what learns."""
        images = (pixels(x, spec) / 255).clamp(0, 1)
        first = len(x) - round(self.learning_share * len(x))
        changed = torch.cat([corrupt(images[:first], draws), learning.apply(images[first:])])
        return normalise(changed * 255, spec)


def _divergence(logits: torch.Tensor, answers: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(answers || logits), both [B, K], softened, and of the size of the plain one (arXiv 1503.02531)."""
    ours, its = F.log_softmax(logits / temperature, 1), F.log_softmax(answers / temperature, 1)
    return F.kl_div(ours, its, log_target=True, reduction="batchmean") * temperature**2
