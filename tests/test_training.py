"""The training loop, the judge and their measures."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ulrl import machine, training
from ulrl.data.batches import Batches
from ulrl.data.datasets import dataset_spec, load_dataset
from ulrl.data.imageset import ImageSet, PoisonedSet
from ulrl.errors import UserError
from ulrl.machine import has_bf16, whole_float32
from ulrl.metrics import Judgement, defense_effectiveness
from ulrl.models import build_model, load_model
from ulrl.seeds import generator, global_stream, stream_seed
from ulrl.training import (
    Monitor,
    Sam,
    TrainOptions,
    cross_entropy,
    fit,
    head_inputs,
    judge,
    make_scheduler,
    measure_statistics,
    predict,
)


@pytest.fixture(scope="module")
def digits() -> tuple[ImageSet, ImageSet]:
    return load_dataset("digits")


def train(data: ImageSet, options: TrainOptions, monitor: Monitor, **how: object) -> nn.Module:
    model = build_model("preactresnet18", 10, 1, 8)
    optimizer = options.optimizer(model)
    batches = Batches(data, options.batch_size, generator(0, "batches"))
    scheduler = options.scheduler(optimizer)
    fit(model, batches, options.epochs, optimizer, scheduler, monitor, "train", amp=options.amp, **how)  # type: ignore[arg-type]
    return model


def test_float32_is_whole_only_where_asked() -> None:
    before = torch.backends.cudnn.allow_tf32
    with pytest.raises(KeyError), whole_float32():
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
        raise KeyError
    assert torch.backends.cudnn.allow_tf32 is before


def test_bar_in_a_file_has_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    model, monitor = nn.Identity(), Monitor(bar=True)
    with monitor.stage("tune", 1000) as progress:
        for step in range(1000):
            progress.step()
            if step % 10 == 9:
                progress.epoch(model, step // 10 + 1, acc=step / 1000)
    states = capsys.readouterr().err.split("\r")
    assert 2 <= len(states) <= 4
    assert "1000/1000" in states[-1]
    assert "acc=0.999" in states[-1]


@pytest.mark.parametrize("bar", [False, True])
def test_a_stage_needs_no_stderr(bar: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)  # of a daemon, or of a program with a window
    with Monitor(bar=bar).stage("tune", 1) as progress:
        progress.step()
        progress.reached()


@pytest.mark.parametrize(
    "options",
    [
        TrainOptions(epochs=3, batch_size=64, lr=0.05),
        TrainOptions(epochs=3, batch_size=64, lr=0.05, amp=False),
        TrainOptions(epochs=3, batch_size=64, lr=0.003, client_optimizer="adamw"),
        TrainOptions(epochs=3, batch_size=64, lr=0.05, lr_scheduler="MultiStepLR", steplr_milestones=(2,)),
        TrainOptions(epochs=5, batch_size=64, lr=0.05, lr_scheduler="ReduceLROnPlateau"),
    ],
)
def test_fit_learns_the_digits(options: TrainOptions, digits: tuple[ImageSet, ImageSet]) -> None:
    monitor = Monitor()
    model = train(digits[0], options, monitor)
    # Chance is 0.1. A rate that has not come down yet ends anywhere from 0.64 to 0.9, by the machine's rounding.
    assert (predict(model, digits[1]) == digits[1].labels).double().mean() > 0.4
    losses = [row["loss"] for row in monitor.history]
    assert len(losses) == options.epochs
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("amp", [False, True])
def test_amp_decides_in_which_numbers_the_net_computes(amp: bool, digits: tuple[ImageSet, ImageSet]) -> None:
    seen: list[torch.dtype] = []

    def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(model(x).dtype)
        return cross_entropy(model, x, y)

    some = digits[0].subset(torch.arange(64))
    train(some, TrainOptions(epochs=1, batch_size=64, amp=amp), Monitor(), objective=objective)
    assert seen == [torch.bfloat16 if amp and has_bf16(torch.device("cpu")) else torch.float32]


def test_fit_can_ascend_and_stop(digits: tuple[ImageSet, ImageSet]) -> None:
    monitor, seen = Monitor(), []
    options = TrainOptions(epochs=5, batch_size=64, lr=0.01)
    train(digits[0], options, monitor, ascend=True, clip=20.0, stop=lambda acc: seen.append(acc) or len(seen) == 2)
    assert len(monitor.history) == 2
    assert monitor.history[1]["loss"] > monitor.history[0]["loss"]
    assert seen == [row["acc"] for row in monitor.history]


def test_a_plateau_of_an_ascent_is_a_loss_that_no_longer_rises(digits: tuple[ImageSet, ImageSet]) -> None:
    options = TrainOptions(epochs=14, lr=0.01, lr_scheduler="ReduceLROnPlateau")
    model = build_model("preactresnet18", 10, 1, 8)
    optimizer = options.optimizer(model)
    batches = Batches(digits[0].subset(torch.arange(64)), 64, generator(0, "batches"))
    fit(model, batches, 14, optimizer, options.scheduler(optimizer), Monitor(), "unlearn", ascend=True)
    assert optimizer.param_groups[0]["lr"] == 0.01


class Modes(nn.Module):
    """A BatchNorm that is frozen in eval mode, one that a branch has which is not used, and one that measures."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.aside, self.norm = (nn.BatchNorm2d(1) for _ in range(3))
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.frozen(x)).flatten(1))


