"""Random damage at every reader:  python bench/fuzz.py --seconds 3600

Whole files of each kind are damaged (bytes flipped, cut, doubled, swapped for telling values; pickles also on their
own, with checksums that fit) and go through the door that they have: what reads them for a command, up to the page or
the jobs that come of it. An input is a finding when that raises anything but a UserError, takes over two seconds of a
processor (a sweep: twenty, as it may ask for 100,000 runs), over a gigabyte, or ends its process. Batches run in forked
processes, so that a finding ends only its own. The torch reader is tried inside `reader`, whose own limits would
otherwise hide what is slow or ends it (too little memory is a refusal there), and the whole way, in its child process,
by `load_torch`, `load_record` and `ulrl inspect`. bench/results/fuzz.json says how many inputs were tried at each door,
how many of these were refused, how much of a processor that took, and what was found, run by run.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # another takes a gigabyte of addresses, of no memory, at once

import fabricated  # noqa: E402
import peer_records as peer  # noqa: E402

from ulrl.configure import DefenseRun  # noqa: E402
from ulrl.converting import inspect_file  # noqa: E402
from ulrl.data.cache import _map  # noqa: E402
from ulrl.errors import UserError  # noqa: E402
from ulrl.record import load_record  # noqa: E402
from ulrl.report.page import render  # noqa: E402
from ulrl.report.results import find_runs  # noqa: E402
from ulrl.runs.given import clean_index  # noqa: E402
from ulrl.sweep.grid import read_sweep  # noqa: E402
from ulrl.untrusted.images import opened_image, read_png  # noqa: E402
from ulrl.untrusted.reader import process  # noqa: E402
from ulrl.untrusted.texts import read_yaml  # noqa: E402
from ulrl.untrusted.torchfiles import load_torch  # noqa: E402
from ulrl.untrusted.weights import load_weights  # noqa: E402

BATCH = 25
MEMORY, SECONDS, SWEEP_SECONDS = 1 << 30, 2, 20
TELLING = [
    b"\0", b"\xff", b"\x7f\xff\xff\xff", b"\xff" * 8, b"\0" * 8, b"PK\3\4", b"PK\1\2", b"\x80\x02", b".", b"R", b"Q",
    b"b", b"\x85", b"}", b"(", b"t", b"q\x00", b"h\x00", b"-1", b"1e999", b"9" * 500, b"[" * 500, b"{", b"\x1b[2J",
    b"\n", b"&a *a",
]  # fmt: skip

Read = Callable[[Path, bytes], object]


def in_reader(file: Path, content: bytes) -> object:
    """As `process.main` does it, which answers all that is raised there, too little memory with it, by a refusal."""
    try:
        answer, _ = process.read(io.BytesIO(content), len(content))
        return json.dumps(answer)
    except Exception as error:
        raise UserError(str(error)) from None


def from_file(read: Callable[[Path], object]) -> Read:
    def run(file: Path, content: bytes) -> object:
        file.write_bytes(content)
        return read(file)

    return run


def decoded(file: Path) -> object:
    with opened_image(file) as image:
        return np.asarray(image.convert("RGB"))


def record_with(file: Path, content: bytes) -> object:
    folder = file.parent / "record"
    if not folder.exists():
        folder.mkdir()
        peer.content(folder)
    (folder / "attack_result.pt").write_bytes(content)
    return load_record(folder)


def result_with(file: Path, content: bytes) -> object:
    """Into the page, unless it is left out, which is a refusal."""
    folder = file.parent / "results" / "one"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / {".json": "result.json", ".csv": "neurons.csv"}[file.suffix]).write_bytes(content)
    if file.suffix == ".csv":
        (folder / "result.json").write_text(json.dumps(fabricated.result()))
    runs, left_out = find_runs(folder.parent)
    if left_out:
        raise UserError(left_out[0])
    return render(runs, left_out, folder.parent)


def seeds(folder: Path) -> dict[str, list[tuple[bytes, str, Read]]]:
    """By kind of file: whole ones, the ending that they have, and what reads them."""

    def saved(content: object, **how: bool) -> bytes:
        torch.save(content, buffer := io.BytesIO(), **how)
        return buffer.getvalue()

    content = peer.content(folder)
    records = [
        saved(content),
        saved({**content, "bd_train": None}),
        saved(content, _use_new_zipfile_serialization=False),
    ]
    weights = {"a": torch.arange(6.0).view(2, 3).t(), "b": torch.zeros(3, dtype=torch.int64)}
    pictures = []
    for form, mode in (("PNG", "RGB"), ("PNG", "P"), ("PNG", "L"), ("JPEG", "RGB"), ("BMP", "RGB"), ("TIFF", "RGB"),
                       ("WEBP", "RGB"), ("PPM", "RGB")):  # fmt: skip
        pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)).convert(mode)
        pixels.save(buffer := io.BytesIO(), form)
        pictures.append((buffer.getvalue(), form))
    sweeps = [file.read_bytes() for file in sorted((ROOT / "config" / "sweep").glob("*.yaml"))]
    yamls = [file.read_bytes() for file in sorted((ROOT / "config").glob("*/*/*.yaml"))]
    np.save(array := io.BytesIO(), np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    result = json.dumps(fabricated.result()).encode()
    table = b"class,change,z,flagged\n0,1.5,2.5,True\n1,0.5,-1,False\n"
    inside = folder.resolve()
    return {
        "torch file, in the reader": [(r, ".pt", in_reader) for r in [*records, saved(weights)]],
        "torch file, the whole way": [(r, ".pt", from_file(load_torch)) for r in records],
        "record": [(r, ".pt", record_with) for r in records],
        "inspect": [(r, ".pt", from_file(inspect_file)) for r in [*records, saved(weights)]],
        "safetensors": [(safetensors.torch.save({k: w.contiguous() for k, w in weights.items()}), ".safetensors",
                         from_file(load_weights))],
        "options (YAML)": [(y, ".yaml", from_file(read_yaml)) for y in yamls],
        "sweep file": [(y, ".yaml", from_file(lambda f: read_sweep(str(f)))) for y in sweeps],
        "result, up to the page": [(result, ".json", result_with)],
        "ranking (CSV), up to the page": [(table, ".csv", result_with)],
        "index file": [(b"0 1 2 17\n99\n", ".txt", from_file(lambda f: clean_index(DefenseRun(index=str(f)), 100)))],
        "cached array": [(array.getvalue(), ".npy", from_file(lambda f: _map(f, (2, 3, 4))))],
        "image": [(p, f".{form.lower()}", from_file(decoded)) for p, form in pictures],
        "PNG of a record": [(p, ".png", from_file(lambda f: read_png(f, (6, 5), inside, gray=False)))
                            for p, form in pictures if form == "PNG"],
    }  # fmt: skip


def damaged(whole: bytes, rng: random.Random) -> bytes:
    content = bytearray(whole)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        at = rng.randrange(len(content) + 1)
        match rng.randrange(6):
            case 0 if at < len(content):
                content[at] = rng.randrange(256)
            case 1:
                content[at:at] = rng.choice(TELLING)
            case 2:
                telling = rng.choice(TELLING)
                content[at : at + len(telling)] = telling
            case 3:
                del content[at : at + rng.choice([1, 2, 8, 100])]
            case 4:
                content[at:at] = content[at : at + rng.choice([4, 16, 200])] * rng.choice([1, 3])
            case 5 if rng.random() < 0.2:
                del content[at:]
    return bytes(content)


def pickle_damaged(whole: bytes, rng: random.Random) -> bytes:
    """Damage to the pickle alone, with checksums that fit."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.pt"
        file.write_bytes(whole)
        peer.rewrite(file, lambda data: damaged(data, rng))
        return file.read_bytes()


