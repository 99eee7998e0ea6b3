"""ulrl: remove backdoors from neural networks."""

from ulrl.attacks.base import ATTACKS
from ulrl.defenses.base import DEFENSES
from ulrl.errors import UserError
from ulrl.own_model import Note, Purified, Suspicion, evaluate, purify, suspect
from ulrl.record import Record, load_record

__version__ = "0.1.0"
__all__ = [
    "Note",
    "Purified",
    "Record",
    "Suspicion",
    "UserError",
    "evaluate",
    "list_attacks",
    "list_defenses",
    "load_record",
    "purify",
    "suspect",
]


def list_attacks() -> list[str]:
    """The names of the attacks, as `python attack/<name>.py` takes them."""
    return list(ATTACKS)


def list_defenses() -> list[str]:
    """The names of the defenses, as `python defense/<name>.py` takes them."""
    return list(DEFENSES)
