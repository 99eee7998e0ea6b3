"""The door for a user's own model: its repair, from Python."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from manners import refused
from own_nets import QUICK, TARGET, Headless, Net, rates, stamp, weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ulrl
from ulrl import UserError
from ulrl.data.datasets import SPECS
from ulrl.data.imageset import InputSet
from ulrl.defenses.base import DEFENSES, Repair
from ulrl.models.head import find_head
from ulrl.options import Schema
from ulrl.own_model.given import prepare, working_copy
from ulrl.training import predict


def test_a_torchscript_program_is_refused_before_torch_warns_of_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit itself
        program = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    with warnings.catch_warnings(record=True) as said, pytest.raises(UserError, match=r"the plain nn\.Module"):
        warnings.simplefilter("always")
        working_copy(program, torch.device("cpu"))
    assert not said


def test_purify_removes_a_backdoor_and_touches_nothing_else(
    backdoored: nn.Module,
    clean: tuple[torch.Tensor, torch.Tensor],
    digits: tuple[torch.Tensor, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = copy.deepcopy(backdoored.state_dict())
    random, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    handlers = list(logging.getLogger().handlers), list(logging.getLogger("ulrl").handlers)
    acc, asr = rates(backdoored, digits)
    assert acc > 0.95
    assert asr > 0.9

    result = ulrl.purify(backdoored, *clean)

    assert result.flagged[0] == TARGET
    repaired_acc, repaired_asr = rates(result.model, digits)
    assert repaired_asr < 0.05
    assert repaired_acc > acc - 0.05
    assert result.ranking is not None
    assert result.ranking.z.idxmax() == TARGET
    assert (result.report["samples"], result.report["held_out"], result.report["returned"]) == (200, 40, "repaired")
    assert result.report["notes"] == []
    assert set(result.history.stage) == {"unlearn", "harden", "restore"}

    assert all(torch.equal(before[k], v) for k, v in backdoored.state_dict().items())
    assert not any(p.grad is not None for p in backdoored.parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert np.array_equal(numbers, np.random.get_state()[1])  # type: ignore[arg-type]
    assert handlers == (logging.getLogger().handlers, logging.getLogger("ulrl").handlers)
    assert not list(tmp_path.iterdir())


def test_samples_may_come_in_many_forms(backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = clean
    expected = weights(ulrl.purify(backdoored, x, y, **QUICK).model)
    for images, labels in (
        (x.numpy(), y.numpy()),
        (np.flip(np.flip(x.numpy(), 3).copy(), 3), pd.Series(y.numpy(), index=range(1, len(y) + 1))),  # as of a part
        (x.double(), y.int()),
        (list(x), y.tolist()),
        (x.split(32), y.split(50)),
        ((part for part in x.split(7)), y),
        (DataLoader(TensorDataset(x, y), 32), None),
    ):
        assert torch.equal(weights(ulrl.purify(backdoored, images, labels, **QUICK).model), expected)


def test_augmentation_is_the_users_and_only_in_training(
    backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor]
) -> None:
    seen: list[torch.Size] = []

    def augment(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape)
        return x + 0.1 * torch.randn_like(x)

    first = ulrl.purify(backdoored, *clean, augment=augment, **QUICK)
    assert len(seen) == len(first.history) * 2  # two batches an epoch; none for accuracies
    assert torch.equal(weights(ulrl.purify(backdoored, *clean, augment=augment, **QUICK).model), weights(first.model))
    assert not torch.equal(weights(ulrl.purify(backdoored, *clean, **QUICK).model), weights(first.model))


RESIDUAL_ONLY = {"ssft"}
REPAIRS = [name for name, cls in DEFENSES.items() if cls.repairs and not cls.in_training and name not in RESIDUAL_ONLY]


@pytest.mark.parametrize("method", REPAIRS)
def test_every_method_takes_a_users_model(
    method: str, backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor]
) -> None:
    defense = DEFENSES[method]
    short = {
        k: v
        for k, v in {
            "epochs": 1,
            "unlearning_epochs": 2,
            "relearn_epochs": 1,
            "nc_epoch": 1,
            "nb_iter": 20,
            "n_rounds": 1,
            "mask_epochs": 1,
            "inversion_epochs": 1,
            "queries": 16000,
        }.items()
        if k in Schema(defense).fields
    }
    result = ulrl.purify(backdoored, *clean, method=method, **short)
    Net().load_state_dict(result.model.state_dict(), strict=True)
    assert result.report["method"] == method


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


@pytest.mark.parametrize("change", [nn.Module.train, nn.Module.half, nn.Module.double, frozen])
def test_the_result_is_as_the_model_was_given(
    change: Callable[[nn.Module], nn.Module], backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor]
) -> None:
    given = change(copy.deepcopy(backdoored))
    result = ulrl.purify(given, *clean, **QUICK).model
    for ours, theirs in zip(result.parameters(), given.parameters(), strict=True):
        assert (ours.dtype, ours.requires_grad) == (theirs.dtype, theirs.requires_grad)
    assert [m.training for m in result.modules()] == [m.training for m in given.modules()]
    assert not torch.equal(weights(result), weights(given))


def test_no_batchnorm_and_classes_without_samples(clean: tuple[torch.Tensor, torch.Tensor]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net(norm=lambda channels: nn.Identity())
    some = clean[1] < 8
    result = ulrl.purify(model, clean[0][some], clean[1][some], **QUICK)
    assert "2 of the model's 10 classes" in result.report["notes"][0]


class Tied(nn.Module):
    """Its head reads with the weights that embed a token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(10, 64), nn.Flatten(), nn.Linear(64, 10)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x) + self.embed.weight.mean(0))


