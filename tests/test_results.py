"""What finished runs came to: the frame, its summaries, the formats, and what is not to be trusted in a file."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shlex
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fabricated import result, write, write_record
from hypothesis import given, settings
from hypothesis import strategies as st
from manners import refused
from rich.console import Console

from ulrl.cli import main
from ulrl.cli.flags import attack_flags
from ulrl.configure import AttackRun, DefenseRun, configure_attack, configure_defense, options_of
from ulrl.defenses.base import DEFENSES
from ulrl.options import Schema
from ulrl.report.frame import frame_of, frame_of_runs, select
from ulrl.report.page import repeat_command
from ulrl.report.pooling import best_of, in_order, notes_of, summarise
from ulrl.report.results import Run, find_runs
from ulrl.report.tables import comparison_table, summary_cells, summary_latex, summary_markdown, summary_table
from ulrl.runs.common import write_json
from ulrl.untrusted.texts import read_json


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two records; ulrl three times and ft once on the first, of which one run is not known in full."""
    root = tmp_path / "record"
    write_record(root / "one", "badnet", {
        **{f"ulrl_{k}": {"seed": k, "acc": 0.90 + 0.01 * k, "asr": 0.02 * k, "ra": 0.8} for k in range(3)},
        "ft": {"method": "ft", "acc": 0.95, "asr": 0.5, "ra": 0.4, "der": 0.7},
        "rnp": {"method": "rnp", "acc": 0.5, "asr": 0.4, "ra": 0.1, "der": None,
                "oracle": {"acc": 0.99, "asr": 0.0, "ra": 0.99, "rule": "lowest test ASR"}},
    })  # fmt: skip
    write_record(root / "clean", "prototype", {"ulrl": {"asr": None, "ra": None, "der": None}}, options={"pratio": 0.0})
    write(root / ".hidden", result("attack"))  # a run that has not ended
    return root


