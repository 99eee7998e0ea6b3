"""What attacks and defenses share when they run: the judge's rows and the files."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from ulrl.data.imageset import ImageSet, PoisonedSet
from ulrl.errors import LineFormatter
from ulrl.metrics import Judgement
from ulrl.training import Monitor, judge

log = logging.getLogger(__name__)

SAMPLES_FILE = "trigger_samples.npz"  # in a record: some test images, clean and triggered


class EpochJudge:
    """The test figures of the epochs that were judged. They are kept here, where no method can look.

    only: the stage whose model is judged; any when not given. Without `poisoned`, accuracy alone is.
    """

    def __init__(self, clean: ImageSet, poisoned: PoisonedSet | None, amp: bool, only: str | None = None) -> None:
        self.poisoned = poisoned
        self._clean, self._amp, self._only = clean, amp, only
        self._rows: defaultdict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)

    def __call__(self, stage: str, epoch: int, model: nn.Module) -> None:
        if self._only in (None, stage):
            self._rows[stage, epoch].append(test_row(judge(model, self._clean, self.poisoned, self._amp)))

    def with_history(self, history: list[dict[str, Any]]) -> pd.DataFrame:
        """A monitor's history, a row per epoch, with the figures of those that were judged."""
        times = {at: iter(figures) for at, figures in self._rows.items()}  # a method in rounds has a stage again
        rows = [row | next(times.get((row["stage"], row["epoch"]), iter(())), {}) for row in history]
        return pd.DataFrame(rows) if rows else pd.DataFrame(columns=["stage", "epoch"])  # a method that has no epochs


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


def write_index(path: Path, index: torch.Tensor) -> None:
    path.write_text("".join(f"{i}\n" for i in index.tolist()))


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(plain(content), indent=2, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """What JSON can hold of a value, so that no evidence costs a method its run: arrays and tensors as numbers and
    lists, NaN and the infinite as None, keys and all else as texts."""
    match value:
        case str():  # a path may be no UTF-8, and is then spelled out, as what is written is to be read again
            return value.encode("utf-8", "backslashreplace").decode()
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): plain(part) for key, part in value.items()}
        case list() | tuple() | set() | frozenset():
            return [plain(part) for part in value]
    return plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def write_result(folder: Path, result: dict[str, Any], draw: Callable[[Path], object] | None) -> None:
    """Write `result.json`, and let `draw` make its pictures of the folder, which still has its temporary name: a run
    that is killed leaves nothing half drawn. A picture that fails is logged and does not fail the run."""
    write_json(folder / "result.json", result)
    if draw is not None:
        try:
            draw(folder)
        except Exception as error:
            log.warning("some pictures are missing: %s: %s", type(error).__name__, error)


class _LogFile(logging.FileHandler):
    """Lets a full disk end the run, where logging would print a traceback and go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


@contextlib.contextmanager
def log_file(folder: Path) -> Iterator[None]:
    """Copy what is logged inside the block to `<time>.log` in `folder`."""
    handler = _LogFile(folder / f"{datetime.now():%Y_%m_%d_%H_%M_%S}.log")
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("ulrl")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
