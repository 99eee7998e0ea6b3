"""Blind backdoors (Bagdasaryan and Shmatikov, arXiv 2005.03823): the loss is poisoned, not the data."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ulrl.attacks.base import Attack, one_target_only, register
from ulrl.attacks.images import whole_pixels
from ulrl.attacks.lab import Lab
from ulrl.data.batches import normalise, pixels
from ulrl.data.imageset import DatasetSpec
from ulrl.options import option
from ulrl.training import cross_entropy

# 1 white, 0 black, None transparent; at row 3, column 23 of a 32x32 image.
_PATTERN = ((1, 0, 1), (None, 1, None), (None, None, 0), (None, 1, None), (1, 0, 1))


@register("blind")
@dataclass(frozen=True)
class Blind(Attack):
    """Every batch is also seen whole with the trigger and the target label; the two losses are balanced.

    MGDA weighs them so that the sum of their gradients, each scaled by its size and loss ("loss+"), is
    as small as it can be; `fixed` takes the two fix_scale weights. The attack sets in once the plain loss,
    averaged over the last `batch_history_len` batches (or all, while there are fewer), is below
    `backdoor_batch_loss_threshold`; that is looked at after each epoch. Clean and triggered images pass
    together: apart, the statistics of a batch tell BatchNorm which it is, and the clean accuracy falls in eval
    mode.

    No training sample is poisoned, so the record has no poisoned training set, and `pratio` means nothing.
    """

    chooses: ClassVar[bool] = False
    controls_training: ClassVar[bool] = True

    ignored: ClassVar[tuple[str, ...]] = tuple("random_rotation random_crop cos_t_max mgda_normalize".split())
    weight_loss_balance_mode: str = option(
        "MGDA", "how the two losses are balanced", source="BackdoorBench", choices=("MGDA", "fixed")
    )
    fix_scale_normal_weight: float = option(1.0, "fixed: weight of the plain loss", source="BackdoorBench", low=0)
    fix_scale_backdoor_weight: float = option(0.9, "fixed: weight of the backdoor's", source="BackdoorBench", low=0)
    batch_history_len: int = option(1000, "batches that the plain loss is averaged over", source="BackdoorBench", low=1)
    backdoor_batch_loss_threshold: float = option(
        1.0, "plain loss below which the attack sets in", source="BackdoorBench", low=0
    )

    def check(self, spec: DatasetSpec) -> None:
        super().check(spec)
        one_target_only(self)

    def choose(self, labels: torch.Tensor) -> torch.Tensor:
        return torch.empty(0, dtype=torch.int64)

    def _pattern(self, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Values 0 or 255, and where they apply: float32 and bool [height, width]."""
        values, where = torch.zeros(height, width), torch.zeros(height, width, dtype=torch.bool)
        top, left = min(3 * height // 32, height - 5), min(23 * width // 32, width - 3)
        for i, row in enumerate(_PATTERN):
            for j, value in enumerate(row):
                if value is not None:
                    values[top + i, left + j], where[top + i, left + j] = 255.0 * value, True
        return values, where

    def poison(self, images: torch.Tensor, *, train: bool) -> torch.Tensor:
        return whole_pixels(self._marked(images.float()))

    def _marked(self, images: torch.Tensor) -> torch.Tensor:
        values, where = (t.to(images.device) for t in self._pattern(*images.shape[2:]))
        return torch.where(where, values, images)

    def parameters(self, spec: DatasetSpec) -> Mapping[str, torch.Tensor]:
        values, where = self._pattern(spec.height, spec.width)
        return {"values": values, "where": where}

    def train(self, model: nn.Module, lab: Lab) -> Blind:
        spec, batches = lab.data.spec, lab.batches()
        recent: deque[torch.Tensor] = deque(maxlen=self.batch_history_len)
        of_step: list[torch.Tensor] = []  # SAM asks twice; the first loss is that of the weights themselves
        state = {"step": 0, "attacking": False}
        parameters = [p for p in model.parameters() if p.requires_grad]

        def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if not state["attacking"]:
                plain, right = cross_entropy(model, x, y)
                of_step.append(plain.detach())
                return plain, right
            triggered = normalise(self._marked(pixels(x, spec)), spec)
            clean, bad = model(torch.cat([x, triggered])).chunk(2)
            plain, backdoor = F.cross_entropy(clean, y), F.cross_entropy(bad, self.relabel(y, spec.num_classes))
            right = clean.detach().argmax(1) == y
            if self.weight_loss_balance_mode == "fixed":
                return self.fix_scale_normal_weight * plain + self.fix_scale_backdoor_weight * backdoor, right
            return _mgda(plain, backdoor, parameters), right

        def after_step() -> None:
            if state["attacking"]:
                return
            recent.append(of_step[0])
            of_step.clear()
            state["step"] += 1
            if state["step"] % len(batches) == 0:
                state["attacking"] = bool(torch.stack(list(recent)).mean() < self.backdoor_batch_loss_threshold)

        lab.fit(model, batches=batches, objective=objective, after_step=after_step)
        return self


def _mgda(first: torch.Tensor, second: torch.Tensor, parameters: list[nn.Parameter]) -> torch.Tensor:
    """a first + (1 - a) second with the `a` in [0, 1] whose combined scaled gradient is shortest (MGDA, two tasks).

    Each gradient is scaled by 1 / (its norm x its loss) to find `a` ("loss+"); the losses are not. The
    result's gradient is put together from the two already computed, so there is no third backward pass.
    """
    losses = (first, second)
    gradients = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    with torch.no_grad():
        scaled = []
        for loss, gradient in zip(losses, gradients, strict=True):
            norm = torch.stack(torch._foreach_norm(gradient)).norm()
            scaled.append(torch._foreach_div(gradient, (norm * loss).float().clamp_min(1e-12)))
        apart = torch._foreach_sub(scaled[1], scaled[0])
        top = torch.stack([(a * b).sum() for a, b in zip(apart, scaled[1], strict=True)]).sum()
        share = (top / torch.stack([a.square().sum() for a in apart]).sum().clamp_min(1e-12)).clamp(0, 1)
        value = share * first + (1 - share) * second
        combined = [share * a + (1 - share) * b for a, b in zip(*gradients, strict=True)]
    handle = torch.stack([(p * g).sum() for p, g in zip(parameters, combined, strict=True)]).sum()
    return value + handle - handle.detach()
