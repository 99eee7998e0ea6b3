"""Pickles that no honest program writes, as opcodes."""

from __future__ import annotations

import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

GADGETS = """os.system posix.system nt.system builtins.eval builtins.exec builtins.__import__ builtins.getattr builtins.open
builtins.compile builtins.breakpoint builtins.input builtins.setattr builtins.type builtins.object functools.partial
functools.reduce operator.attrgetter operator.methodcaller subprocess.Popen subprocess.check_output importlib.import_module
runpy.run_path
runpy._run_code shutil.rmtree shutil.copy pickle.loads _pickle.loads marshal.loads types.FunctionType
types.CodeType copyreg._reconstructor copyreg.__newobj__ ctypes.CDLL code.interact pty.spawn pdb.run timeit.timeit
webbrowser.open socket.socket asyncio.run codecs.open io.open _io.FileIO tempfile.mktemp pathlib.Path torch.load
torch.hub.load torch.ops.load_library torch.jit.load torch.storage._load_from_bytes torch.serialization.load
torch._dynamo.config.debug torch.utils.cpp_extension.load numpy.load numpy.fromfile numpy.memmap
numpy.core.multiarray.fromfile numpy.core._multiarray_umath.frombuffer numpy.testing._private.utils.runstring
collections.namedtuple collections.defaultdict enum.Enum string.Formatter.format idlelib.pyshell.main
__main__.anything torch.nn.modules.linear.Linear argparse.Namespace random.Random datetime.datetime""".split()


def call(name: str, canary: Path) -> bytes:
    """`name` called with a command that would touch the canary, in protocol 2, as torch writes."""
    module, _, attribute = name.rpartition(".")
    return b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + text(f"touch {canary}") + b"\x85R."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def stack_call(module: str, name: str, canary: Path) -> bytes:
    """By the two texts on the stack (protocol 4), also with a dotted name, which `getattr` would walk along."""
    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(f"touch {canary}") + b"\x85R."


def reduced(*opcodes: bytes) -> bytes:
    return b"\x80\x02" + b"".join(opcodes) + b"."


def integer(value: int) -> bytes:
    return b"\x8a" + bytes([len(raw := pickle.encode_long(value))]) + raw


def colliding(count: int) -> bytes:
    """A mapping whose whole-number keys all have one hash."""
    step = sys.hash_info.modulus
    return reduced(b"}(", *(integer(i * step) + b"N" for i in range(1, count)), b"u")


def exploding(depth: int) -> bytes:
    """A key of tuples in tuples: two of the one below each, so that hashing it takes 2 to the depth."""
    return reduced(b"}", b"N\x85q\x00", *(b"0h\x00h\x00\x86q\x00" for _ in range(depth)), b"Ns")


def arrays(count: int, nbytes: int) -> bytes:
    """Arrays of bytes, all made of the same ones."""
    raw = b"B" + struct.pack("<I", nbytes) + bytes(nbytes) + b"q\x000"
    dtype = b"cnumpy\ndtype\n" + text("u1") + b"\x85Rq\x010"
    array = b"cnumpy._core.multiarray\n_reconstruct\n)R(K\x01" + integer(nbytes) + b"\x85h\x01\x89h\x00tb"
    return b"\x80\x03" + raw + dtype + b"](" + array * count + b"e."


def rewritten(
    file: Path, change: Callable[[bytes], bytes], member: str = "data.pkl", compress: int = zipfile.ZIP_STORED
) -> None:
    """Change a member of a torch file, checksums and all."""
    with zipfile.ZipFile(file) as old:
        members = [(name, old.read(name)) for name in old.namelist()]
    with zipfile.ZipFile(new := file.with_suffix(".new"), "w", compress) as archive:
        for name, data in members:
            archive.writestr(name, change(data) if name.endswith(f"/{member}") else data)
    new.replace(file)


def raw_zip(members: list[tuple[str, bytes, dict[str, int]]]) -> bytes:
    """An archive in which each member may lie about itself: crc, size, flags, method, offset."""
    body, directory = b"", b""
    for name, data, lies in members:
        crc, size = lies.get("crc", zlib.crc32(data)), lies.get("size", len(data))
        about = struct.pack(
            "<HHHHHIIIHH", 20, lies.get("flags", 0), lies.get("method", 0), 0, 33, crc, size, size, len(name), 0
        )
        offset = lies.get("offset", len(body))
        body += b"PK\3\4" + about + name.encode() + data
        directory += (
            b"PK\1\2" + struct.pack("<H", 20) + about + struct.pack("<HHHII", 0, 0, 0, 0, offset) + name.encode()
        )
    end = struct.pack("<HHHHIIH", 0, 0, len(members), len(members), len(directory), len(body), 0)
    return body + directory + b"PK\5\6" + end
