"""Written whole or not at all, whatever a killed run left behind."""

from __future__ import annotations

import errno
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ulrl.data.datasets import dataset_spec
from ulrl.errors import UserError
from ulrl.files import check_output, find_input, home, whole_file, whole_folder


def write(folder: Path, text: str, **how: bool) -> None:
    with whole_folder(folder, overwrite=how.get("overwrite", False)) as partial:
        (partial / "a.txt").write_text(text)
        if how.get("fail"):
            raise OSError("disk full")


def test_folder_appears_when_the_block_ends_well(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "x"
    with pytest.raises(OSError, match="disk full"):
        write(folder, "1", fail=True)
    assert not any(tmp_path.iterdir()), "the parent that was made for it is gone too"
    write(folder, "1")
    assert (folder / "a.txt").read_text() == "1"
    with pytest.raises(UserError, match="--overwrite"):
        write(folder, "2")
    with pytest.raises(OSError, match="disk full"):
        write(folder, "2", overwrite=True, fail=True)
    assert (folder / "a.txt").read_text() == "1"
    write(folder, "2", overwrite=True)
    assert (folder / "a.txt").read_text() == "2"
    assert [p.name for p in folder.parent.iterdir()] == ["x"]


def test_leftovers_of_a_killed_run_are_cleared_or_recovered(tmp_path: Path) -> None:
    folder, outside = tmp_path / "x", tmp_path / "outside"
    write(folder, "old")
    (tmp_path / ".x.partial").mkdir()
    (tmp_path / ".x.partial" / "half").write_text("")
    folder.rename(tmp_path / ".x.replaced")  # killed between the two renames
    with pytest.raises(UserError, match="--overwrite"):
        write(folder, "new")
    assert (folder / "a.txt").read_text() == "old"
    outside.mkdir()
    (tmp_path / ".x.partial").symlink_to(outside)
    write(folder, "new", overwrite=True)
    assert [p.name for p in folder.iterdir()] == ["a.txt"]
    assert not any(outside.iterdir())
    (tmp_path / ".y.replaced").symlink_to(outside)  # planted
    write(tmp_path / "y", "new")
    assert not (tmp_path / "y").is_symlink()
    assert not (tmp_path / ".y.replaced").is_symlink()
    assert not any(outside.iterdir())


def test_file_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), whole_file(path) as partial:
        partial.write_text("half")
        raise OSError("full")
    assert path.read_text() == "old"
    with whole_file(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_input_is_looked_for_here_then_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "both.yaml").write_text("")
    (there / "one.yaml").write_text("")
    monkeypatch.chdir(here)
    monkeypatch.setenv("ULRL_HOME", str(there))
    assert home() == there
    assert find_input("both.yaml").resolve() == here / "both.yaml"
    assert find_input("./one.yaml").resolve() == there / "one.yaml"
    assert find_input(there / "one.yaml") == there / "one.yaml"
    with pytest.raises(UserError, match=r"~no-such-user/one\.yaml .*write the path out"):
        find_input("~no-such-user/one.yaml")


def test_data_is_looked_for_at_home_and_not_in_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is downloaded there, too; options files come with the checkout."""
    monkeypatch.setenv("ULRL_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert find_input("config").is_dir()
    assert find_input("config", shipped=False) == tmp_path / "config"
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        dataset_spec("folder", "config")


def test_an_output_that_cannot_be_written_is_told_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of the system, as root may write where the mode says no, but not on a file system that is read-only."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"--out x\.pt: the folder \. cannot be written to"):
        check_output(Path("x.pt"), "--out")


def test_two_runs_of_one_name_do_not_mix(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    with whole_folder(folder, overwrite=False) as partial:
        (partial / "a.txt").write_text("first")
        with pytest.raises(UserError, match="another run"):
            write(folder, "second", overwrite=True)
    assert (folder / "a.txt").read_text() == "first"


def test_many_writers_of_one_name_never_mix_nor_lose_what_one_has_finished(tmp_path: Path) -> None:
    folder, wrong, finished = tmp_path / "new" / "x", [], []

    def writer(me: int) -> None:
        for turn in range(40):
            try:
                with whole_folder(folder, overwrite=turn > 0) as partial:
                    (partial / "a.txt").write_text(f"{me} {turn}")
                    time.sleep(0.0005)
                    if turn % 8 == 7:
                        raise OSError("disk full")
                    (partial / "b.txt").write_text(f"{me} {turn}")
                    found = sorted((p.name, p.read_text()) for p in partial.iterdir())
                    if found != [("a.txt", f"{me} {turn}"), ("b.txt", f"{me} {turn}")]:
                        wrong.append(found)
                finished.append(turn)
            except UserError:
                time.sleep(0.0005)
            except OSError as error:
                if str(error) != "disk full":
                    wrong.append(error)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(writer, range(8)))
    assert not wrong
    assert finished.count(0) == 1, "the first writes it, and the others do not replace it"
    assert len(finished) > 1
    assert (folder / "a.txt").read_text() == (folder / "b.txt").read_text()
    assert [p.name for p in folder.parent.iterdir()] == ["x"]


def test_a_folder_is_written_where_folders_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS, whose locks are only for what is open for writing."""

    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("fcntl.flock", refuse)
    write(tmp_path / "x", "one")
    assert (tmp_path / "x" / "a.txt").read_text() == "one"


def test_a_kept_folder_outlives_a_failure_and_an_overwriting(tmp_path: Path) -> None:
    folder, secret = tmp_path / "x", tmp_path / "secret.txt"
    secret.write_text("s")

    def run(*, overwrite: bool = False, fail: bool = False) -> list[str]:
        with whole_folder(folder, overwrite=overwrite, keep="learned") as partial:
            found = sorted(p.name for p in partial.rglob("*"))
            (partial / "learned").mkdir(exist_ok=True)
            (partial / "learned" / "a.pt").write_text("long work")
            (partial / "rest.txt").write_text("1")
            if fail:
                raise OSError("disk full")
        return found

    with pytest.raises(OSError, match="disk full"):
        run(fail=True)
    assert not folder.exists()
    assert run() == ["a.pt", "learned"], "the unfinished run's work, and nothing else of it"
    (folder / "learned" / "link.pt").symlink_to(secret)
    os.mkfifo(folder / "learned" / "pipe.pt")
    assert run(overwrite=True) == ["a.pt", "learned"], "a link is not followed, and a pipe not waited for"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["secret.txt", "x"]


def test_home_is_the_checkout_and_no_folder_that_merely_has_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside an installed package there may be another one of the name `config`."""
    monkeypatch.delenv("ULRL_HOME", raising=False)
    assert home() == Path(__file__).resolve().parent.parent
    packages, elsewhere = tmp_path / "site-packages", tmp_path / "elsewhere"
    for folder in (packages / "config", packages / "ulrl" / "config", packages / "record", elsewhere):
        folder.mkdir(parents=True)
    monkeypatch.setattr("ulrl.files.PACKAGE_ROOT", packages)
    monkeypatch.chdir(elsewhere)
    assert home() == elsewhere
    assert not find_input("record").exists()
