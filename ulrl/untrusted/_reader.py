"""A process of its own that says what a torch file holds: `python -I -S _reader.py read|look MEMORY SECONDS < FILE`.

It knows the standard library only, no torch, so it starts in some 40 ms. Before it reads a byte it gives up memory,
time, and the right to open anything: no file, no socket. Of a pickle it knows the names in `_NAMES`, bound to
stand-ins that keep what they are told; any other name ends it. Tensors are described, not read: torch stores their
bytes plain, so the caller takes them from the file at the places given here.

The answer on stdout is the length of a JSON text (8 bytes, little-endian), the text, and the bytes of numpy arrays.
"""

from __future__ import annotations

import gc
import io
import json
import math
import pickle
import pickletools
import re
import resource
import struct
import sys
import zipfile
import zlib
from typing import Any, BinaryIO, NoReturn

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch files from before the zip format
PICKLE = 256 << 20  # bytes
ANSWER = 128 << 20  # bytes of JSON
VALUES, DEPTH, MEMBERS = 5_000_000, 40, 200_000
BLOCK = 1 << 20


class Refused(Exception):
    """kind: what the caller makes its message of."""

    def __init__(self, kind: str, detail: str = "") -> None:
        self.kind, self.detail = kind, detail


class Plain:
    """Stand-ins take no state from a pickle."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise Refused("damaged", "sets the state of what has none")


class Dtype(Plain):
    """Of a tensor or, with the name of its storage class, of a storage."""

    __slots__ = ("itemsize", "name")

    def __init__(self, name: str, itemsize: int) -> None:
        self.name, self.itemsize = name, itemsize


class Storage(Plain):
    __slots__ = ("dtype", "key", "nbytes", "offset")

    def __init__(self, dtype: Dtype, key: str, nbytes: int, offset: int) -> None:
        self.dtype, self.key, self.nbytes, self.offset = dtype, key, nbytes, offset


class Tensor(Plain):
    __slots__ = ("dtype", "offset", "shape", "storage", "stride")

    def __init__(self, storage: Storage, dtype: Dtype, offset: int, shape: Any, stride: Any) -> None:
        self.storage, self.dtype, self.offset, self.shape, self.stride = storage, dtype, offset, shape, stride


class Other(Plain):
    """What has no place in a state dict, but may lie beside one."""

    __slots__ = ("what",)

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(self, *args: Any) -> Other:
        return self


class Call(Plain):
    """A function that a pickle may name."""

    __slots__ = ("function",)

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


class Mapping(dict[Any, Any]):
    """An OrderedDict or Counter, without the attributes that it is given (`_metadata`, and whatever else)."""

    def __setstate__(self, state: Any) -> None:
        pass


class NumpyDtype(Plain):
    """A plain number's type, never objects or records, whose state could declare bytes to be pointers."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        if not isinstance(code, str) or not re.fullmatch("[iu][1248]|f[248]|b1", code):
            raise Refused("damaged", f"an array of {str(code)[:40]}, not of numbers")
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = ">" if state[1] == ">" else "<"


class Array:
    __slots__ = ("code", "raw", "shape")

    def __init__(self) -> None:
        self.code, self.shape, self.raw = "f8", (0,), b""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        if type(dtype) is not NumpyDtype or type(raw) is not bytes or (fortran and len(shape) > 1):
            raise Refused("damaged", "an array of other things than numbers")
        if not _sizes(shape) or math.prod(shape) * int(dtype.code[1]) != len(raw):
            raise Refused("damaged", "an array whose shape and size differ")
        self.code, self.shape, self.raw = dtype.order + dtype.code, shape, raw


def _scalar(dtype: Any, raw: Any) -> Any:
    if type(dtype) is not NumpyDtype or type(raw) is not bytes:
        raise Refused("damaged", "a scalar of another type than a number")
    letter = {"b1": "?", "f2": "e", "f4": "f", "f8": "d"}.get(dtype.code)
    letter = letter or {"1": "b", "2": "h", "4": "i", "8": "q"}[dtype.code[1]]
    return struct.unpack(dtype.order + (letter.upper() if dtype.code[0] == "u" else letter), raw)[0]


def _encode(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise Refused("damaged", "an unusual encoding")
    return text.encode("latin-1")


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *more: Any) -> Tensor | Other:
    """more: requires_grad, hooks, and metadata that would make it another tensor."""
    return _tensor_of_type(storage, offset, shape, stride, None, None, getattr(storage, "dtype", None), *more[2:])


