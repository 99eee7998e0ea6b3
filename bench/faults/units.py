"""What ended, and whether a fault has cost any of it."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from pathlib import Path


def units(home: Path) -> dict[str, str]:
    """What ended, by name, and its checksum."""
    found = {}
    for file in [*home.glob("record/*/result.json"), *home.glob("record/*/defense/*/result.json")]:
        if not any(part.startswith(".") for part in file.relative_to(home).parts):
            found[str(file.parent.relative_to(home))] = _of_folder(file.parent)
    for file in home.glob("cache/ulrl/**/*"):
        if file.is_file() and file.suffix in (".npy", ".json") and not file.name.startswith("."):
            found[re.sub("_[0-9a-f]{16}", "", file.name)] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def _of_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        drawn = path.parent == folder and path.suffix == ".png"
        if name.startswith("defense") or drawn or path.suffix in (".log", ".csv") or not path.is_file():
            continue
        content = path.read_bytes()
        if path.name == "result.json":
            result = json.loads(content)
            content = repr([result[key] for key in ("after", "options", "flagged", "seed")]).encode()
        elif path.suffix in (".pt", ".pickle", ".npz"):  # the archive notes names and times
            with zipfile.ZipFile(path) as archive:
                content = b"".join(archive.read(m) for m in archive.namelist() if "/data" in m or ".npy" in m)
        digest.update(name.encode() + b"\0" + content)
    return digest.hexdigest()


def half_written(home: Path) -> list[str]:
    """Folders with a final name and without their last file."""
    return [
        f"{folder} lacks result.json"
        for folder in [*home.glob("record/*"), *home.glob("record/*/defense/*")]
        if not folder.name.startswith(".") and not any((folder / n).exists() for n in ("result.json", "failed.log"))
        and [p for p in folder.iterdir() if p.name != "defense"]
    ]  # fmt: skip


def compared(home: Path, before: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """What is neither as before nor as wanted, after a fault."""
    after = units(home)
    lost = [f"{n} is damaged" for n, digest in after.items() if digest not in (before.get(n), wanted.get(n))]
    for name in before:
        hidden = home / Path(name).with_name(f".{Path(name).name}.replaced")
        if name not in after and not hidden.exists():  # a kill between two renames; the next run brings it back
            lost.append(f"{name} is gone")
    return lost + half_written(home)
