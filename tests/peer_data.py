"""Data set files as their authors publish them, with made-up contents, built from the formats' descriptions."""

from __future__ import annotations

import gzip
import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

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


def write_cifar100(folder: Path, n_train: int, n_test: int, seed: int = 0) -> tuple[dict[str, Any], dict[str, str]]:
    """CIFAR-100's "python version" in `folder`/cifar-100-python; its contents and MD5s by file name."""
    rng = np.random.default_rng(seed)
    base = folder / "cifar-100-python"
    base.mkdir(parents=True)
    contents: dict[str, Any] = {}
    for name, n in (("train", n_train), ("test", n_test)):
        contents[name] = {
            "filenames": [f"picture_s_{i:06d}.png" for i in range(n)],
            "batch_label": f"{name}ing batch 1 of 1",
            "fine_labels": rng.integers(0, 100, n).tolist(),
            "coarse_labels": rng.integers(0, 20, n).tolist(),
            "data": rng.integers(0, 256, (n, 3 * 32 * 32), dtype=np.uint8),
        }
    meta = {"fine_label_names": [f"fine {i}" for i in range(100)], "coarse_label_names": [str(i) for i in range(20)]}
    digests = {}
    for name, content in {**contents, "meta": meta}.items():
        raw = pickle.dumps(content, protocol=2)
        (base / name).write_bytes(raw)
        digests[name] = hashlib.md5(raw).hexdigest()
    return contents, digests


def photo(path: Path, rng: np.random.Generator, size: tuple[int, int]) -> Path:
    """An image of (width, height), in the format that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)
    return path


Listed = list[tuple[Path, int]]  # each image with its class, in the order of the data set


def write_gtsrb(folder: Path, layout: str, per_class: int, n_test: int, seed: int = 0) -> tuple[Listed, Listed]:
    """GTSRB as BackdoorBench (`layout` "backdoorbench") or torchvision lays it out, images of many sizes."""
    rng = np.random.default_rng(seed)
    ours = layout == "backdoorbench"
    train_folder = folder / ("Train" if ours else "GTSRB/Training")
    test_folder = folder / ("Test" if ours else "GTSRB/Final_Test/Images")
    header = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\r\n"

    def write(where: Path, name: str, label: int) -> str:
        width, height = (int(n) for n in rng.integers(15, 60, 2))
        photo(where / name, rng, (width, height))
        return f"{name};{width};{height};5;5;{width - 6};{height - 6};{label}\r\n"

    train: Listed = []
    for c in range(43):
        where = train_folder / f"{c:05d}"
        rows = [write(where, f"00000_{i:05d}.ppm", c) for i in range(per_class)]
        (where / f"GT-{c:05d}.csv").write_text(header + "".join(rows), newline="")
        train += [(where / f"00000_{i:05d}.ppm", c) for i in range(per_class)]
    labels = rng.integers(0, 43, n_test).tolist()
    rows = [write(test_folder, f"{i:05d}.ppm", label) for i, label in enumerate(labels)]
    csv = test_folder / "GT-final_test.csv" if ours else folder / "GT-final_test.csv"
    csv.write_text(header + "".join(rows), newline="")
    return train, [(test_folder / f"{i:05d}.ppm", label) for i, label in enumerate(labels)]


def write_tiny(base: Path, layout: str, per_class: int, n_val: int, seed: int = 0) -> tuple[Listed, Listed]:
    """What Tiny-ImageNet's zip file holds in tiny-imagenet-200/, in `base`; val/ as published or by class."""
    rng = np.random.default_rng(seed)
    names = [f"n{n:08d}" for n in sorted(rng.choice(10**8, 200, replace=False).tolist())]
    base.mkdir(parents=True)
    (base / "wnids.txt").write_text("".join(f"{name}\n" for name in rng.permutation(names)))
    train: Listed = []
    for label, name in enumerate(names):
        files = sorted(base / "train" / name / "images" / f"{name}_{i}.JPEG" for i in range(per_class))
        train += [(photo(file, rng, (64, 64)), label) for file in files]
        (base / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t10\t63\t58\n")
    labels = [*range(200), *rng.integers(0, 200, n_val - 200).tolist()]
    rows, val = [], []
    for i, label in enumerate(labels):
        published = layout == "published"
        where = base / "val" / ("images" if published else names[label])
        val.append((label, photo(where / f"val_{i}.JPEG", rng, (64, 64))))
        rows.append(f"val_{i}.JPEG\t{names[label]}\t0\t32\t44\t62\n")
    if layout == "published":
        (base / "val" / "val_annotations.txt").write_text("".join(rows))
    return train, [(file, label) for label, file in sorted(val)]


def write_folder(root: Path, classes: dict[str, int], seed: int = 0, suffix: str = "png") -> list[Path]:
    """A user's own folder: so many images of many sizes in each class, easily told apart by their colour."""
    rng = np.random.default_rng(seed)
    written = []
    for k, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            height, width = rng.integers(12, 40, 2)
            pixels = rng.integers(0, 90, (height, width, 3))
            pixels[..., k % 3] += 160 if k < 3 else 80
            file = root / name / f"{i:04d}.{suffix}"
            Image.fromarray(pixels.astype(np.uint8)).save(file)
            written.append(file)
    return written
