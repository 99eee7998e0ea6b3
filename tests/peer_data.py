"""Data set files as their authors publish them, with made-up contents, built from the formats' descriptions."""

from __future__ import annotations

import gzip
import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np

CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def idx(array: np.ndarray[Any, Any]) -> bytes:
    """An IDX file of unsigned bytes."""
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def write_mnist(raw: Path, n_train: int, n_test: int, *, zipped: bool, seed: int = 0) -> dict[str, np.ndarray]:
    """The four files of MNIST in `raw`; what they hold, by file name."""
    rng = np.random.default_rng(seed)
    raw.mkdir(parents=True)
    held = {}
    for part, n in (("train", n_train), ("t10k", n_test)):
        held[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        held[f"{part}-labels-idx1-ubyte"] = rng.integers(0, 10, n, dtype=np.uint8)
    for name, array in held.items():
        if zipped:
            (raw / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (raw / name).write_bytes(idx(array))
    return held


def write_cifar10(folder: Path, n_per_batch: int, seed: int = 0) -> tuple[dict[str, Any], dict[str, str]]:
    """CIFAR-10's "python version" in `folder`/cifar-10-batches-py: pickles of protocol 2.

    Returns the batches by file name, and the MD5 of every file.
    """
    rng = np.random.default_rng(seed)
    base = folder / "cifar-10-batches-py"
    base.mkdir(parents=True)
    contents: dict[str, Any] = {}
    for k, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], 1):
        contents[name] = {
            "batch_label": f"training batch {k} of 5" if k < 6 else "testing batch 1 of 1",
            "labels": rng.integers(0, 10, n_per_batch).tolist(),
            "data": rng.integers(0, 256, (n_per_batch, 3 * 32 * 32), dtype=np.uint8),
            "filenames": [f"picture_s_{i:06d}.png" for i in range(n_per_batch)],
        }
    meta = {"num_cases_per_batch": n_per_batch, "label_names": CIFAR10_NAMES, "num_vis": 3 * 32 * 32}
    digests = {}
    for name, content in {**contents, "batches.meta": meta}.items():
        raw = pickle.dumps(content, protocol=2)
        (base / name).write_bytes(raw)
        digests[name] = hashlib.md5(raw).hexdigest()
    return contents, digests
