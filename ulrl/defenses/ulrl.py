"""ULRL: unlearn to find the suspicious neurons, relearn without them (Min et al., arXiv 2405.14781)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import OnHead, Repair, register
from ulrl.defenses.unlearning import Unlearned, Unlearning, robust_z
from ulrl.models.head import Head
from ulrl.options import option
from ulrl.seeds import generator
from ulrl.training import OPTIMIZERS, Monitor, cross_entropy, fit, make_optimizer, make_scheduler

_RELEASE = "ULRL release"


@register("ulrl")
@dataclass(frozen=True)
class ULRL(OnHead, Unlearning):
    """Unlearning-relearning on the neurons of the classifier head, that is on its output classes.

    1. Unlearn: gradient ascent on the clean samples until their accuracy is `clean_threshold`.
    2. Rank: the L1 change of each row of the head; rows far above the median (robust z) are suspicious.
    3. Relearn, from the original weights: draw the suspicious rows anew, then fine-tune every weight on
       cross-entropy + `relearn_alpha` * sum of cos(row, original row) over the suspicious rows.

    Defaults are the released configuration for CIFAR-10. Where the release departs from the
    paper by accident, this does not: of too many suspicious rows the highest z are kept rather than the
    lowest class numbers, the median of an even count is not the lower one, each step runs one forward
    pass, and no step is lost to a loss scaler.

    A backdoor without one target class (all-to-all) leaves no single row that stands out.
    """

    z_threshold: float = option(3.5, "rows with a larger robust z are suspicious", source=_RELEASE, low=0)
    max_neurons: int = option(2, "suspicious rows at most, highest z first", source=_RELEASE, low=1)
    on_empty: str = option(
        "finetune", "no suspicious row: finetune, take the top1 row all the same, or abort with the model as it was",
        source=_RELEASE, choices=("finetune", "top1", "abort"),
    )  # fmt: skip
    init: bool = option(True, "draw the suspicious rows anew before relearning", source=_RELEASE)
    relearn_epochs: int = option(20, "relearning epochs", source=_RELEASE, low=1)
    relearn_lr: float = option(0.005, "learning rate of relearning", source=_RELEASE, low=0)
    client_optimizer: str = option("sgd", "optimiser of relearning", source=_RELEASE, choices=OPTIMIZERS)
    relearn_alpha: float = option(0.7, "weight of the cosine penalty", source=_RELEASE, low=0)

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        head_name, head = self.head(model, clean)
        neurons, unlearned, spread = self.diagnose(model, clean, monitor)
        flagged = flagged_classes(neurons)
        rows = flagged or ([int(neurons.change.to_numpy().argmax())] if self.on_empty == "top1" else [])
        if rows or self.on_empty == "finetune":
            self._relearn(model, head, rows, clean, monitor)
        evidence = {
            "head": head_name,
            **unlearned.evidence,
            "reinitialised": rows,
            "on_empty": None if flagged else self.on_empty,
            **spread,
        }
        return Repair(model, flagged, evidence, {"neurons": neurons})

    def diagnose(
        self, model: nn.Module, clean: ImageSet, monitor: Monitor
    ) -> tuple[pd.DataFrame, Unlearned, dict[str, float]]:
        """Steps 1 and 2, which leave `model` as it is: one row per class (change, z, flagged), the unlearned copy,
        and the spread that z is measured in."""
        name, head = self.head(model, clean)
        unlearned = self.unlearn(model, clean, monitor)
        neurons, spread = self._rank(head, unlearned.model.get_submodule(name))
        return neurons, unlearned, spread

    def _rank(self, before: Head, after: nn.Module) -> tuple[pd.DataFrame, dict[str, float]]:
        """One row per class: L1 change of its weights (the bias does not count), z, and whether flagged."""
        assert isinstance(after, Head)
        change = (after.weight - before.weight).detach().abs().flatten(1).sum(1).cpu().double()
        z, median, mad = robust_z(change)
        suspicious = ((z > self.z_threshold) & (change > median)).nonzero().flatten()
        kept = suspicious[z[suspicious].argsort(descending=True)][: self.max_neurons]
        flagged = torch.zeros(len(z), dtype=torch.bool)
        flagged[kept] = True
        table = pd.DataFrame({"change": change.numpy(), "z": z.numpy(), "flagged": flagged.numpy()})
        table.index.name = "class"
        return table, {"z_threshold": self.z_threshold, "median": median, "mad": mad}

    def _relearn(self, model: nn.Module, head: Head, rows: list[int], clean: ImageSet, monitor: Monitor) -> None:
        likeness = redraw(head, rows, self.random_seed if self.init else None)

        def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            loss, right = cross_entropy(model, x, y)
            return loss + self.relearn_alpha * likeness(), right

        optimizer = make_optimizer(model, self.client_optimizer, self.relearn_lr, self.sgd_momentum)
        fit(
            model, self.batches(clean, "relearn"), self.relearn_epochs, optimizer,
            make_scheduler(optimizer, "CosineAnnealingLR", self.relearn_epochs), monitor, "relearn",
            amp=self.amp, objective=objective if rows else cross_entropy,
        )  # fmt: skip


def redraw(head: Head, rows: list[int], seed: int | None) -> Callable[[], torch.Tensor]:
    """Draw these rows of the head anew, in place, unless `seed` is None.

    Returns a function of no arguments: the sum of the cosines (scalar) of the rows, as they then are, with what they
    were before.
    """
    index = torch.tensor(rows, dtype=torch.int64, device=head.weight.device)
    original = head.weight.detach()[index].clone()
    if seed is not None and rows:
        bound = math.sqrt(2 / head.weight[0].numel())  # the release's; narrower than He's sqrt(6 / fan_in)
        with torch.no_grad():
            drawn = torch.rand(original.shape, generator=generator(seed, "reinitialise"))
            head.weight[index] = (drawn * 2 - 1).mul(bound).to(head.weight)
            if head.bias is not None:
                head.bias[index] = 0
    return lambda: F.cosine_similarity(head.weight[index].flatten(1), original.flatten(1), dim=1).sum()


def flagged_classes(neurons: pd.DataFrame) -> list[int]:
    """The suspicious classes of a diagnosis, the highest z first."""
    return neurons[neurons.flagged].sort_values("z", ascending=False).index.tolist()
