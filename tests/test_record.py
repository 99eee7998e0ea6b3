"""The record on disk: what we write we read, what BackdoorBench writes we read, and nothing else."""

from __future__ import annotations

import json
import logging
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peer_records as peer
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from manners import refused
from PIL import Image

from ulrl.data.imageset import DatasetSpec, ImageSet, PoisonedSet
from ulrl.errors import UserError
from ulrl.poison_state import PoisonState
from ulrl.record import load_defense_result, load_record
from ulrl.record_folder import PICKLE as RESULT_FILE
from ulrl.record_writer import write_defense_result, write_record

SPEC = DatasetSpec("toy", peer.CLASSES, 3, peer.HEIGHT, peer.WIDTH, (0.5,) * 3, (0.25,) * 3)
GRAY = replace(SPEC, channels=1, mean=(0.5,), std=(0.25,))
WEIGHTS = {"fc.weight": torch.arange(8.0).view(4, 2), "fc.bias": torch.zeros(4)}


def chw(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def clean_train() -> ImageSet:
    images, labels = peer.clean_split(peer.N_TRAIN)
    return ImageSet(chw(images), torch.from_numpy(labels), SPEC)


def clean_test() -> ImageSet:
    images, labels = peer.clean_split(peer.N_TEST)
    return ImageSet(chw(images), torch.from_numpy(labels), SPEC)


def random_set(spec: DatasetSpec, indices: list[int], seed: int) -> PoisonedSet:
    rng = torch.Generator().manual_seed(seed)
    n = len(indices)
    images = torch.randint(256, (n, spec.channels, spec.height, spec.width), generator=rng, dtype=torch.uint8)
    labels, originals = torch.randint(spec.num_classes, (2, n), generator=rng)
    return PoisonedSet(images, labels, spec, originals, torch.tensor(indices, dtype=torch.int64))


def write(folder: Path, test: PoisonedSet, train: PoisonedSet | None = None, **changes: Any) -> None:
    given: dict[str, Any] = {
        "final_name": "badnet_0_1",
        "model_name": "preactresnet18",
        "num_classes": peer.CLASSES,
        "state_dict": WEIGHTS,
        "spec": test.spec,
        "poisoned_test": test,
        "clean_test": clean_test(),
        "poisoned_train": train,
        "n_train": peer.N_TRAIN,
        "train_indices": torch.arange(peer.N_TRAIN),
        "info": {"attack": "badnet", "img_size": test.spec.img_size},
    }
    write_record(folder, **{**given, **changes})


def same(a: ImageSet, b: ImageSet) -> bool:
    return a.spec == b.spec and all(torch.equal(x, vars(b)[k]) for k, x in a._tensors().items())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "badnet_0_1"
    folder.mkdir()
    return folder


@pytest.fixture
def record(folder: Path) -> Path:
    """A record on disk, by the peer."""
    peer.save(peer.content(folder), folder / RESULT_FILE)
    return folder


# What we write


@settings(max_examples=25, deadline=None)
@given(
    spec=st.sampled_from([SPEC, GRAY]),
    test=st.sets(st.integers(0, peer.N_TEST - 1)),
    train=st.none() | st.sets(st.integers(0, peer.N_TRAIN - 1)),
    seed=st.integers(0, 2**32),
)
def test_what_is_written_is_read_back(spec: DatasetSpec, test: set[int], train: set[int] | None, seed: int) -> None:
    poisoned_test = random_set(spec, sorted(test), seed)
    poisoned_train = None if train is None else random_set(spec, sorted(train), seed + 1)
    whole = random_set(spec, list(range(peer.N_TRAIN)), seed + 2)
    clean = ImageSet(whole.images, whole.labels, spec)
    if poisoned_train is not None:
        at = poisoned_train.original_indices
        clean.labels[at] = poisoned_train.original_labels
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), poisoned_test, poisoned_train)
        record = load_record(name)
        assert same(record.poisoned_test(spec), poisoned_test)
        if poisoned_train is None:
            assert record.bd_train is None
            refused(lambda: record.poisoned_train(clean), name, "no poisoned training set")
        else:
            images, labels = clean.images.clone(), clean.labels.clone()
            images[at], labels[at] = poisoned_train.images, poisoned_train.labels
            expected = PoisonedSet(images, labels, spec, clean.labels, torch.arange(peer.N_TRAIN))
            assert same(record.poisoned_train(clean), expected)
            index_list = torch.load(Path(name) / "train_poison_index_list.pickle", weights_only=False)
            assert index_list.dtype == np.float64
            assert np.flatnonzero(index_list).tolist() == sorted(train or ())
        assert record.attack == "badnet"
        assert record.name == Path(name).name
        assert (record.model_name, record.num_classes, record.dataset, record.data_path, record.img_size) == (
            "preactresnet18",
            peer.CLASSES,
            "toy",
            "./data/toy",
            spec.img_size,
        )
        assert list(record.state_dict) == list(WEIGHTS)
        assert all(torch.equal(record.state_dict[k], v) for k, v in WEIGHTS.items())


