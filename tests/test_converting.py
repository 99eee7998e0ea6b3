"""A record in another spelling is the same record, and what `inspect` says is so."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import peer_records as peer
import pytest
import safetensors.torch
import torch
from manners import refused

from ulrl.cli import main
from ulrl.converting import ConvertOptions, convert, inspect_file
from ulrl.data.imageset import DatasetSpec
from ulrl.record import Record, load_record
from ulrl.record_folder import PICKLE, PLAIN
from ulrl.untrusted.weights import load_safetensors

SPEC = DatasetSpec("toy", peer.CLASSES, 3, peer.HEIGHT, peer.WIDTH, (0.5,) * 3, (0.25,) * 3)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    folder = tmp_path / "one"
    folder.mkdir()
    peer.save({**peer.content(folder, module_prefix="module."), "clean_test": "0f"}, folder / PICKLE)
    torch.save({"attack": "badnet"}, folder / "info.pickle")
    return load_record(folder)


def same(a: Record, b: Record) -> None:
    assert {k: (v.dtype, v.tolist()) for k, v in a.state_dict.items()} == {
        k: (v.dtype, v.tolist()) for k, v in b.state_dict.items()
    }
    for name in ("model_name", "num_classes", "dataset", "data_path", "img_size", "attack", "clean_test"):
        assert getattr(a, name) == getattr(b, name), name
    for split in ("bd_train", "bd_test"):
        one, other = getattr(a, split), getattr(b, split)
        for field in fields(one):
            x, y = getattr(one, field.name), getattr(other, field.name)
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, field.name
    assert torch.equal(a.poisoned_test(SPEC).images, b.poisoned_test(SPEC).images)


def test_a_record_without_a_pickle_is_the_same_record_and_back(record: Record) -> None:
    plain = convert(record, ConvertOptions())
    assert plain == record.folder.parent / "one_safetensors"
    files = [p for p in plain.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".png", ".safetensors"}
    same(load_record(plain), record)
    back = convert(load_record(plain), ConvertOptions(to="pickle", out="again"))
    same(load_record(back), record)
    images, labels = peer.clean_split(peer.N_TRAIN)
    clean = [(image, int(label)) for image, label in zip(images, labels, strict=True)]
    official = torch.load(back / PICKLE, weights_only=False)
    assert type(official["img_size"]) is tuple
    assert official["bd_test"]["poison_indicator"].dtype == np.float64
    assert [item[1:] for item in peer.items({**official["bd_train"], "poison_indicator": np.zeros(99)}, clean)]
    refused(lambda: convert(record, ConvertOptions(to="pickle")), "already")
    refused(lambda: convert(record, ConvertOptions(out="again")), "--overwrite")
    refused(lambda: convert(record, ConvertOptions(out="../x")), "--out")


def test_what_lies_beside_the_samples_does_not_matter(record: Record) -> None:
    """In the other spelling are the samples that can be opened, and nothing that was never looked at."""
    content = torch.load(record.folder / PICKLE, weights_only=False)
    for state in (content["bd_train"], content["bd_test"]):
        state["original_index_array"] = state["original_index_array"].astype(">i8")
        state["poison_indicator"] = state["poison_indicator"].astype(">f8")
        state["getitem_all"] = state["save_folder_path"] = torch.zeros(1)
        state["bd_data_container"]["data_dict"] |= {777: 5, 778: {"path": [], "other_info": [1, 2, 3]}, "x": None}
    peer.save(content, record.folder / PICKLE)
    same(load_record(convert(load_record(record.folder), ConvertOptions())), record)
    peer.save({**content, "model": {"\ud800": torch.zeros(1)}}, record.folder / PICKLE)
    refused(lambda: load_record(record.folder), PICKLE, "no text")


def test_a_record_without_its_images_is_said_to_be_so(record: Record, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(record.folder / record.bd_test.folder)
    new = convert(record, ConvertOptions())
    (said,) = caplog.messages
    assert f"one has no folder {record.bd_test.folder}" in said
    assert not (new / record.bd_test.folder).exists()
    assert (new / record.bd_train.folder).is_dir()


@pytest.mark.parametrize("folder", ["bd_train_dataset", PLAIN])
def test_an_image_that_has_the_name_of_another_file_is_refused(record: Record, folder: str) -> None:
    content = torch.load(record.folder / PICKLE, weights_only=False)
    shutil.copytree(record.folder / "bd_test_dataset", record.folder / folder, dirs_exist_ok=True)
    content["bd_test"]["bd_data_container"]["save_folder_path"] = folder
    peer.save(content, record.folder / PICKLE)
    refused(lambda: convert(load_record(record.folder), ConvertOptions()), ".png", "another file")
    content["bd_test"]["bd_data_container"]["save_folder_path"] = "f" * 300
    peer.save(content, record.folder / PICKLE)
    refused(lambda: load_record(record.folder), "no plain folder")


def test_what_is_written_is_read_under_numpy_1(record: Record) -> None:
    """BackdoorBench's own environment has it, and no module `numpy._core`."""
    back = convert(load_record(convert(record, ConvertOptions())), ConvertOptions(to="pickle", out="again"))
    with zipfile.ZipFile(back / PICKLE) as file:
        (pickled,) = [file.read(name) for name in file.namelist() if name.endswith("data.pkl")]
    asked = {f"{m.group(1).decode()}" for m in re.finditer(rb"c(numpy[\w.]*)\n", pickled)}
    assert asked == {"numpy", "numpy.core.multiarray"}


