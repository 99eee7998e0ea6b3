"""Jobs as tasks of a Ray cluster.

A task works in the ULRL_HOME of the sweep where it sees that (storage that the nodes share). Where it does not,
it works in its own node's, and its folder is sent back; the record that a defense needs is then sent to a node
once.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import tarfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ulrl.errors import UserError
from ulrl.files import home, whole_folder
from ulrl.sweep.jobs import Job, attempt, claim, retry, sweep_folder

RETRIES = 3  # of a task whose worker or node was lost

log = logging.getLogger(__name__)


class RayEngine:
    """Tasks on the cluster at `address` (auto: the one this machine belongs to; none: one is started here).

    Each takes `cpus_per_job` CPUs and, where the cluster has GPUs, one for an attack and 1/`jobs_per_gpu` for a
    defense.
    """

    def __init__(self, address: str | None, cpus_per_job: int, jobs_per_gpu: int, *, by_value: bool = False) -> None:
        try:
            import ray
        except ImportError:
            raise UserError("--engine ray needs Ray, an optional extra: pip install 'ulrl[ray]'") from None
        stop = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, stop)  # Ray has put one of its own there
        except (ConnectionError, ValueError) as error:
            raise UserError(
                f"--address {address}: no Ray cluster there ({error}); start one with `ray start --head`, or leave "
                "--address out"
            ) from None
        self._ray = ray
        self._cpus, self._per_gpu = cpus_per_job, jobs_per_gpu
        self._by_value = by_value
        seen = [file for file in sweep_folder().glob("*.seen") if not file.is_symlink()]
        self._token = seen[0] if seen else sweep_folder() / f"{uuid.uuid4().hex}.seen"
        self._token.parent.mkdir(parents=True, exist_ok=True)
        self._token.touch()  # it stays, for other sweeps too
        self._task = ray.remote(_work)
        self._tasks: dict[Any, Job] = {}
        self._claims: dict[str, contextlib.ExitStack] = {}
        self._parcels: dict[str, Any] = {}
        self._not_ours: list[Job] = []
        most = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
        if most < cpus_per_job:
            log.warning("no node of the cluster has the %d CPUs of --cpus_per_job yet: waiting for one", cpus_per_job)

    @property
    def running(self) -> int:
        return len(self._tasks)

    def fits(self, job: Job) -> bool:
        return True  # Ray queues them

    def start(self, job: Job) -> None:
        parcels = None
        if self._by_value:
            ours = contextlib.ExitStack()  # the nodes do not see our locks, so this process holds them
            if not ours.enter_context(claim(job)) or job.done():
                ours.close()
                self._not_ours.append(job)
                return
            self._claims[job.name] = ours
            parcels = {job.needs: self._parcel(job.needs)} if job.needs else {}
        gpus = 0.0
        if job.device != "cpu" and self._ray.cluster_resources().get("GPU"):
            gpus = 1 / self._per_gpu if job.small else 1
        task = self._task.options(name=job.name, num_cpus=self._cpus, num_gpus=gpus, max_retries=RETRIES)
        self._tasks[task.remote(job, str(home()), self._token.name, parcels)] = job

    def finished(self, timeout: float) -> list[tuple[Job, str]]:
        """The jobs whose task ended, after up to `timeout` seconds, and what was wrong with its worker, if anything."""
        ended = [(job, "") for job in self._not_ours]
        self._not_ours.clear()
        if not self._tasks:
            time.sleep(0 if ended else timeout)
            return ended
        for task in self._ray.wait(list(self._tasks), timeout=timeout)[0]:
            job, cause = self._tasks.pop(task), ""
            try:
                folder = self._ray.get(task)
                if folder is None:  # its node does not see our files
                    self._by_value = True
                    self.start(job)  # with a claim, which is held until that task ends
                    continue
                if folder:
                    with whole_folder(job.folder, overwrite=False) as partial:
                        _unpack(folder, partial)
            except self._ray.exceptions.RayError as error:
                cause = " ".join(str(error).split()) + f" (after {RETRIES} retries)"
            if job.name in self._claims:
                self._claims.pop(job.name).close()
            ended.append((job, cause))
        return ended

    def close(self) -> None:
        for ours in self._claims.values():
            ours.close()
        self._ray.shutdown()  # and the tasks with it

    def _parcel(self, record: str) -> Any:
        """A record in Ray's object store, put there once."""
        if record not in self._parcels:
            self._parcels[record] = self._ray.put(_pack(home() / "record" / record))
        return self._parcels[record]


def _work(job: Job, folder: str, token: str, parcels: dict[str, Any] | None) -> bytes | None:
    """The task of a job. parcels: None to work in the ULRL_HOME `folder`, and then the answer is b"", or None where
    that is not seen; else the records that it needs, and then the answer is what it made.
    """
    if parcels is None:
        if not (Path(folder) / "record" / ".sweep" / token).exists():
            return None
        with _home_at(folder):
            attempt(job)
        return b""
    import ray

    for record, parcel in parcels.items():
        place = home() / "record" / record
        if not place.exists():
            with contextlib.suppress(UserError), whole_folder(place, overwrite=False) as partial:
                _unpack(ray.get(parcel), partial)
    retry(job)
    attempt(job)
    return _pack(job.folder)


@contextlib.contextmanager
def _home_at(folder: str) -> Iterator[None]:
    before = os.environ.get("ULRL_HOME")
    os.environ["ULRL_HOME"] = folder
    try:
        yield
    finally:
        del os.environ["ULRL_HOME"]
        if before is not None:
            os.environ["ULRL_HOME"] = before


def _pack(folder: Path) -> bytes:
    """A folder as a tar file, without the results of defenses in a record."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path in sorted(folder.iterdir()):
            if path.name != "defense":
                tar.add(path, path.name)
    return packed.getvalue()


def _unpack(packed: bytes, folder: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        tar.extractall(folder, filter="data")
