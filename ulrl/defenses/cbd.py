"""CBD: train past a net that learnt the backdoor first, causality-inspired (Zhang et al., arXiv 2303.06818)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.defenses.abl import fresh_weights
from ulrl.defenses.base import Defense, OnHead, Repair, register
from ulrl.defenses.perturbation import still
from ulrl.models.head import watched
from ulrl.options import option
from ulrl.seeds import global_stream
from ulrl.training import Monitor, fit, make_optimizer, make_scheduler

_RELEASE = "CBD release"


@register("cbd")
@dataclass(frozen=True)
class CBD(OnHead, Defense):
    """Train a fresh model on a training set that may be poisoned, so that the backdoor is not learnt.

    1. Train one net for a few epochs: it learns what is learnt fastest, the backdoor (the confounder).
    2. Train another, on cross-entropy where a sample weighs L1 / (L1 + L2), its losses under the first net and
       under this one, scaled to a mean of 1 in each batch: what the first net knows counts little.
    3. To that loss is added `independence` * an estimate of how much the features of both nets (what their heads are
       given) tell of each other: the mean score that a critic gives the pairs minus that of pairs out of step.
       The critic, held to a spectral norm of 1, is trained to tell them apart.

    The release's own command leaves out step 3 (its `--disentangle` is 0, and its estimate is scaled by our default
    of `independence`); 0 does so here. It trains the critic in a pass of its own before each epoch, here both
    take their step on each batch. It divides the critic's weights by the root of their spectral norm, which nears
    1 over the steps; here by the norm. Its Cutout of one square of 3 pixels is not among the augmentations here. The
    architecture is that of the model that is given, the weights are drawn anew.
    """

    in_training: ClassVar[bool] = True

    batch_size: int = option(64, "images per step", source=_RELEASE, low=2)
    bias_epochs: int = option(5, "epochs of the first net", source="paper and release", low=1)
    epochs: int = option(100, "epochs of the second; the rate falls after 1/5 and 7/10", source=_RELEASE, low=1)
    lr: float = option(0.1, "learning rate", source=_RELEASE, low=0)
    momentum: float = option(0.9, "momentum (Nesterov)", source=_RELEASE, low=0, high=1)
    weight_decay: float = option(1e-4, "weight decay", source=_RELEASE, low=0)
    independence: float = option(0.01, "weight of the independence of the features; 0: none", source=_RELEASE, low=0)
    critic_lr: float = option(0.2, "rate of the critic (Adam), to a tenth every 20 epochs", source=_RELEASE, low=0)

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        """`clean` is the poisoned training set."""
        biased = fresh_weights(model, self.random_seed, "biased initialisation")
        fit(
            biased, self.batches(clean, "bias"), self.bias_epochs, self._optimizer(biased), None, monitor, "bias",
            amp=self.amp,
        )  # fmt: skip
        model = fresh_weights(model, self.random_seed, "initialisation")
        heads = [self.head(net, clean)[1] for net in (biased, model)]
        with (
            still(biased),
            watched(heads) as features,
            global_stream(self.random_seed, "critic", clean.device),
        ):
            critic = _Critic(sum(head.weight[0].numel() for head in heads)).to(clean.device)
            of_critic = torch.optim.Adam(critic.parameters(), self.critic_lr)
            batches = self.batches(clean, "train")
            falling = torch.optim.lr_scheduler.StepLR(of_critic, 20 * len(batches))

            def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                with torch.no_grad():
                    known = F.cross_entropy(biased(x).float(), y, reduction="none")
                logits = model(x)
                losses = F.cross_entropy(logits.float(), y, reduction="none")
                weights = known / (losses.detach() + known + 1e-8)
                loss = (weights / weights.mean().clamp_min(1e-12) * losses).mean()
                if self.independence:
                    with torch.autocast(x.device.type, enabled=False):
                        loss = loss + self.independence * _dependence(critic, of_critic, *features)
                return loss, logits.detach().argmax(1) == y

            optimizer = self._optimizer(model)
            milestones = (round(self.epochs / 5), round(self.epochs * 7 / 10))
            fit(
                model, batches, self.epochs, optimizer,
                make_scheduler(optimizer, "MultiStepLR", self.epochs, milestones), monitor, "train",
                amp=self.amp, objective=objective, after_step=falling.step if self.independence else None,
            )  # fmt: skip
        return Repair(model)

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return make_optimizer(model, "sgd", self.lr, self.momentum, self.weight_decay, nesterov=True)


class _Critic(nn.Module):
    """Scores a pair of feature vectors, joined: float [B, D] to [B]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        half = size // 2
        self.layers = nn.Sequential(
            nn.Dropout(0.2), nn.Linear(size, half), nn.LeakyReLU(), nn.Dropout(0.2), nn.Linear(half, 1)
        )  # fmt: skip

    def gap(self, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        """The mean score of the pairs minus that of pairs one sample out of step: a scalar."""
        return (
            self.layers(torch.cat([theirs, ours], 1)) - self.layers(torch.cat([theirs, ours.roll(-1, 0)], 1))
        ).mean()

    @torch.no_grad()
    def normalise(self) -> None:
        for p in self.parameters():
            p.div_((torch.linalg.matrix_norm(p, 2) if p.ndim == 2 else p.norm()).clamp_min(1e-12))


def _dependence(
    critic: _Critic, optimizer: torch.optim.Optimizer, theirs: torch.Tensor, ours: torch.Tensor
) -> torch.Tensor:
    """A step of the critic, then its gap, with a gradient for our features alone."""
    optimizer.zero_grad()
    (-critic.gap(ours.detach(), theirs)).backward()
    optimizer.step()
    critic.normalise()
    return critic.gap(ours, theirs)
