"""Training, memory and whole runs against the plain way, for bench/speed.py."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ulrl.attacks.base import ATTACKS
from ulrl.attacks.lab import Lab
from ulrl.data.batches import Batches
from ulrl.data.datasets import dataset_spec, load_dataset
from ulrl.data.imageset import ImageSet, PoisonedSet
from ulrl.defenses.base import DEFENSES
from ulrl.machine import PeakMemory, has_bf16
from ulrl.models import build_model
from ulrl.seeds import generator
from ulrl.training import Monitor, TrainOptions, fit, judge
from ulrl.tv import torchvision

ROOT = Path(__file__).resolve().parent.parent
SPEC = dataset_spec("cifar10")


@dataclass(frozen=True)
class Profile:
    """How much is run: of training `steps` of 128 images and of evaluation `images`, `rounds` times.

    attack: images and epochs of the attack that is timed. ulrl: epochs of each stage, and images judged before and
    after. jobs: of a sweep that does nothing. files: images of a folder. seconds: of training in each of two processes.
    """

    device: str
    width: int
    steps: int
    images: int
    rounds: int
    attack: tuple[int, int]
    ulrl: tuple[int, int]
    jobs: int
    files: int
    seconds: float


@dataclass(frozen=True)
class Line:
    """A figure, measured once or several times, what was run for it, and what it is to be."""

    name: str
    unit: str
    values: list[float]
    run: str
    goal: str = ""

    def __str__(self) -> str:
        low, middle, high = min(self.values), statistics.median(self.values), max(self.values)
        figures = "".join(f"{v:>10.3g}" if v < 100 else f"{v:>10.0f}" for v in (low, middle, high))
        return f"{self.name:44}{figures} {self.unit:10} {len(self.values):>3}  {self.goal:10} {self.run}"


# Memory


def memory(profile: Profile) -> Iterator[Line]:
    """In processes of their own, whose peak is theirs."""
    peak = json.loads(child("peak", str(profile.device), str(profile.width)))
    yield Line("memory: peak, to data + weights + activations", "ratio", [peak["ratio"]],
               f"training, batch of 128, {peak['needed']:.0f} MB needed", "< 1.3")  # fmt: skip
    if profile.files:
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), profile.files)
            held = json.loads(child("folder", folder))
        yield Line("memory: a folder of images, to their size", "ratio", [held["ratio"]],
                   f"load_dataset, {profile.files:,} images of 64x64, {held['whole']:.0f} MB", "< 0.5")  # fmt: skip


def write_folder(root: Path, count: int) -> None:
    """train/ and test/ with ten classes; the same few pictures again and again."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((64, 64)) for _ in range(10)]
    for i, picture in enumerate(pictures):
        for split, n in (("train", count * 9 // 100), ("test", count // 100)):
            folder = root / split / str(i)
            folder.mkdir(parents=True)
            picture.save(folder / "0.jpg")
            for k in range(1, n):
                os.link(folder / "0.jpg", folder / f"{k}.jpg")


def peak_of_training(device_name: str, width: str) -> dict[str, float]:
    """Of one epoch: the peak beyond what the process had, over what data, weights and activations need, in MB."""
    device, options = torch.device(device_name), TrainOptions()
    fit_some(*untrained(random_images(256), 4, device))  # what libraries take for themselves
    data = random_images(2048)
    model, batches, optimizer = untrained(data, int(width), device)
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)),
    ):
        x, y = next(iter(batches))
        loss = F.cross_entropy(model(x), y)
    del loss
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    activations = sum(size for at, size in kept.items() if at not in own)
    weights = 3 * sum(p.nbytes for p in model.parameters())  # and gradients, and momentum
    watch = PeakMemory(device)
    before = 0.0 if device.type == "cuda" else resident("VmRSS") - data.images.nbytes / 1e6
    fit_some(model, batches, optimizer)
    needed = (data.images.nbytes + weights + activations) / 1e6
    del options
    return {"ratio": (watch.mb() - before) / needed, "needed": needed}


def held_for_a_folder(path: str) -> dict[str, float]:
    """Memory that is the process's own, not a mapped file's, after reading a folder of images, over their bytes."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        before = resident("RssAnon")
        train, test = load_dataset("folder", path)
        whole = (train.images.numel() + test.images.numel()) / 1e6
        return {"ratio": max(0.0, resident("RssAnon") - before) / whole, "whole": whole}


def resident(key: str) -> float:
    """A line of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024 / 1e6


CHILDREN: dict[str, Callable[..., dict[str, float]]] = {"peak": peak_of_training, "folder": held_for_a_folder}


def child(*arguments: str) -> str:
    """The last line that this script prints when it is told so by --child."""
    command = [sys.executable, "-m", "bench.speed", "--child", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]


# Training


def random_images(count: int) -> ImageSet:
    draw = generator(0, "images")
    pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=draw)
    return ImageSet(pixels, torch.randint(10, (count,), generator=draw), SPEC)


def untrained(data: ImageSet, width: int, device: torch.device) -> tuple[nn.Module, Batches, torch.optim.Optimizer]:
    """A PreAct-ResNet18, batches of the data on the device, and an optimiser, as an attack has them."""
    options, model = TrainOptions(), build_model("preactresnet18", 10, 3, width).to(device)
    stream = generator(0, "batches", device)
    return model, Batches(data.to(device), options.batch_size, stream), options.optimizer(model)


