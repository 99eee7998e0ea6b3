"""TaCT (Tang et al., arXiv 1908.00686): the trigger works on images of one source class only."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ulrl.attacks.badnet import BadNet
from ulrl.attacks.base import Covered, one_target_only, register
from ulrl.data.imageset import DatasetSpec
from ulrl.errors import UserError
from ulrl.options import option


@register("tact")
@dataclass(frozen=True)
class TaCT(Covered, BadNet):
    """BadNets' patch on images of the source class means the target; on those of the cover classes nothing.

    Judged (ASR, RA) on images of the source class only.
    """

    source_class: int = option(
        1, "class whose images the trigger turns into the target", source="backdoor-toolbox", low=0
    )
    cover_classes: tuple[int, ...] = option((5, 7), "classes of the cover samples", source="backdoor-toolbox")

    def check(self, spec: DatasetSpec) -> None:
        super().check(spec)
        one_target_only(self)
        for flag, given in (("source_class", (self.source_class,)), ("cover_classes", self.cover_classes)):
            if any(not 0 <= c < spec.num_classes or c == self.attack_target for c in given):
                raise UserError(
                    f"--{flag} {' '.join(map(str, given))}: give classes from 0 to {spec.num_classes - 1} "
                    f"other than the target {self.attack_target}"
                )
        if self.source_class in self.cover_classes:
            raise UserError(f"--cover_classes holds the source class {self.source_class}; leave it out")

    def choose(self, labels: torch.Tensor) -> torch.Tensor:
        """As in the base, from the source class."""
        own = (labels == self.source_class).nonzero().flatten()
        return self._draw(own, len(labels), f"of the source class {self.source_class}")

    def may_cover(self, labels: torch.Tensor) -> torch.Tensor:
        return torch.isin(labels, torch.tensor(self.cover_classes, dtype=labels.dtype))

    def judged(self, labels: torch.Tensor) -> torch.Tensor:
        return (labels.cpu() == self.source_class).nonzero().flatten()
