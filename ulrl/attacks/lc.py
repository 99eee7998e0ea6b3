"""Label-consistent (Turner et al., arXiv 1912.02771): images made hard to recognise, then marked in the corners."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F

from ulrl.attacks.additive import Additive
from ulrl.attacks.base import CleanLabel, register
from ulrl.attacks.images import read_bank, whole_pixels
from ulrl.attacks.lab import Lab
from ulrl.data.batches import normalise
from ulrl.data.imageset import DatasetSpec, ImageSet
from ulrl.errors import UserError
from ulrl.machine import autocast, eval_batch
from ulrl.options import option

# Left corners, top to bottom; the right ones are the mirror image.
_CORNER = ((1, -1, -1), (-1, 1, -1), (1, -1, 1))


@register("lc")
@dataclass(frozen=True)
class LabelConsistent(CleanLabel, Additive):
    """Clean-label: poisoned training images are first moved adversarially (PGD, L-infinity) against a clean
    model, so that the mark, a 3x3 pattern added to each corner, is what is left to learn.

    The perturbed images are computed in the run, or read from `attack_train_replace_imgs_path`. Judged
    images get the mark alone. The mark's negative half is lost on black: on gray images with a dark border
    only 4 of its 9 pixels are seen, which a network needs not learn where shape is evidence enough;
    `mark_scale 2` mends that.
    """

    needs_clean_model: ClassVar[bool] = True

    attack_train_replace_imgs_path: str | None = option(
        None, ".npy of the whole training split, perturbed: uint8 [N, H, W, C]; computed when not given"
    )
    reduced_amplitude: float = option(
        1.0, "amplitude of the mark, as a share of 255", source="BackdoorBench", low=0, high=1
    )
    mark_scale: int | None = option(
        None, "side of each of the 3x3 cells of a mark, in pixels; one for each whole 32 of the image", low=1
    )
    pgd_eps: float = option(16.0, "bound of the perturbation in pixel values", source="paper", low=0, high=255)
    pgd_steps: int = option(20, "steps of PGD, each of 2.5 pgd_eps / pgd_steps", low=1)

    def check(self, spec: DatasetSpec) -> None:
        super().check(spec)
        if self.mark_scale and 6 * self.mark_scale > min(spec.height, spec.width):
            raise UserError(
                f"--mark_scale {self.mark_scale}: marks of {3 * self.mark_scale} pixels in each corner overlap on "
                f"images of {spec.height} x {spec.width}; lower it"
            )

    def learn(self, lab: Lab) -> LabelConsistent:
        chosen = self.choose(lab.data.labels.cpu())
        if path := self.attack_train_replace_imgs_path:
            images = read_bank(path, "--attack_train_replace_imgs_path", lab.origin[chosen], lab.data.spec)
        else:
            images = lab.once("perturb", lambda: {"images": self._perturbed(lab, chosen.to(lab.data.device))})["images"]
        return self.with_learned(perturbed=images)

    def _perturbed(self, lab: Lab, positions: torch.Tensor) -> torch.Tensor:
        """Untargeted PGD on the clean model: uint8 [n, C, H, W]."""
        model, data = lab.clean_model(), lab.data
        size, step = eval_batch(data.device), 2.5 * self.pgd_eps / self.pgd_steps
        done = []
        parts = positions.split(size)
        with lab.monitor.stage("perturb", len(parts) * self.pgd_steps) as progress:
            for part in parts:
                start, labels = data.images[part].float(), data.labels[part]
                x = start.clone()
                for _ in range(self.pgd_steps):
                    x.requires_grad_(True)
                    with autocast(data.device, lab.training.amp):
                        loss = F.cross_entropy(model(normalise(x, data.spec)), labels, reduction="sum")
                    (gradient,) = torch.autograd.grad(loss, x)
                    moved = x.detach() + step * gradient.sign()
                    x = (start + (moved - start).clamp(-self.pgd_eps, self.pgd_eps)).clamp(0, 255)
                    progress.step()
                done.append(whole_pixels(x))
        return torch.cat(done)

    def source(self, data: ImageSet, positions: torch.Tensor, *, train: bool) -> ImageSet:
        part = super().source(data, positions, train=train)
        return replace(part, images=self.learned["perturbed"].to(data.device)) if train else part

    def pattern(self, channels: int, height: int, width: int) -> torch.Tensor:
        grow = self.mark_scale or max(1, min(height, width) // 32)
        left = torch.tensor(_CORNER, dtype=torch.float32).repeat_interleave(grow, 0).repeat_interleave(grow, 1)
        side, mark = len(left), torch.zeros(1, height, width)
        for rows in (slice(0, side), slice(height - side, height)):
            mark[0, rows, :side], mark[0, rows, width - side :] = left, left.flip(1)
        return mark * 255 * self.reduced_amplitude
