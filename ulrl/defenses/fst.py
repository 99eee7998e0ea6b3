"""FST: fine-tune away from the old classifier head, feature shift tuning (Min et al., arXiv 2310.01875)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import OnHead, Repair, register
from ulrl.defenses.finetuning import FineTuning, hold_norm
from ulrl.models.head import Head
from ulrl.options import option
from ulrl.seeds import generator
from ulrl.training import Monitor, cross_entropy

_RELEASE = "FST release"


@register("fst")
@dataclass(frozen=True)
class FST(OnHead, FineTuning):
    """Draw the whole head W anew, then fine-tune every weight on cross-entropy + `alpha` <W, original W>,
    and scale W back to its original norm after every step (algorithm 1).

    The product is the plain sum, as in the paper: it grows with the norm of the head.
    """

    batch_size: int = option(128, "clean images per step", source=_RELEASE, low=2)
    epochs: int = option(10, "fine-tuning epochs", source=_RELEASE, low=1)
    wd: float = option(0.0, "weight decay", source=_RELEASE, low=0)
    alpha: float = option(0.1, "weight of the product with the original head", source=_RELEASE, low=0)

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        name, head = self.head(model, clean)
        original = head.weight.detach().clone()
        hold = hold_norm(head.weight)
        self._redraw(head)

        def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            loss, right = cross_entropy(model, x, y)
            return loss + self.alpha * (head.weight * original).sum(), right

        self.finetune(model, clean, monitor, "relearn", objective=objective, after_step=hold)
        cosine = F.cosine_similarity(head.weight.detach().flatten(), original.flatten(), dim=0).item()
        return Repair(model, evidence={"head": name, "head_cosine": cosine, "head_norm": original.norm().item()})

    @torch.no_grad()
    def _redraw(self, head: Head) -> None:
        """Uniform within 1 / sqrt(inputs), as a linear layer is when it is made."""
        stream = generator(self.random_seed, "reinitialise")
        for p in head.parameters():
            drawn = torch.rand(p.shape, generator=stream)
            p.copy_((drawn * 2 - 1) / head.weight[0].numel() ** 0.5)