def say(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    said = capsys.readouterr()
    assert left.value.code == 0, said.err
    return said.out


def test_frame_has_a_row_per_run_and_knows_its_record(study: Path) -> None:
    frame = frame_of_runs(find_runs(study)[0])
    assert len(frame) == 9, "two attacks, six defenses, one oracle"
    own = frame.loc[str(study / "one" / "defense" / "ulrl_2")]
    assert (own.acc, own.asr, own.ra, own.der, own.seconds, own.pratio, own.ratio) == (
        0.92,
        0.04,
        0.8,
        0.9,
        2,
        0.1,
        0.01,
    )
    assert frame[frame.oracle].defense.tolist() == ["rnp (oracle)"]
    assert frame[frame.attack == "prototype"].asr.tolist()[0] == 0.99
    assert pd.isna(frame.loc[str(study / "clean" / "defense" / "ulrl")].asr)


def test_the_poison_ratio_is_what_was_poisoned(tmp_path: Path) -> None:
    """By a number of images instead of a share; of an attack that poisons none there is no ratio."""
    root = tmp_path / "record"
    counted = {"poisoned": 5, "train_samples": 50}
    for name, p_num, evidence in (
        ("share", None, counted), ("number", 5, counted), ("none", None, {**counted, "poisoned": 0}),
        ("strange", 5, {"poisoned": "many", "train_samples": True}), ("unknown", 5, {}),
    ):  # fmt: skip
        write_record(root / name, "badnet", {"ft": {}}, options={"pratio": 0.3, "p_num": p_num})
        file = root / name / "result.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"evidence": evidence}))
    frame = frame_of_runs(find_runs(root)[0])
    found = frame[frame.kind == "defense"].set_index("record").pratio.to_dict()
    assert {k: v for k, v in found.items() if not pd.isna(v)} == {"share": 0.3, "number": 0.1}


def test_summary_is_mean_and_sample_deviation(study: Path) -> None:
    frame = select(frame_of_runs(find_runs(study)[0]), "attack=badnet")
    summary = summarise(frame, "defense,ratio").set_index("defense")
    for figure, values in (("acc", [0.9, 0.91, 0.92]), ("asr", [0, 0.02, 0.04])):
        assert summary.loc["ulrl", f"{figure}_mean"] == pytest.approx(statistics.mean(values))
        assert summary.loc["ulrl", f"{figure}_std"] == pytest.approx(statistics.stdev(values))
    assert summary.n.to_dict() == {"no defense": 1, "ulrl": 3, "ft": 1, "rnp": 1, "rnp (oracle)": 1}
    assert pd.isna(summary.loc["ft", "acc_std"])


def test_best_is_among_defenses_under_equal_conditions(study: Path) -> None:
    summary = summarise(frame_of_runs(find_runs(study)[0]), "attack,defense")
    best = best_of(summary).set_index(pd.MultiIndex.from_frame(summary[["attack", "defense"]]))
    assert best[best.acc].index.tolist() == [("badnet", "ft")]
    assert best[best.asr].index.tolist() == [("badnet", "ulrl")]
    assert not best.loc["prototype"].any(axis=None), "one alone is no best"
    assert not best_of(summarise(frame_of_runs(find_runs(study)[0]), "attack")).any(axis=None)


def rivals(root: Path, runs: dict[str, dict[str, tuple[float, ...]]], **other: Any) -> pd.DataFrame:
    """The frame of records, each with its defenses, each with the ASR of its seeds."""
    for seed, (record, defenses) in enumerate(runs.items()):
        write_record(root / record, "badnet", {
            f"{name}_{k}": {"method": name, "asr": asr, "seed": k}
            for name, asrs in defenses.items() for k, asr in enumerate(asrs)
        }, seed=seed, **other)  # fmt: skip
    return frame_of_runs(find_runs(root)[0])


def test_methods_are_ranked_on_the_records_that_they_share(tmp_path: Path) -> None:
    frame = rivals(tmp_path, {
        "a": {"ulrl": (0.5,), "ft": (0.3,)},
        "b": {"ulrl": (0.3, 0.1), "ft": (0.4,)},
        "c": {"ulrl": (0.0,), "clp": (0.0,)}, "d": {"ulrl": (0.0,)},
    })  # fmt: skip
    summary = summarise(frame, "defense").set_index("defense")
    assert summary.asr_mean.round(6).to_dict() == {"no defense": 0.99, "ulrl": 0.35, "ft": 0.35, "clp": 0.0}
    assert summary.asr_std["ulrl"] == pytest.approx(statistics.stdev([0.5, 0.2])), "over records, not over runs"
    assert summary.n.to_dict() == {"no defense": 2, "ulrl": 3, "ft": 2, "clp": 1}
    assert summary.ranked.to_dict() == {"no defense": False, "ulrl": True, "ft": True, "clp": False}
    assert not best_of(summary.reset_index())[~summary.ranked.to_numpy()].any(axis=None)
    told = notes_of(summary.reset_index())
    assert told[0] == "ranked on the 2 of 4 records that all 2 have; not ranked, on fewer than half of them: clp"


def test_who_was_given_a_list_of_samples_is_no_rival_of_who_was_given_a_ratio(tmp_path: Path) -> None:
    runs = {name: {"method": name, "asr": 0.2} for name in ("ulrl", "ft")}
    listed = {"method": "ft", "asr": 0.0, "clean_samples": 500}
    write_record(tmp_path / "a", "badnet", {
        **runs, **{f"listed_{r}": {**listed, "options": {"index": "mine.txt", "ratio": r}} for r in (0.01, 0.05)},
    })  # fmt: skip
    frame = frame_of_runs(find_runs(tmp_path)[0])
    assert [Path(run).name for run in frame.index[frame.repeat]] == ["listed_0.05"], "its ratio had no effect"
    summary = summarise(frame, "defense").set_index(["defense", "variant"])
    assert summary.ranked.to_dict() == {
        ("no defense", ""): False, ("ulrl", ""): True, ("ft", "ratio 0.01, index -"): True,
        ("ft", "ratio -, index mine.txt"): False,
    }  # fmt: skip
    best = best_of(summary.reset_index()).set_index(summary.index)
    assert set(best[best.asr].index) == {("ulrl", ""), ("ft", "ratio 0.01, index -")}, "a tie"


def test_nothing_is_ranked_without_a_record_that_all_have(tmp_path: Path) -> None:
    summary = summarise(rivals(tmp_path, {"a": {"ulrl": (0.5,)}, "b": {"ft": (0.4,)}}), "defense")
    assert not best_of(summary).any(axis=None)
    assert notes_of(summary)[0] == "not ranked: no record has all of ulrl, ft"


def test_a_seed_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "record"
    rivals(root, {"a": {"ulrl": (0.2, 0.4)}})
    write(root / "a" / "defense" / "plain", result(record="a", asr=0.2, options={"save_folder_name": "plain"}))
    write(root / "a" / "defense" / "longer", result(record="a", asr=0.6, options={"epochs": 5}))
    summary = summarise(frame_of_runs(find_runs(root)[0]), "attack,defense").set_index(["defense", "variant"])
    assert summary.n.to_dict() == {("no defense", ""): 1, ("ulrl", "epochs 5"): 1, ("ulrl", "epochs -"): 2}
    assert summary.asr_mean["ulrl", "epochs -"] == pytest.approx(0.3)
    printed = say(capsys, "results", str(root))
    assert "1 run repeats the options and the seed of another" in printed
    assert "ulrl (epochs 5)" in printed


def test_the_same_record_under_two_names_is_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_record(tmp_path / name, "badnet", {"ulrl": {"asr": 0.2}, "ft": {"method": "ft", "asr": 0.3}})
    frame = frame_of_runs(find_runs(tmp_path)[0])
    assert summarise(frame, "defense").n.tolist() == [1, 1, 1]
    assert summarise(select(frame, "record=b"), "defense").n.tolist() == [1, 1, 1], "alone it repeats none"


def test_folders_of_images_are_data_sets_of_their_own(tmp_path: Path) -> None:
    for name, asr in (("photos", 0.1), ("drawings", 0.5)):
        options = {"dataset": "folder", "dataset_path": name, "pratio": 0.1}
        write_record(tmp_path / name, "badnet", {"ulrl": {"asr": asr}}, dataset="folder", options=options)
    frame = frame_of_runs(find_runs(tmp_path)[0])
    assert not frame.repeat.any()
    lines = summarise(frame[frame.kind == "defense"], "dataset,model,attack,defense").set_index("record_variant")
    assert lines.asr_mean.to_dict() == {"dataset_path drawings": 0.5, "dataset_path photos": 0.1}


def test_other_options_of_records_are_other_lines_or_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for width, asr in ((16, 0.1), (64, 0.5)):
        options = {"width": width, "pratio": 0.1}
        write_record(tmp_path / f"w{width}", "badnet", {}, options=options)
        for seed in range(2):
            ran = result(record=f"w{width}", asr=asr, seed=seed, clean_samples=width)
            write(tmp_path / f"w{width}" / "defense" / f"ulrl_{seed}", ran)
    frame = frame_of_runs(find_runs(tmp_path)[0])
    lines = summarise(frame[frame.kind == "defense"], "dataset,model,attack,defense").set_index("record_variant")
    assert lines.asr_mean.to_dict() == {"width 16": pytest.approx(0.1), "width 64": pytest.approx(0.5)}
    assert lines.n.tolist() == [2, 2]
    assert "badnet (width 64)" in say(capsys, "results", str(tmp_path))
    told = say(capsys, "results", str(tmp_path), "--by", "defense")
    assert "lines average over runs that differ in width, clean_samples" in told


def test_a_line_says_what_sets_it_apart_on_its_own_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for dataset, epochs in (("digits", 5), ("digits", 9), ("mnist", 7)):
        options = {"epochs": epochs, "augment": epochs == 5, "picture": f"Mine/{epochs}.PNG"}
        write_record(
            tmp_path / f"{dataset}{epochs}", "badnet", {"ulrl": {"options": options}}, dataset=dataset, options=options
        )
    lines = summarise(frame_of_runs(find_runs(tmp_path)[0]), "dataset,model,attack,defense")
    ours = "augment true, epochs 5, picture Mine/5.PNG"
    assert set(lines.record_variant) == {ours, ours.replace("true", "false").replace("5", "9"), ""}
    assert set(lines.record_variant[lines.dataset == "mnist"]) == {""}
    assert set(lines.variant[lines.dataset == "mnist"]) == {""}
    pooled = summarise(frame_of_runs(find_runs(tmp_path)[0]), "defense")
    assert len(set(pooled.variant)) == 4, "no defense, and three that differ"


def test_a_backdoor_that_did_not_take_is_told_and_not_ranked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = {"ulrl": {"asr": 0.01}, "ft": {"method": "ft", "asr": 0.02}}
    write_record(tmp_path / "dud", "sig", both, took=False)
    write_record(tmp_path / "good", "badnet", both, took=True)
    write_record(tmp_path / "unknown", "wanet", both, took=None)
    frame = frame_of_runs(find_runs(tmp_path)[0])
    summary = summarise(frame, "defense")
    assert summary[~summary.failed].records.tolist() == [2, 2, 2]
    assert summary[summary.failed].records.tolist() == [1, 1, 1]
    assert not best_of(summary)[summary.failed].any(axis=None)
    assert best_of(summary).asr.sum() == 1
    printed = say(capsys, "results", str(tmp_path))
    assert printed.count("sig (did not take)") == 3
    assert "did not take, nothing is ranked" in printed


def test_a_backdoor_of_another_s_making_is_judged_by_the_figures_before(tmp_path: Path) -> None:
    """A record of BackdoorBench's has no `result.json` that says whether its backdoor took."""
    for record, asr in (("dud", 0.03), ("good", 0.9)):
        before = {"acc": 0.9, "asr": asr, "ra": 0.5}
        for method in ("ulrl", "ft"):
            ran = result(method=method, record=record, before=before, asr=asr / 9)
            write(tmp_path / record / "defense" / method, ran)
    summary = summarise(frame_of_runs(find_runs(tmp_path)[0]), "defense")
    assert summary[~summary.failed].asr_mean.tolist() == [pytest.approx(0.1)] * 2
    assert summary[summary.failed].records.tolist() == [1, 1]
    assert not summary[summary.failed].ranked.any()


def test_what_only_finds_is_not_ranked_among_repairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {"ulrl": {"asr": 0.5}, "ft": {"method": "ft", "asr": 0.6}}
    write_record(tmp_path / "a", "badnet", runs | {"b3d": {"method": "b3d", "asr": 0.4, "repairs": False}})
    frame = frame_of_runs(find_runs(tmp_path)[0])
    best = summarise(frame, "defense").set_index("defense")
    assert best.ranked.to_dict() == {"no defense": False, "ulrl": True, "ft": True, "b3d": False}
    assert summarise(frame, "attack").asr_mean.tolist() == [pytest.approx(0.55)]
    printed = say(capsys, "results", str(tmp_path))
    assert printed.count("b3d (finds only)") == 1
    assert "not ranked" not in printed


def test_what_was_run_on_is_not_called_a_finder_for_the_sake_of_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    finder = result(method="b3d", repairs=False)
    Console(width=120).print(comparison_table("one", [finder, result()], 0))
    rows = [line.split("  ")[0].strip() for line in capsys.readouterr().out.splitlines()]
    assert {"no defense", "b3d (finds only)", "ulrl"} <= set(rows)


@pytest.mark.parametrize("format", ["table", "csv", "markdown", "latex"])
def test_attacks_alone_have_no_mean_of_repairs(format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(tmp_path / "record" / "one", "badnet", {})
    also = ["--format", format, "--export", str(tmp_path / "all.csv")]
    with pytest.raises(SystemExit) as left:
        main(["results", str(tmp_path / "record"), "--by", "dataset", *also])
    said = capsys.readouterr()
    assert (left.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert "--by dataset" in said.err
    assert "add defense" in said.err
    assert not (tmp_path / "all.csv").exists()


def test_without_defense_only_defended_runs_are_averaged(study: Path) -> None:
    summary = summarise(frame_of_runs(find_runs(study)[0]), "attack").set_index("attack")
    assert summary.n.to_dict() == {"badnet": 5, "prototype": 1}


def test_a_record_is_called_as_its_folder_is(study: Path, tmp_path: Path) -> None:
    (study / "one").rename(study / "$(renamed)")
    runs = find_runs(study)[0]
    assert {"$(renamed)", "clean"} == set(frame_of_runs(runs).record)
    commands = [repeat_command(run) for run in runs if run.result["kind"] == "defense"]
    assert any("--result_file '$(renamed)'" in command for command in commands)
    assert not any("--result_file one" in command for command in commands)
    moved = shutil.copytree(study / "$(renamed)" / "defense" / "ulrl_2", tmp_path / "apart")
    assert [run.record_name for run in find_runs(moved)[0]] == ["one"], "it lies in no record"


def explained() -> set[str]:
    """The columns that the guide explains."""
    guide = (Path(__file__).parent.parent / "docs" / "guides" / "results.md").read_text(encoding="utf-8")
    return {word for line in guide.splitlines() if line.startswith("| `") for word in re.findall("`[a-z_]+`", line)}


def test_formats(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["results", str(study), "--where", "attack=badnet", "--by", "defense,ratio"]
    markdown = say(capsys, *where, "--format", "markdown").splitlines()
    assert markdown[0] == "| defense | ratio | ACC % | ASR % | RA % | DER % | s | n |"
    assert markdown[2].startswith("| no defense | - | 90.00 | 99.00 | 1.00 | - |")
    assert (
        "| ulrl | 0.01 | 91.00 ± 1.00 | **2.00 ± 2.00** | **80.00 ± 0.00** | **90.00 ± 0.00** | 2.0 ± 0.0 | 3 |"
        in markdown
    )
    assert any(line.startswith("| rnp (oracle) | 0.01 | 99.00 | 0.00 | 99.00 | - | - |") for line in markdown)
    latex = say(capsys, *where, "--format", "latex")
    assert r"ulrl & 0.01 & 91.00 $\pm$ 1.00 & \textbf{2.00 $\pm$ 2.00} &" in latex
    assert r"\toprule" in latex
    table = pd.read_csv(io.StringIO(say(capsys, *where, "--format", "csv"))).set_index("defense")
    assert table.acc_mean["ulrl"] == pytest.approx(0.91)
    assert {f"`{re.sub('^(asr|ra|der|seconds)_', 'acc_', column)}`" for column in table} <= explained()
    assert pd.isna(table.der_mean["no defense"])
    assert "91.00 ±1.00" in say(capsys, *where), "a file breaks no lines"


def test_eighty_columns_lose_no_column_and_break_no_number(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = in_order(summarise(frame_of_runs(find_runs(study)[0]), "attack,defense,ratio"))
    Console(width=80).print(summary_table(summary, "title"))
    printed = capsys.readouterr().out
    assert {"attack", "defense", "ratio", "ASR", "DER", "n", "prototype", "91.00", "±1.00", "90.00"} <= set(
        printed.split()
    )
    assert max(map(len, printed.splitlines())) <= 80


def test_each_data_set_has_its_own_table(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(study / "other", "badnet", {"ulrl": {}, "ft": {"method": "ft"}}, dataset="mnist")
    printed = say(capsys, "results", str(study))
    assert (printed.count("8 runs below"), printed.count("3 runs below")) == (1, 1)
    assert say(capsys, "results", str(study), "--by", "defense").count("runs below") == 1


def test_partly_known_figures_say_how_often() -> None:
    runs = [result(seed=0, asr=None, ra=None), result(seed=1, asr=0.5)]
    cells, _ = summary_cells(summarise(frame_of(runs), "defense"))
    assert cells["ASR %"].tolist() == ["50.00 (n 1)"]


@pytest.mark.parametrize("name", ["all.parquet", "all.csv"])
def test_export(name: str, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / name
    say(capsys, "results", str(study), "--export", str(path))
    frame = pd.read_parquet(path) if name.endswith("parquet") else pd.read_csv(path, index_col="folder")
    assert len(frame) == 9
    assert frame.acc[str(study / "one" / "defense" / "ulrl_2")] == 0.92
    assert json.loads(frame.options.iloc[0]) == {"pratio": 0.0}
    assert {f"`{column}`" for column in frame} <= explained()


@pytest.mark.parametrize("name", ["all.parquet", "all.csv"])
def test_export_of_a_folder_whose_name_is_no_utf_8(
    name: str, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (study / "one").rename(study / os.fsdecode(b"one\xff"))
    say(capsys, "results", str(study), "--export", str(tmp_path / name))
    frame = pd.read_parquet(tmp_path / name) if "parquet" in name else pd.read_csv(tmp_path / name, index_col="folder")
    assert frame.acc[f"{study / 'one'}\\udcff/defense/ulrl_2"] == 0.92


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--where", "atack=x"], ["--where", "atack", "attack"]),
        (["--where", "attack"], ["key=value"]),
        (["--where", "ratio=much"], ["ratio", "much"]),
        (["--where", "attack=sig"], ["no result.json", "attack=sig"]),
        (["--by", "defence"], ["--by", "defence", "defense"]),
        (["--format", "word"], ["word", "latex"]),
        (["--export", "x.xlsx"], ["--export", ".parquet"]),
    ],
)
def test_bad_requests_are_one_line(
    arguments: list[str], words: list[str], study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["results", str(study), *arguments])
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert said.count("\n") == 1
    assert all(word in said for word in words)


DAMAGES: list[Any] = [
    b"", b"{", b"[]", b'{"kind": "attack"}', b"\xff", b"[" * 100_000,
    *({"kind": k} for k in ("other", None)), {"method": 3}, {"seed": "0"}, {"seed": 2**70}, {"flagged": [0.5]},
    {"seconds": {"total": 1}}, {"seconds": {"total": "1", "judge": 0}}, {"der": 2.0}, {"der": True}, {"after": None},
    {"after": {"acc": 1.5, "asr": 0, "ra": 0}}, {"options": {"ratio": "much"}}, {"record": "half \ud800"},
    {"evidence": {"z": float("nan")}}, {"before": None}, {"oracle": {"acc": 1}}, {"took": "no"}, {"took": 1},
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: repr(d)[:40])
def test_a_damaged_file_is_named_and_left_out(damage: Any, study: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = study / "one" / "defense" / "ft" / "result.json"
    file.write_bytes(damage if isinstance(damage, bytes) else json.dumps({**result(), **damage}).encode())
    with caplog.at_level(logging.WARNING):
        runs, left_out = find_runs(study)
    assert len(runs) == 7
    assert str(file) in left_out[0]
    assert [r.getMessage().count(str(file)) for r in caplog.records] == [1]
    assert "\n" not in caplog.records[0].getMessage()


def test_a_number_beyond_floats_is_damage(study: Path) -> None:
    file = study / "one" / "defense" / "ft" / "result.json"
    file.write_text(file.read_text().replace("100.0", "1e999"))
    assert "1e999" in find_runs(study)[1][0]


def test_a_link_out_of_the_folder_is_not_followed(study: Path, tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", result())
    (study / "one" / "defense" / "link").symlink_to(outside)
    runs, left_out = find_runs(study)
    assert len(runs) == 8
    assert "link" in left_out[0]
    refused(lambda: find_runs(study / "nowhere"), "nowhere", "folder")


def test_a_result_outside_of_a_record_has_no_record_above_it(tmp_path: Path) -> None:
    write_record(tmp_path / "one", "badnet", {})
    write(tmp_path / "one" / "came" / "x", result())
    (run,) = find_runs(tmp_path / "one" / "came")[0]
    assert run.record == run.folder, "and no picture is taken from above the folder that was named"


def test_what_a_run_writes_of_a_path_that_is_no_utf_8_is_read_again(tmp_path: Path) -> None:
    write_json(tmp_path / "result.json", {"options": {"dataset_path": "a\udcff"}})
    assert read_json(tmp_path / "result.json") == {"options": {"dataset_path": "a\\udcff"}}


odd = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
share = st.none() | st.floats(0, 1)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(odd, odd, share, share, share, st.integers(0, 2**63 - 1)),
        min_size=1, max_size=4, unique_by=lambda row: row[-1],
    )
)  # fmt: skip
def test_any_names_and_values_can_be_shown(rows: list[tuple[Any, ...]]) -> None:
    results = [
        result(method=method, attack=attack, acc=acc, asr=asr, ra=asr, der=der, seed=seed)
        for method, attack, acc, asr, der, seed in rows
    ]
    summary = summarise(frame_of(results), "attack,defense,seed")
    assert summary.n.sum() == len(rows)
    markdown = summary_markdown(summary).split("\n\n")[0].splitlines()
    assert len(markdown) == 2 + len(summary), "no name breaks a line"
    assert summary_latex(summary).count(r"\\") >= len(summary)
    assert summary_table(summary, rows[0][0]).row_count == len(summary)
    known = {acc for _, _, acc, *_ in rows if acc is not None}
    if not known:
        assert set(summary_cells(summary)[0]["ACC %"]) == {"-"}


@pytest.mark.parametrize("name", ["ulrl", "ft", "npd"])
def test_the_command_to_repeat_a_run_has_its_options(name: str) -> None:
    defense, run = (
        DEFENSES[name](batch_size=7, random_seed=3),
        DefenseRun(ratio=0.05, random_seed=3, save_folder_name="a b; $c"),
    )
    options = json.loads(json.dumps(options_of(defense, run)))
    command = repeat_command(Run(Path("my record/defense/x"), result(method=name, options=options)))
    program, kind, method, *flags = shlex.split(command)
    assert (program, kind, method) == ("ulrl", "defense", name)
    schema = Schema(DefenseRun, type(defense))
    again = schema.merge(("flag", schema.flags(flags, "", "")))[0]
    assert again.build(type(defense)) == defense
    assert again.build(DefenseRun) == replace(run, result_file="my record")


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("badnet", {"dataset": "digits", "width": None}),
        ("tact", {"dataset": "digits", "cover_classes": (), "save_folder_name": "-a b"}),
        ("sig", {"dataset": "fashion_mnist", "p_num": 7}),
    ],
)
def test_the_command_to_repeat_an_attack_says_what_is_none(name: str, given: dict[str, Any], empty_home: Path) -> None:
    """Or an options file fills it in: the digits' has a width, TaCT's has classes of covers."""
    made = configure_attack(name, given, AttackRun, quiet=True)
    options = json.loads(json.dumps(options_of(*made)))
    command = repeat_command(Run(Path("one"), result("attack", method=name, options=options)))
    _, kind, method, *flags = shlex.split(command)
    assert (kind, method) == ("attack", name)
    assert configure_attack(name, attack_flags(name, flags, "AttackRun", ""), AttackRun, quiet=True) == made


def test_the_command_to_repeat_a_defense_says_what_is_none(empty_home: Path) -> None:
    own = empty_home / "config" / "defense" / "ulrl" / "digits.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("steplr_milestones: [3]\nindex: mine.txt\nlinear_name: head\n")
    given = {"steplr_milestones": (), "index": None, "linear_name": None}
    defense, run = configure_defense("ulrl", given, "digits", "preactresnet18", quiet=True)
    options = json.loads(json.dumps(options_of(defense, run)))
    _, _, _, *flags = shlex.split(repeat_command(Run(Path("one/defense/ulrl"), result(options=options))))
    again = Schema(DefenseRun, type(defense)).flags(flags, "", "")
    assert configure_defense("ulrl", again, "digits", "preactresnet18", quiet=True) == (
        defense, replace(run, result_file="one"),
    )  # fmt: skip
