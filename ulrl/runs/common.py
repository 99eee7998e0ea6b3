"""What attacks and defenses share when they run: options, the judge's rows, the machine, the files."""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from ulrl.data.imageset import ImageSet, PoisonedSet
from ulrl.errors import UserError
from ulrl.files import PACKAGE_ROOT, home
from ulrl.metrics import Judgement
from ulrl.options import Schema, option
from ulrl.record import RESULT_FILE, Record, load_record
from ulrl.training import EVAL_BATCH, Monitor, judge

Layer = tuple[str, dict[str, Any]]  # an options file and its values


@dataclass(frozen=True)
class RunOptions:
    """What attacks and defenses have in common."""

    dataset_path: str = option(
        "./data", "folder that holds <dataset>/; for the data set `folder`, that folder", source="BackdoorBench"
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto is the GPU where there is one")
    random_seed: int = option(0, "seed of every stream of randomness", source="BackdoorBench", low=0)
    eval_every: int = option(0, "judge on the test sets every N epochs too; 0: only at start and end", low=0)


def find_record(result_file: str, flag: str = "--result_file") -> Record:
    """The record that `flag` names.

    Raises:
        UserError: no name given, no such record, or one that cannot be read.
    """
    if not result_file:
        raise UserError(f"{flag} is missing: give the name of a record under record/")
    named = home() / "record" / result_file
    return load_record(named if (named / RESULT_FILE).exists() or not Path(result_file).is_dir() else Path(result_file))


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


OTHER_NAMES = {
    "target_label": "attack_target",
    "poison_rate": "pratio",
    "target_type": "attack_label_trans",
    "pretrain_model_path": "clean_model",
}


def attack_layers(schema: Schema, name: str, flags: Mapping[str, Any]) -> list[Layer]:
    """What an attack's options files say: of the training, then of the attack; `flags` may name either.

    Raises:
        UserError: a file that cannot be used, or a name that would have no effect.
    """
    dataset = flags.get("dataset", schema.fields["dataset"].default)
    training = _usual_layers(schema, Path("config/attack/prototype"), dataset, flags.get("model"))
    if "yaml_path" in flags:
        training = [yaml_layer(schema, flags["yaml_path"])]
    files = [*training, yaml_layer(schema, flags.get("bd_yaml_path"), Path("config/attack") / name / "default.yaml")]
    for other, ours in OTHER_NAMES.items():  # in a defense's file they only describe the record
        if any(other in layer for layer in (flags, *(values for _, values in files))):
            raise UserError(f"{other} would have no effect on an attack; its name here is {ours}")
    return files


def defense_layers(schema: Schema, name: str, dataset: str, model: str, given: str | None = None) -> list[Layer]:
    """What the options files of a defense say: the one named, or the usual ones for data set and model."""
    if given is not None:
        return [yaml_layer(schema, given)]
    return _usual_layers(schema, Path("config/defense") / name, dataset, model)


def yaml_layer(schema: Schema, given: str | None, usual: Path | None = None) -> Layer:
    """The options of the file that the user named, or of the usual one where that exists."""
    if given is None and usual is not None:
        given = next((str(root / usual) for root in (home(), PACKAGE_ROOT) if (root / usual).is_file()), None)
    return (given, schema.yaml(given)) if given else ("", {})


def _usual_layers(schema: Schema, folder: Path, dataset: str, model: str | None) -> list[Layer]:
    """The data set's file and, over it, the architecture's, of those that exist.

    model: the user's or the record's; else the file's own. What a file says of layers is of its own model.
    """

    def layer(name: str | None) -> Layer:
        usual = folder / f"{name}.yaml"  # a record's name, which could lead anywhere
        return yaml_layer(schema, None, usual) if usual.parent == folder else ("", {})

    path, values = layer(dataset)
    if model is None:
        model = values.get("model")
    elif values.get("model", model) != model:
        values = {k: v for k, v in values.items() if k not in ("model", "width", "linear_name")}
    return [(path, values), layer(model)]


class Course:
    """The test figures of the epochs that were judged. They are kept here, where no method can look.

    only: the stage whose model is judged; any when not given. Without `poisoned`, accuracy alone is.
    """

    def __init__(self, clean: ImageSet, poisoned: PoisonedSet | None, amp: bool, only: str | None = None) -> None:
        self.poisoned = poisoned
        self._clean, self._amp, self._only = clean, amp, only
        self._rows: dict[tuple[str, int], dict[str, Any]] = {}

    def __call__(self, stage: str, epoch: int, model: nn.Module) -> None:
        if self._only in (None, stage):
            self._rows[stage, epoch] = test_row(judge(model, self._clean, self.poisoned, self._amp))

    def with_history(self, history: list[dict[str, Any]]) -> pd.DataFrame:
        return pd.DataFrame([row | self._rows.get((row["stage"], row["epoch"]), {}) for row in history])


def timed_judge(monitor: Monitor, model: nn.Module, clean: ImageSet, poisoned: PoisonedSet, amp: bool) -> Judgement:
    start = time.perf_counter()
    judgement = judge(model, clean, poisoned, amp)
    monitor.seconds["judge"] = monitor.seconds.get("judge", 0.0) + time.perf_counter() - start
    return judgement


def test_row(judgement: Judgement) -> dict[str, Any]:
    return {f"test_{k}": getattr(judgement, k) for k in ("acc", "asr", "ra")}


def stage_seconds(monitor: Monitor, start: float) -> dict[str, float]:
    stages = {k: round(v, 3) for k, v in monitor.seconds.items() if k != "judge"}
    judging = round(monitor.seconds.get("judge", 0.0), 3)
    return {**stages, "judge": judging, "total": round(time.perf_counter() - start, 3)}


def options_of(*parts: Any) -> dict[str, Any]:
    """The options in these dataclasses, as given or by default."""
    return {f.name: getattr(part, f.name) for part in parts for f in fields(part) if f.metadata}


def write_index(path: Path, index: torch.Tensor) -> None:
    path.write_text("".join(f"{i}\n" for i in index.tolist()))


def write_json(path: Path, content: dict[str, Any]) -> None:
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
def log_file(folder: Path) -> Iterator[None]:
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
