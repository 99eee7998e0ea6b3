"""What defenses that choose a strength share: validation samples, the choice, the sweep, masks on channels."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from ulrl.data.datasets import load_dataset
from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import DEFENSES
from ulrl.defenses.mask_pruning import MaskPruning
from ulrl.defenses.masks import clamp, masked, norm_layers, silence
from ulrl.defenses.selection import split, sweep, within
from ulrl.defenses.tsbd import TSBD, _floor
from ulrl.defenses.unlearning import Unlearning
from ulrl.errors import UserError
from ulrl.models import build_model
from ulrl.training import Monitor, predict


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return load_dataset("digits")[0].subset(torch.arange(100))


def test_split_is_disjoint_and_of_the_seed(digits: ImageSet) -> None:
    numbered = ImageSet(digits.images, torch.arange(100), digits.spec)
    train, validation = split(numbered, 0.2, 0)
    assert (len(train), len(validation)) == (80, 20)
    assert torch.cat([train.labels, validation.labels]).sort().values.tolist() == list(range(100))
    assert torch.equal(split(numbered, 0.2, 0)[1].labels, validation.labels)
    assert not torch.equal(split(numbered, 0.2, 1)[1].labels, validation.labels)
    assert len(split(numbered, 0.0, 0)[1]) == 1
    with pytest.raises(UserError, match="--ratio"):
        split(numbered.subset(torch.arange(2)), 0.2, 0)


@pytest.mark.parametrize(
    ("accuracies", "tolerance", "chosen"),
    [
        ([0.9], 0.1, 0),
        ([0.9, 0.85, 0.8, 0.95], 0.1, 3),
        ([0.9, 0.85, 0.7, 0.9], 0.1, 1),
        ([0.9, 0.79], 0.1, 0),
        ([1.0, 0.95], 0.05, 1),  # 1 - 0.05 is a little more than 0.95 in floating point
    ],
)
def test_within_ends_before_the_first_that_costs_too_much(
    accuracies: list[float], tolerance: float, chosen: int
) -> None:
    assert within(accuracies, tolerance) == chosen


def _order(images: ImageSet) -> tuple[nn.Module, list[int]]:
    """A model whose answer is its bias, and classes from the most to the least frequent."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.zeros_(net[1].weight)
    return net, images.labels.bincount(minlength=10).argsort(descending=True).tolist()


@pytest.mark.parametrize("apart", [False, True])
def test_sweep_judges_each_once_and_leaves_the_model_at_the_chosen(digits: ImageSet, apart: bool) -> None:
    net, classes = _order(digits)
    edits: list[int] = []

    def edit(model: nn.Module, i: int) -> None:
        edits.append(i)
        with torch.no_grad():  # each answers a rarer class; the last but one is left out by the tolerance
            model[1].bias[classes[i]] = float(i)

    with torch.no_grad():
        net[1].bias.fill_(-1.0)
        net[1].bias[classes[0]] = 0.0
    shares = [(digits.labels == c).double().mean().item() for c in classes]
    tolerance = shares[0] - shares[2]
    prepared: list[nn.Module] = []
    finished: list[nn.Module] = []
    both = {"prepare": prepared.append, "finish": finished.append} if apart else {}
    swept = sweep(net, [0.0, 0.1, 0.2, 0.9], edit, digits, tolerance, Monitor(), amp=False, **both)
    expected = within(shares[:4], tolerance)
    assert len(prepared) == (4 if apart else 0)
    assert not finished
    assert swept.curve.accuracy.tolist() == pytest.approx(shares[:4])
    assert swept.chosen == expected
    assert swept.strength == [0.0, 0.1, 0.2, 0.9][expected]
    assert edits == [*range(1, 4), *range(1, expected + 1)]
    assert (predict(net, digits) == classes[expected]).all()
    assert [(s, predict(m, digits)[0].item()) for s, m in swept.candidates()] == list(
        zip([0.0, 0.1, 0.2, 0.9], classes[:4], strict=True)
    )
    assert (predict(net, digits) == classes[expected]).all(), "walking the candidates leaves the result alone"
    assert len(finished) == len(prepared)
    assert net not in prepared + finished, "the caller finishes the model itself"


def test_masks_train_alone_and_leave_no_trace(digits: ImageSet) -> None:
    net = build_model("preactresnet18", 10, 1, 4, seed=0)
    before = copy.deepcopy(net.state_dict())
    with masked(net) as masks:
        assert len(masks) == len(norm_layers(net)) == 16
        assert {id(p) for p in net.parameters() if p.requires_grad} == {id(m.mask) for m in masks}
        with torch.no_grad():
            masks[0].mask.fill_(-3.0)
            masks[1].mask.fill_(2.0)
        clamp(masks)
        assert (masks[0].mask == 0).all()
        assert (masks[1].mask == 1).all()
        first = next(iter(norm_layers(net).values()))
        assert (first.weight == 0).all()
    assert set(net.state_dict()) == set(before)
    assert all(torch.equal(w, before[k]) for k, w in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())
    assert type(first) is nn.BatchNorm2d