def test_each_module_is_put_back_into_its_own_mode(digits: tuple[ImageSet, ImageSet]) -> None:
    model = Modes()
    model.frozen.eval()
    predict(model, digits[1])
    assert [m.training for m in (model, model.frozen, model.norm)] == [True, False, True]
    model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predict(model, digits[1])
    assert [m.training for m in (model, model.frozen, model.norm)] == [True, False, True]


def test_statistics_that_nothing_measures_stay(digits: tuple[ImageSet, ImageSet]) -> None:
    model = Modes()
    assert model.aside.running_mean is not None
    model.aside.running_mean.fill_(3)
    measure_statistics(model, [(torch.full((4, 1, 8, 8), 2.0), digits[0].labels[:4])])
    assert model.aside.running_mean.item() == 3
    assert (model.norm.num_batches_tracked, model.aside.num_batches_tracked) == (1, 0)
    assert model.norm.momentum == model.aside.momentum == 0.1


def test_worst_weights_are_not_counted_by_an_average_of_all_batches(digits: tuple[ImageSet, ImageSet]) -> None:
    model = Modes()
    model.norm.momentum = None  # its statistics are the mean of those of all batches
    batches = Batches(digits[0].subset(torch.arange(64)), 32, generator(0, "batches"))
    fit(model, batches, 2, torch.optim.SGD(model.parameters(), 0.1), None, Monitor(), "train", sam=Sam(0.1))
    assert model.norm.num_batches_tracked is not None
    assert model.norm.num_batches_tracked.item() == 4


class Gained(nn.GroupNorm):
    def forward(self, values: torch.Tensor, gain: float) -> torch.Tensor:  # type: ignore[override]
        return super().forward(values) * gain


class Scaled(nn.Linear):
    def forward(self, values: torch.Tensor, scale: float) -> torch.Tensor:  # type: ignore[override]
        return super().forward(values) * scale


