"""LIRA (Doan et al., ICCV 2021): a generator learns an invisible trigger together with the classifier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ulrl.attacks.base import Attack, register
from ulrl.attacks.generators import centred, fresh, packed, restored, unpacked
from ulrl.attacks.images import whole_pixels
from ulrl.attacks.lab import Lab
from ulrl.data.batches import normalise, pixels
from ulrl.data.imageset import DatasetSpec
from ulrl.machine import eval_batch
from ulrl.options import option
from ulrl.training import Objective


@register("lira")
@dataclass(frozen=True)
class LIRA(Attack):
    """x + eps G(x), with G in [-1, 1] and pixels in [0, 1].

    First generator and classifier are trained together on alpha CE(x, y) + (1 - alpha) CE(x + eps G(x),
    target); then the generator is fixed and the classifier is trained on, with finetune_alpha. The
    classifier of that second stage is saved, where BackdoorBench saves the first one's.

    Both networks step on one gradient of the joint loss, where the paper alternates them. The generator
    is trained through the rounding to whole pixel values (as if it were not there), so its trigger is
    still there in the PNG files; for the same reason eps is in pixels and not in normalised values, where
    it would be a fourth of that on CIFAR-10. Clean
    and triggered images pass together: apart, the statistics of a batch tell BatchNorm which it is, and in
    eval mode the clean accuracy falls (to 69% from 89%, measured on Fashion-MNIST).

    No training sample is poisoned for good, so the record has no poisoned training set, and `pratio`
    means nothing.
    """

    chooses: ClassVar[bool] = False
    controls_training: ClassVar[bool] = True

    ignored: ClassVar[tuple[str, ...]] = tuple(
        (
            "random_rotation random_crop attack_model test_eps test_alpha optimizer fix_generator_epoch "
            "finetune_eps finetune_client_optimizer finetune_sgd_momentum finetune_wd finetune_lr "
            "finetune_lr_scheduler finetune_steplr_gamma finetune_steplr_milestones train_epoch finetune_epochs "
            "finetune_optimizer"
        ).split()
    )
    eps: float = option(0.01, "largest change of a pixel, as a share of 255", source="paper", low=0, high=1)
    alpha: float = option(0.5, "weight of the clean loss, first stage", source="paper", low=0, high=1)
    finetune_alpha: float = option(0.5, "weight of the clean loss, second stage", source="paper", low=0, high=1)
    lr_atk: float = option(1e-4, "learning rate of the generator (Adam)", source="paper", low=0)
    both_train_epochs: int = option(50, "epochs of the first stage", source="BackdoorBench", low=1)
    generator_width: int = option(16, "channels of the generator at full size", low=1)

    def choose(self, labels: torch.Tensor) -> torch.Tensor:
        return torch.empty(0, dtype=torch.int64)

    def learn(self, lab: Lab) -> LIRA:
        return self.with_learned(**lab.once("joint", lambda: self._learn_jointly(lab)))

    def _learn_jointly(self, lab: Lab) -> dict[str, torch.Tensor]:
        channels, device = lab.data.spec.channels, lab.data.device
        painter = fresh(channels, channels, self.generator_width, self.random_seed, "generator", device)
        optimizer = torch.optim.Adam(painter.parameters(), self.lr_atk)

        joint = self._objective(lab, painter, self.alpha)

        def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            optimizer.zero_grad()  # SAM asks twice for each step, and the second answer counts
            return joint(model, x, y)

        classifier = lab.new_model("initialisation")
        lab.fit(
            classifier, "joint", epochs=self.both_train_epochs, objective=objective, after_step=optimizer.step,
        )  # fmt: skip
        return {**packed("generator", painter), **packed("classifier", classifier)}

    def _objective(self, lab: Lab, painter: nn.Module, alpha: float) -> Objective:
        spec = lab.data.spec

        def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            image = pixels(x, spec)
            triggered = self._triggered(image, painter(centred(image)))
            triggered = triggered + (whole_pixels(triggered.detach()) - triggered).detach()
            clean, bad = model(torch.cat([x, normalise(triggered, spec)])).chunk(2)
            backdoor = F.cross_entropy(bad, self.relabel(y, spec.num_classes))
            return alpha * F.cross_entropy(clean, y) + (1 - alpha) * backdoor, clean.detach().argmax(1) == y

        return objective

    def train(self, model: nn.Module, lab: Lab) -> LIRA:
        model.load_state_dict(unpacked("classifier", self.learned))
        painter = restored("generator", self.learned, lab.data.device)
        lab.fit(model, objective=self._objective(lab, painter, self.finetune_alpha))
        return self

    def _triggered(self, image: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
        return (image + 255 * self.eps * torch.tanh(raw)).clamp(0, 255)

    @torch.no_grad()
    def poison(self, images: torch.Tensor, *, train: bool) -> torch.Tensor:
        painter = restored("generator", self.learned, images.device)
        parts = images.split(eval_batch(images.device))
        return torch.cat([whole_pixels(self._triggered(part.float(), painter(centred(part)))) for part in parts])

    def parameters(self, spec: DatasetSpec) -> Mapping[str, torch.Tensor]:
        return packed("generator", restored("generator", self.learned, torch.device("cpu")))
