"""FP: prune what is dormant on clean samples, then fine-tune (Liu et al., Fine-Pruning, arXiv 1805.12185)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import OnHead, Repair, register
from ulrl.defenses.finetuning import FineTuning
from ulrl.defenses.selection import within
from ulrl.models.copying import copied
from ulrl.options import option
from ulrl.training import Monitor, head_inputs, predict


@register("fp")
@dataclass(frozen=True)
class FinePruning(OnHead, FineTuning):
    """Zero the head's inputs that clean samples activate least, as many as accuracy allows; then fine-tune.

    The head's inputs are the last convolution's channels, pooled. They are ranked by the mean size of
    their activation, which is the paper's mean activation where a ReLU comes last. As in the paper, the accuracy
    is that of the clean samples before anything is trained on them; BackdoorBench takes that of the test set, and
    keeps the first model that loses too much instead of the one before. What is pruned stays 0 in fine-tuning.
    """

    acc_ratio: float = option(
        0.1, "accuracy on the clean samples that may be lost", source="BackdoorBench", low=0, high=1
    )
    once_prune_ratio: float = option(0.01, "share of the inputs per step", source="BackdoorBench", low=1e-6, high=1)

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        head_name, head = self.head(model, clean)
        width, weight = head.weight.shape[1], head.weight.detach().clone()
        counts = range(0, width, math.ceil(self.once_prune_ratio * width))
        with monitor.stage("select", len(counts)) as progress, torch.no_grad():
            features = head_inputs(model, head, clean, self.amp)
            activation = features.abs().mean(0)
            rank = activation.argsort(stable=True).argsort()  # 0 is pruned first
            hits = []
            for count in counts:
                if isinstance(head, nn.Linear):
                    classes = F.linear(features * (rank >= count), head.weight, head.bias).argmax(1)
                else:  # what the model makes of a convolution's output only the model knows
                    _zero_inputs(head.weight, rank < count)
                    classes = predict(model, clean, self.amp)
                hits.append((classes == clean.labels).double().mean())
                progress.step()
            accuracies = torch.stack(hits).tolist()
            head.weight.copy_(weight)
        chosen = counts[within(accuracies, self.acc_ratio)]
        original = copied(model)

        def candidates() -> Iterator[tuple[float, nn.Module]]:
            """Every tenth of the inputs: each is fine-tuned, which takes its time."""
            for tenths in range(10):
                other = copied(original)
                self._prune_and_finetune(other, head_name, rank < tenths / 10 * len(rank), clean, Monitor())
                yield tenths / 10, other

        self._prune_and_finetune(model, head_name, rank < chosen, clean, monitor)
        curve = pd.DataFrame({"accuracy": accuracies}, index=pd.Index(counts, name="pruned"))
        inputs = pd.DataFrame({"activation": activation.cpu(), "pruned": (rank < chosen).cpu()})
        inputs.index.name = "input"
        evidence = {"head": head_name, "inputs": len(rank), "pruned": chosen}
        return Repair(model, evidence=evidence, tables={"inputs": inputs, "curve": curve}, candidates=candidates)

    def _prune_and_finetune(
        self, model: nn.Module, head_name: str, pruned: torch.Tensor, clean: ImageSet, monitor: Monitor
    ) -> None:
        weight = model.get_parameter(f"{head_name}.weight")

        @torch.no_grad()
        def prune() -> None:
            _zero_inputs(weight, pruned)

        prune()
        self.finetune(model, clean, monitor, "finetune", after_step=prune)


def _zero_inputs(weight: torch.Tensor, pruned: torch.Tensor) -> None:
    """Take inputs (bool [D]) from a head, in place; its weight is [K, D], or [K, D, 1, 1]."""
    weight.masked_fill_(pruned.view(-1, *[1] * (weight.ndim - 2)), 0)
