"""The commands that look into a stranger's file and make a record harmless."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ulrl.cli.terminal import first_name, plain_options
from ulrl.converting import ConvertOptions, inspect_file
from ulrl.converting import convert as convert_record
from ulrl.errors import UserError, one_line
from ulrl.files import find_input
from ulrl.record import find_record


def inspect(argv: Sequence[str]) -> None:
    """Exit code 2 when the file asks for what no model needs."""
    file, argv = first_name(argv, "inspect", "a file")
    if argv:
        raise UserError("ulrl inspect takes a file and no options")
    lines, safe = inspect_file(find_input(file))
    print("\n".join(lines))
    sys.exit(0 if safe else 2)


def convert(argv: Sequence[str]) -> None:
    named, argv = first_name(argv, "convert", "a record")
    options = plain_options(ConvertOptions, argv, "ulrl convert RECORD", "Write a record in another spelling.")
    print(one_line(str(convert_record(find_record(named, "the record"), options))))
