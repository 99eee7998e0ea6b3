"""What is told of a pickle's content: JSON, in which tensors and arrays are places."""

from __future__ import annotations

from typing import Any

from ulrl.untrusted.reader.stand_ins import Array, Mapping, Other, Refused, Tensor

ANSWER = 128 << 20  # bytes of JSON
ARRAYS = 256 << 20  # bytes of them
VALUES, DEPTH = 5_000_000, 40


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
        if self._nbytes > ARRAYS:  # a few bytes may have been given to many of them
            raise Refused("large", "arrays of hundreds of megabytes")
        return [array.code, array.shape, self._nbytes - len(array.raw), len(array.raw)]
