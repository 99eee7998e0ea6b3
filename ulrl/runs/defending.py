"""One defense from start to end: the only place where it, the judge and the record meet."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ulrl.configure import DefenseRun
from ulrl.data.datasets import load_dataset
from ulrl.data.imageset import ImageSet, PoisonedSet
from ulrl.defenses.base import Defense, Repair
from ulrl.errors import UserError
from ulrl.files import find_input, whole_folder
from ulrl.machine import PeakMemory, environment, pick_device, threads_for
from ulrl.metrics import Judgement, defense_effectiveness
from ulrl.models import load_model
from ulrl.record import Record
from ulrl.record_writer import write_defense_result
from ulrl.runs.common import (
    EpochJudge,
    log_file,
    plain,
    stage_seconds,
    timed_judge,
    write_index,
    write_result,
)
from ulrl.runs.given import check_named, clean_index, record_spec, result_options, results_folder
from ulrl.runs.judgements import kept
from ulrl.runs.triggers import TRIGGER_FILE, judge_trigger
from ulrl.seeds import global_stream
from ulrl.training import Monitor, judge
from ulrl.untrusted.opening import read_text
from ulrl.untrusted.texts import read_json

log = logging.getLogger(__name__)

ON_EMPTY = {
    "finetune": ": the model was only fine-tuned (on_empty: finetune)",
    "top1": ": the most changed one was taken all the same (on_empty: top1)",
    "abort": ": the model is left as it was (on_empty: abort)",
}


def run_defense(
    defense: Defense, record: Record, run: DefenseRun, *, bar: bool = True, draw: Callable[[Path], object] | None = None
) -> tuple[Path, dict[str, Any]]:
    """Repair the model of a record and judge it: the folder of the results and its `result.json`.

    The defense is given the model and the clean samples (or, where it works in training, the poisoned
    training set as it is, without a word on which samples are poisoned); the test sets stay here.
    draw: makes pictures of what was written, before it has its name.

    Raises:
        UserError: bad options, a record that does not fit them or its data, data that is not there.
    """
    start = time.perf_counter()
    final = results_folder(record, "defense", run.save_folder_name or defense.name)
    check_named(record, run)
    size = record.img_size[:2]
    spec = record_spec(record, run.dataset_path)
    device = pick_device(run.device)
    peak = PeakMemory(device)
    poisoned_test = record.poisoned_test(spec).to(device)
    model = load_model(record.model_name, record.num_classes, record.state_dict, spec.channels).to(device)
    train, clean_test = load_dataset(record.dataset, run.dataset_path, size)
    record.check_test(clean_test)
    clean_test = clean_test.to(device)
    index = torch.empty(0, dtype=torch.int64) if defense.in_training else clean_index(run, len(train))
    if defense.in_training:
        poisoned_train = record.poisoned_train(train)
        given = ImageSet(poisoned_train.images, poisoned_train.labels, spec).to(device)
    else:
        given = train.subset(index).to(device)
    del train  # the defender has no more than what it is given
    course = EpochJudge(clean_test, poisoned_test, defense.amp)
    monitor = Monitor(course, run.eval_every, bar=bar)
    monitor.seconds["load"] = time.perf_counter() - start

    defense.check(model, given)
    with whole_folder(final, overwrite=run.overwrite) as folder, log_file(folder), threads_for(spec.pixels, device):
        what = "samples of the poisoned training set" if defense.in_training else "clean samples"
        log.info("%s on %s: %d %s", defense.name, record.name, len(given), what)
        before = kept(
            lambda: timed_judge(monitor, model, clean_test, poisoned_test, defense.amp),
            record.model_name, model, clean_test, poisoned_test, defense.amp,
        )  # fmt: skip
        with global_stream(run.random_seed, "repair", device):  # dropout draws from torch's own generators
            repair = defense.run_checked(model, given, monitor)
        after = timed_judge(monitor, repair.model, clean_test, poisoned_test, defense.amp)
        if not repair.flagged and (policy := repair.evidence.get("on_empty")):
            log.warning("%s found no suspicious class%s", defense.name, ON_EMPTY.get(policy, ""))

        write_defense_result(
            folder / "defense_result.pt", model_name=record.model_name, num_classes=record.num_classes,
            state_dict=repair.model.state_dict(),
        )  # fmt: skip
        history = course.with_history(monitor.history)
        history.to_csv(folder / f"{defense.name}_df.csv", index=False)
        if len(index):
            write_index(folder / "index.txt", index)
        for table, frame in repair.tables.items():
            frame.to_csv(folder / f"{table}.csv")
        result = {
            "schema": 1, "kind": "defense", "method": defense.name, "repairs": defense.repairs,
            "record": record.name, "attack": record.attack, "dataset": record.dataset, "model": record.model_name,
            "options": result_options(defense, run), "seed": run.random_seed, "clean_samples": len(index),
            "before": asdict(before), "after": asdict(after), "der": defense_effectiveness(before, after),
            "flagged": repair.flagged, "target": _target(poisoned_test), "seconds": stage_seconds(monitor, start),
            "peak_memory_mb": peak.mb(), "evidence": repair.evidence, "environment": environment(device),
        }  # fmt: skip
        if repair.triggers:  # judged on the record's own model, which may have been changed in place
            model = load_model(record.model_name, record.num_classes, record.state_dict, spec.channels).to(device)
            try:
                result["trigger"] = judge_trigger(
                    model, repair.triggers, repair.flagged, clean_test, poisoned_test, defense.amp,
                    folder / TRIGGER_FILE,
                )  # fmt: skip
            except Exception as error:  # what a comparison lacks costs no repair
                log.warning("the trigger that was found is not compared: %s: %s", type(error).__name__, error)
        if run.report_oracle:
            result["oracle"] = _oracle(repair, before, clean_test, poisoned_test, defense, folder)
        write_result(folder, result, draw)
    return final, result


def run_once(
    defense: Defense, record: Record, run: DefenseRun, *, bar: bool = True, draw: Callable[[Path], object] | None = None
) -> tuple[Path, bool]:
    """As `run_defense`, or not at all where such a run with the same options is there: its folder, and whether it was
    run now.

    What is there may have come with the record, so it is a stranger's.

    Raises:
        UserError: as `run_defense`, so where there is one with other options and `run` does not overwrite.
    """
    folder = record.folder / "defense" / (run.save_folder_name or defense.name)
    if not run.overwrite:
        with contextlib.suppress(UserError, KeyError, TypeError):  # absent, or not one of ours
            inside = record.folder.resolve()
            result = read_json(folder / "result.json", inside)
            same = result["options"] == plain(result_options(defense, run))
            if same and run.index is not None:  # whose file may list others by now
                used = read_text(folder / "index.txt", inside=inside)
                same = used.split() == read_text(find_input(run.index)).split()
            if same:
                log.info("%s is there already, and was not run again", folder)
                return folder, False
    return run_defense(defense, record, run, bar=bar, draw=draw)[0], True


def _target(poisoned: PoisonedSet) -> int | None:
    """The one label that all triggered test images are to be given, or None."""
    labels = poisoned.labels.unique().tolist()
    return labels[0] if len(labels) == 1 else None


def _oracle(
    repair: Repair, before: Judgement, clean: ImageSet, poisoned: PoisonedSet, defense: Defense, folder: Path
) -> dict[str, Any] | None:
    """What the test set would have chosen: the lowest ASR at an ACC of at least 0.9 of that before.

    This is BackdoorBench's rule for ANP. Every strength goes to `oracle.csv`; None where none was to choose.
    """
    if repair.candidates is None or before.asr is None:
        return None
    rows = [{"strength": s, **asdict(judge(model, clean, poisoned, defense.amp))} for s, model in repair.candidates()]
    pd.DataFrame(rows).to_csv(folder / "oracle.csv", index=False)
    allowed = [row for row in rows if row["acc"] >= 0.9 * before.acc]
    if not allowed:
        return None
    best = min(allowed, key=lambda row: row["asr"])
    return {"rule": "lowest test ASR at no less than 0.9 of the test ACC", **best}
