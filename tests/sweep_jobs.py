"""Jobs of a sweep that are a command each and keep a ledger, for tests of how sweeps go about their jobs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ulrl.files import home, whole_folder
from ulrl.sweep import local
from ulrl.sweep.jobs import Job
from ulrl.sweep.local import LocalEngine
from ulrl.sweep.scheduler import run_jobs


@dataclass(frozen=True, kw_only=True)
class Command(Job):
    """A shell command; it has ended well when it says so in the ledger."""

    command: str

    def work(self) -> None:
        note(f"begin {self.name}")
        subprocess.run(["sh", "-c", self.command], check=True)
        self.folder.mkdir(parents=True)
        note(f"end {self.name}")
        (self.folder / "result.json").write_text('{"seconds": {"total": 1.0}}')


@dataclass(frozen=True, kw_only=True)
class Slow(Job):
    """A job that is long in ending when it is asked to, as one whose step takes longer."""

    def work(self) -> None:
        note(f"begin {self.name}")
        try:
            time.sleep(600)
        finally:
            time.sleep(2)
            note(f"cleared {self.name}")


@dataclass(frozen=True, kw_only=True)
class Deaf(Job):
    """A job that does not hear that it is to end, as where Python swallows an interrupt; it has written a half."""

    keep = "learned"

    def work(self) -> None:
        with whole_folder(self.folder, overwrite=False, keep=self.keep) as partial:
            (partial / "half").touch()
            if self.name == "learning":
                (partial / self.keep).mkdir()
            tqdm(disable=True)  # as a training has one
            note(f"begin {self.name}")
            while True:
                with contextlib.suppress(KeyboardInterrupt):
                    time.sleep(600)


def note(line: str) -> None:
    """Append a line; so short a write does not mix with another's."""
    file = os.open(os.environ.get("LEDGER") or home() / "ledger", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{line}\n".encode())
    os.close(file)


def noted(folder: Path) -> Counter[str]:
    ledger = folder / "ledger"
    return Counter(ledger.read_text().splitlines()) if ledger.exists() else Counter()


def ends(folder: Path) -> dict[str, int]:
    """How often each job was brought to an end."""
    return {line.removeprefix("end "): times for line, times in noted(folder).items() if line.startswith("end ")}


def command(name: str, line: str, needs: str | None = None) -> Command:
    return Command(name=name, needs=needs, alike=("defense" if needs else "attack", "", ""), command=line)


def study(records: int, defenses: int, seconds: float) -> list[Command]:
    """`records` jobs and `defenses` for each of them, of that length."""
    attacks = [command(f"r{i}", f"sleep {seconds}") for i in range(records)]
    return attacks + [
        command(f"r{i}/defense/d{j}", f"sleep {seconds}", f"r{i}") for i in range(records) for j in range(defenses)
    ]


def start(*arguments: object) -> subprocess.Popen[bytes]:
    """A sweep of that `study` in a process of its own, on two workers."""
    return subprocess.Popen([sys.executable, "-c", "import sweep_jobs; sweep_jobs.main()", *map(str, arguments)])


def kill_one() -> None:
    local._PATIENCE = 0.5
    engine = LocalEngine(1, 1)
    engine.start(Deaf(name="deaf", needs=None, alike=("attack",)))
    while not noted(home()):
        time.sleep(0.05)
    engine.close()


def main() -> None:
    records, defenses, seconds = sys.argv[1:]
    jobs: Sequence[Job] = study(int(records), int(defenses), float(seconds))
    engine = LocalEngine(2, 1)
    run_jobs(jobs, engine)
    engine.close()
