"""The backdoored models that the bench repairs:  python -m bench.victims [--profile cpu|gpu] [--list] [NAME ...]

Records go to $ULRL_HOME/record/; one that has its `result.json` is kept, so a stopped run goes on where it was, and
several may work side by side. A NAME is an attack of the table below (`badnet`), or a pattern for records (`*_s1_*`).
At the end the table says of each victim whether its backdoor took: ASR at least 95% (clean-label 90%, all-to-all 95% of
the clean nets' accuracy) and accuracy within a point of the clean nets of the same budget. Figures of one that did not
take are no evidence for a defense.

Targets are spread over the classes. `all2all` sends every class to the next. Rates are shares of all training images,
for clean-label attacks of the target class (half of it, a tenth of it: 5 and 1% of all). Blind and LIRA poison whole
batches in training, so they have no rate.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from bench.pages import RESULTS, percent, with_earlier, write_block, write_csv
from ulrl.configure import AttackRun, attack_schema, configure_attack
from ulrl.errors import UserError
from ulrl.files import home
from ulrl.sweep.jobs import AttackJob, Job, State, state
from ulrl.sweep.local import LocalEngine
from ulrl.sweep.scheduler import run_jobs


@dataclass(frozen=True)
class Profile:
    """On what, and for how long, the victims are trained. wide: attacks of which there is one at full width too."""

    training: Mapping[str, Any]
    seeds: tuple[int, ...]
    rates: tuple[int, ...]  # which of a victim's
    wide: tuple[str, ...] = ()


PROFILES = {
    "cpu": Profile(
        # 8 epochs of 234 steps at 0.05, cosine: clean nets reach 87.7 and 87.8%, in 320 s of a core that is free.
        {"dataset": "fashion_scenes", "width": 16, "train_samples": 30_000, "epochs": 8, "lr": 0.05},
        seeds=(0, 1), rates=(0, 1), wide=("badnet", "blended", "ssba", "sig"),
    ),
    "gpu": Profile({"dataset": "fashion_scenes", "epochs": 30, "lr": 0.05}, seeds=(0, 1), rates=(0, 1)),
    "smoke": Profile({"dataset": "digits", "width": 8, "epochs": 6, "lr": 0.05, "batch_size": 64}, (0,), (0,)),
}  # fmt: skip
CLEAN_SEEDS = (0, 1, 2)
FULL_WIDTH = 64
ACC_LOSS, ASR, CLEAN_LABEL_ASR = 0.01, 0.95, 0.90


@dataclass(frozen=True)
class Victim:
    """An attack of the bench. options: what differs from the attack's own defaults; took: why."""

    attack: str
    target: int
    rates: tuple[float | None, ...] = (0.1, 0.01)
    options: Mapping[str, Any] = field(default_factory=dict)
    took: str = ""
    label: str = ""  # where one attack is there more than once
    clean_label: bool = False
    needs_clean: bool = False
    epochs: float = 1.0  # times the profile's

    @property
    def name(self) -> str:
        return self.label or self.attack


VICTIMS = [
    # The twelve of the ULRL evaluation
    Victim("badnet", 3, took="the defaults"),
    Victim("blended", 5, took="the defaults"),
    Victim("blind", 8, (None,), {"weight_loss_balance_mode": "fixed"}, took="fixed weights; not tried with MGDA here"),
    Victim("bpp", 2, options={"squeeze_num": 4}, took="4 shades, as on Fashion-MNIST 8 were not learnt"),
    Victim("inputaware", 7, options={"clean_train_epochs": 3}, epochs=1.5, took="3 epochs of masks, half as many more"),
    Victim("lc", 9, (0.5, 0.1), {"mark_scale": 2}, clean_label=True, needs_clean=True, took="cells of two pixels"),
    Victim("lf", 6, needs_clean=True, took="the defaults"),
    Victim("lira", 0, (None,), {"both_train_epochs": 5, "eps": 0.05, "lr_atk": 0.002}, epochs=1.5,
           took="eps 0.05 and a faster generator: few epochs"),
    Victim("sig", 2, (0.5, 0.1), clean_label=True, took="the defaults"),
    Victim("ssba", 1, took="the defaults"),
    Victim("trojannn", 4, needs_clean=True, took="the defaults"),
    Victim("wanet", 4, options={"s": 0.75, "lr": 0.01}, epochs=1.25,
           took="a warp of 0.75, slower and longer; at 0.5 and the profile's rate: ASR 24.9, ACC 85.7"),
    # Five more
    Victim("adaptive_blend", 8, (0.01, 0.003), {"cover_rate": 0.01}, took="three times the release's rates"),
    Victim("adaptive_patch", 7, (0.01, 0.003), {"cover_rate": 0.01}, took="about three times the release's rates"),
    Victim("ctrl", 1, (0.5, 0.1), clean_label=True, took="the defaults"),
    Victim("ftrojann", 9, took="the defaults"),
    Victim("tact", 0, (0.05, 0.01), {"cover_rate": 0.02}, took="more than the release's 0.3%"),
    # What a backdoor may be otherwise
    Victim("badnet", 0, (0.1,), {"attack_label_trans": "all2all"}, label="badnet-all2all", took="the defaults"),
    Victim("badnet", 3, (0.1,), {"sam_rho": 0.05}, label="badnet-sam", took="SAM of radius 0.05"),
]  # fmt: skip


