"""Diagnosis: which class of a model is most suspicious, and whether that is evidence of a backdoor."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from ulrl.defenses.margin import CLIMB, margins_from_noise
from ulrl.defenses.ulrl import ULRL
from ulrl.defenses.universal import STEPS, smallest_universal
from ulrl.defenses.unlearning import Unlearned
from ulrl.machine import plain_defaults, threads_for
from ulrl.own_model.given import UNREADABLE, Augment, Given, Images, Progress, make_method, make_monitor, prepare, say
from ulrl.seeds import generator, global_stream
from ulrl.training import Monitor

BACKDOORED, UNCERTAIN, NO_EVIDENCE, NO_VERDICT = "backdoored", "uncertain", "no evidence found", "no verdict"

STEPS_AN_EPOCH = 4  # of unlearning, by default
SEARCH_SAMPLES = 32
SEARCH_CLASSES = 10
FEW = 200  # images; how often verdicts are right was measured on as many and more
TOO_FEW = 20  # images below which the verdict is uncertain, whatever is seen
# Signs of a backdoor: a reach below NEAR, and a margin that is AHEAD times the next one. A flagged class is that of a
# backdoor with a reach below NEAR_ALONE; below NEAR_HIGH where its z is above HIGH, below NEAR_AHEAD where it is ahead;
# with any where it is FAR_AHEAD. Unflagged, NEAR_ALONE and FAR_AHEAD make it uncertain. Set on small models, all of
# which docs/verdicts.md names.
NEAR, AHEAD, HIGH = 0.5, 1.3, 6.0
NEAR_ALONE, NEAR_HIGH, NEAR_AHEAD, FAR_AHEAD = 0.25, 0.4, 0.55, 2.5


@dataclass(frozen=True, repr=False)
class Suspicion:
    """A diagnosis; see `suspect`.

    verdict: "backdoored", "uncertain", "no evidence found" or, where the model cannot read the samples, "no
    verdict". label: the most suspicious class, None without a verdict. z: its robust z in the ranking. reach: the
    norm of the smallest universal perturbation found that leads to it, as a share of the median over the classes
    that were compared. ranking: one row per class: change, z, flagged, perturbation (the norm, where the range of
    the samples is 1; infinite where none was found, missing where none was searched), reach and margin (by how much
    the logit of the class exceeds all others on noise that was changed to this end, missing where that was not done);
    without rows where there is no verdict. report: JSON-able but for a z or reach that is NaN; its notes say what to
    mind.
    """

    verdict: str
    label: int | None
    z: float
    reach: float
    ranking: pd.DataFrame
    report: dict[str, Any] = field(repr=False)

    def summary(self) -> str:
        """The verdict, the five classes of the highest z, and the notes, as text."""
        lines = [self.verdict if self.label is None else f"{self.verdict}; look at class {self.label}"]
        if len(self.ranking):
            top = self.ranking.sort_values("z", ascending=False).head()[["z", "flagged", "reach", "margin"]]
            lines.append(top.round(2).to_string(na_rep="-"))
        return "\n".join([*lines, *(f"note: {note}" for note in self.report["notes"])])

    __repr__ = summary


@plain_defaults()
def suspect(
    model: nn.Module,
    images: Images,
    labels: Any = None,
    *,
    augment: Augment | None = None,
    progress: Progress = False,
    device: str | torch.device | None = None,
    **hyperparameters: Any,
) -> Suspicion:
    """Say which class of a model is most suspicious, and whether that is evidence of a backdoor. Repairs nothing.

    Three signs of a class are looked for, each of which is seen in models without a backdoor, too. It is *flagged*:
    ULRL's ranking (whose options are the hyperparameters) has it far above the others. It is *near*: a trigger is a
    short way to its class from every image, so for the ten classes of the largest z (all, when there are no more) the
    smallest universal perturbation is searched, on up to 32 of the images, and a class is near whose reach, the norm
    of its perturbation as a share of their median, is below 0.5. It is *ahead*: noise that is changed a little makes
    the model surer of it than of the others, by a margin that is 1.3 times the next. The verdict is

    - "backdoored" when a flagged class has a reach below 0.25, below 0.4 where its z is above 6, or below 0.55 where it
      is ahead; or when its margin is 2.5 times the next, whatever its reach;
    - "uncertain" when a class bears two of the signs, has a reach below 0.25 or 2.5 times the next margin; when one
      was sought in vain: unlearning ended above its goal, a perturbation was found for less than half of the classes
      searched, or the model has two classes, of which neither can stand out from the other; and, whatever is seen, on
      fewer than 20 images;
    - "no evidence found" otherwise, which is no proof that there is no backdoor;
    - "no verdict", and nothing is searched, when the model's answers agree with the labels hardly more than by
      chance (Cohen's kappa below 0.25: 32% right on ten classes of equal size): then the labels are wrong, or the
      images are not as in its training.

    How often it is right is in docs/verdicts.md, on models that the thresholds were set on and on others.

    Arguments as for `purify`; but `batch_size` is, where it is not given, a quarter of the images, rounded up, and at
    most 128: an epoch of unlearning has four steps, as in the released configuration (500 images, batches of 128).
    What is worth saying is also warned of, as `ulrl.Note`.

    Raises:
        UserError: as `purify`.
    """
    make_method("ulrl", hyperparameters)  # what is wrong with them is said before the work
    given = prepare(model, images, labels, augment, device, linear_name=hyperparameters.get("linear_name"))
    start, monitor, clean = time.perf_counter(), make_monitor(progress), given.clean
    defense = make_method("ulrl", {"batch_size": max(2, min(128, -(-len(clean) // STEPS_AN_EPOCH))), **hyperparameters})
    defense.check(given.model, clean)
    report: dict[str, Any] = {
        "verdict": NO_VERDICT, "label": None, "z": math.nan, "reach": math.nan, "samples": len(clean),
        "classes": clean.spec.num_classes, "options": {**vars(defense)}, "notes": given.notes,
    }  # fmt: skip
    if given.reading < UNREADABLE:
        none = pd.DataFrame(columns=["change", "z", "flagged", "perturbation", "reach", "margin"])
        say(given.notes)
        return Suspicion(NO_VERDICT, None, math.nan, math.nan, none, report)
    ranking, unlearned = _examine(given, defense, monitor)
    of_two = len(ranking) == 2  # both have a z of 0.67 then, whatever the model
    label, verdict = decide(ranking, searched=unlearned.reached and not of_two)
    if len(clean) < TOO_FEW:
        verdict = UNCERTAIN
    given.notes.extend(_cautions(len(clean), of_two, unlearned, defense))
    say(given.notes)
    report |= {
        "verdict": verdict,
        "label": label,
        "z": float(ranking.z[label]),
        "reach": float(ranking.reach[label]),
        "seconds": {**monitor.seconds, "total": time.perf_counter() - start},
        "evidence": unlearned.evidence,
    }
    return Suspicion(verdict, label, report["z"], report["reach"], ranking, report)


def _examine(given: Given, defense: ULRL, monitor: Monitor) -> tuple[pd.DataFrame, Unlearned]:
    """The ranking with all its columns, and how the unlearning for it went."""
    model, clean = given.model, given.clean
    with threads_for(clean.spec.pixels, clean.device), global_stream(defense.random_seed, "purify", clean.device):
        ranking, unlearned, _ = defense.diagnose(model, clean, monitor)
        order = torch.from_numpy(ranking.z.where(ranking.change > ranking.change.median(), 0).to_numpy(copy=True))
        classes = order.argsort(descending=True, stable=True)[:SEARCH_CLASSES].to(clean.device)
        drawn = torch.randperm(len(clean), generator=generator(defense.random_seed, "search"))[:SEARCH_SAMPLES]
        few = clean.subset(drawn)
        with monitor.stage("search", STEPS) as stage:
            norms = smallest_universal(model, few, classes, stage, amp=defense.amp)
        with monitor.stage("margin", CLIMB) as stage:
            margins = margins_from_noise(model, few, classes, stage, amp=defense.amp, random_seed=defense.random_seed)
    ranking["perturbation"] = pd.Series(norms.cpu().double().numpy(), index=classes.tolist())
    usual = ranking.perturbation.median()
    ranking["reach"] = ranking.perturbation / usual if usual < float("inf") else float("nan")
    ranking["margin"] = pd.Series(margins.cpu().double().numpy(), index=classes.tolist())
    return ranking, unlearned


def _cautions(samples: int, of_two: bool, unlearned: Unlearned, defense: ULRL) -> Iterator[str]:
    """What makes the verdict worth less, a sentence each."""
    if of_two:
        yield "a model of two classes is always called uncertain: neither class can stand out from the other"
    if samples < TOO_FEW:
        yield (
            f"{samples} images are too few for another verdict than uncertain, which takes {TOO_FEW}; "
            f"give {FEW} or more"
        )
    elif samples < FEW:
        yield f"{samples} images are few for a verdict, which may be another one on others; give {FEW} or more"
    if not unlearned.reached:
        yield (
            f"unlearning ended at an accuracy of {unlearned.accuracy:.3f}, above its goal of "
            f"{defense.clean_threshold:g}, so the ranking says little; raise unlearning_lr or unlearning_epochs, "
            "options of the method ulrl"
        )


def decide(ranking: pd.DataFrame, searched: bool = True) -> tuple[int, str]:
    """The class to look at and the verdict, by the signs in `suspect`. ranking: z, flagged, reach, margin by class."""
    z, flagged, reach, margin = (ranking[key].to_numpy(float) for key in ("z", "flagged", "reach", "margin"))
    searched = searched and not np.isnan(reach).all()
    reach = np.where(np.isnan(reach), np.inf, reach)
    marked, lead = flagged == 1, _lead(margin)
    ahead = lead >= AHEAD
    limit = np.where(ahead, NEAR_AHEAD, np.where(z > HIGH, NEAR_HIGH, NEAR_ALONE))
    found = marked & ((reach < limit) | (lead >= FAR_AHEAD))
    if found.any():
        return int(np.lexsort((z, -reach, found))[-1]), BACKDOORED
    signs = marked * 1 + np.where(reach < NEAR_ALONE, 2, reach < NEAR) + np.where(lead >= FAR_AHEAD, 2, ahead)
    look = np.lexsort((z, signs))[-1]  # the most signs and, of those, the highest z
    return int(look), UNCERTAIN if signs[look] >= 2 or not searched else NO_EVIDENCE


def _lead(margin: np.ndarray) -> np.ndarray:
    """How many times the next lower one the largest margin is: [K], zero for all others. NaN: not measured."""
    lead, order = np.zeros(len(margin)), np.argsort(np.nan_to_num(margin, nan=-np.inf))
    highest, following = margin[order[-1]], margin[order[-2]]
    if highest > 0:
        lead[order[-1]] = highest / following if following > 0 else np.inf
    return lead
