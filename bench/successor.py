"""Harden against the methods it is to replace, and with each of its parts left out:

    python -m bench.successor [--seeds 0 1 2] [--ratio 0.01] [--records NAME ...] [VARIANT ...]

Records under $ULRL_HOME/record/, clean nets among them (those of `python -m bench.victims`, or any others, such as of
bench.many_classes' data); a share of the clean training images per seed. Judged on all clean and triggered test images,
beside the clean nets of the same architecture, width and data. Each run leaves a file in $ULRL_HOME/successor/, so a
stopped one goes on where it was and several may work side by side; Harden's and ULRL's are taken from bench.quality
where it has made them.
bench/results/successor.csv is made of both and of what it held, and from it the tables in docs/method.md and README.md,
and docs/sight.png, which shows D3 as bench.quality measured it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from bench.jobs import Bench
from bench.pages import RESULTS, interval, percent, with_earlier, write_block, write_csv
from bench.pictures import save, sight
from bench.quality import folder
from bench.tables import gather
from bench.victims import jobs_of
from ulrl.data.datasets import clean_subset
from ulrl.defenses.base import DEFENSES, Defense
from ulrl.files import home, whole_file
from ulrl.metrics import Judgement
from ulrl.record import Record, load_record
from ulrl.training import Monitor, judge

PREFIX = "bench_fashion_scenes_"
COMMON = {"p0.1", "p0.5", "s0", "w16"}  # parts of a record's name that most have, and the tables leave out
RATIO = 0.01  # the share of the training images that the goal is about
ROOT = Path(__file__).resolve().parent.parent
SHARED = ("harden", "ulrl")  # with bench.quality, whose values for them are the defaults
KEY = ["record", "variant", "ratio", "seed"]
PAGE, FRONT = ROOT / "docs" / "method.md", ROOT / "README.md"

COLUMNS = [*KEY, "attack", "acc_before", "acc", "asr_before", "asr", "ra", "clean_asr", "clean_ra", "flagged",
           "cpu_seconds"]  # fmt: skip

# name: (defense, what differs from its defaults, which are the published values)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "harden": ("harden", {}),
    "ulrl": ("ulrl", {}),
    "fst": ("fst", {}),
    "nad": ("nad", {}),
    "ft": ("ft", {}),
    "d3": ("d3", {}),
    "otbr": ("otbr", {}),
    "ban": ("ban", {}),
    "nft": ("nft", {}),
    "ssft": ("ssft", {}),
    "bti-dbf": ("bti-dbf", {}),
    "pam": ("pam", {}),
    "harden without restoring": ("harden", {"restore_epochs": 0}),
    "harden without seeking": ("harden", {"tries": 0}),
    "harden without holding": ("harden", {"hold_weight": 0.0}),
    "harden without excess": ("harden", {"excess": 1.0}),
    "harden without redrawn rows": ("harden", {"init": False}),
    "harden without learning corruptions": ("harden", {"learning_share": 0.0}),
    "harden without random corruptions": ("harden", {"learning_share": 1.0}),
    "harden without labels": ("harden", {"label_weight": 0.0}),
}


def _is_clean(record: Record) -> bool:
    return record.attack == "prototype"


def _kind(record: Record) -> tuple[object, ...]:
    """What two nets have in common whose figures can be compared."""
    shapes = [tuple(weight.shape) for weight in record.state_dict.values()]
    return record.model_name, record.dataset, record.num_classes, shapes


def measure(bench: Bench, cleans: Sequence[Record], variant: str, seed: int, ratio: float) -> None:
    """One run, unless its file is there, or bench.quality's."""
    record = bench.record
    share = "" if ratio == RATIO else f"__{ratio:g}"
    file = home() / "successor" / f"{record.name}__{variant.replace(' ', '-')}__{seed}{share}.json"
    shared = record.folder / "defense" / folder(variant, ratio, seed) / "result.json"
    if file.exists() or (variant in SHARED and shared.exists()):
        return
    name, options = VARIANTS[variant]
    defense: Defense = DEFENSES[name](random_seed=seed, **options)
    poisoned = None if _is_clean(record) else bench.poisoned_test
    model = bench.net()
    before = judge(model, bench.clean_test, poisoned)
    reached = [judge(bench.net(clean), bench.clean_test, poisoned) for clean in cleans if poisoned is not None]
    start = time.process_time()
    repair = defense.run(model, bench.train.subset(clean_subset(len(bench.train), ratio, seed)), Monitor())
    seconds = time.process_time() - start
    after = judge(repair.model, bench.clean_test, poisoned)
    row = {
        "record": record.name, "attack": record.attack, "variant": variant, "ratio": ratio, "seed": seed,
        "acc_before": before.acc, "acc": after.acc, "asr_before": before.asr, "asr": after.asr, "ra": after.ra,
        "clean_asr": _mean(reached, "asr"), "clean_ra": _mean(reached, "ra"),
        "flagged": " ".join(map(str, repair.flagged)), "cpu_seconds": seconds,
    }  # fmt: skip
    print(row, flush=True)
    file.parent.mkdir(exist_ok=True)
    with whole_file(file) as partial:
        partial.write_text(json.dumps(row))


