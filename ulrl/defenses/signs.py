"""Signs of a backdoor, class by class, and the evidence that they make together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.defenses import overlay, universal
from ulrl.defenses.margin import CLIMB, margins_from_noise
from ulrl.seeds import generator
from ulrl.training import Monitor

SAMPLES = 32  # images that changes are searched on
CLASSES = 10  # for which they are
DOUBTFUL, SUSPICIOUS = 4.0, 8.0  # evidence that is worth a look, or a backdoor's; set on models of docs/verdicts.md
SIGNS = ("perturbation", "reach", "mask", "cover", "margin", "lead", "evidence")
Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # images [B, ...], strengths [B, 1, 1, 1] -> images
_FAR = 2.0  # the reach or cover of a class that was not reached
_MOST = 100.0  # a lead, where no other class has a margin


def look_for_signs(
    model: nn.Module, clean: ImageSet, monitor: Monitor, *, amp: bool, random_seed: int
) -> tuple[pd.DataFrame, dict[int, tuple[Change, Change]]]:  # fmt: skip
    """Three signs of each class, and how much they say together; `model` is left as it was.

    To the class of a backdoor it is a short way from any image, which is measured in two ways: how large a change has
    to be that is added to all of them, and how much of them has to be painted over in the same way. And noise that is
    changed a little makes the model surer of it than of others, as poisoned images taught it to be sure whatever else
    they show. A model without a backdoor has classes that are somewhat nearer or surer than others, too (a shirt, a
    bag), but hardly one by all three signs. So the evidence is their product, lead / (reach * cover).

    Returns:
        A table [K] with the columns SIGNS. perturbation: the L2 norm of the smallest change found (1: one pixel of one
        channel from black to white), infinite for none, NaN where none was searched, which is done for the ten classes
        of the largest margins. reach: that as a share of the median; NaN where it was found for less than half. mask:
        the pixels of the smallest part found, and cover: its share of the median, likewise. margin: see
        `margins_from_noise`. lead: the margin by the largest one of another class, in [0, 100]. evidence: 0 where none
        was searched. And of each class that was searched the two changes, of normalised images and by a strength of 1;
        one that was not found does nothing.
    """
    few = clean.subset(torch.randperm(len(clean), generator=generator(random_seed, "search"))[:SAMPLES])
    with monitor.stage("margin", CLIMB) as stage:
        margins = margins_from_noise(model, few, stage, amp=amp, random_seed=random_seed)
    classes = margins.argsort(descending=True, stable=True)[:CLASSES]
    with monitor.stage("search", universal.STEPS + overlay.STEPS) as stage:
        norms, added = universal.smallest_universal(model, few, classes, stage, amp=amp)
        masks, painted = overlay.smallest_overlay(model, few, classes, stage, amp=amp)
    signs = pd.DataFrame(index=pd.RangeIndex(clean.spec.num_classes, name="class"))
    for name, share, sizes in (("perturbation", "reach", norms), ("mask", "cover", masks)):
        signs[name] = pd.Series(sizes.cpu().double().numpy(), index=classes.tolist())
        usual = signs[name].median()
        signs[share] = signs[name] / usual if np.isfinite(usual) else np.nan
    signs["margin"] = margins.cpu().double().numpy()
    signs["lead"] = _lead(signs.margin.to_numpy())
    near = signs[["reach", "cover"]].fillna(1).clip(upper=_FAR).prod(axis=1)
    signs["evidence"] = (signs.lead / near).where(signs.perturbation.notna(), 0)
    return signs, {k: (one, other) for k, one, other in zip(classes.tolist(), added, painted, strict=True)}


def _lead(margins: np.ndarray) -> np.ndarray:
    """Each by the largest of the others, in [0, _MOST]: float [K]."""
    highest, following = np.argsort(margins)[[-1, -2]]
    others = np.full(len(margins), margins[highest])
    others[highest] = margins[following]
    return np.clip(margins / np.maximum(others, 1e-9), 0, _MOST)
