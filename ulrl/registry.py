"""The table of methods: one file in a package, one decorator, and the method exists."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from ulrl.errors import UserError

T = TypeVar("T")


class Registry(Mapping[str, type[T]], Generic[T]):
    """Maps a method's name, as users type it, to its class.

    The modules of `package` are imported at the first look-up, so a new file registers itself and
    no list has to be edited.
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

    def _load(self) -> dict[str, type[T]]:
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")
        return self._classes

    def __getitem__(self, name: str) -> type[T]:
        classes = self._load()
        if name not in classes:
            raise UserError(f"unknown {self.kind} {name!r}{nearest(name, classes)}")
        return classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._load()))

    def __len__(self) -> int:
        return len(self._load())


def nearest(name: str, known: Mapping[str, object] | list[str]) -> str:
    """How an error about an unknown name goes on: the nearest known one, else all of them."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"
