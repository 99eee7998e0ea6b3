"""Finding the classifier head of any network."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ulrl.errors import UserError

Head = nn.Linear | nn.Conv2d


def find_head(model: nn.Module, num_classes: int, name: str | None = None) -> tuple[str, Head]:
    """The dotted name and the module of the layer that outputs the classes.

    With `name`, that module (`linear`, `classifier.6`, `1.heads.head`); without, the last `nn.Linear` with
    `num_classes` outputs, in the order of `model.named_modules()`, or else the last convolution of 1x1 with as many
    channels (SqueezeNet's). `weight.flatten(1)` has a row per class for either.

    Raises:
        UserError: there is none, the named one is no such layer, or its weight is computed of others (spectral_norm) or
            shared with another layer.
    """
    linear, convolutions = {}, {}
    for path, module in model.named_modules(remove_duplicate=False):  # a head may be known by two names
        if isinstance(module, nn.Linear) and module.out_features == num_classes:
            linear[path] = module
        elif isinstance(module, nn.Conv2d) and module.out_channels == num_classes and _is_linear(module):
            convolutions[path] = module
    heads: dict[str, Head] = {**convolutions, **linear}
    if not heads:
        raise UserError(
            f"the model has no nn.Linear layer or convolution of 1x1 with {num_classes} outputs, so no head to repair; "
            "take a method that edits none, such as ft-sam"
        )
    if name is None:
        firsts = dict(model.named_modules())
        name = [path for path in heads if path in firsts][-1]
    elif name not in heads:
        raise UserError(f"linear_name {name!r} is no layer with {num_classes} outputs; known: {', '.join(heads)}")
    _require_plain(name, heads[name])
    for path, module in model.named_modules():
        for key, weight in module.named_parameters(path, recurse=False):
            if weight is heads[name].weight and module is not heads[name]:
                raise UserError(
                    f"the weight of the head {name} is also {key}, which would change with it; give the head a weight "
                    "of its own (nn.Parameter(weight.clone())), or take a method that edits no head, such as ft-sam"
                )
    return name, heads[name]


def hidden_convolutions(model: nn.Module, num_classes: int) -> dict[str, nn.Conv2d]:
    """The convolutions by dotted name, in the order of `model.named_modules()`; no head, whose channels are classes.

    Raises:
        UserError: the weight of one is computed of others.
    """
    try:
        _, head = find_head(model, num_classes)
    except UserError:
        head = None
    found = {path: m for path, m in model.named_modules() if isinstance(m, nn.Conv2d) and m is not head}
    for path, convolution in found.items():
        _require_plain(path, convolution)
    return found


def _require_plain(name: str, layer: nn.Module) -> None:
    if is_parametrized(layer, "weight"):  # what is written into it is lost
        raise UserError(
            f"the weight of {name} is computed of others (spectral_norm, weight_norm); call "
            f"torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') on it first"
        )


def _is_linear(convolution: nn.Conv2d) -> bool:
    """Whether it is a linear layer at each position."""
    return convolution.kernel_size == (1, 1) and convolution.groups == 1


def first_input(given: tuple[Any, ...], named: Mapping[str, Any]) -> torch.Tensor:
    """The first tensor that a layer was called with, by place or by name."""
    return next(value for value in (*given, *named.values()) if isinstance(value, torch.Tensor))


def head_features(given: torch.Tensor) -> torch.Tensor:
    """What a head is given, float [N, D], or [N, D, H, W] for a convolution, averaged over positions: [N, D]."""
    return given.flatten(2).mean(2) if given.ndim == 4 else given


def head_answers(head: Head, features: torch.Tensor) -> torch.Tensor:
    """What a head makes of features that are given to it, float [N, D]: [N, K], without a gradient for its weights."""
    bias = None if head.bias is None else head.bias.detach()
    return F.linear(features, head.weight.detach().flatten(1), bias)


@contextlib.contextmanager
def watched(heads: list[Head]) -> Iterator[list[torch.Tensor]]:
    """Inside the block the list holds what each of the heads was last given: float32 [B, D], with its gradient."""
    seen: list[torch.Tensor] = [torch.empty(0) for _ in heads]

    def keep(i: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen[i] = head_features(first_input(given, named)).float()

        return hook

    hooks = [head.register_forward_pre_hook(keep(i), with_kwargs=True) for i, head in enumerate(heads)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
