"""The part of python-prctl that the trusted core uses, for the interpreter of a rootfs, which has no such package.

Constants are those of linux/prctl.h and linux/securebits.h; prctl(2), capabilities(7).
"""

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)

_SET_PDEATHSIG, _GET_DUMPABLE, _SET_DUMPABLE, _SET_SECUREBITS, _SET_NO_NEW_PRIVS = 1, 3, 4, 28, 38

SECBIT_NOROOT = 1 << 0
SECBIT_NOROOT_LOCKED = 1 << 1
SECBIT_NO_SETUID_FIXUP = 1 << 2
SECBIT_NO_SETUID_FIXUP_LOCKED = 1 << 3
SECBIT_KEEP_CAPS_LOCKED = 1 << 5


def set_pdeathsig(number: int) -> None:
    """Have this signal sent to this process when its parent dies."""
    _prctl(_SET_PDEATHSIG, number)


def get_dumpable() -> int:
    """Return 1 when this process can be traced by others of its user, 0 when not."""
    return _prctl(_GET_DUMPABLE)


def set_dumpable(value: int) -> None:
    """See get_dumpable."""
    _prctl(_SET_DUMPABLE, value)


def set_securebits(value: int) -> None:
    """Set the securebits, SECBIT_*."""
    _prctl(_SET_SECUREBITS, value)


def set_no_new_privs(value: int) -> None:
    """Let no execve give this process privileges, for good."""
    _prctl(_SET_NO_NEW_PRIVS, value)


def _prctl(option: int, value: int = 0) -> int:
    result: int = _libc.prctl(
        ctypes.c_int(option), ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)
    )
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
