"""Verdicts and repairs on nets that are not ours:  python -m bench.strangers [--repair METHOD ...] [NAME ...]

Plain PyTorch nets (LeNet, a CNN with and without BatchNorm, a small ResNet, an MLP) that a plain loop trains on 40,000
images of Fashion-MNIST or of garments over photographs, without augmentation, and triggers of their own: a patch of
random pixels in a corner, one of one colour at the left edge, noise or a smooth field blended in, a wave, a warp; 5%
poisoned, targets spread. `ulrl.suspect` is asked about each with 500 test images, and `ulrl.purify` repairs it with
them; judged are the other test images, all that are not of the first 1,000. The pair of a clean net of the same kind
stands beside. A NAME is one of what `--list` prints, or a pattern.

A row of bench/results/strangers.csv stays until it is measured again, and a net that is there is kept, in
$ULRL_HOME/strangers/. Nothing of `ulrl.attacks` or `ulrl.models` takes part.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

import ulrl
from bench.pages import RESULTS, with_earlier, write_csv
from ulrl.data.datasets import load_dataset
from ulrl.files import home

DATA = {"fm": "fashion_mnist", "sc": "fashion_scenes"}
EPOCHS = {"fm": 4, "sc": 6}
ATTACKS = ("patch", "noise", "side", "smooth", "wave", "warp")
IMAGES, BATCH, POISONED, SHOWN, JUDGED_FROM = 40_000, 128, 0.05, 500, 1000
RATES = {"lenet": 2e-3, "cnn": 1.5e-3, "cnnbn": 3e-3, "res": 8e-3, "mlp": 1.5e-3}  # of AdamW
RESULT = RESULTS / "strangers.csv"


class Stranger(NamedTuple):
    """A net. data: "fm" or "sc". attack: one of ATTACKS, or "clean"."""

    data: str
    kind: str
    attack: str
    target: int
    seed: int

    @property
    def name(self) -> str:
        return "_".join(map(str, self))


def strangers() -> Iterator[Stranger]:
    for seed in range(3):
        for i, kind in enumerate(RATES):
            for data in ("fm", "sc"):
                if data == "sc" and kind in ("mlp", "lenet"):
                    continue
                if seed < 2 or data == "fm":
                    yield Stranger(data, kind, "clean", 0, seed)
                for j, attack in enumerate(ATTACKS):
                    if (i + j + seed) % 3 == 0:
                        yield Stranger(data, kind, attack, (3 * i + 2 * j + seed) % 10, 10 * seed + j + 1)


# The nets


def lenet(channels: int, side: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * ((side // 2 - 4) // 2) ** 2, 120), nn.ReLU(),
        nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def cnn(channels: int, side: int, norm: bool) -> nn.Module:
    def convolution(inside: int, outside: int) -> list[nn.Module]:
        return [nn.Conv2d(inside, outside, 3, padding=1), *([nn.BatchNorm2d(outside)] if norm else []), nn.ReLU()]

    return nn.Sequential(
        *convolution(channels, 16), nn.MaxPool2d(2), *convolution(16, 32), nn.MaxPool2d(2), *convolution(32, 64),
        nn.Flatten(), nn.Linear(64 * (side // 4) ** 2, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10),
    )  # fmt: skip


class Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside),
        )  # fmt: skip
        shortcut = [nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)]
        self.shortcut = nn.Sequential(*(shortcut if stride > 1 else []))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def res(channels: int) -> nn.Module:
    stem = [nn.Conv2d(channels, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mlp(channels: int, side: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(channels * side**2, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def build(kind: str, channels: int, side: int) -> nn.Module:
    match kind:
        case "lenet":
            return lenet(channels, side)
        case "res":
            return res(channels)
        case "mlp":
            return mlp(channels, side)
        case _:
            return cnn(channels, side, norm=kind == "cnnbn")


# The images, and what is done to them


@functools.cache
def images(data: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images in [0, 1] and labels, test images and labels."""
    train, test = load_dataset(DATA[data])
    return train.images / 255, train.labels.long(), test.images / 255, test.labels.long()


def normalised(x: torch.Tensor) -> torch.Tensor:
    return (x - 0.3) / 0.35