def _mean(judgements: list[Judgement], key: str) -> float | None:
    values = [getattr(j, key) for j in judgements]
    return sum(values) / len(values) if values else None


def table(runs: pd.DataFrame) -> Iterator[str]:
    """Per record, share of clean images and variant: accuracy lost, and ASR and RA beside a clean net's, in points."""
    yield "| record | clean | method | ACC change | ASR (clean net's) | RA (clean net's) | flagged | CPU s | runs |"
    yield "|---|---:|---|---:|---:|---:|---|---:|---:|"
    order = list(VARIANTS)
    for (record, ratio, variant), cell in sorted(
        runs.groupby(["record", "ratio", "variant"]), key=lambda item: (*item[0][:2], order.index(item[0][2]))
    ):
        change = [a - b for a, b in zip(cell.acc, cell.acc_before, strict=True)]
        asr, ra = ("", "") if cell.asr.isna().all() else (_beside(cell, "asr"), _beside(cell, "ra"))
        flagged = ", ".join(f or "none" for f in cell.flagged)
        seconds = "" if cell.cpu_seconds.isna().all() else f"{cell.cpu_seconds.mean():.0f}"
        yield (
            f"| {_label(record)} | {percent(ratio)}% | {variant} | {100 * interval(change)[0]:+.1f} "
            f"| {asr} | {ra} | {flagged} | {seconds} | {len(cell)} |"
        )


GOAL = (  # in words, column of `goal`, what is allowed in points
    ("ASR at most 1 point above a clean net's", "asr", 1.0),
    ("RA at most 5 points below it", "ra", 5.0),
    ("at most 1 point of ACC lost", "acc", 1.0),
)
CLEAN_LOSS = 0.5


def goal(runs: pd.DataFrame) -> str:
    """Which parts of the goal Harden meets, over records, each the mean of its seeds: counts, mean and worst."""
    runs = runs[(runs.variant == "harden") & _of_the_goal(runs)]
    short = pd.DataFrame({
        "record": runs.record.map(_label), "asr": runs.asr - runs.clean_asr, "ra": runs.clean_ra - runs.ra,
        "acc": runs.acc_before - runs.acc,
    }).groupby("record").mean() * 100  # fmt: skip
    clean = short.asr.isna()
    parts = [_met(short[~clean][key], words, allowed) for words, key, allowed in GOAL]
    parts[0] += f", within 1 point either way {(short[~clean].asr.abs() <= 1).sum()}"
    seeds = runs.groupby("record").seed.nunique()
    counted = "-".join(str(n) for n in sorted({seeds.min(), seeds.max()}))
    lost = _met(short[clean].acc, f"at most {CLEAN_LOSS:g}", CLEAN_LOSS)
    each = f"{counted} seed{'' if counted == '1' else 's'} each"
    return f"**Of {(~clean).sum()} backdoored nets, {each}: {'; '.join(parts)}. Clean nets: {lost}.**"


def _label(record: str) -> str:
    return "_".join(part for part in record.removeprefix(PREFIX).split("_") if part not in COMMON)


def _of_the_goal(runs: pd.DataFrame) -> pd.Series:
    """bool: whether a run is of the bench's own victims and share of clean images."""
    return runs.record.str.startswith(PREFIX) & (runs.ratio == RATIO)


def _met(excess: pd.Series, words: str, allowed: float) -> str:
    """One that is better than a clean net makes up for no other: in the mean it is 0."""
    if excess.empty:
        return f"{words}: none measured"
    met, mean = f"{(excess <= allowed).sum()} of {len(excess)}", excess.clip(lower=0).mean()
    return f"{words}: {met} ({mean:+.1f} in the mean, {excess.max():+.1f} at worst, {excess.idxmax()})"


def shown(runs: pd.DataFrame) -> Iterator[tuple[str, list[pd.DataFrame], str]]:
    """Each record that both methods repaired, its runs of ULRL and of Harden that are shown, and a mark.

    Those of the net that Harden repaired first; where ULRL repaired others by the same recipe alone, ‡.
    """
    runs = runs[_of_the_goal(runs)]
    cells = {key: cell for key, cell in runs.groupby(["record", "variant"])}
    for record in dict.fromkeys(runs.sort_values("attack", kind="stable").record):
        both = [cells.get((record, variant)) for variant in ("ulrl", "harden")]
        if any(cell is None for cell in both):
            continue
        first = both[1].iloc[0]
        same = [cell[(cell.acc_before == first.acc_before) & cell.asr_before.isin([first.asr_before])] for cell in both]
        yield record, [same[0] if len(same[0]) else both[0], same[1]], "" if len(same[0]) else " ‡"


