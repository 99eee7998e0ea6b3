"""Judgements that are kept: a model that was judged on the same data is not judged again.

They lie in the user's own cache (`$XDG_CACHE_HOME`, else ~/.cache, below it ulrl/judgements/), never in a record: a
stranger's record could bring forged ones. A name there is a digest of all that the figures depend on: the weights, the
images and labels, the precision, the device, torch and this library's own code.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ulrl.data.cache import cache_folder
from ulrl.data.imageset import ImageSet, PoisonedSet
from ulrl.errors import UserError
from ulrl.files import PACKAGE_ROOT, whole_file
from ulrl.machine import autocast
from ulrl.metrics import Judgement
from ulrl.untrusted.texts import read_json


def kept(
    judged: Callable[[], Judgement], name: str, model: nn.Module, clean: ImageSet, poisoned: PoisonedSet, amp: bool
) -> Judgement:
    """What `judged` returns, or what it returned for the same model of architecture `name` on the same data."""
    file = cache_folder() / "judgements" / f"{_digest(name, model, clean, poisoned, amp)}.json"
    with contextlib.suppress(UserError, ValueError, TypeError):  # absent or damaged: then it is judged
        return _read(file, len(clean), len(poisoned))
    judgement = judged()
    with contextlib.suppress(OSError):  # a cache that cannot be written is none
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with whole_file(file) as partial:
            partial.write_text(json.dumps(asdict(judgement)))
    return judgement


def _read(file: Path, n_clean: int, n_poisoned: int) -> Judgement:
    held = Judgement(**read_json(file))
    for figure, needed in ((held.acc, True), (held.asr, n_poisoned > 0), (held.ra, n_poisoned > 0)):
        if (figure is not None) is not needed or (figure is not None and not 0 <= figure <= 1):
            raise ValueError
    if (held.n_clean, held.n_poisoned) != (n_clean, n_poisoned):
        raise ValueError
    return held


def _digest(name: str, model: nn.Module, clean: ImageSet, poisoned: PoisonedSet, amp: bool) -> str:
    device = clean.device
    with autocast(device, amp):
        precision = str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else "float32"
    kind = (torch.cuda.get_device_name(device), torch.backends.cudnn.allow_tf32) if device.type == "cuda" else "cpu"
    about = (name, precision, kind, torch.__version__, _code(), repr(clean.spec), repr(poisoned.spec))
    digest = hashlib.sha256(repr(about).encode())
    tensors: dict[str, Any] = {
        **model.state_dict(), "clean images": clean.images, "clean labels": clean.labels,
        "images": poisoned.images, "labels": poisoned.labels, "original labels": poisoned.original_labels,
    }  # fmt: skip
    for key, tensor in tensors.items():
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():  # an empty one cannot be seen as bytes
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@functools.cache
def _code() -> str:
    """A digest of this library's sources: whatever changes there may change a figure."""
    digest = hashlib.sha256()
    for file in sorted((PACKAGE_ROOT / "ulrl").rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
