"""BTI-DBF: learn what changes the features that the task does not need, and unlearn it (Xu et al., ICLR 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ulrl.data.batches import Batches
from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import Defense, OnHead, Repair, register
from ulrl.defenses.perturbation import still
from ulrl.metrics import class_shares
from ulrl.models.head import Head, head_answers, watched
from ulrl.options import option
from ulrl.seeds import generator, global_stream
from ulrl.training import Monitor, Objective, fit, head_inputs

_RELEASE = "BTI-DBF release"


@register("bti-dbf")
@dataclass(frozen=True)
class BTIDBF(OnHead, Defense):
    """BTI-DBF (U), trigger inversion by decoupling benign features ("Towards Reliable and Efficient Backdoor Trigger
    Inversion via Decoupling Benign Features"). In each of `n_rounds`:

    1. A mask on the features is trained so that the masked ones keep the task and the rest of them loses it.
    2. A generator, an image in and a change to it out, is trained to move that rest as far as it can, and the masked
       features hardly. While the mean squared change of the image is above `norm_bound`, or that of the masked
       features above `feature_bound`, only the change is made smaller. From the second round on the loss has the
       cross-entropy of a class too: the one that most of the first round's images were called.
    3. The model is trained with `share` of each batch changed so, under the true labels, on cross-entropy + the mean
       squared distance of the batch's features from those of the same batch unchanged.

    The generator, and both optimisers (Adam), go on from round to round. The class is in the evidence, not flagged:
    any model has one. Changed images are not cut to the range of pixels, as in the release.

    Features are what the head is given, which a model of any kind has, and the mask is trained on those of the images
    as they are and of the model as it answers. In the release they are the last feature map, before it is averaged,
    and the mask is trained in train mode, on a copy whose statistics then serve the inversion. Its U-Net gives the
    image itself, so that it must learn to copy first, in 50 epochs; ours gives what is added, and is as deep as
    the image allows.
    """

    batch_size: int = option(128, "clean images per step", source=_RELEASE, low=2)
    n_rounds: int = option(5, "rounds of inversion and unlearning", source=_RELEASE, low=1)
    mask_epochs: int = option(20, "epochs of the mask in a round", source=_RELEASE, low=1)
    mask_lr: float = option(0.01, "learning rate of the mask (Adam)", source=_RELEASE, low=0)
    inversion_epochs: int = option(30, "epochs of the generator in a round", source=_RELEASE, low=1)
    generator_lr: float = option(0.001, "learning rate of the generator (Adam)", source=_RELEASE, low=0)
    norm_bound: float = option(0.3, "bound on the mean squared change of normalised values", source=_RELEASE, low=0)
    feature_bound: float = option(3.0, "bound on that of the masked features", source=_RELEASE, low=0)
    epochs: int = option(30, "epochs of unlearning in a round", source=_RELEASE, low=1)
    lr: float = option(1e-4, "learning rate of unlearning", source=_RELEASE, low=0)
    share: float = option(0.1, "share of a batch that is changed, one image at least", source=_RELEASE, low=0, high=1)

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        head = self.head(model, clean)[1]
        with global_stream(self.random_seed, "generator"):
            change = _Generator(clean.spec.channels, min(clean.images.shape[2:])).to(clean.device)
        of_change, of_model = torch.optim.Adam(change.parameters(), self.generator_lr), self.optimizer(model)
        inverting, unlearning = self.batches(clean, "invert"), self.batches(clean, "unlearn")
        objective = self.unlearning(model, head, change)
        shares = torch.empty(0)
        for n in range(self.n_rounds):
            mask = self._mask(model, head, clean, n, monitor)
            target = int(shares.argmax()) if n else None
            with still(model), watched([head]) as features:
                fit(
                    model, inverting, self.inversion_epochs, of_change, None, monitor, "invert", amp=self.amp,
                    objective=self._inversion(features, mask, change, target),
                )  # fmt: skip
                shares = shares if n else _answers(model, change, clean, self.batch_size)
            fit(
                model, unlearning, self.epochs, of_model, None, monitor, "unlearn", amp=self.amp, objective=objective
            )  # fmt: skip
        return Repair(model, evidence={"label": int(shares.argmax()), "shares": shares.tolist()})

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """That of unlearning."""
        return torch.optim.Adam(model.parameters(), self.lr)

    def unlearning(self, model: nn.Module, head: Head, change: nn.Module) -> Objective:
        """What unlearning minimises, with `change` as it is by then."""

        def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with watched([head]) as features:
                model(x)
                (plain,) = features
                logits = model(self.changed(x, change))
            distance = F.mse_loss(features[0], plain)
            return F.cross_entropy(logits.float(), y) + distance, logits.detach().argmax(1) == y

        return objective

    @torch.no_grad()
    def changed(self, x: torch.Tensor, change: nn.Module) -> torch.Tensor:
        """The batch with the first of its images changed; it is shuffled, so these are random ones."""
        some = max(1, round(self.share * len(x)))
        return torch.cat([x[:some] + change(x[:some]), x[some:]])

    def _mask(self, model: nn.Module, head: Head, clean: ImageSet, n: int, monitor: Monitor) -> torch.Tensor:
        """How much the task needs each feature: float32 [D] in (0, 1)."""
        features = head_inputs(model, head, clean, self.amp)
        stream = generator(self.random_seed, f"mask {n}", clean.device)
        free = torch.randn(features.shape[1], generator=stream, device=clean.device).requires_grad_()
        optimizer = torch.optim.Adam([free], self.mask_lr)
        steps = -(-len(clean) // self.batch_size)
        with monitor.stage("mask", self.mask_epochs * steps) as progress:
            for _ in range(self.mask_epochs):
                for drawn in torch.randperm(len(clean), generator=stream, device=clean.device).split(self.batch_size):
                    gap = task_gap(head, features[drawn], clean.labels[drawn], (2 * free).sigmoid())
                    optimizer.zero_grad()
                    gap.backward()
                    optimizer.step()
                    progress.step()
        return (2 * free.detach()).sigmoid()

    def _inversion(
        self, features: list[torch.Tensor], mask: torch.Tensor, change: nn.Module, target: int | None
    ) -> Objective:
        def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            model.eval()
            with torch.no_grad():
                model(x)
            (plain,) = features
            moved = change(x).float()
            logits = model(x + moved).float()
            apart = (features[0] - plain).square()
            norm, benign, rest = moved.square().mean(), (mask**2 * apart).mean(), ((1 - mask) ** 2 * apart).mean()
            within = (norm <= self.norm_bound) & (benign <= self.feature_bound)
            loss = torch.where(within, 0.01 * benign - rest, norm)
            if target is not None:
                loss = loss + F.cross_entropy(logits, torch.full_like(y, target))
            return loss, logits.detach().argmax(1) == y

        return objective


def task_gap(head: Head, features: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The task's loss on the masked features minus that on the rest of them: a scalar, with a gradient for `mask`.

    features: float [B, D], what the head is given; labels: int64 [B]; mask: float [D] in [0, 1].
    """
    kept, rest = (F.cross_entropy(head_answers(head, part * features), labels) for part in (mask, 1 - mask))
    return kept - rest


@torch.no_grad()
def _answers(model: nn.Module, change: nn.Module, clean: ImageSet, batch_size: int) -> torch.Tensor:
    """Which share of the changed images `model` gives each class: float64 [K] on the CPU."""
    classes = torch.cat([model(x + change(x)).argmax(1) for x, _ in Batches(clean, batch_size)])
    return class_shares(classes, clean.spec.num_classes)


class _Generator(nn.Module):
    """A U-Net, [B, channels, H, W] to the same: 32 channels at full size, doubled at each of up to four halvings."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        widths = [32 * 2**level for level in range(5) if side >> level >= 2 or not level]
        self.down = nn.ModuleList(_block(a, b) for a, b in zip([channels, *widths], widths, strict=False))
        self.up = nn.ModuleList(_block(a + b, b) for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.out = nn.Conv2d(widths[0], channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        for block in self.down:
            x = block(F.max_pool2d(x, 2) if kept else x)
            kept.append(x)
        for block, skipped in zip(self.up, kept[-2::-1], strict=True):
            x = block(torch.cat([F.interpolate(x, skipped.shape[2:]), skipped], 1))
        return self.out(x)


def _block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        # One group, as a channel of one pixel has no deviation of its own.
        layers += [nn.Conv2d(width, outputs, 3, padding=1), nn.GroupNorm(1, outputs), nn.LeakyReLU()]
    return nn.Sequential(*layers)
