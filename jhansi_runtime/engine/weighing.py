"""What waiting processes take of the memory, in bytes, as /proc tells: seldom asked, for it walks their page tables.

A fork shares the pages of whom it was forked from until it writes. So of a zygote all counts that it has in memory, and
of a slot only what is its own alone, which is what ending it would free.
"""

import os

from jhansi_runtime.engine.descriptors import pids, read

__all__ = ["own_bytes", "resident_bytes"]

_PAGE = os.sysconf("SC_PAGE_SIZE")
_OWN = (b"Private_Clean:", b"Private_Dirty:")


def resident_bytes(pid: int) -> int:
    """Return what a process has in memory; 0 when it has ended. The pid is that of one that is not reaped yet."""
    text = read(None, f"/proc/{pid}/statm")
    return int(text.split()[1]) * _PAGE if text else 0


def own_bytes(proc: int) -> int:
    """Return what nobody else has of the memory of a container's processes; proc is a descriptor of its /proc.

    Of a process that hides its mappings, which the init of a slot without an interpreter does, that is what it has not
    mapped from a file: too much, by what it shares with the launcher.
    """
    return sum(_own_bytes(proc, pid) for pid in pids(proc))


def _own_bytes(proc: int, pid: str) -> int:
    rollup = read(proc, f"{pid}/smaps_rollup")
    if rollup:
        return sum(int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith(_OWN))
    statm = read(proc, f"{pid}/statm").split()
    return (int(statm[1]) - int(statm[2])) * _PAGE if statm else 0
