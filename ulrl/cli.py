"""The command line: flags and YAML in, one table out, one clear line when something is wrong."""

from __future__ import annotations

import contextlib
import errno
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from ulrl.attacks.base import ATTACKS, Attack
from ulrl.data.datasets import DATASETS
from ulrl.defenses.base import DEFENSES, Defense
from ulrl.errors import UserError
from ulrl.models.architectures import ARCHITECTURES
from ulrl.options import Schema, Settings, option
from ulrl.record import Record
from ulrl.report.tables import comparison_table, perceptibility_table, result_table
from ulrl.runs.attacking import AttackRun, PreviewRun, run_attack, run_preview
from ulrl.runs.common import Layer, attack_layers, defense_layers, find_record, pick_device, yaml_layer
from ulrl.runs.defending import DefenseRun, run_defense, run_once
from ulrl.sweep.scheduler import SweepOptions, sweep
from ulrl.training import TrainOptions

log = logging.getLogger(__name__)


def attack_main(name: str, argv: Sequence[str] | None = None) -> None:
    """Run `attack/<name>.py`: train a backdoored model and write its record. Exits the process."""
    _exit_with(lambda: _attack(name, sys.argv[1:] if argv is None else argv))


def defense_main(name: str, argv: Sequence[str] | None = None) -> None:
    """Run `defense/<name>.py`: repair a record's model and judge it. Exits the process."""
    _exit_with(lambda: _defense(name, sys.argv[1:] if argv is None else argv))


def main(argv: Sequence[str] | None = None) -> None:
    """The `ulrl` command. Exits the process."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _exit_with(lambda: _command(arguments))


USAGE = """usage: ulrl list
       ulrl attack NAME [options]      as python attack/NAME.py
       ulrl defense NAME [options]     as python defense/NAME.py
       ulrl compare RECORD --defenses NAME,NAME,... --seeds N     several defenses on one record, as a table
       ulrl sweep FILE [options]       a grid of attacks and defenses; what is done is not done again
       ulrl preview ATTACK [options]   draw an attack's trigger, without training a backdoored model
