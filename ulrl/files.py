"""Where things lie, and writing them whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import logging
import os
import platform
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

from ulrl.errors import UserError
from ulrl.untrusted.opening import kind

LOCK_PATIENCE = 1800.0  # seconds
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

log = logging.getLogger(__name__)

PACKAGE_ROOT = Path(__file__).resolve().parent.parent


def home() -> Path:
    """The folder that holds `record/` and `data/`.

    `$ULRL_HOME` when set; else the checkout that this package lies in, so that a script works from
    any directory; else, for an installed package, the current directory.
    """
    if chosen := os.environ.get("ULRL_HOME"):
        if os.path.exists(chosen) and not os.path.isdir(chosen):
            raise UserError(f"ULRL_HOME is {chosen}, which is no folder; name one that holds record/ and data/")
        return Path(chosen).resolve()
    return checkout() or Path.cwd()


def checkout() -> Path | None:
    """The checkout that this package lies in; None where it is installed.

    In a checkout ulrl/config is a link to config/. That other packages have a `config` beside this one says nothing.
    """
    ours, beside = PACKAGE_ROOT / "ulrl" / "config", PACKAGE_ROOT / "config"
    return PACKAGE_ROOT if beside.is_dir() and ours.is_dir() and ours.samefile(beside) else None


def find_input(path: str | os.PathLike[str], *, shipped: bool = True) -> Path:
    """A file or folder named by the user: relative to the current directory, else to `home()`, else, unless what is
    looked for is not `shipped`, to the checkout, which has `config/`.

    Raises:
        UserError: it begins with `~` and a user whom this machine does not know.
    """
    try:
        given = Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path} is in the home folder of a user who is not known here; write the path out") from None
    last = (checkout() if shipped else None) or home()
    places = [given] if given.is_absolute() else [given, home() / given, last / given]
    return next((place for place in places if os.path.exists(place)), places[min(1, len(places) - 1)])


def check_folder_name(name: str, flag: str) -> None:
    """Whether a new folder may have that name, which `flag` gave.

    Raises:
        UserError: it leads elsewhere, or would be hidden.
    """
    if name != Path(name).name or name.startswith("."):
        raise UserError(f"{flag} {name!r} is not a plain folder name")


def check_output(path: Path, flag: str = "", suffixes: Sequence[str] = ()) -> None:
    """Whether a file can be written there, and its name ends in one of `suffixes`, where there are any.

    Raises:
        UserError: it cannot; `flag` is what named it.
    """
    named = f"{flag} {path}".strip()
    if suffixes and path.suffix not in suffixes:
        raise UserError(f"{named}: name a file that ends in {', '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"{named} is a folder; name a file in it")
    if path.exists() and not path.is_file():  # to replace /dev/null would harm the whole machine
        raise UserError(f"{named} is {kind(path.stat().st_mode)}; name a file")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{named}: there is no folder {path.parent}; make it first")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"{named}: the folder {path.parent} cannot be written to; name a file in another one")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, an empty file; it becomes `path` when the block ends well.

    Raises:
        UserError: as `check_output`.
    """
    check_output(path)
    # A new name, and so no link that leads elsewhere.
    partial = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.partial")
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        _name(error, path)
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(folder: Path, *, overwrite: bool, keep: str = "") -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; it becomes `folder` when the block ends well.

    It is empty but for `keep`, the name of a sub-folder with work that an earlier run of that name left: one
    that did not end well, or else the folder to be overwritten.

    Raises:
        UserError: `folder` exists and `overwrite` is false, or another run is writing it.
    """
    partial = _partial(folder)
    replaced = folder.with_name(f".{folder.name}.replaced")
    if folder.exists() and not overwrite:
        raise _exists(folder)
    new_parent = not folder.parent.exists()
    lock = _claim(partial, folder)
    try:
        _take_back(replaced, folder)  # from a run that was killed between the two renames below
        if folder.exists() and not overwrite:  # by now
            raise _exists(folder)
        _empty(partial, keep)
        if keep and (folder / keep).is_dir() and not (folder / keep).is_symlink() and not (partial / keep).exists():
            shutil.copytree(folder / keep, partial / keep, ignore=_odd)
        yield partial
        if folder.exists():
            _remove(replaced)
            os.replace(folder, replaced)
        os.replace(partial, folder)
    except BaseException as error:
        _name(error, folder)
        _take_back(replaced, folder)
        if _is_at(partial, lock):
            _empty(partial, keep)
            with contextlib.suppress(OSError):  # not empty
                partial.rmdir()
                if new_parent:
                    folder.parent.rmdir()
        raise
    else:
        _remove(replaced)
    finally:
        os.close(lock)  # last: until then, no other run touches what is under these names


def clear_away(folder: Path, keep: str = "") -> None:
    """Remove what a killed run of that name has half written, but for `keep`; nothing where another run is at it."""
    if _partial(folder).exists():
        with contextlib.suppress(UserError, InterruptedError), whole_folder(folder, overwrite=True, keep=keep):
            raise InterruptedError


def _name(error: BaseException, written: Path) -> None:
    """Say what was written when the disk was full: the system names no file then."""
    if isinstance(error, OSError) and error.errno in FULL and not error.filename:
        error.filename = str(written)


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _exists(folder: Path) -> UserError:
    return UserError(f"{folder} exists; pass --overwrite (from Python overwrite=True) to replace it, or move it away")


def open_lock(path: Path) -> TextIO:
    """The lock file, made where it is not there; its text says who holds it: "<process> on <host>".

    Raises:
        OSError: it cannot be opened; it is a link, which is not followed, a pipe, which is not waited for, or the like.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise OSError(errno.EINVAL, f"no lock but {kind(path.lstat().st_mode)}", str(path))
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return open(os.open(path, flags, 0o666), "r+", encoding="utf-8", errors="replace")


