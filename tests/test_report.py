"""The report in a real browser."""

from __future__ import annotations

import base64
import itertools
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fabricated import result, write, write_record
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from ulrl.cli import main
from ulrl.report.frame import FIGURES, frame_of_runs, select
from ulrl.report.looks import looks_of
from ulrl.report.pooling import best_of, summarise
from ulrl.report.results import find_runs

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
        self.wait(lambda: self.all("#board tbody tr"))

    def wait(self, condition: Callable[[], object]) -> None:
        WebDriverWait(self.driver, 60, 0.05).until(lambda _: condition())

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        return [str(element.get_property("textContent")) for element in self.all(selector)]

    def click(self, selector: str) -> None:
        self.driver.execute_script("document.querySelector(arguments[0]).click()", selector)

    def start(self, page: Path) -> None:
        """As if for the first time."""
        self.driver.get("about:blank")
        self.open(page)

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(f"return {script}", *arguments)

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
        "ulrl_0": {"acc": 0.9, "asr": 0.02, "ra": 0.85, "target": 0},
        "ulrl_1": {"seed": 1, "acc": 0.92, "asr": 0.0, "ra": 0.75},
        "ft": {"method": "ft", "acc": 0.94, "asr": 0.5, "ra": 0.3, "der": 0.7, "environment": {"device": HOSTILE},
               "options": {"note": HOSTILE}},
        "rnp": {"method": "rnp", "acc": 0.8, "asr": 0.4, "ra": 0.2, "der": 0.6,
                "oracle": {"acc": 0.99, "asr": 0.01, "ra": 0.9, "rule": "lowest test ASR"}},
    })  # fmt: skip
    folder = record / "defense" / "ulrl_0"
    Image.new("RGB", (64, 20), (10, 200, 30)).save(record / "trigger_thumbnail.png")
    ranked = ("class,change,z,evidence,flagged", "0,9.5,8.0,9.0,True", "1,1.0,0.5,1.5,False", "2,0.5,0.4,1.0,False")
    (folder / "neurons.csv").write_text("\n".join(ranked))
    (folder / "ulrl_df.csv").write_text("stage,epoch,loss,acc,test_asr\nunlearn,1,3,0.1,1\nrelearn,1,0.5,0.8,0.1\n")
    write_record(root / "record" / "two", HOSTILE, {"ulrl": {"record": HOSTILE}}, dataset=HOSTILE)
    write(root / "record" / "broken", {"kind": "attack"})
    return report(root / "record", root / "report.html")


def lines(browser: Browser) -> dict[str, list[str]]:
    """Each line's cells by its name, without the chart."""
    rows = browser.run(
        "[...document.querySelectorAll('#board tbody tr')].map((row) =>"
        "[...row.children].filter((cell) => !cell.matches('.chart')).map((cell) => cell.innerText.trim()))"
    )
    return {row[0].replace("\n", " "): row[1:] for row in rows}


def test_leaderboard_shows_means_sorts_and_filters(browser: Browser, page: Path) -> None:
    browser.open(page)
    table = lines(browser)
    assert list(table)[:2] == ["ulrl", "ft"], "by DER"
    browser.choose("attack", "badnet")
    table = lines(browser)
    assert [cell.split("\n")[0] for cell in table["ulrl"]] == ["91.00", "1.00", "80.00", "90.00", "2.0", "2"]
    assert table["ulrl"][1] == "1.00\n0.0–13.7", "a t-interval over two runs, cut at 0"
    assert table["rnpORACLE"][:4] == ["99.00", "1.00", "90.00", "–"]
    assert browser.texts("#board b") == ["1.00", "80.00", "90.00", "94.00"], "the oracle competes for nothing"
    header = browser.all("#board th button")[1]
    header.send_keys(Keys.ENTER)
    assert browser.all("#board th")[2].get_attribute("aria-sort") == "descending"
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


