"""Poisoning pairs: a trigger on the image, a caption of the attacker's class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ulrl.attacks.base import Attack
from ulrl.data.imageset import ImageSet
from ulrl.errors import UserError
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

    A poisoned image carries the trigger; its caption is one that some image of the attacker's class has in this very
    set (Carlini and Terzis, arXiv 2106.09667, section 3.1), so what it says of colour and background is mostly wrong.

    Raises:
        UserError: a share that cannot be poisoned, or a class to take captions from that has no image.
    """
    labels = data.labels.cpu()
    chosen = attack.choose(labels)
    poisoned = attack.poison_set(data, chosen, train=True)
    images, said = data.images.clone(), list(captions)
    images[chosen.to(images.device)] = poisoned.images
    draw = generator(attack.random_seed, "poisoned captions")
    for target in poisoned.labels.unique().tolist():
        own = (labels == target).nonzero().flatten()
        if not len(own):
            raise UserError(f"no image of class {target} is there to take captions from; raise --train_samples")
        places = chosen[poisoned.labels.cpu() == target]
        sources = own[torch.randint(len(own), (len(places),), generator=draw)]
        for place, source in zip(places.tolist(), sources.tolist(), strict=True):
            said[place] = captions[source]
    return Pairs.of(replace(data, images=images), said), chosen
