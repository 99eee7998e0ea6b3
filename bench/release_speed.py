"""Whole runs against the releases, for bench/speed.py.

Each is a checkout of theirs, whose code is run as it is, from a temporary folder. There a data set in
CIFAR-10's files (50,000 training images, but few test images; noise over a colour per class) and one BadNets
record (PreAct-ResNet18 of standard width, trained for a moment on 512 of them) are made, and both sides are run
on it in turn with the same flags: on the CPU, 500 clean samples (TSBD 100; ABL the 512), batches of 128, loading
in the process itself. A rate of 1e-6 keeps unlearning above its threshold, so that neither side stops early.
Seconds are those of the whole process; `epochs` are the training epochs alone, as each side itself reports them,
so without any evaluation. What has no checkout is left out. bench/results/release_speed.txt holds some runs.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parent.parent

# Made-up batches have other checksums than the publisher's. The releases are of a time when torch.load
# unpickled everything, numpy had `infty` and iterators `next`. BNP imports a module for ViT that is not there; I-BAU
# asks for CUDA by name, for zeros like a batch. A script finds what lies beside it and in its checkout.
LAUNCHER = """
import functools, os, pathlib, runpy, sys, unittest.mock
sys.path[0] = {root!r}
from ulrl.tv import torchvision
import numpy, torch
numpy.infty = numpy.inf
torchvision.datasets.cifar.check_integrity = lambda *_: True
torch.load = functools.partial(torch.load, weights_only=False)
torch.utils.data.dataloader._BaseDataLoaderIter.next = lambda iterator: next(iterator)
sys.modules["defense.mbns"] = unittest.mock.MagicMock()
torch.zeros_like = lambda x, device=None, *, zeros_like=torch.zeros_like, **rest: zeros_like(x, **rest)
script = pathlib.Path(sys.argv.pop(1))
sys.argv[0] = str(script)
sys.path[:1] = [os.getcwd(), str(script.parent), str(script.parent.parent)]  # some move to the first of them
runpy.run_path(str(script), run_name="__main__")
"""
TRAINING = ("unlearn", "relearn", "recover", "finetune")  # our stages that train


class Method(NamedTuple):
    """A defense on both sides: whose checkout has it, flags of ours, flags of theirs, its script there."""

    checkout: str
    ours: str
    theirs: str | None = None  # ours, unless given
    script: str = "defense/{method}.py"
    folder: str = ""  # where it expects to be run
    common: str = (
        "--result_file badnet --batch_size 128 --num_workers 0 "
        "--yaml_path {checkout}/config/defense/{method}/config.yaml"
    )


UNLEARN = "--unlearning_lr 1e-6 --clean_threshold 0 --unlearning_epochs {epochs}"
NPD = "--ratio 0.01 --epochs {epochs}"
METHODS = {  # 500 samples in batches of 128 are four steps
    "ulrl": Method("ulrl", f"--ratio 0.01 {UNLEARN} --relearn_epochs {{epochs}}"),
    # It fine-tunes once for each of eleven n, hence few samples; its loop makes one epoch more than it is told. The
    # ratio is none of its flags.
    "tsbd": Method(
        "backdoorbench",
        "--ratio 0.002 --unlearning_lr 1e-6 --unlearning_epochs {epochs} --epochs {epochs}",
        "--result_file badnet --batch_size 128 --num_workers 0 --yaml_path tsbd.yaml --lr_un 1e-6 --epochs {epochs} "
        "--ft_epoch {before_last}",
        common="",
    ),
    "fst": Method(
        "fst",
        "--ratio 0.01 --epochs {epochs} --lr 0.01",
        "--ft_mode fst --attack badnet --pratio 0.1 --model preactresnet18 --split_ratio 0.01 --lr 0.01 "
        "--epochs {epochs}",
        script="fine_tune/ft.py",
        folder="fine_tune",
        common="",
    ),
    "ft": Method("backdoorbench", "--ratio 0.01 --epochs {epochs}"),
    "rnp": Method("backdoorbench", f"--ratio 0.01 {UNLEARN} --recovering_epochs {{epochs}} --pruning_step 0.3"),
    "ft-sam": Method("backdoorbench", "--ratio 0.01 --epochs {epochs}"),
    "nad": Method("backdoorbench", "--ratio 0.01 --epochs {epochs} --te_epochs {epochs}"),
    "sau": Method("backdoorbench", "--ratio 0.01 --n_rounds {epochs}"),
    "anp": Method("backdoorbench", "--ratio 0.01 --nb_iter {steps} --print_every {steps} --pruning_step 0.3"),
    "fp": Method("backdoorbench", "--ratio 0.01 --epochs {epochs} --once_prune_ratio 0.1"),
    "clp": Method("backdoorbench", ""),
    "nc": Method("backdoorbench", "--ratio 0.01 --nc_epoch {epochs} --epochs {epochs}"),
    "i-bau": Method("backdoorbench", "--ratio 0.01 --n_rounds {epochs}"),
    "npd": Method("backdoorbench", NPD, f"{NPD} --warm_epochs 0"),  # ours has no warm-up
    "bnp": Method("backdoorbench", "--ratio 0.01"),
    "abl": Method(
        "backdoorbench",
        "--tuning_epochs {epochs} --finetuning_epochs {epochs} --unlearning_epochs {epochs} --isolation_ratio 0.1",
    ),
}
FST_RECORD = "record/cifar10/badnet/pratio_0.1-target_0-archi_preactresnet18"  # where its script looks


class Spent(NamedTuple):
    """Seconds of a process, by the clock and of CPU, and those of its training epochs by the clock."""

    wall: float
    cpu: float
    epochs: float


def write_cifar10(base: Path, n_test: int) -> None:
    """CIFAR-10's "python version", each class with a colour of its own, so that a short training learns it."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 156, (10, 3, 1))

    def coloured(n: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.integers(0, 10, n)
        return (colours[labels] + rng.integers(0, 100, (n, 3, 1024))).astype(np.uint8), labels

    write_batches(base, coloured(50_000), coloured(n_test))


def write_batches(base: Path, train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> None:
    """Images (uint8 [N, 3, 32, 32], or flat) and labels [N] as CIFAR-10's files; 50,000 are for training."""
    base.mkdir(parents=True)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels, labels = (part[10_000 * i : 10_000 * (i + 1)] for part in train) if i < 5 else test
        batch = {"labels": labels.tolist(), "data": np.ascontiguousarray(pixels).reshape(len(labels), 3072)}
        (base / name).write_bytes(pickle.dumps(batch, protocol=2))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}, protocol=2))


