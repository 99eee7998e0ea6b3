"""One attack or one defense from start to end: the only place where record, method, judge and results meet."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from ulrl.attacks.base import Attack
from ulrl.attacks.lab import Lab
from ulrl.data.datasets import clean_subset, dataset_spec, load_dataset
from ulrl.data.imageset import ImageSet, PoisonedSet
from ulrl.defenses.base import Defense, Repair
from ulrl.errors import UserError
from ulrl.files import PACKAGE_ROOT, find_input, home, save_torch, whole_file, whole_folder
from ulrl.metrics import Judgement, defense_effectiveness, perceptibility
from ulrl.models import WIDTH, build_model, load_model
from ulrl.options import option
from ulrl.record import RESULT_FILE, Record, load_record, write_defense_result, write_record
from ulrl.report import plots
from ulrl.seeds import generator
from ulrl.training import EVAL_BATCH, Monitor, TrainOptions, judge

log = logging.getLogger(__name__)

PREVIEWS = 8
PREVIEWED = 1000  # images that perceptibility is averaged over
LEARNED = "learned"  # folder of a record: what its attack computed before training


@dataclass(frozen=True)
class RunOptions:
    """What attacks and defenses have in common."""

    dataset_path: str = option("./data", "folder that holds <dataset>/", source="BackdoorBench")
    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto is the GPU where there is one")
    random_seed: int = option(0, "seed of every stream of randomness", source="BackdoorBench", low=0)
    eval_every: int = option(0, "judge on the test sets every N epochs too; 0: only at start and end", low=0)


@dataclass(frozen=True)
class PreviewRun(RunOptions):
    """What data and what network an attack is made for."""

    yaml_path: str | None = option(None, "options file; else config/attack/prototype/<dataset>.yaml")
    bd_yaml_path: str | None = option(None, "the attack's own options file; else config/attack/<attack>/default.yaml")
    dataset: str = option("digits", "data set", source="embedded, needs no download")
    train_samples: int | None = option(None, "train on a random subset of this many images", low=2)
    model: str = option("preactresnet18", "architecture", source="BackdoorBench")
    width: int = option(WIDTH, "channels of preactresnet18's first layer", source="BackdoorBench's net", low=1)
    clean_model: str | None = option(
        None, "record of a clean model of that architecture, for an attack that needs one; else it trains its own"
    )


@dataclass(frozen=True)
class AttackRun(PreviewRun):
    """What to train and where the record goes."""

    save_folder_name: str | None = option(None, "name of the record; else made from attack, data set and time")
    overwrite: bool = option(False, "replace a record of that name")


@dataclass(frozen=True)
class DefenseRun(RunOptions):
    """Which record to repair, and with how many clean samples."""

    result_file: str = option("", "the record: its name under record/, or the path of its folder", source="user")
    yaml_path: str | None = option(None, "options file; else config/defense/<defense>/<dataset of the record>.yaml")
    dataset: str | None = option(None, "data set; the record's, another is an error")
    model: str | None = option(None, "architecture; the record's, another is an error")
    ratio: float = option(
        0.01, "share of the clean training images that the defender has", source="ULRL paper", low=0, high=1
    )
    index: str | None = option(None, "text file of the clean training images' indices to use, instead of ratio")


def find_record(result_file: str, flag: str = "--result_file") -> Record:
    """The record that `flag` names.

    Raises:
        UserError: no name given, no such record, or one that cannot be read.
    """
    if not result_file:
        raise UserError(f"{flag} is missing: give the name of a record under record/")
    named = home() / "record" / result_file
    return load_record(named if (named / RESULT_FILE).exists() or not Path(result_file).is_dir() else Path(result_file))


def run_attack(
    attack: Attack, run: AttackRun, training: TrainOptions, *, bar: bool = True
) -> tuple[Path, dict[str, Any]]:
    """Train a backdoored model and write its record: the record's folder and its `result.json`.

    Nothing appears under that name before all of it is there.

    Raises:
        UserError: bad options, data that is not there, a record of that name.
    """
    start = time.perf_counter()
    spec = dataset_spec(run.dataset)
    attack.check(spec)
    device = pick_device(run.device)
    clean_model = _clean_model(attack, run, device)
    name = run.save_folder_name or f"{attack.name}_{run.dataset}_{datetime.now():%Y%m%d_%H%M%S}"
    if name != Path(name).name or name.startswith("."):
        raise UserError(f"--save_folder_name {name!r} is not a plain folder name")
    with whole_folder(home() / "record" / name, overwrite=run.overwrite, keep=LEARNED) as folder, _log_file(folder):
        train, clean_test = load_dataset(run.dataset, run.dataset_path)
        n_train, kept = len(train), _training_subset(len(train), run)
        train, clean_test = (train.subset(kept) if len(kept) < n_train else train).to(device), clean_test.to(device)
        chosen = attack.choose(train.labels.cpu())
        covers = attack.covers(train.labels.cpu(), chosen)
        judged = attack.judged(clean_test.labels)
        course = _Course(clean_test, None, training.amp, only="train")
        monitor = Monitor(course, run.eval_every, bar=bar)
        lab = _lab(attack, run, training, train, kept, monitor, clean_model, folder / LEARNED)
        monitor.seconds["load"] = time.perf_counter() - start

        attack = attack.learn(lab)
        poisoned_train = None
        if not attack.controls_training:
            poisoned_train = _poison_training_set(attack, train, chosen, covers)
            # The images are held once: the poisoned ones take the place of the clean ones.
            at = poisoned_train.original_indices
            train.images[at], train.labels[at] = poisoned_train.images, poisoned_train.labels
        log.info(
            "%s: %d of %d training images poisoned, %d covers%s", attack.name, len(chosen), len(train), len(covers),
            ", drawn anew for each batch" if attack.controls_training else "",
        )  # fmt: skip
        if not attack.trigger_from_training:
            course.poisoned = attack.poison_set(clean_test, judged, train=False)
        model = lab.new_model("initialisation")
        attack = attack.train(model, lab)
        poisoned_test = course.poisoned or attack.poison_set(clean_test, judged, train=False)
        if poisoned_train is None:
            poisoned_train = _poison_training_set(attack, train, chosen, covers)
        after = _timed_judge(monitor, model, clean_test, poisoned_test, training.amp)

        poisoned_train = replace(poisoned_train, original_indices=kept[poisoned_train.original_indices.cpu()])
        write_record(
            folder, final_name=name, model_name=run.model, num_classes=spec.num_classes,
            state_dict=model.state_dict(), spec=spec, poisoned_test=poisoned_test, n_test=len(clean_test),
            poisoned_train=poisoned_train if len(poisoned_train) else None, n_train=n_train, train_indices=kept,
            info=_info(attack, run, training, name),
        )  # fmt: skip
        for file, positions in (("poison_index.txt", chosen), ("cover_index.txt", covers)):
            if len(positions):
                _write_index(folder / file, kept[positions])
        trigger = {key: tensor.detach().cpu() for key, tensor in attack.parameters(spec).items()}
        save_torch(trigger, folder / "trigger.pt")
        history = course.with_history([row for row in monitor.history if row["stage"] == "train"])
        _attack_df(history, after, -(-len(train) // training.batch_size)).to_csv(folder / "attack_df.csv")
        preview = folder / "trigger_preview.png"
        figures = _show_trigger(preview, clean_test, poisoned_test) if len(judged) else None
        result = {
            "schema": 1, "kind": "attack", "method": attack.name, "record": name, "attack": attack.name,
            "dataset": run.dataset, "model": run.model, "options": _options(attack, run, training),
            "seed": run.random_seed, "clean_samples": None, "after": asdict(after),
            "der": None, "flagged": [], "seconds": _seconds(monitor, start), "peak_memory_mb": peak_memory_mb(device),
            "evidence": {
                "poisoned": len(chosen), "covers": len(covers), "train_samples": len(train),
                "perceptibility": figures,
            },
            "environment": environment(device),
        }  # fmt: skip
        _write_json(folder / "result.json", result)
    return home() / "record" / name, result


def run_preview(
    attack: Attack, run: PreviewRun, training: TrainOptions, *, bar: bool = True
) -> tuple[Path, dict[str, float | None]]:
    """Draw an attack's trigger without training a backdoored model: the picture's path, its perceptibility.

    A trigger that is computed against a clean model is computed first.

    Raises:
        UserError: bad options, data that is not there, a trigger that comes out of the training itself.
    """
    if attack.controls_training and type(attack).learn is not Attack.learn:
        raise UserError(
            f"the trigger of {attack.name} is trained together with the model, so there is none to show before; "
            f"run attack/{attack.name}.py, whose record holds trigger_preview.png"
        )
    spec = dataset_spec(run.dataset)
    attack.check(spec)
    device = pick_device(run.device)
    clean_model = _clean_model(attack, run, device)
    train, test = load_dataset(run.dataset, run.dataset_path)
    kept = _training_subset(len(train), run)
    train, test = train.subset(kept).to(device), test.to(device)
    with tempfile.TemporaryDirectory() as cache:
        lab = _lab(attack, run, training, train, kept, Monitor(bar=bar), clean_model, Path(cache))
        attack = attack.learn(lab)
    judged = attack.judged(test.labels)
    if not len(judged):
        raise UserError(f"{attack.name} has no trigger to show")
    path = Path(f"preview_{attack.name}_{run.dataset}.png")
    with whole_file(path) as partial:
        figures = _show_trigger(partial, test, attack.poison_set(test, judged[:PREVIEWED], train=False))
    return path, figures


def _clean_model(attack: Attack, run: PreviewRun, device: torch.device) -> nn.Module | None:
    """The clean model that the user named."""
    if run.clean_model is None:
        return None
    if not attack.needs_clean_model:
        raise UserError(f"--clean_model would have no effect: {attack.name} needs no clean model; leave it out")
    record, spec = find_record(run.clean_model, "--clean_model"), dataset_spec(run.dataset)
    if (record.model_name, record.dataset) != (run.model, run.dataset):
        raise UserError(
            f"--clean_model {run.clean_model} is a {record.model_name} for {record.dataset}, not a {run.model} for "
            f"{run.dataset}; train one with attack/prototype.py"
        )
    return load_model(record.model_name, record.num_classes, record.state_dict, spec.channels).to(device)


def _lab(
    attack: Attack, run: PreviewRun, training: TrainOptions, train: ImageSet, origin: torch.Tensor, monitor: Monitor,
    clean_model: nn.Module | None, cache: Path,
) -> Lab:  # fmt: skip
    def new_model(stream: str) -> nn.Module:
        spec, seed = train.spec, run.random_seed
        model = build_model(run.model, spec.num_classes, spec.channels, run.width, seed=seed, stream=stream)
        return model.to(train.device)

    # All that what it learns may depend on; a given clean model by a checksum.
    subject = (run.dataset, run.dataset_path, run.train_samples, run.model, run.width, run.random_seed)
    checksum = [w.double().sum().item() for w in clean_model.state_dict().values()] if clean_model else None
    key = hashlib.sha256(repr((attack.name, _options(attack, training), subject, checksum)).encode()).hexdigest()
    return Lab(train, origin, training, monitor, new_model, clean_model, cache, key)


def _poison_training_set(attack: Attack, train: ImageSet, chosen: torch.Tensor, covers: torch.Tensor) -> PoisonedSet:
    """The poisoned samples, then the covers."""
    return attack.poison_set(train, chosen, train=True).joined(attack.cover_set(train, covers))


def run_defense(defense: Defense, record: Record, run: DefenseRun, *, bar: bool = True) -> tuple[Path, dict[str, Any]]:
    """Repair the model of a record and judge it: the folder of the results and its `result.json`.

    The defense is given the model and the clean samples; the test sets stay here.

    Raises:
        UserError: bad options, a record that does not fit them or its data, data that is not there.
    """
    start = time.perf_counter()
    for flag, given, recorded in (
        ("dataset", run.dataset, record.dataset),
        ("model", run.model, record.model_name),
    ):
        if given is not None and given != recorded:
            raise UserError(
                f"--{flag} {given} (or that key in YAML) contradicts the record {record.name}, "
                f"which says {recorded}; leave it out"
            )
    spec = dataset_spec(record.dataset)
    device = pick_device(run.device)
    poisoned_test = record.poisoned_test(spec).to(device)
    model = load_model(record.model_name, record.num_classes, record.state_dict, spec.channels).to(device)
    train, clean_test = load_dataset(record.dataset, run.dataset_path)
    clean_test = clean_test.to(device)
    index = _clean_index(run, len(train))
    if len(index) < 2:
        raise UserError("one clean sample is too few to train on; raise --ratio, or list more in --index")
    clean = train.subset(index).to(device)
    del train  # the defender has no more than the clean samples
    course = _Course(clean_test, poisoned_test, defense.amp)
    monitor = Monitor(course, run.eval_every, bar=bar)
    monitor.seconds["load"] = time.perf_counter() - start

    final = record.folder / "defense" / defense.name
    for place in (final.parent, final):
        if place.is_symlink():  # a downloaded record could lead the writing anywhere
            raise UserError(f"{place} is a link, and results are written into the record only; remove it")
    with whole_folder(final, overwrite=True) as folder, _log_file(folder):
        log.info("%s on %s: %d clean samples", defense.name, record.name, len(clean))
        before = _timed_judge(monitor, model, clean_test, poisoned_test, defense.amp)
        repair = defense.run(model, clean, monitor)
        after = _timed_judge(monitor, repair.model, clean_test, poisoned_test, defense.amp)
        if not repair.flagged:
            log.warning("%s found no suspicious class%s", defense.name, _on_empty(repair))

        write_defense_result(
            folder / "defense_result.pt", model_name=record.model_name, num_classes=record.num_classes,
            state_dict=repair.model.state_dict(),
        )  # fmt: skip
        history = course.with_history(monitor.history)
        history.to_csv(folder / f"{defense.name}_df.csv", index=False)
        _write_index(folder / "index.txt", index)
        for table, frame in repair.tables.items():
            frame.to_csv(folder / f"{table}.csv")
        if "neurons" in repair.tables:
            threshold = repair.evidence["z_threshold"]
            plots.neuron_ranking(folder / "neuron_ranking.png", repair.tables["neurons"], threshold, spec.class_names)
        result = {
            "schema": 1, "kind": "defense", "method": defense.name, "record": record.name, "attack": record.attack,
            "dataset": record.dataset, "model": record.model_name, "options": _options(defense, run),
            "seed": run.random_seed, "clean_samples": len(clean), "before": asdict(before),
            "after": asdict(after), "der": defense_effectiveness(before, after),
            "flagged": repair.flagged, "seconds": _seconds(monitor, start), "peak_memory_mb": peak_memory_mb(device),
            "evidence": repair.evidence, "environment": environment(device),
        }  # fmt: skip
        plots.acc_asr(folder / "acc_asr.png", history, before, after)
        _write_json(folder / "result.json", result)
    return final, result


def pick_device(name: str) -> torch.device:
    """The torch device of that name; `auto` is the GPU where there is one.

    Raises:
        UserError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    first = name.split(",")[0]  # BackdoorBench's "cuda:0,1" asks for several; one is used here
    try:
        device = torch.device(first)
        if device.type not in EVAL_BATCH:
            raise RuntimeError
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: there is no such device on this machine; use --device cpu or auto") from None
    return device


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides its options."""
    on_gpu = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "git": _git_commit(),
    }


def peak_memory_mb(device: torch.device) -> float:
    """The most memory held so far, in MB: the process's on a CPU, the tensors' on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3  # bytes there, KiB on Linux


