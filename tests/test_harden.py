"""What Harden asks the original about, and how it names a class; that it repairs is in tests/test_defenses.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ulrl.data.batches import normalise
from ulrl.data.datasets import load_dataset
from ulrl.data.imageset import ImageSet
from ulrl.defenses.corruptions import Draws
from ulrl.defenses.harden import Harden, _cautious, _Corruptions
from ulrl.defenses.ulrl import ULRL
from ulrl.training import Monitor

CLASS = 3


@pytest.fixture(scope="module")
def clean() -> ImageSet:
    return load_dataset("digits")[0].subset(torch.arange(64))


@pytest.fixture
def original() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval().requires_grad_(False)


def corruptions(clean: ImageSet) -> _Corruptions:
    return _Corruptions(clean.spec, Draws(0, clean.device), 0.5)


def test_restoring_hears_of_other_classes_only_what_the_hardened_model_says_too(
    clean: ImageSet, original: nn.Module
) -> None:
    """An original that says a class louder is not heard on images of others, one that says it softer is; on images of
    that class its word is taken."""
    model = copy.deepcopy(original).requires_grad_(True)

    def changed(by: float) -> nn.Module:
        net = copy.deepcopy(original)
        net[1].bias[CLASS] += by  # type: ignore[operator, index]
        return net

    def loss(asked: nn.Module, images: ImageSet, hardened: nn.Module = original) -> float:
        x, y = normalise(images.images, clean.spec), images.labels
        return Harden()._restoring(asked, hardened, corruptions(clean), 0.0)(model, x, y)[0].item()

    theirs, others = (
        clean.subset(is_it.nonzero().flatten()) for is_it in (clean.labels == CLASS, clean.labels != CLASS)
    )
    agreed = loss(original, others)
    assert abs(agreed) < 1e-4
    heard = loss(changed(4), others, hardened=changed(4))
    assert agreed < loss(changed(4), others) < heard / 4
    assert loss(changed(-4), others) > 0.01
    assert loss(changed(4), theirs) == pytest.approx(loss(changed(4), theirs, hardened=changed(4)))


@pytest.mark.parametrize("own", [True, False])
def test_the_cautious_teacher_says_no_more_than_either_but_of_the_image_itself(own: bool) -> None:
    one, two = torch.randn(2, 50, 10, generator=torch.Generator().manual_seed(0)).mul(3)
    told = _cautious(one, two, torch.full((50, 10), own), 2.0)
    first, second = (torch.log_softmax(z / 2, 1) for z in (one, two))
    wanted = first if own else torch.log(torch.minimum(first.exp(), second.exp()))
    torch.testing.assert_close(told / 2, wanted)


def test_excess_is_what_the_hardened_net_no_longer_says(clean: ImageSet, original: nn.Module) -> None:
    class Always(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.eye(10)[CLASS].mul(100).expand(len(x), 10)

    method = Harden(amp=False)
    excess = method._excess(Always(), nn.Sequential(nn.Flatten(), _Even()), clean, corruptions(clean))
    assert excess[CLASS].item() == pytest.approx(0.9)
    assert excess.sum().item() == pytest.approx(0, abs=0.2)
    assert method._excess(original, original, clean, corruptions(clean)).abs().max() == 0


def test_the_table_flags_what_the_repair_flags_whichever_diagnosis_named_it(
    clean: ImageSet, original: nn.Module
) -> None:
    """Here an excess above 0 names a class, which the weights' change does not."""
    method = Harden(batch_size=32, amp=False, epochs=2, restore_epochs=0, excess=0.0)
    repair = method.run(copy.deepcopy(original).requires_grad_(True), clean, Monitor())
    neurons = repair.tables["neurons"]
    assert sorted(repair.flagged) == neurons.index[neurons.flagged].tolist()
    assert (neurons.z[neurons.flagged] < ULRL().z_threshold).any()


class _Even(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(len(x), 10)


def test_where_no_share_of_the_corruptions_learns_none_is_drawn(clean: ImageSet) -> None:
    change, x = corruptions(clean), normalise(clean.images, clean.spec)
    changed = change(x, learning_share=0)
    assert (changed != x).flatten(1).any(1).float().mean() > 0.8  # a dark patch on a dark corner changes nothing
    assert change.learning._lessons == [None] * 8
    change(x)
    assert None not in change.learning._lessons
