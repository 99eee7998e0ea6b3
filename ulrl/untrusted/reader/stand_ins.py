"""The names that a pickle may ask for, each bound to a stand-in that keeps what it is told; any other name ends it."""

from __future__ import annotations

import math
import pickle
import re
import struct
from typing import Any


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
        if len(shape) > 32 or math.prod(filter(None, shape)) >= 2**59:  # which numpy 1 cannot hold, even of nothing
            raise Refused("damaged", "an array of a shape beyond numpy's")
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
    elif math.prod(filter(None, shape)) * dtype.itemsize >= 2**62:
        return Other("a tensor without a size")
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