def test_a_shared_head_is_left_alone(clean: tuple[torch.Tensor, torch.Tensor]) -> None:
    with pytest.raises(UserError, match=r"head is also embed\.weight"):
        ulrl.purify(Tied(), *clean)
    result = ulrl.purify(Tied(), *clean, method="ft-sam", epochs=1).model
    assert result.head.weight is result.embed.weight


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module, change: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, x: torch.Tensor) -> Any:
        return self.change(self.inner(x))


class Stubborn(Net):
    def train(self, mode: bool = True) -> Stubborn:
        if mode:
            raise NotImplementedError("exported for inference")
        return super().train(mode)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": Wrapped(Net(), lambda z: {"logits": z})}, "output is dict, not logits [B, K]"),
        ({"model": Wrapped(Net(), lambda z: z[:, :, None])}, "output is [2, 10, 1], not logits"),
        ({"model": Wrapped(Net(), lambda z: z * float("nan"))}, "NaN or infinite logits"),
        ({"model": Wrapped(Net(), torch.Tensor.detach)}, "carries no gradient"),
        ({"model": Stubborn()}, "cannot be copied and switched"),
        ({"model": nn.Flatten()}, "no parameters"),
        ({"model": "net.pt"}, "is 'net.pt', a path; build the network"),
        ({"model": Path("net.pt")}, "is 'net.pt', a path"),
        ({"model": Net().state_dict()}, "is a dictionary of weights; build the network"),
        ({"model": Net}, "is the class Net; make one, Net(...)"),
        ({"model": stamp}, "is the function stamp; give the nn.Module"),
        ({"model": 7}, "is of the type int"),
        ({"model": Net().to("meta")}, "on the meta device, where tensors hold no numbers; make it on the CPU"),
        (
            {"model": Wrapped(Net(), lambda z: z.softmax(1))},
            "returns probabilities, and logits are needed; take the softmax",
        ),
        ({"model": Wrapped(Net(), torch.sigmoid)}, "logits are needed; take the sigmoid out"),
        ({"device": "cuda:77"}, "no such device"),
        ({"augment": lambda x: None, **QUICK}, "augment makes NoneType of ["),
        ({"augment": lambda x: x[:, :, 1:], **QUICK}, "it must keep the shape"),
        ({"hold_out": 1.5}, "hold_out is 1.5; give a share"),
        ({"max_accuracy_loss": -1}, "max_accuracy_loss is -1; give a share"),
        ({"images": torch.zeros(200, 3, 8, 8)}, "fails on a batch of [2, 3, 8, 8]"),
        ({"images": torch.zeros(200, 8, 8)}, "not [N, C, H, W]"),
        ({"images": torch.zeros(200, 1, 8, 8, dtype=torch.uint8)}, "images are uint8"),
        ({"images": torch.full((200, 1, 8, 8), float("inf"))}, "NaN or infinite values"),
        ({"images": ["a", "b"]}, "images cannot be read"),
        (
            {"images": torch.zeros(12, 1, 8, 8), "labels": torch.zeros(12).long(), "hold_out": 0.9},
            "12 clean samples, 11 of them held out, leave fewer than 2 to train on; give more of them",
        ),
        ({"labels": None}, "no labels"),
        ({"images": "photos", "labels": None}, "a str, yields no (images, labels) pairs"),
        ({"labels": torch.full((200,), 12)}, "label 12 is outside of the model's 10 classes"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "one whole number for each of the 200 images"),
        ({"labels": torch.zeros(200)}, "one whole number for each"),
        ({"method": "ulr"}, "did you mean 'ulrl'?"),
        ({"method": "abl"}, "defense/abl.py"),
        ({"method": "detect_label"}, "only finds and repairs nothing"),
        ({"method": "b3d"}, "only finds and repairs nothing"),
        ({"restor_lr": 0.1}, "did you mean 'restore_lr'?"),
        ({"restore_lr": -1}, "must be at least 0"),
        ({"method": "clp", "lr": 0.1, "epochs": 3}, "epochs, lr: of BackdoorBench, and without a meaning for clp"),
        ({"linear_name": "head"}, "linear_name 'head'"),
    ],
)
def test_bad_input_is_one_sentence(
    changes: dict[str, Any], words: str, backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor]
) -> None:
    given = {"model": backdoored, "images": clean[0], "labels": clean[1], **changes}
    with warnings.catch_warnings(), pytest.raises(UserError) as raised:
        warnings.simplefilter("ignore")
        ulrl.purify(given.pop("model"), given.pop("images"), given.pop("labels"), **given)
    assert words in str(raised.value)


