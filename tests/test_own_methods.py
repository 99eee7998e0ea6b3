"""What a method of the user's own returns: it is taken in any form that can be read, or refused in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ulrl.configure import DefenseRun, DetectionRun
from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import Defense, Repair, Trigger
from ulrl.detectors.base import Detector, Scored
from ulrl.errors import UserError
from ulrl.record import load_record
from ulrl.runs.defending import run_defense
from ulrl.runs.detecting import run_detector
from ulrl.training import Monitor


@dataclass(frozen=True)
class Toy(Defense):
    """Returns what the test wants."""

    name = "toy"
    made: Callable[[nn.Module], Any] = Repair

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Any:
        return self.made(model)


def by_toy(made: Callable[[nn.Module], Any]) -> dict[str, Any]:
    run = DefenseRun(result_file="tiny", ratio=0.05, device="cpu", overwrite=True)
    folder, _ = run_defense(Toy(made=made), load_record("tiny"), run, bar=False)
    return json.loads((folder / "result.json").read_text())


def test_evidence_of_any_kind_costs_no_repair(tiny_home: Path) -> None:
    odd = {"np": np.float32(0.5), "nan": float("nan"), "inf": torch.tensor(float("inf")), "array": np.eye(2),
           "tensors": [torch.tensor(3), torch.tensor([1.5, float("nan")], requires_grad=True)], "set": {1},
           2: Path("a"), "np int": np.int64(7), "yes": np.bool_(True)}  # fmt: skip
    held = by_toy(lambda model: Repair(model, evidence=odd))["evidence"]
    assert held == {"np": 0.5, "nan": None, "inf": None, "array": [[1, 0], [0, 1]], "tensors": [3, [1.5, None]],
                    "set": [1], "2": "a", "np int": 7, "yes": True}  # fmt: skip


@pytest.mark.parametrize(
    "flagged",
    [[3, 1], (3, 1), np.array([3, 1]), torch.tensor([3, 1]), iter([np.int64(3), 1])],
    ids=lambda f: type(f).__name__,
)
def test_flagged_is_a_list_of_classes(flagged: Any, tiny_home: Path) -> None:
    assert by_toy(lambda model: Repair(model, flagged=flagged))["flagged"] == [3, 1]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda model: None, "run() of the defense toy returned NoneType"),
        (lambda model: model, "returned PreActResNet18; let it return Repair(model)"),
        (lambda model: Repair(None), "returned a Repair without a model"),  # type: ignore[arg-type]
        (lambda model: Repair(model, flagged=None), "flagged None"),  # type: ignore[arg-type]
        (lambda model: Repair(model, flagged=[10]), "the defense toy flagged [10]"),
        (lambda model: Repair(model, flagged=[True, False]), "flagged [True, False]"),
        (lambda model: Repair(model, flagged=[3.0]), "flagged [3.0]"),  # type: ignore[list-item]
        (lambda model: Repair(model, flagged=torch.ones(10) > 0), "flagged [True"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_repair_is_told_and_leaves_nothing(
    made: Callable[[nn.Module], Any], words: str, tiny_home: Path
) -> None:
    before = sorted((tiny_home / "record").rglob("*"))
    with pytest.raises(UserError, match=re.escape(words)):
        by_toy(made)
    assert sorted((tiny_home / "record").rglob("*")) == before


def test_a_trigger_that_cannot_be_compared_costs_no_repair(tiny_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    wrong = Trigger(torch.zeros(1, 5, 5), torch.zeros(3, 5, 5))
    result = by_toy(lambda model: Repair(model, triggers={0: wrong}))
    assert "trigger" not in result
    assert "the trigger that was found is not compared: RuntimeError" in caplog.text


@pytest.mark.parametrize(
    ("scored", "words"),
    [
        (None, "score() of toy returned NoneType"),
        (Scored(torch.zeros(7)), "score() of toy gave scores of the shape (7,) for 20 images"),
        (Scored(torch.zeros(20, 1)), "(20, 1) for 20 images"),
    ],
)
def test_what_are_no_scores_is_told(scored: Any, words: str, tiny_home: Path) -> None:
    class Odd(Detector):
        name = "toy"

        def score(self, *given: object) -> Any:
            return scored

    run = DetectionRun(result_file="tiny", ratio=0.05, device="cpu", images=20)
    with pytest.raises(UserError, match=re.escape(words)):
        run_detector(Odd(), load_record("tiny"), run, bar=False)
