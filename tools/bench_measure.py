"""How tools/bench measures: in rounds, each of which runs every way once, one after the other.

So whatever else the machine does hits all ways alike, and a ratio is the median over the rounds of (this way / the
first one, in the same round). After each run there is a pause, in which a pool builds the slot that was taken: what
that takes is in the CPU time of a way, not in the time of the way that comes next.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from typing import TYPE_CHECKING

import prctl
import psutil
from bench_ways import SAID, Way

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

PAUSE = 0.03  # seconds: a slot takes half of that
SETTLE = 1.0  # seconds, in which a pool gets ready for what it has seen

Figures = dict[str, float | None]


def compared(ways: Sequence[Way], rounds: int) -> dict[str, Figures]:
    """Return p50, p95 and p99 (ms), the ratio to the first way, and the CPU time of each exec (ms), by way."""
    for way in ways:
        for _ in range(3):  # the caches are warm, and pools know what is wanted
            timed(way)
    time.sleep(SETTLE)
    times: dict[str, list[float]] = {way.name: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            times[way.name].append(timed(way))
            time.sleep(PAUSE)
    first = times[ways[0].name]
    return {way.name: figures_of(times[way.name], first) | {"cpu_ms": cpu_of(way, rounds)} for way in ways}


def timed(way: Way) -> float:
    """Milliseconds of one run. RuntimeError when it does not print what it should: then it measures something else."""
    began = time.perf_counter()
    said = way.run()
    taken = time.perf_counter() - began
    if said != SAID:
        raise RuntimeError(f"{way.name} printed {said!r}")
    return taken * 1000


def figures_of(times: Sequence[float], first: Sequence[float] | None = None) -> Figures:
    """Summarise the times of one way."""
    figures: Figures = {f"p{percent}_ms": quantile(times, percent / 100) for percent in (50, 95, 99)}
    if first is not None:
        figures["ratio"] = statistics.median(one / other for one, other in zip(times, first, strict=True))
    return figures


def quantile(times: Sequence[float], part: float) -> float:
    """Return the value that this part of the times does not exceed."""
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, round(part * len(ordered)))]


def cpu_of(way: Way, rounds: int) -> float:
    """Milliseconds of CPU time that one run takes of this machine: this process, all below it, the launchers, the job.

    The kernel tells it in hundredths of a second, so it is taken over many runs, one after the other. bwrap leaves the
    end of its child to whoever adopts it, and with that what it used: meanwhile that is this process.
    """
    runs = max(5, rounds // 2)
    prctl.set_child_subreaper(1)
    before = cpu_seconds()
    for _ in range(runs):
        timed(way)
    time.sleep(PAUSE * 10)  # what is built for the next exec belongs to this one
    taken = cpu_seconds() - before
    prctl.set_child_subreaper(0)
    while os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG) is not None:
        continue
    return taken * 1000 / runs


def cpu_seconds() -> float:
    """CPU time of this process and of everything below it, ended or not."""
    total = 0.0
    for process in family(os.getpid()):
        try:
            total += sum(process.cpu_times()[:4])  # its own and that of children that it has reaped
        except psutil.NoSuchProcess:  # its parent has reaped it, and counts it
            continue
    return total


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def rates(callers: int, make: Callable[[], Iterable[Way]], seconds: float) -> dict[str, float]:
    """Return how many times a second that many callers at once get each way done. Each caller has ways of its own."""
    ways_of = [{way.name: way for way in make()} for _ in range(callers)]
    return {name: rate([ways[name] for ways in ways_of], seconds) for name in ways_of[0]}


def rate(ways: Sequence[Way], seconds: float) -> float:
    """Return how many runs a second come of callers that each run one of these, again and again."""
    counts, failures = [0] * len(ways), []
    start = threading.Barrier(len(ways) + 1)
    began = 0.0

    def call(number: int) -> None:
        start.wait()
        try:
            while time.perf_counter() < began + seconds:
                timed(ways[number])
                counts[number] += 1
        except Exception as error:  # noqa: BLE001 - it is raised below, in the thread that asked
            failures.append(error)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(ways))]
    for thread in threads:
        thread.start()
    began = time.perf_counter()
    start.wait()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return sum(counts) / (time.perf_counter() - began)


def memory_of(pids: Iterable[int]) -> tuple[int, bool]:
    """Return the memory of these processes in bytes, and whether that is PSS.

    Where the kernel does not tell PSS, as of processes that are not dumpable and not this user's to look into, it is
    RSS, which counts what they share once for each.
    """
    total, is_pss = 0, True
    for pid in pids:
        try:
            fields = status_of(f"/proc/{pid}/smaps_rollup")
            total += fields["Pss"]
        except PermissionError:
            is_pss = False
            total += status_of(f"/proc/{pid}/status").get("VmRSS", 0)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total, is_pss


def available() -> int:
    """Bytes of memory that this machine has left. What the kernel itself needs for something shows here alone."""
    return status_of("/proc/meminfo")["MemAvailable"]


def status_of(path: str) -> Mapping[str, int]:
    """The sizes in a file of /proc, in bytes."""
    sizes = {}
    with open(path, encoding="ascii", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if value.endswith(" kB\n"):
                sizes[name] = int(value.split()[0]) * 1024
    return sizes
