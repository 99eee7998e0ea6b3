"""Known holes in what is installed:  .venv/bin/python sh/audit.py

Asks pip-audit, which asks PyPI's database of advisories; leaves with 1 where it names one. Where no such database can
be reached, as offline or by way of a mirror, one line says so, and it leaves with 0.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any


def audited(*arguments: str) -> list[dict[str, Any]]:
    """The packages that were looked up, with their `vulns`."""
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--timeout", "10"]
    try:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300)
        packages = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, KeyError):  # it could not reach any
        return []
    return [package for package in packages if "vulns" in package]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        one = Path(folder) / "one.txt"
        one.write_text(f"pip-audit=={metadata.version('pip-audit')}\n")
        reached = audited("--no-deps", "--disable-pip", "--requirement", str(one))
    if not reached:
        print("ulrl: no database of advisories can be reached from here: nothing was audited")
        return 0
    packages = audited("--skip-editable")
    holes = [(package, hole) for package in packages for hole in package["vulns"]]
    for package, hole in holes:
        mend = ", ".join(hole["fix_versions"]) or "none yet"
        print(f"ulrl: {package['name']} {package['version']} has {hole['id']}; mended in {mend}", file=sys.stderr)
    print(f"ulrl: {len(packages)} packages audited, {len(holes)} known holes")
    return 1 if holes else 0


if __name__ == "__main__":
    sys.exit(main())