def run(scratch: Path, script: Path, *flags: str, folder: str = "") -> Spent:
    """Run a script of any of the checkouts in a folder of `scratch`, where data/ and record/ lie."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(scratch / "launch.py"), str(script), *flags, "--dataset", "cifar10", "--device", "cpu"],
        cwd=scratch / folder, env={**os.environ, "ULRL_HOME": str(scratch)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{script} failed:\n{done.stdout[-3000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # Their log comes twice: once more through a handler of logging's own, without brackets.
    epochs = re.findall(r"\] one epoch training part done, use time = ([\d.]+)", done.stdout)
    return Spent(wall, cpu, sum(map(float, epochs)))


def compare(scratch: Path, checkout: Path, method: str, epochs: int) -> Iterator[tuple[str, str, float]]:
    """What was timed, and their seconds over ours."""
    m = METHODS[method]
    values = {"epochs": epochs, "steps": 4 * epochs, "before_last": epochs - 1, "method": method, "checkout": checkout}
    common = "--result_file badnet --batch_size 128"
    ours = run(scratch, ROOT / "defense" / f"{method}.py", *f"{common} {m.ours} --overwrite".format(**values).split())
    result = json.loads((scratch / "record" / "badnet" / "defense" / method / "result.json").read_text())
    ours = ours._replace(epochs=sum(result["seconds"].get(stage, 0.0) for stage in TRAINING))
    flags = f"{m.common} {m.ours if m.theirs is None else m.theirs}".format(**values).split()
    theirs = run(scratch, checkout / m.script.format(**values), *flags, folder=m.folder)
    names = "end to end", "end to end, of CPU", "training epochs alone"
    for name, a, b in zip(names, ours, theirs, strict=True):
        if min(a, b) > 0:  # not all report their epochs
            yield method, f"{name}: {a:.1f} s to {b:.1f}", b / a


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ulrl", type=Path, help="checkout of the released ULRL")
    parser.add_argument("--fst", type=Path, help="checkout of the released FST")
    parser.add_argument("--backdoorbench", type=Path, help="checkout of BackdoorBench with TSBD's two files in it")
    parser.add_argument("--epochs", type=int, default=1, help="of each stage; ULRL's own is 20")
    parser.add_argument("--test_images", type=int, default=1000, help="CIFAR-10's own are 10,000")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])


def compared(args: argparse.Namespace) -> Iterator[tuple[str, str, float]]:
    """Each method whose release's checkout is named."""
    checkouts = {m: where for m in args.methods if (where := vars(args)[METHODS[m].checkout])}
    if not checkouts:
        return
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        (scratch / "launch.py").write_text(LAUNCHER.format(root=str(ROOT)))
        write_cifar10(scratch / "data" / "cifar10" / "cifar-10-batches-py", args.test_images)
        learning = "--train_samples 512 --epochs 2 --lr 0.05 --save_folder_name badnet".split()
        run(scratch, ROOT / "attack" / "badnet.py", *learning)
        (scratch / FST_RECORD).parent.mkdir(parents=True)
        (scratch / FST_RECORD).symlink_to(scratch / "record" / "badnet")
        (scratch / "fine_tune").mkdir()
        if "tsbd" in checkouts:
            config = yaml.safe_load((checkouts["tsbd"] / "config" / "defense" / "tsbd" / "config.yaml").read_text())
            (scratch / "tsbd.yaml").write_text(yaml.safe_dump({**config, "ratio": 0.002}))
        for method, checkout in checkouts.items():
            yield from compare(scratch, checkout.resolve(), method, args.epochs)
