"""What the site holds beyond this folder: pages from elsewhere in the repository, and tables made of the code.

A link is written as it works in the repository; one that leads out of docs/ is turned to where the site has the file.
A line such as `<!-- options attacks -->` becomes a table, so that no page can contradict the code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from ulrl.attacks.base import ATTACKS, Attack
from ulrl.cli import main
from ulrl.configure import AttackRun, DefenseRun, DetectionRun
from ulrl.defenses.base import DEFENSES, Defense
from ulrl.detectors.base import DETECTORS, Detector
from ulrl.options import Schema
from ulrl.training import TrainOptions

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = ("*.md", "LICENSE", "bench/*.md", "bench/results/*", "examples/*.py")
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")


def on_files(files: Any, config: Any) -> None:
    for path in sorted(path for pattern in OUTSIDE for path in ROOT.glob(pattern)):
        if path != ROOT / "README.md":  # the site has a home of its own
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    place = posixpath.dirname(page.file.src_uri)
    folder = place if page.file.generated_by else posixpath.join("docs", place)

    def on_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[0]))
        return posixpath.relpath(target.removeprefix("docs/"), place or ".")

    markdown = LINK.sub(on_site, markdown)
    return re.sub(r"<!-- (options|help)(.*) -->", lambda m: MADE[m[1]](*m[2].split()), markdown)


def options(of: str) -> str:
    """Tables of the options of a kind: those that its methods share, then each method's own."""
    if of == "attacks":
        shared: tuple[type, ...] = (AttackRun, Attack, TrainOptions)
        return _tables(shared, ATTACKS.items())
    if of == "detectors":
        return _tables((DetectionRun, Detector), DETECTORS.items())
    return _tables((DefenseRun, Defense), DEFENSES.items())


def _tables(shared: tuple[type, ...], methods: Iterable[tuple[str, type]]) -> str:
    common = Schema(*shared).fields
    parts = ["### All\n", _table(common.values())]
    for name, cls in methods:
        own = [
            f
            for f in Schema(cls).fields.values()
            if f.name not in common or (f.default, f.metadata) != (common[f.name].default, common[f.name].metadata)
        ]
        about = (inspect.getdoc(cls) or "").replace("<", "&lt;")
        parts += [f"\n### {name}\n", about, "", _table(own) if own else "No options of its own."]
    return "\n".join(parts)


def _table(fields: Iterable[dataclasses.Field[Any]]) -> str:
    rows = ["| option | default | what it is | default from |", "|---|---|---|---|"]
    for f in fields:
        default = {None: "none", (): "none", "": "required"}.get(f.default, f.default)
        help = f.metadata["help"] + (f": {', '.join(f.metadata['choices'])}" if f.metadata["choices"] else "")
        cells = (f"`{f.name}`", f"`{default}`", help, f.metadata["source"])
        rows.append(f"| {' | '.join(str(cell).replace('|', '&#124;').replace('<', '&lt;') for cell in cells)} |")
    return "\n".join(rows)


def help_of(*command: str) -> str:
    """What `ulrl COMMAND --help` prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return f"```text\n{said.getvalue().rstrip()}\n```"


MADE = {"options": options, "help": help_of}
