"""One attack from start to end: the only place where it, the judge and its record meet."""

from __future__ import annotations

import functools
import hashlib
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from ulrl.attacks.base import Attack
from ulrl.attacks.lab import Lab
from ulrl.configure import AttackRun, PreviewRun, options_of
from ulrl.data.datasets import dataset_spec, load_dataset
from ulrl.data.imageset import DatasetSpec, ImageSet, PoisonedSet
from ulrl.errors import UserError
from ulrl.files import check_folder_name, home, save_torch, whole_folder
from ulrl.machine import PeakMemory, environment, pick_device, threads_for
from ulrl.metrics import TOOK, Judgement, perceptibility, took
from ulrl.models import architecture_of, build_model, load_model
from ulrl.record import load_record
from ulrl.record_writer import write_record
from ulrl.runs.common import (
    SAMPLES_FILE,
    EpochJudge,
    log_file,
    stage_seconds,
    test_row,
    timed_judge,
    write_index,
    write_result,
)
from ulrl.seeds import drawn, generator, global_stream
from ulrl.training import Monitor, TrainOptions

log = logging.getLogger(__name__)

SHOWN = 8
MEASURED = 1000  # images that perceptibility is averaged over
LEARNED = "learned"  # folder of a record: what its attack computed before training


@dataclass(frozen=True)
class TriggerSample:
    """Up to eight test images without and with the trigger, and how perceptible it is over up to 1,000.

    clean, poisoned: uint8 [n, C, H, W]. titles: what each is and what it is to become.
    """

    clean: np.ndarray
    poisoned: np.ndarray
    titles: list[str]
    perceptibility: dict[str, float | None]

    @classmethod
    def of(cls, clean: ImageSet, poisoned: PoisonedSet) -> TriggerSample:
        """Of the first poisoned images and the clean ones that they were made from."""
        pairs = poisoned.subset(torch.arange(min(MEASURED, len(poisoned))))
        before, after = clean.subset(pairs.original_indices).images, pairs.images
        names = clean.spec.class_names or [str(k) for k in range(clean.spec.num_classes)]
        titles = [
            f"{names[a]} → {names[b]}" if len(names[a]) + len(names[b]) < 12 else f"{names[a]}\n→ {names[b]}"
            for a, b in zip(pairs.original_labels[:SHOWN].tolist(), pairs.labels[:SHOWN].tolist(), strict=True)
        ]
        return cls(
            before[:SHOWN].cpu().numpy(), after[:SHOWN].cpu().numpy(), titles, asdict(perceptibility(before, after))
        )

    def write(self, path: Path) -> None:
        np.savez_compressed(path, clean=self.clean, poisoned=self.poisoned, titles=np.array(self.titles))


@dataclass(frozen=True)
class Planted:
    """A model with a backdoor, the attack with all that it learned, and what it poisoned of both splits.

    train: the poisoned training samples, whose original indices are places in the training images. covers: likewise.
    """

    attack: Attack
    model: nn.Module
    train: PoisonedSet
    covers: PoisonedSet
    test: PoisonedSet


def run_attack(
    attack: Attack, run: AttackRun, training: TrainOptions, *, bar: bool = True,
    draw: Callable[[Path], object] | None = None,
) -> tuple[Path, dict[str, Any]]:  # fmt: skip
    """Train a backdoored model and write its record: the record's folder and its `result.json`.

    Nothing appears under that name before all of it is there, and the pictures that `draw` makes of it.

    Raises:
        UserError: bad options, data that is not there, a record of that name.
    """
    start = time.perf_counter()
    spec = _spec(attack, run)
    device = pick_device(run.device)
    peak = PeakMemory(device)
    clean_model = _clean_model(attack, run, spec, device)
    name = run.save_folder_name or f"{attack.name}_{run.dataset}_{datetime.now():%Y%m%d_%H%M%S}"
    check_folder_name(name, "--save_folder_name")
    final = home() / "record" / name
    with (
        whole_folder(final, overwrite=run.overwrite, keep=LEARNED) as folder,
        log_file(folder),
        threads_for(spec.pixels, device),
    ):
        train, test, kept, n_train = _data(run, device)
        course = EpochJudge(test, None, training.amp, only="train")
        monitor = Monitor(course, run.eval_every, bar=bar)
        lab = _lab(attack, run, training, train, kept, monitor, clean_model, folder / LEARNED)
        monitor.seconds["load"] = time.perf_counter() - start

        planted = _plant(attack, run, lab, test, course)
        after = timed_judge(monitor, planted.model, test, planted.test, training.amp)
        if after.asr is not None and not took(after.asr):
            log.warning("the backdoor did not take: ASR %.1f%%, below %g%%", 100 * after.asr, 100 * TOOK)

        poisoned = planted.train.joined(planted.covers)
        poisoned = replace(poisoned, original_indices=kept[poisoned.original_indices.cpu()])
        write_record(
            folder, final_name=name, model_name=run.model, num_classes=spec.num_classes,
            state_dict=planted.model.state_dict(), spec=spec, poisoned_test=planted.test, clean_test=test,
            poisoned_train=poisoned if len(poisoned) else None, n_train=n_train, train_indices=kept,
            info=_info(attack, run, training, spec, name),
        )  # fmt: skip
        figures = _write_trigger(folder, planted, test, kept)
        history = course.with_history([row for row in monitor.history if row["stage"] == "train"])
        _attack_df(history, after, len(lab.batches())).to_csv(folder / "attack_df.csv")
        result = {
            "schema": 1, "kind": "attack", "method": attack.name, "record": name, "attack": attack.name,
            "dataset": run.dataset, "model": run.model, "options": options_of(attack, run, training),
            "seed": run.random_seed, "clean_samples": None, "after": asdict(after),
            "took": took(after.asr), "der": None, "flagged": [], "seconds": stage_seconds(monitor, start),
            "peak_memory_mb": peak.mb(),
            "evidence": {
                "poisoned": len(planted.train), "covers": len(planted.covers), "train_samples": len(train),
                "perceptibility": figures,
            },
            "environment": environment(device),
        }  # fmt: skip
        write_result(folder, result, draw)
    return final, result


