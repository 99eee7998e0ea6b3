"""NAD: neural attention distillation from a fine-tuned teacher (Li et al., arXiv 2101.05930)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import Repair, register
from ulrl.defenses.finetuning import FineTuning
from ulrl.errors import UserError
from ulrl.models.copying import copied
from ulrl.options import option
from ulrl.training import SCHEDULERS, Monitor

_PAPER = "NAD paper"


@register("nad")
@dataclass(frozen=True)
class NAD(FineTuning):
    """Fine-tune a copy, the teacher; then the model, with its attention drawn to the teacher's.

    A stage's attention is the sum over channels of |activation|^p, normalised per image; the penalty is
    beta times the mean squared difference, as in the authors' code (the paper writes the norm). It is taken at
    the end of the last three spatial stages that have more than one pixel, see `spatial_stages`. Augmentation
    is that of the other defenses, so without the paper's Cutout; the learning rate is a tenth of the paper's, which
    is for WRN-16-1 and left a narrow PreAct-ResNet18 no accuracy.

    BackdoorBench's third map of preactresnet18 has one pixel, which is 1 whatever the weights.
    """

    ignored: ClassVar[tuple[str, ...]] = ("teacher_model_loc", "momentum", "weight_decay")

    batch_size: int = option(64, "clean images per step", source=_PAPER, low=2)
    te_epochs: int = option(10, "epochs of the teacher's fine-tuning", source=_PAPER, low=1)
    epochs: int = option(10, "epochs of the distillation", source=_PAPER, low=1)
    lr: float = option(0.01, "learning rate of both", source="BackdoorBench", low=0)
    lr_scheduler: str = option("MultiStepLR", "rate over the epochs of each", source=_PAPER, choices=SCHEDULERS)
    steplr_milestones: tuple[int, ...] = option((2, 4, 6, 8), "MultiStepLR: epochs of the drops", source=_PAPER)
    steplr_gamma: float = option(0.1, "MultiStepLR: factor of each drop", source=_PAPER, low=0)
    wd: float = option(1e-4, "weight decay", source=_PAPER, low=0)
    beta1: float = option(500.0, "weight of the third last stage's attention", source="BackdoorBench", low=0)
    beta2: float = option(1000.0, "weight of the second last stage's", source="BackdoorBench", low=0)
    beta3: float = option(1000.0, "weight of the last stage's", source="BackdoorBench", low=0)
    p: float = option(2.0, "power of the activations", source=_PAPER, low=0)

    def check(self, model: nn.Module, clean: ImageSet) -> None:
        _last_stages(model, clean)

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        stages = _last_stages(model, clean)
        betas = (self.beta1, self.beta2, self.beta3)[-len(stages) :]
        teacher = copied(model)
        self.finetune(teacher, clean, monitor, "teacher", epochs=self.te_epochs)
        teacher.eval()

        def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.no_grad():
                teacher(x)
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            for beta, ours, its in zip(betas, student_maps, teacher_maps, strict=True):
                loss = loss + beta * F.mse_loss(attention(ours, self.p), attention(its, self.p))
            return loss, logits.detach().argmax(1) == y

        with recorded(model, stages) as student_maps, recorded(teacher, stages) as teacher_maps:
            self.finetune(model, clean, monitor, "distil", objective=objective)
        return Repair(model, evidence={"stages": stages})


def _last_stages(model: nn.Module, clean: ImageSet) -> list[str]:
    stages = spatial_stages(model, torch.zeros(1, *clean.images.shape[1:], device=clean.device))[-3:]
    if len(stages) < 2:
        raise UserError(
            "nad compares attention maps at the ends of the last three spatial stages; "
            f"this model has {len(stages)} of more than one pixel (ViT-like ones have 1 or none)"
        )
    return stages


def attention(activations: torch.Tensor, p: float) -> torch.Tensor:
    """Where a layer looks: [B, C, H, W] to float32 [B, HW], each of norm 1."""
    return F.normalize(activations.float().abs().pow(p).sum(1).flatten(1))


def spatial_stages(model: nn.Module, x: torch.Tensor) -> list[str]:
    """The modules whose outputs end a stage, in order: a stage is the part of a network at one spatial size.

    Of the outputs [B, C, H, W] of one size it is the last of the outermost modules' (`layer2`, not
    `layer2.1.conv2`, nor the `layer3.0.bn1` that comes before the stride). Sizes only shrink: an output that grows
    again, such as a pooled one spread out, is no stage; nor is one of a single pixel, or one that no weight
    has a part in, such as a resized image.
    """
    ends: dict[torch.Size, tuple[int, str]] = {}  # by size: how deep the module is nested, and its name

    def after(name: str, output: Any) -> None:
        if not isinstance(output, torch.Tensor) or output.ndim != 4 or output.shape[2:].numel() == 1:
            return
        if not output.requires_grad:
            return
        size, depth = output.shape[2:], name.count(".")
        if size in ends:
            later = depth <= ends[size][0]
        else:
            later = all(size.numel() < s.numel() for s in ends)
        if later:
            ends[size] = depth, name

    model.eval()
    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_hook(lambda _, i, output, name=name: after(name, output)))
        model(x)
    return [name for _, name in ends.values()]


@contextlib.contextmanager
def recorded(model: nn.Module, names: list[str]) -> Iterator[list[torch.Tensor]]:
    """Inside the block, the list holds what the named modules gave in the last forward pass."""
    outputs = [torch.empty(0)] * len(names)

    def keep(i: int, output: torch.Tensor) -> None:
        outputs[i] = output

    with contextlib.ExitStack() as hooks:
        for i, name in enumerate(names):
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_hook(lambda _, x, output, i=i: keep(i, output)))
        yield outputs