def _training_subset(size: int, run: PreviewRun) -> torch.Tensor:
    if run.train_samples is None:
        return torch.arange(size)
    if run.train_samples > size:
        raise UserError(f"--train_samples {run.train_samples} is more than the {size} training images")
    order = torch.randperm(size, generator=generator(run.random_seed, "train_samples"))
    return order[: run.train_samples].sort().values


def _clean_index(run: DefenseRun, size: int) -> torch.Tensor:
    """The clean samples to use: those listed in `--index`, or a draw of `ratio`. int64 [n]."""
    if run.index is None:
        return clean_subset(size, run.ratio, run.random_seed)
    file = find_input(run.index)
    try:
        index = [int(word) for word in file.read_text().split()]
    except (OSError, ValueError) as error:
        raise UserError(f"--index {file}: not a readable list of whole numbers ({error})") from None
    if not index or min(index) < 0 or max(index) >= size or len(set(index)) < len(index):
        raise UserError(f"--index {file}: give different indices, each from 0 to {size - 1}, at least one")
    return torch.tensor(index, dtype=torch.int64)


class _Course:
    """The test figures of the epochs that were judged. They are kept here, where no method can look.

    only: the stage whose model is judged; any when not given. Without `poisoned`, accuracy alone is.
    """

    def __init__(self, clean: ImageSet, poisoned: PoisonedSet | None, amp: bool, only: str | None = None) -> None:
        self.poisoned = poisoned
        self._clean, self._amp, self._only = clean, amp, only
        self._rows: dict[tuple[str, int], dict[str, Any]] = {}

    def __call__(self, stage: str, epoch: int, model: nn.Module) -> None:
        if self._only in (None, stage):
            self._rows[stage, epoch] = _test_row(judge(model, self._clean, self.poisoned, self._amp))

    def with_history(self, history: list[dict[str, Any]]) -> pd.DataFrame:
        return pd.DataFrame([row | self._rows.get((row["stage"], row["epoch"]), {}) for row in history])


