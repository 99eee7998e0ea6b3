"""BNP: pruning where BatchNorm's statistics tell of poisoned training data (Zheng et al., NeurIPS 2022)."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import nn

from ulrl.data.batches import Batches
from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import Repair, register
from ulrl.defenses.outliers import OutlierPruning, Scores
from ulrl.errors import UserError
from ulrl.machine import eval_batch
from ulrl.training import Monitor


@register("bnp")
@dataclass(frozen=True)
class BNP(OutlierPruning):
    """Zero the BatchNorm channels whose running statistics are not those of clean samples.

    The running statistics saw the poisoned training data. A channel's score is KL(clean || running) of
    two normal distributions; the clean one is that of its inputs over all clean samples, in eval mode.

    BackdoorBench compares with a batch of the poisoned training data instead, drops the half before the
    logarithm, and looks at one batch only.
    """

    def check(self, model: nn.Module, clean: ImageSet) -> None:
        _norms(model)

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        norms = _norms(model)
        moments = _clean_moments(model, norms, clean, monitor)
        scores = []
        for name, (mean, variance) in moments.items():
            scores.append(Scores(name, divergence(norms[name], mean, variance), [f"{name}.weight", f"{name}.bias"]))
        return self.prune(model, scores, monitor)


def _norms(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    norms = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_var is not None and m.affine
    }
    if not norms:
        raise UserError("bnp compares BatchNorm's running statistics, and this model has none")
    return norms


def divergence(norm: nn.modules.batchnorm._BatchNorm, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, variance) || N(running mean, running variance)) of each channel: float64 [C].

    log(s_r / s) + (s^2 + (m - m_r)^2) / (2 s_r^2) - 1/2, each variance with BatchNorm's epsilon, so that a
    dead channel diverges by nothing.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    variance, running = variance + norm.eps, norm.running_var.double() + norm.eps
    return ((running / variance).log() + (variance + (mean - norm.running_mean).square()) / running - 1) / 2


@torch.no_grad()
def _clean_moments(
    model: nn.Module, norms: dict[str, nn.modules.batchnorm._BatchNorm], clean: ImageSet, monitor: Monitor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Mean and variance of each BatchNorm's inputs over the clean samples, where it takes part: float64 [C] each."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in norms}

    def before(name: str, x: torch.Tensor) -> None:
        variance, mean = (t.double() for t in torch.var_mean(x, [0, *range(2, x.ndim)], correction=0))
        seen[name].append(torch.stack([torch.ones_like(mean), mean, variance + mean.square()]) * len(x))

    batches = Batches(clean, eval_batch(clean.device))
    model.eval()
    with contextlib.ExitStack() as hooks, monitor.stage("score", len(batches)) as progress:
        for name, norm in norms.items():
            hooks.enter_context(norm.register_forward_pre_hook(lambda _, inputs, name=name: before(name, inputs[0])))
        for x, _ in batches:
            model(x)
            progress.step()
    result = {}
    for name, parts in seen.items():
        if not parts:
            continue
        count, first, second = torch.stack(parts).sum(0)
        result[name] = (first / count, second / count - (first / count).square())
    return result
