"""The one exception whose text is meant for the user, and the one place where text is made harmless for a terminal."""

from __future__ import annotations

import logging

LONGEST = 400  # characters of a line


class UserError(Exception):
    """Bad input: one line that names the file, flag or key at fault and says how to mend it.

    The command line prints it on stderr and exits with code 2, without a traceback. Library users
    catch it as any exception. Its text is `one_line`, whatever a stranger's file put into it.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


def printable(text: str) -> str:
    """A stranger's text for a terminal: what is not printable is spelled out.

    That is an escape code, a control character, half a surrogate pair, or a mark that turns the direction of writing.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def one_line(text: str, longest: int = LONGEST) -> str:
    """`printable` text without line breaks, of at most `longest` characters: the middle of a longer one is left out,
    as a message names what is wrong at its start and the mend at its end."""
    if len(text) > 4 * longest:  # before the work, for a text of 10 MB; characters may yet be spelled out as up to ten
        text = text[: 2 * longest] + text[-2 * longest :]
    text = printable(" ".join(text.split()))
    if len(text) <= longest:
        return text
    end = longest // 3
    return f"{text[: longest - end - 5]} ... {text[-end:]}"


class LineFormatter(logging.Formatter):
    """A log entry as one harmless line, with its traceback below it where it has one."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = one_line(record.message)
        return super().formatMessage(record)


def csv_cell(text: str) -> str:
    """A text for a cell of a CSV file, `printable`, and no formula, which a spreadsheet would run."""
    text = printable(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\\t", "\\r")) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
