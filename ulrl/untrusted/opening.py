"""The door to a stranger's file: a regular one, not larger than it may be, and inside where it has to be."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ulrl.errors import UserError

MIB = 1 << 20
TEXT = 8 * MIB  # bytes of a text that is read


def real_path(file: Path, inside: Path) -> Path:
    """Where `file` really lies.

    Raises:
        UserError: that is not `inside`, itself a real path.
    """
    try:
        real = Path(os.path.realpath(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be opened ({error}); choose another name") from None
    if not real.is_relative_to(inside):
        raise UserError(f"{file} leads out of the record, to {real}, and was not opened; put the file itself there")
    return real


@contextlib.contextmanager
def opened(file: str | os.PathLike[str], most: int, inside: Path | None = None) -> Iterator[BinaryIO]:
    """The open file, of at most `most` bytes; with `inside`, only if it lies there, after following links.

    Pipes, sockets and devices are refused and not waited for.

    Raises:
        UserError: it is no such file, or cannot be read.
    """
    path, links = file, 0
    if inside is not None:
        path, links = real_path(Path(file), inside), os.O_NOFOLLOW  # nor one that was planted since
    try:
        # O_NONBLOCK: opening a pipe without a writer would wait for one.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | links)
    except (OSError, ValueError) as error:  # a NUL in the name is a ValueError
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{file} cannot be read ({reason}); see that it is there and may be read") from None
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode):
        os.close(descriptor)
        raise UserError(f"{file} is {kind(about.st_mode)}, not a file, and was not read; put a file there")
    with open(descriptor, "rb") as content:
        if about.st_size > most:
            raise UserError(
                f"{file} has {about.st_size} bytes, more than the {most} that are read of such a file; is it "
                "another one?"
            )
        yield content


def read_bytes(file: str | os.PathLike[str], most: int, inside: Path | None = None) -> bytes:
    """What a file holds, as `opened`.

    Raises:
        UserError: as `opened`.
    """
    with opened(file, most, inside) as content:
        try:
            read = content.read(most + 1)  # it may have grown
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror})") from None
    if len(read) > most:
        raise UserError(f"{file} grows while it is read; wait until it is whole")
    return read


def read_text(file: str | os.PathLike[str], most: int = TEXT, inside: Path | None = None) -> str:
    """A text file in UTF-8, as `opened`.

    Raises:
        UserError: as `opened`, or it is no text.
    """
    try:
        return read_bytes(file, most, inside).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{file} is no text in UTF-8; is it another file?") from None


def kind(mode: int) -> str:
    """In words what is no regular file, by its `st_mode`."""
    for test, name in (
        (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISLNK, "a link"),
    ):  # fmt: skip
        if test(mode):
            return name
    return "a device"