def _timed_judge(monitor: Monitor, model: nn.Module, clean: ImageSet, poisoned: PoisonedSet, amp: bool) -> Judgement:
    start = time.perf_counter()
    judgement = judge(model, clean, poisoned, amp)
    monitor.seconds["judge"] = monitor.seconds.get("judge", 0.0) + time.perf_counter() - start
    return judgement


def _test_row(judgement: Judgement) -> dict[str, Any]:
    return {f"test_{k}": getattr(judgement, k) for k in ("acc", "asr", "ra")}


def _seconds(monitor: Monitor, start: float) -> dict[str, float]:
    stages = {k: round(v, 3) for k, v in monitor.seconds.items() if k != "judge"}
    judging = round(monitor.seconds.get("judge", 0.0), 3)
    return {**stages, "judge": judging, "total": round(time.perf_counter() - start, 3)}


def _on_empty(repair: Repair) -> str:
    policy = repair.evidence.get("on_empty")
    words = {
        "finetune": ": the model was only fine-tuned (on_empty: finetune)",
        "top1": ": the most changed one was taken all the same (on_empty: top1)",
        "abort": ": the model is left as it was (on_empty: abort)",
    }
    return words.get(policy or "", "")


def _options(*parts: Any) -> dict[str, Any]:
    """The options in these dataclasses, as given or by default."""
    return {f.name: getattr(part, f.name) for part in parts for f in fields(part) if f.metadata}


