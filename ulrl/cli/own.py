"""`ulrl purify`: a model of the user's, diagnosed and, unless that is all, repaired."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ulrl.cli import flags
from ulrl.cli.terminal import print_path, print_table, same_bits
from ulrl.declared import about, declared
from ulrl.errors import UserError
from ulrl.options import Schema

if TYPE_CHECKING:
    from torch import nn

    from ulrl.data.imageset import ImageSet
    from ulrl.defenses.base import Defense
    from ulrl.own_files import PurifyRun

log = logging.getLogger(__name__)


def purify(argv: Sequence[str]) -> None:
    options = declared("ulrl.own_files", "PurifyRun")
    name = flags.named_by("method", argv, options.method)
    schema = Schema(options, flags.method("defense", name))
    of_ulrl = Schema(flags.method("defense", "ulrl")).fields.keys() - schema.fields.keys()
    for word in argv:
        if word.startswith("--") and (flag := word[2:].split("=")[0]) in of_ulrl:
            raise UserError(f"--{flag} is an option of ulrl and not of {name}; add --method ulrl, or leave it out")
    given = schema.flags(argv, "ulrl purify", about("ulrl.own_files"))
    for flag in ("model", "weights", "images", *(() if given.get("check") else ("out",))):
        if not given.get(flag):
            raise UserError(f"--{flag} is missing: {schema.fields[flag].metadata['help']}")
    same_bits()
    from ulrl import own_files
    from ulrl.defenses.base import DEFENSES
    from ulrl.own_model import Note
    from ulrl.own_model.given import make_repair
    from ulrl.report.tables import accuracy_table

    settings, ignored = schema.merge(("given", given))
    if ignored:
        log.info("accepted for BackdoorBench's sake, without a meaning here: %s", ", ".join(ignored))
    run, defense = settings.build(own_files.PurifyRun), settings.build(DEFENSES[name])
    if not run.check:
        make_repair(run.method, {})
    model, images = own_files.load(run)
    names = images.spec.class_names
    if not run.check:
        defense.check(model, images)  # a method that cannot work says so before the diagnosis, not after it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)  # they are logged here, each once
        said = _diagnose(run, model, images, defense)
        log.info("repairing it by %s", run.method)
        result = own_files.repair(model, images, defense, run)
    for note in result.report["notes"]:
        if note not in said:
            log.warning("%s", note)
    if result.report["returned"] == "original":
        raise UserError(f"{run.out} was not written; allow a greater --max_accuracy_loss, or try another --method")
    result.save(run.out or "", overwrite=run.overwrite)
    flagged = [names[label] for label in result.flagged]
    print_table(accuracy_table(result.report, flagged))
    print_path(run.out or "")


def _diagnose(run: PurifyRun, model: nn.Module, images: ImageSet, defense: Defense) -> list[str]:
    """Print the diagnosis and, where that is all, leave the process: the notes that were said."""
    from ulrl import own_files
    from ulrl.defenses.signs import DOUBTFUL, SUSPICIOUS
    from ulrl.own_model import BACKDOORED, NO_EVIDENCE, NO_VERDICT, UNCERTAIN
    from ulrl.report.tables import suspicion_table

    try:
        own_files.diagnosis(defense).check(model, images)
    except UserError as reason:
        if run.check:
            raise
        log.warning("no diagnosis: %s", reason)
        return []
    names = images.spec.class_names
    log.info("looking for a backdoor in %s with %d clean images", run.model, len(images))
    found = own_files.diagnose(model, images, defense)
    notes: list[str] = found.report["notes"]
    for note in notes:
        log.warning("%s", note)
    if found.label is None:
        raise UserError(f"{NO_VERDICT}; look at --img_size, --mean, --std and the order of the subfolders")
    print_table(suspicion_table(found.ranking, names, f"verdict: {found.verdict}; look at {names[found.label]}"))
    log.info(
        "reach: how small a change, added to all images, makes them the class to the model; cover: how small a part of "
        "them that is painted over; 1 is usual, a trigger is less"
    )
    log.info("lead: how sure of the class noise makes the model, as against the next class; above 1 it is ahead")
    log.info(
        "evidence: lead / (reach * cover); backdoored from %g on, uncertain from %g on. z is ULRL's own sign, which "
        "the verdict leaves out", SUSPICIOUS, DOUBTFUL,
    )  # fmt: skip
    log.info("docs/verdicts.md says what a verdict is worth, and what to do")
    if run.check:
        sys.exit({NO_EVIDENCE: 0, BACKDOORED: 3, UNCERTAIN: 4}[found.verdict])
    return notes
