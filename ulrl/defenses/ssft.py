"""SSFT: suppress the skip connection that serves a backdoor, fine-tune its stage (Yang et al., arXiv 2211.05631)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import Repair, register
from ulrl.defenses.unlearning import Unlearning
from ulrl.errors import UserError
from ulrl.models.preact_resnet import PreActResNet18
from ulrl.options import option
from ulrl.training import Monitor, fit, frozen, logits, make_optimizer

_RELEASE = "SSFT release"
GAMMAS = tuple(tenths / 10 for tenths in range(11))  # what is left of a skip connection while one is chosen


@dataclass(frozen=True)
class _Skip:
    """A block's skip connection: x, or projection(x). last: the layer whose output is added to it."""

    block: nn.Module
    projection: nn.Sequential | None
    last: nn.Module


@register("ssft")
@dataclass(frozen=True)
class SSFT(Unlearning):
    """Shortcut suppression with fine-tuning, on a PreAct-ResNet18 or one of torchvision's ResNets.

    1. Unlearn the clean task on a copy, so that it gives most clean samples one class, a backdoor's target where
       there is a backdoor (RNP's by-product).
    2. In that copy scale each skip connection alone from 0 to 1 in steps of 0.1, and see how far the logit of that
       class stays above the mean of all, on average over the clean samples, as a share of what it was. With s and s'
       for two neighbouring shares, the connection with the greatest (s' - s) / exp(s) of all is chosen: the one
       without which the class is lost most suddenly.
    3. In the original leave `gamma` of that connection, and fine-tune the stage it is in, nothing else.

    The release has this rule with the attack success rate on poisoned test images in place of that share, which a
    defender does not have: the unlearned copy stands in, as the one net of which clean samples tell what its backdoor
    does. Its logits tell more than its answers, which often are the same whatever is suppressed. Clean accuracy alone
    would choose a connection that the task does not need, whatever the backdoor needs. (The release's script compares
    with a value that it never sets.)

    The release leaves 0 of the connection by a hook, which no plain network can hold. Here `gamma` is moved into the
    weights, exactly: a branch divided by it, and what follows multiplied. That asks for more than 0; 0.001 stands for
    it. As in the release BatchNorm's statistics move in all stages.

    Seen on `fashion_scenes` (width 16, 600 clean images, seed 0, all 10,000 and 9,000 test images): of BadNets ASR fell
    from 97.4 to 31.9% (a clean net's: 1.4) for 0.5 points of ACC, of WaNet from 98.5 to 95.5% (2.8) for 3.0. The idea
    itself is weak there, whatever chooses: on WaNet ASR stays at 99% with any of the first four connections suppressed,
    and on BadNets suppressing layer2.1 takes it to 0, but tuning brings 85% back. Suppressed and tuned, three of the
    eight leave BadNets 20 to 32%, and layer2.1 leaves WaNet 34% (on 1,500 of the triggered images).
    """

    gamma: float = option(0.001, "what is left of the connection (0 in the release)", low=0.001, high=1)
    epochs: int = option(10, "fine-tuning epochs", source=_RELEASE, low=1)
    lr: float = option(0.01, "learning rate of fine-tuning", source=_RELEASE, low=0)
    wd: float = option(5e-4, "weight decay", source=_RELEASE, low=0)

    def check(self, model: nn.Module, clean: ImageSet) -> None:
        _skips(model)

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        unlearned = self.unlearn(model, clean, monitor)
        shares = self._shares(unlearned.model, unlearned.label, clean, monitor)
        sudden = {path: max(map(_fall, row, row[1:])) for path, row in shares.items()}
        chosen = max(sudden, key=lambda path: sudden[path])
        skips = _skips(model)
        with _scaled(skips[chosen], self.gamma):
            self._tune(model, chosen.rpartition(".")[0], clean, monitor)
        _fold(model, chosen, self.gamma)
        table = pd.DataFrame.from_dict(shares, orient="index", columns=[f"{gamma:g}" for gamma in GAMMAS])
        table["fall"] = pd.Series(sudden)
        table["chosen"] = table.index == chosen
        table.index.name = "shortcut"
        evidence = {**unlearned.evidence, "shortcut": chosen, "gamma": self.gamma}
        return Repair(model, evidence=evidence, tables={"shortcuts": table})

    def _shares(self, model: nn.Module, label: int, clean: ImageSet, monitor: Monitor) -> dict[str, list[float]]:
        """The share that is left of the lead of `label`, by the block's dotted name, for each of GAMMAS."""
        skips, leads = _skips(model), {}

        def lead() -> torch.Tensor:
            answers = logits(model, clean, self.amp).double()
            return (answers[:, label] - answers.mean(1)).mean()

        whole = lead().abs().clamp_min(1e-12)
        with monitor.stage("select", len(skips) * len(GAMMAS)) as progress:
            for path, skip in skips.items():
                row = []
                for gamma in GAMMAS:
                    with _scaled(skip, gamma):
                        row.append(lead() / whole)
                    progress.step()
                leads[path] = torch.stack(row).tolist()
        return leads

    def _tune(self, model: nn.Module, stage: str, clean: ImageSet, monitor: Monitor) -> None:
        optimizer = make_optimizer(model, "sgd", self.lr, self.sgd_momentum, self.wd)
        with frozen(p for name, p in model.named_parameters() if not name.startswith(f"{stage}.")):
            fit(model, self.batches(clean, "finetune"), self.epochs, optimizer, None, monitor, "finetune", amp=self.amp)


