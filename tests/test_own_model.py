"""The door for a user's own model: a net that the library does not know, trained with a plain torch loop."""

from __future__ import annotations

import copy
import importlib
import inspect
import logging
import math
import shutil
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
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ulrl
from ulrl import UserError
from ulrl.cli import main
from ulrl.defenses.base import DEFENSES
from ulrl.options import Schema
from ulrl.own_model.suspecting import decide

ROOT = Path(__file__).resolve().parent.parent
TARGET = 7
QUICK: dict[str, Any] = {"unlearning_epochs": 2, "relearn_epochs": 1}


class Net(nn.Module):
    """Digits in [-1, 1] to ten logits."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()

        def block(inside: int, outside: int, stride: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(inside, outside, 3, stride, 1), norm(outside), nn.ReLU())

        self.body = nn.Sequential(block(1, 16, 1), block(16, 32, 2), block(32, 64, 1), nn.AdaptiveAvgPool2d(1))
        self.classify = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classify(self.body(x).flatten(1))


def stamp(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[:, :, -1, -1] = 0
    return x


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.from_numpy(images[order] / 8 - 1).float().view(-1, 1, 8, 8)
    return x, torch.from_numpy(labels[order]).long()


def trained(x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
        for _ in range(12):
            for part in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(x[part]), y[part]).backward()
                optimizer.step()
    model.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def backdoored(digits: tuple[torch.Tensor, torch.Tensor]) -> nn.Module:
    """A seventh of its training images carry a gray pixel and the label 7."""
    x, y = digits[0][:1200].clone(), digits[1][:1200].clone()
    x[:180], y[:180] = stamp(x[:180]), TARGET
    return trained(x, y)


@pytest.fixture(scope="module")
def innocent(digits: tuple[torch.Tensor, torch.Tensor]) -> nn.Module:
    return trained(digits[0][:1200], digits[1][:1200])


@pytest.fixture(scope="module")
def clean(digits: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Two hundred that it was not trained on."""
    return digits[0][1200:1400], digits[1][1200:1400]


