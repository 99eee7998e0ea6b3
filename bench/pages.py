"""What the bench's commands write: bench/results/ and the generated blocks of bench/README.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from scipy import stats

from ulrl.errors import UserError
from ulrl.files import whole_file

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
TEXT = ("flagged", "missed", "took", "what_it_took")  # columns of words, some of them empty or a class alone


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage; "" where it is not known."""
    return "" if value is None or pd.isna(value) else f"{100 * value:.{digits}f}"


def interval(values: Sequence[float]) -> tuple[float, float, int]:
    """Mean, half width of its 95% interval (Student's t; NaN of fewer than two) and count."""
    n = len(values)
    mean = sum(values) / n if n else math.nan
    if n < 2:
        return mean, math.nan, n
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, float(stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n), n


def cell(values: Sequence[float]) -> str:
    """Mean, interval and n of some fractions, in percent: "3.1 ±1.2 (3)". Two say nothing of the spread."""
    mean, half, n = interval(values)
    if not n:
        return ""
    return f"{percent(mean)} ({n})" if n < 3 else f"{percent(mean)} ±{percent(half)} ({n})"


def with_earlier(path: Path, frame: pd.DataFrame, key: Sequence[str]) -> pd.DataFrame:
    """`frame` and those rows of an earlier table in `path` whose `key` it lacks, in the order of the key.

    Records are too large to travel with the project and a machine may lose them, so what was measured stays in the
    CSV until it is measured anew. A victim that another machine trains by the same recipe may differ in its last bits.
    """
    if not path.is_file():
        return frame
    columns = pd.read_csv(path, nrows=0).columns
    earlier = pd.read_csv(path, dtype={name: str for name in TEXT if name in columns})
    earlier = earlier.fillna({name: "" for name in TEXT if name in columns})
    both = pd.concat([part for part in (earlier, frame) if len(part)], ignore_index=True)
    return both.drop_duplicates(list(key), keep="last").sort_values(list(key), ignore_index=True)


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        frame.round(4).to_csv(partial, index=False)


def write_block(name: str, lines: Sequence[str], page: Path = FOLDER / "README.md") -> None:
    """Replace what stands between `<!-- begin NAME -->` and `<!-- end NAME -->` of a page.

    Raises:
        UserError: the page has no such place.
    """
    text = page.read_text(encoding="utf-8")
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    if begin not in text or end not in text:
        raise UserError(f"{page} has no place for a table: put the lines {begin.strip()} and {end} where it is to be")
    head, rest = text.split(begin, 1)
    tail = rest.split(end, 1)[1]
    with whole_file(page) as partial:
        partial.write_text(head + begin + "\n".join(lines) + "\n" + end + tail, encoding="utf-8")
