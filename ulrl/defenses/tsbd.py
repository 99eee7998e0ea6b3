"""TSBD: zero the weights that unlearning moved most, then fine-tune with a calm gradient (Lin et al., NeurIPS 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ulrl.data.batches import Batches
from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import Repair, register
from ulrl.defenses.filters import Ranking
from ulrl.defenses.selection import Selecting, sweep
from ulrl.defenses.unlearning import Unlearning
from ulrl.errors import UserError
from ulrl.models.head import hidden_convolutions
from ulrl.options import option
from ulrl.training import OPTIMIZERS, Monitor, Sam, fit, make_optimizer, measure_statistics

_RELEASE = "TSBD release"
NEURON_RATIOS = (0.0, 0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 0.9)


@register("tsbd")
@dataclass(frozen=True)
class TSBD(Selecting, Unlearning):
    """Two-stage backdoor defense on the filters of the convolutions.

    1. Unlearn, and rank all filters by the L1 change of their weights (NWC).
    2. In the original net, of the first n of the filters, zero the share `weight_ratio` of their weights
       that moved most.
    3. Fine-tune on the mean of the gradient here and that at the worst weights within `radius`, the latter
       weighted `alpha`: cross-entropy + `alpha` * `radius` * the norm of its gradient.

    n is the greatest ratio, of those that the release goes through, at which validation accuracy holds right
    after the zeroing, or `neuron_ratio`; the release chooses none. For that alone BatchNorm's statistics are taken
    anew, without which little accuracy is left at any n and which the fine-tuning takes anew anyway.
    As in the paper, the norm is that of the whole gradient, where the release takes one per tensor.
    Shortcut convolutions are ranked too.
    """

    batch_size: int = option(256, "clean images per step", source=_RELEASE, low=2)
    unlearning_epochs: int = option(1000, "unlearning epochs at most", source=_RELEASE, low=1)
    unlearning_lr: float = option(1e-4, "learning rate of unlearning", source=_RELEASE, low=0)
    lr_scheduler: str = option("constant", "rate over the unlearning", source=_RELEASE, choices=("constant",))
    clip: float = option(0.0, "bound on the gradient norm in unlearning; 0: none", source=_RELEASE, low=0)
    clean_threshold: float = option(
        0.1, "unlearn until accuracy on the clean samples is at most this", source=_RELEASE, low=0, high=1
    )
    wd: float = option(0.0, "weight decay in unlearning (there is none later)", source=_RELEASE, low=0)
    neuron_ratio: float | None = option(None, "zero in this share of the filters, chosen by nothing", low=0, high=1)
    weight_ratio: float = option(0.7, "share of their weights that becomes 0", source=_RELEASE, low=0, high=1)
    epochs: int = option(20, "fine-tuning epochs (the release's loop makes one more)", source=_RELEASE, low=1)
    lr: float = option(0.01, "learning rate of fine-tuning", source=_RELEASE, low=0)
    client_optimizer: str = option("sgd", "optimiser of fine-tuning", source=_RELEASE, choices=OPTIMIZERS)
    radius: float = option(0.05, "how far the worst weights are", source=_RELEASE, low=0)
    alpha: float = option(0.7, "share of the gradient there", source=_RELEASE, low=0, high=1)

    def check(self, model: nn.Module, clean: ImageSet) -> None:
        _convolutions(model, clean.spec.num_classes)

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        original = {path: m.weight.detach().clone() for path, m in _convolutions(model, clean.spec.num_classes).items()}
        train, validation = self.set_aside(clean)
        unlearned = self.unlearn(model, train, monitor, in_eval=True)
        changes = {
            path: (m.weight.detach() - original[path]).abs().flatten(1)
            for path, m in _convolutions(unlearned.model, clean.spec.num_classes).items()
        }
        ranking = Ranking({path: change.sum(1) for path, change in changes.items()})
        ratios = NEURON_RATIOS if self.neuron_ratio is None else tuple(sorted({0.0, self.neuron_ratio}))

        @torch.no_grad()
        def edit(model: nn.Module, i: int) -> None:
            chosen = ranking.first(ratios[i] * len(ranking))
            floor = _floor(torch.cat([changes[path][c].flatten() for path, c in chosen.items()]), self.weight_ratio)
            for path, c in chosen.items():
                zero = (c[:, None] & (changes[path] >= floor)).view_as(original[path])
                model.get_parameter(f"{path}.weight").copy_(original[path].masked_fill(zero, 0))

        swept = sweep(
            model, ratios, edit, validation, self.acc_ratio, monitor, amp=self.amp, fixed=self.neuron_ratio,
            prepare=lambda edited: measure_statistics(edited, Batches(train, self.batch_size, drop_last=True)),
            finish=lambda candidate: self._finetune(candidate, train, Monitor()),
        )  # fmt: skip
        self._finetune(model, train, monitor)
        evidence = {
            **unlearned.evidence,
            "neuron_ratio": swept.strength,
            "filters": len(ranking),
            "validation_samples": len(validation),
        }
        tables = {"filters": ranking.table(ranking.first(swept.strength * len(ranking))), "pruning": swept.curve}
        return Repair(model, [], evidence, tables, swept.candidates)

    def _finetune(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> None:
        optimizer = make_optimizer(model, self.client_optimizer, self.lr, self.sgd_momentum)
        fit(
            model, self.batches(clean, "finetune"), self.epochs, optimizer,
            None, monitor, "finetune",
            amp=self.amp, sam=Sam(self.radius, mix=self.alpha),
        )  # fmt: skip


def _convolutions(model: nn.Module, num_classes: int) -> dict[str, nn.Conv2d]:
    found = hidden_convolutions(model, num_classes)
    if not found:
        raise UserError("the model has no nn.Conv2d layer before its head, so it has no filters for TSBD to rank")
    return found


def _floor(changes: torch.Tensor, share: float) -> torch.Tensor:
    """The least of the largest `share` of `changes` [n]; infinite when that is none of them."""
    kept = round(share * len(changes))
    return changes.kthvalue(len(changes) - kept + 1).values if kept else changes.new_tensor(float("inf"))