def _plant(attack: Attack, run: AttackRun, lab: Lab, test: ImageSet, course: EpochJudge) -> Planted:
    """Let the attack learn its trigger, poison the training set, in place, and train the model."""
    train, device = lab.data, lab.data.device
    chosen = attack.choose(train.labels.cpu())
    covers = attack.covers(train.labels.cpu(), chosen)
    judged = attack.judged(test.labels)

    def poisoned() -> tuple[PoisonedSet, PoisonedSet]:  # by the attack as it is when this is called
        return attack.poison_set(train, chosen, train=True), attack.cover_set(train, covers)

    with global_stream(run.random_seed, "learn", device):
        attack = attack.learn(lab)
    fixed = None if attack.controls_training else poisoned()
    for part in fixed or ():  # the images are held once: the poisoned ones take the place of the clean ones
        train.images[part.original_indices], train.labels[part.original_indices] = part.images, part.labels
    if len(chosen):
        anew = "" if fixed else ", drawn anew for each batch"
        log.info("%s: %d of %d images poisoned, %d covers%s", attack.name, len(chosen), len(train), len(covers), anew)
    else:
        log.info("%s: no training image is poisoned for good", attack.name)
    if not attack.trigger_from_training:
        course.poisoned = attack.poison_set(test, judged, train=False)
    model = lab.new_model("initialisation")
    with global_stream(run.random_seed, "train", device):  # dropout draws from it
        attack = attack.train(model, lab)
    triggered = course.poisoned or attack.poison_set(test, judged, train=False)
    return Planted(attack, model, *(fixed or poisoned()), triggered)


def _write_trigger(
    folder: Path, planted: Planted, test: ImageSet, kept: torch.Tensor
) -> dict[str, float | None] | None:
    """Write the trigger, its samples and which images were poisoned: how perceptible it is, if there is one."""
    for file, part in (("poison_index.txt", planted.train), ("cover_index.txt", planted.covers)):
        if len(part):
            write_index(folder / file, kept[part.original_indices.cpu()])
    trigger = planted.attack.parameters(test.spec)
    save_torch({key: tensor.detach().cpu() for key, tensor in trigger.items()}, folder / "trigger.pt")
    if not len(planted.test):
        return None
    sample = TriggerSample.of(test, planted.test)
    sample.write(folder / SAMPLES_FILE)
    return sample.perceptibility


def run_preview(attack: Attack, run: PreviewRun, training: TrainOptions, *, bar: bool = True) -> TriggerSample:
    """An attack's trigger on some images, without training a backdoored model.

    A trigger that is computed against a clean model is computed first.

    Raises:
        UserError: bad options, data that is not there, a trigger that comes out of the training itself.
    """
    if attack.controls_training and type(attack).learn is not Attack.learn:
        raise UserError(
            f"the trigger of {attack.name} is trained together with the model, so there is none to show before; "
            f"run attack/{attack.name}.py, whose record holds trigger_preview.png"
        )
    spec = _spec(attack, run)
    device = pick_device(run.device)
    clean_model = _clean_model(attack, run, spec, device)
    train, test, kept, _ = _data(run, device)
    with tempfile.TemporaryDirectory() as cache:
        lab = _lab(attack, run, training, train, kept, Monitor(bar=bar), clean_model, Path(cache))
        with global_stream(run.random_seed, "learn", device):  # as in a run: it is that run's trigger
            attack = attack.learn(lab)
    judged = attack.judged(test.labels)
    if not len(judged):
        raise UserError(f"{attack.name} has no trigger to show")
    return TriggerSample.of(test, attack.poison_set(test, judged[:MEASURED], train=False))


