"""Low-frequency (Zeng et al., arXiv 2104.03413): a smooth universal perturbation of a clean model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from ulrl.attacks.additive import Additive
from ulrl.attacks.base import register
from ulrl.attacks.lab import Lab
from ulrl.data.batches import normalise
from ulrl.data.imageset import DatasetSpec
from ulrl.errors import UserError
from ulrl.files import find_input
from ulrl.machine import autocast, eval_batch
from ulrl.options import option
from ulrl.seeds import generator
from ulrl.untrusted.arrays import read_npy


@register("lf")
@dataclass(frozen=True)
class LowFrequency(Additive):
    """A pattern added to every image: what fools a clean model most among patterns of low frequencies only.

    Found by gradient ascent on the clean model's loss over a few hundred training images, in the space of
    the pattern's lowest cosine coefficients (the paper alternates universal perturbation steps and a
    low-pass filter), then stretched to [0, lf_amplitude] as BackdoorBench's files are. Those files are
    taken by `lowFrequencyPatternPath`; one in [0, 1] is scaled to pixel values first, where
    BackdoorBench adds it as it is and changes nothing.
    """

    needs_clean_model: ClassVar[bool] = True

    lowFrequencyPatternPath: str | None = option(None, ".npy of the pattern [H, W, C]; computed when not given")
    lf_amplitude: float = option(51.0, "largest value of the pattern", source="BackdoorBench", low=1, high=255)
    lf_cutoff: float = option(0.25, "share of the frequencies, from the lowest, that it may have", low=0, high=1)
    lf_images: int = option(512, "training images it is found on", low=1)
    lf_steps: int = option(200, "steps of the search", low=1)

    def check(self, spec: DatasetSpec) -> None:
        super().check(spec)
        if self.lowFrequencyPatternPath:
            self.pattern(spec.channels, spec.height, spec.width)

    def learn(self, lab: Lab) -> LowFrequency:
        if self.lowFrequencyPatternPath:
            return self
        return self.with_learned(**lab.once("pattern", lambda: {"pattern": self._search(lab)}))

    def _search(self, lab: Lab) -> torch.Tensor:
        model, spec, device = lab.clean_model(), lab.data.spec, lab.data.device
        stream = generator(self.random_seed, "pattern")
        some = lab.data.subset(torch.randperm(len(lab.data), generator=stream)[: self.lf_images])
        rows, columns = (_low_waves(n, self.lf_cutoff).to(device) for n in (spec.height, spec.width))
        weights = torch.randn(spec.channels, len(rows), len(columns), generator=stream).to(device).requires_grad_(True)
        optimizer = torch.optim.Adam([weights], 0.1)
        size = min(eval_batch(device), len(some))
        with lab.monitor.stage("pattern", self.lf_steps) as progress:
            for step in range(self.lf_steps):
                at = (torch.arange(size) + step * size) % len(some)
                part = some.subset(at)
                x = (part.images + self._stretched(rows.T @ weights @ columns)).clamp(0, 255)
                with autocast(device, lab.training.amp):
                    loss = -F.cross_entropy(model(normalise(x, spec)), part.labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                progress.step()
        return self._stretched(rows.T @ weights.detach() @ columns)

    def _stretched(self, pattern: torch.Tensor) -> torch.Tensor:
        low, high = pattern.amin(), pattern.amax()
        return (pattern - low) / (high - low) * self.lf_amplitude

    def pattern(self, channels: int, height: int, width: int) -> torch.Tensor:
        if not self.lowFrequencyPatternPath:
            return self.learned["pattern"]
        file = find_input(self.lowFrequencyPatternPath)
        try:
            held = read_npy(file)
        except UserError as error:
            raise UserError(f"--lowFrequencyPatternPath: {error}") from None
        held = held[0] if held.ndim == 4 and len(held) else held
        if held.shape not in ((height, width), (height, width, channels)):
            raise UserError(
                f"--lowFrequencyPatternPath: {file} has shape {held.shape}, not {(height, width, channels)}"
            )
        values = torch.from_numpy(held.astype(np.float32)).reshape(height, width, -1).expand(-1, -1, channels)
        return values.permute(2, 0, 1) * (255 if values.abs().amax() <= 1 else 1)


def _low_waves(n: int, cutoff: float) -> torch.Tensor:
    """The lowest cosine waves of n samples, two at least and the constant left out: float32 [m, n]."""
    k = torch.arange(1, max(2, round(cutoff * n)) + 1)[:, None]
    return torch.cos(torch.pi * (torch.arange(n) + 0.5) * k / n) / k.sqrt()
