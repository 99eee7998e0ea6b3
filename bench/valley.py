"""ASR, RA and accuracy along the line between a victim's weights and its repairs':

    python -m bench.valley [RECORD] [--defenses harden ulrl] [--points 11] [--test_images 2000]

A record of bench.victims whose repairs bench.quality has made (1% clean, subset 0). At each point BatchNorm's
statistics are measured anew on the clean samples; the first so many test images are judged, and the triggered ones
among them. Writes bench/results/valley.csv and draws docs/valley.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import pandas as pd
import torch

from bench.jobs import Bench
from bench.pages import RESULTS, write_csv
from bench.pictures import save, valley
from bench.quality import folder
from bench.victims import start
from ulrl.data.batches import Batches
from ulrl.data.datasets import clean_subset
from ulrl.record import load_defense_result
from ulrl.seeds import generator
from ulrl.training import judge, measure_statistics

RATIO, SUBSET = 0.01, 0


def mixed(
    weights: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor], share: float
) -> dict[str, torch.Tensor]:
    """A state dict `share` of the way from `weights` to `others`; counters are the former's."""
    return {
        name: weight.lerp(others[name], share) if weight.is_floating_point() else weight
        for name, weight in weights.items()
    }


def measured(bench: Bench, defense: str, points: int, test_images: int) -> list[dict[str, object]]:
    """Figures at evenly spaced points, both ends included."""
    repaired = load_defense_result(bench.record.folder / "defense" / folder(defense, RATIO, SUBSET), bench.record)
    clean = bench.train.subset(clean_subset(len(bench.train), RATIO, SUBSET))
    test = bench.clean_test.subset(torch.arange(test_images, device=clean.device))
    triggered = bench.poisoned_test
    triggered = triggered.subset((triggered.original_indices < test_images).nonzero().flatten())
    rows = []
    for share in torch.linspace(0, 1, points).tolist():
        model = bench.net(weights=mixed(bench.record.state_dict, repaired, share))
        batches = Batches(clean, 128, generator(0, "valley", clean.device), drop_last=True)
        measure_statistics(model, (batch for _ in range(3) for batch in batches))
        figures = judge(model, test, triggered)
        rows.append({"record": bench.record.name, "defense": defense, "share": share, "acc": figures.acc,
                     "asr": figures.asr, "ra": figures.ra})  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", nargs="?", default="bench_fashion_scenes_badnet_p0.1_t3_s0_w16")
    parser.add_argument("--defenses", nargs="+", default=["harden", "ulrl"])
    parser.add_argument("--points", type=int, default=11)
    parser.add_argument("--test_images", type=int, default=2000)
    args = parser.parse_args(argv)
    bench = Bench.of(args.record, "auto")
    runs = pd.DataFrame(
        [row for defense in args.defenses for row in measured(bench, defense, args.points, args.test_images)]
    )
    write_csv(RESULTS / "valley.csv", runs)
    print(save(valley(runs), "valley.png"))


if __name__ == "__main__":
    start(main)