def _spec(attack: Attack, run: PreviewRun) -> DatasetSpec:
    """The facts of the data set that the user named, which net and attack fit."""
    architecture_of(run.model, run.width, pretrained=run.pretrained)
    spec = dataset_spec(run.dataset, run.dataset_path, run.img_size)
    if run.img_size and run.dataset != "folder":
        raise UserError(
            f"--img_size would have no effect: the images of {spec.name} are {spec.height} x {spec.width}; leave it out"
        )
    attack.check(spec)
    return spec


def _data(run: PreviewRun, device: torch.device) -> tuple[ImageSet, ImageSet, torch.Tensor, int]:
    """The training and the test images on the device, where the first stand in their split, int64 [N], and its size."""
    train, test = load_dataset(run.dataset, run.dataset_path, run.img_size)
    size, kept = len(train), torch.arange(len(train))
    if run.train_samples is not None:
        if run.train_samples > size:
            raise UserError(f"--train_samples {run.train_samples} is more than the {size} training images")
        kept = drawn(size, run.train_samples, generator(run.random_seed, "train_samples"))
        train = train.subset(kept)
    return train.to(device), test.to(device), kept, size


def _clean_model(attack: Attack, run: PreviewRun, spec: DatasetSpec, device: torch.device) -> nn.Module | None:
    """The clean model that the user named."""
    if run.clean_model is None:
        return None
    if not attack.needs_clean_model:
        raise UserError(f"--clean_model would have no effect: {attack.name} needs no clean model; leave it out")
    record = load_record(run.clean_model, "--clean_model")
    is_for = (record.model_name, record.dataset, record.img_size, record.num_classes)
    if is_for != (wanted := (run.model, spec.name, spec.img_size, spec.num_classes)):
        about = "{0} for {1} of {2} in {3} classes"
        raise UserError(
            f"--clean_model {run.clean_model} is a {about.format(*is_for)}, not a {about.format(*wanted)}; train one "
            "with attack/prototype.py"
        )
    if len(record.bd_test.labels):
        raise UserError(
            f"--clean_model {run.clean_model} has triggered test images, so its model is not clean; train one with "
            "attack/prototype.py"
        )
    return load_model(record.model_name, record.num_classes, record.state_dict, spec.channels).to(device)


def _lab(
    attack: Attack, run: PreviewRun, training: TrainOptions, train: ImageSet, origin: torch.Tensor, monitor: Monitor,
    clean_model: nn.Module | None, cache: Path,
) -> Lab:  # fmt: skip
    def new_model(stream: str) -> nn.Module:
        spec, seed = train.spec, run.random_seed
        model = build_model(
            run.model, spec.num_classes, spec.channels, run.width, pretrained=run.pretrained, seed=seed, stream=stream
        )
        return model.to(train.device)

    @functools.cache
    def key() -> str:
        """All that what it learns may depend on; of the images and of a given clean model, the contents."""
        subject = (run.dataset, run.model, run.width, run.pretrained, run.random_seed)
        digest = hashlib.sha256(repr((attack.name, options_of(attack, training), subject)).encode())
        for tensor in (train.images, train.labels, *(clean_model.state_dict().values() if clean_model else ())):
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    return Lab(train, origin, training, monitor, new_model, clean_model, cache, key)


def _info(attack: Attack, run: AttackRun, training: TrainOptions, spec: DatasetSpec, name: str) -> dict[str, Any]:
    """BackdoorBench's info.pickle: every option by its name there, in builtin types."""
    return {
        **options_of(attack, run, training), "attack": attack.name, "save_folder_name": name,
        "save_path": f"./record/{name}", "num_classes": spec.num_classes, "input_height": spec.height,
        "input_width": spec.width, "input_channel": spec.channels, "img_size": spec.img_size,
    }  # fmt: skip


def _attack_df(history: pd.DataFrame, after: Judgement, batches: int) -> pd.DataFrame:
    """BackdoorBench's attack_df.csv: its column names; test figures only of the epochs that were judged."""
    frame = history.drop(columns="stage").rename(
        columns={"loss": "train_epoch_loss_avg_over_batch", "acc": "train_acc"}
    )
    frame.insert(1, "batch", batches)
    for key, value in test_row(after).items():
        frame.loc[frame.index[-1], key] = value
    return frame
