"""Commands as processes of their own, which can be killed."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ulrl.cli import main as ulrl

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = (  # before the forks, so that the moments of a kill fall into the work
    "ulrl.cli.own", "ulrl.cli.running", "ulrl.cli.showing", "ulrl.sweep.jobs", "ulrl.report.pictures",
    "ulrl.report.tables", "sklearn.datasets", "sklearn.model_selection", "torch._dynamo",
)  # fmt: skip
for name in IMPORTED:
    importlib.import_module(name)


@dataclass
class Process:
    """A command at work. Its last words are in a file."""

    pid: int
    err: Path

    def running(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def end(self) -> tuple[int, str]:
        """(exit code, last line that it said)"""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        lines = self.err.read_text(errors="replace").replace("\r", "\n").strip().splitlines()
        return code, lines[-1] if lines else ""


def environment(home: Path) -> dict[str, str]:
    cache = str(home / "cache")
    return {"ULRL_HOME": str(home), "XDG_CACHE_HOME": cache, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def forked(argv: list[str], home: Path, first: Callable[[], object] = lambda: None) -> Process:
    """first: what the new process does before the command."""
    err = Path(tempfile.mkstemp(dir=home.parent)[1])
    pid = os.fork()
    if pid == 0:
        code: object = 99
        try:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(err, os.O_WRONLY), 2)
            os.environ.update(environment(home))
            os.chdir(home)
            context = multiprocessing.get_context("fork")  # for a sweep's jobs, too
            multiprocessing.get_context = lambda method=None: context
            first()
            ulrl(argv)
        except SystemExit as left:
            code = left.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 98)
    return Process(pid, err)


def started(argv: list[str], home: Path) -> Process:
    """As a user starts it, from nothing."""
    err = Path(tempfile.mkstemp(dir=home.parent)[1])
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from ulrl.cli import main; main(sys.argv[1:])", *argv], cwd=home,
        env=os.environ | environment(home), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=err.open("w"),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    process.returncode = 0  # it is waited for by its number
    return Process(process.pid, err)


def cpu_of(session: int) -> float:
    """Seconds of a processor that a session's processes have had."""
    spent = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = file.read_text().rpartition(")")[2].split()
            spent += (int(fields[3]) == session) * (int(fields[11]) + int(fields[12]))
    return spent / os.sysconf("SC_CLK_TCK")
