"""A job of a sweep: the folder it makes, the state that its files tell, and the claim on it.

All state is in files, so a sweep that was killed knows where it was, and two of them on the same ULRL_HOME
know of each other: `result.json` in a job's folder means done, `failed.log` there means failed, a locked
`record/.sweep/<job>.lock` means that it is being done.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import logging
import os
import platform
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, ClassVar

import torch

from ulrl.attacks.base import Attack
from ulrl.configure import AttackRun, DefenseRun
from ulrl.defenses.base import Defense
from ulrl.errors import LineFormatter, UserError, one_line
from ulrl.files import home, open_lock
from ulrl.record import load_record
from ulrl.report.pictures import draw
from ulrl.runs.attacking import LEARNED, run_attack
from ulrl.runs.defending import run_defense
from ulrl.training import TrainOptions
from ulrl.untrusted.opening import opened
from ulrl.untrusted.texts import read_json

RESULT, FAILED_LOG = "result.json", "failed.log"


class State(enum.Enum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    SKIPPED = "skipped"  # what it needs has failed


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run. Two jobs of the same name are the same job, in whatever sweep.

    name: its folder below record/. needs: name of the job that must be done before, if any.
    alike: jobs that take about as long have the same; the first word is the kind.
    device: auto, cpu or cuda. small: it may share a GPU with others.
    """

    name: str
    needs: str | None
    alike: tuple[str, ...]
    device: str = "auto"
    small: bool = False

    keep: ClassVar[str] = ""  # sub-folder of a half-written one that the next try goes on from

    def work(self) -> None:
        """Make the folder, `result.json` last."""
        raise NotImplementedError

    @property
    def folder(self) -> Path:
        folder = home() / "record" / self.name
        for place in (folder.parent, folder) if self.needs else ():
            if place.is_symlink():  # a downloaded record could lead the writing anywhere
                raise UserError(f"{place} is a link, and results are written into the record only; remove it")
        return folder

    def done(self) -> bool:
        return (self.folder / RESULT).exists()

    def failed(self) -> bool:
        return (self.folder / FAILED_LOG).exists()

    @property
    def lock(self) -> Path:
        return sweep_folder() / f"{self.name.replace('/', '+')}.lock"

    @property
    def log(self) -> Path:
        """What it says while it runs. A run that ends well has its own log in its folder."""
        return self.lock.with_suffix(".log")


@dataclass(frozen=True, kw_only=True)
class AttackJob(Job):
    attack: Attack
    run: AttackRun
    training: TrainOptions
    keep = LEARNED

    def work(self) -> None:
        run = replace(self.run, save_folder_name=self.folder.name)
        run_attack(self.attack, run, self.training, bar=False, draw=draw)


@dataclass(frozen=True, kw_only=True)
class DefenseJob(Job):
    defense: Defense
    run: DefenseRun

    def work(self) -> None:
        assert self.needs is not None
        run = replace(self.run, result_file=self.needs, save_folder_name=self.folder.name, overwrite=True)
        run_defense(self.defense, load_record(self.needs), run, bar=False, draw=draw)


def sweep_folder() -> Path:
    """What sweeps tell each other: a lock for each job, and what running ones say. It is made when one is claimed, so
    that looking writes nothing."""
    folder = home() / "record" / ".sweep"
    if folder.is_symlink():  # it could have come with a record, and lead the writing anywhere
        raise UserError(f"{folder} is a link, and sweeps write below record/ only; remove it")
    return folder


def state(job: Job) -> State:
    """The state that the files tell; SKIPPED is not among them."""
    if job.done():
        return State.DONE
    if os.path.lexists(job.lock):
        with open_lock(job.lock) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return State.RUNNING
    return State.FAILED if job.failed() else State.QUEUED


