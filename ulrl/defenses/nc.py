"""NC: Neural Cleanse, triggers found by inversion and unlearned (Wang et al., IEEE S&P 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from ulrl.data.batches import Batches
from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import Repair, register
from ulrl.defenses.finetuning import FineTuning
from ulrl.defenses.perturbation import pixel, still
from ulrl.defenses.unlearning import robust_z
from ulrl.machine import autocast, eval_batch
from ulrl.options import option
from ulrl.seeds import generator
from ulrl.training import Monitor, cross_entropy

_PAPER, _BENCH = "paper", "BackdoorBench"


@register("nc")
@dataclass(frozen=True)
class NC(FineTuning):
    """Find for every class the smallest patch that turns any image into it, and unlearn the suspicious ones.

    1. Invert: per class a mask and a pattern, by Adam on cross-entropy + cost * |mask|_1. The cost rises
       by `cost_multiplier` while the patch succeeds and falls by its power 1.5 while it does not. The
       classes are independent, so they are optimised side by side.
    2. Judge: classes whose mask is smaller than the median by more than `z_threshold` robust deviations.
    3. Unlearn: fine-tune with the found patch on `unlearning_ratio` of the images, under their true labels.
       No suspicious class: the model stays as it was.

    BackdoorBench saves the backdoored model instead of the one that it fine-tuned; here the repaired model
    is the result. Fine-tuning is as long as there; the paper's is one epoch over 10 % of the training images.
    """

    ignored: ClassVar[tuple[str, ...]] = (
        "early_stop", "EPSILON", "to_file", "n_times_test", "use_norm", "cleaning_ratio",
    )  # fmt: skip

    nc_epoch: int = option(80, "epochs of inversion at most", source=_BENCH, low=1)
    mask_lr: float = option(0.1, "learning rate of masks and patterns (Adam)", source=_PAPER, low=0)
    init_cost: float = option(1e-3, "weight of the mask's size at first", source=_PAPER, low=0)
    cost_multiplier: float = option(2.0, "factor of the cost", source=_PAPER, low=1)
    patience: int = option(5, "epochs of success, or of failure, before the cost changes", source=_PAPER, low=1)
    atk_succ_threshold: float = option(98.0, "percentage from which a patch succeeds", source=_BENCH, low=0, high=100)
    early_stop_threshold: float = option(0.99, "a mask above this share of the best is no progress", source=_PAPER)
    early_stop_patience: int = option(25, "epochs without progress that end a class", source=_BENCH, low=1)
    z_threshold: float = option(2.0, "classes with a larger robust z are suspicious", source=_PAPER, low=0)
    unlearning_ratio: float = option(0.2, "share of images that get a patch", source=_PAPER, low=0, high=1)

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        masks, patterns, reached = self._invert(model, clean, monitor)
        sizes = masks.flatten(1).sum(1).cpu()
        z, median, mad = robust_z(sizes)
        suspicious = (z > self.z_threshold) & (sizes < median) & reached.cpu()
        table = pd.DataFrame(
            {
                "mask_norm": sizes.numpy(),
                "z": z.numpy(),
                "reached": reached.cpu().numpy(),
                "flagged": suspicious.numpy(),
            }
        )
        table.index.name = "class"
        flagged = table[table.flagged].sort_values("z", ascending=False).index.tolist()
        if flagged:
            self._unlearn(model, masks[flagged], patterns[flagged], clean, monitor)
        evidence = {"z_threshold": self.z_threshold, "median": median, "mad": mad, "reached": int(reached.sum())}
        return Repair(model, flagged, evidence, {"masks": table})

    def _invert(
        self, model: nn.Module, clean: ImageSet, monitor: Monitor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Per class the smallest mask [K, 1, H, W] that succeeded, else the last, its pattern [K, C, H, W], normalised,
        and whether it succeeded [K]."""
        spec, device = clean.spec, clean.device
        count, scale = spec.num_classes, pixel(clean)
        mean = torch.tensor(spec.mean, device=device).view(1, -1, 1, 1)
        stream = generator(self.random_seed, "invert", device)
        batches = Batches(clean, self.batch_size, stream, augmented=False)
        raw_masks = torch.ones((count, 1, spec.height, spec.width), device=device, requires_grad=True)
        raw_patterns = torch.ones((count, *clean.images.shape[1:]), device=device, requires_grad=True)
        optimizer = torch.optim.Adam([raw_masks, raw_patterns], self.mask_lr, betas=(0.5, 0.9))
        course = _Course(self, count, device)
        best = [(raw_masks.detach().tanh() + 1) / 2, torch.zeros_like(raw_patterns)]
        active = torch.arange(count)
        with still(model), monitor.stage("invert", self.nc_epoch * len(batches)) as progress:
            for epoch in range(1, self.nc_epoch + 1):
                hits, seen = torch.zeros(count, device=device), 0
                for x, _ in batches:
                    raw_masks.grad, raw_patterns.grad = torch.zeros_like(raw_masks), torch.zeros_like(raw_patterns)
                    for classes in active.to(device).split(max(1, eval_batch(device) // len(x))):
                        mask = (raw_masks[classes].tanh() + 1) / 2
                        pattern = ((raw_patterns[classes].tanh() + 1) / 2 - mean) * scale
                        stamped = torch.lerp(x, pattern[:, None], mask[:, None]).flatten(0, 1)
                        wanted = classes.repeat_interleave(len(x))
                        with autocast(device, self.amp):
                            logits = model(stamped.contiguous(memory_format=torch.channels_last)).float()
                        loss = F.cross_entropy(logits, wanted, reduction="sum") / len(x)
                        (loss + (course.cost[classes] * mask.flatten(1).sum(1)).sum()).backward()
                        hits[classes] += (logits.detach().argmax(1) == wanted).view(-1, len(x)).sum(1)
                    optimizer.step()
                    seen += len(x)
                    progress.step()
                with torch.no_grad():
                    now = [(raw_masks.tanh() + 1) / 2, ((raw_patterns.tanh() + 1) / 2 - mean) * scale]
                    better = course.step(hits / seen, now[0].flatten(1).sum(1))
                    keep = (better | course.best.isinf())[:, None, None, None]
                    best = [torch.where(keep, new, old) for new, old in zip(now, best, strict=True)]
                active = course.active.nonzero().flatten().cpu()
                progress.epoch(model, epoch, success=(hits / seen).mean().item(), classes=len(active))
                if not len(active):
                    break
        return best[0], best[1], course.best.isfinite()

    def _unlearn(
        self, model: nn.Module, masks: torch.Tensor, patterns: torch.Tensor, clean: ImageSet, monitor: Monitor
    ) -> None:
        stream = generator(self.random_seed, "stamp", clean.device)

        def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            stamped = torch.rand(len(y), generator=stream, device=y.device) < self.unlearning_ratio
            which = torch.randint(len(masks), (len(y),), generator=stream, device=y.device)
            return cross_entropy(model, torch.lerp(x, patterns[which], masks[which] * stamped[:, None, None, None]), y)

        self.finetune(model, clean, monitor, "unlearn", objective=objective)


class _Course:
    """Per class the cost, the smallest successful mask so far, and whether to go on; one tensor for all of them."""

    def __init__(self, options: NC, count: int, device: torch.device) -> None:
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
