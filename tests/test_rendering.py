"""What is written for a terminal is printable and keeps to its line."""

import os
import pty
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jhansi_runtime.rendering import printable, table

any_text = st.text(st.characters(codec=None))  # lone surrogates included

SHOWS_STEPS = """
from jhansi_runtime.rendering import StatusLine
status = StatusLine()
status.show("starting")
status.show("fetching...")
status.show("unpacking 50%\\x1b[31m")
status.clear()
"""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("héllo 中", "héllo 中"),
        ("two\nlines\r", "two\\nlines\\r"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("c1 \x9b31m", "c1 \\x9b31m"),
        ("bidi \u202e", "bidi \\u202e"),
        ("not UTF-8 \udcff", "not UTF-8 \\xff"),
        ("lone \ud800", "lone \\ud800"),
    ],
)
def test_what_could_move_the_cursor_or_break_the_line_is_escaped(text, shown):
    assert printable(text) == shown


@settings(database=None)  # the checkout may be somebody else's
@given(any_text)
def test_whatever_the_text_it_comes_out_printable(text):
    assert printable(text).isprintable()


@settings(database=None)
@given(st.lists(st.tuples(any_text, any_text)))
def test_a_table_has_one_line_for_each_row_whatever_the_cells(rows):
    lines = table(("ONE", "TWO"), rows).split("\n")
    assert len(lines) == len(rows) + 1
    assert all(line.isprintable() for line in lines)


def test_columns_start_at_the_same_place():
    assert table(("A", "LONG"), [("wide cell", "1"), ("x", "2")]) == "A          LONG\nwide cell  1\nx          2"


def test_each_step_is_a_plain_line_where_no_terminal_is():
    answer = subprocess.run([sys.executable, "-c", SHOWS_STEPS], capture_output=True, text=True, check=True)
    assert answer.stderr == "jhansi-run: starting\njhansi-run: fetching...\njhansi-run: unpacking 50%\\x1b[31m\n"


def test_on_a_terminal_what_goes_on_is_taken_back_and_a_percentage_is_a_bar():
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", SHOWS_STEPS], stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert "\x1b[Kjhansi-run: starting\r\n" in shown
    assert "\x1b[Kjhansi-run: fetching...\r\x1b[K" in shown
    assert f"[{'#' * 15}{' ' * 15}] jhansi-run: unpacking 50%" in shown
    assert "\x1b[31m" not in shown
    assert shown.endswith("\r\x1b[K")
