"""Attacks on a repaired model by the one who planted the backdoor: does it come back?

retuned: "retuning attack" of arXiv 2410.09838: fine-tuning on a few clean images and five triggered ones.
query: "query-based reactivation attack" of the same paper: one perturbation for all images, found from what the
    repaired model answers, that makes it answer as the backdoored model does, and not a clean net (so that it is no
    ordinary adversarial perturbation). Its release trains a network that paints the perturbation; here it is learnt
    as it is.
universal: the white-box attack of arXiv 2405.16134: one perturbation on top of the trigger, towards the target.

Both perturbations are within 0.05 of the pixels' range in L-infinity; they are made on some triggered test images, from
which the five come too, and judged on 2,500 of the others, rounded to whole pixel values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from ulrl.data.batches import Batches, normalise
from ulrl.data.imageset import ImageSet, PoisonedSet
from ulrl.machine import autocast
from ulrl.metrics import share
from ulrl.seeds import generator
from ulrl.training import Monitor, accuracy, fit, make_optimizer, predict

EPS = 0.05
FEW = 5  # triggered images in retuning
CLEAN_SHARE = 0.02  # of the training images, in retuning
MADE_ON = 500  # triggered images that a perturbation is made on
PASSES = 10  # over them
JUDGED = 2_500  # others, at most: an ASR is known to 2 points (95%), in half of the time that all take
MIMICRY = 0.2  # query: weight of answering as the backdoored model does (the release's)

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Material:
    """What the attacker has: clean images, triggered ones to work with, and those that ASR is judged on."""

    clean: ImageSet
    made_on: PoisonedSet
    judged: PoisonedSet

    @classmethod
    def of(cls, train: ImageSet, poisoned: PoisonedSet) -> Material:
        """From the whole training split and a record's poisoned test set, always the same part of each."""
        few = torch.randperm(len(train), generator=generator(0, "reactivation clean"))
        few = few[: max(2, round(CLEAN_SHARE * len(train)))]
        order = torch.randperm(len(poisoned), generator=generator(0, "reactivation"))
        count = min(MADE_ON, len(poisoned) // 2)
        return cls(train.subset(few), poisoned.subset(order[:count]), poisoned.subset(order[count:][:JUDGED]))


def reactivate(
    model: nn.Module, backdoored: nn.Module, clean_net: nn.Module, clean_test: ImageSet, material: Material
) -> dict[str, float | None]:
    """ASR of `model` after each attack, ACC after retuning, and the ASR on the judged images before any."""
    retuned = retune(model, material)
    return {
        "before": attack_success(model, material.judged),
        "retuned": attack_success(retuned, material.judged),
        "retuned_acc": accuracy(retuned, clean_test),
        "query": attack_success(model, shifted(material.judged, query(model, backdoored, clean_net, material))),
        "universal": attack_success(model, shifted(material.judged, universal(model, material))),
    }


def attack_success(model: nn.Module, triggered: PoisonedSet) -> float | None:
    return share(predict(model, triggered) == triggered.labels)


def retune(model: nn.Module, material: Material) -> nn.Module:
    """A copy, after 5 epochs of SGD at 0.01 (momentum 0.9, batches of 128) on the clean images and five triggered."""
    model, few = copy.deepcopy(model), material.made_on.subset(torch.arange(min(FEW, len(material.made_on))))
    mixed = ImageSet(
        torch.cat([material.clean.images, few.images]), torch.cat([material.clean.labels, few.labels]), few.spec
    )
    optimizer = make_optimizer(model, "sgd", 0.01, 0.9)
    batches = Batches(mixed, 128, generator(0, "retune", mixed.device))
    fit(model, batches, 5, optimizer, None, Monitor(), "retune")
    return model.eval()


def universal(model: nn.Module, material: Material) -> torch.Tensor:
    """A perturbation that sends triggered images to the attacker's label: float32 [1, C, H, W] in pixel values."""

    def loss(x: torch.Tensor, labels: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(x).float(), labels)

    return _perturbation(model, material.made_on, loss)


def query(model: nn.Module, backdoored: nn.Module, clean_net: nn.Module, material: Material) -> torch.Tensor:
    """A perturbation with which `model` answers as the backdoored one does without, and a clean net the truth.

    Half of the images are triggered, half clean. float32 [1, C, H, W] in pixel values.
    """
    triggered = material.made_on
    clean = material.clean.subset(torch.arange(min(len(triggered), len(material.clean))))
    none = torch.zeros_like(clean.labels)
    both = triggered.joined(PoisonedSet(clean.images, clean.labels, clean.spec, clean.labels, none))

    def loss(x: torch.Tensor, _: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            answer = backdoored(normalise(both.images[at], both.spec)).float().softmax(1)
        mimicry = F.kl_div(model(x).float().log_softmax(1), answer, reduction="batchmean")
        return MIMICRY * mimicry + F.cross_entropy(clean_net(x).float(), both.original_labels[at])

    return _perturbation(model, both, loss)


def _perturbation(model: nn.Module, data: PoisonedSet, loss: Loss) -> torch.Tensor:
    """Signed steps of a tenth of the bound down `loss`, given the shifted images, their labels and positions."""
    model.eval()
    bound, stream = 255 * EPS, generator(0, "perturbation", data.device)
    delta = torch.zeros((1, *data.images.shape[1:]), device=data.device, requires_grad=True)
    for _ in range(PASSES):
        for at in torch.randperm(len(data), generator=stream, device=data.device).split(128):
            x = normalise((data.images[at] + delta).clamp(0, 255), data.spec)
            with autocast(data.device, True):
                value = loss(x, data.labels[at], at)
            (gradient,) = torch.autograd.grad(value, delta)
            with torch.no_grad():
                delta.sub_(bound / 10 * gradient.sign()).clamp_(-bound, bound)
    return delta.detach()


def shifted(data: PoisonedSet, delta: torch.Tensor) -> PoisonedSet:
    """The images with the perturbation, in whole pixel values."""
    return replace(data, images=(data.images + delta).clamp(0, 255).round().to(torch.uint8))