def _info(attack: Attack, run: AttackRun, training: TrainOptions, name: str) -> dict[str, Any]:
    """BackdoorBench's info.pickle: every option by its name there, in builtin types."""
    spec = dataset_spec(run.dataset)
    return {
        **_options(attack, run, training), "attack": attack.name, "save_folder_name": name,
        "save_path": f"./record/{name}", "num_classes": spec.num_classes, "input_height": spec.height,
        "input_width": spec.width, "input_channel": spec.channels, "img_size": spec.img_size,
    }  # fmt: skip


def _attack_df(history: pd.DataFrame, after: Judgement, batches: int) -> pd.DataFrame:
    """BackdoorBench's attack_df.csv: its column names; test figures only of the epochs that were judged."""
    frame = history.drop(columns="stage").rename(
        columns={"loss": "train_epoch_loss_avg_over_batch", "acc": "train_acc"}
    )
    frame.insert(1, "batch", batches)
    for key, value in _test_row(after).items():
        frame.loc[frame.index[-1], key] = value
    return frame


def _show_trigger(path: Path, clean: ImageSet, poisoned: PoisonedSet) -> dict[str, float | None]:
    """Draw the first poisoned images beside the clean ones; how perceptible the trigger is, over up to 1,000."""
    some = poisoned.subset(torch.arange(min(PREVIEWS, len(poisoned))))
    names = clean.spec.class_names or [str(k) for k in range(clean.spec.num_classes)]
    titles = [
        f"{names[a]} → {names[b]}" if len(names[a]) + len(names[b]) < 12 else f"{names[a]}\n→ {names[b]}"
        for a, b in zip(some.original_labels.tolist(), some.labels.tolist(), strict=True)
    ]
    plots.trigger_preview(path, clean.subset(some.original_indices).images, some.images, titles)
    pairs = poisoned.subset(torch.arange(min(PREVIEWED, len(poisoned))))
    return asdict(perceptibility(clean.subset(pairs.original_indices).images, pairs.images))


def _write_index(path: Path, index: torch.Tensor) -> None:
    path.write_text("".join(f"{i}\n" for i in index.tolist()))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def _git_commit() -> str | None:
    if not (PACKAGE_ROOT / ".git").exists():  # installed: a repository around it would be another one
        return None
    command = ["git", "-C", str(PACKAGE_ROOT), "rev-parse", "--short", "HEAD"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    return None


class _LogFile(logging.FileHandler):
    """Lets a full disk end the run, where logging would print a traceback and go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


@contextlib.contextmanager
def _log_file(folder: Path) -> Iterator[None]:
    """Copy what is logged inside the block to `<time>.log` in `folder`."""
    handler = _LogFile(folder / f"{datetime.now():%Y_%m_%d_%H_%M_%S}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("ulrl")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