class Auxiliary(Net):
    """Answers with a second head in train mode, as GoogLeNet does."""

    def forward(self, x: torch.Tensor) -> Any:
        return (super().forward(x), x.mean()) if self.training else super().forward(x)


class Probe(Net):
    """Its features are not trained."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            features = self.body(x).flatten(1)
        return self.classify(features)


def test_train_mode_and_gradients_are_asked_for_by_what_trains_alone(
    backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor], digits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    auxiliary, probe = Auxiliary(), Probe()
    for model in (auxiliary, probe):
        model.load_state_dict(backdoored.state_dict())
    for work in (ulrl.purify, ulrl.suspect):
        refused(lambda work=work: work(auxiliary, *clean), "output is tuple in train mode")
        refused(lambda work=work: work(probe, *clean), "no gradient back to the images", "take torch.no_grad()")
        with torch.no_grad():
            refused(lambda work=work: work(backdoored, *clean), "gradients are switched off", "torch.no_grad()")
    with torch.no_grad():
        for model in (auxiliary, probe):
            assert ulrl.evaluate(model.eval(), *digits).acc == ulrl.evaluate(backdoored, *digits).acc > 0.9


class InPlace(Net):
    """Normalises pixels in [0, 1] where they lie."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.mul_(2).sub_(1))


class Silent(Net):
    """Its `train` returns nothing."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


class Keeping(Net):
    """Keeps what it made last, with its graph, which torch does not copy."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.features = {"last": [self.body(x).flatten(1)]}
        return self.classify(self.features["last"][0])