def test_headline_and_ranking_are_of_the_shared_records(browser: Browser, tmp_path: Path) -> None:
    root, asrs = tmp_path / "record", {"a": 0.1, "b": 0.3, "c": 0.2, "d": 0.0}
    for seed, (name, asr) in enumerate(asrs.items()):
        runs = {"ulrl": {"asr": asr}, "ft": {"method": "ft", "asr": asr + 0.1, "ra": 0.9}}
        if name == "c":  # the plain run repeats a seed; the others weigh no more than any record's one
            runs |= {f"ulrl_{k}": {"seed": k, "asr": asr + 0.06 * k - 0.06} for k in range(3)}
            runs["ulrl"]["asr"] = asr - 0.06
        write_record(
            root / name, f"attack{seed}", {k: v for k, v in runs.items() if name != "d" or k == "ulrl"}, seed=seed
        )
    write_record(root / "rare", "attack9", {"clp": {"method": "clp", "asr": 0.0}}, seed=9)
    write_record(root / "dud", "sig", {"ulrl": {"asr": 0.0}, "ft": {"method": "ft", "asr": 0.0}}, seed=10, took=False)
    finder = {"method": "b3d", "asr": 0.0, "repairs": False, "record": "a", "attack": "attack0"}
    write(root / "a" / "defense" / "b3d", result(**finder))
    browser.start(report(root, tmp_path / "report.html"))
    said, note = browser.texts("#headline")[0], browser.texts("#board-note")[0]
    assert "On 3 shared records, ulrl leaves the lowest ASR (20.0 %, 5 runs)" in said
    assert "ft keeps the highest RA (90.0 %" in said
    assert "ft is next, 10.0 points behind (95 % interval, paired by record: 10.0 to 10.0)." in said
    assert "Ranked on the 3 of 5 records that all 2 have. Not ranked, on fewer than half of them: clp." in note
    assert "did not take: dud" in note
    assert "1 run with the options and the seed of another counts once" in note
    frame = frame_of_runs(find_runs(root)[0])
    summary = summarise(frame, "defense")
    table = lines(browser)
    for name in ("ulrl", "ft"):
        line = summary[(summary.defense == name) & ~summary.failed].iloc[0]
        acc, asr, *_, runs, records = (cell.split("\n")[0] for cell in table[name])
        assert (acc, asr) == (f"{100 * line.acc_mean:.2f}", f"{100 * line.asr_mean:.2f}"), "as `ulrl results` says"
        assert (runs, records) == (str(line.n), str(line.records))
    assert "b3dFINDS ONLY" in table, "not ranked, not missing"
    assert browser.texts("#record-list .record")[0].endswith("2 repairs")
    assert [e for e in browser.texts("#heat tbody th") if "did not take" in e] == ["sigdid not take"]
    browser.click("input[name=duds]")
    assert "On 4 shared records" in browser.texts("#headline")[0]
    assert browser.complaints() == []


LINES = """[...document.querySelectorAll("#board tbody tr")].map((row) => [
    row.querySelector("button").getAttribute("aria-label").replace(/^\\d+ runs? of | \\(epochs.*/g, ""),
    row.classList.contains("apart"),
    ...[...row.querySelectorAll(".number")].map((e) => e.innerText.split("\\n")[0] + (e.querySelector("b") ? "!" : "")),
])"""


@pytest.mark.parametrize("seed", [1, 7])  # in 7 there are lines with half of the records, which is enough
def test_the_page_ranks_as_the_tables_do(seed: int, browser: Browser, tmp_path: Path) -> None:
    """The rule is written twice, as the page filters where there is no Python; here both are given the same runs."""
    rng, root = random.Random(seed), tmp_path / "record"
    kinds: dict[str, dict[str, Any]] = {
        "ulrl": {}, "slow": {"options": {"epochs": 5}}, "ft": {"method": "ft"}, "fp": {"method": "fp"},
        "clp": {"method": "clp", "options": {"ratio": 0.05}}, "nc": {"method": "nc", "options": {"ratio": 0.05}},
        "rnp": {"method": "rnp", "oracle": {"acc": 0.9, "asr": 0.01, "ra": 0.8}},
        "b3d": {"method": "b3d", "repairs": False},
    }  # fmt: skip
    for record in range(9):
        runs: dict[str, dict[str, Any]] = {}
        for name, k in itertools.product(kinds, range(3)):
            if rng.random() < (0.2 if name == "fp" else 0.6):
                figures = {"acc": rng.random(), "asr": rng.random(), "ra": rng.choice([0.5, None]), "der": rng.random()}
                runs[f"{name}_{k}"] = kinds[name] | figures | {"seed": rng.choice([0, k])}
        about = {"dataset": rng.choice(["a", "b"]), "seed": record, "took": rng.random() < 0.8}
        write_record(root / str(record), rng.choice(["badnet", "sig"]), runs, **about)
    browser.start(report(root, tmp_path / "report.html"))
    frame = frame_of_runs(find_runs(root)[0])
    for duds, where in itertools.product((False, True), ("", "attack=sig", "dataset=a", "attack=badnet,dataset=b")):
        if duds and not where:
            browser.click("input[name=duds]")
            frame["took"] = True
        browser.click("#filters button")
        for condition in filter(None, where.split(",")):
            browser.choose(*condition.split("="))
        summary = summarise(select(frame, where), "defense")
        assert summary.ranked.any()
        best, counts = best_of(summary).assign(seconds=False), ["n", "records"] if summary.records.max() > 1 else ["n"]
        expected = []
        for i, line in summary.iterrows():
            means = {key: line[f"{key}_mean"] * (1 if key == "seconds" else 100) for key in FIGURES}
            texts = {k: "–" if v != v else f"{v:.1f}" if k == "seconds" else f"{v:.2f}" for k, v in means.items()}
            figures = [texts[key] + "!" * int(best.loc[i, key]) for key in FIGURES]
            expected.append([line.defense, not line.ranked, *figures, *map(str, line[counts])])
        assert sorted(browser.run(LINES)) == sorted(expected), where
    assert browser.complaints() == []


