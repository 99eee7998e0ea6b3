"""The process that reads a torch file: `main(what, memory, seconds)`, with the file as its standard input.

It knows the standard library only, no torch, so it starts in some 40 ms. Before it reads a byte it gives up memory,
time, and the right to open anything: no file, no socket. Tensors are described, not read: torch stores their bytes
plain, so the caller takes them from the file at the places given here.

The answer on stdout is the length of a JSON text (8 bytes, little-endian), the text, and the bytes of numpy arrays.
"""

from __future__ import annotations

import gc
import io
import json
import resource
import struct
import sys
from typing import Any, BinaryIO, NoReturn

from ulrl.untrusted.reader.answer import ANSWER, Answer
from ulrl.untrusted.reader.archives import is_zip, read_legacy, read_zip
from ulrl.untrusted.reader.names import look
from ulrl.untrusted.reader.stand_ins import Refused


def read(file: BinaryIO, size: int) -> tuple[dict[str, Any], list[bytes]]:
    content, storages = (read_zip if is_zip(file) else read_legacy)(file, size)
    answer = Answer()
    tree = answer.of(content)
    places = {key: [storage.offset, storage.nbytes] for key, storage in storages.items()}
    return {"tree": tree, "tensors": answer.tensors, "arrays": answer.arrays, "storages": places}, answer.blob


def _limits(memory: int, seconds: int) -> None:
    for what, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 3),  # those that are open: nothing else can be opened any more
    ):
        hard = resource.getrlimit(what)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (limit, limit))


def main(what: str, memory: str, seconds: str) -> NoReturn:
    gc.disable()
    for encoding in (
        "cp437",
        "ascii",
        "latin-1",
    ):  # of names in a zip and texts in a pickle: they cannot be loaded later
        "".encode(encoding)
    _limits(int(memory), int(seconds))
    blob: list[bytes] = []
    try:
        file = sys.stdin.buffer
        size = file.seek(0, io.SEEK_END)
        answer, blob = (read if what == "read" else look)(file, size)
        text = json.dumps(answer, separators=(",", ":")).encode()
        if len(text) > ANSWER:
            raise Refused("large", f"more than {ANSWER} bytes of values")
    except Refused as error:
        text, blob = _refusal(error.kind, error.detail), []
    except MemoryError:
        text, blob = _refusal("memory", ""), []
    except Exception as error:  # whatever pickle makes of a stranger's bytes
        text, blob = _refusal("damaged", f"{type(error).__name__}: {error}"), []
    sys.stdout.buffer.write(struct.pack("<q", len(text)) + text)
    for part in blob:
        sys.stdout.buffer.write(part)
    sys.stdout.buffer.flush()
    sys.exit(0)


def _refusal(kind: str, detail: str) -> bytes:
    return json.dumps({"refused": kind, "detail": detail[:300]}).encode()