@pytest.mark.parametrize("index", [-1, 2**61, 1.5, True, "1"])
def test_an_index_that_is_none_is_refused(record: Record, index: object) -> None:
    """Numbers that collide fill a dictionary for minutes."""
    file = convert(record, ConvertOptions()) / PLAIN
    tensors = safetensors.torch.load(file.read_bytes())
    about = json.loads(load_safetensors(file, 1 << 30)[0]["record"])
    about["bd_train"]["bd_data_container"]["data_dict"][0][0] = index
    file.write_bytes(safetensors.torch.save(tensors, {"format": "pt", "record": json.dumps(about)}))
    refused(lambda: load_record(file.parent), PLAIN, f"{index!r} is no index")


def test_a_damaged_plain_record_is_refused(record: Record) -> None:
    file = convert(record, ConvertOptions()) / PLAIN
    whole = file.read_bytes()
    for content in (whole[:-1], whole[:100], whole.replace(b'num_classes\\": 4', b'num_classes\\": "'), b"",
                    whole.replace(b"bd_test/poison_indicator", b"bd_test/poison_indicatox")):  # fmt: skip
        assert content != whole
        file.write_bytes(content)
        refused(lambda: load_record(file.parent), str(file))


def test_of_a_record_nothing_outside_is_looked_into(record: Record, tmp_path: Path) -> None:
    (record.folder / PICKLE).rename(tmp_path / "secret.pt")
    (record.folder / PICKLE).symlink_to(tmp_path / "secret.pt")
    refused(lambda: inspect_file(record.folder), PICKLE, "leads out")


def test_inspect_says_its_verdict_once(record: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(torch.nn.Linear(1, 1), tmp_path / "whole.pt")
    for file, code in ((record.folder, 0), (tmp_path / "whole.pt", 2)):
        with pytest.raises(SystemExit) as left:
            main(["inspect", str(file)])
        said = capsys.readouterr()
        assert left.value.code == code
        assert (said.out + said.err).count("verdict: ") == 1
        assert ("verdict: not safe to open" in said.err) == (code == 2)


def test_what_is_in_a_file_is_told_without_opening_it(record: Record, tmp_path: Path) -> None:
    lines, safe = inspect_file(record.folder)
    assert safe
    assert "  model.module.fc.weight: float32 [4, 2]" in lines
    assert "a record of preactresnet18 on toy" in lines
    touched = tmp_path / "touched"
    trap = tmp_path / "trap.pt"
    for how in (True, False):
        torch.save(
            {"model": {"a": torch.zeros(2)}, "x": peer.touching(touched)}, trap, _use_new_zipfile_serialization=how
        )
        lines, safe = inspect_file(trap)
        assert not safe
        assert any("system" in line for line in lines if line.startswith("asks for"))
        assert "refused" in lines[-1]
    assert not touched.exists()
    assert inspect_file(convert(record, ConvertOptions()))[1]
