"""Images that lie in a file each: decoded once, and from then on mapped into memory from one file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ulrl.data.cache import cached_array
from ulrl.data.imageset import DatasetSpec, ImageSet
from ulrl.errors import UserError
from ulrl.untrusted.images import opened_image

Sample = tuple[str, int]  # path of the image, label
Pixels = np.ndarray[Any, Any]  # uint8 [N, C, H, W]

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
BLOCK = 128 << 20  # bytes of images decoded before they are written, so that a large set needs little memory
SIDE = 1024  # pixels of an image that a model is given, at most


def read_images(samples: Sequence[Sample], root: Path, spec: DatasetSpec) -> ImageSet:
    """The images in `samples`' order, resized to `spec`, on the CPU.

    The first call keeps them in the user's cache folder. Later ones map that file (copy on write), as long as the
    images' number, names, sizes and times of change are the same.

    Raises:
        UserError: an image is missing or cannot be read.
    """
    files = [file for file, _ in samples]
    shape = (len(files), spec.channels, spec.height, spec.width)
    place = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:16]
    images = cached_array(
        f"{spec.name}_{place}_{spec.height}x{spec.width}", _fingerprint(files, root, shape), shape,
        lambda: _blocks(files, spec), f"converting {len(files)} images of {root}",
    )  # fmt: skip
    labels = torch.tensor([label for _, label in samples], dtype=torch.int64)
    return ImageSet(torch.from_numpy(images), labels, spec)


def common_size(files: Sequence[str]) -> tuple[int, int]:
    """Height and width that all these images have.

    Raises:
        UserError: they differ, are larger than any model's input, or one cannot be read.
    """
    sizes: dict[tuple[int, int], str] = {}
    for file in files:
        with opened_image(file) as image:
            sizes.setdefault((image.height, image.width), file)
    if len(sizes) > 1:
        (one, first), (other, second), *_ = sizes.items()
        raise UserError(
            f"{first} is {one[0]}x{one[1]}, {second} is {other[0]}x{other[1]}: give the model's input as --img_size"
        )
    ((height, width),) = sizes
    if max(height, width) > SIDE:
        raise UserError(f"{files[0]} is {height}x{width}: give the model's input, of at most {SIDE}, as --img_size")
    return height, width


def _fingerprint(files: Sequence[str], root: Path, shape: tuple[int, ...]) -> str:
    """Changes with the shape, and with any file's name (below `root`), size or time of change."""
    digest = hashlib.sha256(repr(shape).encode())
    skip = len(str(root))
    try:
        for file in files:
            about = os.stat(file)
            digest.update(f"{file[skip:]}\0{about.st_size}\0{about.st_mtime_ns}\n".encode(errors="surrogateescape"))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); lay the data out again") from None
    return digest.hexdigest()[:16]


def _blocks(files: Sequence[str], spec: DatasetSpec) -> Iterator[Pixels]:
    """uint8 [n, C, H, W] of some files after others; Pillow lets threads run side by side while it decodes."""
    step = max(1, BLOCK // (spec.channels * spec.height * spec.width))
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), step):
            yield np.stack(list(pool.map(lambda file: _decode(file, spec), files[start : start + step])))


def _decode(file: str, spec: DatasetSpec) -> Pixels:
    """uint8 [C, H, W]: resized as BackdoorBench does it, bilinear with anti-aliasing, sides apart."""
    with opened_image(file) as image:
        if image.mode[0] in "IF":  # Pillow would cut them at 255
            raise ValueError("more than 8 bits per channel, convert it to 8")
        plain = image.convert("L" if spec.channels == 1 else "RGB")
        pixels = np.asarray(plain.resize((spec.width, spec.height), Image.Resampling.BILINEAR))
    return np.ascontiguousarray(pixels.reshape(spec.height, spec.width, spec.channels).transpose(2, 0, 1))
