"""The commands that read what runs wrote: a record, tables, the page and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ulrl.cli.terminal import first_name, plain_options, print_path, print_table
from ulrl.declared import declared
from ulrl.errors import UserError
from ulrl.files import check_output, find_input, home, whole_file
from ulrl.options import option
from ulrl.record_folder import record_folder
from ulrl.registry import nearest

if TYPE_CHECKING:
    import pandas as pd

KEYS: tuple[str, ...] = declared("ulrl.report.frame", "KEYS")


def show(argv: Sequence[str]) -> None:
    named, argv = first_name(argv, "show", "a record")
    plain_options(NoOptions, argv, "ulrl show RECORD", "What a record holds, and what defenses came to on it.")
    folder = record_folder(named, "the record")
    from ulrl.record import load_record
    from ulrl.report.results import find_runs
    from ulrl.report.tables import record_table

    print_table(record_table(load_record(folder), find_runs(folder)[0]))


@dataclass(frozen=True)
class NoOptions:
    """Of a command that has none."""


@dataclass(frozen=True)
class ResultsOptions:
    """Which runs, and how to show them."""

    where: str | None = option(None, f"only runs with key=value, several with commas between; keys: {', '.join(KEYS)}")
    by: str = option("dataset,model,attack,defense,ratio", "one line per value of these keys")
    format: str = option("table", "how to print", choices=("table", "csv", "markdown", "latex"))
    export: str | None = option(None, "also write every run to this file, .parquet or .csv")


def results(argv: Sequence[str]) -> None:
    """The summary of finished runs. As CSV it holds fractions and counts; elsewhere it is for reading.

    Raises:
        UserError: no runs, or none that --by leaves anything of.
    """
    root, argv = _folder(argv)
    options = plain_options(ResultsOptions, argv, "ulrl results [FOLDER]", "Collect what runs came to.")
    _check_folder(root)
    if options.export:
        check_output(Path(options.export), "--export", (".parquet", ".csv"))
    from ulrl.report.frame import export_frame, harmless_cells
    from ulrl.report.pooling import in_order, summarise
    from ulrl.report.tables import summary_latex, summary_markdown, summary_table

    frame = _runs_below(root, options.where)
    summary = in_order(summarise(frame, options.by))
    if summary.empty:  # attacks are no repairs
        raise UserError(f"--by {options.by} averages repairs alone, and none is below {root}; add defense to it")
    if options.export:
        export_frame(frame, Path(options.export))
    match options.format:
        case "csv":
            plain = summary.drop(columns=["rivalry", "block"])  # which say whom the notes of a table are about
            print(harmless_cells(plain).to_csv(index=False), end="")
        case "markdown":
            print(summary_markdown(summary), end="")
        case "latex":
            print(summary_latex(summary), end="")
        case _:
            # What was measured on other data or in another net is not to be compared, and widens the table.
            apart = [key for key in ("dataset", "model") if key in summary]
            for _, part in summary.groupby(apart, sort=False) if apart else [((), summary)]:
                runs = int(part.n[~part.oracle].sum())
                print_table(summary_table(part, f"{runs} run{'s' * (runs != 1)} below {root}"))


@dataclass(frozen=True)
class PageOptions:
    """Where the report goes."""

    out: str = option("report.html", "the page; needs no other file and no network")


def report(argv: Sequence[str]) -> None:
    root, argv = _folder(argv)
    options = plain_options(PageOptions, argv, "ulrl report [FOLDER]", "Make one page of all runs.")
    _check_folder(root)
    check_output(Path(options.out), "--out")
    from ulrl.report.page import write_report

    runs = write_report(root, Path(options.out))
    print(f"{options.out}: {runs} run{'s' * (runs != 1)}; open it in a browser")


FIGURES = ("asr-acc", "heatmap", "ranking", "tsne")


@dataclass(frozen=True)
class PlotOptions:
    """What to draw, and where it goes."""

    out: str = option("", "the figure's file: .pdf, .svg or .png", source="user")
    where: str | None = option(None, f"asr-acc, heatmap: only runs with key=value; keys: {', '.join(KEYS)}")
    metric: str = option("asr", "heatmap: the figure shown", choices=("asr", "ra", "acc", "der"))
    style: str = option(
        "screen", "paper: a column's width of 3.3 inches, no title, no text below 7 points; name a .pdf",
        choices=("screen", "paper"),
    )  # fmt: skip
    samples: int = option(1000, "tsne: clean test images, and a fifth as many triggered ones", low=20)
    dataset_path: str = option("./data", "tsne: folder that holds <dataset>/", source="BackdoorBench")
    device: str = option("auto", "tsne: auto, cpu, cuda or cuda:N")


def plot(argv: Sequence[str]) -> None:
    """asr-acc and heatmap are of all runs below a folder; ranking and tsne of one defense's folder."""
    figure, argv = first_name(argv, "plot", f"a figure ({', '.join(FIGURES)})")
    if figure not in FIGURES:
        raise UserError(f"unknown figure {figure!r}{nearest(figure, list(FIGURES))}")
    root, argv = _folder(argv)
    options = plain_options(PlotOptions, argv, f"ulrl plot {figure} [FOLDER]", "Draw a figure for a paper.")
    _check_folder(root)
    out = Path(options.out)
    check_output(out, "--out", (".pdf", ".svg", ".png"))
    from ulrl.report import plots

    format, paper = out.suffix[1:], options.style == "paper"
    with whole_file(out) as partial:
        match figure:
            case "ranking":
                from ulrl.report.results import load_ranking

                plots.neuron_ranking(partial, *load_ranking(root), format, paper)
            case "tsne":
                from ulrl.runs.showing import penultimate_features

                plots.tsne(partial, *penultimate_features(root, options.dataset_path, options.device, options.samples),
                           format, paper)  # fmt: skip
            case _:
                frame = _runs_below(root, options.where)
                if figure == "heatmap":
                    plots.heatmap(partial, frame, options.metric, format, paper)
                else:
                    plots.asr_against_acc(partial, frame, format, paper)
    print_path(out)


def _runs_below(root: Path, where: str | None) -> pd.DataFrame:
    from ulrl.report.frame import frame_of_runs, select
    from ulrl.report.results import find_runs

    frame = select(frame_of_runs(find_runs(root)[0]), where)
    if frame.empty:
        raise UserError(f"no result.json below {root}" + (f" with {where}" if where else ""))
    return frame


def _folder(arguments: Sequence[str]) -> tuple[Path, Sequence[str]]:
    """The folder named first, or `record/`, and the arguments after it."""
    if arguments and not arguments[0].startswith("-"):
        return find_input(arguments[0]), arguments[1:]
    return home() / "record", arguments


def _check_folder(root: Path) -> None:
    """Say that a named folder is not there, when the flags are found to be in order.

    Raises:
        UserError: it is not.
    """
    if not root.is_dir() and root != home() / "record":
        raise UserError(f"{root} is not a folder; name one that holds records, or a record")
