"""CLP: data-free pruning by channel Lipschitzness (Zheng et al., arXiv 2208.03111)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ulrl.data.imageset import DatasetSpec, ImageSet
from ulrl.defenses.base import Repair, register
from ulrl.defenses.outliers import OutlierPruning, Scores
from ulrl.errors import UserError
from ulrl.models.head import hidden_convolutions
from ulrl.training import Monitor

_BatchNorm = nn.modules.batchnorm._BatchNorm


@register("clp")
@dataclass(frozen=True)
class CLP(OutlierPruning):
    """Zero the channels that can amplify a small change of the input most: those sensitive to a trigger.

    A channel's bound is the spectral norm of its filter, as a matrix [inputs, kernel pixels], times
    |scale| / deviation of its BatchNorm. Each BatchNorm counts once: with the convolution whose output goes
    straight into it, as in the paper; else, where it normalises a sum (the first of a pre-activation block),
    with the convolutions that it feeds, whose inputs it scales. A convolution with neither has its bare filter's
    bound. Which feeds which is seen in a forward pass; the release and BackdoorBench take the convolution
    listed before a BatchNorm, which in pre-activation nets is another one.

    Pruning zeroes the filter and the scale and shift after it, so that the channel is silent whichever way it is read.
    No clean sample is looked at: the forward pass is one of zeros.
    """

    def check(self, model: nn.Module, clean: ImageSet) -> None:
        _units(model, clean.spec)

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        with monitor.stage("score", 1) as progress:
            units = _units(model, clean.spec)
            scores = []
            for name, unit in units.items():
                held = [f"{name}.{key}" for key, _ in unit.conv.named_parameters()]
                if unit.after is not None:
                    held += [f"{unit.after_name}.{key}" for key, _ in unit.after.named_parameters()]
                scores.append(Scores(name, channel_bounds(unit), held))
            progress.step()
        return self.prune(model, scores, monitor)


@dataclass
class Unit:
    """A convolution with the BatchNorms that count with it."""

    conv: nn.Conv2d
    before: _BatchNorm | None
    after: _BatchNorm | None = None
    after_name: str = ""


@torch.no_grad()
def channel_bounds(unit: Unit) -> torch.Tensor:
    """An upper bound on the Lipschitz constant of each output channel: float64 [C]."""
    kernels = unit.conv.weight.double().flatten(2)
    if unit.before is not None:
        gains = _gains(unit.before).view(unit.conv.groups, 1, -1, 1)
        kernels = (kernels.unflatten(0, (unit.conv.groups, -1)) * gains).flatten(0, 1)
    # The smaller Gram matrix has the same largest singular value, squared, and is 9x9 for a 3x3 kernel.
    gram = kernels @ kernels.mT if kernels.shape[1] < kernels.shape[2] else kernels.mT @ kernels
    bounds = torch.linalg.svdvals(gram)[:, 0].sqrt()
    return bounds if unit.after is None else bounds * _gains(unit.after)


def _gains(norm: _BatchNorm) -> torch.Tensor:
    """By how much a BatchNorm in eval mode multiplies each channel: float64 [C]."""
    assert norm.running_var is not None
    scale = 1.0 if norm.weight is None else norm.weight.double().abs()
    return scale / (norm.running_var.double() + norm.eps).sqrt()


class _Origins(TorchFunctionMode):
    """Knows which layer a tensor came from, through functions of that tensor alone (activations)."""

    def __init__(self) -> None:
        # The tensor too, so that no other is made with its identity.
        self._by_id: dict[int, tuple[torch.Tensor, str | None]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if isinstance(output, torch.Tensor):  # which may be an argument, changed in place
            alone = len(tensors) == 1 and output.shape == tensors[0].shape
            self.mark(output, self.of(tensors[0]) if alone else None)
        return output

    def mark(self, tensor: torch.Tensor, layer: str | None) -> None:
        self._by_id[id(tensor)] = (tensor, layer)

    def of(self, tensor: torch.Tensor) -> str | None:
        return self._by_id.get(id(tensor), (tensor, None))[1]


@torch.no_grad()
def _units(model: nn.Module, spec: DatasetSpec) -> dict[str, Unit]:
    """The convolutions, but for a head, that a forward pass in eval mode uses, by name in that order.

    Raises:
        UserError: there is none.
    """
    units: dict[str, Unit] = {}
    sums: dict[str, _BatchNorm] = {}  # the BatchNorms that no convolution feeds
    origins = _Origins()
    hidden = hidden_convolutions(model, spec.num_classes)

    def after(name: str, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        source = origins.of(inputs[0])
        if isinstance(module, nn.Conv2d):
            units.setdefault(name, Unit(module, sums.get(source or "")))
        elif source in units and units[source].after is None:
            units[source].after, units[source].after_name = module, name  # type: ignore[assignment]
        else:
            sums[name] = module  # type: ignore[assignment]
        origins.mark(output, name)

    model.eval()
    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if name in hidden or (isinstance(module, _BatchNorm) and module.running_var is not None):
                hook = module.register_forward_hook(lambda m, i, o, name=name: after(name, m, i, o))
                hooks.enter_context(hook)
        with origins:
            image = torch.zeros(1, spec.channels, spec.height, spec.width)
            model(image.to(next(model.parameters()).device))
    if not units:
        raise UserError("clp bounds the channels of convolutions, and this model has none before its head")
    return units
