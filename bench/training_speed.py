"""Training and evaluation speed against the plain way, in one run:  python bench/training_speed.py

The plain way is what BackdoorBench's scripts do: PIL images through a DataLoader with torchvision's
transforms, fp32, contiguous memory. Both sides run PreAct-ResNet18 on the same 32x32 colour images
(random bytes: only the time matters), in turn, and the ratio of the median round is printed, since the
machine's speed drifts. bench/results/training_speed.txt holds a run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from PIL import Image

from ulrl.data.batches import Batches
from ulrl.data.datasets import dataset_spec
from ulrl.data.imageset import ImageSet
from ulrl.machine import has_bf16
from ulrl.models import build_model
from ulrl.seeds import generator
from ulrl.training import Monitor, TrainOptions, fit, predict
from ulrl.tv import torchvision

SPEC = dataset_spec("cifar10")


class PilImages(torch.utils.data.Dataset):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="training steps per round")
    parser.add_argument("--images", type=int, default=1024, help="images evaluated per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0, help="DataLoader workers of the plain way")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = TrainOptions(epochs=1)

    draw = generator(0, "images")

    def images(n: int) -> ImageSet:
        pixels = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=draw)
        return ImageSet(pixels, torch.randint(10, (n,), generator=draw), SPEC)

    train, test = images(args.steps * options.batch_size), images(args.images)
    ours = build_model("preactresnet18", 10, 3, args.width).to(device)
    plain = build_model("preactresnet18", 10, 3, args.width).to(memory_format=torch.contiguous_format).to(device)

    def loader(data: ImageSet, shuffle: bool) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(
            PilImages(data, train=shuffle), options.batch_size, shuffle=shuffle, num_workers=args.workers
        )

    plain_train, plain_test = loader(train, True), loader(test, False)
    plain_optimizer = options.optimizer(plain)

    def train_plain() -> None:
        plain.train()
        for x, y in plain_train:
            x, y = x.to(device), y.to(device)
            plain_optimizer.zero_grad()
            loss = F.cross_entropy(plain(x), y)
            loss.backward()
            plain_optimizer.step()
            loss.item()

    @torch.no_grad()
    def evaluate_plain() -> None:
        plain.eval()
        hits = 0
        for x, y in plain_test:
            hits += (plain(x.to(device)).argmax(1) == y.to(device)).sum().item()

    batches = Batches(train.to(device), options.batch_size, generator(0, "batches", device))
    optimizer = options.optimizer(ours)

    def train_ours() -> None:
        fit(ours, batches, 1, optimizer, options.scheduler(optimizer), Monitor(), "train")

    def evaluate_ours() -> None:
        predict(ours, test.to(device)).sum().item()

    print(
        f"{device}, {torch.get_num_threads()} threads, bf16 {has_bf16(device)}, torch {torch.__version__}, "
        f"width {args.width}"
    )
    for name, a, b, n in (
        ("training", train_ours, train_plain, len(train)),
        ("evaluation", evaluate_ours, evaluate_plain, len(test)),
    ):
        compare(name, a, b, n, args.rounds)


def compare(name: str, ours: Callable[[], None], plain: Callable[[], None], images: int, rounds: int) -> None:
    """Time both in turn after one warm-up each, and print images per second and the ratio."""
    times: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        ours()
        middle = time.perf_counter()
        plain()
        times.append((middle - start, time.perf_counter() - middle))
    times = times[1:]
    ratios = [b / a for a, b in times]
    fast, slow = (statistics.median(images / t for t in side) for side in zip(*times, strict=True))
    print(
        f"{name:10}  ulrl {fast:7.0f} images/s   plain {slow:7.0f} images/s   "
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f} over {rounds} rounds)"
    )


if __name__ == "__main__":
    main()
