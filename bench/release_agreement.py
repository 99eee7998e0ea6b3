"""Do we repair as the releases do?  python -m bench.release_agreement --backdoorbench DIR [--ulrl DIR] [--fst DIR]

Each DIR is a checkout of theirs, whose code is run as it is, patched only to start (see bench/release_speed.py, whose
launcher this is), from a scratch folder; what has no checkout is left out. There fashion_scenes lies as CIFAR-10's
files, which all of them read, and beside it one BadNets record of ours (PreAct-ResNet18 of standard width). Both sides
repair it with the same clean images (FST's script takes no list, and draws its own), seeds and options: those of the
release's YAML file, which ours reads too. Both repaired models are judged by our judge on the same test
images; where the release saves another model than the one it made (NC, NPD), by the figures of its own table. A run
that is there is kept with --scratch, so a stopped one goes on.

A figure is said to differ where the means are further apart than twice the standard error of the seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from bench.pages import RESULTS, interval, percent, write_block, write_csv
from bench.release_speed import FST_RECORD, LAUNCHER, ROOT, write_batches
from bench.victims import start
from ulrl.data.datasets import dataset_spec, load_dataset
from ulrl.data.imageset import ImageSet
from ulrl.errors import UserError
from ulrl.machine import pick_device
from ulrl.models import load_model
from ulrl.record import Record, load_record
from ulrl.training import judge
from ulrl.untrusted.torchfiles import load_torch

DATA = Path("data/cifar10/cifar-10-batches-py")
FIGURES = ("acc", "asr", "ra")


@dataclass(frozen=True)
class Release:
    """A defense on both sides: whose checkout has it, further flags, and what is known to differ, from reading."""

    checkout: str = "backdoorbench"
    ours: str = ""
    theirs: str = ""
    script: str = "defense/{method}.py"
    folder: str = ""  # where it expects to be run
    yaml: str = "config/defense/{method}/config.yaml"
    epochs: str = "--epochs {epochs}"  # the flags that --epochs sets, on both sides
    saves_another: bool = False
    known: str = ""


RELEASES = {
    "ulrl": Release("ulrl", epochs="--unlearning_epochs {epochs} --relearn_epochs {epochs}",
                    known="the release keeps the two lowest suspicious classes, ours the two highest scores"),
    "ft": Release(known="the cosine ends with the epochs here, at epoch 100 there"),
    "ft-sam": Release(known="the release's cosine moves with each batch"),
    "fst": Release("fst", ours="--epochs 10 --lr 0.01 --alpha 0.1 --batch_size 128", yaml="",
                   theirs="--ft_mode fst --attack badnet --pratio 0.1 --model preactresnet18 --split_ratio 0.01 "
                   "--lr 0.01 --alpha 0.1 --epochs 10 --save",
                   script="fine_tune/ft.py", folder="fine_tune", epochs="--epochs {epochs}",
                   known="the release draws its own clean images"),
    "nad": Release(epochs="--te_epochs {epochs} --epochs {epochs}",
                   known="the release's third map has one pixel, and so no effect; its student takes te_epochs"),
    "anp": Release(epochs="--nb_iter {epochs}",
                   known="the release chooses on test ASR, and its noise reaches twice anp_eps"),
    "fp": Release(known="the release prunes by test accuracy and keeps the first model that lost too much"),
    "clp": Release(epochs="", known="the release pairs a BatchNorm with the convolution listed before it"),
    "bnp": Release(epochs="", known="the release compares with poisoned data, and in one batch"),
    "nc": Release(saves_another=True, epochs="--nc_epoch {epochs} --epochs {epochs}",
                  known="the release saves the backdoored model; its table is of the repaired one"),
    "i-bau": Release(epochs="--n_rounds {epochs}", known="ours bounds the perturbation, as the paper does"),
    "sau": Release(epochs="--n_rounds {epochs}", known="ours augments the clean images, the release does not"),
    "npd": Release(saves_another=True, known="the layer stands before a convolution there, behind it here"),
    "rnp": Release(epochs="--unlearning_epochs {epochs} --recovering_epochs {epochs}",
                   known="the release prunes at 0.7 always; ours chooses on clean validation data"),
}  # fmt: skip


def prepare(scratch: Path, args: argparse.Namespace) -> None:
    """The data and the record, unless they are there."""
    (scratch / "launch.py").write_text(LAUNCHER.format(root=str(ROOT)))
    base = scratch / DATA
    if not base.exists():
        train, test = load_dataset("fashion_scenes")
        write_batches(
            base, (train.images[:50_000].numpy(), train.labels[:50_000].numpy()),
            (test.images[: args.test_images].numpy(), test.labels[: args.test_images].numpy()),
        )  # fmt: skip
    if not (scratch / "record" / "badnet" / "result.json").exists():
        flags = f"--train_samples {args.train_samples} --epochs {args.train_epochs} --lr 0.05 --attack_target 3"
        _run(scratch, ROOT / "attack" / "badnet.py", *flags.split(), "--save_folder_name", "badnet", "--overwrite")
    place = scratch / FST_RECORD
    if not place.is_symlink():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(scratch / "record" / "badnet")
        (scratch / "fine_tune").mkdir()


def repaired(scratch: Path, checkout: Path, method: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Both sides' figures for one seed, run where they are not there yet."""
    done = scratch / "agreement" / f"{method}_{seed}.json"
    if done.exists():
        held: dict[str, Any] = json.loads(done.read_text())
        return held
    release, record = RELEASES[method], scratch / "record" / "badnet"
    index = scratch / f"index_{seed}.txt"
    if not index.exists():
        order = torch.randperm(50_000, generator=torch.Generator().manual_seed(seed))
        index.write_text("".join(f"{i}\n" for i in order[: args.clean_samples].tolist()))
    epochs = release.epochs.format(epochs=args.epochs) if args.epochs else ""
    common = f"--result_file badnet --random_seed {seed} {epochs}"
    if release.yaml:
        common += f" --yaml_path {checkout / release.yaml.format(method=method)}"
    of_index = f" --index {index}"
    folder = f"ours_{method}_{seed}"
    flags = f"{common} {release.ours} {of_index} --save_folder_name {folder} --overwrite"
    _run(scratch, ROOT / "defense" / f"{method}.py", *flags.split())
    ours = json.loads((record / "defense" / folder / "result.json").read_text())["after"]

    made = record / "defense" / method
    shutil.rmtree(made, ignore_errors=True)
    if release.checkout == "fst":
        flags = f"{release.theirs} --random_seed {seed} {epochs}"
    else:
        flags = f"{common} {of_index if method != 'clp' else ''} {release.theirs} --num_workers 0"
    _run(scratch, checkout / release.script.format(method=method), *flags.split(), folder=release.folder)
    theirs = _by_table(made, method) if release.saves_another else judged(load_record(record), made)
    figures = {side: {k: result[k] for k in FIGURES} for side, result in (("ours", ours), ("theirs", theirs))}
    done.parent.mkdir(exist_ok=True)
    done.write_text(json.dumps(figures))
    return figures


