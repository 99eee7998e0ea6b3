"""What CI installs is locked: every package, by the hashes of its files."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILDS_OF_OUR_CHOICE = {"torch", "torchvision"}  # other files on every index, under one version


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> dict[str, list[str]]:
    """Package to the hashes of its files."""
    packages: dict[str, list[str]] = {}
    for line in (ROOT / "requirements" / "ci.lock").read_text().splitlines():
        if found := re.match(r"([\w.-]+)==[\w.+!]+( ;|\s*\\?$)", line):
            name = plain(found[1])
            packages.setdefault(name, [])
        elif found := re.match(r"    --hash=sha256:([0-9a-f]{64})", line):
            packages[name].append(found[1])
        else:
            assert line.startswith("#"), line
    return packages


def test_every_package_that_pyproject_names_is_locked() -> None:
    """Run sh/lock.sh where it is not."""
    text = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:dependencies|ray|otbr|docs|supply|test) = \[(.*?)\](?: *#[^\n]*)?$", text, re.M | re.S)
    assert len(lists) == 6
    named = {plain(m) for part in lists for m in re.findall(r'"([\w.-]+)(?:\[[^\]]*\])?[^"]*"', part)} - {"ulrl"}
    assert {"numpy", "ray", "pytest", "pip-audit"} <= named
    assert named - BUILDS_OF_OUR_CHOICE <= set(locked()), "run sh/lock.sh"


def test_every_locked_package_has_hashes() -> None:
    packages = locked()
    assert len(packages) > 100
    assert all(packages.values())
    assert not any(re.match("torch|nvidia|cuda|triton", name) for name in packages)
