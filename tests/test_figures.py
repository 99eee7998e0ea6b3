"""The figures that runs leave and that `ulrl plot` draws."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fabricated import result, write, write_record
from matplotlib.figure import Figure
from PIL import Image

from ulrl.cli import defense_main, main
from ulrl.report import plots
from ulrl.report.pictures import draw


def plot(*arguments: object) -> None:
    with pytest.raises(SystemExit) as left:
        main(["plot", *map(str, arguments)])
    assert left.value.code == 0


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """Two records, of which one's backdoor did not take, and four defenses."""
    write_record(tmp_path / "record" / "one", "badnet", {
        "ulrl": {"asr": 0.02}, "longer": {"asr": 0.01, "options": {"epochs": 9}}, "ft": {"method": "ft", "asr": 0.5},
        "stranger": {"method": "$_stranger", "asr": 0.4},
    })  # fmt: skip
    write_record(tmp_path / "record" / "two", "sig", {"ulrl": {"asr": 0.0}}, took=False)
    return tmp_path / "record"


def test_figures_of_all_runs(record: Path, tmp_path: Path) -> None:
    plot("asr-acc", record, "--out", tmp_path / "a.pdf")
    plot("heatmap", record, "--metric", "der", "--where", "attack=badnet", "--out", tmp_path / "b.svg")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    drawing = (tmp_path / "b.svg").read_text()
    assert "badnet" in drawing
    assert "DER %" in drawing
    assert "<image" not in drawing, "all of it scales"
    plot("heatmap", record, "--out", tmp_path / "c.svg")
    drawing = (tmp_path / "c.svg").read_text()
    assert all(text in drawing for text in ("sig (did not take)", "ulrl (epochs 9)", "ulrl (epochs -)", "$_stranger"))


@pytest.mark.parametrize(("figure", "where"), [("asr-acc", "attack=sig"), ("heatmap", "defense=ulrl (oracle)")])
def test_nothing_to_draw_is_one_line(
    figure: str, where: str, record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(record / "one" / "defense" / "wise", result(oracle={"acc": 1.0, "asr": 0.0, "ra": 1.0}))
    with pytest.raises(SystemExit) as left:
        main(["plot", figure, str(record), "--where", where, "--out", str(tmp_path / "none.pdf")])
    assert left.value.code == 2
    assert "no run to draw" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "none.pdf").exists()


def pdf_size(path: Path) -> tuple[float, float]:
    found = re.search(rb"/MediaBox \[ *0 0 ([\d.]+) ([\d.]+) *\]", path.read_bytes())
    assert found
    return float(found[1]), float(found[2])


def font_sizes(path: Path) -> set[float]:
    """In points: Matplotlib's SVG has 72 of them to the inch, and calls them px."""
    return {float(size) for size in re.findall(r"font(?:-size)?: *([\d.]+)px", path.read_text())}


@pytest.mark.parametrize("figure", ["asr-acc", "heatmap", "ranking"])
def test_a_figure_for_a_column_of_a_paper(figure: str, record: Path, tmp_path: Path) -> None:
    folder = record / "one" / "defense" / "ulrl"
    content = result(record="one", target=5, evidence={"z_threshold": 3.5})
    write(record / "one" / "defense" / "ranked", content)
    rows = [f"{k},{20 - k},{abs(10 - k)},{k == 0}" for k in range(20)]
    (record / "one" / "defense" / "ranked" / "neurons.csv").write_text("\n".join(["class,change,z,flagged", *rows]))
    root = folder.with_name("ranked") if figure == "ranking" else record
    for ending in ("pdf", "svg"):
        plot(figure, root, "--style", "paper", "--out", tmp_path / f"a.{ending}")
    assert pdf_size(tmp_path / "a.pdf")[0] == pytest.approx(3.3 * 72, abs=0.5)
    assert b"/FontFile2" in (tmp_path / "a.pdf").read_bytes(), "the fonts go with it, as outlines"
    assert min(font_sizes(tmp_path / "a.svg")) >= 7
    plot(figure, root, "--out", tmp_path / "screen.svg")
    title = "Change of each class"
    assert title not in (tmp_path / "a.svg").read_text()
    assert (title in (tmp_path / "screen.svg").read_text()) == (figure == "ranking")


