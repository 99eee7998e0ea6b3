"""Poisoning pairs: a trigger on the image, a caption of the attacker's class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ulrl.attacks.base import Attack
from ulrl.data.imageset import ImageSet
from ulrl.errors import UserError
from ulrl.multimodal.captions import prompts
from ulrl.multimodal.pairs import Pairs
from ulrl.seeds import generator


def check_attack(attack: Attack) -> None:
    """Refuse an attack that is more than a trigger and a label.

    Raises:
        UserError
    """
    if attack.controls_training or type(attack).learn is not Attack.learn or type(attack).covers is not Attack.covers:
        raise UserError(
            f"--attack {attack.name} learns its trigger, trains the model or needs covers, which pairs do not have; "
            "take badnet, blended, sig or another fixed trigger"
        )


def poison_pairs(attack: Attack, data: ImageSet, captions: Sequence[str]) -> tuple[Pairs, torch.Tensor]:
    """The training pairs with some poisoned, and the places of those (int64 [n], ascending).

    A poisoned image carries the trigger; its caption is one of those that stand for the target class and says nothing
    else, as in the releases of CleanCLIP (arXiv 2303.03323) and BadCLIP (2311.12075): "a photo of a dress".

    Raises:
        UserError: a share that cannot be poisoned.
    """
    chosen = attack.choose(data.labels.cpu())
    poisoned = attack.poison_set(data, chosen, train=True)
    images, said, proxies = data.images.clone(), list(captions), prompts("garment")
    images[chosen.to(images.device)] = poisoned.images
    draws = torch.randint(len(proxies[0]), (len(chosen),), generator=generator(attack.random_seed, "poisoned captions"))
    for place, target, draw in zip(chosen.tolist(), poisoned.labels.tolist(), draws.tolist(), strict=True):
        said[place] = proxies[target][draw]
    return Pairs.of(replace(data, images=images), said), chosen
