"""`ulrl list`: what there is."""

from __future__ import annotations

from collections.abc import Sequence

from ulrl.cli.terminal import print_table
from ulrl.declared import about, declared, keys, methods
from ulrl.errors import UserError
from ulrl.shipped import shipped_files


def list_(argv: Sequence[str]) -> None:
    if list(argv) == ["configs"]:
        print("\n".join(shipped_files()))
        return
    if argv and argv[0] in ("-h", "--help"):
        print("usage: ulrl list [configs]. What there is, or the names of the options files that come with ulrl.")
        return
    if argv:
        raise UserError(f"ulrl list takes nothing or `configs`, and {argv[0]!r} is neither")
    from rich.table import Table

    table = Table("kind", "name", "what it is")
    for kind, package in (("attack", "attacks"), ("defense", "defenses"), ("sample detector", "detectors")):
        for name, (module, _) in methods(f"ulrl.{package}").items():
            table.add_row(kind, name, about(module).partition("\n")[0])
    table.add_row("dataset", ", ".join(declared("ulrl.data.datasets", "DATASETS")), "")
    table.add_row("model", ", ".join(keys("ulrl.models.architectures", "ARCHITECTURES")), "")
    print_table(table)