def _tensor_of_type(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> Tensor | Other:
    shape, stride = (tuple(x) if type(x) is list else x for x in (shape, stride))
    if metadata:
        return Other("a conjugate or negative view")
    if type(storage) is not Storage or type(dtype) is not Dtype:
        raise Refused("damaged", "a tensor without a plain storage")
    if not _sizes(shape) or not _sizes(stride) or len(shape) != len(stride) or type(offset) is not int or offset < 0:
        raise Refused("damaged", "a tensor without a shape")
    if (count := math.prod(shape)) > 0:
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        # A stride of 0 would make gigabytes of a few bytes.
        if max(last + 1, count) * dtype.itemsize > storage.nbytes or storage.nbytes % dtype.itemsize:
            return Other("a tensor that is larger than its storage")
    return Tensor(storage, dtype, offset, shape, stride)


def _inner(data: Any, *more: Any) -> Any:
    """A parameter's tensor."""
    return data if isinstance(data, (Tensor, Other)) else Other("a parameter without a tensor")


def _subclass(function: Any, kind: Any, args: Any, state: Any) -> Any:
    if not isinstance(function, (Call, Other)):
        raise Refused("damaged", "calls what is no function")
    return function(*args) if kind in (_TENSOR, _PARAMETER) else Other("a tensor of a class of its own")


def _sizes(values: Any) -> bool:
    return type(values) is tuple and len(values) <= 64 and all(type(n) is int and 0 <= n < 2**62 for n in values)


_DTYPES = {
    name: Dtype(name, size)
    for size, names in (
        (1, "uint8 int8 bool float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz"),
        (2, "int16 uint16 float16 bfloat16"),
        (4, "int32 uint32 float32"),
        (8, "int64 uint64 float64 complex64"),
        (16, "complex128"),
    )
    for name in names.split()
}
_UNTYPED = Dtype("untyped", 1)
_STORAGES = {
    "Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
    "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
    "ComplexFloat": "complex64", "ComplexDouble": "complex128",
}  # fmt: skip
_TENSOR, _PARAMETER, _NDARRAY = Other("a tensor's class"), Other("a parameter's class"), Other("an array's class")
_DICT, _BYTES = Call(lambda *items: Mapping(*items)), Call(lambda: b"")
_ODD = {
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor without data (on the device meta)",
    "_rebuild_wrapper_subclass": "a tensor of a class of its own",
    "_rebuild_device_tensor_from_numpy": "a tensor of another device",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
}
_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _DICT,
    ("collections", "Counter"): _DICT,
    ("_codecs", "encode"): Call(_encode),
    ("torch", "Size"): Call(lambda sizes=(): tuple(sizes)),
    ("torch", "device"): Other("a device"),
    ("torch", "Tensor"): _TENSOR,
    ("torch.nn.parameter", "Parameter"): _PARAMETER,
    ("torch.serialization", "_get_layout"): Other("a layout"),
    ("torch._utils", "_rebuild_tensor"): Call(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Call(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): Call(_tensor_of_type),
    ("torch._utils", "_rebuild_parameter"): Call(_inner),
    ("torch._utils", "_rebuild_parameter_with_state"): Call(_inner),
    ("torch._tensor", "_rebuild_from_type_v2"): Call(_subclass),
    ("torch", "UntypedStorage"): _UNTYPED,
    ("torch.storage", "UntypedStorage"): _UNTYPED,
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): Call(NumpyDtype),
    **{(f"numpy.{core}.multiarray", "_reconstruct"): Call(lambda *about: Array()) for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): Call(_scalar) for core in ("core", "_core")},
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    **{("torch", f"{name}Storage"): _DTYPES[dtype] for name, dtype in _STORAGES.items()},
    **{("torch._utils", name): Other(what) for name, what in _ODD.items()},
    **{("torch", f"per_{name}"): Other("a quantisation") for name in ("tensor_affine", "channel_affine")},
    **{("torch", f"{n}Storage"): Dtype("quantised", s) for n, s in (("QInt8", 1), ("QUInt8", 1), ("QInt32", 4))},
    **{
        (module, name): call
        for module in ("builtins", "__builtin__")  # of Python 3 and 2
        for name, call in (
            ("bytes", _BYTES),
            ("bytearray", Call(lambda *given: Other("bytes"))),
            ("set", Call(lambda items=(): list(items))),
            ("complex", Call(lambda *parts: list(parts))),
        )
    },
}


