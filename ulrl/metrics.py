"""What a model is judged by. All figures are fractions in [0, 1]; None where there is nothing to judge."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Judgement:
    """A model on the clean and on the poisoned test set.

    acc: clean accuracy. asr: attack success rate, the share of poisoned samples given the attacker's
    label. ra: robust accuracy, the share of them given their true label. Samples whose true label is
    the target are not in the poisoned set (all-to-one), as in BackdoorBench.
    """

    acc: float
    asr: float | None
    ra: float | None
    n_clean: int
    n_poisoned: int


def share(hits: torch.Tensor) -> float | None:
    """The fraction of True in a bool tensor [N], or None when it is empty."""
    return hits.double().mean().item() if hits.numel() else None


def defense_effectiveness(before: Judgement, after: Judgement) -> float | None:
    """DER, the defense effectiveness rating in [0, 1] (Zhu et al., FT-SAM, arXiv 2304.11823, section 4.1):

    (max(0, ASR drop) - max(0, ACC drop) + 1) / 2. 0.5 is no effect; None without poisoned samples.
    """
    if before.asr is None or after.asr is None:
        return None
    return (max(0.0, before.asr - after.asr) - max(0.0, before.acc - after.acc) + 1) / 2