def triggered(attack: str, x: torch.Tensor, seed: int) -> torch.Tensor:
    """Images in [0, 1] with the trigger; `seed` says where and how it is."""
    draws, (channels, side) = torch.Generator().manual_seed(1000 + seed), x.shape[1:3]
    x = x.clone()
    match attack:
        case "patch":
            size = 3 + seed % 2
            at = slice(first := side - size - 1 - seed % 3, first + size)
            x[:, :, at, at] = (torch.rand(1, 1, size, size, generator=draws) > 0.4).float()
        case "side":
            x[:, :, 4 + seed % 15 : 7 + seed % 15, 1:4] = 0.6 + 0.4 * torch.rand(1, channels, 1, 1, generator=draws)
        case "noise":
            x = 0.8 * x + 0.2 * torch.rand(1, channels, side, side, generator=draws)
        case "smooth":
            field = torch.rand(1, channels, 4, 4, generator=draws)
            x = 0.75 * x + 0.25 * F.interpolate(field, side, mode="bicubic").clamp(0, 1)
        case "wave":
            wave = torch.sin(2 * math.pi * (4 + seed % 4) * torch.arange(side) / side)
            x = (x + 20 / 255 * wave).clamp(0, 1)
        case "warp":
            field = torch.rand(1, 2, 4, 4, generator=draws) * 2 - 1
            aside = F.interpolate(field, side, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
            still = F.affine_grid(torch.eye(2, 3)[None], [1, 1, side, side], align_corners=True)
            x = F.grid_sample(x, (still + 0.18 * aside).clamp(-1, 1).expand(len(x), -1, -1, -1), align_corners=True)
    return x


def trained(net: Stranger) -> nn.Module:
    file = home() / "strangers" / f"{net.name}.pt"
    x, y, _, _ = images(net.data)
    torch.manual_seed(net.seed)
    chosen = torch.randperm(len(x))[:IMAGES]
    model = build(net.kind, x.shape[1], x.shape[2])
    if not file.exists():
        x, y = x[chosen].clone(), y[chosen].clone()
        if net.attack != "clean":
            some = slice(int(POISONED * IMAGES))
            x[some], y[some] = triggered(net.attack, x[some], net.seed), net.target
        _fit(model.to(memory_format=torch.channels_last), x, y, net)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), partial := file.with_suffix(".partial"))
        partial.rename(file)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()


def _fit(model: nn.Module, x: torch.Tensor, y: torch.Tensor, net: Stranger) -> None:
    steps = EPOCHS[net.data] * (len(x) // BATCH)
    if net.kind == "res" and net.seed % 2 == 0:
        rate = 0.1
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            model.parameters(), rate, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
    else:
        rate = RATES[net.kind]
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(EPOCHS[net.data]):
        for batch in torch.randperm(len(x))[: len(x) // BATCH * BATCH].view(-1, BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(normalised(x[batch])), y[batch]).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def judged(model: nn.Module, net: Stranger) -> dict[str, float | None]:
    """Percentages on the test images from the thousandth on: acc, asr, ra."""
    _, _, x, y = images(net.data)
    x, y = x[JUDGED_FROM:], y[JUDGED_FROM:]

    def answers(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([model.eval()(normalised(part)).argmax(1) for part in x.split(500)])

    acc = (answers(x) == y).float().mean().item()
    if net.attack == "clean":
        return {"acc": round(100 * acc, 1), "asr": None, "ra": None}
    others = y != net.target
    said = answers(triggered(net.attack, x[others], net.seed))
    asr, ra = (said == net.target).float().mean().item(), (said == y[others]).float().mean().item()
    return {"acc": round(100 * acc, 1), "asr": round(100 * asr, 1), "ra": round(100 * ra, 1)}


def measured(net: Stranger, repairs: list[str]) -> Iterator[dict[str, object]]:
    """A row for the net as it is, with the verdict, and one for each repair."""
    model, (_, _, x, y) = trained(net), images(net.data)
    shown = normalised(x[:SHOWN]), y[:SHOWN]
    clean = judged(trained(net._replace(attack="clean", target=0, seed=0)), net)
    about = {"net": net.name, "target": None if net.attack == "clean" else net.target}
    before = judged(model, net)
    beside = {"clean_asr": clean["asr"], "clean_ra": clean["ra"]}
    if not repairs:
        start, found = time.process_time(), ulrl.suspect(model, *shown)
        signs = found.ranking.loc[found.label, ["reach", "cover", "lead", "evidence"]].round(2)
        yield {
            **about, "method": "none", **before, **beside, "verdict": found.verdict, "label": found.label, **signs,
            "flagged": " ".join(map(str, found.ranking.index[found.ranking.flagged])),
            "z_highest": round(float(found.ranking.z.max()), 1), "cpu_s": round(time.process_time() - start),
        }  # fmt: skip
    for method in repairs:
        start, result = time.process_time(), ulrl.purify(model, *shown, method=method)
        yield {
            **about, "method": method, **judged(result.model, net), **beside,
            "flagged": " ".join(map(str, result.flagged)), "cpu_s": round(time.process_time() - start),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", default=["*"], metavar="NAME")
    parser.add_argument("--repair", nargs="+", default=[], metavar="METHOD", help="repair them instead of asking")
    parser.add_argument("--list", action="store_true", help="list the nets")
    given = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [net for net in strangers() if any(fnmatch.fnmatch(net.name, pattern) for pattern in given.nets)]
    for net in chosen:
        if given.list:
            print(net.name)
            continue
        for row in measured(net, given.repair):
            print(row, flush=True)
            rows = with_earlier(Path(RESULT), pd.DataFrame([row]), ["net", "method"])
            write_csv(RESULT, rows.astype({"target": "Int64", "label": "Int64"}, errors="ignore"))


if __name__ == "__main__":
    warnings.simplefilter("ignore", ulrl.Note)
    main()