@pytest.mark.parametrize(("step", "tried"), [(0.25, [0, 0.25, 0.5, 0.75]), (0.6, [0, 0.6]), (0.3, [0, 0.3, 0.6, 0.9])])
def test_no_threshold_is_tried_above_the_greatest(step: float, tried: list[float], digits: ImageSet) -> None:
    net = build_model("preactresnet18", 10, 1, 4, seed=0)
    values = {path: torch.ones_like(layer.weight) for path, layer in norm_layers(net).items()}
    pruning = MaskPruning(pruning_max=0.9, pruning_step=step)
    assert pruning.prune(net, values, digits, Monitor(), {}).tables["pruning"].index.tolist() == pytest.approx(tried)


def test_silence_takes_the_scale_and_leaves_the_shift() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.LayerNorm([4, 6, 6]), nn.BatchNorm2d(4, affine=False)
    )
    assert list(norm_layers(net)) == ["1", "2"]
    nn.init.ones_(net[1].bias)
    silence(net, {"1": torch.tensor([0.0, 0.2, 0.21, 1.0])}, 0.2)
    assert net[1].weight.tolist() == [0, 0, 1, 1]
    assert net[1].bias.tolist() == [1, 1, 1, 1]
    with pytest.raises(UserError, match="no normalisation layer"):
        norm_layers(nn.Linear(2, 2))


def test_floor_is_the_least_of_the_largest_share() -> None:
    changes = torch.tensor([5.0, 1, 4, 2, 3, 6, 7, 8, 9, 10])
    assert _floor(changes, 0.7) == 4
    assert _floor(changes, 1.0) == 1
    assert _floor(changes, 0.0) == float("inf")


def test_unlearning_ends_where_nothing_is_left_to_forget(digits: ImageSet) -> None:
    net = build_model("preactresnet18", 10, 1, 4, seed=0)
    unlearned = TSBD(clean_threshold=0.0, unlearning_lr=0.1, unlearning_epochs=60).unlearn(
        net, digits, Monitor(), in_eval=True
    )
    assert unlearned.reached
    assert 0 < unlearned.accuracy <= digits.labels.bincount().max().item() / len(digits)


class _Steep(nn.Module):
    """Logits so steep in the head that plain ascent takes its weights out of sight in one step."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.linear, self.slope = nn.Linear(64, 10), slope

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(1)) * self.slope


class _Masked(nn.Module):
    """It holds what some nets hold: a mask that is -inf in part, and a mean that is expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(1), nn.Linear(64, 10)
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
        self.register_buffer("mean", torch.zeros(1, 1, 1, 1).expand(1, 1, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x - self.mean).flatten(1))


@pytest.mark.parametrize("name", ["ulrl", "rnp"])
def test_buffers_that_are_infinite_or_expanded_are_in_nobodys_way(name: str, digits: ImageSet) -> None:
    options = {f.name: 1 for f in dataclasses.fields(DEFENSES[name]) if f.name.endswith("epochs")}
    repaired = DEFENSES[name](**options).run(_Masked(), digits.subset(torch.arange(64)), Monitor()).model
    assert all(p.isfinite().all() for p in repaired.parameters())


@pytest.mark.parametrize("name", [name for name, cls in DEFENSES.items() if issubclass(cls, Unlearning)])
def test_unlearning_goes_no_further_than_the_bound_on_its_gradient(name: str, digits: ImageSet) -> None:
    net, steps = _Steep(1e10), 4
    defense = DEFENSES[name](batch_size=32, unlearning_epochs=1, clip=20.0, unlearning_lr=0.01)
    after = defense.unlearn(net, digits, Monitor()).model  # type: ignore[attr-defined]
    moved = torch.cat([(a - b).flatten() for a, b in zip(after.parameters(), net.parameters(), strict=True)]).norm()
    assert 0.1 < moved < steps * 20 * 0.01 / (1 - 0.9), "each step by at most rate times bound, over 1 - momentum"


@pytest.mark.parametrize("batch_size", [32, 128])
def test_unlearning_that_overflows_is_one_line(batch_size: int, digits: ImageSet) -> None:
    """In the loss of a later step, or in the weights after the only one."""
    defense = DEFENSES["ulrl"](batch_size=batch_size, unlearning_epochs=1, clip=0.0, unlearning_lr=1e8)
    with pytest.raises(UserError, match=r"unlearn.* in epoch 1.*lower.*of ulrl") as refused:
        defense.unlearn(_Steep(1e33), digits, Monitor())  # type: ignore[attr-defined]
    assert "\n" not in str(refused.value)


def test_a_method_that_begins_with_unlearning_names_no_flag_that_it_has_not(digits: ImageSet) -> None:
    with pytest.raises(UserError, match=r"unlearn.*of ulrl.*another method") as refused:
        DEFENSES["harden"](batch_size=32).run(_Steep(1e38), digits, Monitor())
    assert "--" not in str(refused.value)
