"""Manners of a command: its flags, its table, its log, and how it leaves."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TypeVar

from ulrl.errors import LineFormatter, UserError, one_line
from ulrl.options import Schema

if TYPE_CHECKING:
    from rich.console import RenderableType

Options = TypeVar("Options")


def plain_options(cls: type[Options], argv: Sequence[str], prog: str, description: str) -> Options:
    """The options of a command that takes flags only."""
    schema = Schema(cls)
    return schema.merge(("flag", schema.flags(argv, prog, description)))[0].build(cls)


def first_name(argv: Sequence[str], command: str, what: str) -> tuple[str, Sequence[str]]:
    """The name that comes before a command's options, and those. --help in its place says so, and ends the program.

    Raises:
        UserError: there is none; `what` says what it names.
    """
    if argv and argv[0] in ("-h", "--help"):
        print(f"usage: ulrl {command} NAME [options]. NAME is {what}; after it, --help lists the options.")
        sys.exit(0)
    if not argv or argv[0].startswith("-"):
        raise UserError(f"ulrl {command}: name {what} first, before the options")
    return argv[0], argv[1:]


def same_bits() -> None:
    """Ask torch, which is imported by this at the latest, for the same result every time.

    Raises:
        UserError: there is none, as in a shell where the environment was not activated.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise UserError(
            f"{sys.executable} has no {error.name}; `source .venv/bin/activate` first, and before that, once, "
            "`bash sh/install.sh`"
        ) from None

    torch.backends.cudnn.deterministic = True


def print_table(table: RenderableType) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else 160  # a file breaks no lines
    Console(file=sys.stdout, width=width).print(table)


def print_path(path: str | os.PathLike[str]) -> None:
    """Where something was written, or another text of a line."""
    print(one_line(str(path)))


def exit_with(command: Callable[[], None]) -> NoReturn:
    """Run a command and leave the process: 0, or one line on stderr and 2 (130 when interrupted)."""
    _open_all()
    try:
        with _console_log(), _stopped_by_signals():
            command()
            sys.stdout.flush()
    except UserError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted; what was there before is unchanged", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno is None:
            raise
        where = f" {error.filename}" if error.filename else ""
        closed = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        mend = (
            "make it writable, or copy the record to a place that is" if closed else "make room or choose another place"
        )
        _fail(f"cannot write{where}: {error.strerror}; {mend}, then run again", 2)
    sys.exit(0)


def _open_all() -> None:
    """Of the three standard streams, a closed one (`>&-`) leads nowhere: else the next file opened has its number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(2, "w")


def _fail(message: str, code: int) -> NoReturn:
    print(f"ulrl: {one_line(message)}", file=sys.stderr)
    sys.exit(code)


@contextlib.contextmanager
def _console_log() -> Iterator[None]:
    """Show the library's log on stderr, one plain line per entry."""
    logger = logging.getLogger("ulrl")
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(message)s"))
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """What a job scheduler or `kill` sends ends a run as cleanly as Ctrl-C.

    Either is remembered: torch swallows what is raised while it imports numpy, and fails of something else then.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = threading.Event()

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        asked.set()
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as of a command in a shell's background
            signal.signal(number, stop)
    try:
        yield
    except Exception:
        if asked.is_set():
            raise KeyboardInterrupt from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
