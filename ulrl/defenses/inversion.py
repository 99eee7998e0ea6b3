"""A stage of several defenses: the smallest patch that turns any image into a class (Neural Cleanse, S&P 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ulrl.data.batches import Batches
from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import Defense, Trigger
from ulrl.defenses.perturbation import mean_pixel, pixel, squash, still
from ulrl.machine import autocast, eval_batch
from ulrl.options import option
from ulrl.seeds import generator
from ulrl.training import Monitor

_PAPER, _BENCH = "paper of NC", "BackdoorBench"


@dataclass(frozen=True)
class Inverted:
    """What was found for each of n classes.

    masks: float32 [n, 1, H, W], the smallest that succeeded, else the last. patterns: float32 [n, C, H, W], normalised.
    reached: bool [n], whether one succeeded.
    """

    classes: Sequence[int]
    masks: torch.Tensor
    patterns: torch.Tensor
    reached: torch.Tensor

    def triggers(self, data: ImageSet) -> dict[int, Trigger]:
        """By class, in pixels of `data`."""
        pixels = self.patterns / pixel(data) + mean_pixel(data)
        return {k: Trigger(m.cpu(), p.cpu()) for k, m, p in zip(self.classes, self.masks, pixels, strict=True)}


@dataclass(frozen=True)
class Costed(Defense):
    """A defense that looks for small triggers, and its options for what a mask's size costs."""

    mask_lr: float = option(0.1, "learning rate of masks and patterns (Adam)", source=_PAPER, low=0)
    init_cost: float = option(1e-3, "weight of the mask's size at first", source=_PAPER, low=0)
    cost_multiplier: float = option(2.0, "factor of the cost", source=_PAPER, low=1)
    patience: int = option(5, "epochs of success, or of failure, before the cost changes", source=_PAPER, low=1)
    atk_succ_threshold: float = option(98.0, "percentage from which a patch succeeds", source=_BENCH, low=0, high=100)
    early_stop_threshold: float = option(0.99, "a mask above this share of the best is no progress", source=_PAPER)
    early_stop_patience: int = option(25, "epochs without progress that end a class", source=_BENCH, low=1)


@dataclass(frozen=True)
class Inverting(Costed):
    """A defense that inverts triggers by gradients, and its options for that."""

    nc_epoch: int = option(80, "epochs of inversion at most", source=_BENCH, low=1)

    def invert(
        self, model: nn.Module, clean: ImageSet, monitor: Monitor, classes: Sequence[int] | None = None
    ) -> Inverted:
        """Per class, all of them where none are named, a mask and a pattern by Adam on cross-entropy + cost * |mask|_1.

        The cost rises by `cost_multiplier` while the patch succeeds and falls by its power 1.5 while it does not. The
        classes are independent, so they are optimised side by side. `model` is left as it was.
        """
        spec, device, mean, scale = clean.spec, clean.device, mean_pixel(clean), pixel(clean)
        classes = range(spec.num_classes) if classes is None else classes
        count, targets = len(classes), torch.tensor(list(classes), device=device)
        batches = Batches(clean, self.batch_size, generator(self.random_seed, "invert", device), augmented=False)
        raw_masks = torch.ones((count, 1, spec.height, spec.width), device=device, requires_grad=True)
        raw_patterns = torch.ones((count, *clean.images.shape[1:]), device=device, requires_grad=True)
        optimizer = torch.optim.Adam([raw_masks, raw_patterns], self.mask_lr, betas=(0.5, 0.9))
        course = Course(self, count, device)
        best = [squash(raw_masks.detach()), torch.zeros_like(raw_patterns)]
        active = torch.arange(count)
        with still(model), monitor.stage("invert", self.nc_epoch * len(batches)) as progress:
            for epoch in range(1, self.nc_epoch + 1):
                hits, seen = torch.zeros(count, device=device), 0
                for x, _ in batches:
                    raw_masks.grad, raw_patterns.grad = torch.zeros_like(raw_masks), torch.zeros_like(raw_patterns)
                    for part in active.to(device).split(max(1, eval_batch(device) // len(x))):
                        mask = squash(raw_masks[part])
                        pattern = (squash(raw_patterns[part]) - mean) * scale
                        stamped = torch.lerp(x, pattern[:, None], mask[:, None]).flatten(0, 1)
                        wanted = targets[part].repeat_interleave(len(x))
                        with autocast(device, self.amp):
                            logits = model(stamped.contiguous(memory_format=torch.channels_last)).float()
                        loss = F.cross_entropy(logits, wanted, reduction="sum") / len(x)
                        (loss + (course.cost[part] * mask.flatten(1).sum(1)).sum()).backward()
                        hits[part] += (logits.detach().argmax(1) == wanted).view(-1, len(x)).sum(1)
                    optimizer.step()
                    seen += len(x)
                    progress.step()
                with torch.no_grad():
                    now = [squash(raw_masks), (squash(raw_patterns) - mean) * scale]
                    better = course.step(hits / seen, now[0].flatten(1).sum(1))
                    keep = (better | course.best.isinf())[:, None, None, None]
                    best = [torch.where(keep, new, old) for new, old in zip(now, best, strict=True)]
                active = course.active.nonzero().flatten().cpu()
                progress.epoch(model, epoch, success=(hits / seen).mean().item(), classes=len(active))
                if not len(active):
                    break
        return Inverted(classes, best[0], best[1], course.best.isfinite())


class Course:
    """Per class the cost, the smallest successful mask so far, and whether to go on; one tensor for all of them."""

    def __init__(self, options: Costed, count: int, device: torch.device) -> None:
        self._options = options
        self.cost = torch.full((count,), options.init_cost, device=device)
        self.best = torch.full((count,), torch.inf, device=device)
        self.active = torch.ones(count, dtype=torch.bool, device=device)
        self._ups, self._downs, self._idle = torch.zeros((3, count), dtype=torch.int64, device=device)
        self._rose, self._fell = torch.zeros((2, count), dtype=torch.bool, device=device)

    def step(self, success: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """After an epoch: share of images that each patch turned [K], mask sizes [K]; says which are new bests [K]."""
        o = self._options
        good = success >= o.atk_succ_threshold / 100
        better = self.active & good & (sizes < self.best)
        progress = better & (sizes < o.early_stop_threshold * self.best)
        self.best = torch.where(better, sizes, self.best)
        self._idle = torch.where(progress | self.best.isinf(), 0, self._idle + 1)
        self._ups, self._downs = torch.where(good, self._ups + 1, 0), torch.where(good, 0, self._downs + 1)
        up, down = self._ups >= o.patience, self._downs >= o.patience
        self.cost = self.cost * torch.where(up, o.cost_multiplier, 1) / torch.where(down, o.cost_multiplier**1.5, 1)
        self._ups, self._downs = self._ups.masked_fill(up, 0), self._downs.masked_fill(down, 0)
        self._rose, self._fell = self._rose | up, self._fell | down
        self.active = self.active & ~(self._rose & self._fell & (self._idle >= o.early_stop_patience))
        return better
