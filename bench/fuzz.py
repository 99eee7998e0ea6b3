"""Random damage at every reader:  python bench/fuzz.py --seconds 3600

Whole files of each kind are damaged (bytes flipped, cut, doubled, swapped for telling values; pickles also on their
own, with checksums that fit) and read. An input is a finding when the reader raises anything but a UserError, takes
over two seconds of a processor, over a gigabyte, or ends its process. Batches run in forked processes, so that a
finding ends only its own. The torch reader is tried inside `_reader`, whose own limits would otherwise hide what is
slow or ends it (too little memory is a refusal there); some inputs go the whole way, through `load_torch` and
`load_record`. bench/results/fuzz.json says how many inputs were tried, by kind, and what was found.
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

import fabricated  # noqa: E402
import peer_records as peer  # noqa: E402

from ulrl.errors import UserError  # noqa: E402
from ulrl.record import load_record  # noqa: E402
from ulrl.untrusted import _reader  # noqa: E402
from ulrl.untrusted.images import opened_image, read_png  # noqa: E402
from ulrl.untrusted.texts import read_csv, read_json, read_yaml  # noqa: E402
from ulrl.untrusted.torchfiles import load_torch  # noqa: E402
from ulrl.untrusted.weights import load_weights  # noqa: E402

BATCH = 100
MEMORY, SECONDS = 1 << 30, 2
TELLING = [
    b"\0", b"\xff", b"\x7f\xff\xff\xff", b"\xff" * 8, b"\0" * 8, b"PK\3\4", b"PK\1\2", b"\x80\x02", b".", b"R", b"Q",
    b"b", b"\x85", b"}", b"(", b"t", b"q\x00", b"h\x00", b"-1", b"1e999", b"9" * 500, b"[" * 500, b"{", b"\x1b[2J",
    b"\n", b"&a *a",
]  # fmt: skip

Read = Callable[[Path, bytes], object]


def in_reader(file: Path, content: bytes) -> object:
    """As `_reader.main` does it, which answers all that is raised there, too little memory with it, by a refusal."""
    try:
        answer, _ = _reader.read(io.BytesIO(content), len(content))
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
    yamls = [file.read_bytes() for file in sorted((ROOT / "config").rglob("*.yaml"))]
    result = json.dumps(fabricated.result()).encode()
    inside = folder.resolve()
    return {
        "torch file, in the reader": [(r, ".pt", in_reader) for r in [*records, saved(weights)]],
        "torch file, the whole way": [(r, ".pt", from_file(load_torch)) for r in records],
        "record": [(r, ".pt", record_with) for r in records],
        "safetensors": [(safetensors.torch.save({k: w.contiguous() for k, w in weights.items()}), ".safetensors",
                         from_file(load_weights))],
        "YAML": [(y, ".yaml", from_file(read_yaml)) for y in yamls],
        "JSON": [(result, ".json", from_file(read_json))],
        "CSV": [(b"class,change,z,flagged\n0,1.5,2.5,True\n1,0.5,-1,False\n", ".csv", from_file(read_csv))],
        "image": [(p, f".{form.lower()}", from_file(decoded)) for p, form in pictures],
        "PNG of a record": [(p, ".png", from_file(lambda f: read_png(f, (6, 5), inside, gray=False)))
                            for p, form in pictures if form == "PNG"],
    }  # fmt: skip


SLOW = {"torch file, the whole way", "record"}  # a process each


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


def an_input(kind: str, corpus: list[tuple[bytes, str, Read]], rng: random.Random) -> tuple[bytes, str, Read]:
    whole, ending, read = rng.choice(corpus)
    deep = whole[:2] == b"PK" and rng.random() < 0.7
    return (pickle_damaged if deep else damaged)(whole, rng), ending, read


def batch(kind: str, corpus: list[tuple[bytes, str, Read]], seed: str, folder: Path, count: int, skip: int = 0) -> str:
    """Read `count` inputs in a forked process; "" or what was wrong with the first that was not read well."""
    note = folder / "note"
    note.write_text("")
    child = os.fork()
    if child == 0:
        own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (own + MEMORY, own + MEMORY))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        rng = random.Random(seed)
        for i in range(count):
            content, ending, read = an_input(kind, corpus, rng)
            if i < skip:
                continue
            (folder / "current").write_bytes(content)
            note.write_text(f"{i} ended its process")
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                read(folder / f"input{ending}", content)
            except UserError as error:
                if not str(error).isprintable() or len(str(error)) > 400:
                    note.write_text(f"{i} has a message that is not printable")
                    os._exit(1)
            except BaseException as error:
                note.write_text(f"{i} raises {type(error).__name__}: {error}"[:300])
                os._exit(1)
            signal.setitimer(signal.ITIMER_PROF, 0)
        note.write_text("")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return "" if code == 0 else f"{note.read_text()} (exit {code})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="how long, on the clock")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "fuzz.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tried: Counter[str] = Counter()
    found: list[dict[str, str]] = []
    start, number = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpora = seeds(folder)
        while (spent := time.monotonic() - start) < args.seconds:
            number += 1
            for kind, corpus in corpora.items():
                if kind in SLOW and number % 5:
                    continue
                count = 5 if kind in SLOW else BATCH
                seed = f"{args.seed} {number} {kind}"
                wrong = batch(kind, corpus, seed, folder, count)
                tried[kind] += count
                if wrong:
                    content = (folder / "current").read_bytes()
                    found.append({"kind": kind, "wrong": wrong, "seed": seed, "input": content[:4000].hex()})
                    print(f"{kind}: {wrong}", flush=True)
            about = {"seconds": round(spent), "inputs": sum(tried.values()), "tried": dict(tried), "found": found}
            args.out.write_text(json.dumps(about, indent=1) + "\n")
    print(f"{sum(tried.values())} inputs in {time.monotonic() - start:.0f} s, {len(found)} findings: {dict(tried)}")


if __name__ == "__main__":
    main()