@contextlib.contextmanager
def claim(job: Job) -> Iterator[bool]:
    """Whether the job is ours for the length of the block. The claim ends with the process that has it, even
    if that is killed.

    It is a lock of the file system. Between hosts it holds where that has such locks (NFS 4, Lustre mounted with
    `flock`); on NFS, the claim of a host that died ends when the server has missed it for a while.

    Raises:
        UserError: the file system has no locks.
    """
    job.lock.parent.mkdir(parents=True, exist_ok=True)
    with open_lock(job.lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise UserError(
                f"{job.lock} cannot be locked ({error.strerror}), so two sweeps could do a job twice; set ULRL_HOME "
                "to a file system with locks"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}\n")  # who, and by its time, since when
        file.flush()
        yield True


def holder(job: Job) -> str:
    """Who has the job, or had it last: "<process> on <host>"."""
    with open_lock(job.lock) as file:
        return one_line(file.read(200))


def attempt(job: Job) -> None:
    """Do a job in this process, unless it is done, has failed or is in another's hands.

    A failure does not raise; it leaves `failed.log`.
    """
    with claim(job) as ours:
        if not ours or job.done() or job.failed():
            return
        torch.backends.cudnn.deterministic = True
        with open_log(job, "w") as log, _said_to(log):
            try:
                job.work()
                if not job.done():
                    print(f"ulrl: it ended, but left no {job.folder / RESULT}")
            except UserError as error:
                print(f"ulrl: {error}")
            except Exception:
                traceback.print_exc()
        if job.done():
            job.log.unlink()
        else:
            _keep_log(job)


def give_up(job: Job, reason: str) -> None:
    """Mark a job as failed whose process ended without a word, unless another has taken it."""
    with claim(job) as ours:
        if ours and not job.done():
            with open_log(job, "a") as file:
                file.write(f"ulrl: {reason}\n")
            _keep_log(job)


def retry(job: Job) -> None:
    """Forget that a job failed."""
    with claim(job) as ours:
        if ours and job.failed() and not job.done():
            (job.folder / FAILED_LOG).unlink()
            with contextlib.suppress(OSError):  # not empty
                job.folder.rmdir()


def reason(job: Job) -> str:
    """Why a job failed: the last line of its log."""
    try:
        with opened(job.folder / FAILED_LOG, 1 << 40) as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - 65536))
            lines = log.read(65536).decode(errors="replace").split("\n")
    except UserError as error:  # as after another sweep's --retry_failed
        return str(error) if job.failed() else "its log is gone, as another sweep does it again"
    return one_line(next((line for line in reversed(lines) if line.strip()), "it said nothing"))


def seconds(job: Job) -> float | None:
    """How long a job took that is done, where its result tells."""
    with contextlib.suppress(UserError, ValueError, KeyError, TypeError):
        return float(read_json(job.folder / RESULT)["seconds"]["total"])
    return None


def open_log(job: Job, mode: str) -> IO[str]:
    """What a job says, in a new file ("w") or at its end ("a"); where a link lies, that is removed, not followed."""
    if mode == "w" or job.log.is_symlink():
        job.log.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return os.fdopen(os.open(job.log, flags, 0o666), mode, buffering=1, encoding="utf-8", errors="backslashreplace")


def _keep_log(job: Job) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    os.replace(job.log, job.folder / FAILED_LOG)


@contextlib.contextmanager
def _said_to(file: IO[str]) -> Iterator[None]:
    """All that this process says goes into a file: what Python prints and logs, and what native code does."""
    logger = logging.getLogger("ulrl")
    with contextlib.ExitStack() as undo:
        for descriptor in (1, 2):
            kept = os.dup(descriptor)
            undo.callback(os.close, kept)
            undo.callback(os.dup2, kept, descriptor)
            os.dup2(file.fileno(), descriptor)
        undo.enter_context(contextlib.redirect_stdout(file))
        undo.enter_context(contextlib.redirect_stderr(file))
        handler = logging.StreamHandler(file)
        handler.setFormatter(LineFormatter("%(asctime)s %(message)s"))
        undo.callback(logger.removeHandler, handler)
        undo.callback(logger.setLevel, logger.level)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} on {platform.node()}, process {os.getpid()}")
        yield
