"""The CPUs that a job sees: affinity (sched_setaffinity(2)), and what of /proc speaks of the CPUs of the machine.

Affinity is what most ask: nproc, os.process_cpu_count, OpenMP, Go, Rust, the JVM. The C library, and with it
os.cpu_count, multiprocessing and OpenBLAS, counts lines in /proc/stat where there is no /sys, as here; others count
entries in /proc/cpuinfo. So a container gets its own of both, with its own CPUs in them and nothing of the host's load.
"""

import os
from contextlib import suppress
from functools import cache

__all__ = ["prefer", "proc_files", "remember", "run_on"]

_FIELDS = " 0" * 10  # of a line about a CPU in /proc/stat: times, in ticks


def run_on(processors: tuple[int, ...]) -> None:
    """Let this process, and what it starts, run on these CPUs alone."""
    os.sched_setaffinity(0, processors)


def prefer(processors: tuple[int, ...], *, busy: tuple[int, ...] = ()) -> None:
    """Let this process run on these CPUs, () for all there are but those that are busy, unless that is none.

    All there are is what whoever has called `remember` first might run on. That may have changed since, and then the
    kernel has its way: this is for speed alone.
    """
    with suppress(OSError):
        os.sched_setaffinity(0, processors or _allowed().difference(busy) or _allowed())


def proc_files(processors: tuple[int, ...]) -> tuple[tuple[str, bytes], ...]:
    """Return name and content of each file of /proc that a container of these CPUs has a version of its own of."""
    shown = {str(number) for number in processors}
    cpuinfo = "\n\n".join(text for number, text in _cpuinfo() if number is None or number in shown)
    lines = [f"cpu {_FIELDS}", *(f"cpu{number}{_FIELDS}" for number in processors), "intr 0", "ctxt 0", _boot_time()]
    lines += ["processes 1", "procs_running 1", "procs_blocked 0", f"softirq{_FIELDS} 0"]
    return ("cpuinfo", f"{cpuinfo}\n\n".encode()), ("stat", "\n".join([*lines, ""]).encode())


def remember() -> None:
    """Read of the host now what is needed here later: what is cloned from this process need not do so again."""
    _allowed()
    _cpuinfo()
    _boot_time()


@cache
def _allowed() -> frozenset[int]:
    return frozenset(os.sched_getaffinity(0))


@cache
def _cpuinfo() -> tuple[tuple[str | None, str], ...]:
    """Return the entries of /proc/cpuinfo, each with the number of its CPU; None for one that is of all."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        entries = file.read().strip("\n").split("\n\n")
    found = []
    for entry in entries:
        name, _, number = entry.partition("\n")[0].partition(":")
        found.append((number.strip() if name.strip() == "processor" else None, entry))
    return tuple(found)


@cache
def _boot_time() -> str:
    """Return the line of /proc/stat that ages of processes are reckoned from."""
    with open("/proc/stat", encoding="ascii") as file:
        return next(line.rstrip("\n") for line in file if line.startswith("btime "))
