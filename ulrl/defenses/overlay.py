"""How near a class is to every image: the smallest part of them that has to be painted over to make it that."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ulrl.data.batches import Batches
from ulrl.data.imageset import ImageSet
from ulrl.defenses.perturbation import still
from ulrl.machine import autocast, eval_batch
from ulrl.training import Stage

STEPS = 100
_RATE, _COST, _PACE, _GOAL = 0.1, 0.002, 1.3, 0.9
_FIRST = -1.0  # what the masks begin with, before the sigmoid: a quarter of every pixel


@dataclass(frozen=True)
class Painted:
    """An overlay for normalised images: mask [1, H, W] in [0, 1], picture [C, H, W]."""

    mask: torch.Tensor
    picture: torch.Tensor

    def __call__(self, images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        return images.lerp(self.picture, strength * self.mask)


def smallest_overlay(
    model: nn.Module, data: ImageSet, classes: torch.Tensor, progress: Stage, *, amp: bool
) -> tuple[torch.Tensor, list[Painted]]:
    """Per class the size in pixels of the smallest mask found, float [len(classes)], infinite for none; the overlays.

    A mask (a value in (0, 1) for each pixel) and a pattern in the range of `data`, for each of `classes` (int64, on the
    device), are laid over all images of `data`, and have succeeded when 90% of those that are not of the class are
    called so. Adam on cross-entropy + cost * the mask's sum, as in Neural Cleanse (S&P 2019), but the cost changes with
    each step and the steps are few: the masks are to be compared, not to look like a trigger. A blended trigger has a
    small one, too, as a part of it will do. The classes are independent and run side by side. `progress` is told of
    each of the STEPS.
    """
    (x, y), *_ = Batches(data, len(data))
    low, high = x.amin((0, 2, 3), keepdim=True), x.amax((0, 2, 3), keepdim=True)
    device, count = x.device, len(classes)
    foreign = (y != classes[:, None]).float()  # an image of the class itself says nothing
    foreign /= foreign.sum(1, keepdim=True).clamp_min(1)
    masks = torch.full((count, 1, *x.shape[2:]), _FIRST, device=device, requires_grad=True)
    patterns = torch.zeros((count, *x.shape[1:]), device=device, requires_grad=True)
    optimizer = torch.optim.Adam([masks, patterns], _RATE, betas=(0.5, 0.9))
    cost = torch.full((count,), _COST, device=device)
    best = torch.full((count,), torch.inf, device=device)
    where, what = torch.zeros_like(masks), torch.zeros_like(patterns)
    with still(model):
        for _ in range(STEPS):
            optimizer.zero_grad()
            sizes, success = masks.sigmoid().flatten(1).sum(1), torch.empty(count, device=device)
            (cost * sizes).sum().backward()
            for part in torch.arange(count, device=device).split(max(1, eval_batch(device) // len(x))):
                painted = low + patterns[part].sigmoid() * (high - low)
                images = torch.lerp(x, painted[:, None], masks[part].sigmoid()[:, None]).flatten(0, 1)
                wanted = classes[part].repeat_interleave(len(x))
                with autocast(device, amp):
                    logits = model(images.contiguous(memory_format=torch.channels_last)).float()
                loss = F.cross_entropy(logits, wanted, reduction="none").view(-1, len(x))
                (loss * foreign[part]).sum().backward()
                success[part] = ((logits.argmax(1) == wanted).view(-1, len(x)) * foreign[part]).sum(1)
            good = success >= _GOAL
            better = good & (sizes.detach() < best)
            best = torch.where(better, sizes.detach(), best)
            where, what = (
                torch.where(better.view(-1, 1, 1, 1), now.detach().sigmoid(), kept)
                for now, kept in ((masks, where), (patterns, what))
            )
            cost = torch.where(good, cost * _PACE, cost / _PACE).clamp(1e-5, 1)
            optimizer.step()
            progress.step()
    return best, [Painted(*overlay) for overlay in zip(where, low + what * (high - low), strict=True)]