def jobs_of(profile: str) -> dict[str, AttackJob]:
    """By record name: the clean nets, then the victims."""
    plan = PROFILES[profile]
    dataset, width = plan.training["dataset"], plan.training.get("width", FULL_WIDTH)
    head = f"bench_{dataset}"
    jobs: dict[str, AttackJob] = {}

    def add(attack: str, label: str, words: Sequence[str], options: Mapping[str, Any], needs: str | None) -> None:
        name = "_".join([head, label, *words])
        given = attack_schema(attack).check({**options, **({"clean_model": needs} if needs else {})}, name)
        method, run, training = configure_attack(attack, given, AttackRun, quiet=True)
        jobs[name] = AttackJob(
            name=name, needs=needs, alike=("attack", attack, str(width)), attack=method, run=run, training=training
        )

    for seed in CLEAN_SEEDS:
        add("prototype", "clean", (f"s{seed}", f"w{width}"), {**plan.training, "random_seed": seed}, None)
    clean = f"{head}_clean_s0_w{width}"
    for victim, rate, seed in _cells(plan):
        options = {**plan.training, **victim.options, "random_seed": seed, "attack_target": victim.target}
        options["epochs"] = max(1, round(plan.training["epochs"] * victim.epochs))
        if rate is not None:
            options["pratio"] = rate
        rated = [] if rate is None else [f"p{rate:g}"]
        words = [*rated, f"t{victim.target}", f"s{seed}", f"w{width}"]
        add(victim.attack, victim.name, words, options, clean if victim.needs_clean else None)
    if plan.wide:
        wide = {**plan.training, "width": FULL_WIDTH}
        add("prototype", "clean", ("s0", f"w{FULL_WIDTH}"), {**wide, "random_seed": 0}, None)
        for victim in VICTIMS:
            if victim.name in plan.wide:
                options = {**wide, **victim.options, "attack_target": victim.target, "pratio": victim.rates[0]}
                words = [f"p{victim.rates[0]:g}", f"t{victim.target}", "s0", f"w{FULL_WIDTH}"]
                add(victim.attack, victim.name, words, options, None)
    return jobs


def _cells(plan: Profile) -> Iterator[tuple[Victim, float | None, int]]:
    """The first rate of each victim with each seed, then the second: what matters more comes first."""
    for place in plan.rates:
        for seed in plan.seeds:
            for victim in VICTIMS:
                if place < len(victim.rates):
                    yield victim, victim.rates[place], seed


def victim_of(job: AttackJob) -> Victim | None:
    """The table's line; None of a clean net."""
    label = job.name.removeprefix(f"bench_{job.run.dataset}_").split("_p0")[0].split("_t")[0]
    return next((v for v in VICTIMS if v.name == label), None)


def rate_of(job: AttackJob) -> float | None:
    """The share of the samples that it poisons; None of a clean net and of an attack that has none."""
    victim = victim_of(job)
    return None if victim is None or victim.rates == (None,) else job.attack.pratio


def chosen(jobs: Mapping[str, AttackJob], names: Sequence[str]) -> list[AttackJob]:
    """The jobs that the names mean, with those that they need.

    Raises:
        UserError: a name that means none.
    """
    picked: dict[str, AttackJob] = {}
    for name in names or ["*"]:
        meant = [
            job for job in jobs.values()
            if fnmatch.fnmatchcase(job.name, name) or name == (v.name if (v := victim_of(job)) else "clean")
        ]  # fmt: skip
        if not meant:
            known = ", ".join(["clean", *(v.name for v in VICTIMS)])
            raise UserError(f"{name} is no victim of this profile; give one of {known}, or a pattern for records")
        for job in meant:
            if job.needs:
                picked.setdefault(job.needs, jobs[job.needs])
            picked.setdefault(job.name, job)
    return list(picked.values())