@pytest.mark.parametrize("spec", [SPEC, GRAY], ids=["rgb", "gray"])
def test_the_peer_reads_what_we_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: DatasetSpec) -> None:
    folder = tmp_path / "record" / "badnet_0_1"
    folder.mkdir(parents=True)
    test, train = random_set(spec, [8, 2, 5], 0), random_set(spec, [0, 7], 1)
    write(folder, test, train)
    monkeypatch.chdir(tmp_path)  # stored paths begin at the repository's root
    result = torch.load(folder / RESULT_FILE, weights_only=False)
    assert type(result["num_classes"]) is int
    assert result["img_size"] == (peer.HEIGHT, peer.WIDTH, spec.channels)
    rng = np.random.default_rng(0)
    clean = [(rng.integers(0, 256, (2, 2), dtype=np.uint8), i % peer.CLASSES) for i in range(peer.N_TRAIN)]

    def expected(data: PoisonedSet, i: int) -> tuple[bytes, int, int, int, int]:
        pixels = data.images[i].permute(1, 2, 0).contiguous().numpy().tobytes()
        return pixels, int(data.labels[i]), int(data.original_indices[i]), 1, int(data.original_labels[i])

    assert peer.items(result["bd_test"], clean) == [expected(test, i) for i in (1, 2, 0)]
    by_index = {0: expected(train, 0), 7: expected(train, 1)}
    assert peer.items(result["bd_train"], clean) == [
        by_index.get(j, (image.tobytes(), label, j, 0, label)) for j, (image, label) in enumerate(clean)
    ]
    for state in (result["bd_test"], result["bd_train"]):
        assert state["poison_indicator"].dtype == np.float64
        assert all(type(key) is int for key in state["bd_data_container"]["data_dict"])


def test_a_clean_models_record_has_no_poisoned_sample(folder: Path) -> None:
    write(folder, random_set(SPEC, [], 0))
    images = load_record(folder).poisoned_test(SPEC).images
    assert images.shape == (0, 3, peer.HEIGHT, peer.WIDTH)
    assert images.dtype == torch.uint8


def test_defense_result_has_the_peers_three_keys(tmp_path: Path) -> None:
    file = tmp_path / "defense_result.pt"
    write_defense_result(file, model_name="vgg19", num_classes=4, state_dict=WEIGHTS)
    result = torch.load(file, weights_only=True)
    assert list(result) == ["model_name", "num_classes", "model"]
    assert torch.equal(result["model"]["fc.weight"], WEIGHTS["fc.weight"])
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


# What the peer writes


