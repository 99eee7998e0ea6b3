"""The commands for what came from elsewhere: look into it, and take the pickle out of it."""

from __future__ import annotations

from collections.abc import Sequence

from ulrl.cli.terminal import first_name, plain_options, print_path
from ulrl.declared import declared
from ulrl.errors import UserError
from ulrl.files import find_input
from ulrl.record_folder import record_folder


def inspect(argv: Sequence[str]) -> None:
    """Leaves with 2 where the file is not safe to open, or damaged; that verdict is the line on stderr alone."""
    named, rest = first_name(argv, "inspect", "a file, or the folder of a record")
    if rest:
        raise UserError(f"ulrl inspect takes a file and no options, and {rest[0]!r} is one too many")
    from ulrl.converting import inspect_file

    lines, safe = inspect_file(find_input(named))
    print("\n".join(lines if safe else lines[:-1]))
    if not safe:
        raise UserError(f"{named}: {lines[-1]}")


def convert(argv: Sequence[str]) -> None:
    named, rest = first_name(argv, "convert", "a record")
    cls = declared("ulrl.converting", "ConvertOptions")
    options = plain_options(cls, rest, "ulrl convert RECORD", "Write a record in another spelling.")
    folder = record_folder(named, "the record")
    from ulrl.converting import convert as convert_record
    from ulrl.record import load_record

    print_path(convert_record(load_record(folder), options))
