"""Put the repository, not this folder, first on sys.path: `ulrl.py` here would hide the package `ulrl`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
