"""What a user does wrong, or what goes wrong for him: one clear line, exit code 2, and the record as it was."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

from ulrl.cli import attack_main, defense_main
from ulrl.cli.terminal import exit_with
from ulrl.runs import attacking

ROOT = Path(__file__).resolve().parent.parent
MAIN = {"attack": ("badnet", attack_main), "defense": ("ulrl", defense_main)}

# Short enough for a test, where a defense has to run at all.
QUICK = "--unlearning_epochs 1 --relearn_epochs 1 --device cpu --ratio 0.05".split()
REPAIR = ["--result_file", "tiny", *QUICK]


def tree(folder: Path) -> dict[str, str]:
    """All that lies in a folder, with what it holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def one_line(code: int | str | None, out: str, err: str, words: tuple[str, ...], wanted: int = 2) -> None:
    """The manners: exit code, no traceback, and at the end of stderr one line that has all `words`."""
    assert "Traceback" not in out + err, err[-3000:]
    assert code == wanted, err[-3000:]
    lines = err.splitlines()
    assert lines[-1].startswith("ulrl: "), err[-3000:]
    assert sum(line.startswith("ulrl: ") for line in lines) == 1
    for word in words:
        assert word in lines[-1]


Refused = Callable[..., str]


@pytest.fixture
def refused(tiny_home: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must fail and leave the whole home as it was; returns stderr."""

    def run(kind: str, argv: list[str], *words: str, name: str | None = None) -> str:
        before = tree(tiny_home)
        usual, main = MAIN[kind]
        with pytest.raises(SystemExit) as left:
            main(name or usual, argv)
        said = capsys.readouterr()
        one_line(left.value.code, said.out, said.err, words)
        assert tree(tiny_home) == before
        return said.err

    return run


def succeeds(kind: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must not fail; returns stderr."""
    name, main = MAIN[kind]
    with pytest.raises(SystemExit) as left:
        main(name, argv)
    said = capsys.readouterr()
    assert left.value.code == 0, said.err[-3000:]
    assert "Traceback" not in said.err
    return said.err


# Flags and YAML


@pytest.mark.parametrize("kind", MAIN)
def test_unknown_flag(refused: Refused, kind: str) -> None:
    refused(kind, ["--bach_size", "3"], "--bach_size", "--batch_size")


@pytest.mark.parametrize("kind", MAIN)
def test_wrong_type(refused: Refused, kind: str) -> None:
    refused(kind, ["--batch_size", "many"], "--batch_size", "'many'", "whole number")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("bach_size: 3", ["'bach_size'", "'batch_size'"]),
        ("- batch_size\n- 3", ["mapping"]),
        ("batch_size: many", ["batch_size", "whole number"]),
        ("batch_size: [", ["YAML"]),
    ],
)
@pytest.mark.parametrize(
    ("kind", "flag"), [("attack", "yaml_path"), ("attack", "bd_yaml_path"), ("defense", "yaml_path")]
)
def test_bad_yaml(refused: Refused, kind: str, flag: str, content: str, words: list[str]) -> None:
    file = Path("mine.yaml").absolute()  # in the working directory, which is not the home
    file.write_text(content)
    refused(kind, [f"--{flag}", "mine.yaml"], "mine.yaml", *words)


def test_missing_yaml(refused: Refused) -> None:
    for kind in MAIN:
        refused(kind, ["--yaml_path", "config/nosuch.yaml"], "nosuch.yaml", "No such file")
        refused(kind, ["--yaml_path", str(Path.cwd())], str(Path.cwd()), "is a folder")


def test_unknown_method_names_the_nearest(refused: Refused) -> None:
    refused("attack", [], "'badnets'", "'badnet'", name="badnets")
    refused("defense", [], "'url'", "'ulrl'", name="url")


@pytest.mark.parametrize("device", ["cuda:77", "nonsense", "", "meta"])
def test_device_that_is_not_there(refused: Refused, device: str) -> None:
    refused("attack", [*NEW, "--device", device], "--device", device)
    refused("defense", [*REPAIR, "--device", device], "--device", device)


