"""The torchvision shim, in fresh processes: what it declares in torch cannot be taken back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIM = ROOT / "ulrl" / "tv.py"

# Run as a file, so that the rest of the library need not get along with a fake torchvision.
USE_SHIM = f"import runpy, torch; shim = runpy.run_path({str(SHIM)!r})\n"
DECLARED = "print(hasattr(torch.ops.torchvision, 'nms'), hasattr(torch.ops.torchvision, 'qnms'))"


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new Python that looks for modules in `folder` first."""
    path = os.pathsep.join([str(folder), str(ROOT)])
    env = os.environ | {"PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=folder, capture_output=True, text=True)


def fake_torchvision(folder: Path, code: str) -> None:
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(f"from . import half\n{code}\n")
    (package / "half.py").write_text("print('imported')\n")


def test_the_installed_torchvision_is_usable_and_quiet(tmp_path: Path) -> None:
    done = run(
        "from ulrl.tv import torchvision as tv\n"
        "tv.datasets.CIFAR10, tv.transforms.functional.resize, tv.models.resnet18(num_classes=10)",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_nothing_is_declared_when_the_import_succeeds(tmp_path: Path) -> None:
    fake_torchvision(tmp_path, "fake = True")
    done = run(USE_SHIM + "assert shim['torchvision'].fake\n" + DECLARED, tmp_path)
    assert done.stdout.split() == ["imported", "False", "False"], done.stderr


def test_missing_operators_are_declared_and_the_whole_import_is_repeated(tmp_path: Path) -> None:
    fake_torchvision(
        tmp_path,
        "import torch, warnings\n"
        "for name in ('nms', 'qnms'):\n"
        "    torch.library.register_fake(f'torchvision::{name}')(lambda dets, scores, iou_threshold: dets)\n"
        "warnings.warn('Failed to load image Python extension: of no use here')",
    )
    done = run(USE_SHIM + DECLARED, tmp_path)
    assert done.stdout.split() == ["imported", "imported", "True", "True"], done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("error", ["RuntimeError('something else')", "ImportError('no file')"])
def test_any_other_failure_is_passed_on(tmp_path: Path, error: str) -> None:
    fake_torchvision(tmp_path, f"raise {error}")
    done = run(USE_SHIM, tmp_path)
    assert done.returncode == 1
    assert done.stdout.split() == ["imported"]
    assert done.stderr.splitlines()[-1] == error.replace("('", ": ").replace("')", "")
