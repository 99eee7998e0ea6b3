"""The report in a real browser, and the figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fabricated import write, write_record
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from ulrl.cli import defense_main, main

FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --window-size=1200,900""".split()
HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>{{7*7}}"


class Browser:
    """Headless Chromium with a page of ours in it."""

    def __init__(self, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))

    def open(self, page: Path) -> None:
        self.driver.get(page.as_uri())
        self.wait(lambda: self.all("#scatter [role=link]"))

    def wait(self, condition: Callable[[], object]) -> None:
        WebDriverWait(self.driver, 60, 0.05).until(lambda _: condition())

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        return [str(element.get_property("textContent")) for element in self.all(selector)]

    def click(self, selector: str) -> None:
        self.driver.execute_script("document.querySelector(arguments[0]).click()", selector)

    def choose(self, name: str, value: str) -> None:
        self.driver.execute_script(
            "const s = document.querySelector(`select[name=${arguments[0]}]`);"
            "s.value = arguments[1]; s.dispatchEvent(new Event('change'))", name, value,
        )  # fmt: skip

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    for program in ("chromium", "chromedriver"):
        assert Path("/usr/bin", program).exists(), "install Debian's chromium and chromium-driver, as .ci/run does"
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.driver.quit()


def report(record: Path, page: Path) -> Path:
    with pytest.raises(SystemExit) as left:
        main(["report", str(record), "--out", str(page)])
    assert left.value.code == 0
    return page


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    record = write_record(root / "record" / "one", "badnet", {
        "ulrl_0": {"acc": 0.9, "asr": 0.02, "ra": 0.85}, "ulrl_1": {"seed": 1, "acc": 0.92, "asr": 0.0, "ra": 0.75},
        "ft": {"method": "ft", "acc": 0.94, "asr": 0.5, "ra": 0.3, "der": 0.7, "environment": {"device": HOSTILE},
               "options": {"note": HOSTILE}},
        "rnp": {"method": "rnp", "acc": 0.8, "asr": 0.4, "ra": 0.2, "der": 0.6,
                "oracle": {"acc": 0.99, "asr": 0.01, "ra": 0.9, "rule": "lowest test ASR"}},
    })  # fmt: skip
    folder = record / "defense" / "ulrl_0"
    (folder / "neurons.csv").write_text("class,change,z,flagged\n0,9.5,8.0,True\n1,1.0,0.5,False\n2,0.5,0.4,False\n")
    (folder / "ulrl_df.csv").write_text("stage,epoch,loss,acc,test_asr\nunlearn,1,3,0.1,1\nrelearn,1,0.5,0.8,0.1\n")
    write_record(root / "record" / "two", HOSTILE, {"ulrl": {"dataset": HOSTILE, "record": HOSTILE}})
    write(root / "record" / "broken", {"kind": "attack"})
    return report(root / "record", root / "report.html")


def lines(browser: Browser) -> dict[str, list[str]]:
    rows = [[cell.text for cell in row.find_elements(By.XPATH, "./*")] for row in browser.all("#board tbody tr")]
    return {row[0].replace("\n", " "): row[1:] for row in rows}


def test_leaderboard_shows_means_sorts_and_filters(browser: Browser, page: Path) -> None:
    browser.open(page)
    table = lines(browser)
    assert list(table)[:2] == ["ulrl", "ft"], "by DER"
    browser.choose("attack", "badnet")
    table = lines(browser)
    assert table["ulrl"][:5] == ["91.00 ± 1.41", "1.00 ± 1.41", "80.00 ± 7.07", "90.00 ± 0.00", "2.0 ± 0.0"]
    assert table["rnpORACLE"][:4] == ["99.00", "1.00", "90.00", "–"]
    assert browser.texts("#board b") == ["1.00", "80.00", "90.00", "94.00"], "the oracle competes for nothing"
    header = browser.all("#board th button")[1]
    header.send_keys(Keys.ENTER)
    assert browser.all("#board th")[1].get_attribute("aria-sort") == "descending"
    assert next(iter(lines(browser))) == "rnpORACLE"
    assert browser.driver.switch_to.active_element.text.startswith("ACC")
    browser.driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert next(iter(lines(browser))) == "rnp"
    browser.choose("defense", "ft")
    assert list(lines(browser)) == ["ft"]
    assert browser.texts("#count") == ["1 of 7 runs"]
    assert len(browser.all(".run")) == 1
    browser.choose("dataset", HOSTILE)
    assert "No run passes" in browser.texts("#board-note")[0]
    assert [e.get_attribute("id") for e in browser.all("section") if e.is_displayed()] == ["leaderboard"]
    browser.choose("dataset", "")
    assert browser.complaints() == []


