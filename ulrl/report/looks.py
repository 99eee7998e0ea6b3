"""One look per method, a colour and a shape, the same in every picture and on the page."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ulrl.defenses.base import DEFENSES
from ulrl.report.frame import NO_DEFENSE

# Okabe and Ito's colours, told apart by colour-blind readers too; black and yellow vanish on one of two backgrounds.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#8a8f98"
PALETTE = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SHAPES = {  # Vega's name: Matplotlib's
    "circle": "o", "square": "s", "triangle-up": "^", "diamond": "D", "triangle-down": "v", "triangle-left": "<",
    "triangle-right": ">",
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """colour: as #rrggbb; shape: Vega's name; marker: Matplotlib's."""

    colour: str
    shape: str
    marker: str


def looks_of(methods: Iterable[str]) -> dict[str, Look]:
    """The look of each of these methods, and of no defense. 42 differ: six colours, seven shapes, in turn.

    A method of this toolkit has the same one whatever stands beside it; those of others follow by name.
    """
    known = list(DEFENSES)
    places = [*known, *sorted({*methods} - {*known, NO_DEFENSE})]
    shapes = list(SHAPES.items())
    looks = {name: Look(PALETTE[i % len(PALETTE)], *shapes[i % len(shapes)]) for i, name in enumerate(places)}
    return {**looks, NO_DEFENSE: Look(GREY, "cross", "P")}
