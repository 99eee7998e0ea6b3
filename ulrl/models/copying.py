"""Copies of a network that the library does not know."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def copied(model: nn.Module) -> nn.Module:
    """A deep copy. What the model keeps of an answer (`self.features = h`) comes along without its graph, as torch
    copies no tensor that has one.
    """
    with _WithoutGraph():
        return copy.deepcopy(model)


class _WithoutGraph(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return function(*args, **(kwargs or {}))