class Unusual(nn.Module):
    """Its layers are called with more than one argument, by other names, or not at all."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.named, self.norm, self.head = named, Gained(1, 1), Scaled(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.named:
            return self.head(values=self.norm(values=x, gain=2.0).flatten(1), scale=3.0)
        return self.head(self.norm(x, 2.0).flatten(1), 3.0)


@pytest.mark.parametrize("named", [False, True])
def test_layers_may_take_what_they_will(
    named: bool, digits: tuple[ImageSet, ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, some = Unusual(named), digits[1].subset(torch.arange(40))
    fit(model, Batches(some, 8), 1, torch.optim.SGD(model.parameters(), 0.1), None, Monitor(), "train", amp=False)
    expected = predict(model, some, amp=False)
    monkeypatch.setattr(machine, "has_bf16", lambda device: True)
    assert (predict(model, some) == expected).double().mean() > 0.9
    assert head_inputs(model, model.head, some).shape == (40, 64)


def test_a_head_that_is_not_called_once_is_told(digits: tuple[ImageSet, ImageSet]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x.flatten(1)) + self.head(x.flip(3).flatten(1))

    model = Twice()
    with pytest.raises(UserError, match="once for each image"):
        head_inputs(model, model.head, digits[1])


def test_fit_takes_another_objective_and_calls_after_each_step(digits: tuple[ImageSet, ImageSet]) -> None:
    steps, rows = [], []

    def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, right = cross_entropy(model, x, y)
        rows.append(right.shape)
        return loss + 100, right

    monitor = Monitor()
    some = digits[0].subset(torch.arange(128))
    options = TrainOptions(epochs=1, batch_size=64)
    train(some, options, monitor, objective=objective, after_step=lambda: steps.append(1))
    assert monitor.history[0]["loss"] > 100
    assert len(steps) == 2
    assert rows == [(64,), (64,)]


@pytest.mark.parametrize("adaptive", [False, True])
def test_sharpness_aware_steps_start_from_the_worst_weights_nearby(adaptive: bool) -> None:
    """On w^4 / 4 at w = (2, -1): the gradient is taken at w + e, with |e| = rho (SAM) or |e / w| = rho (ASAM)."""
    weights = torch.tensor([2.0, -1.0])
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = weights[None].clone()
    spec = dataset_spec("digits")
    data = ImageSet(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), spec)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    fit(
        model, Batches(data, 2), 1, optimizer, make_scheduler(optimizer, "constant", 1), Monitor(), "train",
        objective=lambda m, x, y: ((m.weight**4).sum() / 4, y == 0), sam=Sam(0.1, adaptive),
    )  # fmt: skip
    gradient = weights**3
    scale = weights.abs() if adaptive else torch.ones(2)
    step = 0.1 * scale**2 * gradient / (scale * gradient).norm()
    assert torch.allclose(model.weight.data[0], weights - (weights + step) ** 3, atol=1e-5)


def test_sharpness_aware_training_learns_and_keeps_its_statistics(digits: tuple[ImageSet, ImageSet]) -> None:
    options = TrainOptions(epochs=3, batch_size=64, lr=0.05)
    model = train(digits[0], options, Monitor(), sam=Sam(0.05))
    assert (predict(model, digits[1]) == digits[1].labels).double().mean() > 0.8
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_fit_says_when_the_loss_is_not_finite(digits: tuple[ImageSet, ImageSet]) -> None:
    with pytest.raises(UserError, match="lower its learning rate"):
        train(digits[0], TrainOptions(epochs=2, lr=1e20, batch_size=64), Monitor())


def test_cosine_ends_with_the_epochs_and_multistep_drops() -> None:
    def rates(name: str, epochs: int) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
        scheduler, seen = make_scheduler(optimizer, name, epochs, (2,), 0.1), []
        for _ in range(epochs):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return [*seen, optimizer.param_groups[0]["lr"]]

    assert rates("CosineAnnealingLR", 4) == pytest.approx([1, 0.853553, 0.5, 0.146447, 0], abs=1e-6)
    assert rates("MultiStepLR", 3) == pytest.approx([1, 1, 0.1, 0.1])
    assert rates("constant", 3) == [1, 1, 1, 1]


class Always(nn.Module):
    """Calls each image the class of its first pixel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -(x[:, 0, 0, :1] - torch.arange(10, dtype=torch.float32)).abs()


def test_judge_counts_by_hand(digits: tuple[ImageSet, ImageSet]) -> None:
    from dataclasses import replace

    spec = replace(digits[0].spec, mean=(0.0,), std=(1 / 255,))

    def images(*classes: int) -> torch.Tensor:
        return torch.tensor(classes, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)

    clean = ImageSet(images(1, 2, 3, 4), torch.tensor([1, 2, 3, 0]), spec)
    poisoned = PoisonedSet(
        images(0, 0, 5, 2, 2), torch.zeros(5, dtype=torch.int64), spec, torch.tensor([1, 2, 5, 2, 1]), torch.arange(5)
    )
    assert judge(Always(), clean, poisoned) == Judgement(acc=0.75, asr=0.4, ra=0.4, n_clean=4, n_poisoned=5)
    nothing = poisoned.subset(torch.arange(0))
    assert judge(Always(), clean, nothing).asr is None


