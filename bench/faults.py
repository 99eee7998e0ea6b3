"""Kills, a full disk, read-only folders, several writers, a moved clock, stops:  python bench/faults.py --only kills

Commands run on the digits as a user would start them; all but the stops and Ray in forked processes that have imported
torch already, so that random moments fall into the run. A run that ended is a unit: its folder, with a checksum of all
that may not vary between whole runs (not: times, host, logs, pictures). After each fault every unit has to be as it was
before or as an undisturbed run makes it, none is missing, nothing is half-written under a final name. The command is
run again then and must come to the undisturbed run's units, with no temporary file left. Root is needed, to mount small
disks and to become a user without rights. bench/results/faults.json has a row for each: what was tried, how often, and
what was lost; `--only` replaces the rows of one fault.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ulrl.cli import main as ulrl  # noqa: E402
from ulrl.cli import own, running, showing  # noqa: E402, F401 - before the forks

CPU = ["--device", "cpu"]
TINY = ["attack", "badnet", "--dataset", "digits", "--width", "4", "--save_folder_name", "tiny", *CPU]
GRID = """attacks: {attack: badnet, dataset: digits, width: 4, epochs: 1, device: cpu, seeds: 2}
defenses: {defense: ft, epochs: 1, ratio: 0.1, device: cpu}
"""
NET = """import torch
def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
"""
PURIFY = ["purify", "--model", "net:net", "--weights", "w.pt", "--images", "photos", *CPU]
COMMANDS = {
    "attack": [*TINY, "--epochs", "2", "--overwrite"],
    "defense": ["defense", "ft", "--result_file", "tiny", "--epochs", "3", "--ratio", "0.1", *CPU],
    "sweep": ["sweep", "sweep.yaml"],
    "compare": ["compare", "tiny", "--defenses", "ft,fp", "--seeds", "2", "--ratio", "0.1", *CPU],
    "cache": [*PURIFY, "--check"],
}
LONG = {  # to be stopped
    "attack": [*TINY, "--epochs", "5000", "--overwrite"],
    "defense": ["defense", "ft", "--result_file", "tiny", "--epochs", "5000", *CPU],
    "sweep": ["sweep", "long.yaml"],
    "compare": ["compare", "tiny", "--defenses", "ft,ulrl", "--seeds", "50", *CPU],
    "purify": [*PURIFY, "--out", "out.pt", "--relearn_epochs", "5000"],
    "report": ["report", "--out", "page.html"],
}
YEARS = 2 * 365 * 86400.0


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
    return {"ULRL_HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "OMP_NUM_THREADS": "1"}


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
            sys.modules["__main__"] = types.ModuleType("__main__")  # which a sweep's processes would import
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
        env=os.environ | environment(home) | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=err.open("w"),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    process.returncode = 0  # it is waited for by its number
    return Process(process.pid, err)


def units(home: Path) -> dict[str, str]:
    """What ended, by name, and its checksum."""
    found = {}
    for file in [*home.glob("record/*/result.json"), *home.glob("record/*/defense/*/result.json")]:
        if not any(part.startswith(".") for part in file.relative_to(home).parts):
            found[str(file.parent.relative_to(home))] = _of_folder(file.parent)
    for file in home.glob("cache/ulrl/**/*"):
        if file.is_file() and file.suffix in (".npy", ".json") and not file.name.startswith("."):
            found[re.sub("_[0-9a-f]{16}", "", file.name)] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def _of_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        drawn = path.parent == folder and path.suffix == ".png"
        if name.startswith("defense") or drawn or path.suffix in (".log", ".csv") or not path.is_file():
            continue
        content = path.read_bytes()
        if path.name == "result.json":
            result = json.loads(content)
            content = repr([result[key] for key in ("after", "options", "flagged", "seed")]).encode()
        elif path.suffix in (".pt", ".pickle", ".npz"):  # the archive notes names and times
            with zipfile.ZipFile(path) as archive:
                content = b"".join(archive.read(m) for m in archive.namelist() if "/data" in m or ".npy" in m)
        digest.update(name.encode() + b"\0" + content)
    return digest.hexdigest()


def half_written(home: Path) -> list[str]:
    """Folders with a final name and without their last file."""
    return [
        f"{folder} lacks result.json"
        for folder in [*home.glob("record/*"), *home.glob("record/*/defense/*")]
        if not folder.name.startswith(".") and not any((folder / n).exists() for n in ("result.json", "failed.log"))
        and [p for p in folder.iterdir() if p.name != "defense"]
    ]  # fmt: skip


def compared(home: Path, before: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """What is neither as before nor as wanted, after a fault."""
    after = units(home)
    lost = [f"{n} is damaged" for n, digest in after.items() if digest not in (before.get(n), wanted.get(n))]
    for name in before:
        hidden = home / Path(name).with_name(f".{Path(name).name}.replaced")
        if name not in after and not hidden.exists():  # a kill between two renames; the next run brings it back
            lost.append(f"{name} is gone")
    return lost + half_written(home)


@dataclass
class Lab:
    folder: Path
    rng: random.Random
    rows: list[dict[str, object]]
    times: int
    base: Path = field(init=False)
    whole: dict[str, tuple[dict[str, str], float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.chmod(0o755)
        self.base = self.folder / "base"
        (self.base / "photos").mkdir(parents=True)
        (self.base / "sweep.yaml").write_text(GRID)
        (self.base / "long.yaml").write_text(GRID.replace("epochs: 1", "epochs: 5000"))
        (self.base / "net.py").write_text(NET)
        for name, light in (("cat", 0), ("dog", 128)):
            (self.base / "photos" / name).mkdir()
            for i in range(300):
                pixels = Image.frombytes("RGB", (8, 8), bytes(b // 2 + light for b in self.rng.randbytes(192)))
                pixels.save(self.base / "photos" / name / f"{i}.png")
        dark, light = torch.full((2, 192), 0.01) * torch.tensor([[-1], [1]])
        torch.save({"1.weight": torch.stack([dark, light]), "1.bias": torch.zeros(2)}, self.base / "w.pt")
        self.run([*TINY, "--epochs", "1"], self.base)
        shutil.rmtree(self.base / "cache", ignore_errors=True)

    def run(self, argv: list[str], home: Path) -> None:
        code, last = forked(argv, home).end()
        assert code in (0, 3), (code, last)

    def home(self) -> Path:
        home = self.folder / f"home{self.rng.randrange(10**9)}"
        shutil.copytree(self.base, home)
        return home

    def undisturbed(self, what: str) -> tuple[dict[str, str], float]:
        """The units of a run that nothing disturbs, and its seconds."""
        if what not in self.whole:
            home, begin = self.home(), time.monotonic()
            self.run(COMMANDS[what], home)
            self.whole[what] = units(home), time.monotonic() - begin
            shutil.rmtree(home)
        return self.whole[what]

    def again(self, what: str, home: Path, wanted: dict[str, str]) -> list[str]:
        """The command once more, and what is not as it should be then."""
        argv = [*COMMANDS[what], *(["--retry_failed"] if what == "sweep" else [])]
        code, last = forked(argv, home).end()
        if code not in (0, 3) and "exists" not in last:
            return [f"run again, it left with {code}: {last}"]
        now = units(home)
        lost = [f"{n} differs after going on" for n in {**wanted, **now} if now.get(n) != wanted.get(n)]
        return lost + [f"{path} is left" for path in home.rglob(".*.partial")] + half_written(home)

    def row(self, fault: str, what: str, times: int, lost: list[str], note: str = "") -> None:
        text = "; ".join(lost).replace(str(self.folder), "")[:300] or note
        self.rows[:] = [row for row in self.rows if (row["fault"], row["command"]) != (fault, what)]
        self.rows.append({"fault": fault, "command": what, "times": times, "lost": len(lost), "note": text})
        print(f"{fault:32} {what:10} {times:3} times, {len(lost)} lost {text}", flush=True)


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


def read_only(lab: Lab, what: str) -> None:
    """A mount that cannot be written, and folders that the user has no right to write."""
    wanted, _ = lab.undisturbed(what)
    home, lost = lab.home(), []
    before = units(home)

    def as_nobody() -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)

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
            while process.running() and _cpu(process.pid) < moment:
                time.sleep(0.05)
            if process.running():
                begin, at_it = time.monotonic(), _cpu(process.pid)
                (os.killpg if sig == signal.SIGINT else os.kill)(process.pid, sig)  # as a terminal does it
                used = at_it
                while process.running():
                    used = max(used, _cpu(process.pid))
                    time.sleep(0.02)
                code, last = process.end()
                took.append((time.monotonic() - begin, used - at_it))
                if code != 130 or "interrupted" not in last:
                    lost.append(f"left with {code}: {last} (after {moment:.1f} s of a processor)")
            else:
                process.end()
            lost += compared(home, before, lab.undisturbed("cache")[0] if what == "purify" else before)
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


def _cpu(session: int) -> float:
    """Seconds of a processor that a session's processes have had."""
    spent = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = file.read_text().rpartition(")")[2].split()
            spent += (int(fields[3]) == session) * (int(fields[11]) + int(fields[12]))
    return spent / os.sysconf("SC_CLK_TCK")


TRIES = {
    "clock": clock, "readonly": read_only, "disk": full_disk, "writers": writers, "stops": stops, "kills": kills,
    "ray": ray,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TRIES, action="append", help="one of the faults; all where not given")
    parser.add_argument("--commands", default="", help="names with commas between; all where not given")
    parser.add_argument("--times", type=int, default=10, help="kills of each command, and a third as many stops")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "faults.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(args.out.read_text()) if args.only and args.out.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder), random.Random(args.seed), rows, args.times)
        for name in args.only or TRIES:
            for what in {"stops": LONG, "ray": ["sweep"]}.get(name, COMMANDS):
                if not args.commands or what in args.commands.split(","):
                    TRIES[name](lab, what)
                    args.out.write_text(json.dumps(lab.rows, indent=1) + "\n")
    used = sum(os.times()[:4])
    print(f"{used:.0f} s of a processor, {sum(row['lost'] for row in lab.rows)} lost in all")  # type: ignore[misc]


if __name__ == "__main__":
    main()
