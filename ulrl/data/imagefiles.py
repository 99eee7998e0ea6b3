"""Images that lie in a file each: decoded once, and from then on mapped into memory from one file."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ulrl.data.imageset import DatasetSpec, ImageSet
from ulrl.errors import UserError
from ulrl.files import whole_file

log = logging.getLogger(__name__)

Sample = tuple[str, int]  # path of the image, label
Pixels = np.ndarray[Any, Any]  # uint8 [N, C, H, W]

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")  # Pillow reads others too, by way of other programs
CACHE = ".ulrl_cache"
BLOCK = 1024  # images decoded before they are written, so that a large set needs little memory


def read_images(samples: Sequence[Sample], root: Path, spec: DatasetSpec) -> ImageSet:
    """The images in `samples`' order, resized to `spec`, on the CPU.

    The first call writes them to `.ulrl_cache/<height>x<width>_<fingerprint>.npy` in `root`, the folder of
    the data. Later ones map that file (copy on write), as long as the images' number, names, sizes and times
    of change are the same. Where it cannot be written, that is said and the images are decoded each time.

    Raises:
        UserError: an image is missing or cannot be read.
    """
    files = [file for file, _ in samples]
    shape = (len(files), spec.channels, spec.height, spec.width)
    cache = root / CACHE / f"{spec.height}x{spec.width}_{_fingerprint(files, root, shape)}.npy"
    images = _map(cache, shape)
    if images is None:
        try:
            images = _convert(files, spec, cache, shape)
        except OSError as error:
            log.warning(
                "no cache in %s (%s): the images of %s are decoded at every start",
                cache.parent, error.strerror, spec.name,
            )  # fmt: skip
            images = np.empty(shape, np.uint8)
            for start, block in _blocks(files, spec):
                images[start : start + len(block)] = block
    labels = torch.tensor([label for _, label in samples], dtype=torch.int64)
    return ImageSet(torch.from_numpy(images), labels, spec)


def common_size(files: Sequence[str]) -> tuple[int, int]:
    """Height and width that all these images have.

    Raises:
        UserError: they differ, or one cannot be read.
    """
    sizes: dict[tuple[int, int], str] = {}
    for file in files:
        with _opened(file) as image:
            sizes.setdefault((image.height, image.width), file)
    if len(sizes) > 1:
        (one, first), (other, second), *_ = sizes.items()
        raise UserError(
            f"{first} is {one[0]}x{one[1]}, {second} is {other[0]}x{other[1]}: give the model's input as --img_size"
        )
    return next(iter(sizes))


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


def _map(cache: Path, shape: tuple[int, ...]) -> Pixels | None:
    """The file's array; None where there is no whole one."""
    try:
        images = np.lib.format.open_memmap(cache, mode="c")  # copy on write
    except (OSError, ValueError):
        return None
    return images if images.shape == shape and images.dtype == np.uint8 else None


def _convert(files: Sequence[str], spec: DatasetSpec, cache: Path, shape: tuple[int, ...]) -> Pixels:
    """Write the cache and map it; an OSError where it cannot be written."""
    cache.parent.mkdir(exist_ok=True)
    with _alone(cache.parent / "lock"):
        images = _map(cache, shape)  # by another process, while this one waited
        if images is None:
            log.info("converting %d images of %s, once, to %s", len(files), spec.name, cache)
            with whole_file(cache) as partial, open(partial, "wb") as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for _, block in _blocks(files, spec):
                    file.write(block.data)
            for stale in cache.parent.glob(f"{spec.height}x{spec.width}_*.npy"):
                if stale != cache:
                    stale.unlink()
            images = np.lib.format.open_memmap(cache, mode="c")
    return images


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Runs that start together convert the data once: the others wait."""
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _blocks(files: Sequence[str], spec: DatasetSpec) -> Iterator[tuple[int, Pixels]]:
    """(position of the first, uint8 [n, C, H, W]); Pillow lets threads run side by side while it decodes."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), BLOCK):
            yield start, np.stack(list(pool.map(lambda file: _decode(file, spec), files[start : start + BLOCK])))


def _decode(file: str, spec: DatasetSpec) -> Pixels:
    """uint8 [C, H, W]: resized as BackdoorBench does it, bilinear with anti-aliasing, sides apart."""
    with _opened(file) as image:
        if image.mode[0] in "IF":  # Pillow would cut them at 255
            raise ValueError("more than 8 bits per channel, convert it to 8")
        plain = image.convert("L" if spec.channels == 1 else "RGB")
        pixels = np.asarray(plain.resize((spec.width, spec.height), Image.Resampling.BILINEAR))
    return np.ascontiguousarray(pixels.reshape(spec.height, spec.width, spec.channels).transpose(2, 0, 1))


@contextlib.contextmanager
def _opened(file: str) -> Iterator[Image.Image]:
    """The image; a UserError that names it, whatever goes wrong in the block."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            yield image
    except Exception as error:  # whatever Pillow makes of a damaged file
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is not a readable image ({reason}); replace or remove it") from None
