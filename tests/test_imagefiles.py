"""Data sets of an image per file: their layouts, the cache, and a user's own folder from attack to defense."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import tempfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peer_data as peer
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from manners import refused
from PIL import Image

from ulrl.cli import attack_main, defense_main, main
from ulrl.data import imagefiles
from ulrl.data.cache import cache_folder
from ulrl.data.datasets import SPECS, dataset_spec, load_dataset
from ulrl.data.imageset import DatasetSpec, ImageSet
from ulrl.errors import UserError
from ulrl.record import load_record
from ulrl.tv import torchvision

ROOT = Path(__file__).resolve().parent.parent


def holds(data: ImageSet, listed: peer.Listed, spec: DatasetSpec) -> None:
    """The set has these images, resized as torchvision would, in this order."""
    assert data.spec == spec
    assert data.labels.dtype == torch.int64
    assert data.labels.tolist() == [label for _, label in listed]
    assert data.images.dtype == torch.uint8
    assert data.images.shape == (len(listed), spec.channels, spec.height, spec.width)
    resize = torchvision.transforms.Resize((spec.height, spec.width))
    wanted = [np.asarray(resize(Image.open(file).convert("RGB"))) for file, _ in listed]
    assert torch.equal(data.images, torch.from_numpy(np.stack(wanted)).permute(0, 3, 1, 2))


# Layouts


def test_cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, digests = peer.write_cifar100(tmp_path / "cifar100", 7, 4)
    cls = torchvision.datasets.CIFAR100
    monkeypatch.setattr(cls, "train_list", [["train", digests["train"]]])
    monkeypatch.setattr(cls, "test_list", [["test", digests["test"]]])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": digests["meta"]})
    for data, name, size in zip(load_dataset("cifar100", str(tmp_path)), ("train", "test"), (7, 4), strict=True):
        assert data.labels.tolist() == held[name]["fine_labels"]
        assert torch.equal(data.images, torch.from_numpy(held[name]["data"]).view(size, 3, 32, 32))


def test_missing_or_damaged_cifar100_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "url", "http://127.0.0.1:9/cifar-100-python.tar.gz")
    peer.write_cifar100(tmp_path / "cifar100", 7, 4)  # whose checksums are not the publisher's
    for folder in (tmp_path, tmp_path / "nothing"):
        refused(lambda: load_dataset("cifar100", str(folder)), "CIFAR-100", "cifar-100-python", "internet")  # noqa: B023


@pytest.mark.parametrize("layout", ["backdoorbench", "torchvision", "torchvision below"])
def test_gtsrb(tmp_path: Path, layout: str) -> None:
    folder = tmp_path / "gtsrb" / ("gtsrb" if layout.endswith("below") else "")
    train, test = peer.write_gtsrb(folder, layout.split()[0], per_class=3, n_test=20)
    for _ in ("first", "second"):
        read = load_dataset("gtsrb", str(tmp_path))
        holds(read[0], train, SPECS["gtsrb"])
        holds(read[1], test, SPECS["gtsrb"])
    if layout != "backdoorbench":
        theirs = [torchvision.datasets.GTSRB(folder.parent, split) for split in ("train", "test")]
        assert [label for _, label in theirs[0]] == read[0].labels.tolist()
        assert [label for _, label in theirs[1]] == read[1].labels.tolist()


@pytest.mark.parametrize(("layout", "inner"), [("published", ""), ("by class", "tiny-imagenet-200")])
def test_tiny(tmp_path: Path, layout: str, inner: str) -> None:
    train, test = peer.write_tiny(tmp_path / "tiny" / inner, layout, per_class=2, n_val=240)
    read = load_dataset("tiny", str(tmp_path))
    holds(read[0], train, SPECS["tiny"])
    holds(read[1], test, SPECS["tiny"])
    if layout == "by class":  # BackdoorBench reads this layout with ImageFolder
        for part, split in zip(read, ("train", "val"), strict=True):
            assert torchvision.datasets.ImageFolder(tmp_path / "tiny" / inner / split).targets == part.labels.tolist()


def test_tiny_sorted_by_a_script_that_leaves_the_annotations(tmp_path: Path) -> None:
    """Also where it leaves an empty images/; but not where it has been killed among the images."""
    base = tmp_path / "tiny" / "tiny-imagenet-200"
    peer.write_tiny(base, "published", per_class=1, n_val=200)
    whole = load_dataset("tiny", str(tmp_path))[1]
    val = base / "val"
    for row in (val / "val_annotations.txt").read_text().splitlines():
        file, name = row.split("\t")[:2]
        (val / name).mkdir(exist_ok=True)
        (val / "images" / file).rename(val / name / file)
    again = load_dataset("tiny", str(tmp_path))[1]
    assert torch.equal(again.images, whole.images)
    assert torch.equal(again.labels, whole.labels)
    (val / name / file).rename(val / "images" / file)
    refused(lambda: load_dataset("tiny", str(tmp_path)), str(val / "images"))


@pytest.mark.parametrize(
    ("name", "words"), [("gtsrb", "torchvision.datasets.GTSRB"), ("tiny", "tiny-imagenet-200.zip")]
)
def test_missing_images_say_what_to_do_where_there_are_no_scripts(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installed from a wheel."""
    monkeypatch.setattr("ulrl.data.layouts.PACKAGE_ROOT", tmp_path)
    with pytest.raises(UserError, match=words) as said:
        load_dataset(name, str(tmp_path))
    assert str(tmp_path) in str(said.value)
    assert "sh/" not in str(said.value)