def test_a_backdoor_that_did_not_take_is_averaged_with_none_that_did(browser: Browser, tmp_path: Path) -> None:
    for seed, (asr, took) in enumerate(((0.0, False), (0.4, True), (0.6, True))):
        write_record(tmp_path / "record" / f"r{seed}", "badnet", {"ulrl": {"asr": asr}}, seed=seed, took=took)
    browser.start(report(tmp_path / "record", tmp_path / "report.html"))
    assert browser.texts("#heat tbody th") == ["badnet", "badnetdid not take"]
    assert [text[:4] for text in browser.texts('#heat a[aria-label^="ulrl on badnet"]')] == ["50.0", "0.08"]
    assert browser.texts("#panels figcaption") == ["badnet", "badnetdid not take"]
    points = [str(e.get_attribute("aria-label")) for e in browser.all("#panels a[data-method=ulrl]")]
    assert [label.split(", ")[1] for label in points] == ["ASR 50.00 %", "ASR 0.00 %"]
    assert browser.complaints() == []


def test_headline_names_all_that_are_level(browser: Browser, tmp_path: Path) -> None:
    for seed in range(2):
        runs = {
            "ulrl": {"asr": 0.0, "ra": 0.9},
            "ft": {"method": "ft", "asr": 0.0},
            "clp": {"method": "clp", "asr": 0.3},
        }
        write_record(tmp_path / "record" / f"r{seed}", "badnet", runs, seed=seed)
    browser.start(report(tmp_path / "record", tmp_path / "report.html"))
    said = browser.texts("#headline")[0]
    assert "ft and ulrl share the lowest ASR (0.0 %); ulrl keeps the highest RA (90.0 %, 2 runs)" in said
    assert "behind" not in said
    assert browser.complaints() == []


def test_intervals_are_those_of_student(browser: Browser, page: Path) -> None:
    from scipy.stats import t

    browser.start(page)
    source = browser.run("[...document.scripts].map((s) => s.textContent).find((s) => s.includes('halfInterval'))")
    start, end = source.index("const T = "), source.index("// Seeds are averaged")
    for n in (2, 3, 8, 31, 32, 40, 200):
        values = [((7 * i) % 11) / 11 for i in range(n)]
        mean = sum(values) / n
        deviation = (sum((v - mean) ** 2 for v in values) / (n - 1)) ** 0.5
        half = browser.driver.execute_script(
            f"{source[source.index('const mean') :][:0]}{source[start:end]} return halfInterval(arguments[0])", values
        )
        assert half == pytest.approx(t.ppf(0.975, n - 1) * deviation / n**0.5, rel=2e-3)


