"""ULRL with 500 clean samples on a full-width net, stage by stage:  python bench/ulrl_speed.py

The weights and pixels are random: only the time matters. Each stage's seconds are printed, then which
operators the time went to, so that anything besides forward and backward passes would show.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.profiler import ProfilerActivity, profile

from ulrl.data.datasets import dataset_spec
from ulrl.data.imageset import ImageSet
from ulrl.defenses.base import DEFENSES
from ulrl.machine import PeakMemory
from ulrl.models import build_model
from ulrl.seeds import generator
from ulrl.training import Monitor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="of each stage; the method's own is 20")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--width", type=int, default=64)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec, draw = dataset_spec("cifar10"), generator(0, "images")
    pixels = torch.randint(256, (args.samples, 3, 32, 32), dtype=torch.uint8, generator=draw)
    clean = ImageSet(pixels, torch.randint(10, (args.samples,), generator=draw), spec).to(device)
    model = build_model("preactresnet18", 10, 3, args.width).to(device)
    # A threshold below any accuracy keeps unlearning going for all its epochs.
    defense = DEFENSES["ulrl"](unlearning_epochs=args.epochs, relearn_epochs=args.epochs, clean_threshold=-1.0)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    peak, monitor, start = PeakMemory(device), Monitor(), time.perf_counter()
    with profile(activities=activities) as profiler:
        defense.run(model, clean, monitor)
    total = time.perf_counter() - start
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.samples} samples")
    for stage, seconds in monitor.seconds.items():
        print(f"{stage:10} {seconds:7.2f} s")
    print(f"{'the rest':10} {total - sum(monitor.seconds.values()):7.2f} s   (copying, ranking, reinitialising)")
    print(f"peak memory {peak.mb():.0f} MB, the profiler's own included")
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=12, max_name_column_width=40))


if __name__ == "__main__":
    main()