@torch.no_grad()
def rates(model: nn.Module, digits: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
    """(ACC, ASR) on images that neither the model nor the repair has seen."""
    x, y = digits[0][1400:], digits[1][1400:]
    model = copy.deepcopy(model).eval()
    hit = model(stamp(x)).argmax(1)[y != TARGET] == TARGET
    return (model(x).argmax(1) == y).float().mean().item(), hit.float().mean().item()


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

    result = ulrl.purify(backdoored, *clean, batch_size=32, relearn_lr=0.02)

    assert result.flagged[0] == TARGET
    repaired_acc, repaired_asr = rates(result.model, digits)
    assert repaired_asr < 0.05
    assert repaired_acc > acc - 0.05
    assert result.ranking is not None
    assert result.ranking.z.idxmax() == TARGET
    assert (result.report["samples"], result.report["held_out"], result.report["returned"]) == (200, 40, "repaired")
    assert result.report["notes"] == []
    assert set(result.history.stage) == {"unlearn", "relearn"}

    assert all(torch.equal(before[k], v) for k, v in backdoored.state_dict().items())
    assert not any(p.grad is not None for p in backdoored.parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert np.array_equal(numbers, np.random.get_state()[1])  # type: ignore[arg-type]
    assert handlers == (logging.getLogger().handlers, logging.getLogger("ulrl").handlers)
    assert not list(tmp_path.iterdir())


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([v.flatten().float() for v in model.state_dict().values()])


def test_samples_may_come_in_many_forms(backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = clean
    expected = weights(ulrl.purify(backdoored, x, y, **QUICK).model)
    for images, labels in (
        (x.numpy(), y.numpy()),
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


@pytest.mark.parametrize("method", [name for name in DEFENSES if not DEFENSES[name].in_training])
def test_every_method_takes_a_users_model(
    method: str, backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor]
) -> None:
    defense = DEFENSES[method]
    short = {
        k: v
        for k, v in {"epochs": 1, "unlearning_epochs": 2, "relearn_epochs": 1, "nc_epoch": 1, "nb_iter": 20}.items()
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
        (
            {"model": Wrapped(Net(), lambda z: z.softmax(1))},
            "returns probabilities, and logits are needed; take the softmax",
        ),
        ({"device": "cuda:77"}, "no such device"),
        ({"hold_out": 1.5}, "hold_out is 1.5; give a share"),
        ({"max_accuracy_loss": -1}, "max_accuracy_loss is -1; give a share"),
        ({"images": torch.zeros(200, 3, 8, 8)}, "fails on a batch of [2, 3, 8, 8]"),
        ({"images": torch.zeros(200, 8, 8)}, "not [N, C, H, W]"),
        ({"images": torch.zeros(200, 1, 8, 8, dtype=torch.uint8)}, "images are uint8"),
        ({"images": torch.full((200, 1, 8, 8), float("inf"))}, "NaN or infinite values"),
        ({"images": ["a", "b"]}, "images cannot be read"),
        ({"labels": None}, "no labels"),
        ({"labels": torch.full((200,), 12)}, "label 12 is outside of the model's 10 classes"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "one whole number for each of the 200 images"),
        ({"labels": torch.zeros(200)}, "one whole number for each"),
        ({"method": "ulr"}, "did you mean 'ulrl'?"),
        ({"method": "abl"}, "defense/abl.py"),
        ({"relern_lr": 0.1}, "did you mean 'relearn_lr'?"),
        ({"relearn_lr": -1}, "must be at least 0"),
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
    assert "\n" not in str(raised.value)


def test_suspect_tells_a_backdoor(backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor]) -> None:
    before = weights(backdoored)
    found = ulrl.suspect(backdoored, *clean)
    assert (found.verdict, found.label) == ("backdoored", TARGET)
    assert repr(found).startswith("backdoored; look at class 7\n")
    assert found.z == found.ranking.z[TARGET]
    assert found.reach == pytest.approx(found.ranking.perturbation.min() / found.ranking.perturbation.median())
    assert torch.equal(weights(backdoored), before)


@pytest.mark.parametrize(
    ("z", "flagged", "reach", "verdict"),
    [
        ([61.9, 1, 2], [1, 0, 0], [0.91, 1, 1.2], (0, "uncertain")),  # far, however high it stands
        ([9, 1, 2], [1, 0, 0], [0.2, 1, 1.2], (0, "backdoored")),
        ([9, 1, 2], [1, 0, 0], [0.9, 0.2, 1.2], (1, "uncertain")),  # near, but another
        ([3, 1, 2], [0, 0, 0], [0.9, 0.2, 1.2], (1, "uncertain")),
        ([3, 1, 2], [0, 0, 0], [0.9, 0.6, 1.2], (1, "no evidence found")),
        ([3, 9, 2], [0, 1, 0], [math.nan] * 3, (1, "uncertain")),
        ([9, 1, 2], [1, 0, 0], [math.inf, 1, 1.2], (0, "uncertain")),
    ],
)
def test_verdicts(z: list[float], flagged: list[int], reach: list[float], verdict: tuple[int, str]) -> None:
    ranking = pd.DataFrame({"z": z, "flagged": np.array(flagged, bool), "reach": reach})
    assert decide(ranking) == verdict


def test_no_evidence_is_not_found_by_a_search_that_failed() -> None:
    ranking = pd.DataFrame({"z": [3.0, 1.0], "flagged": [False, False], "reach": [0.9, 1.1]})
    assert decide(ranking, searched=False) == (0, "uncertain")


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


def test_images_that_were_not_scaled_are_noticed(
    backdoored: nn.Module, clean: tuple[torch.Tensor, torch.Tensor]
) -> None:
    with pytest.warns(ulrl.Note, match="images run from 0 to 255, as if they were not normalised"):
        ulrl.suspect(backdoored, (clean[0] + 1) * 127.5, clean[1], unlearning_epochs=1)


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
    result = ulrl.purify(backdoored, *clean, batch_size=32, relearn_epochs=1, progress=True)
    assert result.report["evidence"]["unlearned"]["epochs"] < 20
    assert "unlearn, goal reached: 100%" in capsys.readouterr().err


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
        ({"trigger": lambda x: x[:, :, 1:], "target": 7}, "must keep the shape"),
    ):
        with pytest.raises(UserError, match=words):
            ulrl.evaluate(backdoored, *rest, **wrong)


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


class Headless(nn.Module):
    """Sums of patches: no layer has an output per class."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 20, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).mean((2, 3)).unflatten(1, (10, 2)).sum(2)


def test_only_a_method_that_edits_a_head_needs_one(clean: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert ulrl.purify(Headless(), *clean, method="ft-sam", epochs=1).report["returned"] == "repaired"
    for method in ("ulrl", "fst", "fp"):
        with pytest.raises(UserError, match=r"no nn\.Linear layer or convolution of 1x1 with 10 outputs"):
            ulrl.purify(Headless(), *clean, method=method)
    with pytest.raises(UserError, match="BatchNorm"):
        ulrl.purify(Headless(), *clean, method="bnp")


# The door by files


@pytest.fixture(scope="module")
def files(
    backdoored: nn.Module,
    innocent: nn.Module,
    clean: tuple[torch.Tensor, torch.Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """my_nets.py, weights in many forms, and photos/ with a subfolder per class."""
    root = tmp_path_factory.mktemp("files")
    source = inspect.getsource(Net).replace("Callable[[int], nn.Module]", "object")
    (root / "my_nets.py").write_text(
        "from __future__ import annotations\nimport torch\nfrom torch import nn\n\n\n" + source + "\n\n"
        "def eleven():\n    net = Net()\n    net.classify = nn.Linear(64, 11)\n    return net\n\n\n"
        + inspect.getsource(Headless)
        + "\n\n"
        "def broken():\n    raise ValueError('out of order')\n\n\ndef number():\n    return 7\n"
    )
    weights = backdoored.state_dict()
    safetensors.torch.save_file(weights, root / "net.safetensors")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": w for k, w in weights.items()}}, root / "parallel.pt")
    torch.save({"model": weights, "model_name": "net"}, root / "record.pt")
    torch.save({"net": weights, "acc": 0.9, "epoch": 3}, root / "net.pt")
    torch.save({"epoch": 3, "model_state_dict": weights, "optimizer_state_dict": {"state": {}}}, root / "lightning.pt")
    torch.save(Headless().state_dict(), root / "headless.pt")
    torch.save(innocent.state_dict(), root / "innocent.pt")
    torch.save(Trap(root / "sprung"), root / "trap.pt")
    torch.save([1, 2], root / "list.pt")
    (root / "damaged.safetensors").write_bytes(b"no weights")
    for name, photos in (("photos", "digit {}"), ("some", "{}"), ("named", "digit {}")):
        for i, (x, y) in enumerate(zip(*clean, strict=True)):
            if name == "photos" or y < 8:
                folder = root / name / photos.format(int(y))
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(((x[0] + 1) * 127.5).round().byte().numpy()).save(folder / f"{i}.png")
    shutil.copytree(root / "photos", root / "sizes")
    Image.new("L", (9, 9)).save(root / "sizes" / "digit 3" / "odd.png")
    (root / "empty").mkdir()
    return root


class Trap:
    """Opening its pickle would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


GRAY = "--mean 0.5 --std 0.5 --device cpu --batch_size 32".split()
SHORT = "--unlearning_epochs 2 --relearn_epochs 1".split()


def command(files: Path, *argv: str) -> int:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.chdir(files)
        main(["purify", *argv])
    assert isinstance(left.value.code, int)
    return left.value.code


FILES = "--model my_nets:Net --weights net.safetensors --images photos".split()


@pytest.mark.parametrize("out", ["repaired.safetensors", "repaired.pt"])
def test_the_command_repairs_a_model(
    out: str, files: Path, digits: tuple[torch.Tensor, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    given = (files / "net.safetensors").read_bytes()
    assert command(files, *FILES, *GRAY, "--out", out, "--relearn_lr", "0.02") == 0
    printed = capsys.readouterr().out
    assert "verdict: backdoored; look at digit 7" in printed
    assert "on 40 clean images that were held out" in printed
    load = safetensors.torch.load_file if out.endswith("safetensors") else torch.load
    repaired = Net()
    repaired.load_state_dict(load(files / out), strict=True)
    acc, asr = rates(repaired, digits)
    assert asr < 0.05
    assert acc > 0.9
    assert (files / "net.safetensors").read_bytes() == given


def test_a_check_has_an_exit_code(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in files.rglob("*") if path.is_file()}
    assert command(files, *FILES, *GRAY, "--check") == 3
    innocent = ["--model", "my_nets:Net", "--weights", "innocent.pt", *FILES[4:], *GRAY, "--check"]
    code = command(files, *innocent)
    said = capsys.readouterr().out
    assert "verdict: backdoored" in said
    assert (code, "verdict: no evidence found" in said, "verdict: uncertain" in said) in (
        (0, True, False),
        (4, False, True),
    )
    assert before.items() <= {path: path.stat().st_mtime_ns for path in files.rglob("*")}.items()


@pytest.mark.parametrize("weights", ["parallel.pt", "record.pt", "net.pt", "lightning.pt"])
def test_weights_may_be_wrapped(weights: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", "my_nets:Net", "--weights", weights, "--images", "photos", *GRAY, *SHORT, "--check"]
    assert command(files, *argv) in (3, 4)
    assert "only" not in capsys.readouterr().err  # it reads the images right


def test_weights_that_are_there_are_kept(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ft = [*FILES, *GRAY, "--method", "ft", "--epochs", "1"]
    shutil.copy(files / "net.safetensors", files / "kept.safetensors")
    (files / "link.safetensors").symlink_to(files / "net.safetensors")
    before = (files / "net.safetensors").read_bytes()
    for out, words in (
        ("kept.safetensors", "kept.safetensors exists; pass --overwrite to replace it"),
        ("net.safetensors --overwrite", "is the file of the given weights, which are kept"),
        ("link.safetensors --overwrite", "is the file of the given weights, which are kept"),
    ):
        assert command(files, *ft, "--out", *out.split()) == 2
        assert words in capsys.readouterr().err
    assert (files / "net.safetensors").read_bytes() == (files / "kept.safetensors").read_bytes() == before
    assert command(files, *ft, "--out", "kept.safetensors", "--overwrite") == 0
    assert (files / "kept.safetensors").read_bytes() != before


def test_a_repair_that_costs_too_much_is_not_written(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ruin = "--method ft --epochs 1 --lr 5 --max_accuracy_loss 0.05 --out ruined.pt".split()
    assert command(files, *FILES, *GRAY, *ruin) == 2
    said = capsys.readouterr().err
    assert "accuracy would have gone from" in said
    assert "ruined.pt was not written" in said.splitlines()[-1]
    assert not (files / "ruined.pt").exists()


def test_what_cannot_work_is_said_before_the_diagnosis(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    headless = "--model my_nets:Headless --weights headless.pt --images photos".split()
    assert command(files, *headless, *GRAY, "--method", "bnp", "--out", "x.pt") == 2
    said = capsys.readouterr()
    assert "BatchNorm" in said.err
    assert "looking for" not in said.err
    assert command(files, *headless, *GRAY, "--check") == 2
    assert "no nn.Linear layer or convolution" in capsys.readouterr().err
    assert command(files, *headless, *GRAY, "--method", "ft", "--epochs", "1", "--out", "headless_ft.pt") == 0
    said = capsys.readouterr()
    assert "no diagnosis: the model has no nn.Linear" in said.err
    assert (files / "headless_ft.pt").exists()


def test_classes_by_number_and_other_methods(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*FILES[:4], "--images", "some", *GRAY, "--method", "ft", "--epochs", "1", "--out", "ft.pt"]
    assert command(files, *argv) == 0
    said = capsys.readouterr()
    assert "2 of the model's 10 classes have no clean sample" in said.err
    assert "only" not in said.err
    assert (files / "ft.pt").exists()


@pytest.mark.parametrize("more", ["--check", "--out wrong.pt"])
def test_a_wrong_normalisation_gives_no_verdict(more: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(files, *FILES, "--mean", "9", "--std", "0.01", *SHORT, *more.split()) == 2
    said = capsys.readouterr()
    assert "the model reads only" in said.err
    assert "no verdict; look at --img_size, --mean, --std" in said.err.splitlines()[-1]
    assert said.out == ""
    assert not (files / "wrong.pt").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", "--model is missing"),
        ("--model my_nets:Net --weights net.safetensors --images photos", "--out is missing"),
        (f"{' '.join(FILES)} --out repaired.onnx", "--out repaired.onnx: name a file that ends in .safetensors"),
        (f"{' '.join(FILES)} --out no/such/place.pt", "there is no folder no/such"),
        (f"{' '.join(FILES)} --check --method ulr", "did you mean 'ulrl'"),
        (f"{' '.join(FILES)} --out x.pt --method abl", "repairs while it trains on the poisoned training set"),
        (f"{' '.join(FILES)} --check --methods ulrl", "--methods; did you mean '--method'"),
        (f"{' '.join(FILES)} --check --mean 0.5 0.5", "--mean and --std take three numbers each"),
        (f"{' '.join(FILES)} --check --mean x", "--mean: ['x'] is not a list of numbers"),
        (f"{' '.join(FILES)} --check", "the model fails on a batch of [2, 3, 8, 8]"),
        (f"{' '.join(FILES[2:])} --check --model my_nets", "write package.module:factory"),
        (f"{' '.join(FILES[2:])} --check --model no_nets:Net", "No module named 'no_nets'"),
        (f"{' '.join(FILES[2:])} --check --model my_nets:Nett", "has no attribute 'Nett'"),
        (f"{' '.join(FILES[2:])} --check --model my_nets:broken", "ValueError: out of order"),
        (f"{' '.join(FILES[2:])} --check --model my_nets:number", "returns a int, not a torch.nn.Module"),
        (f"{' '.join(FILES[2:])} --check --model my_nets:eleven", "does not fit --model: see classify.weight"),
        ("--model my_nets:Net --images photos --check --weights trap.pt", "asks to run"),
        ("--model my_nets:Net --images photos --check --weights list.pt", "holds no state_dict"),
        ("--model my_nets:Net --images photos --check --weights none.pt", "none.pt cannot be read"),
        ("--model my_nets:Net --images photos --check --weights none.safetensors", "none.safetensors cannot be read"),
        ("--model my_nets:Net --images photos --check --weights damaged.safetensors", "damaged.safetensors is damaged"),
        (f"{' '.join(FILES[:4])} --check --images empty", "does not hold a subfolder per class"),
        (f"{' '.join(FILES[:4])} --check --images nowhere", "--images nowhere: there is no such folder"),
        (
            f"{' '.join(FILES[2:])} --check --model torchvision.models:resnet18",
            "does not fit --model: see conv1.weight",
        ),
        (f"{' '.join(FILES[:4])} --check --images sizes", "give the model's input as --img_size"),
        (f"{' '.join(FILES[:4])} --check --images named --mean 0.5 --std 0.5", "name the subfolders by the classes'"),
    ],
)
def test_bad_files_are_one_line(argv: str, words: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(files.iterdir())
    assert command(files, *argv.split()) == 2
    said = capsys.readouterr()
    told, last = [line for line in said.err.splitlines() if line.startswith("converting ")], said.err.splitlines()[-1]
    assert last.startswith("ulrl: ")
    assert words in last
    assert said.err.count("\n") == len(told) + 1
    assert said.out == ""
    assert set(files.iterdir()) == before  # nothing was run from trap.pt, nothing half-written


def test_the_example_runs_as_it_stands(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module("purify_folder")
    for name in ("digit 0", "digit 1", "digit 2"):
        shutil.copytree(files / "photos" / name, tmp_path / "few" / name)
    torch.save(example.network(3).state_dict(), tmp_path / "weights.pt")
    example.main(str(tmp_path / "weights.pt"), str(tmp_path / "few"), str(tmp_path / "repaired.pt"), size=32)
    said = capsys.readouterr().out
    assert "no verdict\nnote: the model reads only" in said, "it was never trained"
    assert "samples held out" in said
    example.network(3).load_state_dict(torch.load(tmp_path / "repaired.pt"), strict=True)
