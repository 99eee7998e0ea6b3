"""What strangers may send, at every door: one clear line, bounded, and nothing touched that was there.

A quick part runs with the other tests; all of it by `pytest tests/hostile --whole`.
"""

from __future__ import annotations

from pathlib import Path

import others
import planted
import pytest
import records
from doors import Case, run

CASES: list[Case] = [*records.CASES, *others.CASES, *planted.CASES]


def test_the_names_tell_the_cases_apart() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 150


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        whole = metafunc.config.getoption("--whole")
        metafunc.parametrize("case", [c for c in CASES if whole or not c.slow], ids=lambda case: case.name)


def test_hostile(case: Case, trained_home: Path, tmp_path: Path) -> None:
    run(case, trained_home, tmp_path)
