"""Garments over photographs: natural scenes in colour that need no download.

MNIST-M's recipe (Ganin and Lempitsky, arXiv 1409.7495), by opacity: each Fashion-MNIST garment, tinted, lies on
a random crop of one of the photographs that scikit-image and scikit-learn ship.

Everything is integer arithmetic on raw PCG64 words, so the bytes are the same on every machine.
"""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ulrl.data.cache import cached_array
from ulrl.errors import UserError

Array = np.ndarray[Any, Any]

SIZE = 32
GARMENT = 28
CROPS = (SIZE, 128)  # side of the square that is shrunk to SIZE
BLOCK = 1000  # garments at a time
RECIPE = 1  # to be raised with whatever changes a scene

PHOTOGRAPHS = {
    "skimage": (
        "data",
        """astronaut.png brick.png camera.png cell.png chelsea.png clock_motion.png coffee.png coins.png grass.png
        gravel.png hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png retina.jpg rocket.jpg""".split(),
    ),
    "sklearn": ("datasets/images", ["china.jpg", "flower.jpg"]),
}


@dataclass(frozen=True)
class Drawn:
    """What was drawn for each of n scenes, int64.

    photograph [n]: its place in the table. side [n], corner [n, 2], flip [n] (0 or 1): of the crop.
    tint [n, 3], offset [n]: of the garment's colour. place [n, 2]: its distance from the top and from the left.
    """

    photograph: Array
    side: Array
    corner: Array
    flip: Array
    tint: Array
    offset: Array
    place: Array


def scenes(garments: Array, seed: int, *, test: bool) -> Array:
    """uint8 [N, 28, 28] garments to uint8 [N, 32, 32, 3] scenes, which depend on `seed` and the order.

    The left three quarters of each photograph are for training, the right quarter is for testing, so no
    pixel of a background is seen in both.

    Raises:
        UserError: a photograph is missing.
    """
    sums = [_sums(photograph, test) for photograph in _photographs()]
    sizes = [(len(table) - 1, table.shape[1] - 1) for table in sums]
    made = np.empty((len(garments), SIZE, SIZE, 3), np.uint8)
    for start, drawn in _blocks(len(garments), seed, sizes):
        block = garments[start : start + BLOCK]
        made[start : start + BLOCK] = _dress(block, _backgrounds(sums, drawn), drawn)
    return made


def drawn_facts(count: int, seed: int, *, test: bool) -> tuple[Array, Array]:
    """Which photograph (int64 [count], a place in the table) and which tint (int64 [count, 3]) each of the `count`
    scenes of that seed has.

    Raises:
        UserError: a photograph is missing.
    """
    sizes = [_part(photograph, test).shape[:2] for photograph in _photographs()]
    blocks = [drawn for _, drawn in _blocks(count, seed, sizes)]
    return np.concatenate([b.photograph for b in blocks]), np.concatenate([b.tint for b in blocks])


def cached_scenes(garments: Array, seed: int, *, test: bool) -> Array:
    """All `scenes` of the garments, uint8 [N, 32, 32, 3], made once and kept in the user's cache folder."""
    photographs = 0  # other versions of the packages may ship others
    for file in _files():
        photographs = zlib.crc32(file.read_bytes(), photographs)
    stamp = f"{RECIPE:02x}{seed:04x}{len(garments):06x}{zlib.crc32(garments.data):08x}{photographs:08x}"
    return cached_array(
        f"fashion_scenes_{'test' if test else 'train'}", stamp, (len(garments), SIZE, SIZE, 3),
        lambda: [scenes(garments, seed, test=test)], f"laying {len(garments)} garments over photographs",
    )  # fmt: skip


def _photographs() -> list[Array]:
    """uint8 [H, W, 3] each, in the order of the table."""
    found = []
    for file in _files():
        with Image.open(file) as image:
            found.append(np.asarray(image.convert("RGB")))
    return found