def is_stopped(holder: str) -> bool:
    """Whether "<process> on <host>" is a process of this machine that someone has stopped."""
    pid, _, host = holder.strip().partition(" on ")
    if host != platform.node() or not pid.isdecimal():
        return False
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] in "Tt"
    return False


@contextlib.contextmanager
def waited_for(lock: Path, what: str) -> Iterator[bool]:
    """Hold the lock file for the length of the block. Where another process has it, say which, and wait for it.

    Yields whether it is ours: not when its holder is stopped, or has not let go of it for half an hour.

    Raises:
        OSError: as `open_lock`.
    """
    with open_lock(lock) as file:
        start, said = time.monotonic(), False
        while not _taken(file.fileno()):
            waited, holder = time.monotonic() - start, " ".join(file.read(200).split())
            file.seek(0)
            if not said and waited > 1:
                log.info("waiting for process %s, which is %s (%s)", holder, what, lock)
                said = True
            if waited > LOCK_PATIENCE or (waited > 5 and is_stopped(holder)):
                log.warning("process %s does not let go of %s, and is not waited for", holder, lock)
                yield False
                return
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}\n")
        file.flush()
        yield True


def _taken(descriptor: int) -> bool:
    try:
        _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _claim(partial: Path, folder: Path) -> int:
    """Lock `partial`, made where it is not there, so that a second run of the same name cannot write into it."""
    for left in reversed(range(100)):
        with contextlib.suppress(FileNotFoundError):
            # One look: between two, the run that had it may end and another may make the folder.
            if not stat.S_ISDIR(os.lstat(partial).st_mode):
                partial.unlink()
        try:
            partial.mkdir(parents=True, exist_ok=True)
            lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except (FileNotFoundError, FileExistsError):  # the run that had it has just ended
            if left:
                continue
            raise
        free = _taken(lock)  # so it is where its run was killed
        if free and _is_at(partial, lock):
            return lock
        os.close(lock)
        if not free:
            break
    raise UserError(f"another run is writing {folder}; wait for it, or choose another name")


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether what is open there still has this name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    return False


def _take_back(replaced: Path, folder: Path) -> None:
    if replaced.is_dir() and not replaced.is_symlink() and not folder.exists():  # a link is a stranger's
        os.replace(replaced, folder)


def _lock(folder: int, how: int) -> None:
    """Lock an open folder, where the file system can: NFS locks only what is open for writing, so no folder."""
    try:
        fcntl.flock(folder, how)
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOTSUP):
            raise


def _empty(partial: Path, keep: str) -> None:
    """Remove all but the sub-folder `keep`."""
    for entry in partial.iterdir():
        if entry.name != keep or entry.is_symlink() or not entry.is_dir():
            _remove(entry)


def _odd(folder: str, names: list[str]) -> list[str]:
    """Those of the names that are links, by which a stranger's folder could have any file copied, or pipes and such."""
    modes = {name: os.lstat(os.path.join(folder, name)).st_mode for name in names}
    return [name for name, mode in modes.items() if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))]


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def save_torch(content: Any, path: Path) -> None:
    """`torch.save`, by way of memory: a full disk is then an OSError, where torch's writer has its own."""
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getbuffer())


def in_threads(work: Callable[[int], None], n: int) -> None:
    """`work(0)` to `work(n - 1)`; PIL lets threads run side by side while it codes."""
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(work, range(n)):
            pass
