"""Kills, a full disk, read-only folders, several writers, stops:  python bench/faults.py --kills 10

Every command runs on the digits as a user would start it. For each: SIGKILL at a random moment, then what was finished
is compared by checksum, what is half-written is looked for, and the command is run again and must come to the bits of a
run that was not interrupted (times, host and logs aside). Then a tmpfs with less and less room (root only), folders
without write permission, two and eight writers at once, Ctrl-C and SIGTERM. bench/results/faults.json has a row for
each: what was tried, how often, and what was lost.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TINY = "--dataset digits --width 4 --epochs 2 --device cpu".split()
ATTACK = ["attack", "badnet", *TINY, "--save_folder_name", "new"]
DEFENSE = ["defense", "ft", "--result_file", "tiny", "--epochs", "3", "--device", "cpu", "--ratio", "0.1"]
COMPARE = ["compare", "tiny", "--defenses", "ft,ulrl", "--seeds", "2", "--ratio", "0.1", "--device", "cpu"]
SWEEP = ["sweep", "sweep.yaml"]
GRID = """attacks: {attack: badnet, dataset: digits, width: 4, epochs: 1, device: cpu, seeds: 2}
defenses: {defense: ft, epochs: 1, ratio: 0.1, device: cpu}
"""
NET = """import torch
def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
"""
CACHE = ["purify", "--model", "net:net", "--weights", "w.pt", "--images", "photos", "--check", "--device", "cpu"]


def start(argv: list[str], home: Path, **how: Any) -> subprocess.Popen[bytes]:
    env = os.environ | {"ULRL_HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "OMP_NUM_THREADS": "1",
                        "PYTHONPATH": str(ROOT)}  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", "import sys; from ulrl.cli import main; main(sys.argv[1:])", *argv]
        if argv[0] not in ("attack", "defense")
        else [sys.executable, str(ROOT / argv[0] / f"{argv[1]}.py"), *argv[2:]],
        cwd=home, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, **how,
    )  # fmt: skip


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    err = process.communicate()[1].decode(errors="replace").replace("\r", "\n").strip()
    return process.returncode, err.splitlines()[-1] if err else ""


def bits(home: Path) -> dict[str, str]:
    """Of all that has its final name: its checksum; of what varies between whole runs, only the part that may not."""
    found = {}
    for path in sorted(home.rglob("*")):
        name = str(path.relative_to(home))
        if (
            any(part.startswith(".") or part in ("cache", "__pycache__") for part in name.split("/"))
            or not path.is_file()
        ):
            continue
        if path.name == "result.json":
            content = json.loads(path.read_text())
            found[name] = json.dumps([content["after"], content["options"], content["flagged"]], sort_keys=True)
        elif path.suffix in (".pt", ".pickle"):  # the archive notes its file's name
            with zipfile.ZipFile(path) as archive:
                held = [archive.read(member) for member in archive.namelist() if "/data" in member]
            found[name] = hashlib.sha256(b"".join(held)).hexdigest()
        elif path.suffix not in (".log", ".png", ".csv") or path.parent.name.isdecimal():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def half_written(home: Path) -> list[str]:
    """Finished-looking folders without their last file, and temporary files that are no folder's to clear."""
    wrong = [str(p) for p in home.rglob("*.partial") if p.is_file()]
    for folder in [*home.glob("record/*"), *home.glob("record/*/defense/*")]:
        if folder.name.startswith(".") or not folder.is_dir() or (folder / "failed.log").exists():
            continue
        if not (folder / "result.json").exists() and any(p.name != "defense" for p in folder.iterdir()):
            wrong.append(f"{folder} lacks result.json")
    return wrong


class Lab:
    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        self.rows: list[dict[str, Any]] = []
        self.base = folder / "base"
        (self.base / "photos").mkdir(parents=True)
        (self.base / "sweep.yaml").write_text(GRID)
        (self.base / "net.py").write_text(NET)
        for name in ("cat", "dog"):
            (self.base / "photos" / name).mkdir()
            for i in range(300):
                pixels = bytes(rng.randrange(256) for _ in range(192))
                Image.frombytes("RGB", (8, 8), pixels).save(self.base / "photos" / name / f"{i}.png")
        code, last = ended(start([*ATTACK[:-1], "tiny"], self.base))
        assert code == 0, last
        import torch

        torch.save({"1.weight": torch.zeros(2, 192), "1.bias": torch.zeros(2)}, self.base / "w.pt")

    def home(self) -> Path:
        home = self.folder / f"home{self.rng.randrange(10**9)}"
        shutil.copytree(self.base, home)
        return home

    def row(self, fault: str, what: str, times: int, lost: list[str], note: str = "") -> None:
        self.rows.append(
            {"fault": fault, "command": what, "times": times, "lost": len(lost), "note": note or "; ".join(lost)[:300]}
        )
        print(f"{fault:32} {what:10} {times:3} times, {len(lost)} lost {note or lost[:2]}", flush=True)


