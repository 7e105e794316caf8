"""The host's terminal, while a job has a pty: raw, so that keys reach the job's own line discipline, then as it was."""

import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["raw", "untranslated"]

_OFLAG = 1


@contextmanager
def raw(descriptor: int) -> Iterator[None]:
    """Put the terminal into raw mode, and restore it whatever happens."""
    before = termios.tcgetattr(descriptor)
    tty.setraw(descriptor, termios.TCSADRAIN)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def untranslated(master: int) -> None:
    """Let the job's pty pass its output on as written: the host's terminal is not raw, and translates newlines."""
    attributes = termios.tcgetattr(master)
    attributes[_OFLAG] &= ~termios.OPOST
    termios.tcsetattr(master, termios.TCSANOW, attributes)
