"""What the speed of ulrl is, in one table:  python -m bench.speed --profile cpu|gpu

Each line says what was run and how often, with the least, the middle and the greatest figure; a ratio has both sides
run in turn in one process. Weights and pixels are random where only the time matters. `--profile smoke` runs all of
`cpu` in a minute or two, small, and `gpu` takes less than ten minutes. Releases are compared with, by
bench/release_speed.py, where their checkouts are named:

    python -m bench.speed --profile cpu --ulrl DIR --backdoorbench DIR --fst DIR --methods ulrl --epochs 20

`--only` chooses lines by a part of their name. bench/results/speed_<profile>.txt holds a run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from bench import release_speed
from bench.shared_machine import measured
from bench.training_speed import CHILDREN, ROOT, Line, Profile, memory, training, whole_runs
from ulrl.attacks.base import ATTACKS
from ulrl.configure import AttackRun, DefenseRun, configure_defense
from ulrl.machine import has_bf16
from ulrl.record import load_record
from ulrl.runs.attacking import run_attack
from ulrl.runs.defending import run_defense
from ulrl.training import TrainOptions

PROFILES = {
    "smoke": Profile("cpu", 4, 1, 128, 2, (256, 1), (1, 256), 300, 300, 0.2),
    "cpu": Profile("cpu", 64, 2, 512, 3, (640, 1), (2, 1000), 10_000, 100_000, 8.0),
    "gpu": Profile("cuda", 64, 40, 10_000, 5, (50_000, 20), (20, 19_000), 10_000, 0, 8.0),
}


HEADER = f"{'':44}{'least':>10}{'middle':>10}{'greatest':>10} {'':10} {'n':>3}  {'goal':10} what was run"


# Starting, sweeping, what is kept


def start(profile: Profile) -> Iterator[Line]:
    """CPU seconds of a whole process, so that other load does not count."""
    for words in ("list", "list configs", "defense ulrl --help", "defense ulrl --relern_lr 1", "attak badnet"):
        spent = []
        for _ in range(profile.rounds):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-m", "ulrl", *words.split()], cwd=ROOT, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        yield Line("start", "CPU s", spent, f"ulrl {words}", "< 0.3")


def sweep(profile: Profile) -> Iterator[Line]:
    """What a sweep costs besides its jobs' work."""
    for name, engine, unit, count, goal in (
        ("sweep: a job's share", "here", "CPU ms", profile.jobs, "< 10"),
        ("sweep: a job's process", "local", "ms", min(50, profile.jobs), ""),
    ):
        command = [sys.executable, "-m", "bench.idle", engine, str(count)]  # whose processes import this module again
        with home():
            done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        yield Line(name, unit, [float(done.stdout)], f"{count:,} jobs without work", goal)


def side_by_side(profile: Profile) -> Iterator[Line]:
    """What a second process on another core adds, as of a sweep with --jobs 2: steps a second of both, to one's."""
    what, ratios = "train 8x8" if profile.width < 16 else "train 32x32", []
    with ThreadPoolExecutor(2) as pool:
        for _ in range(profile.rounds):
            rates = pool.map(lambda seconds: measured(what, "sleep", 1, seconds), [profile.seconds] * 2)
            both = sum(rates)
            ratios.append(both / measured(what, "sleep", 1, profile.seconds))
    yield Line("two processes, to one", "ratio", ratios, f"{what}, one thread each", ">= 1.9")


def second_defense(profile: Profile) -> Iterator[Line]:
    """The judgement before a repair is kept: the second defense on a record judges the repaired model alone."""
    shares = []
    for _ in range(profile.rounds):
        with home():
            folder, _ = run_attack(
                ATTACKS["badnet"](patch_size=2),
                AttackRun(dataset="digits", width=profile.width, save_folder_name="one", device=profile.device),
                TrainOptions(epochs=1), bar=False,
            )  # fmt: skip
            record, judged = load_record(folder), []
            for name in ("clp", "bnp"):
                defense, run = configure_defense(name, {}, record.dataset, record.model_name, quiet=True)
                run = DefenseRun(**{**vars(run), "device": profile.device})
                judged.append(run_defense(defense, record, run, bar=False)[1]["seconds"]["judge"])
            shares.append(judged[1] / judged[0])
    yield Line("second defense: its judging, to the first's", "ratio", shares, "clp, then bnp, on the digits", "0.5")


PARTS = (start, sweep, side_by_side, second_defense, memory, training, whole_runs)


@contextlib.contextmanager
def home() -> Iterator[None]:
    """A ULRL_HOME and a cache that are gone afterwards."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"ULRL_HOME": folder, "XDG_CACHE_HOME": folder}
        try:
            yield
        finally:
            os.environ.clear()
            os.environ |= before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=PROFILES, default="cpu")
    parser.add_argument("--only", nargs="+", choices=[part.__name__ for part in PARTS], help="these parts alone")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    release_speed.add_options(parser)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(CHILDREN[args.child[0]](*args.child[1:])))
        return
    profile = PROFILES[args.profile]
    if profile.device == "cuda" and not torch.cuda.is_available():
        parser.error("--profile gpu: there is no GPU here")
    name = torch.cuda.get_device_name() if profile.device == "cuda" else "CPU"
    print(f"{args.profile} profile on {name}, {os.cpu_count()} cores with a load of {os.getloadavg()[0]:.1f}, "
          f"{torch.get_num_threads()} threads, bf16 {has_bf16(torch.device(profile.device))}, "
          f"torch {torch.__version__}", HEADER, sep="\n", flush=True)  # fmt: skip
    for part in PARTS:
        if args.only is None or part.__name__ in args.only:
            for line in part(profile):
                print(line, flush=True)
    for method, figure, ratio in release_speed.compared(args):
        ran = f"{args.epochs} epochs a stage, {args.test_images:,} test images"
        print(Line(f"{method}, times its release's speed", "ratio", [ratio], f"{figure}, {ran}"), flush=True)


if __name__ == "__main__":
    main()