def kills(lab: Lab, what: str, argv: list[str], times: int) -> None:
    whole = lab.home()
    begin = time.monotonic()
    code, last = ended(start(argv, whole))
    length = time.monotonic() - begin
    assert code in (0, 3), last
    wanted, lost = bits(whole), []
    shutil.rmtree(whole)
    for _ in range(times):
        home = lab.home()
        before = bits(home)
        process = start(argv, home)
        time.sleep(lab.rng.uniform(0.3, 1.0) * length)
        with_group = process.poll() is None
        if with_group:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        after = bits(home)
        lost += [f"{name} changed" for name in before if after.get(name) != before[name]]
        lost += [f"{name} is not as in a whole run" for name in after if name in wanted and after[name] != wanted[name]]
        lost += half_written(home)
        code, last = ended(start(argv, home))
        if code not in (0, 3) and "exists" not in last:
            lost.append(f"the second run left with {code}: {last}")
        elif bits(home) != wanted:
            lost += [
                f"{n} differs after going on" for n in {**wanted, **bits(home)} if bits(home).get(n) != wanted.get(n)
            ]
        shutil.rmtree(home)
    lab.row("SIGKILL at a random moment", what, times, lost)


def stops(lab: Lab, what: str, argv: list[str], times: int) -> None:
    for sig in (signal.SIGINT, signal.SIGTERM):
        lost, slowest = [], 0.0
        for _ in range(times):
            home = lab.home()
            before = bits(home)
            process = start(argv, home, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
            time.sleep(lab.rng.uniform(6, 12))
            if process.poll() is None:
                used = _cpu(process.pid)
                process.send_signal(sig)
                begin = time.monotonic()
                code, last = ended(process)
                slowest = max(slowest, time.monotonic() - begin)
                if code not in (130, 0, 3):
                    lost.append(f"left with {code}: {last} (after {used:.1f} s of CPU)")
            lost += [f"{name} changed" for name, digest in before.items() if bits(home).get(name) != digest]
            lost += half_written(home)
            shutil.rmtree(home)
        lab.row(f"{sig.name} at a random moment", what, times, lost, f"slowest {slowest:.1f} s" * (not lost))


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def full_disk(lab: Lab, what: str, argv: list[str], rooms: list[int]) -> None:
    lost = []
    for room in rooms:
        home = lab.folder / "small"
        home.mkdir(exist_ok=True)
        size = sum(p.stat().st_size for p in lab.base.rglob("*") if p.is_file()) + 5000 * sum(
            1 for _ in lab.base.rglob("*")
        )
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size + room}", "ulrl", str(home)], check=True)
        try:
            shutil.copytree(lab.base, home, dirs_exist_ok=True)
            before = bits(home)
            code, last = ended(start(argv, home))
            if code not in (0, 2, 3) or (code == 2 and not last.startswith("ulrl: ")):
                lost.append(f"left with {code}: {last}")
            lost += [f"{name} changed" for name, digest in before.items() if bits(home).get(name) != digest]
            lost += half_written(home)
        finally:
            subprocess.run(["umount", str(home)], check=True)
    lab.row("disk full (tmpfs)", what, len(rooms), lost)


def read_only(lab: Lab, what: str, argv: list[str]) -> None:
    """On a mount without write permission, as root may write anywhere else."""
    home = lab.home()
    subprocess.run(["mount", "--bind", "-o", "ro", str(home), str(home)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(home)], check=True)
    try:
        before = bits(home)
        code, last = ended(start(argv, home))
        lost = [] if (code == 2 and last.startswith("ulrl: ")) or code in (0, 3) else [f"left with {code}: {last}"]
        lost += [f"{name} changed" for name, digest in before.items() if bits(home).get(name) != digest]
    finally:
        subprocess.run(["umount", str(home)], check=True)
    lab.row("read-only folder", what, 1, lost)


def writers(lab: Lab, what: str, argv: list[str], count: int) -> None:
    whole, home = lab.home(), lab.home()
    ended(start(argv, whole))
    all_of_them = [start(argv, home) for _ in range(count)]
    ends = [ended(process) for process in all_of_them]
    lost = [f"left with {code}: {last}" for code, last in ends if code not in (0, 2, 3)]
    lost += [] if any(code in (0, 3) for code, _ in ends) else ["none came to an end"]
    wanted = bits(whole)
    lost += [f"{name} differs" for name in wanted if bits(home).get(name) != wanted[name]] + half_written(home)
    lab.row(f"{count} writers at once", what, 1, lost)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="SIGKILLs of each command")
    parser.add_argument("--only", default="", help="what to try: kills, stops, disk, readonly or writers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "faults.json")
    args = parser.parse_args()
    commands = {"attack": ATTACK, "defense": DEFENSE, "sweep": SWEEP, "compare": COMPARE, "cache": CACHE}
    tries: dict[str, Callable[[Lab, str, list[str]], None]] = {
        "disk": lambda lab, what, argv: full_disk(lab, what, argv, [0, 20_000, 200_000, 1_000_000]),
        "readonly": read_only,
        "writers": lambda lab, what, argv: [writers(lab, what, argv, n) for n in (2, 8)] and None,
        "stops": lambda lab, what, argv: stops(lab, what, argv, 2),
        "kills": lambda lab, what, argv: kills(lab, what, argv, args.kills),
    }
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder), random.Random(args.seed))
        for name, attempt in tries.items():
            if args.only in ("", name):
                for what, argv in commands.items():
                    attempt(lab, what, argv)
                    args.out.write_text(json.dumps(lab.rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
