"""Harden: learn the right answers under whatever lies over the image, then take the original's sight back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from ulrl.data.batches import Batches, normalise, pixels
from ulrl.data.imageset import DatasetSpec, ImageSet
from ulrl.defenses.astray import Fixed, Learning, leading
from ulrl.defenses.base import OnHead, Repair, register
from ulrl.defenses.corruptions import Draws, corrupt
from ulrl.defenses.finetuning import FineTuning
from ulrl.defenses.signs import DOUBTFUL, SUSPICIOUS, Change, look_for_signs
from ulrl.defenses.ulrl import ULRL, redraw
from ulrl.machine import autocast
from ulrl.models.copying import copied
from ulrl.options import option
from ulrl.training import Monitor, Objective, measure_statistics

_NEVER = -1e4  # the logit of a class that is left out
_LOOKS = 4  # passes over the clean images that the classes' excess is measured on
_ASIDE = 0.3  # step from a corruption that was found, at most
_EACH = 4  # images in a row that are given the same of the known changes
_SHOWN = 512  # clean images, at most, on which corruptions that lead astray are sought


@register("harden")
@dataclass(frozen=True)
class Harden(OnHead, FineTuning):
    """Two stages on the clean images alone, between which the target is looked for. A backdoor is a corruption that
    the model obeys; the corruptions here are random ones and ones that lead it astray (see `corruptions`, `astray`).

    1. Harden. Of each batch one half stays plain and the other is corrupted, a quarter of it near those of
       `tries` corruptions that lead the original furthest to each class. The loss is `label_weight` *
       cross-entropy + KL(original on the plain image || model) + `keep_weight` * KL at temperature `temperature` over
       the plain half and over mixtures of it (mixup). The classes for which there is evidence (see `signs`) have their
       rows of the head drawn anew before, `alpha` times their cosine with what they were is added, and on images of
       other classes they are left out of the divergences. What is known is treated at its place: a quarter of
       the corrupted images bear the smallest changes that were found to these classes (in restoring, to the flagged
       ones), and both rates are `gentle` times what they are where nothing is known.
    2. Name. A class's *excess* is how much more probable it is to the original than to the hardened model on corrupted
       images of other classes. Classes with more than `excess` of it are suspicious, too: flagged are those that both
       diagnoses name. Where they share none, it is whom the signs name if there is evidence enough for a verdict
       (`signs.SUSPICIOUS`), else all that either names.
    3. Restore, from the hardened weights: on plain images and on mixtures of two (mixup), `keep_weight` * KL at
       `temperature` from the original's answers *to the same input* over all classes that are not flagged, and for each
       flagged one the binary cross-entropy of it against the rest with the (mixed) labels. On corrupted images besides,
       `hold_weight` * (cross-entropy + KL(original on the plain image || model)), twice that where there was an excess.

    No answer of the original's to a corrupted image is learnt, and none on the flagged classes but, under corruptions,
    for their own images: with its soft answers on them to plain images and mixtures the backdoor comes back (WaNet:
    ASR 4 to 32), without them it does not. Mixtures are what holds the rest of the function, from 600 images alone;
    corruptions are what holds the hardening.

    Weights and corruptions were chosen by ASR and accuracy on four development records and a clean net (BadNets,
    Blended, WaNet, SSBA on fashion_scenes; `hold_weight` by accuracy, and tried on four more; seeking was tried on SIG,
    LF and label-consistent; mixtures in hardening on plain nets, whom to aim at, how often and `gentle` on those and on
    the four, see docs/method.md), and are the same for all. It sees clean samples only.
    """

    batch_size: int = option(128, "clean images per step", low=2)
    epochs: int = option(60, "epochs of hardening", low=1)
    lr: float = option(0.04, "learning rate of hardening", low=0)
    label_weight: float = option(1.0, "weight of the labels in hardening", low=0)
    keep_weight: float = option(3.0, "weight of keeping the softened answers", low=0)
    temperature: float = option(4.0, "softness of those answers", low=1)
    learning_share: float = option(0.5, "share of the corruptions that learn", low=0, high=1)
    tries: int = option(1800, "corruptions among which those that lead astray are sought; 0: none", low=0)
    init: bool = option(True, "draw the flagged classes' rows of the head anew")
    alpha: float = option(0.5, "weight of the redrawn rows' cosine with what they were", low=0)
    excess: float = option(0.08, "a class with more excess is suspicious", low=0, high=1)
    restore_epochs: int = option(60, "epochs of restoring; 0: none", low=0)
    restore_lr: float = option(0.01, "learning rate of restoring", low=0)
    gentle: float = option(0.5, "factor of both rates where the signs name a class", low=0)
    hold_weight: float = option(1.0, "weight of corrupted images in restoring; twice, where there was an excess", low=0)
    clip: float = option(5.0, "bound on the gradient norm", low=0)

    def run(self, model: nn.Module, clean: ImageSet, monitor: Monitor) -> Repair:
        name, head = self.head(model, clean)
        original = copied(model).requires_grad_(False)
        original.eval()
        diagnosis = ULRL(
            batch_size=self.batch_size, amp=self.amp, random_seed=self.random_seed, linear_name=self.linear_name
        )
        neurons, unlearned, _ = diagnosis.diagnose(model, clean, monitor)  # to be shown beside the signs
        signs, ways = look_for_signs(original, clean, monitor, amp=self.amp, random_seed=self.random_seed)
        neurons, flagged = neurons.join(signs), _above(signs.evidence, DOUBTFUL)
        pace = self.gentle if flagged else 1.0
        corruptions = _Corruptions(clean.spec, Draws(self.random_seed, clean.device), self.learning_share)
        corruptions.seek(original, clean, self.tries, self.amp)
        corruptions.aim(ways, flagged)
        likeness = redraw(head, flagged if self.init else [], self.random_seed)
        self._train(model, clean, monitor, "harden", self.epochs, pace * self.lr, corruptions,
                    self._hardening(original, _mask(flagged, clean), corruptions, likeness))  # fmt: skip
        neurons["excess"] = self._excess(original, model, clean, corruptions).cpu().numpy()
        evidence = {"head": name, **unlearned.evidence, "reinitialised": flagged if self.init else [],
                    "evidence_threshold": DOUBTFUL, "excess_threshold": self.excess}  # fmt: skip
        named = _above(neurons.excess, self.excess)
        certain = (neurons.evidence >= SUSPICIOUS).any()
        flagged = [k for k in named if k in flagged] or (flagged if certain else [*flagged, *named])
        neurons["flagged"] = neurons.index.isin(flagged)
        corruptions.aim(ways, flagged)
        if self.restore_epochs:
            hold = self.hold_weight * (2 if named else 1)
            self._train(model, clean, monitor, "restore", self.restore_epochs, pace * self.restore_lr, corruptions,
                        self._restoring(original, _mask(flagged, clean), corruptions, hold))  # fmt: skip
        return Repair(model, flagged, {**evidence, "named_by_excess": named}, {"neurons": neurons})

    def _train(
        self, model: nn.Module, clean: ImageSet, monitor: Monitor, stage: str, epochs: int, lr: float,
        corruptions: _Corruptions, objective: Objective,
    ) -> None:  # fmt: skip
        """A stage, in place; at its end BatchNorm's statistics are those of plain images."""
        self.finetune(
            model, clean, monitor, stage, epochs=epochs, lr=lr, objective=objective, clip=self.clip or None,
            after_step=corruptions.learning.step,
        )  # fmt: skip
        statistics = self.batches(clean, f"{stage} statistics", drop_last=True)  # each batch weighs the same in them
        measure_statistics(model, (batch for _ in range(3) for batch in statistics))

    def _hardening(
        self, original: nn.Module, flagged: torch.Tensor, corruptions: _Corruptions,
        likeness: Callable[[], torch.Tensor],
    ) -> Objective:  # fmt: skip
        unflagged = (~flagged).nonzero().flatten()

        def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            plain = len(x) // 2
            mixed, _, _ = corruptions.mixed(x, plain)
            answers, to_mixed = original(torch.cat([x, mixed])).float().tensor_split([len(x)])
            inputs = torch.cat([x[:plain], corruptions(x[plain:]), mixed])
            logits, of_mixed = model(inputs).float().tensor_split([len(x)])
            hidden = flagged & ~flagged[y][:, None]
            told, answers = logits.masked_fill(hidden, _NEVER), answers.masked_fill(hidden, _NEVER)
            loss = self.label_weight * F.cross_entropy(logits, y) + _divergence(told, answers, 1)
            kept = _divergence(told[:plain], answers[:plain], self.temperature)
            kept = kept + _divergence(of_mixed[:, unflagged], to_mixed[:, unflagged], self.temperature)
            loss = loss + self.keep_weight * kept * plain / len(x) + self.alpha * likeness()
            return loss, logits.detach().argmax(1) == y

        return objective

    @torch.no_grad()
    def _excess(
        self, original: nn.Module, hardened: nn.Module, clean: ImageSet, corruptions: _Corruptions
    ) -> torch.Tensor:
        """Of each class, float [K] in [-1, 1]: step 2."""
        sums, counts = torch.zeros(2, clean.spec.num_classes, device=clean.device)
        hardened.eval()
        for _ in range(_LOOKS):
            for x, y in Batches(clean, self.batch_size):
                with autocast(clean.device, self.amp):
                    x = corruptions.random(x)
                    more = original(x).float().softmax(1) - hardened(x).float().softmax(1)
                others = F.one_hot(y, len(sums)) == 0
                sums += (more * others).sum(0)
                counts += others.sum(0)
        return sums / counts.clamp_min(1)

    def _restoring(
        self, original: nn.Module, flagged: torch.Tensor, corruptions: _Corruptions, hold: float
    ) -> Objective:
        kept, left_out = (~flagged).nonzero().flatten(), flagged.nonzero().flatten().tolist()

        def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            plain = len(x) // 2
            mixed, other, share = corruptions.mixed(x, len(x))
            inputs = torch.cat([x[:plain], mixed])
            answers, held = original(torch.cat([inputs, x[plain:]])).float().tensor_split([len(inputs)])
            told, heard = model(torch.cat([inputs, corruptions(x[plain:])])).float().tensor_split([len(inputs)])
            loss = self.keep_weight * _divergence(told[:, kept], answers[:, kept], self.temperature)
            labels = F.one_hot(y, len(flagged)).float()
            labels = torch.cat([labels[:plain], labels[other].lerp(labels, share.flatten(1))])
            for k in left_out:
                rest = torch.cat([told[:, :k], told[:, k + 1 :]], 1).logsumexp(1)
                loss = loss + F.binary_cross_entropy_with_logits(told[:, k] - rest, labels[:, k])
            hidden = flagged & ~flagged[y[plain:]][:, None]
            drift = _divergence(heard.masked_fill(hidden, _NEVER), held.masked_fill(hidden, _NEVER), 1)
            loss = loss + hold * (F.cross_entropy(heard, y[plain:]) + drift)
            return loss, told[plain:].detach().argmax(1) == labels[plain:].argmax(1)

        return objective


