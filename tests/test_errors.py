"""Text on its way to a terminal or a table."""

from __future__ import annotations

import logging

import pytest

from ulrl.errors import LONGEST, LineFormatter, UserError, csv_cell, one_line


@pytest.mark.parametrize("text", ["\x1b]0;owned\x07", "a\x00b", "\u202egnp.exe", "\ud800", "\x9b31m", "a\u2028b"])
def test_what_is_not_printable_is_spelled_out(text: str) -> None:
    assert one_line(text).isprintable()
    assert str(UserError(text)).isprintable()
    entry = logging.LogRecord("ulrl", logging.INFO, "", 0, "%s", (text,), None)
    assert LineFormatter("%(message)s").format(entry).isprintable()


def test_a_long_line_keeps_its_start_and_its_end() -> None:
    for n in (LONGEST, LONGEST + 1, 10_000_000):
        line = one_line("start" + "\x07" * n + "mend")
        assert len(line) <= LONGEST
        assert line.startswith("start")
        assert line.endswith("mend")
    assert one_line("a\n  b\tc") == "a b c"
    assert one_line("Größe 3 × 4 – 猫") == "Größe 3 × 4 – 猫"


def test_a_formula_is_no_cell() -> None:
    assert [csv_cell(text) for text in ("=1+1", "-1", "+1e5", "@a", "-a", "a=b", "")] == [
        "'=1+1", "-1", "+1e5", "'@a", "'-a", "a=b", "",
    ]  # fmt: skip
