"""The data sets, as they lie on disk and as batches."""

from __future__ import annotations

import gzip
import socket
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import peer_data as peer
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ulrl.data.batches import Batches, augment, normalise
from ulrl.data.datasets import SPECS, clean_subset, dataset_spec, load_dataset
from ulrl.data.imageset import DatasetSpec, ImageSet, PoisonedSet
from ulrl.errors import UserError
from ulrl.tv import torchvision

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def refused(name: str, folder: Path, *words: str) -> str:
    """Loading `name` from `folder` ends in a UserError of one line that has all `words`."""
    with pytest.raises(UserError) as caught:
        load_dataset(name, str(folder))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def chw(images: np.ndarray) -> torch.Tensor:
    """[N, H, W] or [N, H, W, C] to [N, C, H, W]."""
    tensor = torch.from_numpy(images)
    return tensor.unsqueeze(1) if images.ndim == 3 else tensor.permute(0, 3, 1, 2)


def check(data: ImageSet, spec: DatasetSpec, size: int) -> None:
    assert data.spec == spec
    assert len(data) == size
    assert data.images.shape == (size, spec.channels, spec.height, spec.width)
    assert data.images.dtype == torch.uint8
    assert data.labels.shape == (size,)
    assert data.labels.dtype == torch.int64
    assert set(data.labels.tolist()) <= set(range(spec.num_classes))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's downloads go to a closed port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
    monkeypatch.setenv("no_proxy", "*")
    for cls in (torchvision.datasets.MNIST, torchvision.datasets.FashionMNIST):
        monkeypatch.setattr(cls, "mirrors", [url])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"{url}cifar-10-python.tar.gz")


# Reading


def test_digits() -> None:
    from sklearn.datasets import load_digits

    train, test = load_dataset("digits")
    check(train, SPECS["digits"], 1437)
    check(test, SPECS["digits"], 360)
    pixels, labels = load_digits(return_X_y=True)
    published = sorted(
        (*(np.round(x * 255 / 16).astype(int).tolist()), int(y)) for x, y in zip(pixels, labels, strict=True)
    )
    read = sorted(
        (*image.flatten().tolist(), label)
        for part in (train, test)
        for image, label in zip(part.images, part.labels.tolist(), strict=True)
    )
    assert read == published  # each image in one split, with its label
    for part in (train, test):
        assert (part.labels.bincount() / len(part) - 0.1).abs().max() < 0.01


def test_real_fashion_mnist() -> None:
    if not DEBIAN.is_dir():
        pytest.fail(f"{DEBIAN} is missing: apt-get install dataset-fashion-mnist")
    train, test = load_dataset("fashion_mnist")
    check(train, SPECS["fashion_mnist"], 60_000)
    check(test, SPECS["fashion_mnist"], 10_000)
    assert train.labels.bincount().tolist() == [6000] * 10
    assert test.labels.bincount().tolist() == [1000] * 10
    assert train.labels[:5].tolist() == [9, 0, 0, 3, 0]
    pixels = train.images.float() / 255
    assert pixels.mean().item() == pytest.approx(SPECS["fashion_mnist"].mean[0], abs=1e-3)
    assert pixels.std().item() == pytest.approx(SPECS["fashion_mnist"].std[0], abs=1e-3)
    raw = gzip.decompress((DEBIAN / "t10k-images-idx3-ubyte.gz").read_bytes())
    assert bytes(test.images[-1].flatten().tolist()) == raw[-784:]


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_torchvisions_layout(tmp_path: Path, name: str, folder: str, zipped: bool) -> None:
    held = peer.write_mnist(tmp_path / name / folder / "raw", 12, 7, zipped=zipped)
    train, test = load_dataset(name, str(tmp_path))
    for data, part, size in ((train, "train", 12), (test, "t10k", 7)):
        check(data, SPECS[name], size)
        assert torch.equal(data.images, chw(held[f"{part}-images-idx3-ubyte"]))
        assert data.labels.tolist() == held[f"{part}-labels-idx1-ubyte"].tolist()