class _Corruptions:
    """Normalised images in and out: the first of a batch bear what is known, the next are corrupted at random, the last
    by what learns."""

    def __init__(self, spec: DatasetSpec, draws: Draws, learning_share: float) -> None:
        self.draws, self.learning = draws, Learning(draws)
        self._spec, self._share = spec, learning_share
        self.known: list[Change] = []
        self._found: list[Fixed] = []
        self._leads = torch.empty(0)

    def seek(self, model: nn.Module, clean: ImageSet, tries: int, amp: bool) -> None:
        """Take half of the random corruptions near those of `tries` that lead `model` astray; who leads far, more."""

        def answers(images: torch.Tensor) -> torch.Tensor:
            with autocast(clean.device, amp):
                return model(normalise(images * 255, self._spec)).float().softmax(1)

        if tries:
            x, y = next(iter(Batches(clean.subset(self.draws.order(len(clean))[:_SHOWN]), _SHOWN)))
            found = leading(answers, self._shown(x), y, self.draws, tries)
            self._found, self._leads = list(found), torch.tensor(list(found.values())).clamp_min(0.01)

    def aim(self, ways: Mapping[int, Sequence[Change]], classes: list[int]) -> None:
        """From now on let a quarter of the images bear one each of the known `ways` to these classes."""
        self.known = [way for k in classes for way in ways.get(k, ())]

    def _shown(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised images as the corruptions take them."""
        return (pixels(x, self._spec) / 255).clamp(0, 1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            known = len(x) // 4 if self.known else 0
            bearing = self._shown(torch.cat([self._borne(part) for part in x[:known].split(_EACH)])) if known else x[:0]
            images = self._shown(x[known:])
            first = len(images) - round(self._share * len(images))
            found = first // 2 if self._found else 0
            parts = images[:found].split(2) if found else ()
            changed = [bearing, *(self._sought()(part) for part in parts)]
            changed += [corrupt(images[found:first], self.draws), self.learning.apply(images[first:])]
            return normalise(torch.cat(changed) * 255, self._spec)

    def _borne(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised images with one of the known changes, each half as strong as it was found or more."""
        return self.known[self.draws.below(len(self.known))](x, 1 - self.draws.uniform(len(x), 1, 1, 1) / 2)

    def mixed(self, x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The first `count` images, each mixed with another of the batch; which, int64 [count], and their own share,
        float [count, 1, 1, 1]."""
        other, share = self.draws.order(len(x))[:count], self.draws.uniform(count, 1, 1, 1)
        return x[other].lerp(x[:count], share), other, share

    def random(self, x: torch.Tensor) -> torch.Tensor:
        """As a call, but all of the batch corrupted at random: by nothing that was sought or that learns."""
        with torch.autocast(x.device.type, enabled=False):
            return normalise(corrupt(self._shown(x), self.draws) * 255, self._spec)

    def _sought(self) -> Fixed:
        found = self._found[self.draws.among(self._leads)]
        return found.near(self.draws, _ASIDE * self.draws.share())


def _above(figures: pd.Series, bound: float) -> list[int]:
    """The classes whose figure is above `bound`, the highest first."""
    return figures[figures > bound].sort_values(ascending=False).index.tolist()


def _mask(classes: list[int], data: ImageSet) -> torch.Tensor:
    """bool [K]: which of the classes of `data` these are, on its device."""
    mask = torch.zeros(data.spec.num_classes, dtype=torch.bool, device=data.device)
    mask[classes] = True
    return mask


def _divergence(logits: torch.Tensor, answers: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(answers || logits), both [B, K], softened, and of the size of the plain one (arXiv 1503.02531)."""
    ours, its = F.log_softmax(logits / temperature, 1), F.log_softmax(answers / temperature, 1)
    return F.kl_div(ours, its, log_target=True, reduction="batchmean") * temperature**2
