"""The first stage of the unlearning family: forget the clean task, and see which weights moved."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import Defense
from ulrl.errors import UserError
from ulrl.metrics import class_shares
from ulrl.models.copying import copied
from ulrl.options import option
from ulrl.training import SCHEDULERS, Monitor, Overflow, accuracy, fit, make_optimizer, make_scheduler, predict

log = logging.getLogger(__name__)

MAD_TO_SIGMA = 1.4826  # a normal distribution's deviation is 1.4826 times its MAD
_RELEASES = "RNP and ULRL releases"


@dataclass(frozen=True)
class Unlearned:
    """An unlearned copy of a model, whether clean accuracy fell to the threshold, and what is left of it.

    shares: of the clean samples that it gives each class, float64 [K] on the CPU. label: the class that it gives most
    of them. With the clean task forgotten the backdoor's target remains (RNP, arXiv 2305.14876).
    """

    model: nn.Module
    reached: bool
    epochs: int
    accuracy: float  # on the clean samples, in the last epoch
    shares: torch.Tensor

    @property
    def label(self) -> int:
        return int(self.shares.argmax())

    @property
    def label_share(self) -> float:
        return self.shares[self.label].item()

    @property
    def evidence(self) -> dict[str, Any]:
        """For `result.json`."""
        return {
            "unlearned": {"reached": self.reached, "epochs": self.epochs, "accuracy": self.accuracy},
            "detected_label": self.label,
            "detected_share": self.label_share,
        }


@dataclass(frozen=True)
class Unlearning(Defense):
    """A defense that unlearns first, and its options for that. Defaults are the releases' for CIFAR-10."""

    unlearning_epochs: int = option(20, "unlearning epochs at most (RNP's release: 21)", source=_RELEASES, low=1)
    unlearning_lr: float = option(0.01, "learning rate of unlearning", source=_RELEASES, low=0)
    lr_scheduler: str = option("MultiStepLR", "rate over the unlearning", source=_RELEASES, choices=SCHEDULERS)
    steplr_milestones: tuple[int, ...] = option((10, 20), "epochs after which the rate drops", source=_RELEASES)
    steplr_gamma: float = option(0.1, "factor of each drop", source=_RELEASES, low=0)
    clip: float = option(20.0, "bound on the gradient norm in unlearning; 0: none", source=_RELEASES, low=0)
    clean_threshold: float = option(
        0.2, "unlearn until accuracy on the clean samples is at most this", source=_RELEASES, low=0, high=1
    )
    sgd_momentum: float = option(0.9, "momentum of every stage, with sgd", source=_RELEASES, low=0, high=1)
    wd: float = option(5e-4, "weight decay in unlearning (there is none later)", source=_RELEASES, low=0)

    def ascent_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """What `unlearn` moves the weights by."""
        return make_optimizer(model, "sgd", self.unlearning_lr, self.sgd_momentum, self.wd)

    def unlearn(self, model: nn.Module, clean: ImageSet, monitor: Monitor, *, in_eval: bool = False) -> Unlearned:
        """Maximise the cross-entropy on `clean` until its accuracy is at most `clean_threshold`.

        The goal is no less than the share of the most frequent class: a model that has forgotten everything gives
        all samples one class, and with ten classes TSBD's threshold of 0.1 often lies below what is right by that.
        Works on a copy: `model` is left as it was. The accuracy is that of the running epoch, in train mode, as in
        the releases of ULRL and RNP; or, `in_eval`, the finished epoch's in eval mode, as in TSBD's.

        With sgd, whatever relearns later, as in the releases: its changes are in proportion to the gradients, which is
        what a ranking of the weights that moved most reads. AdamW gives every weight about the same step, and no class
        stands out.

        An ascent has no bottom: its loss and so its gradients grow with each step, and without `clip` one step can
        take weights to 1e10, behind which the net overflows.

        Source: ULRL (arXiv 2405.14781, section 3.1) and RNP (arXiv 2305.14876, equation 1).

        Raises:
            UserError: it overflowed all the same.
        """
        subject = copied(model)
        measured, constant = 1.0, clean.labels.bincount().max().item() / len(clean)

        def low_enough(running: float) -> bool:
            nonlocal measured
            measured = running
            if in_eval:
                measured = accuracy(subject, clean, self.amp)
            return measured <= max(self.clean_threshold, constant)

        optimizer = self.ascent_optimizer(subject)
        epochs = self.unlearning_epochs
        try:
            reached = fit(
                subject, self.batches(clean, "unlearn"), epochs, optimizer,
                make_scheduler(optimizer, self.lr_scheduler, epochs, self.steplr_milestones, self.steplr_gamma),
                monitor, "unlearn", amp=self.amp, ascend=True, clip=self.clip or None, stop=low_enough,
            )  # fmt: skip
            given = {name: b for name, b in model.named_buffers() if b.isfinite().all()}  # a mask may hold -inf
            held = [*subject.parameters(), *(b for name, b in subject.named_buffers() if name in given)]
            if not all(tensor.isfinite().all() for tensor in held):
                raise Overflow(f"unlearning overflowed in epoch {monitor.history[-1]['epoch']}; lower its rate")
        except Overflow as overflow:  # of a method that only begins with it, these are no options
            raise UserError(
                f"{overflow} (unlearning_lr of {self.name}), bound its gradients (clip 20), or choose another method"
            ) from None
        if not reached:
            log.warning(
                "unlearning ended at an accuracy of %.3f, above the threshold %g", measured, self.clean_threshold
            )
        shares = class_shares(predict(subject, clean, self.amp), clean.spec.num_classes)
        return Unlearned(subject, reached, monitor.history[-1]["epoch"], measured, shares)


def robust_z(values: torch.Tensor) -> tuple[torch.Tensor, float, float]:
    """Distance from the median in robust deviations, its median and its MAD: float [K] in, (float [K], m, MAD).

    z = |v - m| / (1.4826 MAD). The median of an even count is the mean of the middle two (the release
    takes the lower one, which raises every z). A MAD below a millionth of the largest value counts as
    that: with most values equal, those that differ still stand out, and nothing is divided by zero.
    """
    values = values.cpu().double()  # MPS has no float64
    median = values.quantile(0.5)
    distance = (values - median).abs()
    mad = distance.quantile(0.5).clamp_min(1e-6 * values.abs().max().item()).clamp_min(1e-30)
    return distance / (MAD_TO_SIGMA * mad), median.item(), mad.item()
