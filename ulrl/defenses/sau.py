"""SAU: unlearning of shared adversarial examples (Wei et al., arXiv 2307.10562)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import Defense, Repair, register
from ulrl.defenses.perturbation import pixel, still
from ulrl.models.copying import copied
from ulrl.options import option
from ulrl.training import Monitor, fit


@register("sau")
@dataclass(frozen=True)
class SAU(Defense):
    """Unlearn the adversarial examples that fool the model and the backdoored one alike.

    Per batch:
    1. Perturbations within L-infinity `trigger_norm` (pixels in [0, 1]) are driven, in `adv_steps` signed
       steps, to mislead both models into the same class.
    2. One Adam step on lmd_1 * clean loss + lmd_2 * adversarial loss - lmd_3 * log(1 - p), where p is the probability
       that the model still gives the class that the backdoored one was misled into; 0 where that was not misled.

    The defaults are the paper's, as its author put them into BackdoorBench: BatchNorm's statistics stay as
    they are, the clean samples are not augmented, and the last round is kept.
    """

    ignored: ClassVar[tuple[str, ...]] = (
        "epochs", "lr_scheduler", "client_optimizer", "sgd_momentum", "wd", "adam_betas", "norm_type",
        "pgd_init", "outer_steps",
    )  # fmt: skip

    lr: float = option(1e-4, "learning rate (Adam)", source="paper", low=0)
    n_rounds: int = option(100, "passes over the clean samples", source="BackdoorBench", low=1)
    trigger_norm: float = option(0.2, "L-infinity bound on a perturbation, pixels in [0, 1]", source="paper", low=0)
    adv_lr: float = option(0.2, "step of the attack", source="paper", low=0)
    adv_steps: int = option(5, "steps of the attack", source="paper", low=1)
    beta_1: float = option(0.01, "attack: weight of fooling either model", source="paper", low=0)
    beta_2: float = option(1.0, "attack: weight of both models agreeing", source="paper", low=0)
    lmd_1: float = option(1.0, "weight of the clean loss", source="paper", low=0)
    lmd_2: float = option(0.0, "weight of the adversarial loss", source="paper", low=0)
    lmd_3: float = option(1.0, "weight of the shared loss", source="paper", low=0)

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        scale = pixel(clean)
        fooled = torch.zeros(2, device=clean.device)  # shared examples, and all, of the whole run
        reference = copied(model)

        def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            model.eval()
            worst, given_x, given_worst = self._attack(model, reference, x, y, scale)
            logits, attacked = model(torch.cat([x, worst])).float().chunk(2)
            misled = (given_worst != y) & (given_worst != given_x)
            shared = misled & (attacked.detach().argmax(1) == given_worst)
            fooled.add_(torch.stack([shared.sum(), misled.new_tensor(len(y), dtype=torch.int64)]))
            agreeing = attacked.softmax(1).gather(1, given_worst[:, None]).squeeze(1)
            unlearned = -((1 - agreeing).clamp(1e-6, 0.999).log() * misled).mean()
            loss = self.lmd_1 * F.cross_entropy(logits, y) + self.lmd_3 * unlearned
            if self.lmd_2:
                loss = loss + self.lmd_2 * F.cross_entropy(attacked, y)
            return loss, logits.detach().argmax(1) == y

        with still(reference):
            optimizer = torch.optim.Adam(model.parameters(), self.lr)
            fit(
                model, self.batches(clean, "unlearn", augmented=False), self.n_rounds, optimizer,
                None, monitor, "unlearn",
                amp=self.amp, objective=objective,
            )  # fmt: skip
        shared, count = fooled.tolist()
        return Repair(model, evidence={"shared": shared / count})

    def _attack(
        self, model: nn.Module, reference: nn.Module, x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(perturbed images, the class that the reference gives each image, and each perturbed one)."""
        with still(model):
            with torch.no_grad():
                own, given = model(x).argmax(1), reference(x).argmax(1)
            delta = torch.full_like(x, self.trigger_norm)
            for _ in range(self.adv_steps):
                delta.requires_grad_(True)
                logits, theirs = (net(x + delta * scale).float() for net in (model, reference))
                classes, their_classes = logits.detach().argmax(1), theirs.detach().argmax(1)
                holds, they_hold = classes == own, their_classes == given
                fooling = F.cross_entropy(logits, y, reduction="none") * holds
                fooling = fooling + F.cross_entropy(theirs, y, reduction="none") * they_hold
                apart = ~(~holds & ~they_hold & (classes == their_classes))
                loss = (-self.beta_1 / 2 * fooling + self.beta_2 * _divergence(logits, theirs) * apart).sum()
                (gradient,) = torch.autograd.grad(loss, delta)
                delta = (delta.detach() - self.adv_lr * gradient.sign()).clamp(-self.trigger_norm, self.trigger_norm)
            worst = x + delta * scale
            with torch.no_grad():
                return worst, given, reference(worst).argmax(1)


def _divergence(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence of the distributions that two batches of logits [B, K] stand for: [B]."""
    p, q = a.softmax(1).clamp_min(1e-8), b.softmax(1).clamp_min(1e-8)
    middle = ((p + q) / 2).log()
    return (p * (p.log() - middle) + q * (q.log() - middle)).sum(1) / 2
