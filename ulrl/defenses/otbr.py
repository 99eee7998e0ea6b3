"""OTBR: zero the neurons that unlearning noise moves, fuse with the original by transport (arXiv 2408.15861)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import Defense, Repair, register
from ulrl.defenses.filters import Ranking
from ulrl.defenses.selection import sweep
from ulrl.errors import UserError
from ulrl.machine import autocast
from ulrl.models.copying import copied
from ulrl.models.head import hidden_convolutions
from ulrl.options import option
from ulrl.seeds import generator
from ulrl.training import Monitor, make_optimizer

_RELEASE = "OTBR release"
PRUNING_RATIOS = (0.0, 0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)  # the release's, and nothing at all


@register("otbr")
@dataclass(frozen=True)
class OTBR(Defense):
    """Data-free repair by pruning and fusion, of the filters of the convolutions (Lin et al.).

    1. Unlearn noise: `steps` steps up the cross-entropy of uniform noise images (in [0, 1], given to the model as they
       are) with random labels, and rank all filters by the L1 change of their weights (NWC). Shortcuts do not count.
    2. In a copy, zero the first share of the filters.
    3. Fuse, layer by layer from the first with a zeroed filter: transport the pruned filters, each of the same mass, to
       the original ones, with masses in proportion to NWC, at the cost of their distance; the new filter is
       `fusion_weight` * the transported one + (1 - `fusion_weight`) * the original one. So a suspicious filter becomes
       an average of many others, and one that never moved stays what it is.

    The share is the greatest, of those that the release goes through, at which clean accuracy holds, or
    `pruning_ratio`, with which no clean sample is looked at. The release reports accuracy and ASR of all on the test
    set and chooses none. Its random labels leave out the last class; here all are drawn. Where a layer's inputs are not
    the outputs of the one before (another branch, a depthwise convolution), they are left in their order.
    """

    batch_size: int = option(256, "noise images per step", source=_RELEASE, low=2)
    steps: int = option(20, "steps of unlearning", source=_RELEASE, low=1)
    lr: float = option(1e-4, "learning rate of unlearning", source=_RELEASE, low=0)
    sgd_momentum: float = option(0.9, "momentum of unlearning", source=_RELEASE, low=0, high=1)
    fusion_weight: float = option(0.5, "weight of the pruned model in the fusion", source=_RELEASE, low=0, high=1)
    pruning_ratio: float | None = option(None, "zero this share of the filters, chosen by nothing", low=0, high=1)
    acc_ratio: float = option(0.05, "accuracy on the clean samples that may be lost", low=0, high=1)

    def check(self, model: nn.Module, clean: ImageSet) -> None:
        _convolutions(model, clean.spec.num_classes)
        if find_spec("ot") is None:
            raise UserError("otbr needs POT, an optional extra: pip install 'ulrl[otbr]'")

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        original = {path: m.weight.detach().clone() for path, m in _convolutions(model, clean.spec.num_classes).items()}
        unlearned = self._unlearn(copied(model), clean, monitor)
        moved = _convolutions(unlearned, clean.spec.num_classes)
        nwc = {path: (moved[path].weight.detach() - w).abs().flatten(1).sum(1) for path, w in original.items()}
        ranking = Ranking(nwc)
        ratios = PRUNING_RATIOS if self.pruning_ratio is None else tuple(sorted({0.0, self.pruning_ratio}))

        @torch.no_grad()
        def edit(model: nn.Module, i: int) -> None:
            zeroed = ranking.first(int(ratios[i] * len(ranking)))
            for path, weight in self._fuse(original, zeroed, nwc).items():
                model.get_parameter(f"{path}.weight").copy_(weight)

        swept = sweep(model, ratios, edit, clean, self.acc_ratio, monitor, amp=self.amp, fixed=self.pruning_ratio)
        table = ranking.table(ranking.first(int(swept.strength * len(ranking))))
        evidence = {"pruning_ratio": swept.strength, "filters": len(table), "zeroed": int(table.zeroed.sum())}
        return Repair(model, [], evidence, {"filters": table, "pruning": swept.curve}, swept.candidates)

    def _unlearn(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> nn.Module:
        """`model`, changed in place; of `clean` only the shape of an image and the number of classes are looked at."""
        stream = generator(self.random_seed, "noise", clean.device)
        optimizer = make_optimizer(model, "sgd", self.lr, self.sgd_momentum)
        model.train()
        with monitor.stage("unlearn", self.steps) as progress:
            for step in range(1, self.steps + 1):
                x = torch.rand((self.batch_size, *clean.images.shape[1:]), generator=stream, device=clean.device)
                y = torch.randint(clean.spec.num_classes, (len(x),), generator=stream, device=clean.device)
                with autocast(clean.device, self.amp):
                    logits = model(x)
                    loss = F.cross_entropy(logits, y)
                optimizer.zero_grad()
                (-loss).backward()
                optimizer.step()
                progress.step()
                progress.epoch(model, step, loss=loss.item(), acc=(logits.argmax(1) == y).float().mean().item())
        if not all(weight.isfinite().all() for weight in model.parameters()):
            raise UserError("unlearning noise overflowed; lower --lr")
        return model

    def _fuse(
        self, original: Mapping[str, torch.Tensor], zeroed: Mapping[str, torch.Tensor], nwc: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The weights of each layer after pruning its `zeroed` filters (bool [O]) and fusion with what it was."""
        fused, before = dict(original), None  # before: which outputs of the layer before make which of its new ones
        for path, weight in original.items():
            if before is None and not zeroed[path].any():
                continue
            pruned = weight.masked_fill(zeroed[path].view(-1, *[1] * (weight.ndim - 1)), 0)
            plan = _transport(pruned.flatten(1), weight.flatten(1), nwc[path])
            moved = plan.T @ pruned.double().flatten(1)
            if before is not None and len(before) == weight.shape[1]:
                moved = torch.einsum("oi...,ij->oj...", moved.view(weight.shape), before)
            moved = moved.view(weight.shape).to(weight)
            fused[path] = self.fusion_weight * moved + (1 - self.fusion_weight) * weight
            before = plan
        return fused


def _transport(given: torch.Tensor, wanted: torch.Tensor, nwc: torch.Tensor) -> torch.Tensor:
    """The cheapest plan from filters [O, D] of the same mass to others [O, D] with masses in proportion to `nwc` [O].

    float64 [O, O]: column j says of what shares of the given filters the j-th wanted one is made, and sums to 1.
    """
    import ot  # an optional dependency, slow to import

    mass = nwc.double().cpu()
    mass = mass.clamp_min(1e-9 * mass.max().item()).clamp_min(1e-300)
    mass /= mass.sum()
    cost = torch.cdist(given.double(), wanted.double()).cpu()
    uniform = torch.full_like(mass, 1 / len(mass))
    plan = torch.from_numpy(ot.emd(uniform.numpy(), mass.numpy(), cost.numpy()))
    sums = plan.sum(0)
    return torch.where(sums > 0, plan / sums, torch.eye(len(plan), dtype=plan.dtype)).to(given.device)


def _convolutions(model: nn.Module, num_classes: int) -> dict[str, nn.Conv2d]:
    """In the order of the model; shortcuts are named so in ours and in the releases, `downsample` in torchvision."""
    found = {
        path: m
        for path, m in hidden_convolutions(model, num_classes).items()
        if not {"shortcut", "downsample"} & set(path.split("."))
    }
    if not found:
        raise UserError("the model has no nn.Conv2d layer before its head, so it has no filters for OTBR to rank")
    return found
