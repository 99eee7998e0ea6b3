"""What each defense leaves of each backdoor:  python -m bench.quality [--profile cpu|gpu] [--records NAME ...]

The victims are those of bench.victims that are there and took; what is not there is named. Every defense has its
published values (config/defense/<name>/published.yaml; `rnp:ours` has those that its script would use), 1% and 5% of
the training images, and three clean subsets. Beside each record stands what can be reached: what clean nets make of
the triggered images, and what fine-tuning on the true trigger with true labels makes of the victim. After the repair
the backdoor's owner tries to bring it back (bench/reactivation.py). A run that has its result is kept, so a stopped
one goes on where it was, and several may work side by side. The tables and bench/results/quality_<profile>.csv
are made of what is there; --tables does only that.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.jobs import CleanNetsAgainJob, CleanNetsJob, ReactivationJob, RepairJob, TruthJob
from bench.tables import gather, report
from bench.victims import PROFILES, chosen, jobs_of, start, took_of, victim_of
from ulrl.configure import configure_defense
from ulrl.data.datasets import load_dataset
from ulrl.defenses.base import DEFENSES
from ulrl.errors import UserError
from ulrl.files import PACKAGE_ROOT
from ulrl.sweep.jobs import AttackJob, Job, State, state
from ulrl.sweep.local import LocalEngine
from ulrl.sweep.scheduler import run_jobs

# The quick ones first, so that the table fills evenly. Any other that is registered comes after them.
ORDER = "clp bnp fst nad ulrl rnp rnp:ours harden ft i-bau fp npd tsbd ft-sam sau nc anp abl".split()
RATIOS = {"cpu": (0.01, 0.05), "gpu": (0.01, 0.05), "smoke": (0.1,)}
SUBSETS = 3
IBAU_STEPS = 250  # its authors': 5 rounds of 50 batches
MEASURES = ("repair", "truth", "reactivation")


@dataclass(frozen=True)
class Plan:
    """Which part of the bench to do."""

    records: list[AttackJob]
    clean: tuple[str, ...]
    defenses: tuple[str, ...]
    ratios: tuple[float, ...]
    subsets: int
    measures: tuple[str, ...]


def all_defenses() -> list[str]:
    others = [name for name, cls in DEFENSES.items() if cls.repairs and name not in ORDER]
    return [*(n for n in ORDER if n.split(":")[0] in DEFENSES), *others]


def folder(defense: str, ratio: float, subset: int) -> str:
    """A repair's folder in its record."""
    return f"bench_{defense.replace(':', '-')}_r{ratio:g}_c{subset}"