def test_a_relative_data_folder_lies_below_home_or_the_working_directory(
    empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer.write_mnist(empty_home / "mine" / "mnist" / "MNIST" / "raw", 5, 4, zipped=False)
    assert [len(part) for part in load_dataset("mnist", "mine")] == [5, 4]
    other = empty_home / "other"
    peer.write_mnist(other / "mine" / "mnist" / "MNIST" / "raw", 3, 2, zipped=False)
    monkeypatch.chdir(other)
    assert [len(part) for part in load_dataset("mnist", "mine")] == [3, 2]


@pytest.mark.usefixtures("no_network")
def test_missing_mnist_is_told_in_one_line(tmp_path: Path) -> None:
    raw = tmp_path / "mnist" / "MNIST" / "raw"
    message = refused("mnist", tmp_path, "MNIST is missing", str(raw), "internet")
    assert "apt-get" not in message


@pytest.mark.usefixtures("no_network")
def test_a_data_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    refused("mnist", tmp_path / "file", str(tmp_path / "file"))


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    raw = tmp_path / "mnist" / "MNIST" / "raw"
    peer.write_mnist(raw, 5, 4, zipped=True)
    (raw / "t10k-labels-idx1-ubyte.gz").unlink()
    refused("mnist", tmp_path, str(raw / "t10k-labels-idx1-ubyte"), "missing")


IMAGES = peer.idx(np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28))
LABELS = peer.idx(np.array([3, 4], np.uint8))


GZIPPED = gzip.compress(LABELS, mtime=0)
DAMAGED = {
    "empty": ("train-images-idx3-ubyte", b""),
    "magic cut": ("train-images-idx3-ubyte", IMAGES[:3]),
    "header cut": ("train-images-idx3-ubyte", IMAGES[:10]),
    "a byte short": ("train-images-idx3-ubyte", IMAGES[:-1]),
    "a byte long": ("train-images-idx3-ubyte", IMAGES + b"\0"),
    "floats": ("train-images-idx3-ubyte", b"\0\0\x0d" + IMAGES[3:]),
    "a web page": ("train-images-idx3-ubyte", b"<html>404 Not Found</html>" * 40),
    "labels as images": ("train-images-idx3-ubyte", LABELS),
    "small images": ("train-images-idx3-ubyte", peer.idx(np.zeros((2, 14, 14), np.uint8))),
    "tall images": ("train-images-idx3-ubyte", peer.idx(np.zeros((2, 56, 28), np.uint8))),
    "more images than labels": ("train-images-idx3-ubyte", peer.idx(np.zeros((3, 28, 28), np.uint8))),
    "images as labels": ("t10k-labels-idx1-ubyte", IMAGES),
    "fewer labels than images": ("t10k-labels-idx1-ubyte", peer.idx(np.array([3], np.uint8))),
    "no such class": ("t10k-labels-idx1-ubyte", peer.idx(np.array([3, 10], np.uint8))),
    "not gzipped": ("t10k-labels-idx1-ubyte.gz", LABELS),
    "empty gz": ("t10k-labels-idx1-ubyte.gz", b""),
    "gz cut": ("t10k-labels-idx1-ubyte.gz", GZIPPED[:-9]),
    "gz header cut": ("t10k-labels-idx1-ubyte.gz", GZIPPED[:5]),
    "gz garbled": ("t10k-labels-idx1-ubyte.gz", GZIPPED[:10] + b"\xff" * 12),
    "gz checksum wrong": ("t10k-labels-idx1-ubyte.gz", GZIPPED[:-6] + b"\0\0" + GZIPPED[-4:]),
}


