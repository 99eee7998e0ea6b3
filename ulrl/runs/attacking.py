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
from ulrl.seeds import generator, global_stream
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
    spec = _spec(run)
    attack.check(spec)
    device = pick_device(run.device)
    peak = PeakMemory(device)
    clean_model = _clean_model(attack, run, spec, device)
    name = run.save_folder_name or f"{attack.name}_{run.dataset}_{datetime.now():%Y%m%d_%H%M%S}"
    check_folder_name(name, "--save_folder_name")
    final, pixels = home() / "record" / name, spec.height * spec.width
    with (
        whole_folder(final, overwrite=run.overwrite, keep=LEARNED) as folder,
        log_file(folder),
        threads_for(pixels, device),
    ):
        train, clean_test = load_dataset(run.dataset, run.dataset_path, run.img_size)
        n_train, kept = len(train), _training_subset(len(train), run)
        train, clean_test = (train.subset(kept) if len(kept) < n_train else train).to(device), clean_test.to(device)
        chosen = attack.choose(train.labels.cpu())
        covers = attack.covers(train.labels.cpu(), chosen)
        judged = attack.judged(clean_test.labels)
        course = EpochJudge(clean_test, None, training.amp, only="train")
        monitor = Monitor(course, run.eval_every, bar=bar)
        lab = _lab(attack, run, training, train, kept, monitor, clean_model, folder / LEARNED)
        monitor.seconds["load"] = time.perf_counter() - start

        with global_stream(run.random_seed, "learn", device):
            attack = attack.learn(lab)
        poisoned_train = None
        if not attack.controls_training:
            poisoned_train = _poison_training_set(attack, train, chosen, covers)
            # The images are held once: the poisoned ones take the place of the clean ones.
            at = poisoned_train.original_indices
            train.images[at], train.labels[at] = poisoned_train.images, poisoned_train.labels
        if len(chosen):
            drawn = ", drawn anew for each batch" if attack.controls_training else ""
            log.info(
                "%s: %d of %d images poisoned, %d covers%s", attack.name, len(chosen), len(train), len(covers), drawn
            )
        else:
            log.info("%s: no training image is poisoned for good", attack.name)
        if not attack.trigger_from_training:
            course.poisoned = attack.poison_set(clean_test, judged, train=False)
        model = lab.new_model("initialisation")
        with global_stream(run.random_seed, "train", device):  # dropout draws from it
            attack = attack.train(model, lab)
        poisoned_test = course.poisoned or attack.poison_set(clean_test, judged, train=False)
        if poisoned_train is None:
            poisoned_train = _poison_training_set(attack, train, chosen, covers)
        after = timed_judge(monitor, model, clean_test, poisoned_test, training.amp)
        if after.asr is not None and not took(after.asr):
            log.warning("the backdoor did not take: ASR %.1f%%, below %g%%", 100 * after.asr, 100 * TOOK)

        poisoned_train = replace(poisoned_train, original_indices=kept[poisoned_train.original_indices.cpu()])
        write_record(
            folder, final_name=name, model_name=run.model, num_classes=spec.num_classes,
            state_dict=model.state_dict(), spec=spec, poisoned_test=poisoned_test, clean_test=clean_test,
            poisoned_train=poisoned_train if len(poisoned_train) else None, n_train=n_train, train_indices=kept,
            info=_info(attack, run, training, spec, name),
        )  # fmt: skip
        for file, positions in (("poison_index.txt", chosen), ("cover_index.txt", covers)):
            if len(positions):
                write_index(folder / file, kept[positions])
        trigger = {key: tensor.detach().cpu() for key, tensor in attack.parameters(spec).items()}
        save_torch(trigger, folder / "trigger.pt")
        history = course.with_history([row for row in monitor.history if row["stage"] == "train"])
        _attack_df(history, after, len(lab.batches())).to_csv(folder / "attack_df.csv")
        figures = None
        if len(judged):
            sample = TriggerSample.of(clean_test, poisoned_test)
            sample.write(folder / SAMPLES_FILE)
            figures = sample.perceptibility
        result = {
            "schema": 1, "kind": "attack", "method": attack.name, "record": name, "attack": attack.name,
            "dataset": run.dataset, "model": run.model, "options": options_of(attack, run, training),
            "seed": run.random_seed, "clean_samples": None, "after": asdict(after),
            "took": took(after.asr), "der": None, "flagged": [], "seconds": stage_seconds(monitor, start),
            "peak_memory_mb": peak.mb(),
            "evidence": {
                "poisoned": len(chosen), "covers": len(covers), "train_samples": len(train),
                "perceptibility": figures,
            },
            "environment": environment(device),
        }  # fmt: skip
        write_result(folder, result, draw)
    return final, result


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
    spec = _spec(run)
    attack.check(spec)
    device = pick_device(run.device)
    clean_model = _clean_model(attack, run, spec, device)
    train, test = load_dataset(run.dataset, run.dataset_path, run.img_size)
    kept = _training_subset(len(train), run)
    train, test = train.subset(kept).to(device), test.to(device)
    with tempfile.TemporaryDirectory() as cache:
        lab = _lab(attack, run, training, train, kept, Monitor(bar=bar), clean_model, Path(cache))
        with global_stream(run.random_seed, "learn", device):  # as in a run: it is that run's trigger
            attack = attack.learn(lab)
    judged = attack.judged(test.labels)
    if not len(judged):
        raise UserError(f"{attack.name} has no trigger to show")
    return TriggerSample.of(test, attack.poison_set(test, judged[:MEASURED], train=False))


def _spec(run: PreviewRun) -> DatasetSpec:
    """The facts of the data set that the user named, with a net that there is."""
    architecture_of(run.model, run.width, pretrained=run.pretrained)
    spec = dataset_spec(run.dataset, run.dataset_path, run.img_size)
    if run.img_size and run.dataset != "folder":
        raise UserError(
            f"--img_size would have no effect: the images of {spec.name} are {spec.height} x {spec.width}; leave it out"
        )
    return spec


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


def _poison_training_set(attack: Attack, train: ImageSet, chosen: torch.Tensor, covers: torch.Tensor) -> PoisonedSet:
    """The poisoned samples, then the covers."""
    return attack.poison_set(train, chosen, train=True).joined(attack.cover_set(train, covers))


def _training_subset(size: int, run: PreviewRun) -> torch.Tensor:
    if run.train_samples is None:
        return torch.arange(size)
    if run.train_samples > size:
        raise UserError(f"--train_samples {run.train_samples} is more than the {size} training images")
    order = torch.randperm(size, generator=generator(run.random_seed, "train_samples"))
    return order[: run.train_samples].sort().values


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
