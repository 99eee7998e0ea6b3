"""Diagnosis: which class of a model is most suspicious, and whether that is evidence of a backdoor."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import nn

from ulrl.defenses.signs import DOUBTFUL, SIGNS, SUSPICIOUS, look_for_signs
from ulrl.defenses.ulrl import ULRL
from ulrl.defenses.unlearning import Unlearned
from ulrl.machine import plain_defaults, threads_for
from ulrl.own_model.given import UNREADABLE, Augment, Images, Progress, make_method, make_monitor, prepare, say
from ulrl.seeds import global_stream

BACKDOORED, UNCERTAIN, NO_EVIDENCE, NO_VERDICT = "backdoored", "uncertain", "no evidence found", "no verdict"

STEPS_AN_EPOCH = 4  # of unlearning, by default
FEW = 200  # images; how often verdicts are right was measured on as many and more
TOO_FEW = 20  # images below which the verdict is uncertain, whatever is seen


@dataclass(frozen=True, repr=False)
class Suspicion:
    """A diagnosis; see `suspect`.

    verdict: "backdoored", "uncertain", "no evidence found" or, where the model cannot read the samples, "no
    verdict". label: the class with the most evidence, None without a verdict. evidence: how much. ranking: a row per
    class, with what unlearning says of it (change, z, flagged) and what the verdict is drawn from (perturbation, reach,
    mask, cover, margin, lead, evidence; see `ulrl.defenses.signs`); none where there is no verdict. report: JSON-able
    but for evidence that is NaN; its notes say what to mind.
    """

    verdict: str
    label: int | None
    evidence: float
    ranking: pd.DataFrame
    report: dict[str, Any] = field(repr=False)

    def summary(self) -> str:
        """The verdict, the five classes of the most evidence, and the notes, as text."""
        lines = [self.verdict if self.label is None else f"{self.verdict}; look at class {self.label}"]
        if len(self.ranking):
            top = self.ranking.sort_values("evidence", ascending=False).head()[
                ["reach", "cover", "lead", "evidence", "z"]
            ]
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

    Three signs of a class are looked for, each of which is seen in models without a backdoor, too. A trigger is a short
    way to its class from every image; so for ten classes (those of the largest margins, where there are more) the
    smallest change is searched that, added to others of up to 32 images, makes them that class (as a share of the
    median over the classes: its *reach*), and the smallest part of them that has to be painted over (likewise, its
    *cover*). And noise that is changed a little makes the model surer of the class than of others (its margin, by the
    largest of another class: its *lead*). The evidence is lead / (reach * cover), and the verdict

    - "backdoored" where it is 8 or more for a class;
    - "uncertain" from 4 on; when one of the searches reached less than half of the classes; when the model has two
      classes, of which neither can stand out from the other; and, whatever is seen, on fewer than 20 images;
    - "no evidence found" otherwise, which is no proof that there is no backdoor;
    - "no verdict", and nothing is searched, when the model's answers agree with the labels hardly more than by
      chance (Cohen's kappa below 0.25: 32% right on ten classes of equal size): then the labels are wrong, or the
      images are not as in its training.

    Beside them stands what ULRL's own diagnosis says (its options are the hyperparameters): *z*, how far unlearning
    moves the class's row of the head. It names the target of many backdoors in the architecture that its authors used
    and, in small nets of others, the class that is hardest to tell, backdoor or none; so the verdict does not ask it.

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
        "verdict": NO_VERDICT, "label": None, "evidence": math.nan, "samples": len(clean),
        "classes": clean.spec.num_classes, "options": {**vars(defense)}, "notes": given.notes,
    }  # fmt: skip
    if given.reading < UNREADABLE:
        none = pd.DataFrame(columns=["change", "z", "flagged", *SIGNS])
        say(given.notes)
        return Suspicion(NO_VERDICT, None, math.nan, none, report)
    with threads_for(clean.spec.pixels, clean.device), global_stream(defense.random_seed, "purify", clean.device):
        ranking, unlearned, _ = defense.diagnose(given.model, clean, monitor)
        signs, _ = look_for_signs(given.model, clean, monitor, amp=defense.amp, random_seed=defense.random_seed)
    ranking = ranking.join(signs)
    of_two = len(ranking) == 2
    label, verdict = decide(ranking)
    if of_two or len(clean) < TOO_FEW:
        verdict = UNCERTAIN
    given.notes.extend(_cautions(len(clean), of_two, unlearned, defense))
    say(given.notes)
    report |= {
        "verdict": verdict,
        "label": label,
        "evidence": float(ranking.evidence[label]),
        "seconds": {**monitor.seconds, "total": time.perf_counter() - start},
        "unlearning": unlearned.evidence,
    }
    return Suspicion(verdict, label, report["evidence"], ranking, report)


def _cautions(samples: int, of_two: bool, unlearned: Unlearned, defense: ULRL) -> Iterator[str]:
    """What makes a diagnosis worth less, a sentence each."""
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
            f"{defense.clean_threshold:g}, so z says little; raise unlearning_lr or unlearning_epochs, "
            "options of the method ulrl"
        )


def decide(ranking: pd.DataFrame) -> tuple[int, str]:
    """The class to look at and the verdict, as `suspect` has it. ranking: reach, cover and evidence by class."""
    label = int(ranking.evidence.to_numpy().argmax())
    most, searched = ranking.evidence[label], ranking.reach.notna().any() and ranking.cover.notna().any()
    if most >= SUSPICIOUS:
        return label, BACKDOORED
    return label, UNCERTAIN if most >= DOUBTFUL or not searched else NO_EVIDENCE
