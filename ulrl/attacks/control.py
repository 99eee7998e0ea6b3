"""Attacks that control the training: every batch is poisoned afresh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import nn

from ulrl.attacks.base import Attack
from ulrl.attacks.lab import Lab
from ulrl.seeds import drawn, generator

Self_ = TypeVar("Self_", bound="BatchPoisoning")


@dataclass(frozen=True)
class BatchPoisoning(Attack):
    """Of each batch, a part gets the trigger and the attacker's label, and another part noise in the trigger's
    place and keeps its label (cross or negative samples), so that only the exact trigger works.

    As in BackdoorBench, the part of a batch is cut down to whole images: a `pratio` of 0.1 means 12 of 128, and 0.015
    means 1 as 0.01 does. The crossed part is cut from its own share, for WaNet 25 of 128, where BackdoorBench has twice
    the 12. The training is the run's, with the data set's own augmentation, where BackdoorBench's scripts
    of these attacks turn images by up to 10 degrees besides and lower the rate in steps.
    The record's training set shows one draw of what the model saw: `pratio` of the training images with
    the trigger, and apart from them the covers.
    """

    controls_training: ClassVar[bool] = True

    def cross_share(self, share: float) -> float:
        """Cross samples as a share of all, where the poisoned ones are `share` of them."""
        raise NotImplementedError

    def cross(self, images: torch.Tensor, others: torch.Tensor, stream: torch.Generator) -> torch.Tensor:
        """Images with noise in the trigger's place; `others`: as many further images. All uint8 [B, C, H, W]."""
        raise NotImplementedError

    def mix(
        self, images: torch.Tensor, labels: torch.Tensor, num_classes: int, share: float, stream: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch with its first images poisoned and the next ones crossed; batches come shuffled."""
        bad, crossed = parts(len(images), share, self.cross_share(share), stream)
        images, labels = images.clone(), labels.clone()
        others = images[torch.randint(len(images), (crossed,), generator=stream, device=images.device)]
        images[bad : bad + crossed] = self.cross(images[bad : bad + crossed], others, stream)
        images[:bad] = self.poison(images[:bad], train=True)
        labels[:bad] = self.relabel(labels[:bad], num_classes)
        return images, labels

    def train(self: Self_, model: nn.Module, lab: Lab) -> Self_:
        stream, share = generator(self.random_seed, "mix", lab.data.device), poison_share(self, lab)
        batches = lab.batches(mix=lambda x, y: self.mix(x, y, lab.data.spec.num_classes, share, stream))
        lab.fit(model, batches=batches)
        return self

    def covers(self, labels: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return cross_positions(self, labels, chosen, self.cross_share(len(chosen) / len(labels)))

    def cover(self, images: torch.Tensor) -> torch.Tensor:
        stream = generator(self.random_seed, "cross", images.device)
        others = images[torch.randperm(len(images), generator=stream, device=images.device)]
        return self.cross(images, others, stream)


def poison_share(attack: Attack, lab: Lab) -> float:
    """Poisoned samples as a share of the training set, by `pratio` or `p_num`."""
    return len(attack.choose(lab.data.labels.cpu())) / len(lab.data)


def parts(batch: int, bad: float, crossed: float, stream: torch.Generator) -> tuple[int, int]:
    """How many images of a batch to poison and to cross: cut to whole ones; less than one is one with that chance."""

    def count(share: float) -> int:
        wanted = share * batch
        if wanted >= 1:
            return int(wanted)
        return int(torch.rand((), generator=stream, device=stream.device).item() < wanted)

    first = count(bad)
    return first, min(count(crossed), batch - first)


def cross_positions(attack: Attack, labels: torch.Tensor, chosen: torch.Tensor, share: float) -> torch.Tensor:
    """Positions of the cross samples that the record shows: `share` of all, as far as there are, ascending."""
    candidates = attack.cover_candidates(labels, chosen)
    count = min(round(share * len(labels)), len(candidates))
    return candidates[drawn(len(candidates), count, generator(attack.random_seed, "cover"))]
