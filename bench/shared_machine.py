"""How runs share a CPU with other work:  python bench/shared_machine.py

Steps a second of training and of defenses, on one and two threads, with OpenMP's waiting as it comes (its threads
spin) and passive (they sleep), alone and beside as many busy loops as there are cores. Each figure is a fresh
process, as the policy is read when torch is loaded. The machine's speed drifts, so compare within a line: rounds go
through all settings, and the median is printed. bench/results/shared_machine.txt holds a run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = [(policy, threads) for policy in ("spin", "sleep") for threads in (1, 2)]
WORK = ("train 8x8", "i-bau 8x8", "nc 8x8", "sau 8x8", "train 32x32", "i-bau 32x32")


def work(what: str, seconds: float) -> float:
    """Steps a second, in this process, after the first ones."""
    sys.path.insert(0, str(ROOT))
    import torch

    from ulrl.data.datasets import dataset_spec
    from ulrl.data.imageset import ImageSet
    from ulrl.defenses.base import DEFENSES
    from ulrl.models import build_model
    from ulrl.training import Monitor, Stage

    class Over(Exception):
        pass

    times: list[float] = []

    def step(stage: Stage) -> None:
        times.append(time.perf_counter())
        if times[-1] > times[min(2, len(times) - 1)] + seconds:
            raise Over

    Stage.step = step  # type: ignore[method-assign]
    method, size = what.split()
    spec = dataset_spec("digits" if size == "8x8" else "cifar10")
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (256, spec.channels, *spec.img_size[:2]), dtype=torch.uint8, generator=draw)
    data = ImageSet(pixels, torch.arange(256) % 10, spec)
    model = build_model("preactresnet18", 10, spec.channels, 16)
    name = "ft" if method == "train" else method
    for_ever = {"ft": {"epochs": 10**6}, "i-bau": {"n_rounds": 10**6}}.get(name, {})
    with contextlib.suppress(Over):
        DEFENSES[name](batch_size=32 if size == "8x8" else 128, **for_ever).run(model, data, Monitor())
    return (len(times) - 3) / (times[-1] - times[2])


def measured(what: str, policy: str, threads: int, seconds: float) -> float:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP", "GOMP", "KMP", "MKL"))}
    environment |= {"OMP_NUM_THREADS": str(threads)}
    # libgomp's default, which `import ulrl` would replace where nothing is set.
    environment |= {"OMP_WAIT_POLICY": "passive"} if policy == "sleep" else {"GOMP_SPINCOUNT": "300000"}
    command = [sys.executable, __file__, "--work", what, "--seconds", str(seconds)]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="per figure, after the first steps")
    parser.add_argument("--work", choices=WORK, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        print(json.dumps(work(args.work, args.seconds)))
        return
    figures: dict[Any, list[float]] = defaultdict(list)
    cores = os.cpu_count() or 1
    for busy in (0, cores):
        loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        try:
            for _ in range(args.rounds):
                for what in WORK:
                    for policy, threads in SETTINGS:
                        rate = measured(what, policy, threads, args.seconds)
                        figures[what, busy, policy, threads].append(rate)
        finally:
            for loop in loops:
                loop.kill()
                loop.wait()
    load = os.getloadavg()[0]
    print(f"{cores} cores, load {load:.1f} at the end; steps a second, median of {args.rounds} rounds")
    print(f"{'':12} {'busy loops':>10}" + "".join(f"{policy + ' ' + str(threads):>9}" for policy, threads in SETTINGS))
    for what in WORK:
        for busy in (0, cores):
            rates = [statistics.median(figures[what, busy, policy, threads]) for policy, threads in SETTINGS]
            print(f"{what:12} {busy:10}" + "".join(f"{rate:9.2f}" for rate in rates))


if __name__ == "__main__":
    main()
