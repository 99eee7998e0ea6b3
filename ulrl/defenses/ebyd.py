"""EBYD: expose the backdoor first, then tell, name, invert and prune it (Li et al., arXiv 2410.19427)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import Repair, register
from ulrl.defenses.exposing import Exposing
from ulrl.defenses.inversion import Inverting
from ulrl.defenses.recover_trigger import Calibrated
from ulrl.defenses.rnp import RNP
from ulrl.options import option
from ulrl.training import Monitor


@register("ebyd")
@dataclass(frozen=True)
class EBYD(Exposing, Inverting, RNP):
    """Expose before you defend.

    1. Expose: unlearn the clean task with Adam, in small steps, on a copy.
    2. Tell: the exposed model's predictions of the clean samples are spread over the classes as long as there is no
       backdoor; a class that is given more than `share_threshold` of them is flagged.
    3. Invert a trigger for the most predicted class on the exposed model, as `recover_trigger` does.
    4. Erase: masks are learned on the exposed model, and the original is pruned by them, as `rnp` does.

    Each step stands alone: `detect_label`, `recover_trigger`, `rnp`. The release has the steps in scripts of their own
    and no threshold; ours is. Its search for poisoned samples, Cognitive Distillation on the exposed model, is left
    out: on the digits it ranked them below the clean ones (AUROC 0.21), and whether that is ours is not known.
    """

    ignored: ClassVar[tuple[str, ...]] = ("epochs", "lr", "client_optimizer")

    share_threshold: float = option(0.5, "share of the clean samples above which a class is flagged", low=0, high=1)

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        train, validation = self.set_aside(clean)
        exposed = self.unlearn(model, train, monitor)
        found = self.invert(Calibrated(exposed.model, train, self.amp), train, monitor, [exposed.label])
        values = self._recover(exposed.model, train, monitor)
        evidence = {
            **exposed.evidence, "shares": exposed.shares.tolist(), "spread": exposed.shares.std(correction=0).item(),
            "mask_norm": found.masks.sum().item(), "reached": bool(found.reached.all()),
        }  # fmt: skip
        repair = self.prune(model, values, validation, monitor, evidence)
        flagged = [exposed.label] if exposed.label_share > self.share_threshold else []
        return replace(repair, flagged=flagged, triggers=found.triggers(clean))