@pytest.mark.parametrize(("name", "content"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_idx_files_are_told_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    raw = tmp_path / "mnist" / "MNIST" / "raw"
    peer.write_mnist(raw, 2, 2, zipped=False)
    (raw / name.removesuffix(".gz")).unlink()
    (raw / name).write_bytes(content)
    refused("mnist", tmp_path, str(raw), "damaged")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.booleans())
def test_any_byte_changed_gives_a_whole_set_or_one_line(tmp_path: Path, data: st.DataObject, zipped: bool) -> None:
    content = bytearray(gzip.compress(IMAGES, mtime=0) if zipped else IMAGES)
    # Header bytes are the interesting ones: try them as often as all pixels together.
    at = data.draw(st.integers(0, 15) | st.integers(0, len(content) - 1))
    content[at] = data.draw(st.integers(0, 255))
    folder = Path(tempfile.mkdtemp(dir=tmp_path))  # what was read from a folder may be remembered
    raw = folder / "mnist" / "MNIST" / "raw"
    peer.write_mnist(raw, 2, 2, zipped=False)
    (raw / "train-images-idx3-ubyte").unlink()
    (raw / ("train-images-idx3-ubyte" + zipped * ".gz")).write_bytes(content)
    try:
        train, _ = load_dataset("mnist", str(folder))
    except UserError as error:
        told = str(error)
    else:
        check(train, SPECS["mnist"], 2)
        return
    assert "\n" not in told
    assert str(raw) in told


def publish_cifar10(folder: Path, n_per_batch: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict]:
    """Made-up CIFAR-10 files, which torchvision's checksums are made to expect; what the batches hold."""
    batches, digests = peer.write_cifar10(folder, n_per_batch)
    cls = torchvision.datasets.CIFAR10
    for attribute in ("train_list", "test_list"):
        files = [[name, digests[name]] for name, _ in getattr(cls, attribute)]
        monkeypatch.setattr(cls, attribute, files)
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": digests["batches.meta"]})
    return batches


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = publish_cifar10(tmp_path / "cifar10", 3, monkeypatch)
    train, test = load_dataset("cifar10", str(tmp_path))
    check(train, SPECS["cifar10"], 15)
    check(test, SPECS["cifar10"], 3)
    names = [f"data_batch_{i}" for i in range(1, 6)]
    # A row holds 1,024 red values, row by row, then the green ones, then the blue ones.
    rows = np.concatenate([batches[name]["data"] for name in names])
    assert torch.equal(train.images, torch.from_numpy(rows).view(15, 3, 32, 32))
    assert train.labels.tolist() == [label for name in names for label in batches[name]["labels"]]
    assert torch.equal(test.images, torch.from_numpy(batches["test_batch"]["data"]).view(3, 3, 32, 32))
    assert test.labels.tolist() == batches["test_batch"]["labels"]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_damaged_cifar10_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    publish_cifar10(tmp_path / "cifar10", 2, monkeypatch)
    damaged = tmp_path / "cifar10" / "cifar-10-batches-py" / file
    content = bytearray(damaged.read_bytes())
    content[-20] ^= 1
    damaged.write_bytes(content)
    refused("cifar10", tmp_path, "CIFAR-10", "damaged", str(damaged.parent))


def test_cifar10_that_may_not_be_read_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of another user's files; of root's tests the operating system hides none."""
    publish_cifar10(tmp_path / "cifar10", 2, monkeypatch)

    def denied(path: str, md5: str) -> bool:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", denied)
    refused("cifar10", tmp_path, "CIFAR-10", "Permission denied", str(tmp_path / "cifar10" / "cifar-10-batches-py"))


@pytest.mark.usefixtures("no_network")
def test_missing_cifar10_is_told_in_one_line(tmp_path: Path) -> None:
    refused("cifar10", tmp_path, "CIFAR-10 is missing", str(tmp_path / "cifar10" / "cifar-10-batches-py"), "internet")


def test_unknown_data_sets_name_the_nearest(tmp_path: Path) -> None:
    refused("cifar11", tmp_path, "cifar11", "cifar10")
    with pytest.raises(UserError, match="fashion_mnist"):
        dataset_spec("fashion-mnist")


# Batches

SPEC = DatasetSpec("toy", 4, 3, 6, 5, (0.2, 0.5, 0.7), (0.25, 0.5, 0.1), crop_padding=2, hflip=True)


def noise(n: int, spec: DatasetSpec = SPEC, seed: int = 0) -> ImageSet:
    rng = torch.Generator().manual_seed(seed)
    shape = (n, spec.channels, spec.height, spec.width)
    # No zeros, so that padding is told from the image.
    images = torch.randint(1, 256, shape, generator=rng, dtype=torch.uint8)
    return ImageSet(images, torch.arange(n) % spec.num_classes, spec)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_normalise() -> None:
    images = noise(4).images
    images[0, :, 0, 0], images[0, :, 0, 1] = 0, 255
    before = images.clone()
    x = normalise(images, SPEC)
    wanted = (images.numpy().astype(np.float64) / 255 - np.reshape(SPEC.mean, (1, 3, 1, 1))) / np.reshape(
        SPEC.std, (1, 3, 1, 1)
    )
    assert x.dtype == torch.float32
    assert x.shape == images.shape
    assert x.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(x.numpy(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(images, before)


def crops(image: torch.Tensor, spec: DatasetSpec) -> dict[bytes, tuple[int, int, bool]]:
    """Every crop of one image, flipped or not, by its bytes: the slow way, pixel by pixel, as a reference."""
    c, h, w = image.shape
    pad = spec.crop_padding
    canvas = np.zeros((c, h + 2 * pad, w + 2 * pad), np.uint8)
    canvas[:, pad : pad + h, pad : pad + w] = image.numpy()
    found = {}
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            crop = canvas[:, top : top + h, left : left + w]
            found[crop.tobytes()] = (top, left, False)
            if spec.hflip:
                found[crop[:, :, ::-1].tobytes()] = (top, left, True)
    return found


def draws(images: torch.Tensor, spec: DatasetSpec, seed: int) -> list[tuple[int, int, bool]]:
    """What `augment` did to each image."""
    out = augment(images, spec, rng(seed))
    assert out.shape == images.shape
    assert out.dtype == torch.uint8
    return [
        crops(image, spec)[np.ascontiguousarray(got.numpy()).tobytes()] for image, got in zip(images, out, strict=True)
    ]


@settings(max_examples=40, deadline=None)
@given(
    channels=st.sampled_from([1, 3]),
    height=st.integers(4, 9),
    width=st.integers(4, 9),
    pad=st.integers(0, 3),
    hflip=st.booleans(),
    n=st.integers(1, 6),
    seed=st.integers(0, 2**32),
)
def test_augment_is_a_crop_of_the_padded_image_perhaps_mirrored(
    channels: int, height: int, width: int, pad: int, hflip: bool, n: int, seed: int
) -> None:
    stats = (0.5,) * channels
    spec = DatasetSpec("toy", 4, channels, height, width, stats, stats, crop_padding=pad, hflip=hflip)
    images = noise(n, spec, seed).images
    before = images.clone()
    draws(images, spec, seed)  # a KeyError if an output is none of the crops
    assert torch.equal(images, before)


def test_augment_draws_every_offset_and_flip_for_each_image_anew() -> None:
    images = noise(600).images
    drawn = draws(images, SPEC, 1)
    places = [(top, left) for top, left, _ in drawn]
    assert set(places) == {(top, left) for top in range(5) for left in range(5)}
    assert max(places.count(place) for place in set(places)) < 60  # 24 each on average
    assert 240 < sum(flip for *_, flip in drawn) < 360
    assert draws(images, SPEC, 1) == drawn
    assert draws(images, SPEC, 2) != drawn


def test_only_cifar10_is_mirrored() -> None:
    assert {name for name, spec in SPECS.items() if spec.hflip} == {"cifar10"}
    drawn = draws(noise(100).images, replace(SPEC, hflip=False), 0)
    assert len(set(drawn)) > 10
    assert not any(flip for *_, flip in drawn)


def test_without_a_generator_nothing_is_random() -> None:
    data = noise(9)
    batches = list(Batches(data, 4))
    assert [len(y) for _, y in batches] == [4, 4, 1]
    assert torch.equal(torch.cat([x for x, _ in batches]), normalise(data.images, SPEC))
    assert torch.equal(torch.cat([y for _, y in batches]), data.labels)


def seen(batches: Batches) -> list[list[int]]:
    """Which images each batch shows, in order; for sets made by `numbered`."""
    got = []
    for x, y in batches:
        at = ((x * batches.data.spec.std[0] + batches.data.spec.mean[0]) * 255).round().to(torch.int64)[:, 0, 0, 0]
        assert torch.equal(y, batches.data.labels[at])
        got.append(at.tolist())
    assert len(got) == len(batches)
    return got


def numbered(n: int) -> ImageSet:
    """Image i is all i."""
    spec = DatasetSpec("toy", 7, 1, 4, 4, (0.5,), (0.5,), crop_padding=1)
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 4, 4).contiguous()
    return ImageSet(images, torch.arange(n) % 7, spec)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), size=st.integers(2, 12), drop_last=st.booleans(), seed=st.integers(0, 99))
def test_a_shuffled_pass_shows_each_image_once(n: int, size: int, drop_last: bool, seed: int) -> None:
    shown = seen(Batches(numbered(n), size, rng(seed), augmented=False, drop_last=drop_last))
    flat = [i for batch in shown for i in batch]
    assert len(set(flat)) == len(flat)
    assert all(len(batch) == size for batch in shown[:-1])
    left_out = n - len(flat)
    if n < size:
        assert left_out == 0  # too few for one full batch: one that is not full, drop_last or not
    elif drop_last:
        assert left_out == n % size
    else:
        assert left_out == (1 if n % size == 1 else 0)  # BatchNorm cannot train on one image


def test_each_pass_has_its_own_order_and_a_seed_repeats_all() -> None:
    data = numbered(30)
    passes = Batches(data, 8, rng(5), augmented=False)
    first, second = seen(passes), seen(passes)
    assert first != second
    assert [i for batch in first for i in batch] != list(range(30))
    again = Batches(data, 8, rng(5), augmented=False)
    assert [seen(again), seen(again)] == [first, second]
    assert seen(Batches(data, 8, rng(6), augmented=False)) != first


def test_a_seed_repeats_the_augmentation_too() -> None:
    data = noise(20)
    a, b, c = (torch.cat([x for x, _ in Batches(data, 8, rng(seed))]) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    plain = torch.cat([x for x, _ in Batches(data, 8, rng(1), augmented=False)])
    assert not torch.equal(a, plain)
    assert a.shape == plain.shape


# Sets and subsets


def test_a_subset_keeps_the_given_order_and_every_column() -> None:
    data = noise(10)
    part = data.subset(torch.tensor([7, 2, 2]))
    assert torch.equal(part.images, data.images[[7, 2, 2]])
    assert part.labels.tolist() == [3, 2, 2]
    assert part.spec == data.spec
    poisoned = PoisonedSet(data.images, data.labels, SPEC, (data.labels + 1) % 4, torch.arange(100, 110))
    part = poisoned.subset(torch.tensor([9, 0]))
    assert isinstance(part, PoisonedSet)
    assert part.original_indices.tolist() == [109, 100]
    assert part.original_labels.tolist() == [2, 1]
    assert len(data.subset(torch.tensor([], dtype=torch.int64))) == 0


def test_a_changed_subset_leaves_the_set_alone() -> None:
    data = noise(4)
    before = data.images.clone()
    part = data.subset(torch.arange(4))
    part.images.zero_()
    part.labels.zero_()
    assert torch.equal(data.images, before)
    assert data.labels.tolist() == [0, 1, 2, 3]


def test_to_moves_every_column() -> None:
    data = noise(3)
    poisoned = PoisonedSet(data.images, data.labels, SPEC, data.labels, data.labels)
    for part in (data, poisoned):
        moved = part.to("meta")  # the one other device that every machine has
        assert type(moved) is type(part)
        assert moved.device.type == "meta"
        assert {v.device.type for v in vars(moved).values() if isinstance(v, torch.Tensor)} == {"meta"}
        assert part.device.type == "cpu"


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 3000), ratio=st.floats(0, 1), seed=st.integers(0, 2**40))
def test_clean_subset(size: int, ratio: float, seed: int) -> None:
    if round(ratio * size) < 1:
        with pytest.raises(UserError, match="--ratio"):
            clean_subset(size, ratio, seed)
        return
    index = clean_subset(size, ratio, seed)
    assert index.dtype == torch.int64
    assert index.tolist() == sorted(set(index.tolist()))
    assert len(index) == round(ratio * size)
    assert index.min() >= 0
    assert index.max() < size
    assert torch.equal(index, clean_subset(size, ratio, seed))


def test_clean_subsets_of_other_seeds_differ_and_cover_the_set() -> None:
    drawn = [clean_subset(1000, 0.1, seed).tolist() for seed in range(60)]
    assert len({tuple(index) for index in drawn}) == 60
    assert len({i for index in drawn for i in index}) > 990