def test_logits_that_are_one_in_bf16_are_told_apart(
    digits: tuple[ImageSet, ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first class wins each tie, and that is mostly the target."""
    monkeypatch.setattr(training, "autocast", lambda device, amp: torch.autocast(device.type, torch.bfloat16))
    head = nn.Linear(64, 10, bias=False)
    nn.init.constant_(head.weight, 1.0)
    nn.init.constant_(head.weight[6], 1.001)  # bf16 has 1.0 and 1.0078
    model = nn.Sequential(nn.Flatten(), head)
    data = ImageSet(torch.full((4, 1, 8, 8), 255, dtype=torch.uint8), torch.full((4,), 6), digits[0].spec)
    assert predict(model, data).tolist() == [6] * 4
    assert not head._forward_hooks


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((0.92, 1.0), (0.92, 0.0), 1.0),
        ((0.92, 1.0), (0.82, 0.0), 0.95),
        ((0.92, 1.0), (0.95, 1.0), 0.5),
        ((0.92, 0.1), (0.92, 0.3), 0.5),
        ((0.92, None), (0.92, None), None),
    ],
)
def test_der(before: tuple, after: tuple, expected: float | None) -> None:
    a, b = (Judgement(acc, asr, None, 1, 1) for acc, asr in (before, after))
    assert defense_effectiveness(a, b) == (None if expected is None else pytest.approx(expected))


def test_model_has_backdoorbench_keys_and_counts() -> None:
    state = build_model("preactresnet18", 10).state_dict()
    assert len(state) == 102
    assert state["conv1.weight"].shape == (64, 3, 3, 3)
    assert list(state)[:8] == [
        "conv1.weight", "layer1.0.bn1.weight", "layer1.0.bn1.bias", "layer1.0.bn1.running_mean",
        "layer1.0.bn1.running_var", "layer1.0.bn1.num_batches_tracked", "layer1.0.conv1.weight", "layer1.0.bn2.weight",
    ]  # fmt: skip
    assert list(state)[-2:] == ["linear.weight", "linear.bias"]
    assert state["linear.weight"].shape == (10, 512)
    assert [k for k in state if "shortcut" in k] == [f"layer{i}.0.shortcut.0.weight" for i in (2, 3, 4)]


def test_model_width_and_channels_are_read_off_the_weights() -> None:
    narrow = build_model("preactresnet18", 43, channels=1, width=8, seed=3)
    loaded = load_model("preactresnet18", 43, narrow.state_dict())
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(narrow.eval()(x), loaded.eval()(x))
    with pytest.raises(UserError, match="do not fit"):
        load_model("preactresnet18", 10, narrow.state_dict())
    with pytest.raises(UserError, match="1 channels, not of 3"):
        load_model("preactresnet18", 43, narrow.state_dict(), channels=3)
    hostile = narrow.state_dict() | {"conv1.weight": torch.zeros(1, 1, 1, 1).expand(2_000_000, 1, 3, 3)}
    with pytest.raises(UserError, match="do not fit"):
        load_model("preactresnet18", 43, hostile)
    with pytest.raises(UserError, match="conv1"):
        load_model("preactresnet18", 10, {"a": torch.zeros(1)})
    with pytest.raises(UserError, match="did you mean 'preactresnet18'"):
        load_model("preactresnet81", 10, narrow.state_dict())


def test_a_stream_on_the_cpu_leaves_other_devices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    before = torch.get_rng_state()
    with global_stream(0, "dropout"):
        drawn = torch.rand(3)
    assert not seeded
    assert torch.equal(before, torch.get_rng_state())
    with global_stream(0, "dropout"):
        assert torch.equal(drawn, torch.rand(3))


def test_streams_are_independent_of_each_other() -> None:
    assert stream_seed(0, "batches") != stream_seed(0, "poison") != stream_seed(1, "poison")
    assert torch.equal(torch.rand(3, generator=generator(5, "a")), torch.rand(3, generator=generator(5, "a")))


def test_judging_by_epoch_is_timed_apart_and_not_shown_to_the_loop(digits: tuple[ImageSet, ImageSet]) -> None:
    calls = []
    monitor = Monitor(lambda stage, epoch, model: calls.append((stage, epoch)), eval_every=2)
    train(digits[0].subset(torch.arange(128)), TrainOptions(epochs=4, batch_size=64), monitor)
    assert calls == [("train", 2), ("train", 4)]
    assert [set(row) for row in monitor.history] == [{"stage", "epoch", "loss", "acc"}] * 4
    assert set(monitor.seconds) == {"train", "judge"}