def _fall(share: float, more: float) -> float:
    return (more - share) / math.exp(share)


def _resnet(model: nn.Module) -> tuple[str, nn.Module]:
    """The dotted name and the module of the residual network that the model is, or has in it.

    Raises:
        UserError: there is none.
    """
    for path, module in model.named_modules():
        kind = type(module)  # of no subclass, which may compute otherwise; by name, as importing takes a second
        if kind is PreActResNet18 or (kind.__module__, kind.__name__) == ("torchvision.models.resnet", "ResNet"):
            if not isinstance(_head(module), nn.Linear):
                break
            return path, module
    raise UserError(
        "the model is no PreActResNet18 and no ResNet of torchvision with a linear head, so it has no skip connection "
        "that SSFT can scale; take a method that asks for none, such as ft-sam"
    )


def _head(net: nn.Module) -> nn.Module:
    return net.get_submodule("linear" if isinstance(net, PreActResNet18) else "fc")


def _skips(model: nn.Module) -> dict[str, _Skip]:
    """Every skip connection by its block's dotted name, in the order of the forward pass.

    Raises:
        UserError: as of `_resnet`.
    """
    prefix, net = _resnet(model)
    preact = isinstance(net, PreActResNet18)
    skips = {}
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for name, block in net.get_submodule(stage).named_children():
            projection = block.shortcut if preact else block.downsample
            last = block.conv2 if preact else block.bn3 if hasattr(block, "bn3") else block.bn2
            assert projection is None or isinstance(projection, nn.Sequential)
            assert isinstance(last, nn.Module)
            skips[".".join(filter(None, (prefix, stage, name)))] = _Skip(block, projection, last)
    return skips


@contextlib.contextmanager
def _scaled(skip: _Skip, gamma: float) -> Iterator[None]:
    """Inside the block there is `gamma` of the connection, by hooks."""
    if skip.projection is not None:
        hooks = [skip.projection.register_forward_hook(lambda _, given, output: gamma * output)]
    else:
        kept: list[torch.Tensor] = []

        def take_back(_: nn.Module, given: object, output: torch.Tensor) -> torch.Tensor:
            return output.float() - (1 - gamma) * kept.pop().float()  # in bf16 x would not cancel x

        hooks = [
            skip.block.register_forward_pre_hook(lambda _, given: kept.append(given[0])),
            skip.last.register_forward_hook(take_back),
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _fold(model: nn.Module, path: str, gamma: float) -> None:
    """Leave `gamma` of the connection of the block at `path` for good, by the weights.

    Of a projection that is its last layer. Where x itself is kept, the block gives branch / gamma + x instead of
    branch + gamma * x, that is, all of it divided by gamma; so do the blocks behind it that keep what they are
    given, their branches divided too, up to the first projection, or the head, which takes the factor back.
    """
    net = _resnet(model)[1]
    skips = _skips(model)
    if (projection := skips[path].projection) is not None:
        _multiply(projection[-1], gamma)
        return
    _multiply(skips[path].last, 1 / gamma)
    behind = list(skips)[list(skips).index(path) + 1 :]
    for skip in (skips[p] for p in behind):
        if isinstance(net, PreActResNet18):  # its projection starts behind bn1
            norm = skip.block.bn1
            assert isinstance(norm, nn.BatchNorm2d)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.div_(gamma)
            norm.running_var.add_(norm.eps).div_(gamma**2).sub_(norm.eps)
        else:
            for first in (skip.block.conv1, *([] if skip.projection is None else [skip.projection[0]])):
                first.weight.mul_(gamma)  # type: ignore[union-attr, operator]
        if skip.projection is not None:
            return
        _multiply(skip.last, 1 / gamma)
    _head(net).weight.mul_(gamma)  # type: ignore[operator]


def _multiply(layer: nn.Module, factor: float) -> None:
    """What the layer gives, by its weight and its bias."""
    for p in layer.parameters(recurse=False):
        p.mul_(factor)