Add --help after a name for its options."""


def _command(arguments: list[str]) -> None:
    match arguments:
        case ["list"]:
            _print(_method_table())
        case ["attack", name, *rest] if not name.startswith("-"):
            _attack(name, rest)
        case ["defense", name, *rest] if not name.startswith("-"):
            _defense(name, rest)
        case ["compare", record, *rest] if not record.startswith("-"):
            _compare(record, rest)
        case ["sweep", *rest]:
            _sweep(rest)
        case ["preview", name, *rest] if not name.startswith("-"):
            _preview(name, rest)
        case ["--help" | "-h"]:
            print(USAGE)
        case _:
            raise UserError(f"unknown command {' '.join(arguments)!r}; try ulrl --help")


def _attack(name: str, argv: Sequence[str]) -> None:
    attack, run, training = _attack_options(name, argv, AttackRun, f"attack/{name}.py")
    folder, result = run_attack(attack, run, training)
    _report(folder, result)


def _preview(name: str, argv: Sequence[str]) -> None:
    attack, run, training = _attack_options(name, argv, PreviewRun, f"ulrl preview {name}")
    path, figures = run_preview(attack, run, training)
    _print(perceptibility_table(name, run.dataset, figures))
    print(path)


Run = TypeVar("Run", bound=PreviewRun)


def _attack_options(
    name: str, argv: Sequence[str], run_options: type[Run], prog: str
) -> tuple[Attack, Run, TrainOptions]:
    cls = ATTACKS[name]
    schema = Schema(run_options, cls, TrainOptions)
    flags = schema.flags(argv, prog, inspect.getdoc(cls) or "")
    settings = _merge(schema, flags, *attack_layers(schema, name, flags))
    return settings.build(cls), settings.build(run_options), settings.build(TrainOptions)


def _defense(name: str, argv: Sequence[str]) -> None:
    cls = DEFENSES[name]
    schema = Schema(DefenseRun, cls)
    flags = schema.flags(argv, f"defense/{name}.py", inspect.getdoc(cls) or "")
    given = yaml_layer(schema, flags.get("yaml_path"))
    record = find_record(flags.get("result_file") or given[1].get("result_file", ""))
    defense, run = _defense_options(name, record, schema, flags, given)
    folder, result = run_defense(defense, record, run)
    _report(folder, result)


def _defense_options(
    name: str, record: Record, schema: Schema, flags: dict[str, Any], given: Layer
) -> tuple[Defense, DefenseRun]:
    usual = defense_layers(schema, name, record.dataset, record.model_name)
    settings = _merge(schema, flags, *([given] if given[1] else usual))
    return settings.build(DEFENSES[name]), settings.build(DefenseRun)


@dataclass(frozen=True)
class Comparison:
    """Which defenses to compare, and how often to run each."""

    defenses: str = option("ulrl,ft", "names, with commas between")
    seeds: int = option(1, "runs of each, with seeds 0, 1, ...: other clean samples, other randomness", low=1)
    overwrite: bool = option(False, "run again what has a result")


def _compare(record_name: str, argv: Sequence[str]) -> None:
    """Each defense as its script would run it, every seed into a folder of its own; what is there is kept."""
    schema = Schema(Comparison, DefenseRun)
    flags = schema.flags(argv, "ulrl compare RECORD", "Run several defenses on one record and compare them.")
    settings, _ = schema.merge(("flag", flags))
    comparison = settings.build(Comparison)
    shared = {k: v for k, v in flags.items() if k not in ("defenses", "seeds", "overwrite")}
    record, results = find_record(record_name), []
    names = [name.strip() for name in comparison.defenses.split(",")]
    classes = [DEFENSES[name] for name in names]  # an unknown one is told before any has run
    for seed in range(comparison.seeds):
        for name, cls in zip(names, classes, strict=True):
            both = Schema(DefenseRun, cls)
            defense, run = _defense_options(name, record, both, {**shared, "random_seed": seed}, ("", {}))
            run = replace(run, save_folder_name=f"{name}_{run.ratio:g}_seed{seed}")
            results.append(run_once(defense, record, run, overwrite=comparison.overwrite))
    _print(comparison_table(record.name, results))


def _sweep(argv: Sequence[str]) -> None:
    file = argv[0] if argv and not argv[0].startswith("-") else None
    schema = Schema(SweepOptions)
    description = "Do the runs that a sweep file names; exits with 1 when one failed."
    flags = schema.flags(argv[1:] if file else argv, "ulrl sweep FILE", description)
    if file is None:
        raise UserError("name a sweep file first, such as config/sweep/quick.yaml")
    if not sweep(file, schema.merge(("flag", flags))[0].build(SweepOptions)):
        sys.exit(1)


def _merge(schema: Schema, flags: dict[str, Any], *files: Layer) -> Settings:
    settings, ignored = schema.merge(*files, ("flag", flags))
    for path, _ in files:
        if path:
            log.info("options from %s", path)
    if ignored:
        log.info("accepted for BackdoorBench's sake, without a meaning here: %s", ", ".join(ignored))
    device, source = settings.values.get("device"), settings.origin.get("device")
    if device and source != "flag":
        try:
            pick_device(device)
        except UserError:
            log.warning("device %s of %s is not on this machine: using the CPU", device, source)
            return Settings({**settings.values, "device": "cpu"}, settings.origin)
    return settings


def _report(folder: Path, result: dict[str, Any]) -> None:
    _print(result_table(result))
    with contextlib.suppress(ValueError):  # not below the current directory: keep it absolute
        folder = folder.relative_to(Path.cwd())
    print(f"{folder}/: {', '.join(sorted(p.name for p in folder.iterdir() if not p.name.startswith('.')))}")


def _method_table() -> Table:
    table = Table("kind", "name", "what it is")
    for kind, registry in (("attack", ATTACKS), ("defense", DEFENSES)):
        for name, cls in registry.items():
            module = sys.modules[cls.__module__]
            table.add_row(kind, name, (module.__doc__ or "").splitlines()[0])
    table.add_row("dataset", ", ".join(DATASETS), "")
    table.add_row("model", ", ".join(ARCHITECTURES), "")
    return table


def _print(table: Table) -> None:
    Console(file=sys.stdout).print(table)


def _exit_with(command: Callable[[], None]) -> None:
    """Run a command and leave the process: 0, or one line on stderr and 2 (130 when interrupted)."""
    try:
        with _console_log():
            torch.backends.cudnn.deterministic = True
            command()
            sys.stdout.flush()
    except UserError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted; what was there before is unchanged", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG):
            raise
        where = f" {error.filename}" if error.filename else ""
        _fail(f"cannot write{where}: {error.strerror}; make room or choose another place, then run again", 2)
    sys.exit(0)


def _fail(message: str, code: int) -> None:
    print(f"ulrl: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


@contextlib.contextmanager
def _console_log() -> Iterator[None]:
    """Show the library's log on stderr, one plain line per entry."""
    logger = logging.getLogger("ulrl")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
