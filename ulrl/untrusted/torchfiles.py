"""What `torch.save` wrote, read without torch's unpickler: another process says what is in it, and where.

That process (`reader`) has limits on memory and time and can open nothing, so whatever a pickle is made to do ends
there. Tensors are then taken from the file by their place.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from ulrl.errors import UserError
from ulrl.untrusted.opening import MIB, opened

MOST = 2048 * MIB  # bytes of a file
MEMORY = 1024 * MIB  # bytes that its pickle may need
SECONDS = 5  # of a processor, and one more per 200 MB, for the checksums
PATIENCE = 60  # seconds on the clock, for a slow disk
ROOT = Path(__file__).resolve().parents[2]  # where this package lies
READER = (
    "import sys; sys.path.append(sys.argv.pop(1)); from ulrl.untrusted.reader.process import main; main(*sys.argv[1:])"
)


@dataclass(frozen=True)
class Other:
    """Stands for what is no tensor, number, text, list or mapping, such as a sparse tensor; `what` names it."""

    what: str


def load_torch(file: str | os.PathLike[str], *, most: int = MOST, inside: Path | None = None) -> Any:
    """The content of a torch file: mappings, lists, tuples, numbers, texts, CPU tensors, numpy arrays and `Other`.

    Tensors are plain: not sparse, not on `meta`, within their storage; those that shared one still do. Mappings have
    keys that are texts or whole numbers.

    Args:
        most: bytes that the file may have.
        inside: the real folder in which it must lie, after following links.

    Raises:
        UserError: it is not there or not readable, damaged in any byte, asks to run code, or for too much memory
            or time.
    """
    with opened(file, most, inside) as content:
        answer, blob = _ask("read", file, content)
        return _Decoder(file, content, answer, blob).value(answer["tree"])


def look_into(file: str | os.PathLike[str]) -> dict[str, Any]:
    """What kind of file it is (`kind`: zip or pickle), its number of `members`, and the `names` its pickles ask for.

    Raises:
        UserError: as `load_torch`, but for names: none is refused.
    """
    with opened(file, MOST) as content:
        return _ask("look", file, content)[0]


def _ask(what: str, file: str | os.PathLike[str], content: BinaryIO) -> tuple[dict[str, Any], memoryview]:
    """The reader's answer: its JSON, and the bytes after it."""
    size = os.fstat(content.fileno()).st_size
    limits = str(MEMORY), str(SECONDS + size // 200_000_000)
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", READER, str(ROOT), what, *limits],
        stdin=content, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for this process, which then ends that one
    )  # fmt: skip
    try:
        said = memoryview(process.communicate(timeout=PATIENCE + size / 20e6)[0])
    except subprocess.TimeoutExpired:
        raise UserError(f"{file} takes over {PATIENCE} s to read, and was given up; copy it to a faster disk") from None
    finally:
        process.kill()
        process.wait()
    if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise UserError(f"{file} would take over {limits[1]} s to unpickle, and was refused; do not trust it")
    if process.returncode or len(said) < 8:
        raise _unreadable(file, f"its pickle ended the reader with {process.returncode}")
    length = 8 + struct.unpack("<q", said[:8])[0]
    answer = json.loads(bytes(said[8:length]))
    if "refused" in answer:
        raise _refusal(file, answer["refused"], answer["detail"])
    return answer, said[length:]


PICKLED_IMAGES = (
    "keeps its images as pickled Python objects (a BackdoorBench v1 record, or one made in RAM mode), which "
    "cannot be opened safely; re-save it with BackdoorBench v2 or main, which write PNG files"
)


def _refusal(file: str | os.PathLike[str], kind: str, detail: str) -> UserError:
    if kind == "global" and detail.startswith("PIL."):
        return UserError(f"{file} {PICKLED_IMAGES}")
    if kind == "global":
        return UserError(
            f"{file} asks to run {detail[:100]!r}, which no state dict needs, and was refused; if it is your own whole "
            "model, save its state_dict() instead; if not, do not trust it, and get it from a source you know"
        )
    if kind == "memory":
        return UserError(f"{file} would take over {MEMORY // MIB} MiB to unpickle, and was refused; do not trust it")
    if kind == "large":
        return UserError(f"{file} holds {detail}, more than is read of such a file; is it another one?")
    return _unreadable(file, detail)


def _unreadable(file: str | os.PathLike[str], detail: str) -> UserError:
    return UserError(f"{file} is no readable torch file ({detail[:120]}); if it is damaged, fetch it again")


class _Decoder:
    def __init__(
        self, file: str | os.PathLike[str], content: BinaryIO, answer: dict[str, Any], blob: memoryview
    ) -> None:
        self._file, self._content, self._blob = file, content, blob
        self._size = os.fstat(content.fileno()).st_size
        self._places: dict[str, tuple[int, int]] = answer["storages"]
        self._storages: dict[str, torch.Tensor] = {}
        self._tensors = [self._tensor(*about) for about in answer["tensors"]]
        self._arrays = [self._array(*about) for about in answer["arrays"]]

    def value(self, said: Any) -> Any:
        if type(said) is not list:
            return said
        match said[0]:
            case "d":
                values = iter(said[1:])
                return {key: self.value(value) for key, value in zip(values, values, strict=True)}
            case "l":
                return [self.value(value) for value in said[1:]]
            case "t":
                return tuple([self.value(value) for value in said[1:]])
            case "T":
                return self._tensors[said[1]]
            case "A":
                return self._arrays[said[1]]
        return Other(said[1])

    def _tensor(self, key: str, dtype: str, offset: int, shape: list[int], stride: list[int]) -> torch.Tensor | Other:
        kind = getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype):
            return Other(f"a tensor of type {dtype}")
        if 0 in shape:  # then its place is not looked at
            return torch.empty(shape, dtype=kind)
        if key not in self._storages:
            self._storages[key] = self._read(*self._places[key])
        return self._storages[key].view(kind).as_strided(shape, stride, offset)

    def _read(self, offset: int, nbytes: int) -> torch.Tensor:
        if not 0 <= offset <= offset + nbytes <= self._size:
            raise _unreadable(self._file, "its end is missing")
        storage = torch.empty(nbytes, dtype=torch.uint8)
        self._content.seek(offset)
        if nbytes and self._content.readinto(storage.numpy()) != nbytes:  # type: ignore[attr-defined]
            raise _unreadable(self._file, "its end is missing")
        return storage

    def _array(self, code: str, shape: list[int], offset: int, nbytes: int) -> np.ndarray[Any, Any]:
        array = np.frombuffer(self._blob[offset : offset + nbytes], code).reshape(shape)
        return array.astype(f"={code[1:]}", copy=False)  # in this machine's order of bytes
