"""Milliseconds that a sweep takes for each of its jobs, which do nothing:  python -m bench.idle here|local COUNT

`here`: CPU time of the scheduler and of a job's claim and log, in this process. `local`: by the clock, with a process
for each job, two at once.
"""

from __future__ import annotations

import sys
import time

from ulrl.sweep.jobs import Job, attempt
from ulrl.sweep.local import LocalEngine
from ulrl.sweep.scheduler import Engine, run_jobs


class NoWork(Job):
    def work(self) -> None:
        self.folder.mkdir(parents=True)
        (self.folder / "result.json").write_text('{"seconds": {"total": 0.0}}')


class Here:
    """An engine that does two jobs at once, in this process."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []

    @property
    def running(self) -> int:
        return len(self._jobs)

    def fits(self, job: Job) -> bool:
        return len(self._jobs) < 2

    def start(self, job: Job) -> None:
        self._jobs.append(job)

    def finished(self, timeout: float) -> list[tuple[Job, str]]:
        ended, self._jobs = self._jobs, []
        for job in ended:
            attempt(job)
        return [(job, "") for job in ended]

    def close(self) -> None:
        pass


def idle_jobs(count: int) -> list[Job]:
    """Each tenth is needed by the nine behind it."""
    needed = [f"r{i - i % 10}" if i % 10 else None for i in range(count)]
    return [NoWork(name=f"r{i}", needs=needed[i], alike=("defense", "none", "digits")) for i in range(count)]


def main() -> None:
    in_process, count = sys.argv[1] == "here", int(sys.argv[2])
    clock = time.process_time if in_process else time.perf_counter
    engine: Engine = Here() if in_process else LocalEngine(2, 1)
    begin = clock()
    try:
        run_jobs(idle_jobs(count), engine)
    finally:
        engine.close()
    print(1000 * (clock() - begin) / count)


if __name__ == "__main__":
    main()
