"""Which image files a data set consists of: GTSRB, Tiny-ImageNet, a user's own folder.

The samples come in the order that BackdoorBench gives them, because a record names poisoned ones by position.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from ulrl.data.imagefiles import SIDE, SUFFIXES, Sample
from ulrl.data.imageset import DatasetSpec
from ulrl.errors import UserError
from ulrl.files import PACKAGE_ROOT
from ulrl.seeds import generator
from ulrl.untrusted.opening import read_text

Splits = tuple[list[Sample], list[Sample]]

GTSRB_CLASSES = 43
TINY_CLASSES = 200
DEEPEST = 50  # folders inside one another
TINY_ARCHIVE = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"


def _how_to_fetch(script: str, by_hand: str) -> str:
    """What to do about missing images: in a checkout there is a script for that."""
    return f"{script} fetches it where there is internet access" if (PACKAGE_ROOT / script).is_file() else by_hand


def gtsrb(folder: Path) -> Splits:
    """BackdoorBench's layout (Train/000cc/ with a csv, 39,209 images; Test/), or torchvision's (26,640 to train on).

    Raises:
        UserError: neither is there, or a part is missing or damaged.
    """
    classes = [f"{c:05d}" for c in range(GTSRB_CLASSES)]
    train, test = folder / "Train", folder / "Test"
    if train.is_dir():
        listed = [sample for c in classes for sample in _gtsrb_csv(train / c / f"GT-{c}.csv", train / c)]
        return listed, _gtsrb_csv(test / "GT-final_test.csv", test)
    for base in (folder, folder / "gtsrb"):  # torchvision's root=./data and root=./data/gtsrb
        train, test = base / "GTSRB" / "Training", base / "GTSRB" / "Final_Test" / "Images"
        if train.is_dir():
            return by_class(train, classes), _gtsrb_csv(base / "GT-final_test.csv", test)
    by_torchvision = (
        f"torchvision.datasets.GTSRB({str(folder.parent)!r}, 'train', download=True), and 'test', fetches it"
    )
    raise UserError(
        f"GTSRB is missing: {folder} holds neither BackdoorBench's Train/ nor torchvision's GTSRB/Training/; "
        + _how_to_fetch("sh/fetch_gtsrb.sh", by_torchvision)
    )


def _gtsrb_csv(file: Path, images: Path) -> list[Sample]:
    """The rows of a csv, `;` between: the file's name first, its class in the eighth column, a line of names above."""
    try:
        rows = [row for row in csv.reader(io.StringIO(read_text(file), newline=""), delimiter=";") if row][1:]
        samples = [(f"{images}/{row[0]}", int(row[7])) for row in rows]
    except (ValueError, IndexError, csv.Error):
        raise UserError(f"{file} is damaged; lay GTSRB out again") from None
    fits = all(re.fullmatch(r"[\w-]+\.ppm", row[0]) for row in rows)
    if not samples or not fits or not all(0 <= label < GTSRB_CLASSES for _, label in samples):
        raise UserError(f"{file} is damaged: it must list .ppm files and classes from 0 to 42; lay GTSRB out again")
    return samples


def tiny(folder: Path) -> Splits:
    """tiny-imagenet-200/ or its contents; val/ as published (images/ and annotations) or, by BackdoorBench, by class.

    Raises:
        UserError: it is not there, or a part is missing or damaged.
    """
    base = next((b for b in (folder / "tiny-imagenet-200", folder) if (b / "train").is_dir()), None)
    if base is None:
        raise UserError(
            f"Tiny-ImageNet is missing: {folder} holds no tiny-imagenet-200/train/; "
            + _how_to_fetch("sh/fetch_tiny.sh", f"unpack {TINY_ARCHIVE} there")
        )
    classes = subfolders(base / "train")
    if len(classes) != TINY_CLASSES:
        raise UserError(f"{base / 'train'} holds {len(classes)} classes, not {TINY_CLASSES}; unpack it again")
    val = base / "val"
    published = any(_images(val / "images"))  # many a script that sorts val/ by class leaves the annotations there
    test = _tiny_annotations(val / "val_annotations.txt", classes) if published else by_class(val, classes)
    return by_class(base / "train", classes), test


def _tiny_annotations(file: Path, classes: Sequence[str]) -> list[Sample]:
    """Lines of image, class and box, with tabs between; in the order of `val/` sorted into a folder per class."""
    labels = {name: label for label, name in enumerate(classes)}
    try:
        rows = [line.split("\t") for line in read_text(file).splitlines()]
        named = [(labels[row[1]], row[0]) for row in rows]
    except (ValueError, IndexError, KeyError):
        named = []
    if not named or not all(re.fullmatch(r"\w+\.JPEG", name) for _, name in named):
        raise UserError(f"{file} is damaged: each line must name an image and one of the classes; unpack it again")
    return [(f"{file.parent}/images/{name}", label) for label, name in sorted(named)]


DEFAULT_SIZE = 64
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation


