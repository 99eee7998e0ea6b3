"""Clean training: the model without a backdoor that defenses must not harm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ulrl.attacks.base import Attack, register


@register("prototype")
@dataclass(frozen=True)
class Prototype(Attack):
    """No attack. Its record has no poisoned samples, so ASR and RA are unknown (null)."""

    chooses: ClassVar[bool] = False

    def choose(self, labels: torch.Tensor) -> torch.Tensor:
        return torch.empty(0, dtype=torch.int64)

    def judged(self, labels: torch.Tensor) -> torch.Tensor:
        return torch.empty(0, dtype=torch.int64)

    def poison(self, images: torch.Tensor, *, train: bool) -> torch.Tensor:
        return images
