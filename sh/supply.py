"""What ulrl is made of:  python sh/supply.py lock > requirements.lock;  python sh/supply.py sbom > sbom.json

`lock` has pip resolve the requirements against the index that it is set up for, without installing, and prints each
package with the SHA-256 of the chosen file. `sbom` prints what is installed here, as CycloneDX 1.5.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def lock() -> str:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    done = subprocess.run([*command, str(ROOT)], stdout=subprocess.PIPE, check=True)
    lines = []
    for item in json.loads(done.stdout)["install"]:
        name, version = item["metadata"]["name"], item["metadata"]["version"]
        if name != "ulrl":
            digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
            lines.append(f"{name}=={version} --hash=sha256:{digest}")
    return "\n".join(sorted(lines, key=str.lower))


def sbom() -> str:
    components = [
        {"type": "library", "name": name, "version": d.version, "purl": f"pkg:pypi/{name.lower()}@{d.version}"}
        for d in metadata.distributions()
        if (name := d.metadata["Name"])
    ]
    components.sort(key=lambda c: c["name"].lower())
    return json.dumps(
        {"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "components": components}, indent=1
    )


if __name__ == "__main__":
    if sys.argv[1:] not in (["lock"], ["sbom"]):
        sys.exit(__doc__)
    print(lock() if sys.argv[1] == "lock" else sbom())
