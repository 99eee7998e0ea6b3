"""The main job as a user types it, from another directory, and the table that it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ulrl.attacks.base import ATTACKS
from ulrl.cli import defense_main, main
from ulrl.defenses.base import DEFENSES

ROOT = Path(__file__).parent.parent


def test_scripts_run_from_any_directory(tiny_home: Path, tmp_path: Path) -> None:
    """`python defense/ulrl.py`: the script's own folder, where ulrl.py hides the package, is not searched."""
    done = subprocess.run(
        [sys.executable, ROOT / "defense" / "ulrl.py", "--result_file", "tiny", "--yaml_path",
         "./config/defense/ulrl/digits.yaml", "--dataset", "digits", "--relearn_epochs", "2", "--device", "cpu"],
        capture_output=True, text=True, cwd=tmp_path / "elsewhere", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tiny_home / "record" / "tiny" / "defense" / "ulrl" / "result.json").read_text())
    assert result["options"]["relearn_epochs"] == 2
    assert result["options"]["batch_size"] == 32, "from the YAML file"
    for word in ("ulrl on tiny", "before", "after", "ACC %", "ASR %", "RA %", "DER %", "flagged", "unlearn, s"):
        assert word in done.stdout
    assert f"{100 * result['after']['acc']:.2f}" in done.stdout


def test_every_method_has_a_script_and_a_configuration() -> None:
    for kind, registry in (("attack", ATTACKS), ("defense", DEFENSES)):
        scripts = {p.stem for p in (ROOT / kind).glob("*.py")} - {"_root"}
        assert scripts == set(registry)
        for name in registry:
            assert f'{kind}_main("{name}")' in (ROOT / kind / f"{name}.py").read_text()
            assert list((ROOT / "config" / kind / name).glob("*.yaml"))


def test_list_names_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["list"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said for name in [*ATTACKS, *DEFENSES, "fashion_mnist", "preactresnet18"])


@pytest.mark.parametrize("arguments", [[], ["attack"], ["lisst"], ["defense", "ulrrl"]])
def test_unknown_command_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_record_may_be_named_by_its_path(tiny_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = (tiny_home / "record" / "tiny").rename(tiny_home.parent / "downloads")
    with pytest.raises(SystemExit) as left:
        defense_main("ulrl", ["--result_file", str(moved), "--relearn_epochs", "1", "--device", "cpu"])
    assert left.value.code == 0, capsys.readouterr().err
    assert (moved / "defense" / "ulrl" / "result.json").is_file()


def test_preview_draws_a_trigger_and_says_how_visible_it_is(
    empty_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for attack, options in (
        ("blended", []),
        ("trojannn", ["--width", "4", "--epochs", "1", "--mask_update_iters", "3"]),
    ):
        with pytest.raises(SystemExit) as left:
            main(["preview", attack, "--dataset", "digits", "--device", "cpu", *options])
        said = capsys.readouterr()
        assert left.value.code == 0, said.err[-2000:]
        assert all(word in said.out for word in (attack, "L2", "Linf", "PSNR", "SSIM"))
        picture = Path(f"preview_{attack}_digits.png")
        assert picture.name in said.out
        assert Image.open(picture).width > 500
    assert not (empty_home / "record").exists()


@pytest.mark.parametrize(("attack", "word"), [("inputaware", "trained together"), ("prototype", "no trigger")])
def test_preview_is_refused_where_there_is_none(
    attack: str, word: str, empty_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["preview", attack, "--dataset", "digits", "--device", "cpu"])
    assert left.value.code == 2
    said = capsys.readouterr().err.strip()
    assert word in said.splitlines()[-1]
    assert "Traceback" not in said
