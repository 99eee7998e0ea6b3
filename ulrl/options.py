"""Options: a dataclass field is the truth, YAML overrides it, a flag overrides YAML.

A dataclass declares its options with `option(default, help, ...)`. `Schema` gathers the fields of the
dataclasses that a command needs, and reads flags and YAML files by the same rules. A key that several
of them declare (`random_seed`) is one option, given to each.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ulrl.errors import UserError
from ulrl.files import find_input
from ulrl.registry import nearest
from ulrl.untrusted.texts import read_yaml

T = TypeVar("T")

# Keys and flags of BackdoorBench and of the released ULRL that have no meaning here: data never passes
# through worker processes, nothing is checkpointed by epoch, and paths follow from the record's name. Its every script
# has the steps of the learning rate, also where it has none.
IGNORED = frozenset(
    "num_workers pin_memory non_blocking prefetch frequency_save git_hash checkpoint_load "
    "checkpoint_save log attack num_classes input_height input_width input_channel "
    "poison_rate target_type target_label trigger_type steplr_stepsize "
    "steplr_gamma steplr_milestones".split()
)
# The short flags that BackdoorBench has for some of them.
SHORT = {"num_workers": ["-n"], "pin_memory": ["-pm"], "non_blocking": ["-nb"], "prefetch": ["-pf"]}

LARGEST = {int: 2**63 - 1, float: 3e38}  # that torch takes


def option(
    default: Any,
    help: str,
    *,
    source: str = "ours",
    choices: Sequence[str] | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A dataclass field that is also a flag and a YAML key.

    `source` says where the default comes from (a paper, BackdoorBench, ours) and is shown by --help.
    `low` and `high` are inclusive bounds.

    Raises:
        ValueError: a default that could be changed in place.
    """
    if isinstance(default, (list, dict, set)):
        raise ValueError(f"an option's default is a number, a text, None or a tuple, and no {type(default).__name__}")
    about = {"help": help, "source": source, "choices": choices, "low": low, "high": high}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Settings:
    """Merged values and, for each key that was given, where it came from ("--flag" or a YAML file)."""

    values: Mapping[str, Any]
    origin: Mapping[str, str]

    def build(self, cls: type[T]) -> T:
        """An instance of a dataclass of the schema; what was not given keeps its default."""
        names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        return cls(**{k: v for k, v in self.values.items() if k in names})


class Schema:
    """The options of one command: the fields of `classes`, in order.

    A class may name keys of BackdoorBench's as `ignored`, those without a meaning for it; a field so named keeps its
    default.

    Raises:
        UserError: an option of a type that no flag can have.
    """

    def __init__(self, *classes: type) -> None:
        self.ignored = frozenset[str]().union(*(getattr(cls, "ignored", ()) for cls in classes))
        self.fields: dict[str, dataclasses.Field[Any]] = {}
        self.hints: dict[str, Any] = {}
        for cls in classes:
            hints = typing.get_type_hints(cls)
            for f in dataclasses.fields(cls):
                if f.metadata and f.name not in getattr(cls, "ignored", ()):
                    self.fields.setdefault(f.name, f)
                    self.hints.setdefault(f.name, hints[f.name])
                    if _kinds(hints[f.name])[0] not in (bool, int, float, str, tuple):
                        raise UserError(
                            f"the option {f.name} of {cls.__name__} is a {hints[f.name]}; let it be a bool, int, float "
                            "or str, one of these | None, or a tuple[int, ...] or tuple[float, ...]"
                        )

    def flags(self, argv: Sequence[str], prog: str, description: str) -> dict[str, Any]:
        """The flags given in `argv`, converted. No defaults are filled in.

        Raises:
            UserError: an unknown flag, a missing or an unfit value.
        """
        parser = Parser(
            prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS, allow_abbrev=False,
        )  # fmt: skip
        for name, f in self.fields.items():
            kind = _kinds(self.hints[name])[0]
            shape: dict[str, Any] = {"metavar": _metavar(f, kind), "help": _help(f)}
            if kind is bool:
                shape |= {"nargs": "?", "const": "true"}
            elif kind is tuple:
                shape |= {"nargs": "+"}
            parser.add_argument(f"--{name}", **shape)
        for name in sorted(self.ignored - set(self.fields)):
            parser.add_argument(*SHORT.get(name, ()), f"--{name}", nargs="?", help=argparse.SUPPRESS)
        given, unknown = parser.parse_known_args(argv)
        if unknown:
            flag = unknown[0].split("=")[0]
            known = [f"--{name}" for name in self.fields]
            raise UserError(f"unknown argument {flag}{nearest(flag, known) if flag[:2] == '--' else ''}")
        return {k: self._convert(k, v, f"--{k}") for k, v in vars(given).items()}

    def yaml(self, path: str | Path) -> dict[str, Any]:
        """The keys of a YAML file, converted. Keys left empty count as not given.

        Raises:
            UserError: no such file, not YAML, not a mapping, an unknown key or an unfit value.
        """
        file = find_input(path)
        return self.check(read_yaml(file), str(file))

    def check(self, content: Mapping[Any, Any], where: str) -> dict[str, Any]:
        """The values of a mapping, converted. Keys left empty count as not given.

        Raises:
            UserError: an unknown key or an unfit value; `where` says what held it.
        """
        for key in content:
            if key not in self.fields and key not in self.ignored:
                raise UserError(f"unknown key {key!r} in {where}{nearest(str(key), list(self.fields))}")
        return {k: self._convert(k, v, f"{k} in {where}") for k, v in content.items() if v is not None}

    def merge(self, *layers: tuple[str, Mapping[str, Any]]) -> tuple[Settings, list[str]]:
        """Merge layers of (origin, values), later ones winning; also the ignored keys they held."""
        values: dict[str, Any] = {}
        origin: dict[str, str] = {}
        for source, given in layers:
            values |= given
            origin |= {key: source for key in given}
        ignored = sorted(set(values) - set(self.fields))
        return Settings({k: v for k, v in values.items() if k in self.fields}, origin), ignored

    def _convert(self, name: str, value: Any, where: str) -> Any:
        if name not in self.fields:
            return value
        f, kinds = self.fields[name], _kinds(self.hints[name])
        try:
            value = _as(value, kinds)
        except OverflowError:
            raise UserError(f"{where}: {value!r} is too large a number") from None
        except (ValueError, TypeError):
            raise UserError(f"{where}: {value!r} is not {_describe(kinds)}") from None
        choices, low, high = (f.metadata[k] for k in ("choices", "low", "high"))
        if choices and value not in choices:
            raise UserError(f"{where}: {value!r} is none of {', '.join(choices)}")
        for bound, fails, words in (
            (low, lambda v: v < low, "at least"),
            (high, lambda v: v > high, "at most"),
        ):
            if bound is not None and value is not None and fails(value):
                raise UserError(f"{where}: {value} must be {words} {bound}")
        return value