def an_input(corpus: list[tuple[bytes, str, Read]], rng: random.Random) -> tuple[bytes, str, Read]:
    whole, ending, read = rng.choice(corpus)
    deep = whole[:2] == b"PK" and rng.random() < 0.7
    return (pickle_damaged if deep else damaged)(whole, rng), ending, read


def batch(kind: str, corpus: list[tuple[bytes, str, Read]], seed: str, folder: Path) -> tuple[int, int, str]:
    """Read BATCH inputs in a forked process: how many were tried, how many of these refused, and what was wrong with
    the last of them, where it was neither read nor refused well: none is tried after it."""
    note = folder / "note"
    note.write_text("")
    child = os.fork()
    if child == 0:
        own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (own + MEMORY, own + MEMORY))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        rng, refused = random.Random(seed), 0
        for i in range(BATCH):
            content, ending, read = an_input(corpus, rng)
            (folder / "current").write_bytes(content)
            note.write_text(f"{i} {refused} ended its process")
            signal.setitimer(signal.ITIMER_PROF, SWEEP_SECONDS if kind == "sweep file" else SECONDS)
            try:
                read(folder / f"input{ending}", content)
            except UserError as error:
                refused += 1
                if not str(error).isprintable() or len(str(error)) > 400:
                    note.write_text(f"{i} {refused} has a message that is not printable")
                    os._exit(1)
            except BaseException as error:
                note.write_text(f"{i} {refused} raises {type(error).__name__}: {error}".replace(f"{ROOT}/", "")[:300])
                os._exit(1)
            signal.setitimer(signal.ITIMER_PROF, 0)
        note.write_text(f"{BATCH - 1} {refused} ")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    last, refused, wrong = note.read_text().split(" ", 2)
    return int(last) + 1, int(refused), wrong and f"{wrong} (exit {code})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="how long, on the clock")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "fuzz.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tried: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    found: list[dict[str, str]] = []
    start, number = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpora = seeds(folder)
        earlier = json.loads(args.out.read_text()) if args.out.exists() else []
        while time.monotonic() - start < args.seconds:
            number += 1
            for kind, corpus in corpora.items():
                seed = f"{args.seed} {number} {kind}"
                yes, no, wrong = batch(kind, corpus, seed, folder)
                tried[kind] += yes
                refused[kind] += no
                if wrong:
                    content = (folder / "current").read_bytes()
                    found.append({"door": kind, "wrong": wrong, "seed": seed, "input": content[:4000].hex()})
                    print(f"{kind}: {wrong}", flush=True)
                spent = {"seconds": round(time.monotonic() - start), "cpu": round(sum(os.times()[:4]))}
                about = {**spent, "inputs": tried.total(), "tried": tried, "refused": refused, "found": found}
                args.out.write_text(json.dumps([*earlier, about], indent=1) + "\n")
    print(f"{tried.total()} inputs in {spent['seconds']} s ({spent['cpu']} s of a processor), {len(found)} findings")
    for kind, count in tried.items():
        print(f"  {kind}: {count}, {refused[kind]} of them refused")


if __name__ == "__main__":
    main()
