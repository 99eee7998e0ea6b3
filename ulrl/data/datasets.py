"""The data sets: their facts, and reading each into one uint8 ImageSet.

Means, deviations and augmentation are BackdoorBench's for the sets that it has; Fashion-MNIST's and the
digits' and the scenes' are those of their own training pixels. `folder` is the user's own; its facts are in its files.
"""

from __future__ import annotations

import gzip
import math
import os
import socket
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ulrl.data import layouts
from ulrl.data.imagefiles import read_images
from ulrl.data.imageset import DatasetSpec, ImageSet
from ulrl.data.scenes import cached_scenes
from ulrl.errors import UserError
from ulrl.files import find_input
from ulrl.registry import nearest
from ulrl.seeds import drawn, generator
from ulrl.untrusted.opening import opened

_CLOTHES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR100 = tuple(
    """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
    lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
    pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal
    shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank
    telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm""".split()
)

SPECS = {
    spec.name: spec
    for spec in (
        DatasetSpec("digits", 10, 1, 8, 8, (0.305,), (0.376,), crop_padding=1),
        DatasetSpec("mnist", 10, 1, 28, 28, (0.5,), (0.5,)),
        DatasetSpec("fashion_mnist", 10, 1, 28, 28, (0.286,), (0.353,), class_names=_CLOTHES),
        DatasetSpec(
            "fashion_scenes", 10, 3, 32, 32, (0.498, 0.453, 0.434), (0.251, 0.233, 0.242), class_names=_CLOTHES
        ),
        DatasetSpec(
            "cifar10", 10, 3, 32, 32, (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261),
            hflip=True, class_names=_CIFAR10,
        ),
        DatasetSpec(
            "cifar100", 100, 3, 32, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), class_names=_CIFAR100
        ),
        DatasetSpec("gtsrb", 43, 3, 32, 32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        DatasetSpec("tiny", 200, 3, 64, 64, (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    )
}  # fmt: skip
DATASETS = (*SPECS, "folder")

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
DOWNLOAD_TIMEOUT = 30.0  # seconds without an answer
LARGEST_CIFAR = 200_000_000  # bytes of the largest file of CIFAR, the archive
LARGEST_IDX = 16 + 60_000 * 28 * 28  # bytes of the largest file of MNIST and of Fashion-MNIST: header, training images


def dataset_spec(name: str, dataset_path: str = "./data", img_size: Sequence[int] = ()) -> DatasetSpec:
    """The facts of a data set; only those of `folder` depend on the path and the size.

    Raises:
        UserError: unknown name; `folder` is not such a folder.
    """
    if name not in DATASETS:
        raise UserError(f"unknown dataset {name!r}{nearest(name, list(DATASETS))}")
    return SPECS[name] if name in SPECS else layouts.folder_spec(find_input(dataset_path, shipped=False), img_size)


def load_dataset(name: str, dataset_path: str = "./data", img_size: Sequence[int] = ()) -> tuple[ImageSet, ImageSet]:
    """The (train, test) splits on the CPU, read from `<dataset_path>/<name>`, downloaded where torchvision can.

    `folder` is read from `dataset_path` itself, and its images are resized to `img_size`.

    Raises:
        UserError: unknown name; data that is missing and cannot be downloaded, or is damaged.
    """
    spec = dataset_spec(name, dataset_path, img_size)
    folder = find_input(dataset_path, shipped=False) / (name if name in SPECS else "")
    if name in _READERS:
        train, test = _READERS[name](folder)
        return _image_set(*train, spec), _image_set(*test, spec)
    listed, judged = _LAYOUTS[name](folder)
    whole, n = read_images([*listed, *judged], folder, spec), len(listed)
    # Parts of the file that is mapped: `subset` would read and copy them.
    return ImageSet(whole.images[:n], whole.labels[:n], spec), ImageSet(whole.images[n:], whole.labels[n:], spec)


Split = tuple[np.ndarray[Any, Any], Any]  # images uint8 [N, H, W, C] or [N, H, W], labels [N]


def _image_set(images: np.ndarray[Any, Any], labels: Any, spec: DatasetSpec) -> ImageSet:
    pixels = torch.from_numpy(np.ascontiguousarray(images)).view(-1, spec.height, spec.width, spec.channels)
    return ImageSet(
        pixels.permute(0, 3, 1, 2).contiguous(), torch.as_tensor(np.asarray(labels), dtype=torch.int64), spec
    )


def _digits(folder: Path) -> tuple[Split, Split]:
    """scikit-learn's 1,797 handwritten digits, 0..16 grey; a fixed fifth of each class is the test split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    a, b, y, z = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    return (a, y), (b, z)


def _mnist_like(class_name: str, *elsewhere: Path) -> Callable[[Path], tuple[Split, Split]]:
    """A reader of torchvision's `<class_name>/raw` layout; `elsewhere` are folders with the same files."""

    def read(folder: Path) -> tuple[Split, Split]:
        raw = folder / class_name / "raw"
        for place in (raw, *elsewhere):
            if _idx_file(place, "train-images-idx3-ubyte"):
                return _read_mnist(place)
        with _download(folder, class_name, [str(raw), *map(str, elsewhere)]) as datasets:
            getattr(datasets, class_name)(folder, download=True)
        return _read_mnist(raw)

    return read


def _fashion_scenes(folder: Path) -> tuple[Split, Split]:
    """Fashion-MNIST's garments, read from where `fashion_mnist` lies, over photographs."""
    (a, y), (b, z) = _READERS["fashion_mnist"](folder.parent / "fashion_mnist")
    return (cached_scenes(a, 0, test=False), y), (cached_scenes(b, 1, test=True), z)


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def _read_mnist(folder: Path) -> tuple[Split, Split]:
    train, test = (
        (_read_idx(folder, f"{part}-images-idx3-ubyte"), _read_idx(folder, f"{part}-labels-idx1-ubyte"))
        for part in ("train", "t10k")
    )
    for images, labels in (train, test):
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or labels.max(initial=0) > 9:
            raise UserError(f"{folder} does not hold 28x28 images with as many labels from 0 to 9; remove it")
    return train, test


def _read_idx(folder: Path, name: str) -> np.ndarray[Any, Any]:
    """An IDX file of unsigned bytes, gzipped or not (magic 0x0000 08 ndim, big-endian sizes, bytes).

    Raises:
        UserError: it is missing, damaged, no plain file, or larger than any of the two sets'.
    """
    path = _idx_file(folder, name)
    if path is None:
        raise UserError(f"{folder / name} is missing; remove {folder} to have it downloaded again")
    try:
        with opened(path, LARGEST_IDX) as file, gzip.open(file) if path.suffix == ".gz" else file as bare:
            content = bare.read(LARGEST_IDX + 1)
        if len(content) > LARGEST_IDX:  # a small .gz can hold any number of bytes
            raise UserError(f"{path} holds more than {LARGEST_IDX} bytes, those of 60,000 images; is it another file?")
        ndim = content[3]
        shape = np.frombuffer(content, ">i4", ndim, 4)
        if content[:3] != b"\0\0\x08" or len(content) != 4 + 4 * ndim + math.prod(map(int, shape)):
            raise ValueError
        return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape).copy()
    except (OSError, EOFError, ValueError, IndexError, zlib.error):
        raise UserError(f"{path} is damaged; remove it to have it downloaded again") from None


def _cifar(class_name: str, title: str) -> Callable[[Path], tuple[Split, Split]]:
    """A reader of torchvision's layout: pickled arrays, opened only if their MD5 is that of the publisher's."""

    def read(folder: Path) -> tuple[Split, Split]:
        from ulrl.tv import torchvision

        cls = getattr(torchvision.datasets, class_name)
        parts = [name for name, _ in (*cls.train_list, *cls.test_list)] + [cls.meta["filename"]]
        for file in (folder / cls.filename, *(folder / cls.base_folder / part for part in parts)):
            if os.path.lexists(file):  # torchvision reads all of it, for its checksum, whatever it is
                with opened(file, LARGEST_CIFAR):
                    pass
        try:
            train, test = cls(folder, train=True), cls(folder, train=False)
        except (OSError, RuntimeError):  # torchvision could not read them; found them missing, or a checksum wrong
            with _download(folder, title, [str(folder / cls.base_folder)]):
                train, test = cls(folder, train=True, download=True), cls(folder, train=False)
        return (train.data, train.targets), (test.data, test.targets)

    return read


@contextmanager
def _download(folder: Path, title: str, looked_in: list[str]) -> Iterator[Any]:
    """Yield torchvision's data sets for a download into `folder`; a failed one is told in one line."""
    from ulrl.tv import torchvision

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torchvision's own downloads would wait for ever
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield torchvision.datasets
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        hint = "; or apt-get install dataset-fashion-mnist" if title == "FashionMNIST" else ""
        raise UserError(
            f"{title} is missing or damaged: looked in {', '.join(looked_in)}, and the download failed "
            f"({reason}); put torchvision's files there on a machine with internet access{hint}"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


_READERS: dict[str, Callable[[Path], tuple[Split, Split]]] = {
    "digits": _digits,
    "mnist": _mnist_like("MNIST"),
    "fashion_mnist": _mnist_like("FashionMNIST", DEBIAN_FASHION_MNIST),
    "fashion_scenes": _fashion_scenes,
    "cifar10": _cifar("CIFAR10", "CIFAR-10"),
    "cifar100": _cifar("CIFAR100", "CIFAR-100"),
}
_LAYOUTS: dict[str, Callable[[Path], layouts.Splits]] = {
    "gtsrb": layouts.gtsrb,
    "tiny": layouts.tiny,
    "folder": layouts.folder,
}


def clean_subset(size: int, ratio: float, seed: int) -> torch.Tensor:
    """Indices (int64 [n], ascending) of the clean samples that a defense is given: round(ratio * size) of them.

    Drawn without replacement and not balanced over the classes, as in BackdoorBench and ULRL.

    Raises:
        UserError: that would be fewer than one.
    """
    count = round(ratio * size)
    if count < 1:
        raise UserError(f"ratio {ratio} of {size} training images is less than one sample; raise --ratio")
    return drawn(size, count, generator(seed, "clean_subset"))
