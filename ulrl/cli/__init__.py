"""The command line: flags and YAML in, one table out, one clear line when something is wrong."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from ulrl import __version__
from ulrl.cli.terminal import exit_with
from ulrl.errors import UserError
from ulrl.registry import nearest


def attack_main(name: str, argv: Sequence[str] | None = None) -> None:
    """Run `attack/<name>.py`: train a backdoored model and write its record. Exits the process."""
    main(["attack", name, *(sys.argv[1:] if argv is None else argv)])


def defense_main(name: str, argv: Sequence[str] | None = None) -> None:
    """Run `defense/<name>.py`: repair a record's model and judge it. Exits the process."""
    main(["defense", name, *(sys.argv[1:] if argv is None else argv)])


def main(argv: Sequence[str] | None = None) -> None:
    """The `ulrl` command. Exits the process."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    exit_with(lambda: _command(arguments))


USAGE = """usage: ulrl COMMAND [options]; --help after a command, or its first name, lists its options
       ulrl --version

A model of your own
  purify [options]                 diagnose and repair it: factory, weights and a folder of clean images

Records, which are backdoored models with what is needed to judge a repair
  attack NAME [options]            make one, as python attack/NAME.py
  defense NAME [options]           repair one, as python defense/NAME.py
  detect RECORD --samples [options]  which images of its training set are poisoned, as scores, judged
  show RECORD                      what was planted, how well it works, its pictures and its defenses so far
  inspect FILE                     what a record, checkpoint or weights file holds, without loading it
  convert RECORD --to safetensors  the same record without a pickle; --to pickle: as BackdoorBench reads it
  preview ATTACK [options]         draw an attack's trigger, without training a backdoored model
  clip [options]                   the same for images with captions: plant a backdoor in a dual encoder, and repair it
  list                             attacks, defenses, sample detectors, data sets and models
  list configs                     the options files that come with ulrl, by the names that --yaml_path and sweep take

Studies
  compare RECORD [options]         several defenses on one record, as a table
  sweep FILE [options]             a grid of attacks and defenses; what is done is not done again
  results [FOLDER] [options]       what runs came to, as a table; FOLDER is record/ where not given
  report [FOLDER] --out FILE       the same as a page that opens in a browser, with a section per run
  plot FIGURE [FOLDER] --out FILE  a figure for a paper: asr-acc, heatmap, ranking or tsne"""

# And the module, imported when it is asked for, with a function of that name. It imports what takes seconds, such as
# torch, when the arguments are found to be in order.
COMMANDS = {
    "attack": "running", "defense": "running", "preview": "running", "compare": "running", "sweep": "running",
    "purify": "own", "list": "listing", "detect": "detecting", "clip": "captioned",
    "inspect": "strangers", "convert": "strangers",
    "show": "showing", "results": "showing", "report": "showing", "plot": "showing",
}  # fmt: skip


def _command(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("--help", "-h"):
        print(USAGE)
        return
    if arguments == ["--version"]:
        print(f"ulrl {__version__}")
        return
    name, *rest = arguments
    if name in ("suspect", "check"):  # as the function is called, and the flag
        raise UserError(f"unknown command {name!r}; it is ulrl purify --check")
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{nearest(name, COMMANDS)}; ulrl --help says what each does")
    module = importlib.import_module(f"ulrl.cli.{COMMANDS[name]}")
    getattr(module, name if name != "list" else "list_")(rest)
