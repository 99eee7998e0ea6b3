"""PAM: unlearn as BTI-DBF does, with the loss taken on the way back to the old weights (arXiv 2410.09838)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import Repair, register
from ulrl.defenses.bti_dbf import BTIDBF
from ulrl.models.head import Head
from ulrl.options import option
from ulrl.training import Monitor, Objective

_RELEASE = "PAM release"


@register("pam")
@dataclass(frozen=True)
class PAM(BTIDBF):
    """Path-aware minimisation (Min et al., "Uncovering, Explaining, and Mitigating the Superficial Safety of Backdoor
    Defense"): repaired weights that lie near the backdoored ones are soon brought back by a few poisoned images.

    The inversion is BTI-DBF's. In unlearning the gradient is taken at w + `rho` * (w0 - w) / |w0 - w|, with w0 the
    original weights, and moves w: the changed images have to be read right on the way back, too. While w is nearer to
    w0 than `rho`, that point lies beyond w0. The loss is cross-entropy alone.

    BatchNorm's statistics are those of w; in the release they are those of the weights on the way back, with which the
    repaired model then answers. There the generator is frozen when the first unlearning begins and never released, so
    that all rounds unlearn what the first one found; here, as in BTI-DBF, each round trains it. Its script ends
    before it begins, at an option `attack_target` that it does not have.
    """

    n_rounds: int = option(3, "rounds of inversion and unlearning", source=_RELEASE, low=1)
    lr: float = option(0.01, "learning rate of unlearning (SGD)", source=_RELEASE, low=0)
    sgd_momentum: float = option(0.1, "momentum of unlearning", source=_RELEASE, low=0, high=1)
    share: float = option(0.2, "share of a batch that is changed, one image at least", source=_RELEASE, low=0, high=1)
    rho: float = option(0.5, "how far back towards the original weights the loss is taken", source=_RELEASE, low=0)

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        original = _weights(model)
        repair = super().run(model, clean, monitor)
        repair.evidence["distance"] = _norm(_gaps(repair.model, original)).item()
        return repair

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), self.lr, self.sgd_momentum)

    def unlearning(self, model: nn.Module, head: Head, change: nn.Module) -> Objective:
        original = _weights(model)

        def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = self.changed(x, change)
            with torch.no_grad():
                model(x)  # moves the statistics
            gaps = _gaps(model, original)
            scale = self.rho / _norm(gaps).clamp_min(1e-12)
            back = {name: p + scale * gaps[name] for name, p in model.named_parameters()}
            statistics = {name: b.clone() for name, b in model.named_buffers()}  # which this pass must not move
            logits = functional_call(model, {**statistics, **back}, (x,)).float()
            return F.cross_entropy(logits, y), logits.detach().argmax(1) == y

        return objective


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _gaps(model: nn.Module, original: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The way from the model's weights to the original ones."""
    return {name: original[name] - p.detach() for name, p in model.named_parameters()}


def _norm(gaps: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([gap.norm() for gap in gaps.values()]).norm()