@pytest.mark.parametrize(("name", "script"), [("gtsrb", "fetch_gtsrb.sh"), ("tiny", "fetch_tiny.sh")])
def test_missing_files_are_told_with_the_script_that_fetches_them(tmp_path: Path, name: str, script: str) -> None:
    refused(lambda: load_dataset(name, str(tmp_path)), str(tmp_path / name), script)
    (tmp_path / name).mkdir()
    refused(lambda: load_dataset(name, str(tmp_path)), str(tmp_path / name), script)


Change = Callable[[Path], object]


def replaced(name: str, old: str, new: str) -> Change:
    return lambda base: (base / name).write_text((base / name).read_text().replace(old, new, 1))


GTSRB_DAMAGE: dict[str, tuple[Change, str]] = {
    "no csv": (lambda base: (base / "Train/00007/GT-00007.csv").unlink(), "GT-00007.csv"),
    "no class": (lambda base: shutil.rmtree(base / "Train/00042"), "GT-00042.csv"),
    "no test": (lambda base: shutil.rmtree(base / "Test"), "GT-final_test.csv"),
    "no rows": (lambda base: (base / "Train/00007/GT-00007.csv").write_text("Filename\n"), "GT-00007.csv"),
    "class beyond": (replaced("Train/00007/GT-00007.csv", ";7\n", ";43\n"), "GT-00007.csv"),
    "class negative": (replaced("Train/00007/GT-00007.csv", ";7\n", ";-1\n"), "GT-00007.csv"),
    "class a word": (replaced("Train/00007/GT-00007.csv", ";7\n", ";x\n"), "GT-00007.csv"),
    "column missing": (replaced("Train/00007/GT-00007.csv", ";5;5;", ";5;"), "GT-00007.csv"),
    "commas": (replaced("Test/GT-final_test.csv", ".ppm;", ".ppm,"), "GT-final_test.csv"),
    "a way out": (replaced("Test/GT-final_test.csv", "00000.ppm", "../../00000.ppm"), "GT-final_test.csv"),
    "not ascii": (lambda base: (base / "Test/GT-final_test.csv").write_bytes(b"\xff\xfe\0"), "GT-final_test.csv"),
    "image missing": (lambda base: (base / "Test/00001.ppm").unlink(), "00001.ppm"),
    "image cut": (lambda base: os.truncate(base / "Train/00003/00000_00000.ppm", 100), "00000_00000.ppm"),
    "image empty": (lambda base: os.truncate(base / "Train/00003/00000_00000.ppm", 0), "00000_00000.ppm"),
    "a web page": (lambda base: (base / "Test/00001.ppm").write_text("<html>404</html>"), "00001.ppm"),
}