def front(runs: pd.DataFrame) -> Iterator[str]:
    """For the project's front page: a line for each record that is shown, ASR / RA / change of ACC."""
    yield "| attack | a clean net | none | ULRL | Harden |"
    yield "|---|---|---|---|---|"
    for record, both, mark in shown(runs):
        own = both[1]
        changes = [f"{100 * (cell.acc - cell.acc_before).mean():+.1f}" for cell in both]
        if own.asr.isna().all():
            yield f"| {_label(record)} | | | {changes[0]}{mark} | {changes[1]} |"
            continue
        figures = [f"{_percents(cell, 'asr', 'ra')} / {change}" for cell, change in zip(both, changes, strict=True)]
        reach, before = _percents(own, "clean_asr", "clean_ra"), percent(own.asr_before.mean())
        yield f"| {_label(record)} | {reach} | {before} | {figures[0]}{mark} | {figures[1]} |"


def pictured(runs: pd.DataFrame, quality: pd.DataFrame) -> pd.DataFrame:
    """For docs/sight.png: bench.quality's runs on its victims, but those of ULRL and Harden that the front page has."""
    quality = quality[(quality.ratio == RATIO) & quality.distance.notna()]
    ours = [
        cell.rename(columns={"variant": "defense"})
        for record, both, _ in shown(runs)
        for cell in both
        if record in set(quality.record)
    ]
    return pd.concat([quality[~quality.defense.isin(SHARED)], *ours], ignore_index=True)


def _percents(cell: pd.DataFrame, *keys: str) -> str:
    return " / ".join(percent(cell[key].mean()) for key in keys)


def _beside(cell: pd.DataFrame, key: str) -> str:
    spread = f" [{percent(cell[key].min())}, {percent(cell[key].max())}]" if len(cell) > 1 else ""
    return f"{percent(cell[key].mean())}{spread} ({percent(cell[f'clean_{key}'].mean())})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", default=list(VARIANTS), help="; ".join(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ratio", type=float, default=RATIO, help="share of the training images that is clean")
    parser.add_argument("--records", nargs="+", metavar="NAME", help="all that are there, if not given")
    parser.add_argument("--dataset_path", default="./data")
    parser.add_argument("--tables", action="store_true", help="only make the tables of what has run")
    args = parser.parse_args()
    if unknown := set(args.variants) - set(VARIANTS):
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(VARIANTS)}")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if not args.tables:
        folders = sorted(f for f in (home() / "record").iterdir() if (f / "result.json").is_file())
        records = {f.name: load_record(f.name) for f in folders}
        for seed in args.seeds:
            for name in args.records or records:
                bench = Bench.of(name, "cpu", args.dataset_path)
                cleans = [r for r in records.values() if _is_clean(r) and _kind(r) == _kind(bench.record)]
                for variant in args.variants:
                    measure(bench, cleans, variant, seed, args.ratio)
    report()


def _of_quality() -> pd.DataFrame:
    """The runs that bench.quality has made of both, as rows of ours; it does not count the CPU's seconds."""
    frame = gather(jobs_of("cpu")).rename(columns={"defense": "variant", "subset": "seed"})
    if frame.empty:
        return pd.DataFrame(columns=COLUMNS)
    return frame[frame.variant.isin(SHARED)].reindex(columns=COLUMNS)


def report() -> None:
    """The tables, of what has run here and of what the CSV holds from elsewhere."""
    files = sorted((home() / "successor").glob("*.json"))
    runs = pd.DataFrame([json.loads(file.read_text()) for file in files], columns=COLUMNS)
    both = [part for part in (_of_quality(), runs) if len(part)]
    runs = pd.concat(both).drop_duplicates(KEY, keep="last") if both else runs
    runs = with_earlier(RESULTS / "successor.csv", runs, KEY)
    write_csv(RESULTS / "successor.csv", runs)
    write_block("goal", [goal(runs)], PAGE)
    mine = _of_the_goal(runs)
    write_block("successor", list(table(runs[mine])), PAGE)
    write_block("elsewhere", list(table(runs[~mine])), PAGE)
    write_block("results", list(front(runs)), FRONT)
    save(sight(pictured(runs, pd.read_csv(RESULTS / "quality_cpu.csv"))), "sight.png")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
