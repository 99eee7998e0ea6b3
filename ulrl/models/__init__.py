"""Architectures by BackdoorBench's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from ulrl.errors import UserError
from ulrl.models.preact_resnet import PreActResNet18
from ulrl.registry import nearest
from ulrl.seeds import global_stream

MODELS: dict[str, Callable[..., nn.Module]] = {"preactresnet18": PreActResNet18}
WIDTH = 64


def build_model(
    name: str, num_classes: int, channels: int = 3, width: int = WIDTH, *, seed: int = 0, stream: str = "initialisation"
) -> nn.Module:
    """A fresh network on the CPU, in channels-last memory, initialised from a stream of `seed`.

    Raises:
        UserError: unknown name.
    """
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}{nearest(name, list(MODELS))}")
    with global_stream(seed, stream):
        return MODELS[name](num_classes, channels, width).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def load_model(
    name: str, num_classes: int, state_dict: Mapping[str, torch.Tensor], channels: int | None = None
) -> nn.Module:
    """A network with the given weights, loaded strictly; its width and input channels are read off them.

    The weights may be a stranger's, so their shapes are compared before memory is taken for a network.

    Raises:
        UserError: unknown name, weights of another architecture, or not of `channels` where those are given.
    """
    first = state_dict.get("conv1.weight")
    if first is None or first.ndim != 4:
        raise UserError(f"the weights are not those of {name}: no convolution named 'conv1.weight'")
    if channels is not None and first.shape[1] != channels:
        raise UserError(f"the weights are for images of {first.shape[1]} channels, not of {channels}")
    inputs, width = first.shape[1], first.shape[0]
    with torch.device("meta"):
        expected = build_model(name, num_classes, inputs, width).state_dict()
    wrong = [k for k in {**expected, **state_dict} if _shape(expected.get(k)) != _shape(state_dict.get(k))]
    if wrong:
        raise UserError(f"the weights do not fit {name} with {num_classes} classes: see {', '.join(sorted(wrong)[:4])}")
    model = build_model(name, num_classes, inputs, width)
    model.load_state_dict(dict(state_dict), strict=True)
    return model


def _shape(weight: torch.Tensor | None) -> tuple[int, ...] | None:
    return None if weight is None else tuple(weight.shape)
