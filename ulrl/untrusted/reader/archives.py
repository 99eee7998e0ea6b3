"""Torch files: zip archives, and pickles one after another from before torch 1.6; whole in every byte."""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable
from typing import Any, BinaryIO

from ulrl.untrusted.reader.stand_ins import Refused, Storage, Unpickler

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch files from before the zip format
PICKLE = 256 << 20  # bytes
MEMBERS = 200_000
BLOCK = 1 << 20
PROGRAM = "a TorchScript program"


def read_zip(file: BinaryIO, size: int) -> tuple[Any, dict[str, Storage]]:
    places = check_zip(file, size)
    pickles = [name for name in places if re.fullmatch(r"[^/]*/data\.pkl", name)]
    if len(pickles) != 1:
        raise Refused("damaged", f"{len(pickles)} pickles instead of one")
    root = pickles[0].removesuffix("data.pkl")
    if _is_program(places):
        raise Refused("global", PROGRAM)
    if f"{root}byteorder" in places and bytes_at(file, *places[f"{root}byteorder"]) != b"little":
        raise Refused("damaged", "bytes in another order than this machine's")
    data = {name.removeprefix(f"{root}data/"): place for name, place in places.items() if "/data/" in name}
    unpickler = Unpickler(io.BytesIO(bytes_at(file, *places[pickles[0]])), data)
    return unpickler.load(), unpickler.storages


def check_zip(file: BinaryIO, size: int) -> dict[str, tuple[int, int]]:
    """Where each member's bytes lie, once all are found to be plain, whole, apart and as their checksums say."""
    try:
        members = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, struct.error, OSError, ValueError) as error:
        raise Refused("damaged", f"the end of the archive is missing or damaged: {error}") from None
    if len(members) > MEMBERS:
        raise Refused("large", f"{len(members)} members in the archive")
    places: dict[str, tuple[int, int]] = {}
    for member in members:
        name = member.orig_filename
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            if _is_program(other.orig_filename for other in members):  # whose code is compressed
                raise Refused("global", PROGRAM)
            raise Refused("damaged", f"{name[:80]} is compressed, as torch.save never does")
        header = bytes_at(file, member.header_offset, 30) if 0 <= member.header_offset < size else b""
        if len(header) < 30 or header[:4] != b"PK\3\4" or member.flag_bits & 1:
            raise Refused("damaged", f"{name[:80]} has no header in the archive")
        lengths = struct.unpack("<HH", header[26:30])
        offset = member.header_offset + 30 + sum(lengths)
        if offset + member.file_size > size or name in places:
            raise Refused("damaged", f"{name[:80]} is there twice, or longer than the archive")
        places[name] = offset, member.file_size
    end = 0
    for offset, nbytes in sorted(places.values()):
        if offset < end:
            raise Refused("damaged", "members of the archive lie over one another")
        end = offset + nbytes
    for member in members:
        offset, nbytes = places[member.orig_filename]
        file.seek(offset)
        crc = 0
        for start in range(0, nbytes, BLOCK):
            crc = zlib.crc32(file.read(min(BLOCK, nbytes - start)), crc)
        if crc != member.CRC:
            raise Refused("damaged", f"the checksum of {member.orig_filename[:80]} is wrong")
    return places


def _is_program(names: Iterable[str]) -> bool:
    return any(re.match(r"[^/]*/(code/|constants\.pkl$)", name) for name in names)


def read_legacy(file: BinaryIO, size: int) -> tuple[Any, dict[str, Storage]]:
    """Torch files from before 1.6: pickles one after another, then the storages, each with its length."""
    for wanted in (MAGIC, PROTOCOL):
        if Unpickler(file, {}).load() != wanted:
            raise Refused("damaged", "not as torch.save writes")
    about = Unpickler(file, {}).load()
    if type(about) is dict and about.get("little_endian") is False:
        raise Refused("damaged", "bytes in another order than this machine's")
    unpickler = Unpickler(file, None)
    content = unpickler.load()
    keys = Unpickler(file, {}).load()
    if type(keys) is not list or not all(type(k) is str for k in keys) or sorted(keys) != sorted(unpickler.storages):
        raise Refused("damaged", "not the storages that its tensors are in")
    for key in keys:
        storage = unpickler.storages[key]
        header = file.read(8)
        storage.offset = file.tell()
        if len(header) < 8 or storage.nbytes != struct.unpack("<q", header)[0] * storage.dtype.itemsize:
            raise Refused("damaged", f"storage {key[:40]} is of another size")
        if storage.offset + storage.nbytes > size:
            raise Refused("damaged", "its end is missing")
        file.seek(storage.offset + storage.nbytes)
    return content, unpickler.storages


def is_zip(file: BinaryIO) -> bool:
    file.seek(0)
    start = file.read(4)
    file.seek(0)
    return start == b"PK\3\4"


def bytes_at(file: BinaryIO, offset: int, nbytes: int) -> bytes:
    if nbytes > PICKLE:
        raise Refused("large", f"a pickle of {nbytes} bytes")
    file.seek(offset)
    return file.read(nbytes)
