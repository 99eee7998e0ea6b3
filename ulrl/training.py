"""Training and judging: the loops that every attack and defense shares.

Nothing here waits for the device within an epoch: losses and hits are summed on it and read once.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from ulrl.data.batches import Batches
from ulrl.data.imageset import ImageSet, PoisonedSet
from ulrl.errors import UserError
from ulrl.machine import autocast, eval_batch
from ulrl.metrics import Judgement, share
from ulrl.models.head import find_head, first_input, head_features
from ulrl.options import option

SCHEDULERS = ("CosineAnnealingLR", "MultiStepLR", "ReduceLROnPlateau", "constant")
OPTIMIZERS = ("sgd", "adamw")


class Monitor:
    """Progress out of a run: a bar per stage, a history row per epoch, the seconds of each stage.

    `judge` is called with (stage, epoch, model) every `eval_every` epochs, when that is not 0. It returns
    nothing and keeps its figures, so that `history` never holds one measured on the test sets. `tell` is
    called with (stage, steps done, steps at most) when a stage begins and after each of its steps.
    """

    def __init__(
        self,
        judge: Callable[[str, int, nn.Module], None] | None = None,
        eval_every: int = 0,
        *,
        bar: bool = False,
        tell: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.history: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}
        self._judge = judge
        self._every = eval_every
        self._bar = bar
        self._tell = tell

    @contextlib.contextmanager
    def stage(self, name: str, steps: int) -> Iterator[Stage]:
        """A named part of the run, of `steps` optimisation steps at most."""
        start, judged = time.perf_counter(), self.seconds.get("judge", 0.0)
        shown = self._bar and sys.stderr is not None  # which it is in a process without a terminal or a file for it
        interval = 0.1 if shown and sys.stderr.isatty() else 60  # a file keeps every state of the bar
        with tqdm(total=steps, desc=name, disable=not shown, dynamic_ncols=True, mininterval=interval) as bar:
            yield Stage(self, name, bar, steps)
        spent = time.perf_counter() - start - (self.seconds.get("judge", 0.0) - judged)
        self.seconds[name] = self.seconds.get(name, 0.0) + spent

    def _epoch(self, stage: str, epoch: int, model: nn.Module, figures: dict[str, float]) -> None:
        self.history.append({"stage": stage, "epoch": epoch, **figures})
        if self._judge and self._every and epoch % self._every == 0:
            start = time.perf_counter()
            self._judge(stage, epoch, model)
            self.seconds["judge"] = self.seconds.get("judge", 0.0) + time.perf_counter() - start


class Stage:
    """What a training loop tells of itself."""

    def __init__(self, monitor: Monitor, name: str, bar: tqdm[Any], steps: int) -> None:
        self._monitor = monitor
        self._name = name
        self._bar = bar
        self._steps = steps
        self._done = 0
        self._tell()

    def step(self) -> None:
        """One optimisation step is done."""
        self._done += 1
        self._bar.update()
        self._tell()

    def reached(self) -> None:
        """The stage ends here, as it has reached its goal: the bar is full."""
        self._bar.set_description(f"{self._name}, goal reached", refresh=False)
        self._bar.total = self._steps = self._done
        self._bar.refresh()
        self._tell()

    def _tell(self) -> None:
        if self._monitor._tell is not None:
            self._monitor._tell(self._name, self._done, self._steps)

    def epoch(self, model: nn.Module, epoch: int, **figures: float) -> None:
        """Epoch `epoch` (from 1) is done, with its figures."""
        self._bar.set_postfix({k: f"{v:.4g}" for k, v in figures.items()}, refresh=False)
        self._monitor._epoch(self._name, epoch, model, figures)


@dataclass(frozen=True)
class TrainOptions:
    """How an attack trains its model. Defaults are BackdoorBench's for CIFAR-10."""

    epochs: int = option(100, "training epochs", source="BackdoorBench", low=1)
    batch_size: int = option(128, "images per step", source="BackdoorBench", low=2)
    lr: float = option(0.01, "learning rate", source="BackdoorBench", low=0)
    lr_scheduler: str = option(
        "CosineAnnealingLR", "learning rate over the epochs", source="BackdoorBench", choices=SCHEDULERS
    )
    steplr_milestones: tuple[int, ...] = option((), "MultiStepLR: epochs after which the rate drops")
    steplr_gamma: float = option(0.1, "MultiStepLR: factor of each drop", source="BackdoorBench", low=0)
    client_optimizer: str = option("sgd", "optimiser", source="BackdoorBench", choices=OPTIMIZERS)
    sgd_momentum: float = option(0.9, "momentum of sgd", source="BackdoorBench", low=0, high=1)
    wd: float = option(5e-4, "weight decay", source="BackdoorBench", low=0)
    sam_rho: float = option(0.0, "radius of sharpness-aware minimisation; 0: off", low=0)
    amp: bool = option(True, "bf16 autocast where the device has it")
    random_seed: int = option(0, "seed of every stream of randomness", source="BackdoorBench", low=0, high=2**32 - 1)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return make_optimizer(model, self.client_optimizer, self.lr, self.sgd_momentum, self.wd)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return make_scheduler(optimizer, self.lr_scheduler, self.epochs, self.steplr_milestones, self.steplr_gamma)


