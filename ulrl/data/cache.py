"""Arrays that take long to make: kept in the user's cache folder, and from then on mapped into memory."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ulrl.files import waited_for, whole_file
from ulrl.untrusted.arrays import mapped

log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]


def cache_folder() -> Path:
    """`ulrl` in `$XDG_CACHE_HOME` where that is set, else in `~/.cache`: never among the user's data or records."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(chosen) if os.path.isabs(chosen) else Path.home() / ".cache") / "ulrl"


def cached_array(
    name: str, stamp: str, shape: tuple[int, ...], make: Callable[[], Iterable[Array]], what: str
) -> Array:
    """The uint8 array of `shape`, mapped (copy on write) from `<name>_<stamp>.npy` in `cache_folder()`.

    Where there is no whole one, `make` gives its parts, in order along the first axis, and they are written; other
    stamps of the name are removed. Of several processes that want the same one, one makes it. Where it cannot be
    written, that is said, and it is made in memory.

    Args:
        name: says what the array is made of; a plain file name. stamp: hexadecimal; another when that has changed.
        what: in words what `make` is doing, as in "converting 500 images of photos".

    Raises:
        UserError: from `make`.
    """
    file = cache_folder() / f"{name}_{stamp}.npy"
    if (kept := _map(file, shape)) is not None:
        return kept
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with waited_for(file.parent / f"{name}.lock", what) as ours:
            kept = _map(file, shape)  # by another process, while this one waited
            if kept is None and ours:
                log.info("%s, once, to %s", what, file)
                _write(file, shape, make())
                _remove_stale(file, name)
                kept = _map(file, shape)
    except OSError as error:
        log.warning("no cache in %s (%s): %s at every start", file.parent, error.strerror or error, what)
    if kept is not None:
        return kept
    array = np.empty(shape, np.uint8)
    start = 0
    for part in make():
        array[start : start + len(part)] = part
        start += len(part)
    return array


def _map(file: Path, shape: tuple[int, ...]) -> Array | None:
    """The file's array; None where there is no whole one. A link is not followed, a pipe not waited for."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with open(descriptor, "rb") as content, contextlib.suppress(Exception):  # whatever numpy makes of a damaged one
        array = mapped(content)
        if array.shape == shape and array.dtype == np.uint8 and array.flags.c_contiguous:
            return array
    return None


def _write(file: Path, shape: tuple[int, ...], parts: Iterable[Array]) -> None:
    with whole_file(file) as partial, open(partial, "wb") as content:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(content, header)
        for part in parts:
            content.write(np.ascontiguousarray(part).data)


def _remove_stale(file: Path, name: str) -> None:
    """Other stamps of the name, and what a killed process was writing; the caller has the lock."""
    for other in file.parent.iterdir():
        if other != file and re.fullmatch(rf"\.?{re.escape(name)}_[0-9a-f]+\.npy(\.[0-9a-f]+\.partial)?", other.name):
            other.unlink(missing_ok=True)