class Making(Net):
    """Makes a layer in its first forward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "flat"):
            self.flat = nn.Flatten()
        return self.classify(self.flat(self.body(x)))


@pytest.mark.parametrize("kind", [InPlace, Silent, Keeping, Making])
def test_a_habit_of_a_net_changes_nothing(
    kind: type[Net], backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ulrl.defenses.signs.SAMPLES", 4)  # for speed
    x, y = clean[0][:60], clean[1][:60]
    model, images = kind(), (x + 1) / 2 if kind is InPlace else x
    model.load_state_dict(backdoored.state_dict())
    model.eval()
    if kind is Keeping:
        model(images[:2])
    before = images.clone()
    assert ulrl.evaluate(model, images, y).acc == ulrl.evaluate(backdoored, x, y).acc > 0.9
    for how in (QUICK, {"method": "ft-sam", "epochs": 1}):  # which asks twice a step
        repaired = ulrl.purify(model, images, y, **how).model
        assert torch.equal(weights(repaired), weights(ulrl.purify(backdoored, x, y, **how).model))
        assert not repaired._forward_pre_hooks
    ulrl.purify(model, images, y, epochs=1, restore_epochs=1, tries=0)
    ulrl.suspect(model, images, y, unlearning_epochs=1)
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("change", "restore"),
    [
        (lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_default_dtype(torch.float32)),
        (lambda: torch.set_default_device("meta"), lambda: torch.set_default_device(None)),
    ],
)
def test_the_callers_defaults_do_not_matter_and_stay(
    change: Callable[[], None], restore: Callable[[], None], backdoored: nn.Module,
    clean: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("ulrl.defenses.signs.SAMPLES", 4)  # for speed
    harden: dict[str, Any] = {"epochs": 1, "restore_epochs": 1, "tries": 10}
    x, y = clean[0][:60], clean[1][:60]
    expected = weights(ulrl.purify(backdoored, x, y, **harden).model)
    change()
    try:
        before = torch.get_default_dtype(), torch.get_default_device()
        repaired = weights(ulrl.purify(backdoored, x, y, **harden).model)
        ulrl.suspect(backdoored, x, y, unlearning_epochs=1)
        ulrl.suspect_by_queries(lambda x: x.flatten(1)[:, :3], x / 2 + 0.5, 3, draws=2, queries=100)
        assert (torch.get_default_dtype(), torch.get_default_device()) == before
    finally:
        restore()
    assert torch.equal(repaired, expected)


def test_a_method_that_adds_layers_is_refused(
    backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DEFENSES["ft"], "run", lambda self, model, *_: Repair(nn.Sequential(nn.Hardtanh(), model)))
    refused(lambda: ulrl.purify(backdoored, *clean, method="ft"), "ft adds parts to the model", "(0, 1, 1.body")


def test_what_is_no_repair_is_told(
    backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DEFENSES["ft"], "run", lambda *_: None)
    refused(lambda: ulrl.purify(backdoored, *clean, method="ft"), "run() of the defense ft returned NoneType")


def test_a_head_may_have_two_names(backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor]) -> None:
    named = copy.deepcopy(backdoored)
    named.classifier = nn.Sequential(nn.Identity(), named.classify)
    for name in (None, "classify", "classifier.1"):
        assert find_head(named, 10, name) == (name or "classify", named.classify)
    repaired = ulrl.purify(named, *clean, **QUICK).model
    assert repaired.classifier[1] is repaired.classify


class Late(Net):
    """A head before another layer of ten outputs, called by keyword, and a buffer of the first forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "seen"):
            self.register_buffer("seen", torch.zeros(()))
        return self.classify(input=self.body(x).flatten(1))


