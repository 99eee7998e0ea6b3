"""Input-aware dynamic backdoor (Nguyen and Tran, arXiv 2010.08138): each image gets a trigger of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ulrl.attacks.base import Attack, register
from ulrl.attacks.control import cross_positions, parts, poison_share
from ulrl.attacks.generators import centred, fresh, packed, restored, uncentred
from ulrl.attacks.images import whole_pixels
from ulrl.attacks.lab import Lab
from ulrl.data.batches import normalise, pixels
from ulrl.machine import eval_batch
from ulrl.options import option
from ulrl.seeds import generator


@register("inputaware")
@dataclass(frozen=True)
class InputAware(Attack):
    """x + (G(x) - x) M(x): a generator paints the trigger, a mask network says where.

    First the mask network learns to cover little and to differ between images; then generator and
    classifier are trained together. Cross samples carry another image's trigger and keep their label.
    """

    controls_training: ClassVar[bool] = True
    trigger_from_training: ClassVar[bool] = True

    ignored: ClassVar[tuple[str, ...]] = tuple(
        (
            "random_rotation random_crop EPSILON lr_C C_lr_scheduler schedulerG_milestones schedulerC_milestones "
            "schedulerM_milestones schedulerG_lambda schedulerC_lambda schedulerM_lambda"
        ).split()
    )
    lr_G: float = option(0.01, "learning rate of the generator (Adam)", source="paper", low=0)
    lr_M: float = option(0.01, "learning rate of the mask network (Adam)", source="paper", low=0)
    lambda_div: float = option(1.0, "weight of the diversity of masks and patterns", source="paper", low=0)
    lambda_norm: float = option(100.0, "weight of the mask's size", source="paper", low=0)
    mask_density: float = option(
        0.032, "share of the image that a mask may cover freely", source="paper", low=0, high=1
    )
    cross_ratio: float = option(1.0, "cross samples for each poisoned one", source="paper", low=0)
    clean_train_epochs: int = option(25, "epochs of the mask network, before the others", source="BackdoorBench", low=1)
    generator_width: int = option(32, "channels of both networks at full size", source="paper", low=1)

    def learn(self, lab: Lab) -> InputAware:
        return self.with_learned(**lab.once("mask", lambda: self._learn_mask(lab)))

    def _learn_mask(self, lab: Lab) -> dict[str, torch.Tensor]:
        spec, device = lab.data.spec, lab.data.device
        network = fresh(spec.channels, 1, self.generator_width, self.random_seed, "mask network", device)
        optimizer = torch.optim.Adam(network.parameters(), self.lr_M, betas=(0.5, 0.9))
        epochs = self.clean_train_epochs

        def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            images = centred(pixels(x, spec))
            mask = _mask(model(images))
            size = F.relu(mask - self.mask_density).mean()
            loss = self.lambda_norm * size + self.lambda_div * _alike(images, mask)
            return loss, mask.detach().flatten(1).mean(1) <= self.mask_density

        drops = torch.optim.lr_scheduler.MultiStepLR(optimizer, [10, 20], 0.1)
        lab.fit(network, "mask", epochs=epochs, optimizer=optimizer, scheduler=drops, objective=objective)
        return packed("mask", network)

    def train(self, model: nn.Module, lab: Lab) -> InputAware:
        spec, device = lab.data.spec, lab.data.device
        mask_net = restored("mask", self.learned, device)
        painter = fresh(spec.channels, spec.channels, self.generator_width, self.random_seed, "generator", device)
        optimizer = torch.optim.Adam(painter.parameters(), self.lr_G, betas=(0.5, 0.9))
        stream, share = generator(self.random_seed, "mix", device), poison_share(self, lab)

        def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            optimizer.zero_grad()  # SAM asks twice for each step, and the second answer counts
            bad, crossed = parts(len(x), share, share * self.cross_ratio, stream)
            images = centred(pixels(x, spec))
            # Patterns and masks of the images to poison, then of as many others as these and the cross samples. Two at
            # least, for one image of 8x8 ends as one pixel, and BatchNorm takes no statistics of one value.
            others = torch.randint(len(x), (max(bad + crossed, 2 - bad),), generator=stream, device=device)
            shown = torch.cat([images[:bad], images[others]])
            pattern, mask = torch.tanh(painter(shown)), _mask(mask_net(shown))
            own = torch.arange(bad, device=device)
            used = torch.cat([own, torch.arange(2 * bad, 2 * bad + crossed, device=device)])
            stamped = images[: bad + crossed] + (pattern[used] - images[: bad + crossed]) * mask[used]
            labels = torch.cat([self.relabel(y[:bad], spec.num_classes), y[bad:]])
            logits = model(torch.cat([normalise(uncentred(stamped), spec), x[bad + crossed :]]))
            loss = F.cross_entropy(logits, labels)
            if bad:
                loss = loss + self.lambda_div * _alike(shown[: 2 * bad], pattern[: 2 * bad])
            return loss, logits.detach().argmax(1) == labels

        lab.fit(model, objective=objective, after_step=optimizer.step)
        return self.with_learned(**packed("generator", painter))

    @torch.no_grad()
    def _stamped(self, images: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        """Images with the triggers that belong to `sources`; all uint8 [B, C, H, W]."""
        painter, mask_net = (restored(name, self.learned, images.device) for name in ("generator", "mask"))
        done = []
        size = eval_batch(images.device)
        for image, source in zip(centred(images).split(size), centred(sources).split(size), strict=True):
            pattern, mask = torch.tanh(painter(source)), _mask(mask_net(source))
            done.append(whole_pixels(uncentred(image + (pattern - image) * mask)))
        return torch.cat(done) if done else images

    def poison(self, images: torch.Tensor, *, train: bool) -> torch.Tensor:
        return self._stamped(images, images)

    def covers(self, labels: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return cross_positions(self, labels, chosen, self.cross_ratio * len(chosen) / len(labels))

    def cover(self, images: torch.Tensor) -> torch.Tensor:
        stream = generator(self.random_seed, "cross", images.device)
        return self._stamped(images, images[torch.randperm(len(images), generator=stream, device=images.device)])


def _mask(raw: torch.Tensor) -> torch.Tensor:
    """[B, 1, H, W] in [0, 1], pushed to its ends: tanh(20 m - 10) / 2 + 1/2 with m = tanh(raw) / 2 + 1/2."""
    return torch.tanh(10 * torch.tanh(raw)) / 2 + 0.5


def _alike(images: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """How far apart images are over how far apart what was made of them is: first half against second."""
    half = len(images) // 2

    def distance(t: torch.Tensor) -> torch.Tensor:
        return (t[:half] - t[half : 2 * half]).float().square().flatten(1).mean(1).add(1e-12).sqrt()

    return (distance(images) / (distance(made) + 1e-7)).mean()