class Parser(argparse.ArgumentParser):
    """One whose mistakes are a UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The plain types that an annotation allows; tuple[int, ...] is `tuple`, then `int`."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return tuple(kind for part in typing.get_args(hint) for kind in _kinds(part))
    if typing.get_origin(hint) is tuple:
        return tuple, typing.get_args(hint)[0]
    return (hint,)


def _as(value: Any, kinds: tuple[Any, ...]) -> Any:
    kind = kinds[0]
    text = value.strip() if isinstance(value, str) else None
    if types.NoneType in kinds and text is not None and text.lower() in ("", "none", "null"):
        return None
    if kind is bool:
        word = str(value).strip().lower()
        if word not in ("true", "yes", "1", "false", "no", "0"):
            raise ValueError
        return word in ("true", "yes", "1")
    if kind is tuple:
        parts = value if isinstance(value, (list, tuple)) else [value]
        words = [w for part in parts for w in (part.replace(",", " ").split() if isinstance(part, str) else [part])]
        return () if words == ["none"] else tuple(_as(word, kinds[1:]) for word in words)  # as `--help` writes it
    if kind is str:
        if not isinstance(value, (str, int, float)) or isinstance(value, bool):
            raise TypeError
        text = str(value)
        text.encode()  # half a surrogate pair is a ValueError
        if "\0" in text:  # no path may have it
            raise ValueError
        return text
    if isinstance(value, bool) or (kind is int and isinstance(value, float) and value != int(value)):
        raise ValueError
    number = kind(value)
    if math.isnan(number):
        raise ValueError
    if abs(number) > LARGEST[kind]:
        raise OverflowError
    return number


def _describe(kinds: tuple[Any, ...]) -> str:
    if kinds[0] is tuple:
        return "a list of whole numbers" if kinds[1] is int else "a list of numbers"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kinds[0]]


def _metavar(f: dataclasses.Field[Any], kind: Any) -> str:
    plain = {bool: "true|false", tuple: "N", str: "TEXT", int: "N", float: "X"}[kind]
    return "|".join(f.metadata["choices"]) if f.metadata["choices"] else plain


def _help(f: dataclasses.Field[Any]) -> str:
    default = "none" if f.default is None or f.default == () else f.default
    origin = "required" if f.default == "" else f"default: {default}, {f.metadata['source']}"
    return f"{f.metadata['help']} ({origin})".replace("%", "%%")
