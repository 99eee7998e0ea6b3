"""What Harden asks the original about, and how it names a class; that it repairs is in tests/test_defenses.py."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pandas as pd
import pytest
import torch
from torch import nn

from ulrl.data.batches import normalise
from ulrl.data.datasets import load_dataset
from ulrl.data.imageset import ImageSet
from ulrl.defenses.astray import Fixed
from ulrl.defenses.corruptions import KINDS, Draws
from ulrl.defenses.harden import Harden, _Corruptions, _mask
from ulrl.defenses.signs import DOUBTFUL, SUSPICIOUS
from ulrl.training import Monitor

FLAGGED = 3


@pytest.fixture(scope="module")
def clean() -> ImageSet:
    return load_dataset("digits")[0].subset(torch.arange(64))


@pytest.fixture
def original() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval().requires_grad_(False)


def corruptions(clean: ImageSet) -> _Corruptions:
    return _Corruptions(clean.spec, Draws(0, clean.device), 0.5)


def test_corrupted_images_stay_in_their_order(clean: ImageSet, original: nn.Module) -> None:
    """As their labels do."""
    shades = torch.linspace(60, 200, 64)[:, None, None, None].expand(64, 1, 8, 8)
    method = corruptions(clean)
    method.seek(original, clean, tries=16, amp=False)
    found, seen = method._found, torch.zeros(64)
    assert 1 <= len(found) <= 16
    for _ in range(40):
        seen += method(normalise(shades, clean.spec)).mean((1, 2, 3))
    places = torch.arange(64.0)
    assert torch.corrcoef(torch.stack([seen[:16], places[:16]]))[0, 1] > 0.8, "those that were sought"
    assert torch.corrcoef(torch.stack([seen, places]))[0, 1] > 0.9


def test_what_leads_far_is_used_more_and_never_twice_the_same(clean: ImageSet) -> None:
    """The few that were found would be learnt by heart."""
    method, draws = corruptions(clean), Draws(1, clean.device)
    weak, strong = Fixed(KINDS[0], 1), Fixed(KINDS[0], 2)
    method._found, method._leads = [weak, strong], torch.tensor([0.1, 0.9])
    used = [method._sought() for _ in range(200)]
    assert 150 < sum(way.seed == strong.seed for way in used) < 200
    assert len(set(used)) == 200
    images = torch.full((1, 1, 8, 8), 0.5)
    near = [way(images) for way in used if way.seed == strong.seed]
    drawn = [strong.near(draws, 1)(images) for _ in range(200)]  # anew, but for the size of its cells
    nearer, far = ((torch.cat(made) - strong(images)).abs().mean().item() for made in (near, drawn))
    assert 0 < nearer < far / 2


def test_a_quarter_of_the_corrupted_images_bear_what_is_known(clean: ImageSet, original: nn.Module) -> None:
    method, x = corruptions(clean), normalise(torch.full((64, 1, 8, 8), 100), clean.spec)
    asked: list[tuple[int, float]] = []

    def change(which: int, images: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        asked.extend((which, share) for share in strength.flatten().tolist())
        return images * 0 + (2 * which - 1) * 100

    ways = [functools.partial(change, which) for which in range(3)]
    method.aim({0: ways[:2], 1: ways[2:]}, [0, 9])  # that to 9 was not searched
    changed = method(x)
    low, high = normalise(torch.tensor([[0.0, 255.0]])[..., None, None], clean.spec).flatten()
    bearing = torch.tensor([[low, high][which] for which, _ in asked])
    assert len(asked) == 16
    assert {which for which, _ in asked} == {0, 1}
    assert all(0.5 <= share <= 1 for _, share in asked)
    assert torch.allclose(changed[:16].mean((1, 2, 3)), bearing, atol=1e-4), "within what a pixel may be"
    assert ((changed[16:] - low).abs().mean((1, 2, 3)) > 0.01).all()


@pytest.mark.parametrize(("evidence", "pace", "first", "flagged"), [
    (DOUBTFUL - 1, 1.0, [], [FLAGGED + 1]),
    (DOUBTFUL + 1, 0.5, [FLAGGED], [FLAGGED, FLAGGED + 1]),
    (SUSPICIOUS + 1, 0.5, [FLAGGED], [FLAGGED]),
])  # fmt: skip
def test_a_class_that_is_named_is_aimed_at_and_treated_gently(
    clean: ImageSet, original: nn.Module, monkeypatch: pytest.MonkeyPatch,
    evidence: float, pace: float, first: list[int], flagged: list[int],
) -> None:  # fmt: skip
    """First what the signs name, then what is flagged: whom the excess names, too, unless the evidence is enough."""
    table = pd.DataFrame({"evidence": [evidence if k == FLAGGED else 0.0 for k in range(10)]})
    ways = {k: (f"{k} added", f"{k} painted") for k in range(10)}
    stages: list[tuple[float, list[str]]] = []
    monkeypatch.setattr("ulrl.defenses.harden.look_for_signs", lambda *_, **__: (table, ways))
    monkeypatch.setattr(Harden, "_train", lambda *given: stages.append((given[6], given[7].known)))
    excess = torch.eye(10)[FLAGGED + 1]
    monkeypatch.setattr(Harden, "_excess", lambda *_: excess)
    method = Harden(amp=False, tries=16, lr=0.2, restore_lr=0.1, gentle=0.5)
    method.run(copy.deepcopy(original).requires_grad_(True), clean, Monitor())
    aims = [[way for k in classes for way in ways[k]] for classes in (first, flagged)]
    assert stages == [(0.2 * pace, aims[0]), (0.1 * pace, aims[1])]


def test_mixtures_keep_what_the_original_says_but_on_flagged_classes(clean: ImageSet, original: nn.Module) -> None:
    """In hardening."""
    others = clean.subset((clean.labels != FLAGGED).nonzero().flatten())
    x, y = normalise(others.images, clean.spec), others.labels

    class Bent(nn.Module):
        """The original, but for what it says of one class to images that are nowhere plain."""

        def __init__(self, label: int) -> None:
            super().__init__()
            self.label = label

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            new = torch.tensor([not (x == image).flatten(1).all(1).any() for image in given]).float()
            return original(given) + 3 * new[:, None] * torch.eye(10)[self.label]

    def loss(asked: nn.Module) -> float:
        mask = _mask([FLAGGED], clean)
        objective = Harden(alpha=0)._hardening(asked, mask, corruptions(clean), lambda: torch.zeros(()))
        return objective(original, x, y)[0].item()

    assert loss(Bent(FLAGGED)) == loss(original)
    assert loss(Bent(FLAGGED + 1)) > loss(original) + 0.1


def test_restoring_does_not_hear_the_original_on_flagged_classes(clean: ImageSet, original: nn.Module) -> None:
    """But, under corruptions, on images of that class themselves."""
    others = clean.subset((clean.labels != FLAGGED).nonzero().flatten())
    x, y = normalise(others.images, clean.spec), others.labels
    louder, model = copy.deepcopy(original), copy.deepcopy(original).requires_grad_(True)
    louder[1].weight[FLAGGED] += 1  # type: ignore[operator, index]

    def loss(asked: nn.Module, flagged: list[int]) -> float:
        return Harden()._restoring(asked, _mask(flagged, clean), corruptions(clean), 1)(model, x, y)[0].item()

    assert loss(louder, [FLAGGED]) == loss(original, [FLAGGED])
    assert loss(louder, []) > loss(original, []) + 0.01


@pytest.mark.parametrize(("excess", "weight"), [(1.0, 0.7), (-1.0, 1.4)])
def test_corruptions_stay_in_and_weigh_twice_where_there_was_an_excess(
    clean: ImageSet, original: nn.Module, monkeypatch: pytest.MonkeyPatch, excess: float, weight: float
) -> None:
    weights: list[float] = []
    restoring = Harden._restoring
    monkeypatch.setattr(Harden, "_restoring", lambda *given: weights.append(given[-1]) or restoring(*given))
    method = Harden(amp=False, epochs=1, restore_epochs=1, hold_weight=0.7)
    dataclasses.replace(method, excess=excess).run(copy.deepcopy(original).requires_grad_(True), clean, Monitor())
    assert weights == [pytest.approx(weight)]
    x, y = normalise(clean.images, clean.spec), clean.labels
    losses = [
        method._restoring(original, _mask([], clean), corruptions(clean), hold)(original, x, y)[0].item()
        for hold in (0.0, 1.0, 2.0)
    ]
    assert losses[1] - losses[0] > 0.01
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-3)


def test_excess_is_what_the_hardened_net_no_longer_says(clean: ImageSet, original: nn.Module) -> None:
    class Always(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.eye(10)[FLAGGED].mul(100).expand(len(x), 10)

    method = Harden(amp=False)
    excess = method._excess(Always(), nn.Sequential(nn.Flatten(), _Even()), clean, corruptions(clean))
    assert excess[FLAGGED].item() == pytest.approx(0.9)
    assert excess.sum().item() == pytest.approx(0, abs=0.2)
    assert method._excess(original, original, clean, corruptions(clean)).abs().max() == 0


def test_the_table_flags_what_the_repair_flags_whichever_diagnosis_named_it(
    clean: ImageSet, original: nn.Module
) -> None:
    """Here an excess above 0 names a class, which the signs do not."""
    method = Harden(batch_size=32, amp=False, epochs=2, restore_epochs=0, excess=0.0)
    repair = method.run(copy.deepcopy(original).requires_grad_(True), clean, Monitor())
    neurons = repair.tables["neurons"]
    assert sorted(repair.flagged) == neurons.index[neurons.flagged].tolist()
    assert (neurons.evidence[neurons.flagged] < DOUBTFUL).any()


def test_each_batch_of_the_last_statistics_is_whole(
    clean: ImageSet, original: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They weigh the same in BatchNorm's mean, so two images left over would weigh as much as a batch."""
    sizes: list[int] = []
    monkeypatch.setattr(
        "ulrl.defenses.harden.measure_statistics", lambda _, batches: sizes.extend(len(x) for x, _ in batches)
    )
    model = copy.deepcopy(original).requires_grad_(True)
    Harden(amp=False, batch_size=62, epochs=1, restore_epochs=1).run(model, clean, Monitor())
    assert sizes == [62] * 6  # three passes a stage


class _Even(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(len(x), 10)


def test_where_no_share_of_the_corruptions_learns_none_is_drawn(clean: ImageSet) -> None:
    change, x = corruptions(clean), normalise(clean.images, clean.spec)
    changed = change.random(x)
    assert (changed != x).flatten(1).any(1).float().mean() > 0.8  # a dark patch on a dark corner changes nothing
    assert change.learning._lessons == [None] * 8
    change(x)
    assert None not in change.learning._lessons
