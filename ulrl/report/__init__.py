"""Tables, figures and the page of what runs wrote."""

import importlib
import os
from pathlib import Path

if os.path.lexists("matplotlibrc"):
    # Matplotlib takes its settings from the current folder first, which may be a stranger's record: they can have LaTeX
    # run, and are printed as they are where they are wrong. What lies in the user's own folders is followed as ever.
    here = os.getcwd()
    os.chdir(Path(__file__).parent)
    try:
        importlib.import_module("matplotlib")
    finally:
        os.chdir(here)
