"""The names that the pickles of a torch file ask for, found by reading opcodes: none is opened."""

from __future__ import annotations

import io
import pickletools
from typing import Any, BinaryIO

from ulrl.untrusted.reader.archives import bytes_at, check_zip, is_zip


def look(file: BinaryIO, size: int) -> tuple[dict[str, Any], list[bytes]]:
    """All names that the pickles of the file ask for, without opening one."""
    names: dict[str, None] = {}
    if is_zip(file):
        kind, places = "zip", check_zip(file, size)
        for name, place in places.items():
            if name.endswith(".pkl"):
                names |= dict.fromkeys(asked_for(io.BytesIO(bytes_at(file, *place))))
        members = len(places)
    else:
        kind, members = "pickle", 0
        while file.read(1) == b"\x80":  # each begins with its protocol, and the storages do not
            file.seek(-1, 1)
            members += 1
            names |= dict.fromkeys(asked_for(file))
    return {"kind": kind, "members": members, "names": list(names)}, []


def asked_for(file: Any) -> list[str]:
    """The names in a pickle, `module.name` each; of one that is put together from texts, the two latest texts."""
    found: list[str] = []
    texts: list[str] = []
    memo: dict[Any, list[str]] = {}
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            found.append(str(argument).replace(" ", ".", 1))
        elif opcode.name == "STACK_GLOBAL":
            found.append(".".join(texts[-2:]))
        elif "UNICODE" in opcode.name or "STRING" in opcode.name:
            texts = [*texts[-1:], str(argument)]
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = texts[-1:]
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = texts[-1:]
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            texts = [*texts[-1:], *memo.get(argument, [])][-2:]
        elif opcode.name in ("EXT1", "EXT2", "EXT4"):
            found.append(f"copyreg extension {argument}")
    return found
