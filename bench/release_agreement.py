"""Do we repair as the releases do?  python -m bench.release_agreement --backdoorbench DIR [--ulrl DIR] [--fst DIR]

Each DIR is a checkout of theirs, whose code is run from a scratch folder, patched to start (see bench/release_speed.py,
whose launcher this is), to have the record's width, and to judge less: of a test set its own judging sees the first
batch alone, or, where it chooses by it, the first eight; where its table is all that it leaves (NC, NPD, TSBD),
everything. TSBD's two files belong into BackdoorBench's checkout, as defense/tsbd.py and
config/defense/tsbd/config.yaml; of its eleven shares of filters one is tried. NC needs OpenCV to be installed.
What has no checkout is left out.

In the scratch folder fashion_scenes lies as CIFAR-10's files, which all of them read, and beside it one BadNets record
of ours, whose model is trained there or is that of a victim of the bench (--victim). Both sides repair it with the same
clean images (the scripts of FST, FT-SAM and NPD take no list, and draw as many of their own), seeds and options: those
of the release's YAML file, which ours reads too; with --epochs its cosine ends with them. Both repaired models are
judged by our judge on the same test images; where the release saves another model than the one it made (NC, NPD), or
none (TSBD), by the figures of its own table. A run that is there is kept with --scratch, so a stopped one goes on.

A figure is said to differ where the means are further apart than twice the standard error of the seeds.
"""

from __future__ import annotations

import argparse
import hashlib
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
import yaml
from scipy import stats

from bench.pages import RESULTS, interval, percent, with_earlier, write_block, write_csv
from bench.release_speed import FST_RECORD, LAUNCHER, ROOT, write_batches
from bench.victims import start
from ulrl.data.datasets import dataset_spec, load_dataset
from ulrl.data.imageset import ImageSet
from ulrl.errors import UserError
from ulrl.files import save_torch
from ulrl.machine import pick_device
from ulrl.models import load_model
from ulrl.record import Record, load_record
from ulrl.training import judge
from ulrl.untrusted.torchfiles import load_torch

DATA = Path("data/cifar10/cifar-10-batches-py")
FIGURES = ("acc", "asr", "ra")
KEY = ["setting", "defense", "seed", "side"]
CHOOSES = 8  # test batches that a release sees which chooses by them

# Into the launcher of theirs, before the script runs: their PreAct-ResNet18 at another width, and short tests.
PATCH = """
import importlib, itertools, re
for nets in map(importlib.import_module, os.environ["NETS"].split()):
    source = pathlib.Path(nets.__file__).read_text()
    exec(re.sub(r"\\b(64|128|256|512)\\b", lambda found: str(int(found[0]) * {width} // 64), source), vars(nets))
found, instead = os.environ["INSTEAD"].split("=>")
if found:
    patched = pathlib.Path("patched.py")
    patched.write_text(re.sub(found, instead, script.read_text()))
    script = patched
Loader, batches = torch.utils.data.DataLoader, int(os.environ["TEST_BATCHES"])
whole = Loader.__iter__
tests = lambda loader: batches and {test_images} >= len(loader.dataset) >= {test_images} // 2
Loader.__iter__ = lambda self: itertools.islice(whole(self), batches) if tests(self) else whole(self)
"""


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
    table: str = ""  # where it saves another model than it made, or none: its own table, and which rows to ask
    rows: str = ""
    instead: str = "=>"  # a pattern in its script, and what stands there instead
    our_yaml: str = ""  # where its file's keys mean something else to us
    batches: int = 1  # of the test sets, that its own judging sees; 0: all
    net: str = ""  # the module of a PreAct-ResNet18 of its own
    known: str = ""


