"""A machine that does not play along: full disks, folders that cannot be written, other writers, a moved clock."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.faults.lab import COMMANDS, Lab
from bench.faults.processes import Process, forked
from bench.faults.units import compared, units

YEARS = 2 * 365 * 86400.0


@contextlib.contextmanager
def mounted(place: Path, *how: str) -> Iterator[Callable[[int], object]]:
    """A tmpfs there, of no room yet; yields what sets its size."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "ulrl", str(place)], check=True)
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)
    finally:
        subprocess.run(["umount", str(place)], check=True)
        place.rmdir()


def full_disk(lab: Lab, what: str) -> None:
    """A disk that grows by an eighth of what the command writes, until it comes to an end on it."""
    wanted, _ = lab.undisturbed(what)
    lost, tries = [], 0

    def used() -> int:
        about = os.statvfs(home)
        return (about.f_blocks - about.f_bfree) * about.f_frsize

    home = lab.folder / "small"
    with mounted(home) as resize:
        shutil.copytree(lab.base, home, dirs_exist_ok=True)
        empty = used()
        lab.run(COMMANDS[what], home)
        needed = max(used() - empty, 1 << 16)
    with mounted(home) as resize:
        shutil.copytree(lab.base, home, dirs_exist_ok=True)
        before = units(home)
        for tries in range(12):
            resize(empty + 4096 + needed * tries // 8)
            argv = [*COMMANDS[what], *(["--retry_failed"] if what == "sweep" else [])]
            code, last = forked(argv, home).end()
            full = (code == 2 and last.startswith("ulrl: ")) or (what == "sweep" and code == 1)
            if not full and code not in (0, 3):
                lost.append(f"left with {code}: {last}")
            lost += compared(home, before, wanted)
            if set(wanted) <= set(units(home)) and code in (0, 3):
                break
        resize(64 << 20)
        lost += lab.again(what, home, wanted)
    lab.row("disk full (tmpfs)", what, tries, lost)


def as_nobody() -> None:
    """Without the right to write what is root's. All may be read: Python itself may lie in root's home."""
    libc, may_read = ctypes.CDLL(None), 2  # CAP_DAC_READ_SEARCH
    libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    assert libc.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[1 << may_read] * 3, 0, 0, 0)) == 0
    assert libc.prctl(47, 2, may_read, 0, 0) == 0  # PR_CAP_AMBIENT_RAISE: for what it starts, too


def read_only(lab: Lab, what: str) -> None:
    """A mount that cannot be written, and folders that the user has no right to write."""
    wanted, _ = lab.undisturbed(what)
    home, lost = lab.home(), []
    before = units(home)

    def check(process: Process) -> None:
        code, last = process.end()
        if not (code == 2 and last.startswith("ulrl: ")) and not (what == "cache" and code in (0, 3)):
            lost.append(f"left with {code}: {last}")
        lost.extend(compared(home, before, before))

    check(forked(COMMANDS[what], home, as_nobody))
    subprocess.run(["mount", "--bind", str(home), str(home)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(home)], check=True)
        check(forked(COMMANDS[what], home))
    finally:
        subprocess.run(["umount", str(home)], check=True)
    lost += lab.again(what, home, wanted)
    lab.row("read-only folder", what, 2, lost)


def writers(lab: Lab, what: str) -> None:
    wanted, _ = lab.undisturbed(what)
    for count in (2, 8):
        home = lab.home()
        ends = [process.end() for process in [forked(COMMANDS[what], home) for _ in range(count)]]
        lost = [f"left with {code}: {last}" for code, last in ends if code not in (0, 2, 3)]
        lost += [f"left with 2: {last}" for code, last in ends if code == 2 and "writing" not in last + "exists"]
        lost += [] if any(code in (0, 3) for code, _ in ends) else ["none came to an end"]
        lost += compared(home, units(lab.base), wanted) + lab.again(what, home, wanted)
        won = sum(code in (0, 3) for code, _ in ends)
        lab.row(f"{count} writers at once", what, 1, lost, f"{won} came to an end, {count - won} were refused")
        shutil.rmtree(home)


def clock(lab: Lab, what: str) -> None:
    """Two years back and two ahead: of `time.time`, and of the times of all files, locks too."""
    wanted, lost = lab.undisturbed(what)[0], []
    for shift in (-YEARS, YEARS):
        home = lab.home()
        if what == "sweep":
            forked(COMMANDS[what], home).end()
            for folder in home.glob("record/badnet*"):
                shutil.rmtree(folder)  # its locks stay
        for path in home.rglob("*"):
            os.utime(path, (time.time() + shift,) * 2)
        now = time.time
        process = forked(
            COMMANDS[what], home, lambda now=now, shift=shift: setattr(time, "time", lambda: now() - shift)
        )
        code, last = process.end()
        if code not in (0, 3):
            lost.append(f"left with {code}: {last}")
        lost += compared(home, units(lab.base), wanted) + lab.again(what, home, wanted)
        shutil.rmtree(home)
    lab.row("clock and file times moved", what, 2, lost)
