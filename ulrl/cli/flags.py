"""The options of a command that runs methods, told before anything is imported that takes seconds.

So `--help` and the message about a mistake come at once. What is read off the classes' texts is what they have.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from ulrl.declared import declared, methods
from ulrl.errors import UserError
from ulrl.options import Parser, Schema
from ulrl.registry import nearest
from ulrl.shipped import options_file

# Of BackdoorBench's defense/ some only say which images are poisoned, and are of another kind here.
OTHERS = {"detector": "ulrl detect RECORD --samples {}", "defense": "ulrl defense {}"}


def method(kind: str, name: str) -> type:
    """The options of an attack, a defense or a sample detector, as a class.

    Raises:
        UserError: there is none of that name.
    """
    known = methods(f"ulrl.{kind.split()[-1]}s")  # a "sample detector" lies in ulrl.detectors
    if name not in known:
        for other, how in OTHERS.items():
            if name in methods(f"ulrl.{other}s"):
                raise UserError(f"{name} is no {kind} here but a {other}; try {how.format(name)}")
        raise UserError(f"unknown {kind} {name!r}{nearest(name, known)}")
    cls: type = declared(*known[name])
    return cls


def named_by(flag: str, argv: Sequence[str], usual: str) -> str:
    """The method that a flag names. Its options are flags, too, so this one is read before all others.

    Raises:
        UserError: no name after it.
    """
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{flag}", default=usual)
    return str(getattr(parser.parse_known_args(argv)[0], flag))


def attack_flags(name: str, argv: Sequence[str], run: str, prog: str) -> dict[str, Any]:
    """The flags of an attack; `run` is the name of its class of options of `ulrl.configure`."""
    cls = method("attack", name)
    schema = Schema(declared("ulrl.configure", run), cls, declared("ulrl.training", "TrainOptions"))
    flags = schema.flags(argv, prog, inspect.getdoc(cls) or "")
    for key in ("yaml_path", "bd_yaml_path"):
        from_file(schema, flags, key)
    return flags


def defense_flags(name: str, argv: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The flags of a defense, and the record that these or the options file name."""
    cls = method("defense", name)
    schema = Schema(declared("ulrl.configure", "DefenseRun"), cls)
    flags = schema.flags(argv, f"defense/{name}.py", inspect.getdoc(cls) or "")
    return flags, flags.get("result_file") or from_file(schema, flags, "yaml_path").get("result_file", "")


def from_file(schema: Schema, flags: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The options of the file that a flag names, if it is given."""
    return schema.yaml(options_file(flags[key])) if flags.get(key) is not None else {}