@pytest.mark.parametrize(("damage", "word"), GTSRB_DAMAGE.values(), ids=GTSRB_DAMAGE)
def test_damaged_gtsrb_is_told_in_one_line(tmp_path: Path, damage: Change, word: str) -> None:
    peer.write_gtsrb(tmp_path / "gtsrb", "backdoorbench", per_class=1, n_test=3)
    damage(tmp_path / "gtsrb")
    refused(lambda: load_dataset("gtsrb", str(tmp_path)), word)
    assert not list((tmp_path / "gtsrb").rglob("*.partial"))


TINY_DAMAGE: dict[str, tuple[Change, str]] = {
    "no val": (lambda base: shutil.rmtree(base / "val"), "val"),
    "a class fewer": (lambda base: shutil.rmtree(next((base / "train").iterdir())), "199"),
    "unknown class": (replaced("val/val_annotations.txt", "\tn", "\tm"), "val_annotations.txt"),
    "one column": (replaced("val/val_annotations.txt", "\t", " "), "val_annotations.txt"),
    "a way out": (replaced("val/val_annotations.txt", "val_0", "../val_0"), "val_annotations.txt"),
    "empty": (lambda base: (base / "val/val_annotations.txt").write_text(""), "val_annotations.txt"),
    "image missing": (lambda base: (base / "val/images/val_5.JPEG").unlink(), "val_5.JPEG"),
    "image cut": (lambda base: os.truncate(base / "val/images/val_5.JPEG", 900), "val_5.JPEG"),
}