@pytest.mark.parametrize("numpy_core", ["core", "_core"])
@pytest.mark.parametrize("numpy_keys", [True, False])
@pytest.mark.parametrize(
    "prefix", ["./record/elsewhere", "../record/x", "/cluster/bdzoo2_t914/record/x", r"C:\bench\record\x"]
)
def test_every_spelling_of_the_peer_is_read(folder: Path, numpy_core: str, numpy_keys: bool, prefix: str) -> None:
    result = peer.content(folder, prefix=prefix, numpy_keys=numpy_keys, module_prefix="module.")
    peer.save({**result, "a_key_of_tomorrow": [1, "x"]}, folder / RESULT_FILE, numpy_core)
    stored = (folder / RESULT_FILE).read_bytes()
    assert f"numpy.{numpy_core}.multiarray".encode() in stored
    assert (b"\nscalar\n" in stored) == numpy_keys
    record = load_record(folder)
    assert list(record.state_dict) == ["fc.weight", "fc.bias"]

    images, labels = map(torch.from_numpy, peer.clean_split(peer.N_TEST))
    at = (labels != peer.TARGET).nonzero().squeeze(1)
    triggered = chw(peer.poison(images.numpy()))[at]
    expected = PoisonedSet(triggered, torch.full_like(at, peer.TARGET), SPEC, labels[at], at)
    assert same(record.poisoned_test(SPEC), expected)

    clean = clean_train()
    poisoned = record.poisoned_train(clean)
    at = torch.tensor([1, 4, 7])
    assert torch.equal(poisoned.images[at], 255 - clean.images[at])
    assert poisoned.labels[at].tolist() == [peer.TARGET] * 3
    untouched = torch.tensor([i for i in range(peer.N_TRAIN) if i not in (1, 4, 7)])
    assert torch.equal(poisoned.images[untouched], clean.images[untouched])
    assert torch.equal(poisoned.labels[untouched], clean.labels[untouched])
    assert torch.equal(poisoned.original_labels, clean.labels)


def test_bd_train_may_be_none_and_img_size_a_list(folder: Path) -> None:
    result = peer.content(folder)
    peer.save({**result, "bd_train": None, "img_size": [peer.HEIGHT, peer.WIDTH, 3]}, folder / RESULT_FILE)
    record = load_record(folder)
    assert record.bd_train is None
    assert record.img_size == SPEC.img_size


def test_a_record_without_its_training_images_opens(record: Path) -> None:
    shutil.rmtree(record / "bd_train_dataset")
    loaded = load_record(record)
    assert len(loaded.poisoned_test(SPEC)) == 6
    refused(lambda: loaded.poisoned_train(clean_train()), "bd_train_dataset", "missing")


def test_gray_images_may_be_stored_as_rgb(folder: Path) -> None:
    test = random_set(GRAY, [1, 2], 0)
    write(folder, test)
    for file in folder.glob("bd_test_dataset/*/*.png"):
        assert Image.open(file).mode == "L"
        Image.open(file).convert("RGB").save(file)
    assert same(load_record(folder).poisoned_test(GRAY), test)


def test_old_vit_names_are_renamed(record: Path) -> None:
    layer = "encoder.layers.encoder_layer_0.mlp."
    result = peer.content(record)
    result["model"] = {f"module.{layer}linear_{i}.weight": torch.tensor([float(i)]) for i in (1, 2)}
    peer.save(result, record / RESULT_FILE)
    assert load_record(record).state_dict == {
        f"{layer}0.weight": torch.tensor([1.0]),
        f"{layer}3.weight": torch.tensor([2.0]),
    }


def test_cover_samples_are_told_from_triggered_ones() -> None:
    def cover(labels: list[int], originals: list[int]) -> list[bool]:
        nothing = torch.empty(0, dtype=torch.int64)
        both = torch.tensor(labels), torch.tensor(originals)
        return PoisonState("f", nothing, nothing.bool(), nothing, *both, ()).cover.tolist()

    assert cover([0, 0, 2, 0], [1, 3, 2, 0]) == [False, False, True, False]  # WaNet: noise keeps class 2
    assert cover([1, 2, 2], [0, 1, 2]) == [False, False, True]  # all to all: noise keeps its class
    assert cover([0, 0], [0, 0]) == [False, False]  # clean label: nothing is relabelled
    assert cover([], []) == []


