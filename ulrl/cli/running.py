"""The commands that run attacks and defenses."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ulrl.cli.flags import attack_flags, defense_flags, method
from ulrl.cli.terminal import first_name, plain_options, print_path, print_table, same_bits
from ulrl.declared import declared
from ulrl.errors import UserError
from ulrl.files import whole_file
from ulrl.options import Schema, option
from ulrl.record_folder import record_folder
from ulrl.shipped import options_file

if TYPE_CHECKING:
    from ulrl.configure import DefenseRun
    from ulrl.defenses.base import Defense
    from ulrl.record import Record


def attack(argv: Sequence[str]) -> None:
    name, argv = first_name(argv, "attack", "an attack")
    flags = attack_flags(name, argv, "AttackRun", f"attack/{name}.py")
    same_bits()
    from ulrl.configure import AttackRun, configure_attack
    from ulrl.runs.attacking import run_attack

    _report(*run_attack(*configure_attack(name, flags, AttackRun), draw=_draw))


def preview(argv: Sequence[str]) -> None:
    name, argv = first_name(argv, "preview", "an attack")
    flags = attack_flags(name, argv, "PreviewRun", f"ulrl preview {name}")
    same_bits()
    from ulrl.configure import PreviewRun, configure_attack
    from ulrl.report import plots
    from ulrl.report.tables import perceptibility_table
    from ulrl.runs.attacking import run_preview

    attack, run, training = configure_attack(name, flags, PreviewRun)
    sample = run_preview(attack, run, training)
    path = Path(f"preview_{attack.name}_{run.dataset}.png")
    with whole_file(path) as partial:
        plots.trigger_preview(partial, sample.clean, sample.poisoned, sample.titles, f"{name} on {run.dataset}")
    print_table(perceptibility_table(name, run.dataset, sample.perceptibility))
    print_path(path)


def defense(argv: Sequence[str]) -> None:
    name, argv = first_name(argv, "defense", "a defense")
    flags, named = defense_flags(name, argv)
    folder = record_folder(named)
    same_bits()
    from ulrl.record import load_record
    from ulrl.runs.defending import run_defense

    _report(*run_defense(*_on(load_record(folder), name, flags), draw=_draw))


def _on(record: Record, name: str, flags: Mapping[str, Any]) -> tuple[Defense, Record, DefenseRun]:
    """A defense with the options that it has on a record."""
    from ulrl.configure import configure_defense

    defense, run = configure_defense(name, flags, record.dataset, record.model_name)
    return defense, record, run


@dataclass(frozen=True)
class Comparison:
    """Which defenses to compare, and how often to run each."""

    defenses: str = option("ulrl,ft", "names, with commas between")
    seeds: int = option(
        1, "runs of each, with seeds 0, 1, ...: other clean samples, other randomness", low=1, high=1000
    )


NOT_SHARED = {  # options of a defense that a comparison sets itself
    "result_file": "the record is named first",
    "random_seed": "the seeds are 0, 1, ..., as many as --seeds says",
    "save_folder_name": "each run has a folder of its own",
}


def compare(argv: Sequence[str]) -> None:
    """Each defense as its script would run it, every seed into a folder of its own; what is there is kept."""
    named, argv = first_name(argv, "compare", "a record")
    schema = Schema(Comparison, declared("ulrl.configure", "DefenseRun"))
    flags = schema.flags(argv, "ulrl compare RECORD", "Run several defenses on one record and compare them.")
    for flag, why in NOT_SHARED.items():
        if flag in flags:
            raise UserError(f"--{flag} would have no effect: {why}; leave it out")
    comparison = schema.merge(("flag", flags))[0].build(Comparison)
    shared = {k: v for k, v in flags.items() if k not in ("defenses", "seeds")}
    names = list(dict.fromkeys(name.strip() for name in comparison.defenses.split(",")))
    for name in names:
        method("defense", name)  # an unknown one is told before any has run
    folder = record_folder(named)
    same_bits()
    from ulrl.record import load_record
    from ulrl.report.results import check_result
    from ulrl.report.tables import comparison_table
    from ulrl.runs.defending import run_once

    record, results, found = load_record(folder), [], 0
    seeds = range(comparison.seeds)
    # Before the first runs, as an option may fit it and not the last.
    runs = [_on(record, name, {**shared, "random_seed": seed}) for seed in seeds for name in names]
    for defense, _, run in runs:
        run = replace(run, save_folder_name=f"{defense.name}_{run.ratio:g}_seed{run.random_seed}")
        folder, now = run_once(defense, record, run, draw=_draw)
        results.append(check_result(folder / "result.json"))
        found += not now
    print_table(comparison_table(record.name, results, found))


def sweep(argv: Sequence[str]) -> None:
    file = argv[0] if argv and not argv[0].startswith("-") else None
    description = "Do the runs that a sweep file names; exits with 1 when one failed."
    cls = declared("ulrl.sweep.scheduler", "SweepOptions")
    options = plain_options(cls, argv[1:] if file else argv, "ulrl sweep FILE", description)
    if file is None:
        raise UserError("name a sweep file first: yours, or a shipped one such as sweep/quick")
    options_file(file)
    from ulrl.sweep import scheduler

    if not scheduler.sweep(file, options):
        sys.exit(1)


def _draw(folder: Path) -> None:
    from ulrl.report.pictures import draw  # matplotlib takes its time to import, and is needed last

    draw(folder)


def _report(folder: Path, result: dict[str, Any]) -> None:
    from ulrl.report.tables import result_table

    print_table(result_table(result))
    with contextlib.suppress(ValueError):  # not below the current directory: keep it absolute
        folder = folder.relative_to(Path.cwd())
    print_path(f"{folder}/: {', '.join(sorted(p.name for p in folder.iterdir() if not p.name.startswith('.')))}")
