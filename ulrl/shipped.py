"""The options files that come with ulrl."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path, PurePath

from ulrl.errors import UserError
from ulrl.files import find_input
from ulrl.registry import nearest


def shipped_files() -> dict[str, Path]:
    """The options files that come with ulrl, by name: `defense/ulrl/cifar10`, `sweep/quick`, in order."""
    root = Path(str(resources.files("ulrl"))) / "config"  # a link to config/ in a checkout
    return {str(file.relative_to(root).with_suffix("")): file for file in sorted(root.rglob("*.yaml"))}


def options_file(given: str) -> Path:
    """The options or sweep file that the user named: a file of theirs, or else a shipped one.

    A shipped one is named as by `ulrl list configs`, or as it lies in a checkout: `config/sweep/quick.yaml`.

    Raises:
        UserError: there is neither.
    """
    own = find_input(given)
    if os.path.exists(own) and not os.path.isdir(own):  # a pipe is told of by who reads it
        return own
    parts = PurePath(given.removesuffix(".yaml")).parts
    name, shipped = "/".join(parts[1:] if parts[:1] == ("config",) else parts), shipped_files()
    if name not in shipped:
        if os.path.isdir(own):
            raise UserError(f"{given} is a folder; name an options file in it")
        raise UserError(
            f"{given}: No such file, nor is one of that name shipped{nearest(name, list(shipped))}; "
            "`ulrl list configs` names those that are"
        )
    return shipped[name]
