"""How the command line writes for people: escaped text, tables, and what is under way.

Names and arguments come from jobs and may hold anything. What reaches a terminal from here is printable and keeps to
its line, so no file name can move the cursor, recolour the screen or forge a second line.
"""

import os
import re
import sys
from collections.abc import Iterable, Sequence

__all__ = ["StatusLine", "printable", "table"]

BAR_WIDTH = 30
_PERCENT = r"\b(100|[0-9]{1,2})(?:\.[0-9]+)?%"


def printable(text: str) -> str:
    r"""The text with every character that is not printable escaped as Python would: \n, \x1b, \u202e.

    A byte that is not UTF-8 (a surrogate escape, PEP 383) becomes \xNN, that byte.
    """
    return text if text.isprintable() else "".join(map(_printable_character, text))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, two spaces apart; no trailing space and no final newline."""
    lines = [tuple(header), *(tuple(map(printable, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


class StatusLine:
    """Says on stderr what a long step is doing: plain lines, but on a terminal what goes on is one line that changes.

    A message goes on if it names a percentage, which becomes a bar, or ends in "..."; any other is done with. After
    one that goes on the terminal's line is unfinished, so whoever else writes there calls `clear` first.
    """

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._unfinished = False

    def show(self, message: str) -> None:
        """Put this message in place of one that went on."""
        text = printable(message)
        if not self._terminal:
            print(f"jhansi-run: {text}", file=sys.stderr, flush=True)
            return
        percent = re.search(_PERCENT, text)
        bar = f"[{'#' * (int(percent[1]) * BAR_WIDTH // 100):<{BAR_WIDTH}}] " if percent else ""
        # One column stays free: a terminal that wraps could not take the line back.
        width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        line = f"{bar}jhansi-run: {text}"[: width - 1]
        self._unfinished = percent is not None or text.endswith("...")
        print(f"\r\x1b[K{line}", end="" if self._unfinished else "\n", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the line back."""
        if self._unfinished:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._unfinished = False


def _printable_character(character: str) -> str:
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