def judged(record: Record, made: Path) -> dict[str, Any]:
    """The model that a release saved, by our judge."""
    device = pick_device("auto")
    spec = dataset_spec(record.dataset)
    # Our own file; read as CIFAR-10 it would not have the publisher's checksum.
    held = pickle.loads((record.folder.parent.parent / DATA / "test_batch").read_bytes())
    images = torch.from_numpy(held["data"]).view(-1, 3, 32, 32)
    test = ImageSet(images, torch.tensor(held["labels"]), spec).to(device)
    saved = load_torch(made / "defense_result.pt")
    weights = saved.get("model", saved)  # FST's are bare
    model = load_model(record.model_name, record.num_classes, weights, spec.channels).to(device)
    return vars(judge(model, test, record.poisoned_test(spec).to(device)))


def _by_table(made: Path, method: str) -> dict[str, float]:
    """The last row of the release's own table."""
    tables = sorted(made.glob(f"{method}_df*.csv"))
    if not tables:
        raise UserError(f"the release's {method} left no table in {made}")
    last = pd.read_csv(tables[0]).iloc[-1]
    return {k: float(last[f"test_{k}"]) for k in FIGURES}


def _run(scratch: Path, script: Path, *flags: str, folder: str = "") -> None:
    where = ("--dataset", "cifar10", "--device", "cuda" if torch.cuda.is_available() else "cpu")
    done = subprocess.run(
        [sys.executable, str(scratch / "launch.py"), str(script), *flags, *where],
        cwd=scratch / folder, env={**os.environ, "ULRL_HOME": str(scratch)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"{script} failed:\n{done.stdout[-3000:]}")


def differs(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether the means are more than twice their standard error apart; of one seed each nothing can be said."""
    if min(len(ours), len(theirs)) < 2:
        return False
    error = math.sqrt(np.var(ours, ddof=1) / len(ours) + np.var(theirs, ddof=1) / len(theirs))
    return abs(float(np.mean(ours) - np.mean(theirs))) > max(2 * error, 1e-9)


def lines(rows: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    """The table: each figure of both sides, mean ±95% interval, a star where they differ."""
    text = ["| defense | seeds | ACC ours / theirs | ASR ours / theirs | RA ours / theirs | known to differ |",
            "|---|---:|---:|---:|---:|---|"]  # fmt: skip
    for method, runs in rows.items():
        cells = []
        for figure in FIGURES:
            sides = [[run[side][figure] for run in runs] for side in ("ours", "theirs")]
            means = [interval(side)[:2] for side in sides]
            shown = [percent(m) + ("" if math.isnan(h) else f" ±{percent(h)}") for m, h in means]
            cells.append(" / ".join(shown) + (" *" if differs(*sides) else ""))
        text.append(f"| {method} | {len(runs)} | {' | '.join(cells)} | {RELEASES[method].known} |")
    return text


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ulrl", type=Path, help="checkout of the released ULRL")
    parser.add_argument("--fst", type=Path, help="checkout of the released FST")
    parser.add_argument("--backdoorbench", type=Path, help="checkout of BackdoorBench")
    parser.add_argument("--methods", nargs="+", choices=RELEASES, default=[*RELEASES])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="of each stage (of ANP, steps); else the release's own")
    parser.add_argument("--clean_samples", type=int, default=500)
    parser.add_argument("--train_samples", type=int, default=30_000, help="images that the record is trained on")
    parser.add_argument("--train_epochs", type=int, default=8)
    parser.add_argument("--test_images", type=int, default=10_000)
    parser.add_argument("--scratch", type=Path, help="folder to work in and to keep; else a temporary one")
    args = parser.parse_args(argv)
    checkouts = {m: vars(args)[RELEASES[m].checkout] for m in args.methods if vars(args)[RELEASES[m].checkout]}
    if not checkouts:
        raise UserError("no checkout was named that has one of the methods: give --backdoorbench, --ulrl or --fst")
    with tempfile.TemporaryDirectory() as temporary:
        scratch = (args.scratch or Path(temporary)).resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        prepare(scratch, args)
        rows: dict[str, list[dict[str, Any]]] = {}
        for method, checkout in checkouts.items():
            for seed in range(args.seeds):
                rows.setdefault(method, []).append(repaired(scratch, checkout.resolve(), method, seed, args))
            print(lines({method: rows[method]})[-1], flush=True)
    frame = pd.DataFrame(
        [{"defense": method, "seed": seed, "side": side, **figures}
         for method, runs in rows.items() for seed, run in enumerate(runs) for side, figures in run.items()]
    )  # fmt: skip
    write_csv(RESULTS / "release_agreement.csv", frame)
    about = (
        f"{args.clean_samples} clean images, {args.epochs or 'the releases'} epochs, {args.test_images} test images; "
        f"record trained on {args.train_samples} images for {args.train_epochs} epochs. * differs."
    )
    write_block("release agreement", [about, "", *lines(rows)])


if __name__ == "__main__":
    start(main)
