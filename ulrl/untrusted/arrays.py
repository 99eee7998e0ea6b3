"""Arrays of numbers in a stranger's `.npy` file: mapped, so that its header alone asks for no memory."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ulrl.errors import UserError
from ulrl.untrusted.opening import MIB, opened

MOST = 64 * 1024 * MIB  # bytes of a file, of which only what is used takes memory


def read_npy(file: Path) -> np.ndarray[Any, Any]:
    """The array of numbers or truth values in a file that `np.save` wrote, mapped copy on write.

    Raises:
        UserError: as `opened`, or it holds no such array, whole.
    """
    with opened(file, MOST) as content:
        try:
            return mapped(content)
        except Exception as error:  # whatever numpy makes of a stranger's header
            raise UserError(f"{file} is no readable .npy array of numbers ({error}); save it with numpy.save") from None


def mapped(content: BinaryIO) -> np.ndarray[Any, Any]:
    """As `read_npy`, of an open file.

    Raises:
        Exception: as the damage has it.
    """
    if np.lib.format.read_magic(content) != (1, 0):
        raise ValueError("another version of the format")
    shape, in_columns, dtype = np.lib.format.read_array_header_1_0(content)
    start, size = content.tell(), math.prod(shape)
    if dtype.kind not in "biuf" or os.fstat(content.fileno()).st_size != start + size * dtype.itemsize:
        raise ValueError("not numbers, or not as many as its header says")
    if not size:
        return np.empty(shape, dtype)
    return np.memmap(content, dtype, "c", start, shape, "F" if in_columns else "C")
