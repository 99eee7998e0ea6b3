"""torchvision, also where its compiled operators do not load: `from ulrl.tv import torchvision`.

torchvision's binary is built against one build of torch. Beside another (a CPU-only torch and the
registry's torchvision, say) it does not load, and then all of `import torchvision` fails with
"operator torchvision::nms does not exist", although datasets, transforms and classifiers are plain
Python. All that is missing is the declaration of two operators which torchvision annotates while it
is imported, so in that case only, they are declared here and the import is tried again. The
operators themselves (box suppression, used by detectors) stay unavailable. Where the binary loads,
nothing is declared.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import Any

import torch

__all__ = ["torchvision"]


def _import() -> Any:
    with warnings.catch_warnings():
        # Images are read with Pillow here, so torchvision's own reader is not missed.
        warnings.filterwarnings("ignore", message="Failed to load image Python extension")
        return importlib.import_module("torchvision")


try:
    torchvision = _import()
except RuntimeError as error:
    if "operator torchvision::nms does not exist" not in str(error):
        raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # imported by half
    _declarations = torch.library.Library("torchvision", "DEF")  # a declaration lives as long as this
    for _operator in ("nms", "qnms"):
        _declarations.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torchvision = _import()
