"""Where things lie, and writing them whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ulrl.errors import UserError

PACKAGE_ROOT = Path(__file__).resolve().parent.parent


def home() -> Path:
    """The folder that holds `record/` and `data/`.

    `$ULRL_HOME` when set; else the checkout that this package lies in, so that a script works from
    any directory; else, for an installed package, the current directory.
    """
    if chosen := os.environ.get("ULRL_HOME"):
        return Path(chosen).resolve()
    return PACKAGE_ROOT if (PACKAGE_ROOT / "config").is_dir() else Path.cwd()


def find_input(path: str | os.PathLike[str]) -> Path:
    """A file or folder named by the user: relative to the current directory, else to `home()`, else to
    the checkout, which has `config/`."""
    given = Path(path).expanduser()
    places = [given] if given.is_absolute() else [given, home() / given, PACKAGE_ROOT / given]
    return next((place for place in places if os.path.exists(place)), places[min(1, len(places) - 1)])


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
    if not path.absolute().parent.is_dir():
        raise UserError(f"{named}: there is no folder {path.parent}; make it first")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; it becomes `path` when the block ends well."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
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
    partial = folder.with_name(f".{folder.name}.partial")
    replaced = folder.with_name(f".{folder.name}.replaced")
    if replaced.exists() and not folder.exists():  # killed between the two renames below
        os.replace(replaced, folder)
    if folder.exists() and not overwrite:
        raise UserError(f"{folder} exists; pass --overwrite to replace it, or choose another name")
    new_parent = not folder.parent.exists()
    lock = _claim(partial, folder, keep)
    try:
        if keep and (folder / keep).is_dir() and not (folder / keep).is_symlink() and not (partial / keep).exists():
            shutil.copytree(folder / keep, partial / keep, ignore=_links)
        yield partial
        if folder.exists():
            _remove(replaced)
            os.replace(folder, replaced)
        os.replace(partial, folder)
        _remove(replaced)
    finally:
        os.close(lock)
        _empty(partial, keep)
        if new_parent and not any(folder.parent.iterdir()):
            folder.parent.rmdir()


def _claim(partial: Path, folder: Path, keep: str) -> int:
    """Make `partial` afresh and lock it, so that a second run of the same name cannot write into it."""
    if partial.is_dir() and not partial.is_symlink():
        left = os.open(partial, os.O_RDONLY)
        try:
            _lock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free when its run was killed
        except BlockingIOError:
            raise UserError(f"another run is writing {folder}; wait for it, or choose another name") from None
        finally:
            os.close(left)
    _empty(partial, keep)
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    _lock(lock, fcntl.LOCK_EX)
    return lock


def _lock(folder: int, how: int) -> None:
    """Lock an open folder, where the file system can: NFS locks only what is open for writing, so no folder."""
    try:
        fcntl.flock(folder, how)
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOTSUP):
            raise


def _empty(partial: Path, keep: str) -> None:
    """Remove all but the sub-folder `keep`, and the folder itself when that leaves nothing."""
    if partial.is_symlink() or not keep or not (partial / keep).is_dir() or (partial / keep).is_symlink():
        _remove(partial)
        return
    for entry in partial.iterdir():
        if entry.name != keep:
            _remove(entry)


def _links(folder: str, names: list[str]) -> list[str]:
    """Those of the names that are links: a stranger's folder could have any file copied by them."""
    return [name for name in names if os.path.islink(os.path.join(folder, name))]


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def save_torch(content: Any, path: Path) -> None:
    """`torch.save`, by way of memory: a full disk is then an OSError, where torch's writer has its own."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getbuffer())


def in_threads(work: Callable[[int], None], n: int) -> None:
    """`work(0)` to `work(n - 1)`; PIL lets threads run side by side while it codes."""
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(work, range(n)):
            pass