class Unpickler(pickle.Unpickler):
    """places: storage key to (offset, bytes) in the file, or None where the pickle comes before they are known."""

    def __init__(self, file: Any, places: dict[str, tuple[int, int]] | None) -> None:
        super().__init__(file)
        self.places = places
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[module, name]
        except KeyError:
            raise Refused("global", f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Storage:
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage" or (len(pid) == 6 and pid[5]):
            raise Refused("damaged", "a reference to no storage")
        _, dtype, key, _, count = pid[:5]
        if type(dtype) is not Dtype or type(key) is not str or type(count) is not int or not 0 <= count < 2**62:
            raise Refused("damaged", "a reference to no storage")
        if key not in self.storages:
            offset, nbytes = (0, count * dtype.itemsize) if self.places is None else self.places.get(key, (0, -1))
            self.storages[key] = Storage(dtype, key, nbytes, offset)
        storage = self.storages[key]
        if storage.dtype is not dtype or storage.nbytes != count * dtype.itemsize:
            raise Refused("damaged", f"storage {key[:40]} is not there, or of another size")
        return storage


def read_zip(file: BinaryIO, size: int) -> tuple[Any, dict[str, Storage]]:
    places = check_zip(file, size)
    pickles = [name for name in places if re.fullmatch(r"[^/]*/data\.pkl", name)]
    if len(pickles) != 1:
        raise Refused("damaged", f"{len(pickles)} pickles instead of one")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in places or any(name.startswith(f"{root}code/") for name in places):
        raise Refused("global", "a TorchScript program")
    if f"{root}byteorder" in places and _bytes(file, *places[f"{root}byteorder"]) != b"little":
        raise Refused("damaged", "bytes in another order than this machine's")
    data = {name.removeprefix(f"{root}data/"): place for name, place in places.items() if "/data/" in name}
    unpickler = Unpickler(io.BytesIO(_bytes(file, *places[pickles[0]])), data)
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
            raise Refused("damaged", f"{name[:80]} is compressed, as torch.save never does")
        header = _bytes(file, member.header_offset, 30) if 0 <= member.header_offset < size else b""
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


class Answer:
    """A pickle's content as JSON. A list or tuple is [its letter, values], a mapping ["d", key, value, ...]."""

    def __init__(self) -> None:
        self.tensors: list[Any] = []
        self.arrays: list[Any] = []
        self.blob: list[bytes] = []
        self._numbers: dict[int, int] = {}
        self._within: set[int] = set()
        self._values = self._characters = self._nbytes = 0

    def of(self, value: Any) -> Any:
        self._values += 1
        if self._values > VALUES:
            raise Refused("large", f"more than {VALUES} values")
        kind = type(value)
        if value is None or kind is bool or kind is float:
            return value
        if kind is str:
            self._characters += len(value)
            if self._characters > ANSWER // 6:
                raise Refused("large", "texts of many megabytes")
            return value
        if kind is int:
            return value if -(2**63) <= value < 2**64 else ["o", "a number of over 64 bits"]
        if kind is Tensor:
            return ["T", self._number(value, self.tensors, self._tensor)]
        if kind is Array:
            return ["A", self._number(value, self.arrays, self._array)]
        if kind in (list, tuple, dict, Mapping):
            if id(value) in self._within or len(self._within) > DEPTH:
                raise Refused("damaged", f"holds itself, or is nested more than {DEPTH} levels deep")
            self._within.add(id(value))
            try:
                if kind is list or kind is tuple:
                    return ["l" if kind is list else "t", *map(self.of, value)]
                if not all(type(key) is str or (type(key) is int and -(2**63) <= key < 2**63) for key in value):
                    return ["o", "a mapping whose keys are neither texts nor whole numbers"]
                return ["d", *(self.of(x) for item in value.items() for x in item)]
            finally:
                self._within.discard(id(value))
        return ["o", value.what if kind is Other else "bytes" if kind is bytes else "something else"]

    def _number(self, value: Any, known: list[Any], describe: Any) -> int:
        if id(value) not in self._numbers:  # `value` lives as long as the content does
            self._numbers[id(value)] = len(known)
            known.append(describe(value))
        return self._numbers[id(value)]

    def _tensor(self, tensor: Tensor) -> Any:
        return [tensor.storage.key, tensor.dtype.name, tensor.offset, tensor.shape, tensor.stride]

    def _array(self, array: Array) -> Any:
        self.blob.append(array.raw)
        self._nbytes += len(array.raw)
        return [array.code, array.shape, self._nbytes - len(array.raw), len(array.raw)]


def read(file: BinaryIO, size: int) -> tuple[dict[str, Any], list[bytes]]:
    content, storages = (read_zip if _is_zip(file) else read_legacy)(file, size)
    answer = Answer()
    tree = answer.of(content)
    places = {key: [storage.offset, storage.nbytes] for key, storage in storages.items()}
    return {"tree": tree, "tensors": answer.tensors, "arrays": answer.arrays, "storages": places}, answer.blob


def look(file: BinaryIO, size: int) -> tuple[dict[str, Any], list[bytes]]:
    """All names that the pickles of the file ask for, without opening one."""
    names: dict[str, None] = {}
    if _is_zip(file):
        kind, places = "zip", check_zip(file, size)
        for name, place in places.items():
            if name.endswith(".pkl"):
                names |= dict.fromkeys(asked_for(io.BytesIO(_bytes(file, *place))))
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


def _is_zip(file: BinaryIO) -> bool:
    file.seek(0)
    start = file.read(4)
    file.seek(0)
    return start == b"PK\3\4"


def _bytes(file: BinaryIO, offset: int, nbytes: int) -> bytes:
    if nbytes > PICKLE:
        raise Refused("large", f"a pickle of {nbytes} bytes")
    file.seek(offset)
    return file.read(nbytes)


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


if __name__ == "__main__":
    main(*sys.argv[1:])