def make_optimizer(
    model: nn.Module, name: str, lr: float, momentum: float, wd: float = 0.0, *, nesterov: bool = False
) -> torch.optim.Optimizer:
    """One of OPTIMIZERS for all parameters of `model`; `momentum`, Nesterov's or not, is sgd's, and adamw's decay is
    decoupled."""
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr, weight_decay=wd)
    return torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=wd, nesterov=nesterov and momentum > 0)


def make_scheduler(
    optimizer: torch.optim.Optimizer,
    name: str,
    epochs: int,
    milestones: tuple[int, ...] = (),
    gamma: float = 0.1,
) -> torch.optim.lr_scheduler.LRScheduler:
    """A per-epoch schedule; the cosine ends at `epochs`, where BackdoorBench's always ends at 100.

    A plateau is one of the training loss, where BackdoorBench's is one of the loss on the test set.
    """
    if name == "ReduceLROnPlateau":
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    if name == "MultiStepLR":
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, list(milestones), gamma)
    if name == "constant":
        return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)


@dataclass(frozen=True)
class Sam:
    """Sharpness-aware minimisation: the gradient is taken at the worst weights nearby.

    Those are rho g / |g| away, over all weights (SAM, arXiv 2010.01412, equation 2), or adaptive, in proportion to
    each weight: rho w^2 g / | |w| g | (ASAM, arXiv 2102.11600, equation 2, without its bias exception).
    mix: share of the gradient at the worst weights; the rest is that at the weights themselves.
    """

    rho: float
    adaptive: bool = False
    mix: float = 1.0

    @torch.no_grad()
    def climb(self, parameters: list[nn.Parameter]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Move to the worst weights, in place: (the weights moved, by how much), to be taken back."""
        moved: list[torch.Tensor] = [p for p in parameters if p.grad is not None]
        gradients = [p.grad for p in moved if p.grad is not None]
        sizes = torch._foreach_abs(moved) if self.adaptive else [torch.ones((), device=g.device) for g in gradients]
        scaled = torch._foreach_mul(gradients, sizes)
        norm = torch.stack(torch._foreach_norm(scaled)).norm().clamp_min(1e-12)
        steps = torch._foreach_mul(torch._foreach_mul(scaled, sizes), self.rho / norm)
        torch._foreach_add_(moved, list(steps))
        return moved, list(steps)


class Overflow(UserError):
    """Training left the numbers that a net can have."""


Objective = Callable[[nn.Module, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def cross_entropy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The usual objective: mean cross-entropy (scalar) of logits [B, K], and which were right (bool [B])."""
    logits = model(x)
    return F.cross_entropy(logits, y), logits.detach().argmax(1) == y


def fit(
    model: nn.Module,
    batches: Batches,
    epochs: int,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    monitor: Monitor,
    stage: str,
    *,
    amp: bool = True,
    objective: Objective = cross_entropy,
    ascend: bool = False,
    clip: float | None = None,
    sam: Sam | None = None,
    after_step: Callable[[], None] | None = None,
    stop: Callable[[float], bool] | None = None,
) -> bool:
    """Train `model` in place, for `epochs` passes over `batches`.

    scheduler: None: a constant rate. objective: given (model, x, y) under autocast, the scalar to minimise and which
    samples were right (bool, one per sample). ascend: maximise it instead. clip: bound on the global gradient norm.
    after_step: called when the weights have moved. stop: given the epoch's training accuracy (on the augmented images,
    summed while the weights move), says whether to end there.

    Returns whether `stop` ended the training. The model is left in train mode.

    Raises:
        Overflow: the loss became NaN or infinite.
    """
    device = batches.data.device
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()
    with monitor.stage(stage, epochs * len(batches)) as progress, channels_first(model):
        for epoch in range(1, epochs + 1):
            totals, count = torch.zeros(2, device=device), 0  # loss and hits; samples
            for x, y in batches:
                with autocast(device, amp):
                    loss, right = objective(model, x, y)
                optimizer.zero_grad()
                (-loss if ascend else loss).backward()
                if sam is not None:
                    steps = sam.climb(parameters)
                    torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1 - sam.mix)
                    with _still_statistics(model), autocast(device, amp):
                        worst = objective(model, x, y)[0]
                    (sam.mix * worst).backward()  # on top of what is left of the first
                    with torch.no_grad():
                        torch._foreach_sub_(*steps)
                if clip is not None:
                    nn.utils.clip_grad_norm_(parameters, clip)
                optimizer.step()
                if after_step is not None:
                    after_step()
                totals += torch.stack([loss.detach().float() * len(y), right.sum()])
                count += len(y)
                progress.step()
            loss_sum, hit_sum = totals.tolist()
            loss_mean, accuracy = loss_sum / count, hit_sum / count
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                scheduler.step(-loss_mean if ascend else loss_mean)
            elif scheduler is not None:
                scheduler.step()
            if not math.isfinite(loss_mean):
                raise Overflow(
                    f"the loss of stage {stage!r} became {loss_mean} in epoch {epoch}; lower its learning rate"
                )
            progress.epoch(model, epoch, loss=loss_mean, acc=accuracy)
            if stop is not None and stop(accuracy):
                progress.reached()
                return True
    return False