def test_device_of_a_yaml_that_is_not_there(tiny_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("device: cuda:77\nratio: 0.05\nunlearning_epochs: 1\nrelearn_epochs: 1\n")
    said = succeeds("defense", ["--result_file", "tiny", "--yaml_path", "mine.yaml"], capsys)
    (warning,) = [line for line in said.splitlines() if "cuda:77" in line]
    assert "CPU" in warning
    assert "mine.yaml" in warning
    assert (tiny_home / "record/tiny/defense/ulrl/result.json").is_file()


@pytest.mark.parametrize("device", ["nonsense", "xpu", "cuda:x"])
def test_device_of_a_yaml_that_is_none(refused: Refused, device: str) -> None:
    Path("mine.yaml").write_text(f"device: {device}\n")
    refused("defense", ["--result_file", "tiny", "--yaml_path", "mine.yaml"], "mine.yaml", f"device {device}", "cuda:N")


# Attacks

NEW = [*TINY, "--save_folder_name", "new"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--attack_target", "10"], ["--attack_target", "10", "0 to 9"]),
        (["--attack_target", "-1"], ["--attack_target", "at least 0"]),
        (["--pratio", "0"], ["--pratio"]),
        (["--pratio", "0.0003"], ["--pratio", "0.0003"]),
        (["--pratio", "1.5"], ["--pratio", "at most 1"]),
        (["--p_num", "1438"], ["--p_num", "1438", "1437"]),
        (["--train_samples", "1438"], ["--train_samples", "1438", "1437"]),
        (["--patch_size", "9"], ["--patch_size", "9"]),
        (["--patch_mask_path", "nosuch.png"], ["--patch_mask_path", "nosuch.png"]),
        (["--patch_mask_path", "text.png"], ["--patch_mask_path", "text.png"]),
        (["--patch_mask_path", "cut.png"], ["--patch_mask_path", "cut.png"]),
        (["--patch_mask_path", "garbled.png"], ["--patch_mask_path", "garbled.png"]),
        (["--patch_mask_path", "black.png"], ["--patch_mask_path", "black.png"]),
        (["--patch_mask_path", "."], ["--patch_mask_path"]),
        (["--patch_mask_path", "whole.png", "--patch_size", "3"], ["--patch_size 3 would have no effect"]),
        (["--dataset", "digit"], ["'digit'", "'digits'"]),
        (["--model", "preactresnet"], ["'preactresnet'", "'preactresnet18'"]),
        (["--lr", "1e30"], ["loss", "learning rate"]),
        (["--save_folder_name", "a/b"], ["--save_folder_name", "a/b"]),
        (["--save_folder_name", "../out"], ["--save_folder_name", "../out"]),
        (["--save_folder_name", ".hidden"], ["--save_folder_name", ".hidden"]),
        (["--save_folder_name", "x" * 300], ["xxx"]),
    ],
    ids=lambda value: "_".join(value)[:40],
)
def test_attacks_that_cannot_be_run(refused: Refused, argv: list[str], words: list[str]) -> None:
    Path("text.png").write_text("no image")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("whole.png")
    whole = Path("whole.png").read_bytes()
    Path("cut.png").write_bytes(whole[: len(whole) // 2])
    Path("garbled.png").write_bytes(whole[:60] + b"\0" * 40 + whole[100:])
    Image.fromarray(pixels * 0).save("black.png")
    refused("attack", [*NEW, *argv], *words)


def test_a_blended_picture_that_is_not_there(refused: Refused) -> None:
    refused(
        "attack", [*NEW, "--attack_trigger_img_path", "no.png"], "--attack_trigger_img_path", "no.png", name="blended"
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "preactresnet"], ["'preactresnet'", "'preactresnet18'"]),
        (["--model", "resnet18", "--width", "8"], ["--width 8", "one width only"]),
        (["--model", "densenet161", "--width", "7"], ["--width 7", "multiples of 2"]),
        (["--model", "preactresnet18", "--pretrained"], ["--pretrained"]),
    ],
)
def test_a_net_that_there_is_none_of_is_told_before_the_data_is_read(
    refused: Refused, argv: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attacking, "load_dataset", lambda *_: pytest.fail("it was read"))
    refused("attack", ["--dataset", "digits", "--device", "cpu", "--save_folder_name", "new", *argv], *words)


def test_an_existing_record_is_left_alone(refused: Refused) -> None:
    refused("attack", [*TINY, "--save_folder_name", "tiny"], "record/tiny", "--overwrite")


# Records


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["--result_file"]),
        (["--result_file", "nosuch"], ["nosuch"]),
        (["--result_file", "x" * 300], ["xxx"]),
        (["--result_file", "tiny", "--dataset", "cifar10"], ["--dataset", "cifar10", "digits"]),
        (["--result_file", "tiny", "--model", "vgg19"], ["--model", "vgg19", "preactresnet18"]),
        (["--result_file", "tiny", "--ratio", "0.0001"], ["--ratio", "0.0001"]),
        (["--result_file", "tiny", "--ratio", "0"], ["--ratio"]),
        (["--result_file", "tiny", "--ratio", "2"], ["--ratio", "at most 1"]),
        (["--result_file", "tiny", "--index", "nosuch.txt"], ["--index", "nosuch.txt"]),
        (["--result_file", "tiny", "--index", "."], ["--index"]),
    ],
    ids=lambda value: "_".join(value)[:40],
)
def test_repairs_that_cannot_be_run(refused: Refused, argv: list[str], words: list[str]) -> None:
    refused("defense", argv, *words)