def fit_some(model: nn.Module, batches: Batches, optimizer: torch.optim.Optimizer) -> None:
    fit(model, batches, 1, optimizer, None, Monitor(), "train")


class PilImages(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """As the releases hold them: PIL images, transformed one by one."""

    def __init__(self, data: ImageSet, train: bool) -> None:
        T = torchvision.transforms
        augment = [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip()] if train else []
        self.transform = T.Compose([T.Resize((32, 32)), *augment, T.ToTensor(), T.Normalize(SPEC.mean, SPEC.std)])
        self.images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in data.images]
        self.labels = data.labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[i]), self.labels[i]


def training(profile: Profile) -> Iterator[Line]:
    """Against a plain loop in fp32 over PIL images, and against the bare net on one batch that is on the device."""
    device, batch = torch.device(profile.device), TrainOptions.batch_size
    train, test = random_images(profile.steps * batch), random_images(profile.images)
    model, batches, optimizer = untrained(train, profile.width, device)
    plain = build_model("preactresnet18", 10, 3, profile.width).to(device, memory_format=torch.contiguous_format)
    plain_optimizer = TrainOptions().optimizer(plain)
    shuffled, ordered = (
        torch.utils.data.DataLoader(PilImages(data, train=fresh), batch, shuffle=fresh)
        for data, fresh in ((train, True), (test, False))
    )

    def plain_training() -> None:
        plain.train()
        for x, y in shuffled:
            plain_optimizer.zero_grad()
            loss = F.cross_entropy(plain(x.to(device)), y.to(device))
            loss.backward()
            plain_optimizer.step()
            loss.item()

    @torch.no_grad()
    def plain_evaluation() -> None:
        plain.eval()
        sum((plain(x.to(device)).argmax(1) == y.to(device)).sum().item() for x, y in ordered)

    fixed = next(iter(batches))

    def bare() -> None:
        for _ in range(profile.steps):
            with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
                loss = F.cross_entropy(model(fixed[0]), fixed[1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loss.item()

    on_device = test.to(device)
    ran = f"width {profile.width}, {profile.steps} steps of {batch}"
    on_gpu = device.type == "cuda"
    ratios, rate = in_turn(lambda: fit_some(model, batches, optimizer), plain_training, profile.rounds)
    yield Line("training", "images/s", [len(train) / s for s in rate], ran)
    yield Line("training, times a plain loop's speed", "ratio", ratios, ran, ">= 15" if on_gpu else ">= 2")
    ratios, _ = in_turn(lambda: judge(model, on_device, None), plain_evaluation, profile.rounds)
    yield Line("evaluation, times a plain loop's speed", "ratio", ratios, f"{len(test):,} images")
    ratios, _ = in_turn(lambda: fit_some(model, batches, optimizer), bare, profile.rounds)
    yield Line("training, to the bare net on a fixed batch", "ratio", ratios, ran, ">= 0.6")


def in_turn(ours: Callable[[], object], other: Callable[[], object], rounds: int) -> tuple[list[float], list[float]]:
    """The other's seconds over ours, and ours, of each round but the first, which warms both up."""
    times = [(seconds(ours), seconds(other)) for _ in range(rounds + 1)][1:]
    return [b / a for a, b in times], [a for a, _ in times]


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


# Whole runs


def whole_runs(profile: Profile) -> Iterator[Line]:
    """ULRL with its judgement, and an attack, from images in memory to figures."""
    device, on_gpu = torch.device(profile.device), profile.device == "cuda"
    epochs, judged = profile.ulrl
    clean, test = random_images(500).to(device), random_images(judged // 2).to(device)
    poisoned = PoisonedSet(**vars(test), original_labels=test.labels, original_indices=torch.arange(len(test)))
    model = build_model("preactresnet18", 10, 3, profile.width).to(device)
    # A threshold below any accuracy keeps unlearning going for all its epochs.
    ulrl = DEFENSES["ulrl"](unlearning_epochs=epochs, relearn_epochs=epochs, clean_threshold=-1.0)  # type: ignore[call-arg]

    def repair() -> None:
        judge(model, test, poisoned)
        judge(ulrl.run(model, clean, Monitor()).model, test, poisoned)

    n = profile.rounds if on_gpu else 1
    ran = f"500 samples, {epochs} + {epochs} epochs, {judged:,} images judged twice"
    yield Line("ULRL with judgement", "s", [seconds(repair) for _ in range(n)], ran, "< 6" if on_gpu else "")
    count, epochs = profile.attack
    data, options = random_images(count).to(device), TrainOptions(epochs=epochs)
    with tempfile.TemporaryDirectory() as cache:

        def new_model(stream: str) -> nn.Module:
            return build_model("preactresnet18", 10, 3, profile.width, stream=stream).to(device)

        lab = Lab(data, torch.arange(count), options, Monitor(), new_model, None, Path(cache), "")
        attack = ATTACKS["badnet"]()
        spent = seconds(lambda: attack.train(new_model("initialisation"), lab))
        yield Line("an attack's training", "s", [spent], f"badnet, {count:,} images, {epochs} epochs",
                   "< 40" if on_gpu else "")  # fmt: skip
        for name in () if on_gpu else ("bpp", "wanet"):
            other = ATTACKS[name]()
            ratios, _ = in_turn(
                lambda: attack.train(new_model("a"), lab),
                lambda other=other: other.train(new_model("a"), lab), profile.rounds,
            )  # fmt: skip
            yield Line(f"{name}: an epoch, to badnet's", "ratio", ratios, f"{count:,} images")