def _files() -> Iterator[Path]:
    """Of the photographs, in the order of the table.

    Raises:
        UserError: one is missing.
    """
    for package, (folder, names) in PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)  # the place alone: nothing is imported
        for name in names:
            for place in (spec and spec.submodule_search_locations) or ():
                path = Path(place) / folder / name
                if path.is_file():
                    yield path
                    break
            else:
                raise UserError(f"the photograph {name} of {package} is missing; pip install scikit-image scikit-learn")


def _part(photograph: Array, test: bool) -> Array:
    """The photograph's part for training or for testing."""
    cut = photograph.shape[1] * 3 // 4
    return photograph[:, cut:] if test else photograph[:, :cut]


def _sums(photograph: Array, test: bool) -> Array:
    """The summed-area table of a part, int64 [h + 1, w + 1, 3]."""
    part = _part(photograph, test).astype(np.int64)
    return np.pad(part.cumsum(0).cumsum(1), ((1, 0), (1, 0), (0, 0)))


def _draw(words: np.random.PCG64, low: Any, high: Any, shape: tuple[int, ...]) -> Array:
    """Uniform integers in [low, high], which may be arrays: int64 of `shape`. The modulo's bias is below 1e-16."""
    raw = words.random_raw(int(np.prod(shape))).reshape(shape)
    span = np.asarray(high - low + 1, np.uint64)
    return (raw % span).astype(np.int64) + low


def _blocks(count: int, seed: int, sizes: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, Drawn]]:
    """(the first scene's place, what is drawn) of each block. sizes: (height, width) of each photograph's part."""
    words = np.random.PCG64(seed)  # its raw words are fixed by NumPy's compatibility policy, a Generator's draws not
    for start in range(0, count, BLOCK):
        n = min(BLOCK, count - start)
        photograph = _draw(words, 0, len(sizes) - 1, (n,))
        size = np.array(sizes)[photograph]  # [n, 2]
        side = _draw(words, CROPS[0], np.minimum(size.min(1), CROPS[1]), (n,))
        corner = _draw(words, 0, size - side[:, None], (n, 2))
        flip = _draw(words, 0, 1, (n,))
        tint = _draw(words, 77, 255, (n, 3))
        offset = _draw(words, 0, 76, (n,))
        place = _draw(words, 0, SIZE - GARMENT, (2, n)).T
        yield start, Drawn(photograph, side, corner, flip, tint, offset, place)


def _backgrounds(sums: list[Array], drawn: Drawn) -> Array:
    """uint8 [n, 32, 32, 3]: square crops, each pixel the mean of its box, flipped half the time."""
    edges = np.arange(SIZE + 1) * drawn.side[:, None] // SIZE  # [n, 33], of the boxes within the crop
    made = np.empty((len(edges), SIZE, SIZE, 3), np.uint8)
    for i, table in enumerate(sums):
        at = np.flatnonzero(drawn.photograph == i)
        rows, columns = drawn.corner[at, 0, None] + edges[at], drawn.corner[at, 1, None] + edges[at]
        boxes = np.diff(np.diff(table[rows[:, :, None], columns[:, None]], axis=1), axis=2)
        step = np.diff(edges[at])
        area = (step[:, :, None] * step[:, None])[..., None]
        made[at] = (boxes + area // 2) // area
    flip = drawn.flip == 1
    made[flip] = made[flip, :, ::-1]
    return made


def _dress(garments: Array, backgrounds: Array, drawn: Drawn) -> Array:
    """Put each garment g somewhere on its background: opacity min(4 g, 1), colour offset + g * tint."""
    count = len(garments)
    tint, offset = drawn.tint[:, None, None], drawn.offset[:, None, None, None]
    top, left = (drawn.place[:, i, None] + np.arange(GARMENT) for i in (0, 1))
    gray = np.zeros((count, SIZE, SIZE, 1), np.int64)
    gray[np.arange(count)[:, None, None], top[:, :, None], left[:, None], 0] = garments
    opacity = np.minimum(4 * gray, 255)
    colour = np.minimum(offset + gray * tint // 255, 255)
    return ((opacity * colour + (255 - opacity) * backgrounds + 127) // 255).astype(np.uint8)
