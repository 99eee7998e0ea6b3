"""What an attack is: which samples, what they become, which label they get, and what it learns for that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeVar

import torch
from torch import nn

from ulrl.attacks.lab import Lab
from ulrl.data.imageset import DatasetSpec, ImageSet, PoisonedSet
from ulrl.errors import UserError
from ulrl.options import option
from ulrl.registry import Registry
from ulrl.seeds import drawn, generator

Self_ = TypeVar("Self_", bound="Attack")


@dataclass(frozen=True)
class Attack:
    """Hyperparameters of a backdoor attack, and its verbs.

    `poison` is all that a fixed trigger needs. One with another policy (clean-label, source-specific,
    covers) overrides `choose`, `covers` or `judged`; one whose trigger is computed overrides `learn`; one
    that controls the training overrides `train`. Both of these return the attack with what it learned.

    learned: tensors by name, found by `learn` or `train`.
    """

    name: ClassVar[str]
    chooses: ClassVar[bool] = True  # poisons as many training images as `pratio` or `p_num` says, or none for good
    controls_training: ClassVar[bool] = False  # poisons batch by batch: there is no fixed poisoned training set
    needs_clean_model: ClassVar[bool] = False  # computes its trigger against a model without a backdoor
    ignored: ClassVar[tuple[str, ...]] = ()  # options of BackdoorBench's script without a meaning here
    trigger_from_training: ClassVar[bool] = False  # there is no trigger before the model is trained

    learned: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)
    attack_target: int = option(0, "target label of all2one", source="BackdoorBench", low=0)
    attack_label_trans: str = option(
        "all2one", "all2one: every trigger means the target; all2all: class y becomes y+1",
        source="BackdoorBench", choices=("all2one", "all2all"),
    )  # fmt: skip
    pratio: float = option(0.1, "share of the training images to poison", source="BackdoorBench", low=0, high=1)
    p_num: int | None = option(None, "number of training images to poison, instead of pratio", low=1)
    random_seed: int = option(0, "seed of every stream of randomness", source="BackdoorBench", low=0, high=2**32 - 1)

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
        return self._draw(torch.arange(len(labels)), len(labels), "samples")

    def _draw(self, candidates: torch.Tensor, out_of: int, what: str) -> torch.Tensor:
        """`p_num` of the candidates' positions, or `pratio` of a whole of `out_of`, at random; ascending."""
        count = self.p_num if self.p_num is not None else round(self.pratio * out_of)
        if not 1 <= count <= len(candidates):
            flag = f"--pratio {self.pratio}" if self.p_num is None else f"--p_num {self.p_num}"
            raise UserError(
                f"{flag} asks for {count} poisoned samples out of {len(candidates)} {what}; give 1 to {len(candidates)}"
            )
        return candidates[drawn(len(candidates), count, generator(self.random_seed, "poison"))]

    def covers(self, labels: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Positions (int64 [n], ascending) of samples that are changed but keep their label; none as a rule."""
        return chosen.new_empty(0)

    def may_cover(self, labels: torch.Tensor) -> torch.Tensor:
        """bool [N]: whose label tells a cover from a poisoned sample; in all2one those not of the target class."""
        return labels != self.attack_target if self.attack_label_trans == "all2one" else torch.ones_like(labels).bool()

    def cover_candidates(self, labels: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Positions (int64 [n], ascending) of the samples that may become covers: none of those `chosen` to poison."""
        free = self.may_cover(labels)
        free[chosen] = False
        return free.nonzero().flatten()

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

    def learn(self: Self_, lab: Lab) -> Self_:
        """Compute what the trigger needs, before anything is poisoned."""
        return self

    def poison(self, images: torch.Tensor, *, train: bool) -> torch.Tensor:
        """The images with the trigger: uint8 [B, C, H, W] in, the same out, on the same device.

        `train` is false for the images that the attack is judged on.
        """
        raise NotImplementedError

    def cover(self, images: torch.Tensor) -> torch.Tensor:
        """What cover samples become, uint8 [B, C, H, W] in and out: they carry the training trigger too."""
        return self.poison(images, train=True)

    def source(self, data: ImageSet, positions: torch.Tensor, *, train: bool) -> ImageSet:
        """The samples at `positions` as the trigger is laid over them: as they are, or what an attack puts in their
        place (perturbed images, ready-made ones)."""
        return data.subset(positions)

    def poison_set(self, data: ImageSet, positions: torch.Tensor, *, train: bool) -> PoisonedSet:
        """The samples at `positions` with trigger and attacker's label; original indices are positions."""
        part = self.source(data, positions, train=train)
        labels = self.relabel(part.labels, data.spec.num_classes)
        images = self.poison(part.images, train=train) if len(part) else part.images
        return PoisonedSet(images, labels, data.spec, part.labels, positions.to(data.device))

    def cover_set(self, data: ImageSet, positions: torch.Tensor) -> PoisonedSet:
        """The cover samples at `positions`: changed images, true labels."""
        part = data.subset(positions)
        images = self.cover(part.images) if len(part) else part.images
        return PoisonedSet(images, part.labels, data.spec, part.labels, positions.to(data.device))

    def train(self: Self_, model: nn.Module, lab: Lab) -> Self_:
        """Train `model` in place on `lab.data`, the training set as this attack has poisoned it."""
        lab.fit(model)
        return self

    def parameters(self, spec: DatasetSpec) -> Mapping[str, torch.Tensor]:
        """What the trigger is made of, for the record: pictures, fields, networks; on the CPU."""
        return self.learned

    def with_learned(self: Self_, **learned: torch.Tensor) -> Self_:
        """This attack with more learned tensors."""
        return replace(self, learned={**self.learned, **learned})


@dataclass(frozen=True)
class CleanLabel(Attack):
    """An attack that poisons images of the target class only and leaves their labels true."""

    pratio: float = option(0.5, "share of the target class (see pratio_of) to poison", low=0, high=1)
    pratio_of: str = option(
        "class", "what pratio is a share of: the target class, or all training images as in BackdoorBench",
        choices=("class", "all"),
    )  # fmt: skip

    def check(self, spec: DatasetSpec) -> None:
        super().check(spec)
        one_target_only(self)

    def choose(self, labels: torch.Tensor) -> torch.Tensor:
        """As in the base, over the samples of the target class."""
        own = (labels == self.attack_target).nonzero().flatten()
        out_of = len(own) if self.pratio_of == "class" else len(labels)
        return self._draw(own, out_of, f"of the target class {self.attack_target}")


@dataclass(frozen=True)
class Covered(Attack):
    """An attack with cover samples: they carry the trigger, or a part of it, and keep their label."""

    pratio: float = option(0.003, "share of the training images to poison", source="backdoor-toolbox", low=0, high=1)
    cover_rate: float = option(
        0.003, "share of the training images that carry the trigger and keep their label",
        source="backdoor-toolbox", low=0, high=1,
    )  # fmt: skip

    def covers(self, labels: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        candidates = self.cover_candidates(labels, chosen)
        count = round(self.cover_rate * len(labels))
        if count > len(candidates):
            raise UserError(
                f"--cover_rate {self.cover_rate} asks for {count} cover samples out of {len(candidates)}; lower it"
            )
        return candidates[drawn(len(candidates), count, generator(self.random_seed, "cover"))]


def one_target_only(attack: Attack) -> None:
    """Refuse all2all where it has no meaning.

    Raises:
        UserError
    """
    if attack.attack_label_trans != "all2one":
        raise UserError(
            f"--attack_label_trans {attack.attack_label_trans} has no meaning for {attack.name}, "
            "which has one target class; leave it at all2one"
        )


ATTACKS: Registry[Attack] = Registry("attack", "ulrl.attacks")
register = ATTACKS.register
