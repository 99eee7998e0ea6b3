"""What attacks cost:  python bench/attack_speed.py

Seconds to poison 50,000 colour images of 32x32 with each trigger that is not learned, and the time of a
training epoch of each attack that controls the training, as a ratio to a BadNets epoch of the same net
measured in turn with it (random bytes: only the time matters; Blind attacks in three of its four epochs).
bench/results/attack_speed.txt holds a run.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from ulrl.attacks.base import ATTACKS, Attack
from ulrl.attacks.lab import Lab
from ulrl.data.datasets import dataset_spec
from ulrl.data.imageset import ImageSet
from ulrl.models import build_model
from ulrl.training import Monitor, TrainOptions

SPEC = dataset_spec("cifar10")
QUICK = {
    "blind": {"backdoor_batch_loss_threshold": 1e9},
    "inputaware": {"clean_train_epochs": 1},
    "lira": {"both_train_epochs": 1},
}


def images(count: int) -> ImageSet:
    stream = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=stream)
    return ImageSet(pixels, torch.randint(0, 10, (count,), generator=stream), SPEC)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def lab(data: ImageSet, cache: str) -> Lab:
    def new_model(stream: str) -> torch.nn.Module:
        return build_model("preactresnet18", 10, 3, 16, stream=stream)

    training = TrainOptions(epochs=4, batch_size=128)
    return Lab(data, torch.arange(len(data)), training, Monitor(), new_model, None, Path(cache), "")


def poisoning(name: str, many: torch.Tensor) -> str:
    attack = ATTACKS[name]()
    spent = seconds(lambda: attack.poison(many, train=True))
    return f"{name:16s} poisons {len(many):,} images in {spent:.2f} s"


def epoch_ratio(name: str, few: ImageSet) -> str:
    plain, ratios = ATTACKS["badnet"](), []
    with tempfile.TemporaryDirectory() as cache:
        work = lab(few, cache)
        attack = ATTACKS[name](**QUICK.get(name, {})).learn(work)

        def train(some: Attack) -> float:
            return seconds(lambda: some.train(work.new_model(""), work))

        for _ in range(3):
            base = train(plain)
            ratios.append(train(attack) / base)
    low, middle, high = sorted(ratios)
    return f"{name:16s} epoch is {middle:.2f} of a BadNets one ({low:.2f}-{high:.2f})"


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    many, few = images(50_000).images, images(640)
    for name, cls in ATTACKS.items():
        if cls.learn is Attack.learn and name != "prototype":
            print(poisoning(name, many))
    for name, cls in ATTACKS.items():
        if cls.controls_training:
            print(epoch_ratio(name, few))


if __name__ == "__main__":
    main()
