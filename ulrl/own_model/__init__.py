"""The door for a model that is not of ours: any network, in memory, and some clean samples for it."""

from ulrl.own_model.evaluating import evaluate
from ulrl.own_model.given import Note
from ulrl.own_model.purifying import Purified, purify
from ulrl.own_model.querying import Queried, suspect_by_queries
from ulrl.own_model.suspecting import BACKDOORED, NO_EVIDENCE, NO_VERDICT, UNCERTAIN, Suspicion, suspect

__all__ = [
    "BACKDOORED",
    "NO_EVIDENCE",
    "NO_VERDICT",
    "UNCERTAIN",
    "Note",
    "Purified",
    "Queried",
    "Suspicion",
    "evaluate",
    "purify",
    "suspect",
    "suspect_by_queries",
]