def test_a_record_that_cannot_be_written_to_is_told_before_the_work(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # see tests/test_files.py
    refused("defense", REPAIR, "record/tiny cannot be written to", "copy the record")


@pytest.mark.parametrize(("code", "mend"), [(errno.EROFS, "copy the record"), (errno.ENOSPC, "make room")])
def test_what_cannot_be_written_says_the_way_out(code: int, mend: str, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise OSError(code, os.strerror(code), "x")

    with pytest.raises(SystemExit) as left:
        exit_with(command)
    said = capsys.readouterr()
    one_line(left.value.code, said.out, said.err, (f"cannot write x: {os.strerror(code)}", mend))


def test_yaml_that_contradicts_the_record_is_named(refused: Refused) -> None:
    yaml = str(ROOT / "config/defense/ulrl/cifar10.yaml")
    refused("defense", ["--result_file", "tiny", "--yaml_path", yaml], "dataset", "cifar10", "digits", "tiny")


def test_a_head_that_is_not_there(refused: Refused) -> None:
    refused("defense", [*REPAIR, "--linear_name", "classifier"], "linear_name", "'classifier'", "linear")


@pytest.mark.parametrize(
    "content",
    ["1 2 x", "", "-1 2", "0 1437", "3 3", "1.5", "9" * 5000, b"\xff\xfe\x00"],
    ids=["word", "empty", "negative", "beyond", "twice", "fraction", "huge", "binary"],
)
def test_bad_index_file(refused: Refused, content: str | bytes) -> None:
    Path("index.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused("defense", [*REPAIR, "--index", "index.txt"], "--index", "index.txt")


def test_a_good_index_file_is_used_and_written_back(tiny_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("index.txt").write_text(" ".join(str(i) for i in range(100, 40, -2)))
    succeeds("defense", [*REPAIR, "--index", "index.txt"], capsys)
    written = (tiny_home / "record/tiny/defense/ulrl/index.txt").read_text().split()
    assert sorted(map(int, written)) == list(range(42, 101, 2))


@pytest.mark.parametrize("count", [1, 2])
def test_the_fewest_clean_samples_repair_or_are_refused(
    tiny_home: Path, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    """BatchNorm cannot train on one 8x8 image, whose last feature map is one pixel."""
    Path("index.txt").write_text("\n".join(map(str, range(count))))
    before = tree(tiny_home)
    with pytest.raises(SystemExit) as left:
        defense_main("ulrl", [*REPAIR, "--index", "index.txt"])
    said = capsys.readouterr()
    if left.value.code:
        assert count == 1
        one_line(left.value.code, said.out, said.err, ("sample",))
        assert tree(tiny_home) == before
    else:
        assert (tiny_home / "record/tiny/defense/ulrl/result.json").is_file()


def test_damaged_attack_results(refused: Refused, tiny_home: Path) -> None:
    file = tiny_home / "record/tiny/attack_result.pt"
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-1], whole[:1], b"", b"I am a text file.\n", b"\x80\x02."):
        file.write_bytes(content)
        refused("defense", REPAIR, "attack_result.pt")
    torch.save([1, 2], file)
    refused("defense", REPAIR, "attack_result.pt")
    file.unlink()
    refused("defense", REPAIR, "attack_result.pt", "missing")


def test_a_record_of_an_unknown_data_set_or_model(refused: Refused, tiny_home: Path) -> None:
    file = tiny_home / "record/tiny/attack_result.pt"
    result = torch.load(file, weights_only=False)
    torch.save({**result, "clean_data": "imagenet"}, file)
    refused("defense", REPAIR, "'imagenet'")
    torch.save({**result, "model_name": "alexnet"}, file)
    refused("defense", REPAIR, "'alexnet'", "preactresnet18")
    torch.save({**result, "num_classes": 12}, file)
    refused("defense", REPAIR, "12")
    weights = {name: value for name, value in result["model"].items() if name != "linear.bias"}
    torch.save({**result, "model": weights}, file)
    refused("defense", REPAIR, "linear.bias")
    torch.save({**result, "model": {**result["model"], "conv1.weight": torch.zeros(4)}}, file)
    refused("defense", REPAIR, "conv1.weight")


def test_damaged_poisoned_images(refused: Refused, tiny_home: Path) -> None:
    image = min((tiny_home / "record/tiny/bd_test_dataset").rglob("*.png"))
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    refused("defense", REPAIR, image.name)
    image.write_text("no image")
    refused("defense", REPAIR, image.name)
    Image.new("L", (9, 8)).save(image)
    refused("defense", REPAIR, image.name, "8 x 9", "8 x 8")
    image.unlink()
    refused("defense", REPAIR, image.name, "missing")


# The machine: real processes, started from another folder


def start(
    script: str, argv: list[str], home: Path, stderr: IO[bytes] | int, limit: int = -1
) -> subprocess.Popen[bytes]:
    """`python attack/badnet.py ...`, in the working directory. limit: bytes that a file may have at most."""

    def as_in_a_terminal() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests in the background of a shell inherit that it is ignored

    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *argv],
        env=os.environ | {"ULRL_HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=stderr,
        preexec_fn=as_in_a_terminal,
    )


@pytest.mark.parametrize(
    ("script", "argv", "limit", "where"),
    [
        ("attack/badnet.py", [*NEW], 20_000, "record/new"),
        ("attack/badnet.py", [*TINY, "--save_folder_name", "tiny", "--overwrite"], 0, "record/tiny"),
        ("defense/ulrl.py", REPAIR, 20_000, "defense_result.pt"),
    ],
    ids=["attack", "overwriting attack", "defense"],
)
def test_full_disk(tiny_home: Path, script: str, argv: list[str], limit: int, where: str) -> None:
    """A file that outgrows the limit fails as on a full disk, in the middle of a write."""
    before = tree(tiny_home)
    process = start(script, argv, tiny_home, subprocess.PIPE, limit)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    one_line(process.returncode, out.decode(), err.decode(), ("cannot write", where))
    assert tree(tiny_home) == before


def test_ctrl_c_in_training(tiny_home: Path, tmp_path: Path) -> None:
    before = tree(tiny_home)
    err = tmp_path / "stderr"
    argv = [*TINY, "--save_folder_name", "tiny", "--overwrite", "--epochs", "100000"]
    with err.open("wb") as stream:
        process = start("attack/badnet.py", argv, tiny_home, stream)
    try:
        deadline = time.monotonic() + 60
        while b"train:" not in err.read_bytes():  # the bar
            assert process.poll() is None, err.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert tree(tiny_home) != before  # something is being written
        process.send_signal(signal.SIGINT)
        code = process.wait(30)
    finally:
        process.kill()
    one_line(code, "", err.read_text(), ("interrupted",), wanted=130)
    assert tree(tiny_home) == before


def test_ctrl_c_of_a_sweep_ends_its_jobs_and_what_they_half_wrote(tiny_home: Path, tmp_path: Path) -> None:
    """The terminal sends it to all processes at once, also to those that are only starting."""
    file, err = tmp_path / "long.yaml", tmp_path / "stderr"
    file.write_text("attacks: {attack: badnet, dataset: digits, width: 4, epochs: 100000, device: cpu}\n")
    before = tree(tiny_home / "record" / "tiny")
    for at_work in (False, True):
        with err.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "ulrl", "sweep", str(file)], env=os.environ | {"ULRL_HOME": str(tiny_home)},
                stdout=subprocess.DEVNULL, stderr=stream, start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip
        try:
            deadline, sign = time.monotonic() + 120, ".*.partial/*" if at_work else ".sweep"
            while not list((tiny_home / "record").glob(sign)):
                assert process.poll() is None, err.read_text()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        assert err.read_text().splitlines()[-1] == "ulrl: interrupted; what was there before is unchanged"
        assert "Traceback" not in err.read_text()
        assert not list((tiny_home / "record").glob(".*.partial"))
        assert tree(tiny_home / "record" / "tiny") == before


def test_an_interrupt_that_something_swallows_ends_the_command_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        with contextlib.suppress(KeyboardInterrupt):  # as torch does around its import of numpy
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        raise AttributeError("module 'numpy' has no attribute 'matrix'")

    with pytest.raises(SystemExit) as left:
        exit_with(command)
    assert left.value.code == 130
    assert "interrupted" in capsys.readouterr().err


def test_an_unknown_flag_of_a_script(tmp_path: Path) -> None:
    process = start("defense/ulrl.py", ["--resultfile", "x"], tmp_path / "no_such_home", subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    one_line(process.returncode, out.decode(), err.decode(), ("--resultfile", "--result_file"))
    assert not (tmp_path / "no_such_home").exists()
