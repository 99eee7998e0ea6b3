"""Installed from a wheel, away from any checkout: the same commands, the same options, the same numbers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
ATTACK = "--dataset digits --epochs 1 --device cpu --save_folder_name made".split()
DEFENSE = "--result_file made --unlearning_epochs 2 --relearn_epochs 1 --device cpu".split()
NAMED = [*DEFENSE, "--yaml_path", "defense/ulrl/digits", "--save_folder_name", "named"]


def run(command: list[str], place: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ULRL", "PYTHON"))}
    done = subprocess.run(command, cwd=place, env=kept | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds ulrl as pip installs it, built from a copy: a tree that was built before keeps old files."""
    base = tmp_path_factory.mktemp("wheel")
    (base / "source").mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "ulrl", "config"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, base / "source" / name, symlinks=True)
        else:
            shutil.copy(ROOT / name, base / "source")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(base), "./source"], base)
    (wheel,) = base.glob("*.whl")
    run([*pip, "install", "--no-deps", "--no-index", "--target", str(base / "site"), str(wheel)], base)
    return base / "site"


def figures(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    for measured in ("seconds", "peak_memory_mb"):
        del result[measured]
    del result["environment"]["git"]  # of a checkout only
    return result


def test_a_wheel_gives_the_numbers_of_the_checkout(site: Path, tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    for place in (there, here):
        place.mkdir()
    python, path = sys.executable, str(site)
    for arguments in (["attack", "badnet", *ATTACK], ["defense", "ulrl", *DEFENSE], ["defense", "ulrl", *NAMED]):
        said = run([python, "-m", "ulrl", *arguments], there, PYTHONPATH=path).stderr
        assert f"options from {site}" in said
        script = str(ROOT / arguments[0] / f"{arguments[1]}.py")
        assert "options from" in run([python, script, *arguments[2:]], here, ULRL_HOME=str(here)).stderr
    for folder in ("record/made", "record/made/defense/ulrl", "record/made/defense/named"):
        assert figures(there / folder) == figures(here / folder)
    assert figures(there / "record/made")["options"]["lr"] == 0.05, "from attack/prototype/digits"


def test_a_wheel_lists_what_it_ships(site: Path, tmp_path: Path) -> None:
    """By the installed script; and a shipped sweep, without running it."""
    python = [sys.executable, "-m", "ulrl"]
    listed = run([*python, "list", "configs"], tmp_path, PYTHONPATH=str(site)).stdout.split()
    assert set(listed) == {str(f.relative_to(ROOT / "config"))[:-5] for f in ROOT.glob("config/**/*.yaml")}
    sweep = run([*python, "sweep", "sweep/quick", "--dry_run"], tmp_path, PYTHONPATH=str(site))
    assert "badnet" in sweep.stdout
    assert run([*python, "--version"], tmp_path, PYTHONPATH=str(site)).stdout.startswith("ulrl 0")
    assert not list(tmp_path.glob("record/[!.]*/")), "but for the locks of sweeps"
