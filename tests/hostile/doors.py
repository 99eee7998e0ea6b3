"""Commands run as a stranger's file meets them: in a forked process with limits, and what they may say and touch."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ulrl.cli import attack_main, defense_main, main

MEMORY = 2 << 30  # bytes beyond the process's own
SECONDS = 20.0  # of a processor
LONGEST = 400
QUICK = "--unlearning_epochs 1 --relearn_epochs 1 --device cpu --ratio 0.05".split()
REPAIR = ["defense", "ulrl", "--result_file", "tiny", *QUICK]


@dataclass(frozen=True)
class Place:
    """What a case may plant: a home with record/tiny, a folder outside of it, and a canary there."""

    home: Path
    outside: Path

    @property
    def record(self) -> Path:
        return self.home / "record" / "tiny"

    @property
    def result(self) -> Path:
        return self.record / "attack_result.pt"

    @property
    def canary(self) -> Path:
        return self.outside / "canary"


@dataclass(frozen=True)
class Case:
    """plant: lays the hostile file. argv: the command. words: what its last line has to name. exits: codes that it
    may leave with. slow: run by --whole only."""

    name: str
    plant: Callable[[Place], object]
    argv: list[str] = field(default_factory=lambda: REPAIR)
    words: tuple[str, ...] = ()
    exits: tuple[int, ...] = (2,)
    slow: bool = False


def run(case: Case, trained: Path, folder: Path) -> None:
    """Raises AssertionError where the manners are not kept."""
    place = Place(folder / "home", folder / "outside")
    place.outside.mkdir()
    place.canary.write_text("untouched")
    shutil.copytree(trained / "record", place.home / "record", copy_function=os.link)
    case.plant(place)
    before = tree(place.home), tree(place.outside)
    out, err = folder / "stdout", folder / "stderr"
    code, seconds = forked(case.argv, place, out, err)
    said, told = (f.read_text(errors="surrogateescape").replace("\r", "\n") for f in (out, err))  # bars draw over
    what = f"exit {code}, {seconds:.1f} s of CPU: {told[-1500:]!r}"
    assert "Traceback" not in told + said, told[-3000:]
    assert code in case.exits, what
    assert seconds < SECONDS, what
    assert not re.search("[^\n\t\x20-\x7e\xa0-\u2027\u2030-\u2065\u2070-\ud7ff\ue000-\U0010ffff]", said + told), what
    lines = told.splitlines()
    assert max(map(len, lines), default=0) <= LONGEST + len("ulrl: "), what
    if code == 2:
        assert sum(line.startswith("ulrl: ") for line in lines) == 1, what
        assert lines[-1].startswith("ulrl: "), what
        for word in case.words:
            assert word in lines[-1], what
        assert (tree(place.home), tree(place.outside)) == before, "files changed"
    assert place.canary.read_text() == "untouched"
    assert tree(place.outside) == before[1], "something was written outside"


def forked(argv: list[str], place: Place, out: Path, err: Path) -> tuple[int, float]:
    """(exit code, seconds of a processor, also of processes that it started and waited for)."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            for file, descriptor in ((out, 1), (err, 2)):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT, 0o666), descriptor)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            os.environ |= {"ULRL_HOME": str(place.home), "XDG_CACHE_HOME": str(out.parent / "cache")}
            os.chdir(place.home)
            torch.set_num_threads(1)
            own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (own + MEMORY, own + MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.alarm(0)
            command(argv)
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 98
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + 15 * SECONDS  # on the clock, where many share the machine
    while True:
        ended, status, used = os.wait4(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"no answer: {err.read_text()[-500:]!r}")
        time.sleep(0.01)


def command(argv: list[str]) -> None:
    match argv:
        case ["attack", name, *rest]:
            attack_main(name, rest)
        case ["defense", name, *rest]:
            defense_main(name, rest)
        case _:
            main(argv)


def tree(folder: Path) -> dict[str, object]:
    """All that lies in a folder, and what would change with it."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        whole = (about.st_ino, about.st_size, about.st_mtime_ns) if path.is_file() else ()
        found[str(path.relative_to(folder))] = (about.st_mode, whole, os.readlink(path) if path.is_symlink() else "")
    return found
