"""The docs keep up with the code: commands parse, links lead somewhere, tables name every method, the site builds."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ulrl.attacks.base import ATTACKS
from ulrl.cli import attack_main, defense_main, main
from ulrl.data.datasets import DATASETS
from ulrl.defenses.base import DEFENSES
from ulrl.detectors.base import DETECTORS
from ulrl.models.architectures import ARCHITECTURES
from ulrl.options import Schema

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "bench" / "README.md"])
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\((?!\w+:)([^)\s#]*)#?([^)\s]*)\)")


def blocks(language: str) -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for found, text in BLOCK.findall(page.read_text(encoding="utf-8")):
            if found == language:
                yield page, text


def commands() -> list[str]:
    """The lines of the shell blocks that start our commands."""
    lines = [line for _, text in blocks("sh") for line in text.splitlines()]
    return sorted({line for line in lines if re.match(r"(ulrl|python (attack|defense)/[\w-]+\.py) ", line)})


class Parsed(BaseException):
    """The flags are known, so the command need not run."""


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command: str, monkeypatch: pytest.MonkeyPatch, empty_home: Path) -> None:
    read = Schema.flags

    def flags(self: Schema, *args: Any) -> None:
        read(self, *args)
        raise Parsed

    monkeypatch.setattr(Schema, "flags", flags)
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), pytest.raises((Parsed, SystemExit)) as end:
        if words[0] == "python":
            kind, name = Path(words[1]).parts
            assert (ROOT / kind / name).is_file()
            (attack_main if kind == "attack" else defense_main)(Path(name).stem, words[2:])
        else:
            main(words[1:])
    known = end.type is Parsed or end.value.code == 0
    assert known or (words[1] == "inspect" and "cannot be read" in said.getvalue()), said.getvalue()  # it has no flags
    for word in words:
        if word.startswith(("config/", "./config/")):
            assert (ROOT / word).exists(), word


def test_there_are_commands_to_check() -> None:
    assert len(commands()) > 15


def test_flags_of_the_bench_are_there() -> None:
    found = re.findall(
        r"python (?:-m bench\.|bench/)(\w+)(?:\.py)?([^`|#\n]*)", "\n".join(p.read_text() for p in PAGES)
    )
    assert len(found) > 20
    for name, rest in found:
        parts = ("speed", "release_speed") if name == "speed" else (name,)  # which hands some of its flags on
        files = [file for part in parts for file in (ROOT / "bench").glob(f"{part}/*.py")]
        files += [file for part in parts for file in (ROOT / "bench").glob(f"{part}.py")]
        assert files, f"there is no bench/{name}"
        source = "".join(file.read_text(encoding="utf-8") for file in files)
        for flag in re.findall(r"--\w+", rest):
            assert f'"{flag}"' in source, f"bench/{name}.py has no {flag}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target, anchor in LINK.findall(text):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{page.name} links to {target}#{anchor}"


def test_python_in_the_docs_compiles() -> None:
    found = list(blocks("python"))
    assert found
    for page, text in found:
        compile(text, str(page), "exec")


def test_readme_is_an_entrance() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    assert readme.index("![") < readme.index("\n## ")  # a picture above the fold


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("reference/attacks", ATTACKS),
        ("reference/defenses", DEFENSES),
        ("reference/detection", DETECTORS),
        ("reference/data", DATASETS),
        ("reference/models", ARCHITECTURES),
        ("gallery", [name for name in ATTACKS if name != "prototype"]),
    ],
)
def test_pages_name_all_there_is(page: str, names: Any) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert [name for name in names if not re.search(rf"(`|## ){re.escape(name)}\b", text)] == []


def test_pages_count_what_there_is() -> None:
    readme, index = (ROOT / "README.md").read_text(encoding="utf-8"), (ROOT / "docs" / "index.md").read_text("utf-8")
    attacks, repairs = len(ATTACKS) - 1, sum(cls.repairs for cls in DEFENSES.values())  # prototype plants nothing
    for text, wanted in (
        (readme, f"({attacks} attacks)"),
        (readme, f"({repairs} defenses)"),
        (index, f"{repairs - 1} other\ndefenses"),
        (index, f"{attacks} attacks"),
    ):
        assert wanted in text


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook: Path, tmp_path: Path) -> None:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "ULRL_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        html = page.read_text(encoding="utf-8")
        tags = re.findall(r"<(?:script|img|iframe|link)\b[^>]*>", html)
        loaded = [tag for tag in tags if re.search(r"(src|href)=[\"']?(https?:)?//", tag) and "canonical" not in tag]
        assert loaded == [], page
    options = (tmp_path / "site" / "reference" / "options" / "index.html").read_text(encoding="utf-8")
    assert "patch_size" in options  # made of the code
    assert "relearn_lr" in options
