"""NPD: a linear neural polarizer that filters the trigger out of a late layer (Zhu et al., arXiv 2306.16697)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ulrl.data.batches import Batches
from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import Defense, Repair, register
from ulrl.defenses.perturbation import pixel, still
from ulrl.errors import UserError
from ulrl.models.head import hidden_convolutions
from ulrl.options import option
from ulrl.training import Monitor, fit


@dataclass(frozen=True)
class _Place:
    """A convolution and what takes up a shift of its output: its own bias, or the BatchNorm right behind."""

    name: str
    convolution: nn.Conv2d
    norm: _BatchNorm | None


@register("npd")
@dataclass(frozen=True)
class NPD(Defense):
    """Train one linear layer (1x1 convolution, BatchNorm) late in the frozen model against targeted attacks.

    Per batch: a perturbation within L2 `trigger_norm` (pixels in [0, 1]) towards each image's second most
    likely class, in `inner_steps` signed steps that end where 60 % of the batch is fooled; then one step of
    the polarizer down lmd1 * clean loss + lmd2 * loss of the attacked images under the class that the model gives the
    clean ones - lmd3 * log(1 - p) - lmd4 * log(1 - q), with p the attacked images' probability of their most likely
    wrong class and q that of the attack's target. As in the release the clean samples are not augmented, and the rate
    is constant.

    The paper puts the polarizer before a convolution with padding, from where its shift cannot be folded into the
    model: at the borders the padding has none. Here it stands behind that convolution, before the BatchNorm
    that follows: in the same branch, one linear map later, where the repaired model takes it up exactly (the
    map into the convolution, the shift into its bias or into the BatchNorm's mean). It begins as the identity,
    with the statistics of the clean samples, so the paper's warm-up, which lets BatchNorm find them, is not
    needed. The layer is the last one that allows this (layer4.1.conv1 in a PreAct-ResNet18, which is the
    paper's choice), or `target_layer_name`. BackdoorBench saves the model without its polarizer.
    """

    ignored: ClassVar[tuple[str, ...]] = (
        "lr_scheduler", "client_optimizer", "print_freq", "model_name", "norm_type", "warm_epochs",
    )  # fmt: skip

    epochs: int = option(50, "epochs", source="BackdoorBench", low=1)
    lr: float = option(0.01, "learning rate", source="paper", low=0)
    sgd_momentum: float = option(0.9, "momentum", source="BackdoorBench", low=0, high=1)
    wd: float = option(5e-4, "weight decay", source="BackdoorBench", low=0)
    target_layer_name: str | None = option(None, "dotted name of the convolution, found when not given")
    trigger_norm: float = option(3.0, "L2 bound on a perturbation, pixels in [0, 1]", source="paper", low=0)
    adv_lr: float = option(0.1, "step of the attack", source="BackdoorBench", low=0)
    inner_steps: int = option(2, "steps of the attack at most", source="BackdoorBench", low=1)
    lmd1: float = option(1.0, "weight of the clean loss", source="paper", low=0)
    lmd2: float = option(0.4, "weight of the attacked images' loss", source="paper", low=0)
    lmd3: float = option(0.4, "weight of their most likely wrong class", source="paper", low=0)
    lmd4: float = option(0.4, "weight of the attack's target", source="paper", low=0)

    def check(self, model: nn.Module, clean: ImageSet) -> None:
        with still(model):
            _find(model, next(iter(Batches(clean, 2)))[0], clean.spec.num_classes, self.target_layer_name)

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        still_batches = Batches(clean, self.batch_size, drop_last=True)
        x = next(iter(still_batches))[0]
        scale = pixel(clean)
        with still(model):
            place = _find(model, x, clean.spec.num_classes, self.target_layer_name)
            plug = _identity(model, place, still_batches)
            hook = place.convolution.register_forward_hook(lambda _, inputs, output: plug(output))

            def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                model.eval()
                own, target, worst = self._attack(model, x, y, scale)
                logits, attacked = model(torch.cat([x, worst])).float().chunk(2)
                probabilities = attacked.softmax(1)
                wrong = probabilities.detach().scatter(1, y[:, None], -1).argmax(1)
                loss = self.lmd1 * F.cross_entropy(logits, y) + self.lmd2 * F.cross_entropy(attacked, own)
                for weight, avoided in ((self.lmd3, wrong), (self.lmd4, target)):
                    given = probabilities.gather(1, avoided[:, None])
                    loss = loss - weight * (1.0001 - given).log().mean()
                return loss, logits.detach().argmax(1) == y

            try:
                optimizer = torch.optim.SGD(plug.parameters(), self.lr, self.sgd_momentum, weight_decay=self.wd)
                fit(
                    model, self.batches(clean, "polarize", augmented=False), self.epochs, optimizer,
                    None, monitor, "polarize",
                    amp=self.amp, objective=objective,
                )  # fmt: skip
                model.eval()
                with torch.no_grad():
                    expected = model(x)
            finally:
                hook.remove()
            _fold(place, plug)
            with torch.no_grad():
                off = (model(x) - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
        if not off <= 1e-2:  # so that NaN is none
            raise UserError(f"the polarizer cannot be folded into {place.name}; choose another --target_layer_name")
        return Repair(model, evidence={"layer": place.name, "folding_error": off.item()})

    def _attack(
        self, model: nn.Module, x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(the class that the model gives each image, the class it is driven to, the perturbed images)."""
        with torch.no_grad():
            logits = model(x)
        target = logits.scatter(1, y[:, None], -torch.inf).argmax(1)
        delta = torch.zeros_like(x)
        for _ in range(self.inner_steps):
            delta.requires_grad_(True)
            attacked = model(x + delta * scale).float()
            (gradient,) = torch.autograd.grad(F.cross_entropy(attacked, target), delta)
            with torch.no_grad():
                moved = delta - self.adv_lr * gradient.sign()
                norms = moved.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
                moved = moved * (self.trigger_norm / norms).clamp_max(1)
                enough = (attacked.argmax(1) == target).float().mean() > 0.6
                delta = torch.where(enough, delta, moved)
        return logits.argmax(1), target, x + delta * scale


def _find(model: nn.Module, x: torch.Tensor, num_classes: int, name: str | None) -> _Place:
    """The last convolution but a head, or the named one, that can take up a linear map of its output, as the model runs
    on `x`.

    Raises:
        UserError: there is none, or the named one is none.
    """
    outputs: dict[str, tuple[nn.Conv2d, torch.Tensor]] = {}
    norms: list[tuple[_BatchNorm, torch.Tensor]] = []  # each with its input

    def saw(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            if isinstance(module, _BatchNorm):
                norms.append((module, inputs[0]))
            elif isinstance(module, nn.Conv2d) and module.groups == 1:
                outputs[path] = module, output

        return hook

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for path, module in model.named_modules():
            hooks.enter_context(module.register_forward_hook(saw(path)))
        model(x[:2])
    places, hidden = {}, hidden_convolutions(model, num_classes)
    for path, (convolution, output) in outputs.items():
        norm = next((n for n, given in norms if given is output and n.running_mean is not None), None)
        if path in hidden and (convolution.bias is not None or norm is not None):
            places[path] = _Place(path, convolution, norm)
    if not places:
        raise UserError("the model has no convolution with a bias or a BatchNorm behind it, which NPD needs")
    if name is not None and name not in places:
        raise UserError(f"--target_layer_name {name!r} is no such convolution; known: {', '.join(places)}")
    return places[name or list(places)[-1]]


@torch.no_grad()
def _identity(model: nn.Module, place: _Place, batches: Batches) -> nn.Sequential:
    """A polarizer, in eval mode, that changes nothing yet; its BatchNorm has the statistics of the clean samples."""
    channels = place.convolution.out_channels
    mix, norm = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels, momentum=None)
    nn.init.dirac_(mix.weight)
    plug = nn.Sequential(mix, norm).to(place.convolution.weight)

    def watch(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        norm(output)

    with place.convolution.register_forward_hook(watch):
        for x, _ in batches:
            model(x)
    plug.eval()
    assert norm.running_var is not None
    assert norm.running_mean is not None
    norm.weight.copy_((norm.running_var + norm.eps).sqrt())
    norm.bias.copy_(norm.running_mean)
    return plug


@torch.no_grad()
def _fold(place: _Place, plug: nn.Sequential) -> None:
    """Make the polarizer part of the model."""
    mix, norm = plug
    assert isinstance(mix, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    assert norm.running_mean is not None
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    matrix = (gain[:, None] * mix.weight[:, :, 0, 0]).double()
    shift = (norm.bias - gain * norm.running_mean).double()
    weight, bias = place.convolution.weight, place.convolution.bias
    weight.copy_(torch.einsum("oi,i...->o...", matrix, weight.double()))
    if bias is not None:
        bias.copy_(matrix @ bias.double() + shift)
    else:
        assert place.norm is not None
        assert place.norm.running_mean is not None
        place.norm.running_mean -= shift.to(place.norm.running_mean)
