"""The door for a user's own model: what is said of it."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from own_nets import TARGET, rates, stamp, weights
from rich.console import Console
from torch import nn

import ulrl
from ulrl import UserError
from ulrl.data.datasets import SPECS
from ulrl.data.imageset import ImageSet
from ulrl.defenses import signs
from ulrl.own_model.suspecting import decide
from ulrl.report.tables import suspicion_table
from ulrl.training import Monitor

SPEC = replace(SPECS["digits"], num_classes=3)


def test_suspect_tells_a_backdoor(backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor]) -> None:
    before = weights(backdoored)
    found = ulrl.suspect(backdoored, *clean)
    assert (found.verdict, found.label) == ("backdoored", TARGET)
    assert repr(found).startswith("backdoored; look at class 7\n")
    row = found.ranking.loc[TARGET]
    assert found.evidence == row.evidence == pytest.approx(row.lead / row.reach / row.cover)
    for share, size in (("reach", "perturbation"), ("cover", "mask")):
        assert row[share] == pytest.approx(found.ranking[size].min() / found.ranking[size].median())
    assert row.lead == pytest.approx(row.margin / found.ranking.margin.drop(TARGET).max())
    assert torch.equal(weights(backdoored), before)


@pytest.mark.parametrize(
    ("evidence", "verdict"),
    [
        ([1, 8, 0.5], (1, "backdoored")),
        ([1, 7.9, 0.5], (1, "uncertain")),
        ([4, 1, 0.5], (0, "uncertain")),
        ([3.9, 1, 0.5], (0, "no evidence found")),
    ],
)
def test_verdicts(evidence: list[float], verdict: tuple[int, str]) -> None:
    assert decide(pd.DataFrame({"evidence": evidence, "reach": 1.0, "cover": 1.0})) == verdict


@pytest.mark.parametrize("failed", ["reach", "cover"])
def test_no_evidence_is_not_found_by_a_search_that_failed(failed: str) -> None:
    ranking = pd.DataFrame({"evidence": [1.0, 1.1], "reach": 1.0, "cover": 1.0})
    assert decide(ranking) == (1, "no evidence found")
    assert decide(ranking.assign(**{failed: math.nan})) == (1, "uncertain")


@pytest.mark.parametrize(
    ("norms", "sizes", "margins", "evidence"),
    [
        ([1, 2, 3], [1, 4, 8], [12, 10, -1], [1.2 / 0.5 / 0.25, 10 / 12, 0]),
        ([1, math.inf, math.inf], [1, 4, 8], [12, 10, 5], [1.2 / 0.25, 10 / 12, 5 / 12 / 2]),  # less than half found
        ([math.inf, 1, 1], [1, 4, 8], [12, 10, 5], [1.2 / 2 / 0.25, 10 / 12, 5 / 12 / 2]),  # itself is not found
        ([1, 2, 3], [4, 4, 4], [12, -1, -2], [100 / 0.5, 0, 0]),  # for the others there is none
        ([1, 2, 3], [4, 4, 4], [-1, -2, -3], [0, 0, 0]),
    ],
)
def test_evidence_is_the_product_of_the_signs(
    norms: list[float], sizes: list[float], margins: list[float], evidence: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of the classes in the order of their margins, as they are searched."""
    order = np.argsort(margins)[::-1].copy()
    monkeypatch.setattr(signs, "margins_from_noise", lambda *_, **__: torch.tensor(margins).float())
    for search, sizes_found in (("universal.smallest_universal", norms), ("overlay.smallest_overlay", sizes)):
        found_by_class = torch.tensor(sizes_found)[order].float()
        monkeypatch.setattr(f"ulrl.defenses.{search}", lambda *_, found=found_by_class, **__: (found, [None] * 3))
    clean = ImageSet(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.arange(3), SPEC)
    found, _ = signs.look_for_signs(nn.Identity(), clean, Monitor(), amp=False, random_seed=0)
    assert found.evidence.tolist() == pytest.approx(evidence)


def test_of_many_classes_those_with_the_largest_margins_are_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[list[int]] = []

    def search(
        model: nn.Module, data: ImageSet, classes: torch.Tensor, stage: object, *, amp: bool
    ) -> tuple[torch.Tensor, list[None]]:
        searched.append(classes.tolist())
        return torch.ones(len(classes)), [None] * len(classes)

    monkeypatch.setattr(signs, "margins_from_noise", lambda *_, **__: torch.arange(30.0))
    monkeypatch.setattr(signs.universal, "smallest_universal", search)
    monkeypatch.setattr(signs.overlay, "smallest_overlay", search)
    clean = ImageSet(torch.zeros(30, 1, 2, 2, dtype=torch.uint8), torch.arange(30), replace(SPEC, num_classes=30))
    found, _ = signs.look_for_signs(nn.Identity(), clean, Monitor(), amp=False, random_seed=0)
    assert searched == [list(range(29, 19, -1))] * 2
    assert (found.evidence > 0).tolist() == found.reach.notna().tolist() == [False] * 20 + [True] * 10


def test_the_changes_found_are_of_the_sizes_told_and_lead_to_their_class(
    backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor]
) -> None:
    spec = replace(SPECS["digits"], mean=(0.5,), std=(0.5,))
    data = ImageSet(((clean[0] + 1) * 127.5).round().byte(), clean[1], spec)
    table, ways = signs.look_for_signs(backdoored, data, Monitor(), amp=False, random_seed=0)
    x, others = clean[0], clean[1] != TARGET
    for way, size in zip(ways[TARGET], table.loc[TARGET, ["perturbation", "mask"]], strict=True):
        whole, none = (way(x, torch.full((len(x), 1, 1, 1), strength)) for strength in (1.0, 0.0))
        assert torch.equal(none, x)
        assert (backdoored(whole).argmax(1) == TARGET)[others].float().mean() > 0.8
        told = way.perturbation.norm() / 2 if isinstance(way, signs.universal.Added) else way.mask.sum()
        assert told.item() == pytest.approx(size, rel=1e-4)


def test_the_target_alone_bears_all_signs(
    backdoored: nn.Module, innocent: nn.Module, clean: tuple[torch.Tensor, torch.Tensor]
) -> None:
    found, plain = (ulrl.suspect(model, *clean, unlearning_epochs=1).ranking for model in (backdoored, innocent))
    for row in (found.reach, found.cover, -found.lead):
        assert row.idxmin() == TARGET
    assert found.lead[TARGET] > 1.3
    assert found.cover[TARGET] < 0.3
    assert plain.evidence.idxmax() != TARGET


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
    assert found.verdict == "backdoored", "it does not take part in the verdict"


def test_the_verdict_stands_on_a_line_of_its_own() -> None:
    ranking = pd.DataFrame({"z": [2.0, 1.0], "reach": [0.4, 0.6], "cover": 1.0, "lead": 1.0, "evidence": [2.5, 1.6]})
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
    monkeypatch.setattr("ulrl.own_model.suspecting.decide", lambda ranking: (0, "backdoored"))
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
