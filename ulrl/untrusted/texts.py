"""Texts of a stranger's: YAML, JSON and CSV, without what makes gigabytes or minutes of a few bytes."""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import yaml

from ulrl.errors import UserError
from ulrl.untrusted.opening import TEXT, read_text

if TYPE_CHECKING:
    import pandas as pd

YAML = 256 << 10  # bytes; PyYAML reads about 100 KB a second
DIGITS = 400  # of a number
COLUMNS = 1000
DEPTH = 40  # levels of JSON; Python writes and reads some hundreds, fewer within what the page has around them
STDIN = Path("/dev/stdin")


class _Loader(yaml.SafeLoader):
    """YAML without anchors, which a few lines multiply to gigabytes, and without a key that is there twice."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise yaml.constructor.ConstructorError(
                None, None, "anchors and aliases (&name, *name) are not read; write the values out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            counts = Counter(self.construct_object(key, deep=True) for key, _ in node.value)
            twice = counts.most_common(1)[0][0]
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice!r} is there twice; remove one", node.start_mark
            )
        return mapping

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and len(node.value) > DIGITS:
            raise yaml.constructor.ConstructorError(None, None, f"a number of over {DIGITS} digits", node.start_mark)
        return super().construct_scalar(node)


def read_yaml(file: Path) -> dict[Any, Any]:
    """The mapping that a YAML file holds.

    Raises:
        UserError: no such file, not YAML, empty, not a mapping; a key that is there twice; anchors.
    """
    if file == STDIN:  # what the user's own shell pipes in
        text = _piped(sys.stdin)
        if len(text) > YAML:
            raise UserError(f"{file} gives more than the {YAML} characters that are read; is it another file?")
    else:
        text = read_text(file, YAML)
    try:
        content = yaml.load(text, _Loader)
    except Exception as error:  # whatever PyYAML makes of a stranger's text
        raise UserError(f"{file} is not YAML as it is read here: {error or type(error).__name__}") from None
    if content is None:
        raise UserError(f"{file} is empty; write option: value lines into it")
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, not a mapping of option: value lines")
    return content


@functools.lru_cache(1)
def _piped(stdin: TextIO) -> str:
    """What a pipe gives, and gives once: to who checks the options, and again to who takes them."""
    return stdin.read(YAML + 1)


def read_json(file: str | os.PathLike[str], inside: Path | None = None) -> Any:
    """What a JSON file holds: at most DEPTH levels, numbers finite, whole ones below 2^63 in size, texts fit for UTF-8.

    Raises:
        UserError: as `read_text`, or not such JSON.
    """
    try:
        content = json.loads(
            read_text(file, TEXT, inside), parse_constant=_number, parse_float=_number, parse_int=_whole_number
        )
        json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair cannot be written again
        _check_depth(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON as it is read here: {error or 'it is nested too deep'}") from None
    return content


def read_csv(file: str | os.PathLike[str], inside: Path | None = None) -> pd.DataFrame:
    """A CSV file with a line of names above, of at most 1000 columns.

    Raises:
        UserError: as `read_text`, or not such a table.
    """
    import pandas as pd

    text = read_text(file, TEXT, inside)
    try:  # of each line, as pandas takes columns from the first that is not blank, and more from a longer second one
        columns = max(map(len, csv.reader(io.StringIO(text, newline=""))), default=0)
        if columns <= COLUMNS:
            return pd.read_csv(io.StringIO(text))
    except Exception as error:  # whatever pandas makes of a stranger's text
        raise UserError(f"{file} is not a CSV table: {error}") from None
    raise UserError(f"{file} has more than {COLUMNS} columns; is it another file?")


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(DEPTH + 1):
        inner = [value for value in level if isinstance(value, (dict, list))]
        level = [part for value in inner for part in (value.values() if isinstance(value, dict) else value)]
    if level:
        raise ValueError(f"it is nested more than {DEPTH} levels deep")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no number")
    return value


def _whole_number(text: str) -> int:
    if len(text) > 20 or abs(value := int(text)) >= 2**63:
        raise ValueError(f"{text[:40]} is too large a number")
    return value
