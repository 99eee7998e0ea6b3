"""What a defense is: a model and a few clean samples in, a repaired model and its evidence out.

A defense is given nothing else, so it cannot look at a poisoned sample or a test label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import nn

from ulrl.data.batches import Batches
from ulrl.data.imageset import ImageSet
from ulrl.errors import UserError
from ulrl.models.head import Head, find_head
from ulrl.options import option
from ulrl.registry import Registry
from ulrl.seeds import generator
from ulrl.training import Monitor


@dataclass(frozen=True)
class Trigger:
    """A trigger that a defense believes in: an image becomes (1 - mask) * image + mask * pattern.

    mask: float32 [1, H, W] in [0, 1]; pattern: float32 [C, H, W], pixels in [0, 1]. On the CPU.
    """

    mask: torch.Tensor
    pattern: torch.Tensor


@dataclass(frozen=True)
class Repair:
    """What a defense returns.

    flagged: classes called suspicious, the highest score first. evidence: JSON-able facts for
    `result.json`. tables: further evidence, each written as `<name>.csv`. candidates: where a strength
    was chosen, what the others would have given: an iterator of (strength, model), the model valid until
    the next one is asked for. Only the judge walks it, and only for `--report_oracle`. triggers: those found,
    by the class that they lead to, for the judge to compare with the true one.
    """

    model: nn.Module
    flagged: list[int] = field(default_factory=list)
    evidence: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    candidates: Callable[[], Iterator[tuple[float, nn.Module]]] | None = None
    triggers: dict[int, Trigger] = field(default_factory=dict)


@dataclass(frozen=True)
class Defense:
    """Hyperparameters that every defense has. Defaults are those of the method's paper."""

    name: ClassVar[str]
    in_training: ClassVar[bool] = False  # handed the poisoned training set instead of clean samples (ABL)
    repairs: ClassVar[bool] = True  # or only finds something, and is not ranked among those that repair

    batch_size: int = option(128, "clean images per step", source="ULRL release", low=2)
    amp: bool = option(True, "bf16 autocast where the device has it", source="ULRL release")
    random_seed: int = option(0, "seed of every stream of randomness", source="BackdoorBench", low=0, high=2**32 - 1)

    def check(self, model: nn.Module, clean: ImageSet) -> None:
        """Called before any work: say why the method cannot repair such a model. Arguments as of `run`.

        Raises:
            UserError: the model lacks a part that the method works on.
        """

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        """Repair `model`, which may be changed in place, with the clean samples.

        model: [B, C, H, W] float32 normalised to [B, K] logits, on the device of `clean`.
        """
        raise NotImplementedError

    def run_checked(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        """As `run`, with `flagged` as a list of int, whatever held them.

        Raises:
            UserError: `run` returned no `Repair` of a model, or flagged what is no class.
        """
        repair: Any = self.run(model, clean, monitor)
        if not isinstance(repair, Repair) or not isinstance(repair.model, nn.Module):
            what = "a Repair without a model" if isinstance(repair, Repair) else type(repair).__name__
            raise UserError(f"run() of the defense {self.name} returned {what}; let it return Repair(model)")
        flagged: Any = repair.flagged
        if hasattr(flagged, "__iter__"):
            flagged = [k.item() if hasattr(k, "item") else k for k in flagged]
        if not isinstance(flagged, list) or not all(
            type(k) is int and 0 <= k < clean.spec.num_classes for k in flagged
        ):
            raise UserError(
                f"run() of the defense {self.name} flagged {flagged}, which is no list of classes below "
                f"{clean.spec.num_classes}; mend it"
            )
        return replace(repair, flagged=flagged)

    def batches(self, clean: ImageSet, stream: str, **how: Any) -> Batches:
        """Shuffled, augmented batches of the clean samples, from the named stream; how: arguments of `Batches`."""
        return Batches(clean, self.batch_size, generator(self.random_seed, stream, clean.device), **how)


@dataclass(frozen=True)
class OnHead:
    """Beside `Defense`, for one that works on the classifier head: which layer that is."""

    linear_name: str | None = option(None, "dotted name of the classifier head, found when not given")

    def head(self, model: nn.Module, clean: ImageSet) -> tuple[str, Head]:
        """As `find_head`."""
        return find_head(model, clean.spec.num_classes, self.linear_name)

    def check(self, model: nn.Module, clean: ImageSet) -> None:
        self.head(model, clean)


DEFENSES: Registry[Defense] = Registry("defense", "ulrl.defenses")
register = DEFENSES.register
