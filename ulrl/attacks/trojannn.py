"""TrojanNN (Liu et al., NDSS 2018): a patch inverted from a clean model so that it excites chosen neurons."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import torch

from ulrl.attacks.additive import Additive
from ulrl.attacks.base import register
from ulrl.attacks.images import read_image
from ulrl.attacks.lab import Lab
from ulrl.data.batches import normalise
from ulrl.data.imageset import DatasetSpec
from ulrl.errors import UserError
from ulrl.machine import autocast
from ulrl.models.head import find_head, watched
from ulrl.options import option

log = logging.getLogger(__name__)

GRAY = 128
REACHED = 1e-3  # squared distance of the neurons from their target (BackdoorBench's)


@register("trojannn")
@dataclass(frozen=True)
class TrojanNN(Additive):
    """A patch is added to the image, clipped at black and white (BackdoorBench's pixels wrap around).

    The neurons are the inputs of the classifier head with the largest sum of absolute weights. The patch starts as the
    user's picture, where that is not black, or as a gray square in the bottom right corner, and is moved by signed
    gradients until the neurons reach their target, at most `trojan_eps` from where it was. Gray stands in for
    BackdoorBench's apple, which cannot be shipped: a patch can move both ways from it.
    """

    needs_clean_model: ClassVar[bool] = True

    ignored: ClassVar[tuple[str, ...]] = tuple(
        ("selected_layer_name selected_layer_param_name pretrain_model_path").split()
    )
    num_neuron: int = option(2, "neurons to excite", source="BackdoorBench", low=1)
    neuron_target_values: float = option(100.0, "activation they are driven to", source="BackdoorBench")
    mask_update_iters: int = option(1000, "steps of the inversion at most", source="BackdoorBench", low=1)
    mask_path: str | None = option(None, "picture that the patch starts from, black where there is none")
    trojan_eps: float = option(
        0.3, "how far the patch may move from its picture, as a share of 255", source="BackdoorBench", low=0, high=1
    )
    trojan_alpha: float = option(0.1, "step of the inversion, as a share of 255", source="BackdoorBench", low=0, high=1)

    def check(self, spec: DatasetSpec) -> None:
        super().check(spec)
        if not self._picture(spec).any():
            raise UserError(f"--mask_path {self.mask_path} is all black, so there is no place for a patch")

    def _picture(self, spec: DatasetSpec) -> torch.Tensor:
        """Where the patch starts: uint8 [channels, height, width], 0 where there is none."""
        channels, height, width = spec.channels, spec.height, spec.width
        if self.mask_path:
            return read_image(self.mask_path, "--mask_path", channels, height, width)
        side = max(3, min(height, width) // 4)
        picture = torch.zeros(channels, height, width, dtype=torch.uint8)
        picture[:, height - side - 1 : height - 1, width - side - 1 : width - 1] = GRAY
        return picture

    def learn(self, lab: Lab) -> TrojanNN:
        made = self.with_learned(**lab.once("patch", lambda: {"pattern": self._invert(lab)}))
        if not made.learned["pattern"].any():
            log.warning(
                "the patch found is black, so nothing is added to any image: what excites the chosen neurons most is "
                "darkness; take another clean model (--random_seed, --clean_model) or more neurons (--num_neuron)"
            )
        return made

    def _invert(self, lab: Lab) -> torch.Tensor:
        model, spec, device = lab.clean_model(), lab.data.spec, lab.data.device
        _, head = find_head(model, spec.num_classes)
        if self.num_neuron > head.weight.shape[1]:
            raise UserError(f"--num_neuron {self.num_neuron}: the head of the model has {head.weight.shape[1]} inputs")
        neurons = head.weight.abs().sum(0).topk(self.num_neuron).indices
        start = self._picture(spec)[None].to(device, torch.float32)
        patch, bound = start.clone(), 255 * self.trojan_eps
        with lab.monitor.stage("patch", self.mask_update_iters) as progress, watched([head]) as features:
            for _ in range(self.mask_update_iters):
                patch.requires_grad_(True)
                with autocast(device, lab.training.amp):
                    model(normalise(patch, spec))
                loss = (features[0][0, neurons] - self.neuron_target_values).square().sum()
                (gradient,) = torch.autograd.grad(loss, patch)
                moved = patch.detach() - 255 * self.trojan_alpha * gradient.sign() * (start > 0)
                patch = (start + (moved - start).clamp(-bound, bound)).clamp(0, 255)
                progress.step()
                if loss.item() < REACHED:
                    break
        return patch[0]

    def pattern(self, channels: int, height: int, width: int) -> torch.Tensor:
        return self.learned["pattern"]
