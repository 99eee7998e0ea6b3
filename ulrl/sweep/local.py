"""Jobs as processes of this machine.

Each job has a process of its own, so that one that crashes or runs out of memory takes none with it and all
it held is freed. They are forked from a server that has imported torch once, so none waits for that.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess

import torch
from tqdm import tqdm

from ulrl.files import clear_away, home
from ulrl.sweep.jobs import Job, attempt

_STOPS = {signal.SIGINT, signal.SIGTERM}
_PATIENCE = 20.0  # seconds that a job has to end in, which it does between two steps; Slurm has 30 for all


class LocalEngine:
    """Up to `jobs` processes at once, which share out the CPU threads; each GPU takes one attack or up to
    `jobs_per_gpu` defenses. Without `jobs`: as many as the GPUs take, or one without a GPU.
    """

    def __init__(self, jobs: int | None, jobs_per_gpu: int) -> None:
        visible, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
        gpus = visible.split(",")[:count] if visible else [str(i) for i in range(count)]
        self.jobs = jobs or len(gpus) * jobs_per_gpu or 1
        self._room = dict.fromkeys(gpus, jobs_per_gpu)
        self._per_gpu = jobs_per_gpu
        self._threads = max(1, torch.get_num_threads() // self.jobs)
        self._running: dict[int, tuple[BaseProcess, Job, str]] = {}
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["ulrl.sweep.jobs"])

    @property
    def running(self) -> int:
        return len(self._running)

    def fits(self, job: Job) -> bool:
        return self.running < self.jobs and (not self._room or max(self._room.values()) >= self._share(job))

    def start(self, job: Job) -> None:
        gpu = max(self._room, key=lambda g: self._room[g]) if self._room else ""  # the first of the emptiest
        if gpu:
            self._room[gpu] -= self._share(job)
        arguments = (job, str(home()), self._threads, gpu)
        process = self._context.Process(target=_work, args=arguments, name=job.name)
        resource_tracker.ensure_running()  # or the server's start does it, and unblocks the signals
        # Ctrl-C reaches all, and the sweep decides. It waits until `close` can end the process.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        try:
            process.start()
            self._running[process.sentinel] = process, job, gpu
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def finished(self, timeout: float) -> list[tuple[Job, str]]:
        """The jobs whose process ended, after up to `timeout` seconds, and what killed it, if anything did."""
        ended = []
        for sentinel in connection.wait(list(self._running), timeout):
            assert isinstance(sentinel, int)
            process, job, gpu = self._running.pop(sentinel)
            process.join()
            if gpu:
                self._room[gpu] += self._share(job)
            ended.append((job, _cause(process.exitcode or 0)))
        return ended

    def close(self) -> None:
        """End what still runs, once it has taken away what it has half written; what it has not, is taken away here.

        It may not have heard: Python swallows what is raised in a callback, as importing a module runs some.
        """
        for process, _, _ in self._running.values():
            process.terminate()
        end = time.monotonic() + _PATIENCE
        for process, job, _ in self._running.values():
            process.join(max(0, end - time.monotonic()))
            process.kill()
            process.join()
            clear_away(job.folder, job.keep)

    def _share(self, job: Job) -> int:
        return 0 if job.device == "cpu" else 1 if job.small else self._per_gpu


def _work(job: Job, folder: str, threads: int, gpu: str) -> None:
    """The process of a job. It dies with the one that started it, whatever ended that."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["ULRL_HOME"] = folder
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(threads)
    # Its own is a semaphore, which a process that is killed leaks, as the sweep's stderr would say.
    tqdm.set_lock(threading.RLock())
    faulthandler.enable()
    with contextlib.suppress(KeyboardInterrupt):  # what SIGTERM, from `close`, becomes
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        attempt(job)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _cause(code: int) -> str:
    if code == 0:
        return ""
    if code == -signal.SIGKILL:
        return "its process was killed by SIGKILL, as happens when memory runs out"
    return f"its process was killed by {signal.Signals(-code).name}" if code < 0 else f"its process left with {code}"