def test_damaged_tiny_is_told_in_one_line(tmp_path: Path) -> None:
    peer.write_tiny(tmp_path / "whole", "published", per_class=1, n_val=200)
    for name, (damage, word) in TINY_DAMAGE.items():
        folder = tmp_path / name
        shutil.copytree(tmp_path / "whole", folder / "tiny")
        damage(folder / "tiny")
        refused(lambda: load_dataset("tiny", str(folder)), word)  # noqa: B023


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.sampled_from(["Test/GT-final_test.csv", "Test/00001.ppm"]))
def test_any_byte_changed_gives_a_whole_set_or_one_line(tmp_path: Path, data: st.DataObject, name: str) -> None:
    whole = tmp_path / "whole"
    if not whole.exists():
        peer.write_gtsrb(whole, "backdoorbench", per_class=1, n_test=3)
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        base = Path(folder) / "gtsrb"
        base.mkdir()
        (base / "Train").symlink_to(whole / "Train")
        shutil.copytree(whole / "Test", base / "Test")
        content = bytearray((base / name).read_bytes())
        # The first bytes of an image are the interesting ones.
        at = data.draw(st.integers(0, 20) | st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
        (base / name).write_bytes(content)
        try:
            _, test = load_dataset("gtsrb", folder)
        except UserError as error:
            told = str(error)
        else:
            assert len(test) == len(test.images) <= 3
            assert set(test.labels.tolist()) <= set(range(43))
            return
    assert "\n" not in told
    assert str(base / "Test") in told


# The cache


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a user's own, three classes, one split, and a cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    root = tmp_path / "own"
    peer.write_folder(root, {"apple": 11, "birch": 10, "cloud": 2})
    return root


def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are decoded from now on."""
    seen: list[str] = []
    decode = imagefiles._decode

    def spy(file: str, spec: DatasetSpec) -> np.ndarray:
        seen.append(Path(file).name)
        return decode(file, spec)

    monkeypatch.setattr(imagefiles, "_decode", spy)
    return seen


def test_a_second_start_decodes_nothing_and_sees_the_same(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = decoded(monkeypatch)
    first = load_dataset("folder", str(own), (16,))
    assert len(seen) == 23
    second = load_dataset("folder", str(own), (16,))
    assert len(seen) == 23
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
    second[0].images.zero_()  # an attack writes into its images: the file must not change
    assert torch.equal(load_dataset("folder", str(own), (16,))[0].images, first[0].images)


def test_a_changed_source_is_converted_anew(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_dataset("folder", str(own), (16,))
    seen = decoded(monkeypatch)
    file = own / "apple" / "0000.png"
    changes: list[tuple[str, Callable[[], object]]] = [
        ("time", lambda: os.utime(file, ns=(1, 1))),
        ("size", lambda: peer.photo(file, np.random.default_rng(5), (13, 9))),
        ("name", lambda: file.rename(file.with_name("00000.png"))),
        ("count", lambda: peer.photo(own / "apple" / "new.png", np.random.default_rng(6), (9, 9))),
    ]
    for what, change in changes:
        change()
        seen.clear()
        load_dataset("folder", str(own), (16,))
        assert seen, what
        seen.clear()
        load_dataset("folder", str(own), (16,))
        assert not seen, what
    assert len(list(cache_folder().glob("*.npy"))) == 1, "stale ones are removed"
    load_dataset("folder", str(own), (8, 12))
    load_dataset("folder", str(own), (16,))
    assert len(list(cache_folder().glob("*.npy"))) == 2, "sizes have files of their own"


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"PK\3\4 no array", b"cut", b"other shape"])
def test_a_damaged_cache_is_written_anew(own: Path, content: bytes) -> None:
    first = load_dataset("folder", str(own), (16,))[0].images.clone()  # what is mapped is gone when the file is cut
    (cache,) = cache_folder().glob("*.npy")
    if content == b"cut":
        content = cache.read_bytes()[:-1]
    elif content == b"other shape":
        content = cache.read_bytes().replace(b"16, 16)", b"32, 8) ")
    cache.write_bytes(content)
    again, _ = load_dataset("folder", str(own), (16,))
    assert torch.equal(first, again.images)


def test_a_folder_that_cannot_be_written_is_said_and_read(own: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache_folder().parent.mkdir()
    cache_folder().write_text("a file where the folder should be")
    with caplog.at_level(logging.INFO, "ulrl"):
        train, test = load_dataset("folder", str(own), (16,))
    (line,) = caplog.messages
    assert str(cache_folder()) in line
    cache_folder().unlink()
    cached = load_dataset("folder", str(own), (16,))
    assert torch.equal(train.images, cached[0].images)
    assert torch.equal(test.images, cached[1].images)


def test_links_that_were_planted_for_the_cache_are_not_followed(own: Path, tmp_path: Path) -> None:
    """Neither among the images, where it once lay, nor in the cache's own folder."""
    first = load_dataset("folder", str(own), (16,))[0].images.clone()
    canary = tmp_path / "canary"
    canary.write_text("untouched")
    (own / ".ulrl_cache").symlink_to(tmp_path / "made")
    for file in list(cache_folder().iterdir()):
        file.unlink()
        file.symlink_to(canary if file.suffix == ".lock" else tmp_path / "made.npy")
    again = load_dataset("folder", str(own), (16,))[0].images
    assert torch.equal(first, again)
    assert canary.read_text() == "untouched"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("made")]


