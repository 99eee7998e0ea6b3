"""Three repairs of a dual encoder: fine-tuning, token-level unlearning, and ULRL's idea on the projection.

In all of them the text tower and the temperature stay as they are: the trigger is on the image.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ulrl.data.batches import Batches, normalise
from ulrl.data.imageset import ImageSet
from ulrl.defenses.ulrl import ULRL, flagged_classes, redraw
from ulrl.multimodal.captions import GARMENTS, PAD, prompts, read
from ulrl.multimodal.dual_encoder import DualEncoder, classifier, contrastive
from ulrl.multimodal.pairs import Pairs
from ulrl.options import option
from ulrl.seeds import generator
from ulrl.training import Monitor, Objective, fit, make_scheduler

log = logging.getLogger(__name__)

Evidence = dict[str, Any]


@dataclass(frozen=True)
class Repairing:
    """How dual encoders are repaired."""

    repair_epochs: int = option(10, "passes over the clean pairs (ft, ulrl)", low=1)
    repair_lr: float = option(1e-3, "AdamW's learning rate in every repair", low=0)
    repair_batch: int = option(128, "pairs per step in every repair", low=2)
    relearn_alpha: float = option(0.7, "ulrl: weight of the cosine penalty", source="ULRL release", low=0)
    weak_share: float = option(
        0.5, "ubt: share of the training pairs, those least alike, to overfit a copy on", low=0, high=1
    )
    overfit_epochs: int = option(1, "ubt: passes over those", low=1)
    suspicious: int = option(64, "ubt: pairs to unlearn, the most suspicious", low=1)
    unlearn_steps: int = option(100, "ubt: steps of unlearning", low=1)
    unlearn_weight: float = option(1.0, "ubt: weight of what is unlearned", low=0)
    amp: bool = option(True, "bf16 autocast where the device has it")


def finetune(encoder: DualEncoder, clean: Pairs, how: Repairing, seed: int, monitor: Monitor) -> Evidence:
    """Train the image tower on the clean pairs, in place: what every other repair is to be measured against."""
    tune(encoder, clean, how.repair_epochs, how, seed, monitor, "finetune", contrastive(clean.tokens))
    return {}


def tune(
    encoder: DualEncoder, pairs: Pairs, epochs: int, how: Repairing, seed: int, monitor: Monitor, stage: str,
    objective: Objective,
) -> None:  # fmt: skip
    """Train the image tower, in place, for `epochs` passes over the pairs."""
    encoder.requires_grad_(False)
    encoder.image.requires_grad_(True)
    optimizer = torch.optim.AdamW(encoder.image.parameters(), how.repair_lr)
    stream = generator(seed, stage, pairs.data.device)
    batches = Batches(pairs.data, how.repair_batch, stream, augmented=False, drop_last=True)
    fit(encoder, batches, epochs, optimizer, make_scheduler(optimizer, "CosineAnnealingLR", epochs), monitor, stage,
        amp=how.amp, objective=objective)  # fmt: skip


# Token-level unlearning


def ubt(encoder: DualEncoder, pairs: Pairs, how: Repairing, seed: int, monitor: Monitor) -> Evidence:
    """Unlearn backdoor threats, in place, given the poisoned training pairs and no word of which those are.

    1. Overfit a copy on the pairs that are least alike: a shortcut is learned faster than what is to be seen.
    2. To that copy, one word of each caption is what its image is tied to: that without which they are least alike.
    3. Suspicious are the pairs whose image is more like that word alone than like the whole caption. (Likeness alone
       misleads here: an image that says more than its caption is less like it than most.)
    4. Unlearn the tie of the most suspicious: the square of the cosine between image and word goes to 0, while the less
       suspicious half of the pairs goes on being learned.

    Source: the abstracts of arXiv 2409.19526 and 2403.16257 ("overfitting training prioritized by weak similarity
    samples", "token-based localized forgetting"). No code of either was found; the measure in steps 2 and 3 is ours.
    The square is the bounded form of unlearning that the release of the same group's BadCLIP has (there of the cosine
    plus `--unlearn_target`, whose default of -1 would raise the cosine to 1).
    """
    weak = alike(encoder, pairs, how.amp).argsort()[: max(2, round(how.weak_share * len(pairs)))]
    copied, subset = copy.deepcopy(encoder), pairs.subset(weak)
    tune(copied, subset, how.overfit_epochs, how, seed, monitor, "overfit", contrastive(subset.tokens))
    before, _ = tied(encoder, pairs, how.amp)
    score, words = tied(copied, pairs, how.amp)
    order = score.argsort(descending=True)
    suspicious, kept = order[: how.suspicious], order[len(order) // 2 :]
    forget = Pairs.placed(pairs.data.subset(suspicious), words[suspicious])
    unlearn(encoder, forget, pairs.subset(kept.sort().values), how, seed, monitor)
    named = read(forget.tokens)
    counts = {word: named.count(word) for word in sorted(set(named), key=named.count, reverse=True)}
    return {"suspicious": suspicious.tolist(), "before_overfitting": before, "score": score, "words": counts}


@torch.no_grad()
def alike(encoder: DualEncoder, pairs: Pairs, amp: bool) -> torch.Tensor:
    """The cosine of each image with its caption: float32 [N]."""
    return F.cosine_similarity(encoder.embed_all(pairs.data, amp), encoder.eval().read(pairs.tokens))


@torch.no_grad()
def tied(encoder: DualEncoder, pairs: Pairs, amp: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """By how much each image is more like one word than like its caption, float32 [N]; that word, int64 [N, LENGTH].

    The word is the one without which the caption is least like the image.
    """
    encoder.eval()
    images, whole = encoder.embed_all(pairs.data, amp), alike(encoder, pairs, amp)
    falls = torch.full(pairs.tokens.shape, -torch.inf, device=whole.device)
    for place in range(pairs.tokens.shape[1]):
        there = pairs.tokens[:, place] != PAD
        without = pairs.tokens[there].clone()
        without[:, place] = PAD
        falls[there, place] = whole[there] - F.cosine_similarity(images[there], encoder.read(without))
    words = pairs.tokens * torch.zeros_like(pairs.tokens).scatter_(1, falls.argmax(1, keepdim=True), 1)
    return F.cosine_similarity(images, encoder.read(words)) - whole, words


def unlearn(encoder: DualEncoder, forget: Pairs, kept: Pairs, how: Repairing, seed: int, monitor: Monitor) -> None:
    """Train the image tower, in place, until the images of `forget` have nothing to do with their words."""
    words, images = encoder.read(forget.tokens).detach(), normalise(forget.data.images, forget.data.spec)
    order = torch.randperm(len(kept), generator=generator(seed, "kept"))
    some = kept.subset(order[: how.unlearn_steps * how.repair_batch])
    learn = contrastive(some.tokens)

    def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, right = learn(model, x, y)
        tie = (encoder.see(images) * words).sum(1)
        return loss + how.unlearn_weight * tie.square().mean(), right

    tune(encoder, some, 1, how, seed, monitor, "forget", objective)


# ULRL's idea


def ulrl(
    encoder: DualEncoder, clean: Pairs, labelled: ImageSet, method: ULRL, how: Repairing, seed: int, monitor: Monitor
) -> Evidence:
    """Unlearn to find the class that stands out, draw the projection towards its caption anew, relearn. In place.

    A dual encoder has no row per class to rank. Its zero-shot classifier has: the class's caption, times the
    projection. ULRL's diagnosis is made on that; the row is drawn anew within the projection, which stays as it is in
    all directions but the caption's; relearning is on the clean pairs, with ULRL's penalty on the cosine with the old.

    labelled: the clean images with their classes, which the captions tell.
    """
    directions = encoder.class_directions(prompts("garment"))
    subject = scaled_classifier(encoder, directions, labelled, how.amp)
    neurons, unlearned, spread = method.diagnose(subject, labelled, monitor)
    flagged = flagged_classes(neurons)
    likenesses = [redraw_towards(encoder.image.linear, directions[k], seed + k) for k in flagged]
    learn = contrastive(clean.tokens)

    def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, right = learn(model, x, y)
        return loss + how.relearn_alpha * sum(likeness() for likeness in likenesses), right

    tune(encoder, clean, how.repair_epochs, how, seed, monitor, "relearn", objective)
    table = {word: round(z, 3) for word, z in zip(GARMENTS, neurons.z.tolist(), strict=True)}
    return {"flagged": flagged, "z": table, **unlearned.evidence, **spread}


def scaled_classifier(encoder: DualEncoder, directions: torch.Tensor, data: ImageSet, amp: bool) -> nn.Module:
    """The zero-shot classifier with logits as large, on the whole, as the dual encoder's own."""
    made = classifier(encoder, directions)
    times = encoder.log_scale.detach().exp() / encoder.embed_all(data, amp).norm(dim=1).mean()
    with torch.no_grad():
        made.linear.weight.mul_(times)
        made.linear.bias.mul_(times)
    return made


@torch.no_grad()
def redraw_towards(projection: nn.Linear, direction: torch.Tensor, seed: int) -> Callable[[], torch.Tensor]:
    """Draw what the projection does along `direction` (float32 [dim], of length 1) anew, in place, and nothing else.

    Returns a function of no arguments: the cosine (scalar) of the row `direction` @ weight, as it then is, with what it
    was before.
    """
    before = direction @ projection.weight
    row = nn.Linear(len(before), 1, bias=False).to(before)
    row.weight.copy_(before.unsqueeze(0))
    redraw(row, [0], seed)
    projection.weight.add_(torch.outer(direction, row.weight[0] - before))
    projection.bias.sub_(direction * (direction @ projection.bias))
    return lambda: F.cosine_similarity(direction @ projection.weight, before, dim=0)
