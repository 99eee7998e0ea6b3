"""The main job as a user types it, from another directory, and the table that it prints."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import ulrl
from ulrl.attacks.base import ATTACKS
from ulrl.cli import COMMANDS, defense_main, main
from ulrl.data.batches import normalise
from ulrl.data.datasets import load_dataset
from ulrl.defenses.base import DEFENSES
from ulrl.detectors.base import DETECTORS

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
    for word in ("ulrl on tiny", "before", "after", "ACC %", "ASR %", "RA %", "DER %", "flagged", "unlearn "):
        assert word in done.stdout
    assert f"{100 * result['after']['acc']:.2f}" in done.stdout


def test_every_method_has_a_script_and_a_configuration() -> None:
    for kind, registry in (("attack", ATTACKS), ("defense", DEFENSES)):
        scripts = {p.stem for p in (ROOT / kind).glob("*.py")} - {"_root"}
        assert scripts == set(registry)
        for name in registry:
            assert f'{kind}_main("{name}")' in (ROOT / kind / f"{name}.py").read_text()
            assert list((ROOT / "config" / kind / name).glob("*.yaml"))
    for name in DETECTORS:  # which one command runs
        assert list((ROOT / "config" / "detection" / name).glob("*.yaml"))


def test_list_names_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["list"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said for name in [*ATTACKS, *DEFENSES, *DETECTORS, "fashion_mnist", "preactresnet18"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["attack"], "name an attack first"),
        (["compare", "--seeds", "2"], "name a record first"),
        (["purfy"], "did you mean 'purify'?"),
        (["lisst"], "did you mean 'list'?"),
        (["defense", "ulrrl"], "did you mean 'ulrl'?"),
        (["defense", "dbd"], "unknown defense 'dbd'; known: abl, anp"),
        (["defense", "nab"], "unknown defense 'nab'; known: abl, anp"),
        (["defense", "FT-SAM"], "did you mean 'ft-sam'?"),
        (["defense", "spectral"], "try ulrl detect RECORD --samples spectral"),
        (["detect", "x", "--samples", "anp"], "try ulrl defense anp"),
        (["suspect", "--model", "my_nets:resnet"], "it is ulrl purify --check"),
        (["show", "nosuch"], "nosuch"),
        (["compare", "x", "--random_seed", "7"], "--random_seed would have no effect"),
        (["compare", "x", "--save_folder_name", "y"], "--save_folder_name would have no effect"),
        (["results", "--attack", "badnet"], "unknown argument --attack"),
        (["report", "--attack", "badnet", "--out", "x.html"], "unknown argument --attack"),
        (["sweep", "sweep/quick", "--attack", "badnet", "--dry_run"], "unknown argument --attack"),
    ],
)
def test_a_mistaken_command_is_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    assert f"ulrl {name}" in capsys.readouterr().out


def test_a_second_run_of_a_defense_asks_first(tiny_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As an attack does; a comparison reads what is there."""
    file = tiny_home / "record" / "tiny" / "defense" / "ft" / "result.json"
    repair = "--result_file tiny --epochs 1 --device cpu --ratio 0.1".split()
    codes = []
    for more in ([], ["--random_seed", "1"], ["--random_seed", "1", "--overwrite"]):
        with pytest.raises(SystemExit) as left:
            defense_main("ft", [*repair, *more])
        codes.append((left.value.code, json.loads(file.read_text())["seed"]))
    assert codes == [(0, 0), (2, 0), (0, 1)]
    assert "exists; pass --overwrite (from Python overwrite=True)" in capsys.readouterr().err

    compared = tiny_home / "record" / "tiny" / "defense" / "clp_0.1_seed0" / "result.json"
    times, codes = [], []
    for more in ([], [], ["--eval_every", "1"], ["--eval_every", "1", "--overwrite"]):
        with pytest.raises(SystemExit) as left:
            main(["compare", "tiny", "--defenses", "clp", "--ratio", "0.1", "--device", "cpu", *more])
        codes.append(left.value.code)
        times.append(compared.stat().st_mtime_ns)
    assert codes == [0, 0, 2, 0]
    assert times[0] == times[1] == times[2] < times[3]
    assert "move it away" in capsys.readouterr().err, "a comparison chooses the names itself"


