"""A sweep from start to end: each job once, as soon as what it needs is there and an engine has room."""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ulrl.errors import UserError
from ulrl.files import is_stopped
from ulrl.options import option
from ulrl.sweep.cluster import RayEngine
from ulrl.sweep.grid import read_sweep
from ulrl.sweep.jobs import Job, State, give_up, holder, reason, retry, seconds, state
from ulrl.sweep.local import LocalEngine

POLL = 1.0  # seconds between two looks at what another sweep is doing
STOPPED = 30.0  # seconds that a stopped process is waited for

log = logging.getLogger(__name__)


class Engine(Protocol):
    """Does jobs, several at once. What a job comes to is told by its files.

    `finished` waits up to `timeout` seconds, also when nothing runs, and gives the jobs that ended, each with
    what killed it, if anything did.
    """

    @property
    def running(self) -> int: ...
    def fits(self, job: Job) -> bool: ...
    def start(self, job: Job) -> None: ...
    def finished(self, timeout: float) -> list[tuple[Job, str]]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class SweepOptions:
    """How to do the runs of a sweep file."""

    engine: str = option(
        "local", "local: processes of this machine; ray: tasks of a Ray cluster", choices=("local", "ray")
    )
    jobs: int | None = option(
        None, "local: runs at once, which share out the CPU threads; else as many as the GPUs take, or one", low=1
    )
    jobs_per_gpu: int = option(1, "defenses at once on a GPU; an attack has one to itself", low=1)
    cpus_per_job: int = option(1, "ray: CPUs of each run", low=1)
    address: str | None = option(None, "ray: the cluster's address, or auto; else one is started on this machine")
    dry_run: bool = option(False, "list the runs and do none")
    status: bool = option(False, "say what is queued, running, done and failed, and the time left; do nothing")
    retry_failed: bool = option(False, "do again what failed")


def sweep(path: str, options: SweepOptions) -> bool:
    """Do what a sweep file asks for and is not done yet; whether nothing failed.

    Raises:
        UserError: a sweep file that cannot be used, an engine that is not there.
    """
    jobs = read_sweep(path)
    if options.dry_run:
        print("\n".join(f"{state(job).value:8} record/{job.name}" for job in jobs))
        return True
    if options.status:
        print("\n".join(status(jobs)))
        return True
    if options.retry_failed:
        for job in jobs:
            if job.failed():
                retry(job)
    engine: Engine
    if options.engine == "ray":
        engine = RayEngine(options.address, options.cpus_per_job, options.jobs_per_gpu)
    else:
        engine = LocalEngine(options.jobs, options.jobs_per_gpu)
    try:
        states = run_jobs(jobs, engine)
    finally:
        engine.close()
    print("\n".join(_summary(jobs, states)))
    return all(end is State.DONE for end in states.values())


def run_jobs(jobs: Sequence[Job], engine: Engine) -> dict[str, State]:
    """Do each job that is neither done nor failed, after the one it needs; the state of each at the end.

    Each is DONE, FAILED or SKIPPED then. One that another sweep is doing is waited for.
    """
    states = {job.name: state(job) for job in jobs}
    board, clock, others = Board(jobs, states), Clock(jobs, states), Others()  # the clock sees what the board skips
    log.info("%s", _counts(states))
    ours = 0  # in the engine's hands
    while board.left:
        for queue in board.ready.values():
            while queue and engine.fits(queue[0]):
                engine.start(board.taken(queue.popleft()))
                ours += 1
        abreast, ended = max(1, engine.running), engine.finished(POLL)
        ours -= len(ended)
        for job, cause in ended:
            if cause:
                give_up(job, cause)
        if not ours:
            for job in board.elsewhere.values():
                others.wait_for(job)
        for job in [*(job for job, _ in ended), *board.elsewhere.values()]:
            skipped = board.look(job)
            if states[job.name] in (State.DONE, State.FAILED):
                clock.ended(job)
                log.info("%s", _progress(job, board, clock, abreast))
            for other in skipped:
                clock.skipped(other)
    return states


class Board:
    """Which jobs can start now, wait for another job, or are in the hands of another sweep; it keeps their `states`.

    A look at it costs as much with a hundred jobs as with a hundred thousand. ready: queues of jobs that take the same
    place in an engine. left: how many are not over.
    """

    def __init__(self, jobs: Sequence[Job], states: dict[str, State]) -> None:
        self.states = states
        self.ready: dict[tuple[str, bool], deque[Job]] = defaultdict(deque)
        self.elsewhere: dict[str, Job] = {}
        self.left = sum(now in (State.QUEUED, State.RUNNING) for now in states.values())
        self._waiting: dict[str, list[Job]] = defaultdict(list)  # by what they need
        for job in jobs:
            if states[job.name] is State.RUNNING:
                self.elsewhere[job.name] = job
            elif states[job.name] is State.QUEUED:
                self._queue(job)

    def taken(self, job: Job) -> Job:
        self.states[job.name] = State.RUNNING
        return job

    def look(self, job: Job) -> list[Job]:
        """Take note of what the job's files tell now; the jobs that are skipped for it."""
        now = self.states[job.name] = state(job)
        self.elsewhere.pop(job.name, None)
        if now is State.RUNNING:
            self.elsewhere[job.name] = job
            return []
        if now is State.QUEUED:
            return self._queue(job)
        self.left -= 1
        return [skipped for other in self._waiting.pop(job.name, ()) for skipped in self._queue(other)]

    def _queue(self, job: Job) -> list[Job]:
        """Put it where it waits or, when what it needs has failed, skip it and what waits for it; those."""
        needed = self.states[job.needs] if job.needs else State.DONE
        if needed is State.DONE:
            self.ready[job.device, job.small].append(job)
        elif needed in (State.QUEUED, State.RUNNING):
            self._waiting[job.needs or ""].append(job)
        else:
            self.states[job.name] = State.SKIPPED
            self.left -= 1
            waiting = self._waiting.pop(job.name, ())
            return [job, *(skipped for other in waiting for skipped in self._queue(other))]
        return []


