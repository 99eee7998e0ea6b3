"""I-BAU: adversarial unlearning by implicit hypergradient (Zeng et al., arXiv 2110.03735)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import Defense, Repair, register
from ulrl.defenses.perturbation import pixel
from ulrl.errors import UserError
from ulrl.machine import autocast, whole_float32
from ulrl.options import option
from ulrl.training import Monitor

_RELEASE = "I-BAU release"


@register("i-bau")
@dataclass(frozen=True)
class IBAU(Defense):
    """Min-max unlearning: no one perturbation, the same on every image, may lead the model astray.

    In each round (Algorithm 1):
    1. One universal perturbation of the pixels is driven up the loss, in one pass over the clean samples.
    2. Per batch, one Adam step down the loss of the perturbed images, along the gradient that also counts
       how the worst perturbation moves with the weights: the implicit hypergradient, by `K` fixed-point
       iterations.

    In step 1 the loss is that of the true labels, as in the paper; the release's is that of the model's own answers.
    As in the paper the perturbation is bounded in L2; the release has no bound. The paper writes step 2
    with every image perturbed, which (measured) ruins clean accuracy within a round; as in the release
    only a share of each batch is. BatchNorm stays in eval mode. Second derivatives are taken in fp32
    (not TF32), whatever `amp`.
    """

    ignored: ClassVar[tuple[str, ...]] = (
        "epochs", "lr_scheduler", "client_optimizer", "sgd_momentum", "wd", "adam_betas",
    )  # fmt: skip

    lr: float = option(1e-4, "learning rate of the weights (Adam)", source="BackdoorBench", low=0)
    n_rounds: int = option(5, "rounds", source="BackdoorBench", low=1)
    K: int = option(5, "fixed-point iterations of the hypergradient", source=_RELEASE, low=1)
    portion: float = option(
        0.01, "share of each batch that is perturbed, one image at least", source=_RELEASE, low=0, high=1
    )
    pert_lr: float = option(10.0, "step of the perturbation", source=_RELEASE, low=0)
    pert_norm: float = option(10.0, "bound on the perturbation's L2 norm, pixels in [0, 1]", source=_RELEASE, low=0)

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(weights, self.lr, amsgrad=True)
        batches = self.batches(clean, "unlearn")
        scale = pixel(clean)
        norms = []
        model.eval()
        with monitor.stage("unlearn", 2 * self.n_rounds * len(batches)) as progress:
            for epoch in range(1, self.n_rounds + 1):
                delta = torch.zeros((1, *clean.images.shape[1:]), device=clean.device, requires_grad=True)
                for x, y in batches:
                    with autocast(clean.device, self.amp):
                        inner = _inner(model(x + delta * scale), y, delta)
                    (gradient,) = torch.autograd.grad(inner, delta)
                    with torch.no_grad():
                        delta -= self.pert_lr * gradient
                        delta *= (self.pert_norm / delta.norm().clamp_min(1e-12)).clamp_max(1)
                    progress.step()
                totals = torch.zeros(2, device=clean.device)  # loss and hits
                count = 0
                for x, y in batches:
                    some = max(1, int(self.portion * len(y)))  # the batch is shuffled, so these are random ones
                    with whole_float32(), sdpa_kernel(SDPBackend.MATH):  # the only attention with second derivatives
                        logits = model(torch.cat([x[:some] + delta * scale, x[some:]]))
                        loss = F.cross_entropy(logits, y)
                        inner = _inner(model(x + delta * scale), y, delta)
                        gradients = self._hypergradient(loss, inner, delta, weights)
                    for weight, gradient in zip(weights, gradients, strict=True):
                        weight.grad = gradient
                    optimizer.step()
                    totals += torch.stack([loss.detach() * len(y), (logits.argmax(1) == y).sum()])
                    count += len(y)
                    progress.step()
                loss_sum, hits, norm = torch.cat([totals, delta.detach().norm()[None]]).tolist()
                if not math.isfinite(loss_sum):
                    raise UserError(f"the loss of stage 'unlearn' became {loss_sum} in round {epoch}; lower --lr")
                norms.append(norm)
                progress.epoch(model, epoch, loss=loss_sum / count, acc=hits / count)
        return Repair(model, evidence={"perturbation_norms": norms})

    def _hypergradient(
        self, outer: torch.Tensor, inner: torch.Tensor, delta: torch.Tensor, weights: list[nn.Parameter]
    ) -> list[torch.Tensor]:
        """d outer / d weights where delta follows the weights, as the fixed point of one step down `inner`.

        With that step, phi = delta - 0.1 d inner / d delta: v = (d phi / d delta) v + d outer / d delta by
        iteration, then d outer / d weights + (d phi / d weights) v.
        """
        direct = torch.autograd.grad(outer, [delta, *weights], retain_graph=True, materialize_grads=True)
        (slope,) = torch.autograd.grad(inner, delta, create_graph=True)
        phi = delta - 0.1 * slope
        v = direct[0]
        try:
            for _ in range(self.K - 1):  # the first iteration, from v = 0, is the line above
                v = torch.autograd.grad(phi, delta, v, retain_graph=True)[0] + direct[0]
            indirect = torch.autograd.grad(phi, weights, v, allow_unused=True, materialize_grads=True)
        except RuntimeError as error:
            if "is not implemented" not in str(error):
                raise
            raise UserError(f"I-BAU needs second derivatives, which a layer of the model lacks: {error}") from None
        return [a + b for a, b in zip(direct[1:], indirect, strict=True)]


def _inner(logits: torch.Tensor, y: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """What the perturbation minimises: minus the loss, and a little of its own square."""
    return -F.cross_entropy(logits.float(), y) + 0.001 * delta.square().sum()
