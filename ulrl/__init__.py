"""ulrl: remove backdoors from neural networks."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from ulrl.errors import UserError

if TYPE_CHECKING:
    from ulrl.metrics import Judgement
    from ulrl.own_model import Note, Purified, Queried, Suspicion, evaluate, purify, suspect, suspect_by_queries
    from ulrl.own_record import PurifiedRecord, purify_record
    from ulrl.record import Record, load_record

# Read when torch is loaded: OpenMP's threads sleep while they wait for each other. As it comes they spin, on cores that
# other processes want (bench/shared_machine.py). What the user has set stands.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
    os.environ["OMP_WAIT_POLICY"] = "passive"

__version__ = "0.1.0"
__all__ = [
    "Judgement",
    "Note",
    "Purified",
    "PurifiedRecord",
    "Queried",
    "Record",
    "Suspicion",
    "UserError",
    "evaluate",
    "list_attacks",
    "list_defenses",
    "load_record",
    "purify",
    "purify_record",
    "suspect",
    "suspect_by_queries",
]


# Imported when they are asked for: torch takes seconds, and a list or a mistake's message can do without.
_MODULES = {
    "metrics": ("Judgement",),
    "own_model": ("Note", "Purified", "Queried", "Suspicion", "evaluate", "purify", "suspect", "suspect_by_queries"),
    "own_record": ("PurifiedRecord", "purify_record"),
    "record": ("Record", "load_record"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"ulrl.{module}"), name)
    raise AttributeError(f"module 'ulrl' has no attribute {name!r}")


def list_attacks() -> list[str]:
    """The names of the attacks, as `python attack/<name>.py` takes them."""
    from ulrl.attacks.base import ATTACKS

    return list(ATTACKS)


def list_defenses() -> list[str]:
    """The names of the defenses, as `python defense/<name>.py` takes them."""
    from ulrl.defenses.base import DEFENSES

    return list(DEFENSES)