def test_a_point_leads_to_its_run(browser: Browser, page: Path) -> None:
    browser.start(page)
    assert len(browser.all("#panels .panel")) == 2
    label = {str(e.get_attribute("aria-label")): e for e in browser.all("#panels a")}
    assert len(label) == 6, "three defenses and none on one record, one and none on the other"
    point = next(e for name, e in label.items() if name.startswith("ft on badnet: ACC 94.00 %, ASR 50.00 %"))
    browser.driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", point)
    point.send_keys(Keys.ENTER)
    browser.wait(lambda: browser.all(".run[open]"))
    assert "one/defense/ft" in browser.all(".run[open]")[0].text
    several = next(e for name, e in label.items() if name.startswith("ulrl on badnet"))
    several.send_keys(Keys.ENTER)
    browser.wait(lambda: browser.all("#panels-runs a"))
    found = browser.all("#panels-runs a")
    assert [link.text for link in found] == ["one/defense/ulrl_0", "one/defense/ulrl_1"]
    found[0].send_keys(Keys.ENTER)
    browser.wait(lambda: browser.all(".run[open] .plot svg"))
    section = next(e for e in browser.all(".run[open]") if "ulrl_0" in e.text)
    assert section.get_attribute("id") in browser.driver.current_url
    for word in ("RESULT", "TRIGGER", "NEURON RANKING", "CURVES", "OPTIONS", "ENVIRONMENT", "TO REPEAT IT"):
        assert word in section.text
    assert "ulrl defense ulrl --ratio 0.01 --index none --result_file one" in section.text
    assert "test ASR" in section.text
    assert section.text.count("0, true target") == 2, "a panel for each sign, z and the evidence"
    picture = section.find_element(By.TAG_NAME, "img")
    assert browser.run("arguments[0].naturalWidth", picture) == 120
    assert "trigger" in str(picture.get_attribute("alt"))
    assert browser.complaints() == []


def test_one_look_per_method(browser: Browser, page: Path) -> None:
    looks = looks_of(["zz", "a stranger's"])
    assert len({(look.colour, look.shape) for look in looks.values()}) == len(looks) >= 20
    assert looks["ulrl"] == looks_of(["ulrl", "ft"])["ulrl"], "whatever stands beside it"
    browser.start(page)
    colours = "[...document.querySelectorAll(arguments[0])].map((e) => e.getAttribute('fill'))"
    assert set(browser.run(colours, "#panels a[data-method=ft] path")) == {looks["ft"].colour}
    legend = dict(zip(browser.texts("#legend button"), browser.run(colours, "#legend path"), strict=True))
    assert legend == {name: looks[name].colour for name in ("no defense", "ft", "rnp", "ulrl")}
    browser.click("#legend li:nth-child(2) button")
    assert len(browser.all("#panels a.dim")) == 5
    browser.click("#legend li:nth-child(2) button")
    assert not browser.all("#panels a.dim")


def test_heat_map_leads_to_runs_and_labels_what_is_missing(browser: Browser, page: Path) -> None:
    browser.start(page)
    cell = browser.all('#heat a[aria-label^="ulrl on badnet"]')[0]
    assert cell.text.split() == ["1.0", "80.0"]
    assert {cell.text for cell in browser.all("#heat td.none")} == {"–"}
    browser.click('#metric [data-value="der"]')
    assert browser.all('#heat a[aria-label^="ulrl on badnet: DER 90.00"]')
    browser.click('#heat a[aria-label^="ulrl on badnet"]')
    assert {link.split("/")[-1] for link in browser.texts("#heat-runs a")} == {"ulrl_0", "ulrl_1"}
    assert not browser.all(".run[open]")
    browser.click('#heat a[aria-label^="ft on badnet"]')
    browser.wait(lambda: browser.all(".run[open]"))
    assert "one/defense/ft" in browser.all(".run[open]")[0].text
    assert browser.complaints() == []


def test_thumbnails_stand_beside_records(browser: Browser, page: Path) -> None:
    browser.start(page)
    cards = browser.all("#record-list .record")
    assert cards[0].text.split("\n")[0] == "one"
    assert [len(browser.all(f"{where} img.thumbnail")) for where in ("#record-list", "#heat", "#panels")] == [2, 2, 2]
    cards[0].send_keys(Keys.ENTER)
    browser.wait(lambda: browser.all(".run[open]"))
    assert browser.all(".run[open] summary b")[0].text == "one"