def repair_job(record: AttackJob, defense: str, ratio: float, subset: int, clean_images: int) -> RepairJob:
    """A defense with its published values, or, as `<name>:ours`, with those that its script would use.

    Raises:
        UserError: no such defense.
    """
    name, _, variant = defense.partition(":")
    DEFENSES[name]
    given: dict[str, Any] = {"ratio": ratio, "random_seed": subset}
    published = Path("config/defense") / name / "published.yaml"
    if not variant and (PACKAGE_ROOT / published).is_file():
        given["yaml_path"] = str(published)
        if name == "i-bau":
            batches = max(1, clean_images // 100)
            given["n_rounds"] = max(1, round(IBAU_STEPS / batches))
    method, run = configure_defense(name, given, record.run.dataset, record.run.model, quiet=True)
    return RepairJob(
        name=f"{record.name}/defense/{folder(defense, ratio, subset)}", needs=record.name, alike=("defense", defense),
        small=True, defense=method, run=run,
    )  # fmt: skip


def jobs_for(plan: Plan) -> Iterator[Job]:
    """The records, then subset by subset and defense by defense, so that a part of it is a table of all records.

    Of each subset the repairs come first, then what fine-tuning on the true trigger reaches, then re-activation.
    """
    yield from plan.records
    victims = [record for record in plan.records if victim_of(record)]
    images = len(load_dataset(plan.records[0].run.dataset)[0]) if plan.records else 0
    for record in victims:  # whatever is measured: without these figures a repair is not ranked
        yield CleanNetsJob(
            name=f"{record.name}/reach/clean_nets", needs=record.name, alike=("clean nets",), record=record.name,
            clean_nets=plan.clean, small=True,
        )  # fmt: skip
    if "reactivation" in plan.measures:
        for record in victims:
            yield CleanNetsAgainJob(
                name=f"{record.name}/reach/clean_nets_again", needs=record.name, alike=("clean nets again",),
                record=record.name, clean_nets=plan.clean, small=True,
            )  # fmt: skip
    for subset in range(plan.subsets):
        for ratio in plan.ratios:
            repairs = [
                (record, repair_job(record, defense, ratio, subset, round(ratio * images)))
                for defense in plan.defenses
                for record in plan.records
            ]
            repairs = [(record, job) for record, job in repairs if "repair" in plan.measures or job.done()]
            yield from (job for _, job in repairs)
            for record in victims if "truth" in plan.measures else ():
                yield TruthJob(
                    name=f"{record.name}/reach/truth_r{ratio:g}_c{subset}", needs=record.name, alike=("truth",),
                    record=record.name, attack=record.attack, ratio=ratio, subset=subset, small=True,
                )  # fmt: skip
            for record, job in repairs if "reactivation" in plan.measures else ():
                if record in victims:
                    yield ReactivationJob(
                        name=f"{job.name}/reactivation", needs=job.name, alike=("reactivation",),
                        record=record.name, clean_nets=plan.clean, repaired=job.name, small=True,
                    )  # fmt: skip


def planned(args: argparse.Namespace, jobs: Mapping[str, AttackJob]) -> Plan:
    """What was asked for, of the records that are there.

    Raises:
        UserError: an unknown name, no clean net.
    """
    picked = chosen(jobs, args.records)
    missing = [job.name for job in picked if not job.done()]
    if missing:
        print(f"{len(missing)} of {len(picked)} records are not there (python -m bench.victims): {' '.join(missing)}")
    there = [job for job in picked if job.done()]
    level = tuple(name for name, job in jobs.items() if victim_of(job) is None and job.done())
    clean = tuple(name for name in level if jobs[name].run.width == PROFILES[args.profile].training.get("width"))
    if not clean:
        raise UserError(f"no clean net is there; run python -m bench.victims --profile {args.profile} clean")
    taken = [job for job in there if victim_of(job) is None or took_of(job, jobs) == "took" or args.all]
    for job in there:
        if job not in taken:
            print(f"left out, {took_of(job, jobs)}: {job.name}")
    return Plan(
        taken, clean, tuple(args.defenses or all_defenses()), tuple(args.ratios or RATIOS[args.profile]),
        args.subsets, tuple(args.measure),
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=PROFILES, default="cpu")
    parser.add_argument("--records", nargs="+", default=[], help="attacks, `clean`, or patterns for records; else all")
    parser.add_argument("--defenses", nargs="+", metavar="DEFENSE", help=f"else all: {' '.join(ORDER)}")
    parser.add_argument("--ratios", nargs="+", type=float, help="shares of the clean training images")
    parser.add_argument("--subsets", type=int, default=SUBSETS, help="clean subsets of each size")
    parser.add_argument("--measure", nargs="+", choices=MEASURES, default=MEASURES, help="else all of them")
    parser.add_argument("--all", action="store_true", help="also the victims whose backdoor did not take")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share out the CPU threads")
    parser.add_argument("--list", action="store_true", help="list the runs and their state; do none")
    parser.add_argument("--tables", action="store_true", help="only make the tables of what is there")
    args = parser.parse_args(argv)
    jobs = jobs_of(args.profile)
    ends: dict[str, State] = {}
    if not args.tables:
        todo = list(jobs_for(planned(args, jobs)))
        if args.list:
            print("\n".join(f"{state(job).value:8} record/{job.name}" for job in todo))
            return
        engine = LocalEngine(args.jobs, args.jobs)
        try:
            ends = run_jobs(todo, engine)
        finally:
            engine.close()
    report(args.profile, gather(jobs))
    if any(end is not State.DONE for end in ends.values()):
        sys.exit("some failed; each says why in its folder's failed.log")


if __name__ == "__main__":
    start(main)