@pytest.mark.parametrize("style", ["screen", "paper"])
def test_names_of_any_length_stand_beside_the_heat_map(
    style: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for k in range(2):
        long = {f"an_option_of_some_length_{i}": f"/some/where/{i + k}" for i in range(9)}
        write_record(tmp_path / "record" / f"r{k}", "badnet", {f"d{k}": {"options": long}}, took=bool(k), options=long)
    drawn: list[Figure] = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, *rest: (drawn.append(figure), save(figure, *rest)))
    plot("heatmap", tmp_path / "record", "--style", style, "--out", tmp_path / "a.png")
    drawn[0].draw_without_rendering()  # at the resolution that is measured with
    page, ax = drawn[0].bbox, drawn[0].axes[0]
    labels = [*ax.get_xticklabels(), *ax.get_yticklabels()]
    for label in labels:
        box = label.get_window_extent()
        assert page.x0 <= box.x0 < box.x1 <= page.x1, label.get_text()
        assert page.y0 <= box.y0 < box.y1 <= page.y1, label.get_text()
    assert ax.bbox.width > page.width / 5
    assert any(label.get_text().split()[-2:] == ["not", "take)"] for label in labels), "the middle is left out"

    write_record(tmp_path / "record" / "wide", "W" * 99, {"W" * 99: {"method": "W" * 99}})
    plot("heatmap", tmp_path / "record", "--style", style, "--out", tmp_path / "b.png")
    assert "Warning" not in capsys.readouterr().err


def test_ranking_marks_the_true_target_wherever_it_is(tmp_path: Path) -> None:
    change = np.linspace(20, 0, 60)
    neurons = pd.DataFrame({"change": change, "z": np.abs(change - 10), "flagged": change > 15})
    for target, said in ((2, True), (57, True), (None, False)):
        plots.neuron_ranking(tmp_path / "a.svg", neurons, {"z": 3.5}, (), target, format="svg")
        drawing = (tmp_path / "a.svg").read_text()
        assert ("true target" in drawing) == said
        assert (">57<" in drawing) == (target == 57), "also where its z is not among the highest"
        assert "excess" not in drawing
    more, bounds = neurons.assign(excess=0.1, evidence=2.0), {"evidence": 4, "excess": 0.08}
    plots.neuron_ranking(tmp_path / "a.svg", more, bounds, (), 2, format="svg")
    drawing = (tmp_path / "a.svg").read_text()
    for words in ("excess", "evidence", "threshold 4", "threshold 0.08"):
        assert f">{words}<" in drawing
    assert "threshold 3.5" not in drawing, "where z flags nobody it has none"
    plots.neuron_ranking(tmp_path / "a.svg", neurons, {"z": 3.5}, ("shirt", "shoe"), 2, format="svg")
    drawing = (tmp_path / "a.svg").read_text()
    assert ">1 shoe<" in drawing
    assert ">2<" in drawing, "a stranger's table may have more classes than the data set"