def table(jobs: Mapping[str, AttackJob]) -> pd.DataFrame:
    """A line for each record that is there: its figures, and whether the backdoor took."""
    results = {name: result_of(job) for name, job in jobs.items() if job.done()}
    rows = []
    for name, result in results.items():
        job, after, victim = jobs[name], result["after"], victim_of(jobs[name])
        level = clean_level(job, jobs)
        rows.append({
            "record": name, "attack": victim.name if victim else "clean", "rate": rate_of(job),
            "target": job.attack.attack_target if victim else None, "seed": result["seed"],
            "width": job.run.width or FULL_WIDTH, "epochs": job.training.epochs,
            **{k: after[k] for k in ("acc", "asr", "ra", "n_clean", "n_poisoned")},
            "clean_acc": sum(level) / len(level) if level else None,
            "took": took(after, level, victim) if victim else "",
            "what_it_took": victim.took if victim else "", "seconds": result["seconds"]["total"],
        })  # fmt: skip
    return pd.DataFrame(rows)


def result_of(job: Job) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((job.folder / "result.json").read_text())
    return result


def clean_level(job: AttackJob, jobs: Mapping[str, AttackJob]) -> list[float]:
    """The accuracies of the clean nets of a record's width."""
    return [
        result_of(other)["after"]["acc"] for other in jobs.values()
        if victim_of(other) is None and other.run.width == job.run.width and other.done()
    ]  # fmt: skip


def took_of(job: AttackJob, jobs: Mapping[str, AttackJob]) -> str:
    """`took` of a victim's record that is there."""
    victim = victim_of(job)
    assert victim is not None
    return took(result_of(job)["after"], clean_level(job, jobs), victim)


def took(after: Mapping[str, float], clean: Sequence[float] | None, victim: Victim) -> str:
    """`took`, or what was missed. All-to-all works on images that are read right, so its bar is a share of those."""
    missed = []
    bar = CLEAN_LABEL_ASR if victim.clean_label else ASR
    if clean and victim.options.get("attack_label_trans") == "all2all":
        bar *= sum(clean) / len(clean)
    if after["asr"] < bar:
        missed.append(f"ASR {percent(after['asr'])} below {percent(bar)}")
    if not clean:
        missed.append("no clean net to compare with")
    elif (loss := sum(clean) / len(clean) - after["acc"]) > ACC_LOSS:
        missed.append(f"ACC {percent(loss)} below the clean nets'")
    return "did not take: " + ", ".join(missed) if missed else "took"


def report(profile: str, jobs: Mapping[str, AttackJob]) -> pd.DataFrame:
    """Write the table of what is there to bench/results/ and into the README; smoke runs leave both alone."""
    frame = table(jobs)
    if profile == "smoke" or frame.empty:
        return frame
    file = RESULTS / f"victims_{profile}.csv"
    known = with_earlier(file, frame, ("record",))
    write_csv(file, known)
    lines = ["| victim | rate | target | seed | width | epochs | ACC | clean ACC | ASR | RA | | what it took |",
             "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|---|"]  # fmt: skip
    for row in known.to_dict("records"):
        rate = "" if pd.isna(row["rate"]) else percent(row["rate"])
        target = "" if pd.isna(row["target"]) else f"{row['target']:.0f}"
        figures = " | ".join(percent(row[k]) for k in ("acc", "clean_acc", "asr", "ra"))
        lines.append(
            f"| {row['attack']} | {rate} | {target} | {row['seed']} | {row['width']} | {row['epochs']} | {figures} | "
            f"{row['took']} | {row['what_it_took']} |"
        )
    write_block(f"victims {profile}", [f"{len(known)} of {len(jobs)} records have been made.", "", *lines])
    return frame


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="an attack, `clean`, or a pattern; else all")
    parser.add_argument("--profile", choices=PROFILES, default="cpu")
    parser.add_argument("--list", action="store_true", help="list the records and their state; make none")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share out the CPU threads")
    args = parser.parse_args(argv)
    jobs = jobs_of(args.profile)
    picked: list[Job] = list(chosen(jobs, args.names))
    if args.list:
        print("\n".join(f"{state(job).value:8} record/{job.name}" for job in picked))
        return
    print(f"{len(picked)} records in {home() / 'record'}", flush=True)
    engine = LocalEngine(args.jobs, 1)
    try:
        ends = run_jobs(picked, engine)
    finally:
        engine.close()
    frame = report(args.profile, jobs)
    if not frame.empty:
        print(frame[["record", "acc", "clean_acc", "asr", "ra", "took"]].to_string(index=False))
    if any(end is not State.DONE for end in ends.values()):
        sys.exit("some failed; each says why in its folder's failed.log")


def start(run: Any) -> None:
    """Run a command of the bench: its progress on stderr, a mistake as one line and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        run()
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    start(main)