def test_a_point_leads_to_its_run(browser: Browser, page: Path) -> None:
    browser.driver.get("about:blank")
    browser.open(page)
    assert len(browser.all("#scatter [role=link]")) == 7
    found = [e for e in browser.all("#scatter [role=link]") if "seed 0" in str(e.get_attribute("aria-label"))
             and "ulrl on badnet" in str(e.get_attribute("aria-label"))]  # fmt: skip
    browser.driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", found[0])
    found[0].click()
    browser.wait(lambda: browser.all(".run[open] svg"))
    section = browser.all(".run[open]")[0]
    assert "one/defense/ulrl_0" in section.text
    assert section.get_attribute("id") in browser.driver.current_url
    for word in ("RESULT", "TRIGGER", "NEURON RANKING", "CURVES", "OPTIONS", "ENVIRONMENT", "TO REPEAT IT"):
        assert word in section.text
    assert "ulrl defense ulrl --ratio 0.01 --result_file one" in section.text
    assert "test ASR" in section.text
    picture = section.find_element(By.TAG_NAME, "img")
    assert browser.driver.execute_script("return arguments[0].naturalWidth", picture) == 120
    assert "trigger" in str(picture.get_attribute("alt"))
    first = browser.all("#scatter [role=link][tabindex='0']")[0]
    first.send_keys(Keys.ARROW_LEFT)  # the last one
    label = str(browser.driver.switch_to.active_element.get_attribute("aria-label"))
    browser.driver.switch_to.active_element.send_keys(Keys.ENTER)
    browser.wait(lambda: len(browser.all(".run[open]")) == 2)
    assert "ACC" in label
    assert browser.complaints() == []


def test_heat_map_leads_to_runs_and_labels_what_is_missing(browser: Browser, page: Path) -> None:
    browser.driver.get("about:blank")
    browser.open(page)
    cell = browser.all('#heat button[aria-label^="ulrl on badnet"]')[0]
    assert cell.text.split() == ["1.0", "RA", "80.0"]
    assert browser.all("#heat td.none")
    assert {cell.text for cell in browser.all("#heat td.none")} == {"–"}
    browser.click('#metric [data-value="der"]')
    assert browser.all('#heat button[aria-label^="ulrl on badnet: DER 90.00"]')
    browser.click('#heat button[aria-label^="ulrl on badnet"]')
    assert {link.split("/")[-1] for link in browser.texts("#board th a")} == {"ulrl_0", "ulrl_1"}
    assert browser.complaints() == []


def test_hostile_names_are_text(browser: Browser, page: Path) -> None:
    browser.driver.get("about:blank")
    browser.open(page)
    browser.choose("dataset", HOSTILE)
    assert browser.texts("#heat tbody th") == [HOSTILE]
    browser.choose("dataset", "")
    for name in ("two/defense/ulrl", "one/defense/ft"):
        found = next(e for e in browser.all(".run") if name in str(e.get_property("textContent")))
        browser.driver.execute_script("location.hash = arguments[0].id", found)
        browser.wait(lambda found=found: HOSTILE in str(found.get_property("textContent")))  # type: ignore[misc]
    assert not browser.all("img[src=x]")
    assert "broken" in browser.texts(".notice")[0]
    assert "49" not in browser.texts("#heat tbody th")[0]
    assert browser.complaints() == [], "and nothing was tried"
    source = page.read_text(encoding="utf-8")
    assert "<img src=x" not in source
    assert "script>alert" not in source


def test_two_thousand_runs_open_in_three_seconds(browser: Browser, tmp_path: Path) -> None:
    methods = [f"defense{i}" for i in range(9)]
    for r in range(200):
        write_record(tmp_path / "record" / f"r{r}", f"attack{r % 12}", {
            m: {"method": m, "acc": 0.8 + (r * 7 + i) % 100 / 600, "asr": (r * 13 + i * 29) % 101 / 100}
            for i, m in enumerate(methods)
        }, dataset=f"data{r % 3}")  # fmt: skip
    page = report(tmp_path / "record", tmp_path / "report.html")
    browser.driver.get("about:blank")
    # The time that the page's thread computed, so that others who keep the machine busy do not count.
    browser.driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    browser.open(page)
    metrics = browser.driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    assert 0 < {m["name"]: m["value"] for m in metrics}["TaskDuration"] < 3
    assert browser.texts("#count") == ["2000 of 2000 runs"]
    browser.click('#per [data-value="run"]')
    assert len(browser.all("#board tbody tr")) == 150
    browser.click("#board-note button")
    assert len(browser.all("#board tbody tr")) == 2000
    assert browser.complaints() == []


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_screen(width: int, browser: Browser, page: Path) -> None:
    size = {"width": width, "height": 740, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        browser.open(page)
        assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def plot(*arguments: object) -> None:
    with pytest.raises(SystemExit) as left:
        main(["plot", *map(str, arguments)])
    assert left.value.code == 0


def test_figures_of_all_runs(page: Path, tmp_path: Path) -> None:
    record = page.parent / "record"
    plot("asr-acc", record, "--out", tmp_path / "a.pdf")
    plot("heatmap", record, "--metric", "der", "--where", "attack=badnet", "--out", tmp_path / "b.svg")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    drawing = (tmp_path / "b.svg").read_text()
    assert "badnet" in drawing
    assert "DER %" in drawing
    assert "<image" not in drawing, "all of it scales"


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


def test_nothing_to_report_is_one_line(empty_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (empty_home / "record").mkdir()
    with pytest.raises(SystemExit) as left:
        main(["report"])
    assert left.value.code == 2
    assert "no result.json" in capsys.readouterr().err
    assert not Path("report.html").exists()
