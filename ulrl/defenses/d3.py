"""D3: fine-tune as far away from the old head as the loss allows, distance-driven detoxification (arXiv 2411.09585)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import OnHead, Repair, register
from ulrl.defenses.finetuning import FineTuning, hold_norm
from ulrl.options import option
from ulrl.seeds import generator
from ulrl.training import Monitor

_RELEASE = "D3 release"


@register("d3")
@dataclass(frozen=True)
class D3(OnHead, FineTuning):
    """Draw the weights W of the head anew, then fine-tune so that W ends far from what it was (Wei et al.).

    The paper maximises the distance |W - original W| with a clean loss of at most `eps` and W of its original norm. As
    in the release the bound is a penalty, on what each sample's cross-entropy has above `eps`: the loss is

        `lmd` * mean(max(0, cross-entropy - `eps`)) - |W - original W|

    (divided by `lmd` + 1 where `lmd` is above 1), and W is scaled back to its norm after every step. The redrawn W is
    uniform in a cube and has that norm too. The bias of the head is neither redrawn nor held, as in the release, which
    does not use its weight decay of 5e-4 either.
    """

    wd: float = option(0.0, "weight decay", source=_RELEASE, low=0)
    lmd: float = option(0.5, "weight of the loss above the bound", source=_RELEASE, low=0)
    eps: float = option(0.1, "a sample's loss that costs nothing", source=_RELEASE, low=0)

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        name, head = self.head(model, clean)
        original = head.weight.detach().clone()
        hold = hold_norm(head.weight)
        with torch.no_grad():
            drawn = torch.rand(original.shape, generator=generator(self.random_seed, "reinitialise"))
            head.weight.copy_(drawn - 0.5)
        hold()

        def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = model(x)
            above = F.relu(F.cross_entropy(logits, y, reduction="none") - self.eps).mean()
            loss = self.lmd * above - (head.weight - original).norm()
            return loss / (self.lmd + 1 if self.lmd > 1 else 1), logits.detach().argmax(1) == y

        self.finetune(model, clean, monitor, "detoxify", objective=objective, after_step=hold)
        moved = ((head.weight.detach() - original).norm() / original.norm().clamp_min(1e-12)).item()
        return Repair(model, evidence={"head": name, "head_distance": moved})  # 2 is as far as its norm allows