class Functional(Net):
    """Takes the weight of its head, and does not call it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.body(x).flatten(1), self.classify.weight)


def test_a_layer_without_a_part_in_the_answers_is_no_head(clean: tuple[torch.Tensor, torch.Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [ulrl.purify(Late(), *clean, **QUICK, **named) for named in ({}, {"linear_name": "classify"})]
        ulrl.purify(Late(), *clean, method="fp", linear_name="classify", epochs=1)
    said = [any("spare has an output per class but no part" in note for note in r.report["notes"]) for r in found]
    assert said == [True, False]
    assert not any("no part" in note for note in prepare(Functional(), *clean).notes)


def test_a_hook_on_the_head_is_part_of_the_model(
    backdoored: nn.Module, digits: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    hooked = copy.deepcopy(backdoored)
    hooked.classify.register_forward_hook(lambda _, inputs, output: output.roll(1, 1))
    turned = digits[0], (digits[1] + 1) % 10
    assert ulrl.evaluate(hooked, *turned).acc == ulrl.evaluate(backdoored, *digits).acc
    # Where the head computes apart, it does so before the hook.
    monkeypatch.setattr("ulrl.training.autocast", lambda device, amp: torch.autocast(device.type, torch.bfloat16))
    data = InputSet(*turned, SPECS["digits"])
    assert torch.equal(predict(hooked, data), (predict(backdoored, data) + 1) % 10)


def test_a_weight_that_is_computed_of_others_is_refused_where_it_would_be_edited(
    clean: tuple[torch.Tensor, torch.Tensor],
) -> None:
    head, convolution = Net(), Net()
    nn.utils.parametrizations.spectral_norm(head.classify)
    nn.utils.parametrizations.weight_norm(convolution.body[0][0])
    for model, methods in ((head, ("ulrl", "harden", "fp", "d3")), (convolution, ("tsbd", "clp", "otbr"))):
        for method in methods:
            refused(lambda m=method, of=model: ulrl.purify(of, *clean, method=m), "computed of others", "remove_param")


class Still(Net):
    """Keeps its BatchNorm in eval mode, as who fine-tunes often does."""

    def train(self, mode: bool = True) -> Still:
        super().train(mode)
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
        return self


def test_statistics_that_a_model_keeps_are_kept(
    backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor]
) -> None:
    still = Still()
    still.load_state_dict(backdoored.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        repaired = ulrl.purify(still, *clean, epochs=1, restore_epochs=1, tries=0).model
    for name, buffer in backdoored.named_buffers():
        assert torch.equal(buffer, repaired.get_buffer(name)), name


class Keyword(nn.GroupNorm):
    """Calls itself as who names arguments does."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(input=x)


def test_a_group_norm_may_come_first(clean: tuple[torch.Tensor, torch.Tensor]) -> None:
    """On images that lie channels last torch's backward pass of it ends the process."""
    model = nn.Sequential(Keyword(1, 3), nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(8, 10))  # fmt: skip
    images = clean[0].expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        repaired = ulrl.purify(model, images, clean[1], method="ft", epochs=1).model
        ulrl.suspect(model, images, clean[1], unlearning_epochs=1)
    assert weights(repaired).isfinite().all()


def test_a_wrong_augmentation_is_not_laid_to_unlearning(
    backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor]
) -> None:
    with pytest.raises(UserError, match=r"it must keep the shape$"):
        ulrl.purify(backdoored, *clean, method="ulrl", augment=lambda x: x[:, :, 1:])


def test_a_repair_that_costs_too_much_is_said_or_thrown_away(
    backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor]
) -> None:
    ruin: dict[str, Any] = {"method": "ft", "epochs": 1, "lr": 5.0}
    with pytest.warns(ulrl.Note, match="the repair cost accuracy"):
        result = ulrl.purify(backdoored, *clean, **ruin)
    report = result.report
    assert report["accuracy_after"] < report["accuracy_before"] - 0.2
    assert not torch.equal(weights(result.model), weights(backdoored))
    with pytest.warns(ulrl.Note, match="thrown away"):
        bounded = ulrl.purify(backdoored, *clean, **ruin, max_accuracy_loss=0.05)
    assert torch.equal(weights(bounded.model), weights(backdoored))
    assert bounded.model is not backdoored
    assert bounded.report["returned"] == "original"
    assert bounded.report["accuracy_after"] == report["accuracy_after"]
    assert "original model" in repr(bounded)


