"""How near a trigger that a defense found is to the true one, which only the judge knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ulrl.data.imageset import ImageSet, PoisonedSet
from ulrl.defenses.base import Trigger
from ulrl.metrics import share
from ulrl.training import predict

TRIGGER_FILE = "trigger.npz"  # in a defense's folder: the true and the found trigger, to be drawn
TOUCHED = 0.1  # share of the images in which a pixel of the true trigger's mask differs
BATCH = 500  # images that are held as float32 at once


def judge_trigger(
    model: nn.Module, triggers: dict[int, Trigger], flagged: list[int], clean: ImageSet, poisoned: PoisonedSet,
    amp: bool, file: Path,
) -> dict[str, Any] | None:  # fmt: skip
    """Compare the trigger found for the true target, or else for the class flagged first, with the true one.

    The true one is what the poisoned test images differ by from the clean ones that they were made of. class: whose
    trigger was compared. cosine: of the mean changes of the pixels, found and true. iou: of the masks, the found one
    from 0.5 on, the true one where a pixel changes in more than a tenth of the images. turned: the share of the test
    images of other classes that `model`, the record's, gives the class with the found trigger. What a picture needs
    goes to `file`. None where no trigger was found or none is known.
    """
    targets = poisoned.labels.unique().tolist()
    if not triggers or len(targets) != 1:
        return None
    of = next((k for k in (*targets, *flagged) if k in triggers), min(triggers))
    mask, pattern = triggers[of].mask.to(clean.device), triggers[of].pattern.to(clean.device)

    def added(images: torch.Tensor) -> torch.Tensor:
        return mask * (pattern * 255 - images)

    true, change, touched = (torch.zeros_like(pattern) for _ in range(3))  # sums over the images, [C, H, W]
    for part in torch.arange(len(poisoned), device=clean.device).split(BATCH):
        originals = clean.images[poisoned.original_indices[part]].float()
        differs = poisoned.images[part] - originals
        true += differs.sum(0)
        change += added(originals).sum(0)
        touched += (differs != 0).any(1, keepdim=True).sum(0)
    true_mask = touched[0] > TOUCHED * len(poisoned)
    cosine = F.cosine_similarity(true.flatten(), change.flatten(), dim=0).item()
    both, either = ((m := mask[0] >= 0.5) & true_mask).sum().item(), (m | true_mask).sum().item()
    turned = []
    for part in (clean.labels != of).nonzero().flatten().split(BATCH):
        others = clean.subset(part)
        stamped = (others.images + added(others.images)).round_().clamp_(0, 255).byte()
        turned.append(predict(model, ImageSet(stamped, others.labels, others.spec), amp) == of)
    np.savez_compressed(
        file, clean=clean.images[poisoned.original_indices[0]].cpu().numpy(), poisoned=poisoned.images[0].cpu().numpy(),
        true_mask=true_mask.cpu().numpy(), mask=mask[0].cpu().numpy(),
        pattern=(pattern * 255).round().clamp(0, 255).byte().cpu().numpy(),
    )  # fmt: skip
    return {"class": of, "cosine": cosine, "iou": both / either if either else 0.0, "turned": share(torch.cat(turned))}
