"""What a sample detector is: a model, a training set that may be poisoned and a few clean samples in, a score for each
image out.

It is not told which images are poisoned, nor how many.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.options import option
from ulrl.registry import Registry
from ulrl.training import Monitor


@dataclass(frozen=True)
class Scored:
    """What a detector returns.

    scores: float [N], finite, one for each suspect, the higher the more suspicious. evidence: JSON-able facts for
    `result.json`.
    """

    scores: torch.Tensor
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Detector:
    """Hyperparameters that every sample detector has. Defaults are those of the method's paper."""

    name: ClassVar[str]
    # BackdoorBench's files for detectors hold those of a training that they do not do.
    ignored: ClassVar[tuple[str, ...]] = tuple(
        (
            "epochs batch_size lr lr_scheduler client_optimizer sgd_momentum wd unlearning_epochs lr_unlearning_init "
            "momentum weight_decay gradient_ascent_type gamma flooding"
        ).split()
    )

    amp: bool = option(True, "bf16 autocast where the device has it", source="ULRL release")
    random_seed: int = option(0, "seed of every stream of randomness", source="BackdoorBench", low=0, high=2**32 - 1)

    def check(self, model: nn.Module, clean: ImageSet) -> None:
        """Called before any work: say why the method cannot work on such a model. Arguments as of `score`.

        Raises:
            UserError: the model lacks a part that the method works on.
        """

    def score(self, model: nn.Module, suspects: ImageSet, clean: ImageSet, monitor: Monitor) -> Scored:
        """How suspicious each of the images is that `model` was trained on.

        model: [B, C, H, W] float32 normalised to [B, K] logits, left as it was. suspects: with the labels that the
        model was trained on. clean: trusted samples, none of them among the suspects. All on one device.
        """
        raise NotImplementedError


DETECTORS: Registry[Detector] = Registry("sample detector", "ulrl.detectors")
register = DETECTORS.register