RELEASES = {
    "ulrl": Release("ulrl", epochs="--unlearning_epochs {epochs} --relearn_epochs {epochs}",
                    known="the release keeps the two lowest suspicious classes, ours the two highest scores"),
    "ft": Release(),
    "ft-sam": Release(known="the release's cosine moves with each batch, and it draws its own clean images"),
    "fst": Release("fst", ours="--epochs 10 --lr 0.01 --alpha 0.1 --batch_size 128", yaml="",
                   theirs="--ft_mode fst --attack badnet --pratio 0.1 --model preactresnet18 --split_ratio 0.01 "
                   "--lr 0.01 --alpha 0.1 --epochs 10 --save",
                   script="fine_tune/ft.py", folder="fine_tune", epochs="--epochs {epochs}",
                   known="the release draws its own clean images"),
    "nad": Release(epochs="--te_epochs {epochs} --epochs {epochs}",
                   known="the release's third map has one pixel, and so no effect; its student takes te_epochs"),
    "anp": Release(epochs="--nb_iter {epochs}00", theirs="--print_every {epochs}00", batches=CHOOSES,
                   net="utils.defense_utils.anp.anp_model.preact_anp",
                   known="the release chooses on test ASR, and its noise reaches twice anp_eps"),
    "fp": Release(batches=CHOOSES,
                  known="the release prunes by test accuracy and keeps the first model that lost too much"),
    "clp": Release(epochs="", known="the release pairs a BatchNorm with the convolution listed before it"),
    "bnp": Release(epochs="", net="utils.defense_utils.mbns.mbns_model.preact_mbns",
                   known="the release compares with poisoned data, and in one batch"),
    "nc": Release(table="nc_df*.csv", batches=0, epochs="--nc_epoch {epochs} --epochs {epochs}",
                  known="the release saves the backdoored model; its table is of the repaired one"),
    "i-bau": Release(epochs="--n_rounds {epochs}",
                     known="BackdoorBench's perturbation is of normalised values, without bound; ours is of pixels, "
                     "as its authors', and within the paper's bound"),
    "sau": Release(epochs="--n_rounds {epochs}", known="ours ends the attack after all its steps"),
    "npd": Release(table="npd_df*.csv", batches=0,
                   known="the layer stands before a convolution there, behind it here; the release draws its images"),
    "rnp": Release(ours="--pruning_number 0.7", batches=CHOOSES, net="utils.defense_utils.rnp.rnp_model.preact_rnp",
                   epochs="--unlearning_epochs {epochs} --recovering_epochs {epochs}",
                   known="both prune at 0.7, its only value; ours sets a fifth aside and bounds the ascent"),
    "tsbd": Release(table="checkpoint_*/stage2_df*.csv", rows="n == 0.15", batches=0, epochs="",
                    instead=r"(?m)^reinit_ratio = .*=>reinit_ratio = [0.15]",
                    our_yaml="config/defense/tsbd/published.yaml",
                    ours="--neuron_ratio 0.15 --unlearning_lr 0.0005 --epochs 21", theirs="--lr_un 0.0005",
                    known="0.15 of the filters on both sides; the release rounds the changes, ranks no shortcut and "
                    "takes a norm of each tensor"),
}  # fmt: skip


def prepare(scratch: Path, args: argparse.Namespace) -> None:
    """The data, the record and the launchers of both sides, unless they are there."""
    launcher = LAUNCHER.format(root=str(ROOT))
    (scratch / "launch.py").write_text(launcher)
    base = scratch / DATA
    if not base.exists():
        train, test = load_dataset("fashion_scenes")
        write_batches(
            base, (train.images[:50_000].numpy(), train.labels[:50_000].numpy()),
            (test.images[: args.test_images].numpy(), test.labels[: args.test_images].numpy()),
        )  # fmt: skip
    victim = load_record(args.victim).state_dict if args.victim else None
    if not (scratch / "record" / "badnet" / "result.json").exists():
        samples, epochs = (256, 1) if victim else (args.train_samples, args.train_epochs)
        flags = f"--train_samples {samples} --epochs {epochs} --lr 0.05 --attack_target 3 --save_folder_name badnet"
        width = f"--width {len(victim['conv1.weight'])}" if victim else ""
        _run(scratch, ROOT / "attack" / "badnet.py", *flags.split(), *width.split(), "--overwrite")
    saved = scratch / "record" / "badnet" / "attack_result.pt"
    if victim:
        content = load_torch(saved)
        save_torch({**content, "model": victim}, saved)
    width = len(load_torch(saved)["model"]["conv1.weight"])
    patch = PATCH.format(width=width, test_images=args.test_images)
    (scratch / "launch_theirs.py").write_text(launcher.replace("runpy.run_path", patch.lstrip() + "runpy.run_path"))
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
    common = f"--result_file badnet --random_seed {seed}"
    given = checkout / release.yaml.format(method=method) if release.yaml else None
    our_yaml = ROOT / release.our_yaml if release.our_yaml else given
    of_yaml = f"--yaml_path {our_yaml}" if our_yaml else ""
    folder = f"ours_{method}_{seed}"
    flags = f"{common} {of_yaml} {release.ours} {epochs} --index {index} --save_folder_name {folder} --overwrite"
    _run(scratch, ROOT / "defense" / f"{method}.py", *flags.split())
    ours = json.loads((record / "defense" / folder / "result.json").read_text())["after"]

    theirs = release.theirs if args.epochs or "{" not in release.theirs else ""
    theirs = theirs.format(epochs=args.epochs)
    made = record / "defense" / method
    shutil.rmtree(made, ignore_errors=True)
    if release.checkout == "fst":
        flags = f"{theirs} --random_seed {seed} {epochs}"
    else:
        assert given is not None
        values = {**yaml.safe_load(given.read_text()), "ratio": args.clean_samples / 50_000, "index": str(index)}
        if args.epochs:
            values["cos_t_max"] = args.epochs
        same = scratch / f"{method}.yaml"
        same.write_text(yaml.safe_dump(values))
        flags = f"{common} --yaml_path {same} {theirs} {epochs} --num_workers 0"
    script = checkout / release.script.format(method=method)
    _run(scratch, script, *flags.split(), release=release)
    if release.table:
        their_figures = _by_table(made, release)
    else:
        saved = load_torch(made / "defense_result.pt")
        their_figures = judged(load_record(record), saved.get("model", saved))  # FST's are bare
    figures = {side: {k: result[k] for k in FIGURES} for side, result in (("ours", ours), ("theirs", their_figures))}
    done.parent.mkdir(exist_ok=True)
    done.write_text(json.dumps(figures))
    return figures