def test_an_index_file_that_lists_others_by_now_is_another_run(
    tiny_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = []
    for listed in ("0 1 2", "0\n1\n2\n", "0 1 3"):
        Path("index.txt").write_text(listed)
        with pytest.raises(SystemExit) as left:
            main("compare tiny --defenses clp --index index.txt --device cpu".split())
        codes.append(left.value.code)
    assert codes == [0, 0, 2]
    assert "clp_0.1_seed0 exists" in capsys.readouterr().err


def test_a_defense_that_is_named_twice_is_compared_once(tiny_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main("compare tiny --defenses clp,clp --ratio 0.1 --device cpu".split())
    assert left.value.code == 0
    said = capsys.readouterr()
    assert "lay in the record already" not in said.out
    assert "is there already" not in said.err


def test_a_comparison_tells_what_fits_only_its_first_defense_before_that_has_run(
    tiny_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.yaml").write_text("u: 3\nratio: 0.1\n")
    with pytest.raises(SystemExit) as left:
        main("compare tiny --defenses clp,ft --yaml_path mine.yaml --device cpu".split())
    assert left.value.code == 2
    assert "unknown key 'u'" in capsys.readouterr().err
    assert not (tiny_home / "record" / "tiny" / "defense").exists()


def test_show_says_what_a_record_holds(tiny_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        defense_main("ft", "--result_file tiny --epochs 1 --device cpu --ratio 0.1".split())
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(["show", "tiny"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    result = json.loads((tiny_home / "record" / "tiny" / "defense" / "ft" / "result.json").read_text())
    for word in ("badnet, target 0", "digits, 10 classes", "no defense", "trigger_preview.png", "ft", "as the files"):
        assert word in said
    for row in ("before", "after"):
        assert f"{100 * result[row]['acc']:.2f}" in said


def test_files_that_cannot_be_written_are_told_before_the_work(
    tiny_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        ("report --out nosuch/page.html", "--out nosuch/page.html: there is no folder nosuch"),
        ("report --out .", "--out . is a folder"),
        ("results --export nosuch/runs.csv", "--export nosuch/runs.csv: there is no folder nosuch"),
        ("plot heatmap --out nosuch/map.pdf", "--out nosuch/map.pdf: there is no folder nosuch"),
    ):
        with pytest.raises(SystemExit) as left:
            main(arguments.split())
        said = capsys.readouterr().err
        assert (left.value.code, said.count("\n")) == (2, 1)
        assert words in said


def test_a_records_repair_in_one_line(tiny_home: Path) -> None:
    result = ulrl.purify_record("tiny", method="ft", epochs=1, device="cpu", ratio=0.1, progress=False)
    written = json.loads((result.folder / "result.json").read_text())
    assert result.folder == tiny_home / "record" / "tiny" / "defense" / "ft"
    assert result.report == written
    assert f"{100 * written['after']['asr']:.2f}" in repr(result)
    images, _ = load_dataset("digits")
    assert result.model(normalise(images.images[:2], images.spec)).shape == (2, 10)
    again = ulrl.purify_record("tiny", method="ft", epochs=1, device="cpu", ratio=0.1, progress=False)
    assert again.report == written
    assert (result.found, again.found) == (False, True)
    assert "found in the record" in repr(again)
    assert "found in the record" not in repr(result)
    with pytest.raises(ulrl.UserError, match="--overwrite"):
        ulrl.purify_record("tiny", method="ft", epochs=2, device="cpu", ratio=0.1, progress=False)
    (result.folder / "ft_df.csv").unlink()  # as of a result that a stranger made up
    with pytest.raises(ulrl.UserError, match=r"ft_df\.csv"):
        ulrl.purify_record("tiny", method="ft", epochs=1, device="cpu", ratio=0.1, progress=False)


def test_a_run_that_is_killed_at_its_pictures_is_not_there_and_one_without_them_is(
    tiny_home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"method": "ft", "epochs": 1, "device": "cpu", "ratio": 0.1, "progress": False}
    folder = tiny_home / "record" / "tiny" / "defense" / "ft"

    def killed(place: Path) -> None:
        (place / ".acc_asr.png.1234.partial").write_text("half a picture")
        os.kill(os.getpid(), signal.SIGKILL)

    def failing(place: Path) -> None:
        raise OSError("no room for a picture")

    if (child := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            torch.set_num_threads(1)
            monkeypatch.setattr("ulrl.own_record.draw", killed)
            ulrl.purify_record("tiny", **given)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not folder.exists()
    result = ulrl.purify_record("tiny", **given)
    assert (result.found, (folder / "acc_asr.png").is_file()) == (False, True)
    assert not list(folder.parent.rglob("*.partial")), "what the killed one left"

    monkeypatch.setattr("ulrl.own_record.draw", failing)
    assert ulrl.purify_record("tiny", **given, random_seed=1, overwrite=True).report["seed"] == 1
    assert "no room for a picture" in caplog.text


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
