"""docs/reliability.md out of what the runs recorded:  python bench/reliability.py

It reads, of bench/results, `hostile.xml` (`pytest tests/hostile --whole --junitxml` it), `fuzz.json`
(bench/fuzz.py), `faults.json` (bench/faults.py), `audit.txt` (sh/audit.py), and `reader.json`, which `--measure` writes:
the cost of the reader on a good file. A run that is not there yet is said to be missing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
sys.path.insert(0, str(ROOT))

DOORS = (
    ("weights", "weights of one's own model"), ("images", "folders of images"), ("YAML", "options files"),
    ("sweep", "sweep files and locks"), ("a sweep", "sweep files and locks"), ("result", "results of runs"),
    ("report", "results of runs"), ("plot", "results of runs"), ("--out", "results of runs"), ("image", "images of a record"),
    ("pickle", "pickles of a record"), ("record calls", "pickles that call"), ("record names", "pickles that call"),
    ("weight", "contents of a record"), ("record with", "contents of a record"),
    ("patch", "pictures and arrays of attacks"), ("array", "pictures and arrays of attacks"),
    ("result that came", "results kept in a record"), ("data set", "files of data sets"),
)  # fmt: skip


RUNS, STOPPED = "attack defense sweep compare cache", "attack defense sweep compare purify report"
FAULTS = {  # of bench/faults.py, and the commands that each is for
    "SIGKILL at a random moment": RUNS, "disk full (tmpfs)": RUNS, "read-only folder": RUNS,
    "2 writers at once": RUNS, "8 writers at once": RUNS, "clock and file times moved": RUNS,
    "SIGINT at a random moment": STOPPED, "SIGTERM at a random moment": STOPPED,
    "Ray's worker killed in a job": "sweep", "SIGTERM of a sweep on Ray": "sweep",
}  # fmt: skip


def measure() -> dict[str, Any]:
    """Seconds to read a ResNet-18 (45 MB) by us and by torch, medians of nine, in turns."""
    import torch

    from ulrl.models import build_model
    from ulrl.untrusted.torchfiles import load_torch

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "resnet18.pt"
        torch.save({"model": build_model("resnet18", 10).state_dict()}, file)
        ours, theirs = [], []
        for _ in range(9):
            for spent, reads in ((ours, load_torch), (theirs, lambda f: torch.load(f, weights_only=True))):
                start, before = time.perf_counter(), os.times()
                reads(file)
                cpu = sum(os.times()[:4]) - sum(before[:4])  # also of the process that it started
                spent.append((cpu, time.perf_counter() - start))
        size = file.stat().st_size
    figures = {
        f"{who} {what}": statistics.median(pair[i] for pair in spent)
        for who, spent in (("ours", ours), ("torch", theirs))
        for i, what in enumerate(("cpu", "clock"))
    }
    return {"bytes": size, "load": os.getloadavg()[0], **figures}


def read(name: str) -> Any:
    file = RESULTS / name
    return json.loads(file.read_text()) if file.exists() else None


def hostile_rows() -> list[str]:
    file = RESULTS / "hostile.xml"
    if not file.exists():
        return ["It has not been run yet."]
    tried: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for case in ElementTree.parse(file).getroot().iter("testcase"):
        name = (case.get("name") or "").partition("[")[2]
        if name:
            door = next((door for start, door in DOORS if name.startswith(start)), "files, flags and archives")
            tried[door] += 1
            failed[door] += case.find("failure") is not None or case.find("error") is not None
    rows = [f"| {door} | {count} | {failed[door]} |" for door, count in sorted(tried.items())]
    return [
        "| door | cases | fell short |",
        "|---|---|---|",
        *rows,
        f"| **all** | {tried.total()} | {failed.total()} |",
    ]


def fuzz_lines(runs: Any) -> list[str]:
    if not runs:
        return ["It has not been run yet."]
    tried: Counter[str] = Counter()
    for run in runs:
        tried += Counter(run["tried"])
    found = [finding for run in runs for finding in run["found"]]
    return [
        "`bench/fuzz.py` damages whole files at random, and reads each as a command does, up to the page or the jobs that come",
        "of it. What is not refused was read as what it says, made again (a cache) or left out with a warning.", "",
        "| run | on the clock | of a processor | inputs | findings |", "|---|---|---|---|---|",
        *(
            f"| {i} | {run['seconds']:,} s | {run['cpu']} s | {run['inputs']:,} | {len(run['found'])} |"
            if "cpu" in run
            else f"| {i} | {run['seconds']:,} s | not measured | {run['inputs']:,} | {len(run['found'])} |"
            for i, run in enumerate(runs, 1)
        ), "",
        "| door | inputs |", "|---|---|", *(f"| {door} | {n:,} |" for door, n in sorted(tried.items())), "",
        "The torch file the whole way, the record and inspect go through the reader's own process.",
        *(f"Found at {f['door']}: {f['wrong'][:60]}... Mended: {f['mended']}." for f in found),
    ]  # fmt: skip


def fault_lines(faults: Any) -> list[str]:
    if not faults:
        return ["They have not been run yet."]
    history = [row for row in faults if "mended" in row]
    faults = [row for row in faults if "mended" not in row]
    times, lost = (sum(row[key] for row in faults) for key in ("times", "lost"))
    order = {fault: i for i, fault in enumerate(dict.fromkeys(row["fault"] for row in faults))}
    done = {(row["fault"], row["command"]) for row in faults}
    absent = {f: [c for c in commands.split() if (f, c) not in done] for f, commands in FAULTS.items()}
    missing = [f"{fault} ({', '.join(commands)})" for fault, commands in absent.items() if commands]
    rows = sorted(faults, key=lambda row: order[row["fault"]])
    return [
        f"`python -m bench.faults`, {times} faults, {lost} losses. After each, every run that had ended has its checksum of before",
        "or that of an undisturbed run, nothing is half-written under a final name; after all but the stops the command",
        "is run again and comes to the bits of an undisturbed run with no temporary file left. The runs are small (the digits,",
        "a network of width 4; the sweep has an attack and two defenses, `compare` two defenses) and begin in a process that",
        "has imported all, but for the stops and Ray, on a machine whose two cores were shared with many others. `cache` is a folder of 600 images being converted.", "",
        "| fault | command | times | lost | |", "|---|---|---|---|---|",
        *(f"| {r['fault']} | {r['command']} | {r['times']} | {r['lost']} | {r['note']} |" for r in rows), "",
        *(["**Not run yet**: " + "; ".join(missing) + ".", ""] if missing else []),
        "A kill between two renames, a few microseconds, leaves a replaced folder under a hidden name, and the next run of",
        "that name brings it back.",
        *(line for r in history for line in ("", f"**Found before, and mended**: {r['fault']}, {r['command']}, {r['lost']} losses in "
          f"{r['times']}: {r['mended']}.")),
    ]  # fmt: skip


def supply_lines() -> list[str]:
    lock, audit = ROOT / "requirements" / "ci.lock", RESULTS / "audit.txt"
    text = lock.read_text()
    packages = sum(line[:1].isalnum() for line in text.splitlines())
    said = audit.read_text().strip().removeprefix("ulrl: ") if audit.exists() else "not run yet"
    return [
        f"`requirements/ci.lock` names {packages} packages with {text.count('--hash=')} hashes; torch, torchvision and CUDA's",
        f"libraries are pinned by version only. `sh/audit.py`, where this page was made: {said}.",
        "`cyclonedx-py environment .venv/bin/python` prints the SBOM.",
    ]


OPEN = (
    "**A power cut, or a system that crashes.** Files get their names when they are whole, but nothing is forced to the disk "
    "(no `fsync`): what was written in the last half minute may be missing or empty.",
    "**A kill while a single file is written** (`--out`, `--export`, a figure, an entry of the cache of judgements) leaves a "
    "temporary file, `.NAME.*.partial`, beside it. What had the name before is whole.",
    "**File systems without locks** (some NFS). Two runs of one name are not kept apart there; a sweep refuses to start.",
    "**Ctrl-C within two seconds on the clock, on any machine.** Three moments of each command took at most 1.9 s at a load "
    "of 3 on two cores; at a load of 20 one took 22 s, of which 1.5 s were of a processor.",
    "**Ray between machines.** Its losses were tried on one machine, nodes as processes.",
    "**Advisories.** No database of them was reachable; CI asks where one is.",
    "**More than was tried.** Random damage ran for less than two hours on the clock, on a shared machine, and a kill's moment is a draw.",
)


def page() -> str:
    fuzz, faults, reader = read("fuzz.json"), read("faults.json"), read("reader.json")
    lines = [
        "# Reliability", "",
        "What was tried, how often, and what was lost. `python bench/reliability.py` writes this page out of the",
        "figures that the runs recorded in `bench/results/`; what is promised, and what is not, is in",
        "[SECURITY.md](../SECURITY.md).", "",
        "## Hostile files", "",
        "Generated files at every door (`pytest tests/hostile --whole`), each in a process with 2 GiB of memory beyond",
        "its own: exit code 2 and one printable line of at most 400 characters where it is refused, under 20 s of a",
        "processor, the canary untouched and all files as they were.", "",
        *hostile_rows(), "",
    ]  # fmt: skip
    if reader:
        lines += [
            f"On a good file of {reader['bytes'] / 1e6:.0f} MB the reader takes {reader['ours cpu']:.2f} s of a processor, its "
            f"own process with it, and `torch.load` {reader['torch cpu']:.2f} s (medians of nine). On the clock these were",
            f"{reader['ours clock']:.2f} s and {reader['torch clock']:.2f} s, with a load of {reader['load']:.0f} on two cores.",
            "",
        ]  # fmt: skip
    lines += ["## Random damage", "", *fuzz_lines(fuzz), "", "## Faults", "", *fault_lines(faults), ""]
    lines += [
        "## Convert and look", "",
        "`ulrl inspect FILE` names what a pickle asks for by its opcodes, opens nothing, and is one of the doors",
        "above; `ulrl convert RECORD --to safetensors` and back gives the same tensors, images and labels",
        "(`tests/test_converting.py`).", "",
        "## Supply chain", "", *supply_lines(), "",
        "## Still not promised", "", "Beside what [SECURITY.md](../SECURITY.md#what-is-not-promised) names:", "",
        *(f"- {line}" for line in OPEN),
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure the reader's cost first")
    if parser.parse_args().measure:
        (RESULTS / "reader.json").write_text(json.dumps(measure(), indent=1) + "\n")
    (ROOT / "docs" / "reliability.md").write_text(page())


if __name__ == "__main__":
    main()
