"""Processes that end before their time: killed, stopped, and Ray's workers."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time

from bench.faults.lab import COMMANDS, LONG, Lab
from bench.faults.processes import cpu_of, forked, started
from bench.faults.units import compared, units

# Whose judgement or cache a command that is to be stopped may have finished before.
AS_IN = {"defense": "defense", "compare": "compare", "purify": "cache"}


def kills(lab: Lab, what: str) -> None:
    """Every second one hits the first process only, whose children have to follow it."""
    wanted, length = lab.undisturbed(what)
    lost: list[str] = []
    hits = 0
    while hits < lab.times:
        home = lab.home()
        before, begin = units(home), time.monotonic()
        process = forked(COMMANDS[what], home)
        if what == "cache":
            while process.running() and not list(home.glob("cache/ulrl/*.lock")):
                time.sleep(0.001)
            time.sleep(lab.rng.uniform(0, 0.3))
        else:
            time.sleep(lab.rng.uniform(0.02, 1) * length)
        if hit := process.running():
            (os.killpg if hits % 2 else os.kill)(process.pid, signal.SIGKILL)
        process.end()
        if hit:
            hits += 1
            time.sleep(0.5)  # children of a sweep end with it
            lost += compared(home, before, wanted) + lab.again(what, home, wanted)
        else:
            length = time.monotonic() - begin
        shutil.rmtree(home)
    lab.row("SIGKILL at a random moment", what, hits, lost)


def stops(lab: Lab, what: str) -> None:
    """From the start on, imports included. What is measured is from the signal to the end: on the clock, in which
    others may have the machine, and of a processor, which may be two seconds."""
    for sig in (signal.SIGINT, signal.SIGTERM):
        lost, took = [], []
        for _ in range(max(1, lab.times // 3)):
            home = lab.home()
            if what == "report":
                for i in range(20):
                    shutil.copytree(home / "record" / "tiny", home / "record" / f"tiny{i}")
            before = units(home)
            process = started(LONG[what], home)
            moment = lab.rng.uniform(0.2, 4.5)
            while process.running() and cpu_of(process.pid) < moment:
                time.sleep(0.05)
            if process.running():
                begin, at_it = time.monotonic(), cpu_of(process.pid)
                (os.killpg if sig == signal.SIGINT else os.kill)(process.pid, sig)  # as a terminal does it
                used = at_it
                while process.running():
                    used = max(used, cpu_of(process.pid))
                    time.sleep(0.02)
                code, last = process.end()
                took.append((time.monotonic() - begin, used - at_it))
                if code != 130 or "interrupted" not in last:
                    lost.append(f"left with {code}: {last} (after {moment:.1f} s of a processor)")
            else:
                process.end()
            wanted = lab.undisturbed(AS_IN[what])[0] if what in AS_IN else before
            lost += compared(home, before, wanted)
            lost += [f"{path} is left" for path in home.rglob(".*.partial")]
            shutil.rmtree(home)
        lost += [f"took {cpu:.1f} s of a processor" for _, cpu in took if cpu > 2]
        times = ", ".join(f"{clock:.1f} s ({cpu:.1f} s of a processor)" for clock, cpu in took)
        load = f"load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"
        lab.row(f"{sig.name} at a random moment", what, len(took), lost, f"ended after {times}; {load}")


def ray(lab: Lab, what: str) -> None:
    """A worker of Ray's is killed in the middle of a job; then a sweep on Ray is ended by SIGTERM."""
    wanted, lost = lab.undisturbed("sweep")[0], []
    home = lab.home()
    process = started(["sweep", "sweep.yaml", "--engine", "ray"], home)
    killed: set[int] = set()
    while process.running() and len(killed) < 2:
        for lock in home.glob("record/.sweep/*.lock"):
            pid = lock.read_text().partition(" ")[0]
            if pid.isdecimal() and int(pid) not in killed and lock.with_suffix(".log").exists():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
                    killed.add(int(pid))
                break
        time.sleep(0.02)
    code, last = process.end()
    if code != 0:
        lost.append(f"left with {code}: {last}")
    lost += compared(home, units(lab.base), wanted) + lab.again("sweep", home, wanted)
    lab.row("Ray's worker killed in a job", "sweep", len(killed), lost)
    shutil.rmtree(home)

    home = lab.home()
    process = started(["sweep", "long.yaml", "--engine", "ray"], home)
    while process.running() and not list(home.glob("record/.sweep/*.log")):
        time.sleep(0.05)
    begin = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    code, last = process.end()
    lost = [] if code == 130 else [f"left with {code}: {last}"]
    note = f"ended after {time.monotonic() - begin:.1f} s, Ray's own processes with it"
    lab.row("SIGTERM of a sweep on Ray", "sweep", 1, lost + compared(home, units(lab.base), {}), note)
