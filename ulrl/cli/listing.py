"""`ulrl list`: what there is."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.table import Table

from ulrl.attacks.base import ATTACKS
from ulrl.cli.terminal import print_table
from ulrl.configure import shipped_files
from ulrl.data.datasets import DATASETS
from ulrl.defenses.base import DEFENSES
from ulrl.detectors.base import DETECTORS
from ulrl.errors import UserError
from ulrl.models.architectures import ARCHITECTURES


def list_(argv: Sequence[str]) -> None:
    if list(argv) == ["configs"]:
        print("\n".join(shipped_files()))
        return
    if argv:
        raise UserError(f"ulrl list takes nothing or `configs`, and {argv[0]!r} is neither")
    table = Table("kind", "name", "what it is")
    for kind, registry in (("attack", ATTACKS), ("defense", DEFENSES), ("sample detector", DETECTORS)):
        for name, cls in registry.items():
            module = sys.modules[cls.__module__]
            table.add_row(kind, name, (module.__doc__ or "").splitlines()[0])
    table.add_row("dataset", ", ".join(DATASETS), "")
    table.add_row("model", ", ".join(ARCHITECTURES), "")
    print_table(table)
