"""Masks and noise on the channels of any normalisation layer: to learn which ones serve a backdoor, and edit them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize

from ulrl.errors import UserError
from ulrl.training import channels_first, cross_entropy, frozen


def norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The normalisation layers that have a scale per channel, by dotted name.

    Raises:
        UserError: there is none.
    """
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.LayerNorm, nn.GroupNorm)
    layers: dict[str, nn.Module] = {
        path: m for path, m in model.named_modules() if isinstance(m, kinds) and m.weight is not None
    }
    if not layers:
        raise UserError("the model has no normalisation layer with a scale, so it has no channels to mask")
    return layers


class Mask(nn.Module):
    """Multiplies a tensor by a mask of its shape, fp32, ones at first."""

    def __init__(self, masked: torch.Tensor) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.ones_like(masked, dtype=torch.float32))

    def forward(self, original: torch.Tensor) -> torch.Tensor:
        return original * self.mask


class Perturbed(Mask):
    """Multiplies a tensor by its mask plus a noise, zeros at first."""

    def __init__(self, perturbed: torch.Tensor) -> None:
        super().__init__(perturbed)
        self.noise = nn.Parameter(torch.zeros_like(self.mask))

    def forward(self, original: torch.Tensor) -> torch.Tensor:
        return original * (self.mask + self.noise)


SCALE_AND_SHIFT = ("weight", "bias")


def require_shifts(model: nn.Module) -> None:
    """For what perturbs SCALE_AND_SHIFT.

    Raises:
        UserError: a normalisation layer has no shift, or there is none at all.
    """
    if any(layer.bias is None for layer in norm_layers(model).values()):
        raise UserError("the model has a normalisation layer without a shift, which the noise would have to perturb")


@contextlib.contextmanager
def masked(
    model: nn.Module, kind: type[Mask] = Mask, tensors: tuple[str, ...] = ("weight",), *, weights_too: bool = False
) -> Iterator[list[Mask]]:
    """Inside the block the `tensors` of every normalisation layer are `kind` of what they are; afterwards the model is
    plain again. Only the masks can be trained, unless the weights can `weights_too`.

    Yields the masks, in the order of `norm_layers` and of `tensors` within a layer.
    """
    layers = norm_layers(model).values()
    masks = []
    with frozen(() if weights_too else model.parameters()):
        try:
            for layer in layers:
                for tensor in tensors:
                    masks.append(kind(getattr(layer, tensor)))
                    parametrize.register_parametrization(layer, tensor, masks[-1])
            with channels_first(model):
                yield masks
        finally:
            for layer in layers:
                for tensor in tensors:
                    if parametrize.is_parametrized(layer, tensor):
                        parametrize.remove_parametrizations(layer, tensor, leave_parametrized=False)


def worst_noise(
    noises: list[torch.Tensor], loss: Callable[[], torch.Tensor], bound: float, steps: int, stream: torch.Generator
) -> None:
    """Fill `noises`, in place, with the worst within `bound`: from a random start, `steps` signed steps up `loss`.

    The noise of a layer that has no part in the loss stays as it was drawn.
    """
    with torch.no_grad():
        for noise in noises:
            noise.uniform_(-bound, bound, generator=stream)
    for _ in range(steps):
        gradients = torch.autograd.grad(loss(), noises, materialize_grads=True)
        with torch.no_grad():
            torch._foreach_add_(noises, torch._foreach_sign(gradients), alpha=bound / steps)
            torch._foreach_clamp_min_(noises, -bound)
            torch._foreach_clamp_max_(noises, bound)


def noises_of(masks: list[Mask]) -> list[torch.Tensor]:
    """The noises of those that are `Perturbed`."""
    return [m.noise for m in masks if isinstance(m, Perturbed)]


def losses_under_noise(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, noises: list[torch.Tensor], bound: float, steps: int,
    stream: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(cross-entropy under the worst noise, that without noise, and which samples are right without it) of a batch.

    The noise is found as by `worst_noise`, and 0 afterwards.
    """
    worst_noise(noises, lambda: cross_entropy(model, x, y)[0], bound, steps, stream)
    attacked, _ = cross_entropy(model, x, y)
    silence_noise(noises)
    return attacked, *cross_entropy(model, x, y)


@torch.no_grad()
def silence_noise(noises: list[torch.Tensor]) -> None:
    torch._foreach_zero_(noises)


@torch.no_grad()
def clamp(masks: list[Mask]) -> None:
    """Back into [0, 1], as after every step."""
    values: list[torch.Tensor] = [m.mask for m in masks]
    torch._foreach_clamp_min_(values, 0.0)
    torch._foreach_clamp_max_(values, 1.0)


@torch.no_grad()
def silence(model: nn.Module, values: Mapping[str, torch.Tensor], threshold: float) -> None:
    """Set the scale of the channels whose value is at most `threshold` to 0, in place; their shift stays.

    values: per normalisation layer, by its dotted name, a tensor of its scale's shape.
    """
    for path, value in values.items():
        model.get_submodule(path).weight.masked_fill_(value <= threshold, 0)  # type: ignore[operator]


@torch.no_grad()
def scale(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Multiply the scale of every channel by its value, in place; their shift stays. values: as for `silence`."""
    for path, value in values.items():
        model.get_submodule(path).weight.mul_(value)  # type: ignore[operator]