class Others:
    """Jobs that another sweep is doing, when nothing else is left to do here: each is told once, with who has it."""

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._stopped: dict[str, float] = {}

    def wait_for(self, job: Job) -> None:
        """
        Raises:
            UserError: the process that has it has been stopped for a while.
        """
        by = holder(job)
        if job.name not in self._told and state(job) is State.RUNNING:
            self._told.add(job.name)
            log.info("waiting for record/%s, which process %s is doing", job.name, by)
        if not is_stopped(by):
            self._stopped.pop(job.name, None)
        elif time.monotonic() - self._stopped.setdefault(job.name, time.monotonic()) > STOPPED:
            raise UserError(
                f"record/{job.name} is in the hands of process {by}, which is stopped; continue it (kill -CONT) or "
                "end it"
            )


class Clock:
    """How long what is left will take, going by what is done: the like of it, else its kind."""

    def __init__(self, jobs: Sequence[Job], states: Mapping[str, State]) -> None:
        # Seconds, and of how many jobs.
        self._spent: dict[tuple[str, ...], tuple[float, int]] = defaultdict(lambda: (0.0, 0))
        self._left = Counter(job.alike for job in jobs)
        for job in jobs:
            if states[job.name] is State.DONE:
                self.ended(job)
            elif states[job.name] in (State.FAILED, State.SKIPPED):
                self.skipped(job)

    def ended(self, job: Job) -> None:
        self.skipped(job)
        if (spent := seconds(job)) is not None:
            for key in (job.alike, job.alike[:1]):
                total, count = self._spent[key]
                self._spent[key] = total + spent, count + 1

    def skipped(self, job: Job) -> None:
        self._left[job.alike] -= 1

    def left(self, abreast: int) -> float | None:
        """Seconds, with `abreast` jobs at once; None while a kind that is left has none done."""
        result = 0.0
        for alike, count in self._left.items():
            total, done = self._spent[alike] if alike in self._spent else self._spent[alike[:1]]
            if count and not done:
                return None
            result += count * total / max(1, done)
        return result / abreast


def status(jobs: Sequence[Job]) -> list[str]:
    """Lines that say how far a sweep is, whoever is doing it."""
    states = Board(jobs, {job.name: state(job) for job in jobs}).states  # which knows what is skipped
    lines = [_counts(states)]
    for job in jobs:
        if states[job.name] is State.RUNNING:
            since = time.time() - job.lock.stat().st_mtime
            lines.append(f"running record/{job.name} by process {holder(job)} for {_duration(since)}")
    lines += [f"failed  record/{job.name}: {reason(job)}" for job in jobs if states[job.name] is State.FAILED]
    running = sum(now is State.RUNNING for now in states.values())
    left = Clock(jobs, states).left(max(1, running))
    if left:
        lines.append(f"about {_duration(left)} left with {max(1, running)} at once")
    return lines


def _counts(states: Mapping[str, State]) -> str:
    count = Counter(states.values())
    return f"{len(states)} run{'s' * (len(states) != 1)}: " + ", ".join(
        f"{count[s]} {s.value}" for s in State if count[s]
    )


def _progress(job: Job, board: Board, clock: Clock, abreast: int) -> str:
    states = board.states
    if states[job.name] is State.FAILED:
        what = f": {reason(job)}"
    else:
        spent = seconds(job)
        what = "" if spent is None else f" in {_duration(spent)}"
    left = clock.left(abreast)
    later = f"; about {_duration(left)} left" if left else ""
    return f"[{len(states) - board.left}/{len(states)}] {states[job.name].value} record/{job.name}{what}{later}"


def _summary(jobs: Sequence[Job], states: Mapping[str, State]) -> list[str]:
    lines = [_counts(states)]
    for job in jobs:
        if states[job.name] is State.FAILED:
            lines.append(f"failed  record/{job.name}: {reason(job)} (whole log: {job.folder / 'failed.log'})")
        elif states[job.name] is State.SKIPPED:
            lines.append(f"skipped record/{job.name}: record/{job.needs} failed")
    if State.FAILED in states.values():
        lines.append("--retry_failed does what failed again, and what was skipped for it")
    return lines


def _duration(spent: float) -> str:
    if spent < 90:
        return f"{spent:.0f} s"
    return f"{spent / 60:.0f} min" if spent < 90 * 60 else f"{spent / 3600:.1f} h"
