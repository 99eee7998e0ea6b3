"""How a library call tells of bad input."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ulrl.errors import UserError


def refused(work: Callable[[], object], *words: str) -> None:
    """`work` ends in a UserError of one line that has all `words`."""
    with pytest.raises(UserError) as caught:
        work()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
