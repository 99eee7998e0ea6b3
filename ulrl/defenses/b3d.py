"""B3D: triggers found by queries alone (Dong et al., arXiv 2103.13127); repairs nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from ulrl.data.batches import Batches
from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import Repair, Trigger, register
from ulrl.defenses.inversion import Costed, Course
from ulrl.defenses.perturbation import mean_pixel, pixel, squash, still
from ulrl.errors import UserError
from ulrl.machine import autocast, eval_batch
from ulrl.options import option
from ulrl.seeds import generator
from ulrl.training import Monitor

_RECALLED = "paper, from memory"

Ask = Callable[[torch.Tensor], torch.Tensor]  # float32 [B, C, H, W] in [0, 1] to labels [B] or scores [B, K]


class Asked:
    """Whom the queries go to, and how many went there."""

    def __init__(self, ask: Ask, num_classes: int, batch_size: int) -> None:
        self._ask, self._num_classes, self._batch_size = ask, num_classes, batch_size
        self.count = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Log-probabilities, float32 [B, K], of the scores; or, of labels, 0 where the label is and -1 elsewhere.

        Raises:
            UserError: the answers are neither.
        """
        return torch.cat([self._answers(part) for part in images.split(self._batch_size)])

    def _answers(self, images: torch.Tensor) -> torch.Tensor:
        self.count += len(images)
        said = self._ask(images)
        try:
            answers = torch.as_tensor(said, device=images.device)
        except (TypeError, ValueError) as error:  # names of classes, say
            raise UserError(f"the answers are no numbers: {error}") from None
        if answers.shape == (len(images),) and not answers.is_floating_point():
            if not 0 <= answers.min() <= answers.max() < self._num_classes:
                raise UserError(
                    f"a label lies between {answers.min()} and {answers.max()}; labels must be 0 to "
                    f"{self._num_classes - 1}, for {self._num_classes} classes"
                )
            return F.one_hot(answers.long(), self._num_classes).float() - 1
        if answers.shape != (len(images), self._num_classes) or not answers.isfinite().all():
            raise UserError(
                f"{len(images)} images were answered by {answers.dtype} of shape {tuple(answers.shape)}; the answers "
                f"must be whole labels, one for each, or finite scores, {self._num_classes} for each"
            )
        answers = answers.float()
        if (answers >= 0).all() and (answers.sum(1) - 1).abs().max() < 1e-2:
            return answers.clamp_min(1e-8).log()
        return answers.log_softmax(1)


@dataclass(frozen=True)
class Scan:
    """What a scan found: per class the size of the smallest mask, whether it succeeded, which are suspicious.

    table: index class; columns mask_norm, ratio (to the median), reached, flagged. flagged: the smallest ratio first.
    queries: how many images were sent.
    """

    table: pd.DataFrame
    flagged: list[int]
    triggers: dict[int, Trigger]
    queries: int


