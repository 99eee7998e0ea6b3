from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from pathlib import Path

import torch

import bench.faults
from bench.faults.endings import kills, ray, stops
from bench.faults.lab import COMMANDS, LONG, Lab
from bench.faults.processes import ROOT
from bench.faults.surroundings import clock, full_disk, read_only, writers

TRIES = {
    "clock": clock, "readonly": read_only, "disk": full_disk, "writers": writers, "stops": stops, "kills": kills,
    "ray": ray,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=bench.faults.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    lost = sum(int(str(row["lost"])) for row in lab.rows if "mended" not in row)
    print(f"{used:.0f} s of a processor, {lost} lost in all")


if __name__ == "__main__":
    main()