def test_the_attacks_name(record: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = torch.load(record / RESULT_FILE, weights_only=False)
    assert load_record(record).attack is None
    (record / "result.json").write_text(json.dumps({"method": "wanet"}))
    assert load_record(record).attack == "wanet"
    torch.save({"attack": "badnet"}, record / "info.pickle")
    assert load_record(record).attack == "badnet"
    for name in ("a" * 9_000_000, "\ud800", "\x1b[2J"):  # with which a run's own result.json could not be read again
        torch.save({**content, "attack": name}, record / RESULT_FILE)
        assert load_record(record).attack == "badnet"
        torch.save({"attack": name}, record / "info.pickle")
        assert load_record(record).attack == "wanet"
        torch.save({"attack": "badnet"}, record / "info.pickle")
    torch.save(content, record / RESULT_FILE)
    torch.save(torch.zeros(3), record / "info.pickle")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_record(record).attack == "wanet"
    (record / "result.json").write_text("{")
    (record / "info.pickle").write_bytes(b"no torch file")
    with caplog.at_level(logging.WARNING):
        assert load_record(record).attack is None
    assert {name in caplog.text for name in ("info.pickle", "result.json")} == {True}


# What is refused


@pytest.mark.parametrize(("name", "value"), [("num_classes", torch.ones(2)), ("model_name", np.zeros(2))])
def test_a_repaired_model_of_no_architecture_is_refused(record: Path, name: str, value: object) -> None:
    opened = load_record(record)
    content = {"model_name": opened.model_name, "num_classes": opened.num_classes, "model": opened.state_dict}
    torch.save({**content, name: value}, record / "defense_result.pt")
    refused(lambda: load_defense_result(record, opened), "defense_result.pt", "architecture")


def test_what_is_not_there(tmp_path: Path, record: Path) -> None:
    refused(lambda: load_record(tmp_path / "nowhere"), "nowhere", "not a folder")
    refused(lambda: load_record(tmp_path), RESULT_FILE, "missing")
    file = record / RESULT_FILE
    torch.save({"model": {}, "num_classes": 4}, file)
    refused(lambda: load_record(record), str(file), "model_name, data_path, img_size, clean_data, bd_train")
    torch.save([1], file)
    refused(lambda: load_record(record), str(file), "no dict")


@pytest.mark.parametrize("numpy_core", ["core", "_core"])
def test_pickled_images_are_refused_with_the_reason(folder: Path, numpy_core: str) -> None:
    file = folder / RESULT_FILE
    without_pil = {**peer.v1_content(), "bd_test": {"x": None, "y": None}}
    for result in (peer.v1_content(), peer.ram_mode(peer.content(folder)), without_pil):
        peer.save(result, file, numpy_core)
        refused(lambda: load_record(folder), str(file), "v1", "RAM mode", "re-save it with BackdoorBench")


def test_code_is_refused_and_not_run(record: Path, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    peer.save({**peer.content(record), "extra": peer.touching(touched)}, record / RESULT_FILE)
    refused(lambda: load_record(record), RESULT_FILE, "system", "refused")
    peer.save(peer.content(record), record / RESULT_FILE)
    torch.save({"attack": peer.touching(touched)}, record / "info.pickle")
    assert load_record(record).attack is None
    assert not touched.exists()
    torch.load(record / "info.pickle", weights_only=False)
    assert touched.exists()  # so the pickle was armed


def test_a_name_that_the_application_allowed_is_still_refused(record: Path) -> None:
    peer.save({**peer.content(record), "extra": random.Random}, record / RESULT_FILE)
    with torch.serialization.safe_globals([random.Random, np.ndarray, np.dtype]):
        before = set(torch.serialization.get_safe_globals())
        refused(lambda: load_record(record), "random.Random")
        assert set(torch.serialization.get_safe_globals()) == before
        peer.save(peer.content(record), record / RESULT_FILE)
        assert len(load_record(record).bd_test.files) == 6


def test_bytes_posing_as_object_pointers_are_refused(record: Path) -> None:
    """With numpy's own functions torch.load accepts this under weights_only; a look at field "a" then
    kills the process."""

    class Dtype:
        def __init__(self, code: str, *state: Any) -> None:
            self.code, self.state = code, state

        def __reduce__(self) -> tuple[Any, ...]:
            return np.dtype, (self.code, False, True), self.state

    class Array:
        def __reduce__(self) -> tuple[Any, ...]:
            dtype = Dtype("f8", 3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)
            reconstruct = np.zeros(1).__reduce__()[0]
            return reconstruct, (np.ndarray, (0,), b"b"), (1, (1,), dtype, False, b"A" * 8)

    result = peer.content(record)
    result["bd_test"]["poison_indicator"] = Array()
    peer.save(result, record / RESULT_FILE)
    refused(lambda: load_record(record), RESULT_FILE)


def test_values_out_of_range_are_refused(folder: Path) -> None:
    def sample(result: dict[str, Any]) -> dict[str, Any]:
        return result["bd_test"]["bd_data_container"]["data_dict"][1]

    def train(result: dict[str, Any]) -> dict[str, Any]:
        return result["bd_train"]

    broken: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
        ("num_classes", lambda r: r.update(num_classes=0)),
        ("num_classes", lambda r: r.update(num_classes=True)),
        ("img_size", lambda r: r.update(img_size=(6, -5, 3))),
        ("img_size", lambda r: r.update(img_size=6)),
        ("model_name", lambda r: r.update(model_name=7)),
        ("state dict", lambda r: r.update(model={"w": "text"})),
        ("state dict", lambda r: r.update(model={"w": torch.eye(2).to_sparse()})),
        ("state dict", lambda r: r.update(model={"w": torch.empty(2, device="meta")})),
        ("state dict", lambda r: r.update(model={"w": torch.zeros(1).expand(10**12)})),
        ("bd_test is not a dict", lambda r: r.update(bd_test=None)),
        ("bd_data_container", lambda r: train(r).pop("bd_data_container")),
        ("data_dict", lambda r: train(r)["bd_data_container"].pop("data_dict")),
        ("plain folder", lambda r: train(r)["bd_data_container"].update(save_folder_path="record/x/..")),
        ("plain folder", lambda r: train(r)["bd_data_container"].update(save_folder_path=3)),
        ("poison_indicator", lambda r: train(r).update(poison_indicator=np.full(peer.N_TRAIN, 2.0))),
        ("poison_indicator", lambda r: train(r).update(poison_indicator=np.full(peer.N_TRAIN, np.nan))),
        ("poison_indicator", lambda r: train(r).update(poison_indicator=[0, 1])),
        ("positions", lambda r: train(r).update(original_index_array=np.array([peer.N_TRAIN]))),
        ("positions", lambda r: train(r).update(original_index_array=np.array([-1]))),
        ("positions", lambda r: train(r).update(original_index_array=np.array([0.5]))),
        ("sample 1 of bd_test has no entry", lambda r: r["bd_test"]["bd_data_container"]["data_dict"].pop(1)),
        ("labels", lambda r: sample(r).update(other_info=[peer.CLASSES, 0])),
        ("labels", lambda r: sample(r).update(other_info=[0, -1])),
        ("labels", lambda r: sample(r).update(other_info=[0])),
        ("path", lambda r: sample(r).update(path="./record/x/bd_test_dataset/../../../../etc/passwd")),
        ("path", lambda r: sample(r).update(path="./record/x/bd_test_dataset/../17.png")),
        ("path", lambda r: sample(r).update(path="./record/x/bd_test_dataset/1/..\\1.png/")),
        ("path", lambda r: sample(r).update(path="1.png")),
        ("path", lambda r: sample(r).update(path=None)),
    ]
    for word, change in broken:
        result = peer.content(folder)
        change(result)
        peer.save(result, folder / RESULT_FILE)
        refused(lambda: load_record(folder), RESULT_FILE, word)


def test_images_that_cannot_be_used(record: Path, tmp_path: Path) -> None:
    image = record / "bd_test_dataset" / "1" / "1.png"
    whole = image.read_bytes()
    loaded = load_record(record)

    def read_test() -> object:
        return loaded.poisoned_test(SPEC)

    image.write_bytes(whole[: len(whole) // 2])
    refused(read_test, str(image), "readable PNG")
    image.write_bytes(b"GIF89a")
    refused(read_test, str(image), "readable PNG")
    Image.new("RGB", (peer.WIDTH + 1, peer.HEIGHT)).save(image)
    refused(read_test, str(image), "6 x 6", "6 x 5")
    huge = bytearray(whole)
    huge[16:24] = (2**31 - 1).to_bytes(4, "big") * 2  # width and height in the header
    image.write_bytes(huge)
    refused(read_test, str(image))
    image.unlink()
    refused(read_test, str(image), "missing")

    outside = tmp_path / "outside.png"
    outside.write_bytes(whole)
    image.symlink_to(outside)
    refused(read_test, str(image), str(outside), "leads out of the record")
    image.unlink()
    image.symlink_to(image)
    refused(read_test, str(image))
    shutil.move(record / "bd_test_dataset", tmp_path / "moved")
    (record / "bd_test_dataset").symlink_to(tmp_path / "moved")
    refused(read_test, "leads out of the record")


def test_data_of_another_set_is_refused(record: Path) -> None:
    loaded, clean = load_record(record), clean_train()
    refused(lambda: loaded.poisoned_test(GRAY), str(record), "toy")
    refused(lambda: loaded.poisoned_test(replace(SPEC, num_classes=10)), "10")
    refused(lambda: loaded.poisoned_train(clean.subset(torch.arange(3))), str(record), "toy")
    shifted = replace(clean, labels=(clean.labels + 1) % peer.CLASSES)
    refused(lambda: loaded.poisoned_train(shifted), str(record), "toy")


def test_another_test_split_is_refused(record: Path) -> None:
    """Of the target's class, which the stored images leave out, only the size tells."""
    loaded, clean = load_record(record), clean_test()
    loaded.check_test(clean)
    for other in (
        clean.subset(torch.arange(peer.N_TEST - 1)),
        clean.subset(torch.arange(peer.N_TEST + 3) % peer.N_TEST),
        replace(clean, labels=(clean.labels + 1) % peer.CLASSES),
    ):
        refused(lambda other=other: loaded.check_test(other), str(record), "toy test split", "--dataset_path")


def opens(folder: Path) -> bool:
    """Whether the record can be read to the last image; if not, a UserError of one line said so."""
    message = ""
    try:
        record = load_record(folder)
        record.poisoned_test(replace(SPEC, num_classes=record.num_classes))
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    return not message


def test_a_truncated_file_is_refused(record: Path) -> None:
    file = record / RESULT_FILE
    whole = file.read_bytes()
    for length in range(0, len(whole), len(whole) // 40):
        file.write_bytes(whole[:length])
        refused(lambda: load_record(record), str(file), "fetch it again")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("seed", range(2))
def test_flipped_bytes_never_end_in_a_traceback(record: Path, seed: int) -> None:
    rng = random.Random(seed)
    file = record / RESULT_FILE
    whole = file.read_bytes()

    def flip(data: bytes) -> bytes:
        flipped = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            flipped[rng.randrange(len(flipped))] = rng.randrange(256)
        return bytes(flipped)

    outcomes = []
    for _ in range(12):  # anywhere in the file; then in the pickle alone, with checksums that fit
        file.write_bytes(flip(whole))
        outcomes.append(opens(record))
        file.write_bytes(whole)
        peer.rewrite(file, flip)
        outcomes.append(opens(record))
    assert set(outcomes) == {True, False}