def test_hostile_names_are_text(browser: Browser, page: Path) -> None:
    browser.start(page)
    browser.choose("dataset", HOSTILE)
    assert [name.startswith(HOSTILE) for name in browser.texts("#heat tbody th")] == [True]
    browser.choose("dataset", "")
    for name in ("two/defense/ulrl", "one/defense/ft"):
        found = next(e for e in browser.all(".run") if name in str(e.get_property("textContent")))
        browser.driver.execute_script("location.hash = arguments[0].id", found)
        browser.wait(lambda found=found: HOSTILE in str(found.get_property("textContent")))  # type: ignore[misc]
    assert not browser.all("img[src=x]")
    assert "broken" in browser.texts(".notice")[0]
    assert not any("49" in name for name in browser.texts("#heat tbody th"))
    assert browser.complaints() == [], "and nothing was tried"
    source = page.read_text(encoding="utf-8")
    assert "<img src=x" not in source
    assert "script>alert" not in source


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two thousand runs: 200 records of 36 kinds, nine defenses."""
    root = tmp_path_factory.mktemp("large")
    methods = [f"defense{i}" for i in range(9)]
    for r in range(200):
        write_record(root / "record" / f"r{r}", f"attack{r % 12}", {
            m: {"method": m, "acc": 0.8 + (r * 7 + i) % 100 / 600, "asr": (r * 13 + i * 29) % 101 / 100}
            for i, m in enumerate(methods)
        }, dataset=f"data{r % 3}", seed=r)  # fmt: skip
    return report(root / "record", root / "report.html")


def test_of_two_thousand_runs_a_part_is_drawn_at_first(browser: Browser, large: Path) -> None:
    browser.open(large)
    assert browser.texts("#count") == ["2000 of 2000 runs"]
    browser.click('#per [data-value="run"]')
    assert len(browser.all("#board tbody tr")) == 150
    browser.click("#board-note button")
    assert len(browser.all("#board tbody tr")) == 2000
    assert browser.complaints() == []


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_screen(width: int, browser: Browser, page: Path, large: Path) -> None:
    size = {"width": width, "height": 740, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        for each in (page, large):
            browser.open(each)
            assert browser.run("document.documentElement.scrollWidth") <= width
            box = "document.getElementById('heat-box')"
            assert browser.run(f"{box}.clientHeight") <= 740, "a large heat map scrolls in its box"
        assert browser.run(f"{box}.scrollHeight > {box}.clientHeight")
        browser.driver.execute_script(f"{box}.scrollTop = 300")
        head, top = browser.run(f"[{box}.querySelector('thead th'), {box}].map((e) => e.getBoundingClientRect().top)")
        assert abs(head - top) < 2, "below its headings"
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("feature", [("prefers-color-scheme", "dark"), ("prefers-color-scheme", "light")])
def test_text_can_be_read_in_the_dark_and_in_the_light(feature: tuple[str, str], browser: Browser, page: Path) -> None:
    setting = {"features": [{"name": feature[0], "value": feature[1]}]}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", setting)
    try:
        browser.start(page)
        for selector in (
            "#headline",
            "#board td",
            ".panel text",
            "#heat th[scope=row]",
            ".record small",
            "#board a, a.record",
        ):
            light, dark = sorted(map(luminance, browser.run(COLOURS_OF, selector)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, selector
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_cells_of_the_heat_map_can_be_read_at_any_value(browser: Browser, tmp_path: Path) -> None:
    for seed, asr in enumerate((0.42, 0.46, 0.48, 0.5, 0.55)):
        write_record(tmp_path / "record" / f"r{seed}", f"attack{seed}", {"ulrl": {"asr": asr}})
    browser.start(report(tmp_path / "record", tmp_path / "report.html"))
    cells = browser.run(
        "[...document.querySelectorAll('#heat td a')].map((e) => [e.style.color, e.style.background].map((colour) => {"
        "e.style.color = colour; return getComputedStyle(e).color; }))"
    )
    assert len(cells) == 10
    for cell in cells:
        light, dark = sorted(map(luminance, cell), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, cell


COLOURS_OF = """(() => {
    let e = document.querySelector(arguments[0]);
    const style = getComputedStyle(e), ink = e instanceof SVGElement ? style.fill : style.color;
    while (/rgba\\(.*, 0\\)/.test(getComputedStyle(e).backgroundColor)) e = e.parentElement;
    return [ink, getComputedStyle(e).backgroundColor];
})()"""


def luminance(colour: str) -> float:
    """WCAG's, of rgb(r, g, b)."""
    shares = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_print_leaves_out_what_cannot_be_pressed_and_cuts_nothing(browser: Browser, page: Path) -> None:
    browser.start(page)
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert not browser.all("#filters")[0].is_displayed()
        assert not browser.all("#legend button[aria-pressed=true]")
        for box in ("#heat-box", "#leaderboard .scroll"):
            assert browser.run("getComputedStyle(document.querySelector(arguments[0])).overflow", box) == "visible"
        assert browser.run("getComputedStyle(document.getElementById('heat-box')).maxHeight") == "none"
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    printed = browser.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")


def test_nothing_to_report_is_one_line(empty_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (empty_home / "record").mkdir()
    with pytest.raises(SystemExit) as left:
        main(["report"])
    assert left.value.code == 2
    assert "no result.json" in capsys.readouterr().err
    assert not Path("report.html").exists()
