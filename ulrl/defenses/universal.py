"""How far a class is from every image: the smallest perturbation that sends them all there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ulrl.data.batches import Batches
from ulrl.data.imageset import ImageSet
from ulrl.defenses.perturbation import pixel, still
from ulrl.machine import autocast, eval_batch
from ulrl.training import Stage

STEPS = 80
_RATE, _COST, _PACE, _GOAL = 0.06, 0.02, 1.3, 0.9


@dataclass(frozen=True)
class Added:
    """A perturbation of normalised images: [C, H, W]."""

    perturbation: torch.Tensor

    def __call__(self, images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        return images + strength * self.perturbation


def smallest_universal(
    model: nn.Module, data: ImageSet, classes: torch.Tensor, progress: Stage, *, amp: bool
) -> tuple[torch.Tensor, list[Added]]:
    """Per class the L2 norm of the smallest universal perturbation found, float [len(classes)], infinite for none; and
    the perturbation.

    One perturbation for each of `classes` (int64, on the device) is added to all images of `data`, cut to
    their range, and has succeeded when 90% of the images that are not of the class are called so. Adam on
    cross-entropy + cost * norm; the cost rises while it succeeds and falls while it does not (the schedule
    of Neural Cleanse's masks, on a perturbation without a mask, so that triggers over the whole image count
    too). A norm of 1 is one pixel of one channel going from black to white. The classes are independent and
    run side by side. `progress` is told of each of the STEPS.
    """
    (x, y), *_ = Batches(data, len(data))
    scale, low, high = pixel(data), x.amin((0, 2, 3), keepdim=True), x.amax((0, 2, 3), keepdim=True)
    device, count = x.device, len(classes)
    foreign = (y != classes[:, None]).float()  # an image of the class itself says nothing
    foreign /= foreign.sum(1, keepdim=True).clamp_min(1)
    delta = torch.zeros((count, *x.shape[1:]), device=device, requires_grad=True)
    optimizer = torch.optim.Adam([delta], _RATE)
    cost = torch.full((count,), _COST, device=device)
    best = torch.full((count,), torch.inf, device=device)
    found = torch.zeros_like(delta)
    with still(model):
        for _ in range(STEPS):
            norms, success = delta.flatten(1).norm(dim=1), torch.empty(count, device=device)
            optimizer.zero_grad()
            (cost * norms).sum().backward()
            for part in torch.arange(count, device=device).split(max(1, eval_batch(device) // len(x))):
                moved = (x + delta[part, None] * scale).clamp(low, high).flatten(0, 1)
                wanted = classes[part].repeat_interleave(len(x))
                with autocast(device, amp):
                    logits = model(moved.contiguous(memory_format=torch.channels_last)).float()
                loss = F.cross_entropy(logits, wanted, reduction="none").view(-1, len(x))
                (loss * foreign[part]).sum().backward()
                success[part] = ((logits.argmax(1) == wanted).view(-1, len(x)) * foreign[part]).sum(1)
            good = success >= _GOAL
            better = good & (norms.detach() < best)
            best = torch.where(better, norms.detach(), best)
            found = torch.where(better.view(-1, 1, 1, 1), delta.detach(), found)  # an index would wait for the device
            cost = torch.where(good, cost * _PACE, cost / _PACE).clamp(1e-3, 10)
            optimizer.step()
            progress.step()
    return best, [Added(perturbation) for perturbation in found * scale]
