"""Where a record lies, and whether there is one: what can be told without loading it."""

from __future__ import annotations

import os
from pathlib import Path

from ulrl.errors import UserError
from ulrl.files import home

PICKLE, PLAIN = "attack_result.pt", "attack_result.safetensors"  # a record has one of them


def result_file(folder: Path) -> Path:
    """The file of the record in `folder`: BackdoorBench's, or the plain one where only that is there."""
    plain, pickle = folder / PLAIN, folder / PICKLE
    return plain if plain.is_symlink() or (os.path.exists(plain) and not os.path.exists(pickle)) else pickle


def check_folder(folder: Path) -> None:
    """
    Raises:
        UserError: there is no record.
    """
    if not os.path.isdir(folder):  # also not where the name is no possible one
        raise UserError(f"{folder} is not a folder; name the folder of a record, the one with {PICKLE}")
    if not os.path.lexists(file := result_file(folder)):
        raise UserError(f"{file} is missing: not a record, or an attack that did not finish; run it again")


def record_folder(name: str, flag: str = "--result_file") -> Path:
    """The folder of the record that `flag` names: below record/, or where the path leads.

    Raises:
        UserError: no name given, or no such record.
    """
    if not name:
        raise UserError(f"{flag} is missing: give the name of a record under record/")
    named = home() / "record" / name
    other = os.path.isdir(name) and not os.path.exists(result_file(named))
    folder = Path(os.path.abspath(name if other else named))
    check_folder(folder)
    return folder