def test_a_full_disk_is_said_and_the_images_are_read(
    own: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    with caplog.at_level(logging.WARNING, "ulrl"):
        train, _ = load_dataset("folder", str(own), (16,))
    assert "No space left" in caplog.text
    assert len(train) == 18
    assert [p.suffix for p in cache_folder().iterdir()] == [".lock"]


def test_starts_at_the_same_time_convert_once(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = decoded(monkeypatch)
    read: list[ImageSet] = []
    threads = [threading.Thread(target=lambda: read.append(load_dataset("folder", str(own), (16,))[0])) for _ in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 23
    assert all(torch.equal(read[0].images, other.images) for other in read)
    assert len(read) == 3


# A user's own folder


def test_one_split_is_divided_the_same_at_every_start(own: Path) -> None:
    train, test = load_dataset("folder", str(own), (12, 20))
    assert train.spec.img_size == (12, 20, 3)
    assert train.spec.class_names == ("apple", "birch", "cloud")
    assert train.labels.bincount().tolist() == [9, 8, 1]
    assert test.labels.bincount().tolist() == [2, 2, 1]
    shutil.rmtree(cache_folder())
    again = load_dataset("folder", str(own), (12, 20))
    assert torch.equal(test.images, again[1].images)


@pytest.mark.parametrize("name", ["test", "val"])
def test_train_and_test_are_taken_as_they_are(tmp_path: Path, name: str) -> None:
    files = peer.write_folder(tmp_path / "train", {"a": 3, "b": 2, "c": 2}, suffix="jpg")
    held_out = peer.write_folder(tmp_path / name, {"a": 2, "c": 1}, seed=1, suffix="bmp")
    deep = peer.photo(tmp_path / "train/b/sub/deep.JPG", np.random.default_rng(2), (30, 20))
    for hidden in (".DS_Store", "b/._0000.jpg", "b/notes.txt", "b/.ipynb_checkpoints/0000.jpg"):
        file = tmp_path / "train" / hidden
        file.parent.mkdir(exist_ok=True)
        file.write_text("no image")
    train, test = load_dataset("folder", str(tmp_path))
    spec = dataset_spec("folder", str(tmp_path))
    assert spec.img_size == (64, 64, 3)
    listed = [(file, "abc".index(file.parent.name)) for file in files]
    holds(train, [*listed[:5], (deep, 1), *listed[5:]], spec)
    holds(test, [(file, "abc".index(file.parent.name)) for file in held_out], spec)


def test_colour_modes(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        for mode in ("L", "LA", "P", "RGBA", "CMYK", "1"):
            suffix = "jpg" if mode == "CMYK" else "png"
            Image.new("RGB", (9, 9), "white").convert(mode).save(tmp_path / name / f"{mode}.{suffix}")
    train, _ = load_dataset("folder", str(tmp_path), (8,))
    assert train.images.min() == 255
    deep = tmp_path / "a" / "deep.png"
    Image.fromarray(np.full((9, 9), 4000, np.uint16)).save(deep)
    refused(lambda: load_dataset("folder", str(tmp_path), (8,)), str(deep), "8 bits")
    Image.new("RGB", (9, 9)).save(deep, "GIF")
    refused(lambda: load_dataset("folder", str(tmp_path), (8,)), str(deep), "(none of JPEG, PNG,")


def only_train(own: Path) -> None:
    own.rename(own.with_name("train"))
    own.mkdir()
    own.with_name("train").rename(own / "train")


def other_names(train: str, test: str) -> Change:
    """The images in a training and a test part of these names."""

    def move(own: Path) -> None:
        own.rename(own.with_name("all"))
        for name in (train, test):
            shutil.copytree(own.with_name("all"), own / name)

    return move


def other_test_class(own: Path) -> None:
    for name in ("train/a", "train/b", "test/z"):
        shutil.copytree(own / "apple", own / name)


OWN_FAULTS: dict[str, tuple[Change, str]] = {
    "no such folder": (shutil.rmtree, "own"),
    "a file": (lambda own: (shutil.rmtree(own), own.write_text("x")), "own"),
    "one class": (lambda own: [shutil.rmtree(own / name) for name in ("apple", "birch")], "subfolder per class"),
    "an empty class": (lambda own: (own / "dew").mkdir(), "own/dew"),
    "a lone image": (lambda own: (own / "cloud" / "0000.png").unlink(), "'cloud'"),
    "train without test": (only_train, "test/"),
    "train and validation": (other_names("train", "validation"), "own/train"),
    "Train and Test": (other_names("Train", "Test"), "own/Train"),
    "training_set and test_set": (other_names("training_set", "test_set"), "own/training_set"),
    "a class in test only": (other_test_class, "test/z"),
    "a broken image": (lambda own: os.truncate(own / "birch" / "0003.png", 70), "birch/0003.png"),
}


@pytest.mark.parametrize(("fault", "word"), OWN_FAULTS.values(), ids=OWN_FAULTS)
def test_a_folder_with_a_fault_is_told_in_one_line(own: Path, fault: Change, word: str) -> None:
    fault(own)
    refused(lambda: load_dataset("folder", str(own), (16,)), word)


def test_a_train_is_a_vehicle_too(own: Path) -> None:
    (own / "birch").rename(own / "train")
    (own / "train" / "0003.png").rename(own / "train" / "0099.png")
    shutil.copytree(own / "apple", own / "train" / "steam")
    assert dataset_spec("folder", str(own)).class_names == ("apple", "cloud", "train")


@pytest.mark.parametrize("size", [(7,), (1025, 64), (8, 8, 3), (0, 0)])
def test_sizes_that_do_not_fit(own: Path, size: tuple[int, ...]) -> None:
    refused(lambda: dataset_spec("folder", str(own), size), "img_size", "8 to 1024")


def command(
    main: Callable[..., None], name: str, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    with pytest.raises(SystemExit) as left:
        main(name, argv)
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return int(left.value.code or 0), said.err


def test_from_attack_to_defense(empty_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, other = tmp_path / "photos", tmp_path / "other"
    peer.write_folder(own, {"leaf": 50, "sky": 50, "_$5$": 50})
    attack = f"--dataset folder --dataset_path {own} --img_size 16 --width 4 --epochs 3 --batch_size 16 --device cpu"
    record = "--save_folder_name mine --patch_size 3 --pratio 0.2"
    assert command(attack_main, "badnet", [*attack.split(), *record.split()], capsys)[0] == 0
    read = load_record(empty_home / "record" / "mine")
    assert (read.dataset, read.num_classes, read.img_size) == ("folder", 3, (16, 16, 3))

    repair = "--result_file mine --ratio 0.2 --unlearning_epochs 2 --relearn_epochs 1 --device cpu".split()
    code, said = command(defense_main, "ulrl", [*repair, "--dataset_path", str(own)], capsys)
    assert code == 0, said
    result = json.loads((empty_home / "record/mine/defense/ulrl/result.json").read_text())
    trained = json.loads((empty_home / "record/mine/result.json").read_text())
    assert result["dataset"] == "folder"
    assert result["before"] == pytest.approx(trained["after"]), "the same test images"
    assert (result["before"]["n_clean"], result["clean_samples"]) == (30, 24)

    figure = ["plot", "tsne", str(empty_home / "record/mine/defense/ulrl"), "--out", str(tmp_path / "tsne.svg")]
    with pytest.raises(SystemExit) as left:
        main([*figure, "--samples", "20", "--device", "cpu", "--dataset_path", str(own)])
    assert left.value.code == 0, capsys.readouterr().err
    assert all(f">{name}<" in (tmp_path / "tsne.svg").read_text() for name in ("leaf", "sky", " _$5$"))

    for classes, word in (
        ({"leaf": 50, "sky": 50, "brick": 50, "x": 9}, "4"),  # another number of classes
        ({"leaf": 50, "sky": 50, "brick": 60}, "test split"),  # other images
    ):
        shutil.rmtree(other, ignore_errors=True)
        peer.write_folder(other, classes)
        code, said = command(defense_main, "ulrl", [*repair, "--dataset_path", str(other)], capsys)
        assert code == 2
        assert "--dataset_path" in said.splitlines()[-1]
        assert word in said.splitlines()[-1]
    shutil.copy(own / "leaf" / "0003.png", own / "leaf" / "0003b.png")  # one more: as many to test, but divided anew
    code, said = command(defense_main, "ulrl", [*repair, "--dataset_path", str(own)], capsys)
    assert code == 2
    assert "other folder test images" in said.splitlines()[-1]
    for classes in ({}, {"leaf": 2, "sky": 2}):  # the default ./data is no such folder, or another one
        peer.write_folder(empty_home / "data", classes)
        code, said = command(defense_main, "ulrl", repair, capsys)
        assert code == 2
        assert said.splitlines()[-1].endswith("is of your own folder of images; name it with --dataset_path")
        with pytest.raises(SystemExit) as left:
            main(figure)
        assert left.value.code == 2
        assert capsys.readouterr().err.endswith("is of your own folder of images; name it with --dataset_path\n")

    larger = attack.replace("--img_size 16", "--img_size 24").split()
    code, said = command(attack_main, "lf", [*larger, "--clean_model", "mine"], capsys)
    assert code == 2
    assert "(24, 24, 3)" in said
    code, said = command(attack_main, "badnet", "--dataset digits --img_size 16".split(), capsys)
    assert code == 2
    assert "--img_size" in said


def test_a_record_cannot_lead_to_a_configuration_elsewhere(tiny_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny_home / "evil.yaml").write_text("ratio: 0.5\n")
    file = tiny_home / "record/tiny/attack_result.pt"
    content = torch.load(file, weights_only=False)
    torch.save({**content, "clean_data": "../../../evil"}, file)
    code, said = command(defense_main, "ulrl", ["--result_file", "tiny"], capsys)
    assert code == 2
    assert "options from" not in said
    assert "unknown dataset" in said.splitlines()[-1]


# The scripts that fetch


def zipped(folder: Path, file: Path) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    return file


def publish(name: str, tmp_path: Path) -> tuple[Path, list[Path], tuple[peer.Listed, peer.Listed]]:
    """A copy of the script that fetches from a folder here, the zip files there, and what they hold."""
    source, site = tmp_path / "source", tmp_path / "site"
    site.mkdir()
    if name == "gtsrb":
        held = peer.write_gtsrb(source / "all", "torchvision", per_class=1, n_test=5)
        (source / "train/GTSRB/Final_Training").mkdir(parents=True)
        (source / "all/GTSRB/Training").rename(source / "train/GTSRB/Final_Training/Images")
        (source / "labels").mkdir()
        (source / "all/GT-final_test.csv").rename(source / "labels/GT-final_test.csv")
        parts = {"train": "Training_Images", "all": "Test_Images", "labels": "Test_GT"}
        zips = [zipped(source / part, site / f"GTSRB_Final_{title}.zip") for part, title in parts.items()]
    else:
        held = peer.write_tiny(source / "tiny-imagenet-200", "published", per_class=1, n_val=210)
        zips = [zipped(source, site / "tiny-imagenet-200.zip")]
    scripts = tmp_path / "checkout" / "sh"
    shutil.copytree(ROOT / "sh", scripts)
    script = scripts / f"fetch_{name}.sh"
    text = script.read_text()
    for url in ("https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370", "http://cs231n.stanford.edu"):
        text = text.replace(url, site.as_uri())
    for file, published in zip(zips, re.findall(r"\b[0-9a-f]{32} ", text), strict=True):
        text = text.replace(published, f"{hashlib.md5(file.read_bytes()).hexdigest()} ")
    script.write_text(text)
    return script, zips, held


@pytest.mark.parametrize("name", ["gtsrb", "tiny"])
def test_fetched_data_is_laid_out_and_read(tmp_path: Path, name: str) -> None:
    script, zips, (train, test) = publish(name, tmp_path)
    first = zips[0]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", script, "data"], capture_output=True, text=True, cwd=tmp_path, check=False)

    whole = first.read_bytes()
    first.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    done = run()
    assert done.returncode == 1
    assert "MD5" in done.stderr.splitlines()[-1]
    first.unlink()
    done = run()
    assert done.returncode == 1
    assert "check the network" in done.stderr.splitlines()[-1]
    work = tmp_path / "data" / name / ".fetch"
    part = {"gtsrb": "train.zip.part", "tiny": "tiny.zip.part"}[name]
    (work / part).write_bytes(whole[:1000])  # a download that was stopped
    first.write_bytes(bytes(1000) + whole[1000:])  # so that only one that goes on ends well
    done = run()
    assert done.returncode == 0, done.stderr
    for data, listed in zip(load_dataset(name, str(tmp_path / "data")), (train, test), strict=True):
        assert data.labels.tolist() == [label for _, label in listed]
    assert not work.exists()
    shutil.rmtree(first.parent)
    assert run().returncode == 0, "a second run fetches nothing"