@contextlib.contextmanager
def channels_first(model: nn.Module) -> Iterator[None]:
    """Inside the block GroupNorm is given its images channels first in memory, on a CPU.

    There its backward pass kills the process (torch 2.13) where they are channels last and need no gradient, as those
    of a first layer, or of one behind frozen layers.
    """

    def turn(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
            return value
        return value.clone(memory_format=torch.contiguous_format)  # one channel is contiguous as it lies, and dies, too

    def turned(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(map(turn, given)), {name: turn(value) for name, value in named.items()}

    with contextlib.ExitStack() as hooks:
        for m in model.modules():
            if isinstance(m, nn.GroupNorm):
                hooks.enter_context(m.register_forward_pre_hook(turned, with_kwargs=True))
        yield


@torch.no_grad()
def measure_statistics(model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Measure BatchNorm's running statistics anew, in place: the mean over `batches`, each of which weighs the same.

    As `torch.optim.swa_utils.update_bn`, but a layer that measures none keeps those it had: one that stays in eval mode
    while the model trains, or one in a branch that no batch takes.
    """
    with in_mode(model, training=True):
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
        before = [(m.momentum, {name: b.clone() for name, b in m.named_buffers()}) for m in norms]
        for m in norms:
            m.reset_running_stats()
            m.momentum = None
        for x, _ in batches:
            model(x)
        for m, (momentum, statistics) in zip(norms, before, strict=True):
            m.momentum = momentum
            if not m.num_batches_tracked:
                for name, b in m.named_buffers():
                    b.copy_(statistics[name])


@contextlib.contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Inside the block the model is in train or eval mode; afterwards each module is in the mode that it was in, as a
    BatchNorm that the user keeps in eval mode."""
    modes = [(m, m.training) for m in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


@contextlib.contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside the block no gradient is computed for these weights; afterwards for those for which it was before."""
    trainable = [p for p in parameters if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


@contextlib.contextmanager
def _still_statistics(model: nn.Module) -> Iterator[None]:
    """Inside the block BatchNorm's running statistics do not move: what passes there is of SAM's worst weights."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta, counts = [m.momentum for m in norms], [m.num_batches_tracked for m in norms]
    for m in norms:
        m.momentum = 0.0
        if m.num_batches_tracked is not None:
            m.num_batches_tracked = m.num_batches_tracked.clone()  # counts in place of the real one
    try:
        yield
    finally:
        for m, momentum, count in zip(norms, momenta, counts, strict=True):
            m.momentum, m.num_batches_tracked = momentum, count


def predict(model: nn.Module, data: ImageSet, amp: bool = True) -> torch.Tensor:
    """The class that `model`, in eval mode, gives each image: int64 [N] on the set's device.

    The model is put back into the mode it was in.
    """
    with _exact_head(model, data.spec.num_classes):
        classes = _outputs(model, data, amp, lambda x: model(x).argmax(1))
    return torch.cat(classes) if classes else data.labels.new_empty(0)


def logits(model: nn.Module, data: ImageSet, amp: bool = True) -> torch.Tensor:
    """What `model`, in eval mode, answers to each image: float32 [N, K] on the set's device. N at least 1."""
    with _exact_head(model, data.spec.num_classes):
        return torch.cat(_outputs(model, data, amp, lambda x: model(x).float()))


@contextlib.contextmanager
def _exact_head(model: nn.Module, num_classes: int) -> Iterator[None]:
    """The classifier head, where one is found, computes in its own precision inside the block, also under autocast.

    Logits of bf16 have eight bits, so that two of them are often equal; the first class, mostly the target, then wins.
    """
    try:
        _, head = find_head(model, num_classes)
    except UserError:
        yield
        return

    def exact(value: Any) -> Any:
        tensor = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(head.weight.dtype) if tensor else value

    def exactly(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        if not torch.is_autocast_enabled(output.device.type):
            return output
        with torch.autocast(output.device.type, enabled=False):
            return head.forward(*map(exact, given), **{name: exact(value) for name, value in named.items()})

    hook = head.register_forward_hook(exactly, prepend=True, with_kwargs=True)  # before what a user hung there
    try:
        yield
    finally:
        hook.remove()


def accuracy(model: nn.Module, data: ImageSet, amp: bool = True) -> float:
    """The share of the images that `model`, in eval mode, reads right; 0 of no images."""
    return share(predict(model, data, amp) == data.labels) or 0.0


def head_inputs(model: nn.Module, head: nn.Module, data: ImageSet, amp: bool = True) -> torch.Tensor:
    """What the classifier head of `model`, in eval mode, is given for each image: float32 [N, D]. N at least 1.

    Where it is a convolution, the mean over its positions.

    Raises:
        UserError: the model does not call its head once for each image.
    """
    seen: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(
        lambda _, given, named: seen.append(head_features(first_input(given, named)).float()), with_kwargs=True
    )
    try:
        _outputs(model, data, amp, model)
    finally:
        hook.remove()
    if sum(map(len, seen)) != len(data):
        raise UserError("the model does not call its head once for each image, so there is no telling what it is given")
    return torch.cat(seen)


@torch.no_grad()
def _outputs(
    model: nn.Module, data: ImageSet, amp: bool, output: Callable[[torch.Tensor], torch.Tensor]
) -> list[torch.Tensor]:
    """`output` of each batch, with the model in eval mode."""
    with in_mode(model, training=False), autocast(data.device, amp):
        return [output(x) for x, _ in Batches(data, eval_batch(data.device))]


def judge(model: nn.Module, clean: ImageSet, poisoned: PoisonedSet | None, amp: bool = True) -> Judgement:
    """ACC, ASR and RA of a model; one pass over each set, as ASR and RA share their predictions."""
    acc = accuracy(model, clean, amp)
    if poisoned is None:
        return Judgement(acc, None, None, len(clean), 0)
    classes = predict(model, poisoned, amp)
    return Judgement(
        acc=acc,
        asr=share(classes == poisoned.labels),
        ra=share(classes == poisoned.original_labels),
        n_clean=len(clean),
        n_poisoned=len(poisoned),
    )
