"""The door for a user's own model: what is said of it."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from own_nets import TARGET, rates, stamp, weights
from rich.console import Console
from torch import nn

import ulrl
from ulrl import UserError
from ulrl.own_model.suspecting import decide
from ulrl.report.tables import suspicion_table


def test_suspect_tells_a_backdoor(backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor]) -> None:
    before = weights(backdoored)
    found = ulrl.suspect(backdoored, *clean)
    assert (found.verdict, found.label) == ("backdoored", TARGET)
    assert repr(found).startswith("backdoored; look at class 7\n")
    assert found.z == found.ranking.z[TARGET]
    assert found.reach == pytest.approx(found.ranking.perturbation.min() / found.ranking.perturbation.median())
    assert torch.equal(weights(backdoored), before)


@pytest.mark.parametrize(
    ("z", "flagged", "reach", "margin", "verdict"),
    [
        ([4, 1, 2], [1, 0, 0], [0.45, 1, 1.2], [15, 10, -1], (0, "backdoored")),  # all three signs
        ([4, 1, 2], [1, 0, 0], [0.52, 1, 1.2], [15, 10, -1], (0, "backdoored")),
        ([7, 1, 2], [1, 0, 0], [0.65, 1, 1.2], [15, 10, -1], (0, "uncertain")),  # two
        ([7, 1, 2], [1, 0, 0], [0.45, 1, 1.2], [12, 10, -1], (0, "uncertain")),
        ([3, 1, 2], [0, 0, 0], [0.9, 0.45, 1.2], [10, 15, -1], (1, "uncertain")),
        ([7, 1, 2], [1, 0, 0], [0.52, 1, 1.2], [12, 10, -1], (0, "no evidence found")),
        ([7, 1, 2], [1, 0, 0], [1, 0.45, 1.2], [10, 9, 15], (0, "no evidence found")),  # each of another class
        ([61.9, 1, 2], [1, 0, 0], [0.91, 1, 1.2], [10, 10, 10], (0, "no evidence found")),
        ([3, 1, 2], [0, 0, 0], [0.9, 0.7, 1.2], [10, 10, 10], (0, "no evidence found")),
        ([9, 1, 2], [1, 0, 0], [0.2, 1, 1.2], [1, 1, 1], (0, "backdoored")),  # so near that the margin is not needed
        ([7, 1, 2], [1, 0, 0], [0.35, 1, 1.2], [1, 1, 1], (0, "backdoored")),  # less near, but it stands high
        ([5, 1, 2], [1, 0, 0], [0.35, 1, 1.2], [1, 1, 1], (0, "uncertain")),
        ([9, 1, 2], [1, 0, 0], [0.9, 0.2, 1.2], [1, 1, 1], (1, "uncertain")),  # so near, but another
        ([3, 1, 2], [0, 0, 0], [0.9, 0.8, 1.2], [10, 26, 3], (1, "uncertain")),  # so far ahead
        ([3, 1, 2], [0, 0, 0], [0.9, 0.8, 1.2], [10, 24, 3], (1, "no evidence found")),
        ([4, 1, 2], [1, 0, 0], [0.9, 0.8, 1.2], [26, 10, 3], (0, "backdoored")),
        ([4, 1, 2], [1, 0, 0], [math.inf, 0.8, 1.2], [26, 10, 3], (0, "backdoored")),
        ([4, 1, 2], [1, 0, 0], [0.9, 0.8, 1.2], [24, 10, 3], (0, "uncertain")),
        ([1, 4, 2], [0, 1, 0], [0.9, 0.8, 1.2], [26, 10, 3], (0, "uncertain")),  # another is flagged
        ([7, 1, 2], [1, 0, 0], [0.52, 1, 1.2], [3, -1, -2], (0, "backdoored")),  # for the others there is none
        ([7, 1, 2], [1, 0, 0], [0.52, 1, 1.2], [-1, -3, -2], (0, "no evidence found")),
        ([7, 1, 2], [1, 0, 0], [0.45, 1, 1.2], [math.nan] * 3, (0, "uncertain")),
        ([3, 9, 2], [0, 1, 0], [math.nan] * 3, [1, 1, 1], (1, "uncertain")),
        ([3, 9, 2], [0, 1, 0], [math.nan] * 3, [1, 30, 1], (1, "backdoored")),
        ([7, 9, 2], [1, 1, 0], [0.5, 0.2, 1.2], [30, 1, 1], (1, "backdoored")),  # of two the nearer
        ([9, 1, 2], [1, 0, 0], [math.inf, 1, 1.2], [15, 10, -1], (0, "uncertain")),
    ],
)
def test_verdicts(
    z: list[float], flagged: list[int], reach: list[float], margin: list[float], verdict: tuple[int, str]
) -> None:
    ranking = pd.DataFrame({"z": z, "flagged": np.array(flagged, bool), "reach": reach, "margin": margin})
    assert decide(ranking) == verdict


def test_no_evidence_is_not_found_by_a_search_that_failed() -> None:
    ranking = pd.DataFrame({"z": [3.0, 1.0], "flagged": [False, False], "reach": [0.9, 1.1], "margin": [1.0, 1.0]})
    assert decide(ranking, searched=False) == (0, "uncertain")


def test_noise_has_the_largest_margin_for_the_target_alone(
    backdoored: nn.Module, innocent: nn.Module, clean: tuple[torch.Tensor, torch.Tensor]
) -> None:
    found, plain = (ulrl.suspect(model, *clean, unlearning_epochs=1).ranking.margin for model in (backdoored, innocent))
    assert found.idxmax() == TARGET
    assert found[TARGET] > 1.3 * found.drop(TARGET).max()
    assert plain[TARGET] < plain.max()


def test_of_two_classes_none_can_be_cleared(backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor]) -> None:
    pair = torch.tensor([1, TARGET])
    model, head = copy.deepcopy(backdoored), nn.Linear(64, 2)
    head.weight.data, head.bias.data = backdoored.classify.weight.data[pair], backdoored.classify.bias.data[pair]
    model.classify = head
    kept = torch.isin(clean[1], pair)
    with pytest.warns(ulrl.Note, match="of two classes is always called uncertain"):
        found = ulrl.suspect(model, clean[0][kept], (clean[1][kept] == TARGET).long())
    assert found.verdict == "uncertain"


def shuffled(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x, y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]


def black(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x * 0 - 1, y


@pytest.mark.parametrize("spoil", [shuffled, black])
def test_no_verdict_on_images_that_the_model_cannot_read(
    spoil: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    backdoored: nn.Module,
    clean: tuple[torch.Tensor, torch.Tensor],
) -> None:
    with pytest.warns(ulrl.Note, match=r"about as many as by chance: are their labels"):
        found = ulrl.suspect(backdoored, *spoil(*clean))
    assert (found.verdict, found.label, len(found.ranking)) == ("no verdict", None, 0)
    assert "by chance" in repr(found)


def test_images_of_one_class_give_no_verdict_and_it_is_said_why(
    backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor]
) -> None:
    of_one = clean[1] == 3
    with pytest.warns(ulrl.Note, match="all samples are of one class"):
        found = ulrl.suspect(backdoored, clean[0][of_one], clean[1][of_one])
    assert found.verdict == "no verdict"
    assert "by chance" not in repr(found)


def test_an_unlearning_that_ends_early_names_whose_options_to_raise(
    backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor]
) -> None:
    with pytest.warns(ulrl.Note, match="raise unlearning_lr or unlearning_epochs, options of the method ulrl"):
        found = ulrl.suspect(backdoored, *clean, unlearning_epochs=1, unlearning_lr=1e-6)
    assert found.verdict != "no evidence found"


def test_the_verdict_stands_on_a_line_of_its_own() -> None:
    ranking = pd.DataFrame({"z": [2.0, 1.0], "flagged": [False, False], "reach": [0.4, 0.6], "margin": [3.0, 1.0]})
    verdict, said = "verdict: no evidence found; look at 8", io.StringIO()
    Console(file=said, width=80).print(suspicion_table(ranking, ["8", "9"], verdict))
    assert verdict in said.getvalue()


@pytest.mark.parametrize(
    ("count", "verdict", "batch_size", "words"),
    [(39, "backdoored", 10, "39 images are few for a verdict"), (18, "uncertain", 5, "18 images are too few")],
)
def test_few_images_are_noticed(
    count: int, verdict: str, batch_size: int, words: str, backdoored: nn.Module,
    clean: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("ulrl.own_model.suspecting.decide", lambda ranking, searched: (0, "backdoored"))
    with pytest.warns(ulrl.Note, match=words):
        found = ulrl.suspect(backdoored, clean[0][:count], clean[1][:count], unlearning_epochs=1)
    assert found.verdict == verdict
    assert found.report["options"]["batch_size"] == batch_size, "four steps an epoch"


def test_images_that_were_not_scaled_are_noticed(
    backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor]
) -> None:
    with pytest.warns(ulrl.Note, match="images run from 0 to 255, as if they were not normalised"):
        ulrl.suspect(backdoored, (clean[0] + 1) * 127.5, clean[1], unlearning_epochs=1)


def test_a_known_trigger_is_evaluated(
    backdoored: nn.Module, innocent: nn.Module, digits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    rest = digits[0][1400:], digits[1][1400:]
    for model in (backdoored, innocent):
        judged = ulrl.evaluate(model, *rest, trigger=stamp, target=TARGET)
        acc, asr = rates(model, digits)
        assert judged.acc == pytest.approx(acc)
        assert judged.asr == pytest.approx(asr)
        assert judged.n_poisoned == int((rest[1] != TARGET).sum())
    assert judged.ra is not None
    assert judged.ra > 0.9, "the innocent reads the triggered images"
    assert ulrl.evaluate(backdoored, *rest).asr is None
    for wrong, words in (
        ({"trigger": stamp}, "belong together"),
        ({"trigger": stamp, "target": 10}, "target 10 is none"),
        ({"trigger": stamp, "target": stamp}, "target is of the type function"),
        ({"trigger": lambda x: x[:, :, 1:], "target": 7}, "must keep the shape"),
    ):
        with pytest.raises(UserError, match=words):
            ulrl.evaluate(backdoored, *rest, **wrong)
