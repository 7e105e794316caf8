"""A pseudoterminal of the container's own devpts, for a job that is to have a terminal (pty(7), ioctl_tty(2)).

The host gets the master as a passed descriptor. The slave is opened from the master, never by a path, so nothing the
job or the rootfs could have put in /dev/pts is ever followed (CVE-2025-52565).
"""

import fcntl
import os
import struct

__all__ = ["adopt", "open_pair", "resize"]

_TIOCSCTTY = 0x540E
_TIOCSWINSZ = 0x5414
_TIOCSPTLCK = 0x40045431
_TIOCGPTPEER = 0x5441


def open_pair(rows: int, columns: int) -> tuple[int, int]:
    """Return (master, slave) of a new pty of this size, close-on-exec."""
    master = os.open("/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_NOFOLLOW | os.O_CLOEXEC)
    fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
    slave = fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    resize(master, rows, columns)
    return master, slave


def resize(master: int, rows: int, columns: int) -> None:
    """Set the size; the foreground processes of the terminal get SIGWINCH."""
    fcntl.ioctl(master, _TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))


def adopt(slave: int) -> None:
    """Make the slave the controlling terminal of the session this process leads."""
    fcntl.ioctl(slave, _TIOCSCTTY, 0)
