"""A net that the library does not know, trained with a plain torch loop, as a user would have one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

TARGET = 7
QUICK: dict[str, Any] = {"method": "ulrl", "unlearning_epochs": 2, "relearn_epochs": 1}


class Net(nn.Module):
    """Digits in [-1, 1] to ten logits."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()

        def block(inside: int, outside: int, stride: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(inside, outside, 3, stride, 1), norm(outside), nn.ReLU())

        self.body = nn.Sequential(block(1, 16, 1), block(16, 32, 2), block(32, 64, 1), nn.AdaptiveAvgPool2d(1))
        self.classify = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classify(self.body(x).flatten(1))


def stamp(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[:, :, -1, -1] = 0
    return x


class Headless(nn.Module):
    """Sums of patches: no layer has an output per class."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 20, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).mean((2, 3)).unflatten(1, (10, 2)).sum(2)


def trained(x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
        for _ in range(12):
            for part in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(x[part]), y[part]).backward()
                optimizer.step()
    model.zero_grad()
    return model.eval()


@torch.no_grad()
def rates(model: nn.Module, digits: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
    """(ACC, ASR) on images that neither the model nor the repair has seen."""
    x, y = digits[0][1400:], digits[1][1400:]
    model = copy.deepcopy(model).eval()
    hit = model(stamp(x)).argmax(1)[y != TARGET] == TARGET
    return (model(x).argmax(1) == y).float().mean().item(), hit.float().mean().item()


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([v.flatten().float() for v in model.state_dict().values()])
