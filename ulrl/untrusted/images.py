"""Pictures of a stranger's: whole in every byte, of no more pixels and bytes than they may have."""

from __future__ import annotations

import contextlib
import io
import os
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ulrl.errors import UserError
from ulrl.untrusted.opening import MIB, read_bytes

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")  # Pillow reads others too, by way of other programs
PIXELS = 100_000_000
FILE = 128 * MIB
SMALL = 8_000_000  # pixels; larger ones are decoded one at a time
_one_large = threading.Lock()


def read_png(file: Path, size: tuple[int, int], inside: Path, *, gray: bool) -> np.ndarray[Any, Any]:
    """The pixels of a PNG of that height and width, uint8 [H, W] or [H, W, 3]; nothing is decoded of another size.

    Raises:
        UserError: it is not there, not `inside`, damaged in any byte, or of another size.
    """
    height, width = size
    content = read_bytes(file, png_bytes(height, width), inside)
    try:
        check_png(content)
        with Image.open(io.BytesIO(content), formats=["PNG"]) as png:
            if png.size == (width, height):
                return np.array(png.convert("L" if gray else "RGB"))
            found = f"{png.height} x {png.width}"
    except Exception as error:  # whatever PIL makes of a stranger's bytes
        raise UserError(f"{file} is not a readable PNG ({error}); unpack the record again") from None
    raise UserError(f"{file} is {found} pixels, not {height} x {width}; unpack the record again")


def png_bytes(height: int, width: int) -> int:
    """That a PNG of that size may have, whatever lies beside its pixels."""
    return 65536 + 10 * height * width


@contextlib.contextmanager
def opened_image(file: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """The image, not yet decoded; a UserError that names it, whatever goes wrong in the block."""
    content = read_bytes(file, FILE)
    try:
        if content[:8] == PNG:
            check_png(content)
        with contextlib.ExitStack() as stack:
            image = stack.enter_context(Image.open(io.BytesIO(content), formats=FORMATS))
            if image.width * image.height > PIXELS:
                raise ValueError(f"more than {PIXELS // 1_000_000} million pixels")
            if image.width * image.height > SMALL:
                stack.enter_context(_one_large)
            yield image
    except UserError:
        raise
    except UnidentifiedImageError:  # whose text has an address in memory
        known = ", ".join(FORMATS)
        raise UserError(f"{file} is not a readable image (none of {known}); replace or remove it") from None
    except Exception as error:  # whatever Pillow makes of a damaged file
        raise UserError(f"{file} is not a readable image ({error}); replace or remove it") from None


PNG = b"\x89PNG\r\n\x1a\n"


def check_png(content: bytes) -> None:
    """Every chunk whole, with the checksum that it says: Pillow stops looking once it has all pixels.

    Raises:
        ValueError: it is not so.
    """
    if content[:8] != PNG:
        raise ValueError("it does not begin as a PNG does")
    at, name = 8, b""
    while name != b"IEND":
        length = int.from_bytes(content[at : at + 4], "big")
        name, end = content[at + 4 : at + 8], at + 12 + length
        if end > len(content):
            raise ValueError("its end is missing")
        if zlib.crc32(memoryview(content)[at + 4 : end - 4]) != int.from_bytes(content[end - 4 : end], "big"):
            raise ValueError("a checksum is wrong")
        at = end