def test_held_out_samples_are_not_trained_on(backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Their values are their own, so what the augmentation sees tells."""
    x = clean[0] + torch.arange(200).view(-1, 1, 1, 1) / 1e4
    seen: list[torch.Tensor] = []

    def augment(batch: torch.Tensor) -> torch.Tensor:
        seen.append(batch.flatten(1))
        return batch

    result = ulrl.purify(backdoored, x, clean[1], method="ft", epochs=1, augment=augment)
    trained_on = (torch.cat(seen)[:, None] == x.flatten(1)).all(2).any(0)
    assert (int(trained_on.sum()), result.report["held_out"]) == (160, 40)
    result = ulrl.purify(backdoored, x, clean[1], method="ft", epochs=1, hold_out=0)
    assert result.report["held_out"] == 0
    with pytest.warns(ulrl.Note, match="30 samples are too few to hold 20% of them out"):
        result = ulrl.purify(backdoored, x[:30], clean[1][:30], method="ft", epochs=1)
    assert result.report["held_out"] == 0


def test_progress_is_told(
    backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[tuple[str, int, int]] = []
    ulrl.purify(backdoored, *clean, **QUICK, device="cpu", progress=lambda *step: told.append(step))
    for stage, steps in (("unlearn", 4), ("relearn", 2)):
        assert [step[1:] for step in told if step[0] == stage] == [(i, steps) for i in range(steps + 1)]
    assert "relearn" not in capsys.readouterr().err
    ulrl.purify(backdoored, *clean, **QUICK, progress=True)
    assert "relearn: 100%" in capsys.readouterr().err


def test_a_stage_that_reaches_its_goal_early_is_full(
    backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    result = ulrl.purify(backdoored, *clean, method="ulrl", batch_size=32, relearn_epochs=1, progress=True)
    assert result.report["evidence"]["unlearned"]["epochs"] < 20
    assert "unlearn, goal reached: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["net.safetensors", "net.pt"])
def test_a_result_is_saved_and_nothing_replaced_unasked(
    name: str, backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    result = ulrl.purify(backdoored, *clean, method="ft", epochs=1)
    file = tmp_path / name
    result.save(file)
    load = safetensors.torch.load_file if name.endswith("safetensors") else torch.load
    Net().load_state_dict(load(file), strict=True)
    written = file.read_bytes()
    for where, words in (
        (file, "overwrite=True"),
        (tmp_path / "net.onnx", "ends in"),
        (tmp_path / "no" / name, "no fold"),
    ):
        with pytest.raises(UserError, match=words):
            result.save(where)
    assert (file.read_bytes(), list(tmp_path.iterdir())) == (written, [file])
    result.save(file, overwrite=True)


class Convolutional(Net):
    """The same function, whose head is a convolution in front of the pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.classify = nn.Conv2d(64, 10, 1)  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body[-1](self.classify(self.body[:-1](x))).flatten(1)


@pytest.mark.parametrize("method", ["ulrl", "fst", "fp"])
def test_a_head_may_be_a_convolution(
    method: str, backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor]
) -> None:
    convolutional = Convolutional().eval()
    flat = backdoored.state_dict()
    convolutional.load_state_dict({k: w[:, :, None, None] if k == "classify.weight" else w for k, w in flat.items()})
    few = {"ulrl": {"relearn_epochs": 2}, "fst": {"epochs": 2}, "fp": {"epochs": 1, "once_prune_ratio": 0.2}}[method]
    results = [ulrl.purify(model, *clean, method=method, amp=False, **few) for model in (backdoored, convolutional)]
    linear, other = (result.report for result in results)
    assert other["evidence"]["head"] == "classify"
    assert other["flagged"] == linear["flagged"]
    assert other["accuracy_after"] == pytest.approx(linear["accuracy_after"], abs=0.1)
    if method == "ulrl":
        ranked = [result.ranking.change for result in results]  # type: ignore[union-attr]
        assert ranked[1].to_numpy() == pytest.approx(ranked[0].to_numpy(), rel=0.1)
    if method == "fst":
        assert other["evidence"]["head_cosine"] == pytest.approx(linear["evidence"]["head_cosine"], abs=0.1)
    if method == "fp":
        assert other["evidence"] == linear["evidence"]
        zero = (results[1].model.classify.weight == 0).all(0).sum()
        assert zero == other["evidence"]["pruned"]


def test_only_a_method_that_edits_a_head_needs_one(clean: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert ulrl.purify(Headless(), *clean, method="ft-sam", epochs=1).report["returned"] == "repaired"
    for method in ("ulrl", "fst", "fp"):
        with pytest.raises(UserError, match=r"no nn\.Linear layer or convolution of 1x1 with 10 outputs"):
            ulrl.purify(Headless(), *clean, method=method)
    with pytest.raises(UserError, match="BatchNorm"):
        ulrl.purify(Headless(), *clean, method="bnp")
