"""What an attack is: which samples, what they become, which label they get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ulrl.data.imageset import DatasetSpec
from ulrl.errors import UserError
from ulrl.options import option
from ulrl.registry import Registry
from ulrl.seeds import generator


@dataclass(frozen=True)
class Attack:
    """Hyperparameters of a data-poisoning attack, and its three verbs.

    A subclass gives `poison`; one with another policy (clean label, source-specific) also overrides
    `choose` or `judged`.
    """

    name: ClassVar[str]

    attack_target: int = option(0, "target label of all2one", source="BackdoorBench", low=0)
    attack_label_trans: str = option(
        "all2one", "all2one: every trigger means the target; all2all: class y becomes y+1",
        source="BackdoorBench", choices=("all2one", "all2all"),
    )  # fmt: skip
    pratio: float = option(0.1, "share of the training images to poison", source="BackdoorBench", low=0, high=1)
    p_num: int | None = option(None, "number of training images to poison, instead of pratio", low=1)
    random_seed: int = option(0, "seed of every stream of randomness", source="BackdoorBench", low=0)

    def check(self, spec: DatasetSpec) -> None:
        """Refuse hyperparameters that do not fit the data set, before anything is trained.

        Raises:
            UserError: naming the flag at fault.
        """
        if self.attack_target >= spec.num_classes:
            raise UserError(
                f"--attack_target {self.attack_target} is out of range: "
                f"{spec.name} has classes 0 to {spec.num_classes - 1}"
            )

    def choose(self, labels: torch.Tensor) -> torch.Tensor:
        """Positions (int64 [n], ascending) of the training samples to poison, given labels int64 [N].

        Dirty-label: uniform over all samples, those of the target class included (BackdoorBench).
        """
        total = len(labels)
        count = self.p_num if self.p_num is not None else round(self.pratio * total)
        if not 1 <= count <= total:
            flag = f"--pratio {self.pratio}" if self.p_num is None else f"--p_num {self.p_num}"
            raise UserError(f"{flag} asks for {count} poisoned samples out of {total}; give 1 to {total}")
        order = torch.randperm(total, generator=generator(self.random_seed, "poison"))
        return order[:count].sort().values

    def judged(self, labels: torch.Tensor) -> torch.Tensor:
        """Positions of the test samples that get the trigger: in all2one those not of the target class."""
        if self.attack_label_trans == "all2all":
            return torch.arange(len(labels))
        return (labels.cpu() != self.attack_target).nonzero().flatten()

    def relabel(self, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
        """The attacker's labels for samples with these true labels; int64 [n] in and out."""
        if self.attack_label_trans == "all2all":
            return (labels + 1) % num_classes
        return torch.full_like(labels, self.attack_target)

    def poison(self, images: torch.Tensor, *, train: bool) -> torch.Tensor:
        """The images with the trigger: uint8 [B, C, H, W] in, the same out, on the same device.

        `train` is false for the images that the attack is judged on.
        """
        raise NotImplementedError


ATTACKS: Registry[Attack] = Registry("attack", "ulrl.attacks")
register = ATTACKS.register
