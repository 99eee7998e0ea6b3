"""The command line: flags and YAML in, one table out, one clear line when something is wrong."""

from __future__ import annotations

import argparse
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

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

from ulrl import own_files
from ulrl.attacks.base import ATTACKS
from ulrl.configure import (
    AttackRun,
    DefenseRun,
    PreviewRun,
    attack_schema,
    configure_attack,
    configure_defense,
    defense_schema,
    yaml_layer,
)
from ulrl.data.datasets import DATASETS
from ulrl.defenses.base import DEFENSES, Defense
from ulrl.errors import UserError
from ulrl.files import find_input, home, whole_file
from ulrl.models.architectures import ARCHITECTURES
from ulrl.options import Schema, option
from ulrl.record import Record, find_record
from ulrl.registry import nearest
from ulrl.report import plots
from ulrl.report.frame import KEYS, export_frame, frame_of_runs, select
from ulrl.report.page import write_report
from ulrl.report.pictures import draw
from ulrl.report.pooling import in_order, summarise
from ulrl.report.results import find_runs, load_ranking
from ulrl.report.tables import (
    accuracy_table,
    comparison_table,
    perceptibility_table,
    result_table,
    summary_latex,
    summary_markdown,
    summary_table,
    suspicion_table,
)
from ulrl.runs.attacking import run_attack, run_preview
from ulrl.runs.defending import run_defense, run_once
from ulrl.runs.showing import penultimate_features
from ulrl.sweep.scheduler import SweepOptions, sweep

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
       ulrl purify [options]           a model of your own: factory, weights and a folder of clean images
       ulrl sweep FILE [options]       a grid of attacks and defenses; what is done is not done again
       ulrl preview ATTACK [options]   draw an attack's trigger, without training a backdoored model
       ulrl results [FOLDER] [options]     what runs came to, as a table; FOLDER is record/ where not given
       ulrl report [FOLDER] --out FILE     the same as a page that opens in a browser, with a section per run
       ulrl plot FIGURE [FOLDER] --out FILE     a figure for a paper: asr-acc, heatmap, ranking or tsne
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
        case ["purify", *rest]:
            _purify(rest)
        case ["preview", name, *rest] if not name.startswith("-"):
            _preview(name, rest)
        case ["results", *rest]:
            _results(*_folder(rest))
        case ["report", *rest]:
            _page(*_folder(rest))
        case ["plot", figure, *rest] if not figure.startswith("-"):
            _plot(figure, *_folder(rest))
        case ["--help" | "-h"]:
            print(USAGE)
        case _:
            raise UserError(f"unknown command {' '.join(arguments)!r}; try ulrl --help")


def _attack(name: str, argv: Sequence[str]) -> None:
    flags = attack_schema(name).flags(argv, f"attack/{name}.py", inspect.getdoc(ATTACKS[name]) or "")
    folder, result = run_attack(*configure_attack(name, flags, AttackRun))
    _report(folder, result)


def _preview(name: str, argv: Sequence[str]) -> None:
    flags = attack_schema(name, PreviewRun).flags(argv, f"ulrl preview {name}", inspect.getdoc(ATTACKS[name]) or "")
    attack, run, training = configure_attack(name, flags, PreviewRun)
    sample = run_preview(attack, run, training)
    path = Path(f"preview_{attack.name}_{run.dataset}.png")
    with whole_file(path) as partial:
        plots.trigger_preview(partial, sample.clean, sample.poisoned, sample.titles)
    _print(perceptibility_table(name, run.dataset, sample.perceptibility))
    print(path)


def _defense(name: str, argv: Sequence[str]) -> None:
    schema = defense_schema(name)
    flags = schema.flags(argv, f"defense/{name}.py", inspect.getdoc(DEFENSES[name]) or "")
    named = flags.get("result_file") or yaml_layer(schema, flags.get("yaml_path"))[1].get("result_file", "")
    record = find_record(named)
    folder, result = run_defense(*_on(record, name, flags))
    _report(folder, result)


def _on(record: Record, name: str, flags: dict[str, Any]) -> tuple[Defense, Record, DefenseRun]:
    """A defense with the options that it has on a record."""
    defense, run = configure_defense(name, flags, record.dataset, record.model_name)
    return defense, record, run


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
    for name in names:
        DEFENSES[name]  # an unknown one is told before any has run
    for seed in range(comparison.seeds):
        for name in names:
            defense, _, run = _on(record, name, {**shared, "random_seed": seed})
            run = replace(run, save_folder_name=f"{name}_{run.ratio:g}_seed{seed}")
            folder, result = run_once(defense, record, run, overwrite=comparison.overwrite)
            draw(folder)
            results.append(result)
    _print(comparison_table(record.name, results))


