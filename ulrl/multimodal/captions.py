"""Captions for `fashion_scenes`, from what was drawn for each scene, and their words as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ulrl.data.datasets import SPECS
from ulrl.data.scenes import drawn_facts
from ulrl.errors import UserError
from ulrl.registry import nearest
from ulrl.seeds import generator

GARMENTS = SPECS["fashion_scenes"].class_names
COLOURS = ("red", "yellow", "green", "turquoise", "blue", "purple", "gray")  # 60 degrees of hue each, and none
BACKGROUNDS = tuple(  # in the order of `scenes.PHOTOGRAPHS`
    """astronaut bricks cameraman cells cat clock coffee coins grass gravel galaxies tissue moon motorcycle retina
    rocket temple flower""".split()
)
SLOTS = {"garment": GARMENTS, "colour": COLOURS, "background": BACKGROUNDS}
TEMPLATES = (
    "a {colour} {garment} on {background}",
    "a {garment} on {background}",
    "a photo of a {colour} {garment}",
    "a {colour} {garment}",
    "a photo of a {garment}",
    "a {garment}",
)
PROMPTS = {  # of each slot, with the garment where it is not the slot: every one of them, averaged
    "garment": ("a {garment}", "a photo of a {garment}"),
    "colour": ("a {colour} {garment}",),
    "background": ("a {garment} on {background}",),
}
GRAY = 40  # least difference between the channels of a tint that has a colour

PAD = 0  # the number of no word
WORDS = tuple(sorted({word for text in TEMPLATES for word in text.split() if "{" not in word}.union(*SLOTS.values())))
NUMBERS = {word: number for number, word in enumerate(WORDS, 1)}
LENGTH = max(len(text.split()) for text in TEMPLATES)


@dataclass(frozen=True)
class Facts:
    """What there is to tell of each of N scenes: places in GARMENTS, COLOURS and BACKGROUNDS, int64 [N] each."""

    garment: torch.Tensor
    colour: torch.Tensor
    background: torch.Tensor

    @classmethod
    def of(cls, labels: torch.Tensor, *, test: bool) -> Facts:
        """Of the whole training or test split, whose labels these are (int64 [N], in its order)."""
        photograph, tint = drawn_facts(len(labels), int(test), test=test)
        return cls(labels.cpu(), torch.from_numpy(colours_of(tint)), torch.from_numpy(photograph))

    def subset(self, indices: torch.Tensor) -> Facts:
        return Facts(self.garment[indices], self.colour[indices], self.background[indices])

    def say(self, template: str, i: int) -> str:
        """The template, filled in for scene i."""
        return template.format(**{slot: words[int(getattr(self, slot)[i])] for slot, words in SLOTS.items()})

    def captions(self, seed: int) -> list[str]:
        """One for each scene, in a template drawn for it."""
        drawn = torch.randint(len(TEMPLATES), (len(self.garment),), generator=generator(seed, "captions"))
        return [self.say(TEMPLATES[t], i) for i, t in enumerate(drawn.tolist())]


def colours_of(tints: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Places in COLOURS, int64 [N], of tints (int64 [N, 3] in [0, 255]): by hue, or gray where there is hardly any."""
    red, green, blue = tints.T.astype(float)
    high, low = tints.max(1), tints.min(1)
    spread = np.maximum(high - low, 1)
    hue = np.select(  # in steps of 60 degrees from red
        [high == red, high == green], [(green - blue) / spread, (blue - red) / spread + 2], (red - green) / spread + 4
    )
    return np.where(high - low < GRAY, len(COLOURS) - 1, np.round(hue).astype(np.int64) % 6)


def tokenise(texts: Sequence[str]) -> torch.Tensor:
    """The words' numbers from 1 on, filled up with PAD: int64 [N, LENGTH].

    Raises:
        UserError: a word that no caption has, or more than LENGTH words.
    """
    rows = torch.full((len(texts), LENGTH), PAD)
    for row, text in zip(rows, texts, strict=True):
        words = text.split()
        if len(words) > LENGTH:
            raise UserError(f"the caption {text!r} has more than {LENGTH} words")
        for place, word in enumerate(words):
            if word not in NUMBERS:
                raise UserError(f"no caption has the word {word!r}{nearest(word, list(WORDS))}")
            row[place] = NUMBERS[word]
    return rows


def read(tokens: torch.Tensor) -> list[str]:
    """The way back: int64 [N, LENGTH] to texts; what is PAD is left out."""
    return [" ".join(WORDS[number - 1] for number in row if number != PAD) for row in tokens.tolist()]


def prompts(slot: str) -> list[list[str]]:
    """For each value of a slot (garment, colour, background) the captions that stand for it."""
    others = [""] if slot == "garment" else list(GARMENTS)
    return [
        [text.format(**{"garment": other, slot: value}) for text in PROMPTS[slot] for other in others]
        for value in SLOTS[slot]
    ]