def judged(record: Record, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The record's model with these weights, by our judge."""
    device = pick_device("auto")
    spec = dataset_spec(record.dataset)
    # Our own file; read as CIFAR-10 it would not have the publisher's checksum.
    held = pickle.loads((record.folder.parent.parent / DATA / "test_batch").read_bytes())
    images = torch.from_numpy(held["data"]).view(-1, 3, 32, 32)
    test = ImageSet(images, torch.tensor(held["labels"]), spec).to(device)
    model = load_model(record.model_name, record.num_classes, whole(weights), spec.channels).to(device)
    return vars(judge(model, test, record.poisoned_test(spec).to(device)))


def whole(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With what torch.nn.utils.prune keeps apart put together: FP's release saves weights and masks."""
    masked = [name.removesuffix("_mask") for name in weights if name.endswith("_mask")]
    apart = {f"{name}_{part}" for name in masked for part in ("mask", "orig")}
    kept = {name: weight for name, weight in weights.items() if name not in apart}
    return kept | {name: weights[f"{name}_orig"] * weights[f"{name}_mask"] for name in masked}


def _by_table(made: Path, release: Release) -> dict[str, float]:
    """The last of the rows asked for in the release's own table."""
    tables = sorted(made.glob(release.table))
    if not tables:
        raise UserError(f"the release left no {release.table} in {made}")
    rows = pd.read_csv(tables[0])
    last = (rows.query(release.rows) if release.rows else rows).iloc[-1]
    figures = {k: float(last[f"test_{k}"]) for k in FIGURES}
    scale = 100 if max(figures.values()) > 1 else 1  # NPD's are in percent
    return {k: value / scale for k, value in figures.items()}


def _run(scratch: Path, script: Path, *flags: str, release: Release | None = None) -> None:
    """A script of ours or, of a release, of theirs."""
    launcher, folder, environment = "launch.py", "", {"ULRL_HOME": str(scratch)}
    if release:
        launcher, folder = "launch_theirs.py", release.folder
        environment |= {"TEST_BATCHES": str(release.batches), "NETS": f"models.preact_resnet {release.net}"}
        environment |= {"INSTEAD": release.instead}
    where = ("--dataset", "cifar10", "--device", "cuda" if torch.cuda.is_available() else "cpu")
    done = subprocess.run(
        [sys.executable, str(scratch / launcher), str(script), *flags, *where],
        cwd=scratch / folder, env={**os.environ, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"{script} failed:\n{done.stdout[-3000:]}")


def differs(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether the means differ by Welch's test at 5%; of one seed each nothing can be said."""
    if min(len(ours), len(theirs)) < 2:
        return False
    if np.ptp(ours) == np.ptp(theirs) == 0:  # neither draws anything
        return not math.isclose(ours[0], theirs[0], abs_tol=1e-9)
    return bool(stats.ttest_ind(ours, theirs, equal_var=False).pvalue < 0.05)


def lines(runs: pd.DataFrame) -> list[str]:
    """The table: each figure of both sides, mean ±95% interval, a star where they differ."""
    text = ["| defense | seeds | ACC ours / theirs | ASR ours / theirs | RA ours / theirs | known to differ |",
            "|---|---:|---:|---:|---:|---|"]  # fmt: skip
    for method in [name for name in RELEASES if name in set(runs.defense)]:
        of_method = runs[runs.defense == method]
        cells = []
        for figure in FIGURES:
            sides = [of_method[of_method.side == side][figure].tolist() for side in ("ours", "theirs")]
            means = [interval(side)[:2] for side in sides]
            shown = [percent(m) + ("" if math.isnan(h) else f" ±{percent(h)}") for m, h in means]
            cells.append(" / ".join(shown) + (" *" if differs(*sides) else ""))
        text.append(f"| {method} | {of_method.seed.nunique()} | {' | '.join(cells)} | {RELEASES[method].known} |")
    return text


def page(frame: pd.DataFrame) -> list[str]:
    """A table for each setting: what was measured otherwise is not comparable."""
    text: list[str] = []
    for setting, runs in frame.groupby("setting"):
        text += [f"{setting} * differs (Welch's test, 5%: of 20 such figures that are the same one is marked).", ""]
        text += [*lines(runs), ""]
    return text[:-1]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ulrl", type=Path, help="checkout of the released ULRL")
    parser.add_argument("--fst", type=Path, help="checkout of the released FST")
    parser.add_argument("--backdoorbench", type=Path, help="checkout of BackdoorBench")
    parser.add_argument("--methods", nargs="+", choices=RELEASES, default=[*RELEASES])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="of each stage (of ANP, hundreds of steps); else the release's")
    parser.add_argument("--clean_samples", type=int, default=500)
    parser.add_argument("--victim", help="a BadNets record of target 3 in $ULRL_HOME/record/, whose model is taken")
    parser.add_argument("--train_samples", type=int, default=30_000, help="else: images that the record is trained on")
    parser.add_argument("--train_epochs", type=int, default=8)
    parser.add_argument("--test_images", type=int, default=10_000)
    parser.add_argument("--scratch", type=Path, help="folder to work in and to keep; else a temporary one")
    args = parser.parse_args(argv)
    checkouts = {m: vars(args)[RELEASES[m].checkout] for m in args.methods if vars(args)[RELEASES[m].checkout]}
    if not checkouts:
        raise UserError("no checkout was named that has one of the methods: give --backdoorbench, --ulrl or --fst")
    with tempfile.TemporaryDirectory() as temporary:
        names = ("epochs", "clean_samples", "victim", "train_samples", "train_epochs", "test_images")
        one = hashlib.sha256(str([vars(args)[name] for name in names]).encode()).hexdigest()[:8]  # setting, one folder
        scratch = (args.scratch / one if args.scratch else Path(temporary)).resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        prepare(scratch, args)
        record = load_record(scratch / "record" / "badnet")
        figures = judged(record, record.state_dict)
        before = ", ".join(f"{name.upper()} {percent(figures[name])}" for name in FIGURES)
        trained = f"trained on {args.train_samples} images for {args.train_epochs} epochs"
        setting = (
            f"{args.clean_samples} clean images, {args.epochs or 'the releases'} epochs, {args.test_images} test "
            f"images; the record's model is {f'that of {args.victim}' if args.victim else trained}: {before}."
        )
        runs = []
        for method, checkout in checkouts.items():
            for seed in range(args.seeds):
                sides = repaired(scratch, checkout.resolve(), method, seed, args)
                runs += [{"defense": method, "seed": seed, "side": side, **sides[side]} for side in sides]
                print(runs[-2:], flush=True)
    path = RESULTS / "release_agreement.csv"
    frame = with_earlier(path, pd.DataFrame(runs).assign(setting=setting), KEY)
    write_csv(path, frame)
    write_block("release agreement", page(frame))


if __name__ == "__main__":
    start(main)
