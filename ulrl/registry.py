"""The table of methods: one file in a package, one decorator, and the method exists."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from ulrl.declared import imported, methods
from ulrl.errors import UserError

T = TypeVar("T")


class Registry(Mapping[str, type[T]], Generic[T]):
    """Maps a method's name, as users type it, to its class.

    The files of `package` are looked through for names, so no list has to be edited, and a method's own is imported at
    the first look-up, so that one which is broken stops no other.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: enter the class under `name`, which it also gets as attribute `name`."""

        def enter(cls: type[T]) -> type[T]:
            if name in self._classes:
                raise ValueError(f"two classes are registered as {self.kind} {name!r}")
            cls.name = name  # type: ignore[attr-defined]
            self._classes[name] = cls
            return cls

        return enter

    def __getitem__(self, name: str) -> type[T]:
        if name not in self._classes:
            if name not in (files := methods(self._package)):
                raise UserError(f"unknown {self.kind} {name!r}{nearest(name, list(self))}")
            imported(files[name][0])
        return self._classes[name]

    def __contains__(self, name: object) -> bool:
        return name in self._classes or name in methods(self._package)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*methods(self._package), *self._classes}))

    def __len__(self) -> int:
        return len(list(iter(self)))


def nearest(name: str, known: Mapping[str, object] | list[str]) -> str:
    """How an error about an unknown name goes on: the nearest known one, else all of them.

    Of three letters one more or less is near, and another one is not: BackdoorBench's dbd and nab are no cbd and nad.
    """
    words = (name, name.lower())
    close = [found for word in words for found in difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)]
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"
