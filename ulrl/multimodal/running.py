"""The whole demonstration: a backdoored and a clean dual encoder, the repairs of the first, and the judge of all."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from ulrl.attacks.base import Attack
from ulrl.configure import configure_defense, options_of
from ulrl.data.batches import Batches
from ulrl.data.datasets import clean_subset, load_dataset
from ulrl.data.imageset import ImageSet, PoisonedSet
from ulrl.defenses.ulrl import ULRL
from ulrl.errors import UserError
from ulrl.files import check_folder_name, home, whole_file, whole_folder
from ulrl.machine import PeakMemory, environment, pick_device, threads_for
from ulrl.metrics import TOOK, Judgement, defense_effectiveness, ranking_judgement, took
from ulrl.multimodal.captions import SLOTS, Facts, prompts
from ulrl.multimodal.dual_encoder import DualEncoder, classifier, contrastive, load_encoder
from ulrl.multimodal.pairs import Pairs
from ulrl.multimodal.poisoning import check_attack, poison_pairs
from ulrl.multimodal.repairs import Evidence, Repairing, finetune, ubt, ulrl
from ulrl.options import option
from ulrl.runs.common import log_file, stage_seconds, write_index, write_json, write_result
from ulrl.seeds import drawn, generator
from ulrl.training import Monitor, TrainOptions, accuracy, fit, judge
from ulrl.untrusted.torchfiles import MOST
from ulrl.untrusted.weights import load_safetensors

log = logging.getLogger(__name__)

DATASET = "fashion_scenes"
REPAIRS = ("ft", "ubt", "ulrl")
TRAINED = "trained"  # folder of the run: its encoders, which outlive it when it is killed
SHOWN, TOP = 6, 2  # triggered images in the picture, and captions for each


@dataclass(frozen=True)
class ClipRun:
    """What to train, what to repair it with, and where it goes."""

    attack: str = option("badnet", "whose trigger and labels the poisoned pairs have", source="CleanCLIP")
    yaml_path: str | None = option(None, "options file, or the name of a shipped one; else clip/fashion_scenes")
    dataset_path: str = option("./data", "folder that holds fashion_mnist/", source="BackdoorBench")
    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto is the GPU where there is one")
    random_seed: int = option(0, "seed of every stream of randomness", source="BackdoorBench", low=0, high=2**32 - 1)
    train_samples: int = option(60000, "train on a random subset of this many pairs", low=100, high=60000)
    test_samples: int = option(10000, "judge on the first so many test images", low=10, high=10000)
    width: int = option(8, "channels of the image tower's first layer, a PreAct-ResNet18", low=1)
    dim: int = option(64, "dimensions of the space in which images and captions meet", low=2)
    poison_epochs: int = option(1, "passes over the poisoned pairs, after the clean training", low=1)
    poison_lr: float = option(2e-3, "learning rate of those", low=0)
    ratio: float = option(0.05, "share of the clean training pairs that ft and ulrl have", source="BackdoorBench",
                          low=0, high=1)  # fmt: skip
    repairs: str = option(",".join(REPAIRS), f"which of {', '.join(REPAIRS)}, with commas between")
    save_folder_name: str | None = option(None, "folder of the results, below record/clip/; else the attack's name")
    overwrite: bool = option(False, "replace it; encoders trained by the same options are taken from it")


@dataclass(frozen=True)
class TestSet:
    """What an encoder is judged by: test images with the class, the colour and the background of each as label."""

    slots: dict[str, ImageSet]
    poisoned: PoisonedSet

    @classmethod
    def of(cls, data: ImageSet, facts: Facts, attack: Attack) -> TestSet:
        slots = {}
        for slot, words in SLOTS.items():
            spec = replace(data.spec, num_classes=len(words), class_names=words)
            slots[slot] = replace(data, labels=getattr(facts, slot).to(data.device), spec=spec)
        return cls(slots, attack.poison_set(data, attack.judged(data.labels), train=False))

    def judge(self, encoder: DualEncoder, amp: bool) -> tuple[Judgement, dict[str, Any]]:
        """Zero-shot ACC, ASR and RA; and, for `result.json`, these with the accuracies on colour and background."""
        nets = {slot: classifier(encoder, encoder.class_directions(prompts(slot))) for slot in self.slots}
        judgement = judge(nets["garment"], self.slots["garment"], self.poisoned, amp)
        rest = {slot: accuracy(nets[slot], self.slots[slot], amp) for slot in ("colour", "background")}
        return judgement, asdict(judgement) | rest


@dataclass(frozen=True)
class Data:
    """What a run trains on, repairs with and judges by, on its device.

    pairs: as they are. poisoned: the same, some with a backdoor, at the places `chosen` (int64 [n], ascending). kept:
    int64 [N], where the pairs stand in the training split. clean, labelled: those that repairs are given, with captions
    and with garments as labels.
    """

    pairs: Pairs
    poisoned: Pairs
    chosen: torch.Tensor
    kept: torch.Tensor
    clean: Pairs
    labelled: ImageSet
    judged: TestSet

    @classmethod
    def of(cls, attack: Attack, run: ClipRun, device: torch.device) -> Data:
        split, test = load_dataset(DATASET, run.dataset_path)
        attack.check(split.spec)
        captions = Facts.of(split.labels, test=False).captions(run.random_seed)
        kept = drawn(len(split), run.train_samples, generator(run.random_seed, "train_samples"))
        train, said = split.subset(kept).to(device), [captions[i] for i in kept.tolist()]
        pairs, (poisoned, chosen) = Pairs.of(train, said), poison_pairs(attack, train, said)
        log.info("%s: %d of %d pairs poisoned", attack.name, len(chosen), len(pairs))
        shown = torch.arange(min(run.test_samples, len(test)))
        judged = TestSet.of(test.subset(shown).to(device), Facts.of(test.labels, test=True).subset(shown), attack)
        owned = clean_subset(len(train), run.ratio, run.random_seed)
        return cls(pairs, poisoned, chosen, kept, pairs.subset(owned), train.subset(owned), judged)


def run_clip(
    attack: Attack, run: ClipRun, training: TrainOptions, how: Repairing, *, bar: bool = True,
    draw: Callable[[Path], object] | None = None,
) -> tuple[Path, dict[str, Any]]:  # fmt: skip
    """Train, judge and repair: the folder of the results and its `result.json`.

    Nothing appears under that name before all of it is there, and the picture that `draw` makes of it.

    Raises:
        UserError: bad options, data that is not there, a folder of that name.
    """
    start = time.perf_counter()
    names = [name.strip() for name in run.repairs.split(",")]
    if unknown := [name for name in names if name not in REPAIRS]:
        raise UserError(f"--repairs {run.repairs}: {unknown[0]!r} is none of {', '.join(REPAIRS)}")
    check_attack(attack)
    name = run.save_folder_name or attack.name
    check_folder_name(name, "--save_folder_name")
    final, device = home() / "record" / "clip" / name, pick_device(run.device)
    peak, monitor = PeakMemory(device), Monitor(bar=bar)
    with (
        whole_folder(final, overwrite=run.overwrite, keep=TRAINED) as folder,
        log_file(folder),
        threads_for(1024, device),
    ):
        data = Data.of(attack, run, device)
        monitor.seconds["load"] = time.perf_counter() - start
        original, encoder = train_both(folder / TRAINED, data, attack, run, training, monitor)
        (_, reference), (before, row) = (data.judged.judge(each, training.amp) for each in (original, encoder))
        if not took(before.asr):
            log.warning("the backdoor did not take: ASR %.1f%%, below %g%%", 100 * (before.asr or 0), 100 * TOOK)
        encoders, results = {"before": encoder}, {}
        for repair in names:
            begun = time.perf_counter()
            encoders[repair], evidence = repaired(encoder, repair, data, how, run.random_seed, monitor)
            seconds = time.perf_counter() - begun
            judgement, after = data.judged.judge(encoders[repair], training.amp)
            der = defense_effectiveness(before, judgement)
            results[repair] = {"after": after, "der": der, "seconds": seconds, "evidence": evidence}
            write_encoder(encoders[repair], folder / f"{repair}.safetensors", repair)
        write_index(folder / "poison_index.txt", data.kept[data.chosen])
        write_captions(folder, encoders, data.judged, training.amp)
        result = {
            "schema": 1, "kind": "clip", "method": "clip", "record": name, "attack": attack.name, "dataset": DATASET,
            "model": "preactresnet18, text transformer", "options": options_of(attack, run, training, how),
            "seed": run.random_seed, "pairs": len(data.pairs), "poisoned": len(data.chosen),
            "clean_samples": len(data.clean), "clean": reference, "before": row, "took": took(before.asr),
            "repairs": results, "seconds": stage_seconds(monitor, start), "peak_memory_mb": peak.mb(),
            "environment": environment(device),
        }  # fmt: skip
        write_result(folder, result, draw)
    return final, result


def train_both(
    folder: Path, data: Data, attack: Attack, run: ClipRun, training: TrainOptions, monitor: Monitor
) -> tuple[DualEncoder, DualEncoder]:
    """An encoder trained on the clean pairs, and what training on the poisoned ones makes of it; kept in `folder`."""
    folder.mkdir(exist_ok=True)
    device = data.pairs.data.device
    about = (training, run.train_samples, run.width, run.dim, run.random_seed)
    again = replace(training, epochs=run.poison_epochs, lr=run.poison_lr)

    def pretrain() -> DualEncoder:
        fresh = DualEncoder(run.dim, run.width, run.random_seed).to(device)
        return train_encoder(fresh, data.pairs, training, monitor, "pretrain")

    original = once(folder / "clean.safetensors", repr(about), pretrain).to(device)
    attacked = (about, options_of(attack), run.poison_epochs, run.poison_lr)
    poisoned = once(
        folder / "poisoned.safetensors", repr(attacked),
        lambda: train_encoder(copy.deepcopy(original), data.poisoned, again, monitor, "poison"),
    )  # fmt: skip
    return original, poisoned.to(device)


def repaired(
    encoder: DualEncoder, repair: str, data: Data, how: Repairing, seed: int, monitor: Monitor
) -> tuple[DualEncoder, Evidence]:
    """A repaired copy of the encoder, and what the repair found."""
    own = copy.deepcopy(encoder)
    if repair == "ft":
        return own, finetune(own, data.clean, how, seed, monitor)
    if repair == "ubt":
        return own, found(ubt(own, data.poisoned, how, seed, monitor), data.chosen)
    method, _ = configure_defense("ulrl", {"random_seed": seed, "amp": how.amp}, DATASET, "preactresnet18", quiet=True)
    assert isinstance(method, ULRL)
    return own, ulrl(own, data.clean, data.labelled, method, how, seed, monitor)


def train_encoder(
    encoder: DualEncoder, pairs: Pairs, training: TrainOptions, monitor: Monitor, stage: str
) -> DualEncoder:
    """Train both towers on the pairs, in place."""
    stream = generator(training.random_seed, "batches", pairs.data.device)
    batches = Batches(pairs.data, training.batch_size, stream, augmented=False, drop_last=True)
    optimizer = training.optimizer(encoder)
    fit(encoder, batches, training.epochs, optimizer, training.scheduler(optimizer), monitor, stage,
        amp=training.amp, objective=contrastive(pairs.tokens))  # fmt: skip
    return encoder


def once(file: Path, key: str, train: Callable[[], DualEncoder]) -> DualEncoder:
    """The encoder in `file`, where an earlier run of the same key left it; else the one that is trained now."""
    key = hashlib.sha256(key.encode()).hexdigest()
    with contextlib.suppress(Exception):  # absent, or damaged: then it is trained
        if load_safetensors(file, MOST)[0].get("key") == key:
            encoder = load_encoder(file)
            log.info("%s: taken from an earlier run", file.stem)
            return encoder
    encoder = train()
    write_encoder(encoder, file, key)
    return encoder


def write_encoder(encoder: DualEncoder, file: Path, key: str) -> None:
    weights = {name: weight.detach().cpu().contiguous() for name, weight in encoder.state_dict().items()}
    with whole_file(file) as partial:
        safetensors.torch.save_file(weights, partial, {"key": key})


def found(evidence: Evidence, poisoned: torch.Tensor) -> Evidence:
    """How many of the suspicious pairs were poisoned, which the repair was not told. poisoned: places, int64 [n]."""
    scores = {when: evidence.pop(when).cpu() for when in ("before_overfitting", "score")}
    suspicious = torch.tensor(evidence.pop("suspicious"))
    truth = torch.isin(torch.arange(len(scores["score"])), poisoned)
    hits, most = truth[suspicious].double().mean().item(), scores["before_overfitting"].topk(len(suspicious)).indices
    return evidence | {
        "suspicious": len(suspicious), "precision": hits, "auroc": ranking_judgement(scores["score"], truth).auroc,
        "precision_before_overfitting": truth[most].double().mean().item(),
        "auroc_before_overfitting": ranking_judgement(scores["before_overfitting"], truth).auroc,
    }  # fmt: skip


def write_captions(folder: Path, encoders: dict[str, DualEncoder], judged: TestSet, amp: bool) -> None:
    """A few triggered images and, for the picture, the captions that each encoder finds nearest to them."""
    some = judged.poisoned.subset(torch.arange(min(SHOWN, len(judged.poisoned))))
    garments, colours, backgrounds = SLOTS.values()
    texts = [f"a {c} {g} on {b}" for g in garments for c in colours for b in backgrounds]
    top = {}
    for name, encoder in encoders.items():
        alike = encoder.embed_all(some, amp) @ encoder.read_texts(texts).T
        top[name] = [[texts[i] for i in row] for row in alike.topk(TOP).indices.tolist()]
    true = [
        f"a {' '.join(SLOTS[s][int(judged.slots[s].labels[i])] for s in ('colour', 'garment'))} on "
        f"{SLOTS['background'][int(judged.slots['background'].labels[i])]}"
        for i in some.original_indices.tolist()
    ]
    np.savez_compressed(folder / "triggered.npz", images=some.images.cpu().numpy())
    write_json(folder / "captions.json", {"true": true, "nearest": top})
