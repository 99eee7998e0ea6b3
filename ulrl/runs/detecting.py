"""One sample detector from start to end: the only place where it, the judge and the record meet."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ulrl.configure import DetectionRun
from ulrl.data.datasets import load_dataset
from ulrl.data.imageset import ImageSet, PoisonedSet
from ulrl.detectors.base import Detector, Scored
from ulrl.errors import UserError
from ulrl.files import whole_folder
from ulrl.machine import PeakMemory, environment, pick_device, threads_for
from ulrl.metrics import ranking_judgement
from ulrl.models import load_model
from ulrl.record import Record
from ulrl.runs.common import log_file, stage_seconds, write_index, write_json
from ulrl.runs.given import check_named, clean_index, record_spec, result_options, results_folder
from ulrl.seeds import drawn, generator, global_stream
from ulrl.training import Monitor

log = logging.getLogger(__name__)


def run_detector(
    detector: Detector, record: Record, run: DetectionRun, *, bar: bool = True
) -> tuple[Path, dict[str, Any]]:
    """Score the poisoned training set of a record and judge the scores: the folder of the results, its `result.json`.

    The detector is given the images and labels that the model was trained on, without those of the clean samples, the
    model and the clean samples; which images are poisoned stays here.

    Raises:
        UserError: bad options, a record that does not fit them or its data, data that is not there, a record that
            stores no poisoned training set.
    """
    start = time.perf_counter()
    final = results_folder(record, "detection", run.save_folder_name or detector.name)
    check_named(record, run)
    spec = record_spec(record, run.dataset_path)
    device = pick_device(run.device)
    peak = PeakMemory(device)
    model = load_model(record.model_name, record.num_classes, record.state_dict, spec.channels).to(device)
    train, _ = load_dataset(record.dataset, run.dataset_path, record.img_size[:2])
    index = clean_index(run, len(train))
    searched = _searched(record.poisoned_train(train), index, run)
    poisoned = torch.isin(searched.original_indices, record.triggered_train())
    suspects = ImageSet(searched.images, searched.labels, spec).to(device)
    clean = train.subset(index).to(device)
    del train
    monitor = Monitor(bar=bar)
    monitor.seconds["load"] = time.perf_counter() - start

    detector.check(model, clean)
    with whole_folder(final, overwrite=run.overwrite) as folder, log_file(folder), threads_for(spec.pixels, device):
        log.info(
            "%s on %s: %d training images, %d clean samples", detector.name, record.name, len(suspects), len(clean)
        )
        with global_stream(run.random_seed, "detect", device):  # dropout draws from torch's own generators
            scored = detector.score(model, suspects, clean, monitor)
        scores = _scores(scored, detector.name, len(suspects))
        if not scores.isfinite().all():
            raise UserError(f"{detector.name} gave scores that are no numbers; its options do not fit this model")
        judgement = ranking_judgement(scores, poisoned)
        table = pd.DataFrame({"label": searched.labels, "score": scores, "poisoned": poisoned})
        table.index = pd.Index(searched.original_indices.numpy(), name="image")
        table.to_csv(folder / "scores.csv")
        write_index(folder / "index.txt", index)
        result = {
            "schema": 1, "kind": "detection", "method": detector.name, "record": record.name, "attack": record.attack,
            "dataset": record.dataset, "model": record.model_name, "options": result_options(detector, run),
            "seed": run.random_seed, "clean_samples": len(index), **asdict(judgement),
            "seconds": stage_seconds(monitor, start), "peak_memory_mb": peak.mb(), "evidence": scored.evidence,
            "environment": environment(device),
        }  # fmt: skip
        write_json(folder / "result.json", result)
    return final, result


def _scores(scored: Any, name: str, count: int) -> torch.Tensor:
    """What a detector returned, float64 [count] on the CPU.

    Raises:
        UserError: it is no `Scored` with a score for each image.
    """
    if not isinstance(scored, Scored):
        raise UserError(f"score() of {name} returned {type(scored).__name__}; let it return Scored(scores)")
    scores = torch.as_tensor(scored.scores).detach().double().cpu()
    if scores.shape != (count,):
        raise UserError(
            f"score() of {name} gave scores of the shape {tuple(scores.shape)} for {count} images; let it give each one"
        )
    return scores


def _searched(train: PoisonedSet, clean: torch.Tensor, run: DetectionRun) -> PoisonedSet:
    """The training images to search, on the CPU: all but the clean samples' own, or a random draw of these."""
    rest = (~torch.isin(train.original_indices, clean)).nonzero().flatten()
    if not len(rest):
        raise UserError(
            "the record shows no training images besides the clean samples, so there is nothing to search; lower "
            "--ratio, or choose another record"
        )
    if run.images is not None:
        if run.images > len(rest):
            raise UserError(f"--images {run.images} is more than the {len(rest)} training images that may be searched")
        rest = rest[drawn(len(rest), run.images, generator(run.random_seed, "searched"))]
    return train.subset(rest)
