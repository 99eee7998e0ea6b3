"""A sweep from start to end: each job once, as soon as what it needs is there and an engine has room."""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
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
    clock = Clock(jobs, states)
    log.info("%s", _counts(states))
    others = Others()
    ours: set[str] = set()  # in the engine's hands
    while any(end in (State.QUEUED, State.RUNNING) for end in states.values()):
        for job in jobs:
            if states[job.name] is not State.QUEUED:
                continue
            needed = states[job.needs] if job.needs else State.DONE
            if needed in (State.FAILED, State.SKIPPED):
                states[job.name] = State.SKIPPED
            elif needed is State.DONE and engine.fits(job):
                engine.start(job)
                ours.add(job.name)
                states[job.name] = State.RUNNING
        for job, cause in engine.finished(POLL):
            ours.discard(job.name)
            if cause:
                give_up(job, cause)
        for job in jobs:
            if states[job.name] is State.RUNNING and job.name not in ours:
                if not ours:
                    others.wait_for(job)
                states[job.name] = state(job)
                if states[job.name] in (State.DONE, State.FAILED):
                    clock.ended(job)
                    log.info("%s", _progress(job, states, clock, max(1, engine.running)))
    return states


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
        self._jobs = jobs
        self._spent: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for job in jobs:
            if states[job.name] is State.DONE:
                self.ended(job)

    def ended(self, job: Job) -> None:
        if (spent := seconds(job)) is not None:
            self._spent[job.alike].append(spent)
            self._spent[job.alike[:1]].append(spent)

    def left(self, states: Mapping[str, State], abreast: int) -> float | None:
        """Seconds, with `abreast` jobs at once; None while a kind that is left has none done."""
        total = 0.0
        for job in self._jobs:
            if states[job.name] in (State.QUEUED, State.RUNNING):
                like = self._spent.get(job.alike) or self._spent.get(job.alike[:1])
                if not like:
                    return None
                total += sum(like) / len(like)
        return total / abreast


def status(jobs: Sequence[Job]) -> list[str]:
    """Lines that say how far a sweep is, whoever is doing it."""
    states = {job.name: state(job) for job in jobs}
    lines = [_counts(states)]
    for job in jobs:
        if states[job.name] is State.RUNNING:
            since = time.time() - job.lock.stat().st_mtime
            lines.append(f"running record/{job.name} by process {holder(job)} for {_duration(since)}")
    lines += [f"failed  record/{job.name}: {reason(job)}" for job in jobs if states[job.name] is State.FAILED]
    running = sum(now is State.RUNNING for now in states.values())
    left = Clock(jobs, states).left(states, max(1, running))
    if left:
        lines.append(f"about {_duration(left)} left with {max(1, running)} at once")
    return lines


def _counts(states: Mapping[str, State]) -> str:
    count = Counter(states.values())
    return f"{len(states)} runs: " + ", ".join(f"{count[s]} {s.value}" for s in State if count[s])


def _progress(job: Job, states: Mapping[str, State], clock: Clock, abreast: int) -> str:
    over = sum(end not in (State.QUEUED, State.RUNNING) for end in states.values())
    if states[job.name] is State.FAILED:
        what = f": {reason(job)}"
    else:
        spent = seconds(job)
        what = "" if spent is None else f" in {_duration(spent)}"
    left = clock.left(states, abreast)
    later = f"; about {_duration(left)} left" if left else ""
    return f"[{over}/{len(states)}] {states[job.name].value} record/{job.name}{what}{later}"


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