def height_and_width(img_size: Sequence[int]) -> tuple[int, int]:
    """Both from the numbers that --img_size was given: height and width, or one for both.

    Raises:
        UserError: not one or two numbers from 8 to 1024.
    """
    sizes = tuple(img_size) * (2 if len(img_size) == 1 else 1)
    if len(sizes) != 2 or not all(8 <= n <= SIDE for n in sizes):
        raise UserError(f"img_size {' '.join(map(str, img_size))}: height and width must each be from 8 to {SIDE}")
    return sizes[0], sizes[1]


def folder_spec(root: Path, img_size: Sequence[int]) -> DatasetSpec:
    """The facts of a user's own folder: a class per subfolder, in the order of their names.

    Its images become RGB of `img_size` (height and width, or one number for both; none: 64). They are
    normalised with ImageNet's mean and deviation, which suit torchvision's pretrained weights and
    photographs, and never mirrored, since the mirror image of a sign or a letter may be another class.

    Raises:
        UserError: no such folder, fewer than two classes, or a size that is not from 8 to 1024.
    """
    height, width = height_and_width(img_size or (DEFAULT_SIZE,))
    classes = subfolders(_splits(root)[0])
    if len(classes) < 2:
        raise UserError(f"{root} does not hold a subfolder per class; name your folder of images with --dataset_path")
    return DatasetSpec("folder", len(classes), 3, height, width, *IMAGENET, class_names=tuple(classes))


def folder(root: Path) -> Splits:
    """The samples of a user's own folder: train/ and test/ (or val/) where it has both, else a fixed fifth to test.

    Raises:
        UserError: a class without images, or one in test/ only.
    """
    train, test = _splits(root)
    classes = subfolders(train)
    samples = by_class(train, classes)
    if test is None:
        return _divide(samples, classes)
    if unknown := sorted(set(subfolders(test)) - set(classes)):
        raise UserError(f"{test / unknown[0]} is a class that {train} does not have; remove it, or add it there")
    return samples, by_class(test, classes, some=True)


def _splits(root: Path) -> tuple[Path, Path | None]:
    """Where the training and the test images lie; None where there is no such division.

    Raises:
        UserError: no such folder; there is a division, by other names: those would be the classes.
    """
    if not root.is_dir():
        raise UserError(f"{root} is no folder; name the data with --dataset_path")
    inside = subfolders(root)
    if "train" in inside:
        for test in ("test", "val"):
            if test in inside:
                return root / "train", root / test
        if inside == ["train"]:
            raise UserError(
                f"{root} has train/ but no test/; add it, or give {root / 'train'} as --dataset_path, to be divided"
            )
    for name in (name for name in inside if name.lower().startswith("train")):
        first = next(_images(root / name), None)  # those of a folder itself come before those of its subfolders
        if first and Path(first).parent != root / name:
            raise UserError(
                f"{root / name} holds folders of images, as a part to train on does; call it train/ and the other part "
                "test/ or val/; if it is a class, put an image into it itself"
            )
    return root, None


def _divide(samples: list[Sample], classes: Sequence[str]) -> Splits:
    """A fifth of each class, at least one image, to test: the same at every start."""
    labels = np.array([label for _, label in samples])
    order = torch.randperm(len(samples), generator=generator(0, "folder")).numpy()
    to_test = np.zeros(len(samples), bool)
    for label, name in enumerate(classes):
        members = order[labels[order] == label]
        if len(members) < 2:
            raise UserError(f"class {name!r} has one image, but one to train on and one to test are needed; add some")
        to_test[members[: max(1, round(len(members) / 5))]] = True
    pairs = list(zip(samples, to_test, strict=True))
    return [s for s, t in pairs if not t], [s for s, t in pairs if t]


def by_class(root: Path, classes: Sequence[str], *, some: bool = False, flag: str = "--dataset_path") -> list[Sample]:
    """All images in a folder per class. With `some`, a class may have none, as long as not all have none.

    flag: what the user named the folder by.

    Raises:
        UserError: a class, or all of them, without images; a folder that cannot be read.
    """
    samples: list[Sample] = []
    empty = root
    for label, name in enumerate(classes):
        found = [(file, label) for file in _images(root / name)]
        samples += found
        empty = empty if found else root / name
    if not samples or (empty != root and not some):
        raise UserError(f"{empty} holds no image ({', '.join(SUFFIXES)}); add some, or name another {flag}")
    return samples


def subfolders(folder: Path) -> list[str]:
    """The names of a folder's subfolders, in their order, without hidden ones."""
    return sorted(entry.name for entry in _entries(folder) if entry.is_dir())


def _images(folder: Path | str, depth: int = 0) -> Iterator[str]:
    """The images in a folder and, after them, in its subfolders, by name."""
    if depth > DEEPEST:
        raise UserError(f"{folder} lies {depth} folders deep in its class; lay the images out flatter")
    if os.path.isdir(folder):
        for entry in sorted(_entries(folder), key=lambda e: (e.is_dir(), e.name)):
            if entry.is_dir(follow_symlinks=False):  # a link could lead round in a circle
                yield from _images(entry.path, depth + 1)
            elif entry.name.lower().endswith(SUFFIXES):
                yield entry.path


def _entries(folder: Path | str) -> list[os.DirEntry[str]]:
    """What a folder holds, but for hidden things."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}); see that it is there and may be read") from None