@pytest.mark.parametrize(("channels", "took", "words"), [
    (1, True, "badnet on digits, ASR 99.0 %"), (3, False, "badnet on digits, ASR 99.0 %: the backdoor did not take"),
])  # fmt: skip
def test_an_attack_leaves_its_trigger_with_attack_and_asr(
    channels: int, took: bool, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "one", result("attack", asr=0.99, took=took))
    clean = np.zeros((8, channels, 8, 8), np.uint8)
    poisoned = clean.copy()
    poisoned[:, :, 6:, 6:] = 120
    np.savez(folder / "trigger_samples.npz", clean=clean, poisoned=poisoned, titles=np.array(["3 → 0"] * 8))
    drawn = []
    save = plots._save
    monkeypatch.setattr(
        plots, "_save", lambda figure, *rest: (drawn.append(figure.get_suptitle()), save(figure, *rest))
    )
    draw(folder)
    assert drawn == [words]
    assert Image.open(folder / "trigger_preview.png").width > 700
    small = np.asarray(Image.open(folder / "trigger_thumbnail.png"))
    assert small.shape == (64, 3 * 64 + 2 * 8, 3), "clean, triggered and their difference"
    assert small[:, :64].max() == 0
    assert small[60, 72 + 60].tolist() == [120] * 3
    assert small[60, 144 + 60].tolist() == [255] * 3


def test_classes_of_any_name_stand_over_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's folders name them: banknotes, or letters of another encoding, of which Matplotlib makes an error."""
    drawn = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (drawn.extend(figure.axes[:2]), save(figure, path)))
    images, titles = np.zeros((2, 3, 8, 8), np.uint8), ["$5 → $10", "caf\udce9\n→ tea"]
    plots.trigger_preview(tmp_path / "a.png", images, images, titles, "badnet on folder")
    assert [ax.get_title() for ax in drawn] == [r"\$5 → \$10", "caf\\udce9\n→ tea"]


def test_shares_stand_on_axes_in_percent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, *_: figures.append(figure))
    history = pd.DataFrame({"stage": "train", "epoch": [1, 2], "test_acc": [0.5, 0.9], "test_asr": [1.0, 0.1]})
    shares = {"acc": 0.9, "asr": 0.25, "ra": None}
    plots.acc_asr(tmp_path / "a.png", history, shares, shares)
    bars, course = figures[0].axes
    assert [text.get_text() for text in bars.texts] == ["90.0", "25.0"] * 2
    assert "%" in bars.get_ylabel()
    assert "%" in course.get_ylabel()
    assert max(course.lines[0].get_ydata()) == 90


def test_figures_of_one_defense(tiny_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        defense_main("ulrl", ["--result_file", "tiny", "--relearn_epochs", "1", "--device", "cpu"])
    folder = tiny_home / "record" / "tiny" / "defense" / "ulrl"
    plot("ranking", folder, "--out", tmp_path / "c.png")
    assert Image.open(tmp_path / "c.png").width > 300
    plot("tsne", folder, "--out", tmp_path / "d.svg", "--samples", "40", "--device", "cpu")
    drawing = (tmp_path / "d.svg").read_text()
    assert all(word in drawing for word in ("before", "after", "triggered"))
    capsys.readouterr()
    (folder / "defense_result.pt").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    for arguments, words in (
        (["tsne", folder, "--out", "d.pdf"], ["defense_result.pt"]),
        (["tsne", folder.parent, "--out", "d.pdf"], ["not a defense's folder"]),
        (["ranking", folder.parent, "--out", "d.pdf"], ["ranks neurons"]),
        (["tnse", folder, "--out", "d.pdf"], ["tsne"]),
        (["tsne", folder, "--out", "d.docx"], [".pdf"]),
    ):
        with pytest.raises(SystemExit) as left:
            main(["plot", *map(str, arguments)])
        said = capsys.readouterr().err
        assert left.value.code == 2, said
        assert all(word in said for word in words), said
        assert not Path("d.pdf").exists()


def test_settings_that_lie_in_the_current_folder_are_not_followed(record: Path) -> None:
    """It may be a stranger's record, and such settings can have LaTeX run."""
    (record / "matplotlibrc").write_text("text.usetex: True\n\x1b[2J: 3\n")
    argv = [sys.executable, "-m", "ulrl", "plot", "asr-acc", str(record), "--out", "a.png"]
    drawn = subprocess.run(argv, cwd=record, capture_output=True, text=True)
    assert (drawn.returncode, drawn.stdout) == (0, "a.png\n"), drawn.stderr
    assert "matplotlibrc" not in drawn.stderr
