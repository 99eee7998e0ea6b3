"""The first stage of the unlearning family: forget the clean task, and see which weights moved."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass

import torch
from torch import nn

from ulrl.data.batches import Batches
from ulrl.training import Monitor, fit, make_scheduler

log = logging.getLogger(__name__)

MAD_TO_SIGMA = 1.4826  # a normal distribution's deviation is 1.4826 times its MAD


@dataclass(frozen=True)
class Unlearned:
    """An unlearned copy of a model, and whether clean accuracy fell to the threshold."""

    model: nn.Module
    reached: bool
    epochs: int
    accuracy: float  # on the clean samples, in the last epoch


def unlearn(
    model: nn.Module,
    batches: Batches,
    monitor: Monitor,
    *,
    epochs: int,
    lr: float,
    momentum: float,
    wd: float,
    scheduler: str,
    milestones: tuple[int, ...],
    gamma: float,
    clip: float,
    threshold: float,
    amp: bool,
) -> Unlearned:
    """Maximise the cross-entropy on clean samples until their accuracy is at most `threshold`.

    Works on a copy: `model` is left as it was.

    Source: ULRL (arXiv 2405.14781, section 3.1) and RNP (arXiv 2305.14876, equation 1). The accuracy
    is that of the running epoch, in train mode, as in both releases.
    """
    copied = copy.deepcopy(model)
    optimizer = torch.optim.SGD(copied.parameters(), lr, momentum, weight_decay=wd)
    reached = fit(
        copied, batches, epochs, optimizer, make_scheduler(optimizer, scheduler, epochs, milestones, gamma),
        monitor, "unlearn", amp=amp, ascend=True, clip=clip, stop=lambda accuracy: accuracy <= threshold,
    )  # fmt: skip
    last = monitor.history[-1]
    if not reached:
        log.warning("unlearning ended at an accuracy of %.3f, above the threshold %g", last["acc"], threshold)
    return Unlearned(copied, reached, last["epoch"], last["acc"])


def robust_z(values: torch.Tensor) -> tuple[torch.Tensor, float, float]:
    """Distance from the median in robust deviations, its median and its MAD: float [K] in, (float [K], m, MAD).

    z = |v - m| / (1.4826 MAD). The median of an even count is the mean of the middle two (the release
    takes the lower one, which raises every z). A MAD below a millionth of the largest value counts as
    that: with most values equal, those that differ still stand out, and nothing is divided by zero.
    """
    values = values.double()
    median = values.quantile(0.5)
    distance = (values - median).abs()
    mad = distance.quantile(0.5).clamp_min(1e-6 * values.abs().max().item()).clamp_min(1e-30)
    return distance / (MAD_TO_SIGMA * mad), median.item(), mad.item()
