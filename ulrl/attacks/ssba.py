"""SSBA (Li et al., arXiv 2012.03816): a bit hidden in each image by a steganographic encoder."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from ulrl.attacks.base import Attack, register
from ulrl.attacks.generators import centred, fresh, packed, restored, uncentred
from ulrl.attacks.images import read_bank, whole_pixels
from ulrl.attacks.lab import Lab
from ulrl.data.batches import pixels
from ulrl.data.imageset import DatasetSpec, ImageSet
from ulrl.errors import UserError
from ulrl.machine import eval_batch
from ulrl.options import option
from ulrl.seeds import generator

log = logging.getLogger(__name__)


@register("ssba")
@dataclass(frozen=True)
class SSBA(Attack):
    """An encoder adds a residue that depends on the image and carries one bit, which a decoder reads back.

    Both are trained in the run, as StegaStamp's are but smaller: the encoder sees the image and the bit
    as a further plane, the loss is the decoder's cross-entropy + `ssba_fidelity` times the residue's mean
    square. The residue is scaled by the contrast of each place, for it shows less where the image is busy;
    StegaStamp's perceptual loss, which needs a large network, has that effect. Poisoned images carry bit 1.
    Instead, ready-made images can be read from files, which is BackdoorBench's way.
    """

    attack_train_replace_imgs_path: str | None = option(
        None, ".npy of the whole training split with the bit: uint8 [N, H, W, C]; computed when not given"
    )
    attack_test_replace_imgs_path: str | None = option(None, "the same for the test split")
    ssba_epochs: int = option(3, "epochs of encoder and decoder", low=1)
    ssba_samples: int = option(10000, "training images they are trained on, at most", low=2)
    ssba_strength: float = option(0.1, "largest change of a pixel, as a share of 255", low=0, high=1)
    ssba_fidelity: float = option(2.0, "weight of the residue's mean square; rises to that over the first epoch", low=0)

    def check(self, spec: DatasetSpec) -> None:
        super().check(spec)
        if bool(self.attack_train_replace_imgs_path) != bool(self.attack_test_replace_imgs_path):
            raise UserError(
                "give both of --attack_train_replace_imgs_path and --attack_test_replace_imgs_path, or none"
            )

    def learn(self, lab: Lab) -> SSBA:
        if path := self.attack_train_replace_imgs_path:
            rows = lab.origin[self.choose(lab.data.labels.cpu())]
            bank = read_bank(path, "--attack_train_replace_imgs_path", rows, lab.data.spec)
            return self.with_learned(train_images=bank)
        return self.with_learned(**lab.once("encoder", lambda: self._learn_encoder(lab)))

    def _learn_encoder(self, lab: Lab) -> dict[str, torch.Tensor]:
        spec, device = lab.data.spec, lab.data.device
        encoder = fresh(spec.channels + 1, spec.channels, 16, self.random_seed, "encoder", device)
        decoder = nn.Sequential(
            fresh(spec.channels, 1, 16, self.random_seed, "decoder", device), nn.AdaptiveAvgPool2d(1), nn.Flatten(0)
        )
        both = nn.ModuleList([encoder, decoder])

        def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            images = centred(pixels(x, spec))
            bits = (torch.arange(len(x), device=device) % 2).float()  # batches come shuffled
            residue = self._residue(encoder, images, bits)
            read = decoder((images + residue).clamp(-1, 1)).float()
            loss = F.binary_cross_entropy_with_logits(read, bits)
            visible = residue.square().mean()
            weight = self.ssba_fidelity * min(1.0, state["step"] / first_epoch)  # from the start it would silence it
            return loss + weight * visible, (read.detach() > 0) == (bits > 0)

        optimizer = torch.optim.Adam(both.parameters(), 1e-3)
        constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        order = torch.randperm(len(lab.data), generator=generator(self.random_seed, "encoder images"))
        few = replace(lab, data=lab.data.subset(order[: self.ssba_samples]))
        state, first_epoch = {"step": 0}, len(few.batches())

        def after_step() -> None:
            state["step"] += 1

        few.fit(
            both, "encoder", epochs=self.ssba_epochs, optimizer=optimizer, scheduler=constant, objective=objective,
            after_step=after_step,
        )  # fmt: skip
        read = lab.monitor.history[-1]["acc"]
        if read < 0.9:
            log.warning(
                "the decoder reads %.0f%% of the bits: lower --ssba_fidelity or raise --ssba_epochs", 100 * read
            )
        return packed("encoder", encoder)

    def _residue(self, encoder: nn.Module, images: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
        plane = (2 * bits - 1).view(-1, 1, 1, 1).expand(-1, 1, *images.shape[2:])
        strength = 2 * self.ssba_strength * _busyness(images)
        return strength * torch.tanh(encoder(torch.cat([images, plane], 1)))

    def source(self, data: ImageSet, positions: torch.Tensor, *, train: bool) -> ImageSet:
        part = super().source(data, positions, train=train)
        if not self.attack_test_replace_imgs_path:
            return part
        if train:
            return replace(part, images=self.learned["train_images"].to(data.device))
        flag = "--attack_test_replace_imgs_path"
        bank = read_bank(self.attack_test_replace_imgs_path, flag, positions, data.spec)
        return replace(part, images=bank.to(data.device))

    @torch.no_grad()
    def poison(self, images: torch.Tensor, *, train: bool) -> torch.Tensor:
        if self.attack_test_replace_imgs_path:
            return images  # they come with the bit
        encoder = restored("encoder", self.learned, images.device)
        done = []
        for part in centred(images).split(eval_batch(images.device)):
            residue = self._residue(encoder, part, torch.ones(len(part), device=images.device))
            done.append(whole_pixels(uncentred(part + residue)))
        return torch.cat(done)


def _busyness(images: torch.Tensor) -> torch.Tensor:
    """How much of a residue a place hides, 0.1 where it is flat, near 1 where it is full of contrast: [B, C, H, W]."""
    mean, square = (F.avg_pool2d(t, 3, 1, 1, count_include_pad=False) for t in (images, images.square()))
    contrast = (square - mean.square()).clamp_min(0).sqrt()
    return 0.1 + 0.9 * contrast / (contrast + 0.1)