@register("b3d")
@dataclass(frozen=True)
class B3D(Costed):
    """Find for every class a small trigger by natural evolution strategies, and flag the classes with a tiny one.

    A mask is drawn from a Bernoulli distribution for each pixel, a pattern from a normal one behind a tanh; `draws`
    pairs are laid over `batch_size` clean images and sent to the model, whose answers' losses estimate the gradient of
    the distributions' parameters. The classes are searched side by side, and what a mask's size costs follows Neural
    Cleanse's schedule, by steps. A class is suspicious when its mask is smaller than `small` of the median.

    Scores, where there are any, give a cross-entropy, labels alone an error rate. The size's own gradient is exact, and
    the mean loss of the draws is subtracted: either is ours, and lowers the estimate's noise at no query.
    """

    repairs: ClassVar[bool] = False

    batch_size: int = option(16, "clean images per step", low=2)
    init_cost: float = option(0.01, "weight of the mask's size at first", low=0)
    early_stop_patience: int = option(200, "steps without progress that end a class", low=1)
    mask_lr: float = option(0.2, "learning rate of the distributions (Adam)", low=0)
    draws: int = option(50, "masks and patterns drawn in a step", source=_RECALLED, low=2)
    sigma: float = option(0.1, "deviation of the patterns, before the tanh", source=_RECALLED, low=1e-6)
    queries: int = option(2_000_000, "images sent to the model at most, over all classes", low=1)
    small: float = option(0.25, "a mask below this share of the median is suspicious", source=_RECALLED, low=0, high=1)

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        mean, scale = mean_pixel(clean), pixel(clean)

        def ask(images: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), autocast(clean.device, self.amp):
                answers: torch.Tensor = model((images - mean) * scale).float()
            return answers

        images = torch.cat([x / scale + mean for x, _ in Batches(clean, eval_batch(clean.device))])
        with still(model):
            scan = self.scan(ask, images, clean.spec.num_classes, monitor)
        return Repair(model, scan.flagged, {"queries": scan.queries}, {"masks": scan.table}, triggers=scan.triggers)

    def scan(
        self, ask: Ask, images: torch.Tensor, num_classes: int, monitor: Monitor, classes: Sequence[int] | None = None
    ) -> Scan:
        """Search the triggers of `classes`, all of them where none are named, of whatever `ask` reaches.

        images: clean ones, float32 [N, C, H, W] in [0, 1].

        Raises:
            UserError: answers that cannot be used, or a budget that is spent before the first step.
        """
        device, classes = images.device, list(range(num_classes) if classes is None else classes)
        count, size, (channels, height, width) = len(classes), min(self.batch_size, len(images)), images.shape[1:]
        asked = Asked(ask, num_classes, eval_batch(device))
        if self.queries < count * self.draws * size:
            raise UserError(
                f"queries: {self.queries} are spent before the first step, which takes {self.draws} draws of {size} "
                f"images for each of {count} classes; raise it, or lower draws or batch_size"
            )
        targets, stream = torch.tensor(classes, device=device), generator(self.random_seed, "evolve", device)
        masks = torch.zeros(count, 1, height, width, device=device)
        patterns = torch.zeros(count, channels, height, width, device=device)
        optimizer = torch.optim.Adam([masks, patterns], self.mask_lr, betas=(0.5, 0.9))
        course, best = Course(self, count, device), [masks.clone(), patterns.clone()]
        steps = self.queries // (count * self.draws * size)
        with monitor.stage("evolve", steps) as progress:
            for _ in range(steps):
                active = course.active.nonzero().flatten()
                success = torch.zeros(count, device=device)
                masks.grad, patterns.grad = torch.zeros_like(masks), torch.zeros_like(patterns)
                for k in active.tolist():
                    x = images[torch.randint(len(images), (size,), generator=stream, device=device)]
                    share = squash(masks[k])
                    noise = torch.randn(self.draws, *patterns[k].shape, generator=stream, device=device)
                    drawn = torch.rand(self.draws, *share.shape, generator=stream, device=device) < share
                    stamped = torch.where(drawn[:, None], squash(patterns[k] + self.sigma * noise)[:, None], x)
                    answers = asked(stamped.flatten(0, 1))
                    losses = -answers[:, targets[k]].view(self.draws, size).mean(1)
                    losses = (losses - losses.mean())[:, None, None, None] / self.draws
                    masks.grad[k] = (losses * 2 * (drawn.float() - share)).sum(0)
                    masks.grad[k] += course.cost[k] * 2 * share * (1 - share)
                    patterns.grad[k] = (losses * noise).sum(0) / self.sigma
                    success[k] = (answers.argmax(1) == targets[k]).float().mean()
                better = course.step(success, squash(masks).flatten(1).sum(1))
                keep = (better | course.best.isinf())[:, None, None, None]
                best = [torch.where(keep, new, old) for new, old in zip((masks, patterns), best, strict=True)]
                optimizer.step()
                progress.step()
                if not course.active.any():
                    progress.reached()
                    break
        return self._judged(classes, squash(best[0]), squash(best[1]), course.best.isfinite(), asked.count)

    def _judged(
        self, classes: list[int], masks: torch.Tensor, patterns: torch.Tensor, reached: torch.Tensor, queries: int
    ) -> Scan:
        table = pd.DataFrame({"mask_norm": masks.flatten(1).sum(1).cpu().numpy(), "reached": reached.cpu().numpy()})
        table.index = pd.Index(classes, name="class")
        table.insert(1, "ratio", table.mask_norm / table.mask_norm.median())
        table["flagged"] = table.reached & (table.ratio < self.small)
        flagged = table[table.flagged].sort_values("ratio").index.tolist()
        triggers = {k: Trigger(m.cpu(), p.cpu()) for k, m, p in zip(classes, masks, patterns, strict=True)}
        return Scan(table, flagged, triggers, queries)