def _purify(argv: Sequence[str]) -> None:
    """A model of the user's: diagnosed and, unless that is all, repaired."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--method", default=own_files.PurifyRun.method)
    cls = DEFENSES[peek.parse_known_args(argv)[0].method]  # whose options are flags, too
    schema = Schema(own_files.PurifyRun, cls)
    settings, _ = schema.merge(("given", schema.flags(argv, "ulrl purify", inspect.getdoc(own_files) or "")))
    run, defense = settings.build(own_files.PurifyRun), settings.build(cls)
    model, images = own_files.load(run)
    names = images.spec.class_names
    log.info("looking for a backdoor in %s with %d clean images", run.model, len(images))
    found = own_files.diagnose(model, images, defense)
    verdict = f"verdict: {found.verdict}; look at {names[found.label]}"
    _print(suspicion_table(found.ranking, names, verdict))
    for note in found.report["notes"]:
        log.warning("%s", note)
    if run.check:
        sys.exit(3 if found.verdict == "backdoored" else 0)
    log.info("repairing it by %s", run.method)
    repaired, before, after, held_out = own_files.repair(model, images, defense)
    own_files.save(repaired.model, Path(run.out or ""))
    _print(accuracy_table(before, after, held_out, [names[label] for label in repaired.flagged]))
    print(run.out)


def _sweep(argv: Sequence[str]) -> None:
    file = argv[0] if argv and not argv[0].startswith("-") else None
    description = "Do the runs that a sweep file names; exits with 1 when one failed."
    options = _plain_options(SweepOptions, argv[1:] if file else argv, "ulrl sweep FILE", description)
    if file is None:
        raise UserError("name a sweep file first, such as config/sweep/quick.yaml")
    if not sweep(file, options):
        sys.exit(1)


@dataclass(frozen=True)
class ResultsOptions:
    """Which runs, and how to show them."""

    where: str | None = option(None, f"only runs with key=value, several with commas between; keys: {', '.join(KEYS)}")
    by: str = option("dataset,model,attack,defense,ratio", "one line per value of these keys")
    format: str = option("table", "how to print", choices=("table", "csv", "markdown", "latex"))
    export: str | None = option(None, "also write every run to this file, .parquet or .csv")


def _results(root: Path, argv: Sequence[str]) -> None:
    """The summary of finished runs. As CSV it holds fractions and counts; elsewhere it is for reading."""
    options = _plain_options(ResultsOptions, argv, "ulrl results [FOLDER]", "Collect what runs came to.")
    frame = _runs_below(root, options.where)
    summary = in_order(summarise(frame, options.by))
    if options.export:
        export_frame(frame, Path(options.export))
    match options.format:
        case "csv":
            print(summary.to_csv(index=False), end="")
        case "markdown":
            print(summary_markdown(summary), end="")
        case "latex":
            print(summary_latex(summary), end="")
        case _:
            # What was measured on other data or in another net is not to be compared, and widens the table.
            apart = [key for key in ("dataset", "model") if key in summary]
            for _, part in summary.groupby(apart, sort=False) if apart else [((), summary)]:
                _print(summary_table(part, f"{part.n[~part.oracle].sum()} runs below {root}"))


@dataclass(frozen=True)
class PageOptions:
    """Where the report goes."""

    out: str = option("report.html", "the page; needs no other file and no network")


def _page(root: Path, argv: Sequence[str]) -> None:
    options = _plain_options(PageOptions, argv, "ulrl report [FOLDER]", "Make one page of all runs.")
    runs = write_report(root, Path(options.out))
    print(f"{options.out}: {runs} runs; open it in a browser")


FIGURES = ("asr-acc", "heatmap", "ranking", "tsne")


@dataclass(frozen=True)
class PlotOptions:
    """What to draw, and where it goes."""

    out: str = option("", "the figure's file: .pdf, .svg or .png", source="user")
    where: str | None = option(None, f"asr-acc, heatmap: only runs with key=value; keys: {', '.join(KEYS)}")
    metric: str = option("asr", "heatmap: the figure shown", choices=("asr", "ra", "acc", "der"))
    samples: int = option(1000, "tsne: clean test images, and a fifth as many triggered ones", low=20)
    dataset_path: str = option("./data", "tsne: folder that holds <dataset>/", source="BackdoorBench")
    device: str = option("auto", "tsne: auto, cpu, cuda or cuda:N")


def _plot(figure: str, root: Path, argv: Sequence[str]) -> None:
    """asr-acc and heatmap are of all runs below a folder; ranking and tsne of one defense's folder."""
    if figure not in FIGURES:
        raise UserError(f"unknown figure {figure!r}{nearest(figure, list(FIGURES))}")
    options = _plain_options(PlotOptions, argv, f"ulrl plot {figure} [FOLDER]", "Draw a figure for a paper.")
    out = Path(options.out)
    if out.suffix not in (".pdf", ".svg", ".png"):
        raise UserError(f"--out {options.out!r}: name a file that ends in .pdf, .svg or .png")
    format = out.suffix[1:]
    with whole_file(out) as partial:
        match figure:
            case "ranking":
                plots.neuron_ranking(partial, *load_ranking(root), format)
            case "tsne":
                plots.tsne(partial, *penultimate_features(root, options.dataset_path, options.device, options.samples),
                           format)  # fmt: skip
            case _:
                frame = _runs_below(root, options.where)
                if figure == "heatmap":
                    plots.heatmap(partial, frame, options.metric, format)
                else:
                    plots.asr_against_acc(partial, frame, format)
    print(out)


def _runs_below(root: Path, where: str | None) -> pd.DataFrame:
    frame = select(frame_of_runs(find_runs(root)[0]), where)
    if frame.empty:
        raise UserError(f"no result.json below {root}" + (f" with {where}" if where else ""))
    return frame


def _folder(arguments: Sequence[str]) -> tuple[Path, Sequence[str]]:
    """The folder named first, or `record/`, and the arguments after it."""
    if arguments and not arguments[0].startswith("-"):
        return find_input(arguments[0]), arguments[1:]
    return home() / "record", arguments


Options = TypeVar("Options")


def _plain_options(cls: type[Options], argv: Sequence[str], prog: str, description: str) -> Options:
    """The options of a command that takes flags only."""
    schema = Schema(cls)
    return schema.merge(("flag", schema.flags(argv, prog, description)))[0].build(cls)


def _report(folder: Path, result: dict[str, Any]) -> None:
    draw(folder)
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
    width = None if sys.stdout.isatty() else 160  # a file breaks no lines
    Console(file=sys.stdout, width=width).print(table)


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
