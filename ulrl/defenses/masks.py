"""Masks on the channels of any normalisation layer: to learn which ones serve a backdoor, and to silence them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize

from ulrl.errors import UserError


def norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The normalisation layers that have a scale per channel, by dotted name.

    Raises:
        UserError: there is none.
    """
    kinds = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
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


@contextlib.contextmanager
def masked(model: nn.Module, kind: type[Mask] = Mask, tensors: tuple[str, ...] = ("weight",)) -> Iterator[list[Mask]]:
    """Inside the block the `tensors` of every normalisation layer are `kind` of what they are, and only
    the masks can be trained; afterwards the model is plain again, with the weights that it had.

    Yields the masks, in the order of `norm_layers` and of `tensors` within a layer.
    """
    layers = norm_layers(model).values()
    trainable = [p for p in model.parameters() if p.requires_grad]
    masks = []
    try:
        for p in trainable:
            p.requires_grad_(False)
        for layer in layers:
            for tensor in tensors:
                masks.append(kind(getattr(layer, tensor)))
                parametrize.register_parametrization(layer, tensor, masks[-1])
        yield masks
    finally:
        for layer in layers:
            for tensor in tensors:
                if parametrize.is_parametrized(layer, tensor):
                    parametrize.remove_parametrizations(layer, tensor, leave_parametrized=False)
        for p in trainable:
            p.requires_grad_(True)


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
