"""The watchdog: memory, CPU time and CPU share of a job where there is no cgroup to enforce them.

It looks at every process of the container twenty times a second, and says when a limit is passed: the job is then
killed, well within a tenth of a second. What it sees is less than what the kernel counts: memory that is nobody's
mapping (but for memfds, which it looks for where a process shows its descriptors) and processes that come and go
between two looks escape it. Hence `accounting: sampled`, and --require-cgroup for those who need more. The number of
processes is not its business: RLIMIT_NPROC bounds that exactly (isolation/job.py).

It reads the container's own /proc, of which init has passed a descriptor: all that is in there is the container's, and
one file of each process says what is asked. (psutil would have to look through the processes of the whole host for
them, and takes 160 microseconds where this takes 10: with a hundred processes, half of the CPU that a host has left.)

A share of CPU time that is not a whole number of CPUs is kept by stopping all of the job for a while.
"""

import os
import signal
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from jhansi_runtime.engine.descriptors import INIT, bytes_in_memfds, pids, read
from jhansi_runtime.engine.watches import AFTER_RLIMIT_SECONDS, Bounds, Reason

if TYPE_CHECKING:
    from jhansi_runtime.engine.slot import Slot

__all__ = ["Watchdog"]

_PERIOD_SECONDS = 0.05  # the first look comes after it: an exec that is shorter costs nothing
_SHORTEST_SECONDS = 0.01
_REST = 4  # times as long as a look took is the least time until the next: a fifth of a CPU at most
_BURST_SECONDS = 0.05  # of CPU time that a job may be ahead of its share
_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICK = 1 / os.sysconf("SC_CLK_TCK")


class _Process(NamedTuple):
    """What /proc/PID/stat says: ticks of CPU time, those of children that were waited for; resident bytes."""

    pid: str
    own_ticks: int
    children_ticks: int
    resident_bytes: int


class Watchdog:
    """A watch (watches.Watch) over all processes of a slot's container.

    peak_bytes is the most memory that was seen in use at once.
    """

    def __init__(self, slot: "Slot", bounds: Bounds) -> None:
        self.peak_bytes = 0
        self._slot = slot
        self._bounds = bounds
        self._began = time.monotonic()
        self._due = self._began + _PERIOD_SECONDS
        self._cpu_seconds = 0.0
        self._is_stopped = False
        self._memfd_bytes = 0
        self._memfds_due = 0.0

    def due_in(self) -> float:
        """See Watch."""
        return self._due - time.monotonic()

    def look(self) -> Reason | None:
        """See Watch."""
        now = time.monotonic()
        if self._is_stopped:
            self._resume()
        processes = list(_processes(self._slot.proc))
        memory = self._memory(processes)
        growth = memory - self.peak_bytes
        self.peak_bytes = max(self.peak_bytes, memory)
        if memory > self._bounds.memory_bytes:
            return "oom_killed"
        # It never goes back: who ignores SIGCHLD has children of which nobody counts what they have used.
        self._cpu_seconds = max(self._cpu_seconds, _cpu_seconds(processes))
        if self._cpu_seconds >= self._bounds.cpu_seconds + AFTER_RLIMIT_SECONDS:
            return "cpu_time_exceeded"
        took = time.monotonic() - now
        self._due = now + max(self._period(growth), _REST * took)
        self._throttle(now)
        return None

    def _period(self, growth: int) -> float:
        """Return the time until the next look: less than usual where memory grows so fast that it could run out."""
        if growth <= 0:
            return _PERIOD_SECONDS
        looks_left = (self._bounds.memory_bytes - self.peak_bytes) / growth
        return min(_PERIOD_SECONDS, max(_SHORTEST_SECONDS, _PERIOD_SECONDS * looks_left / 2))

    # --- CPU share ---

    def _throttle(self, now: float) -> None:
        """Stop the job if it is ahead of its share, for as long as it then takes to be in step again."""
        ahead = self._cpu_seconds - self._bounds.cpus * (now - self._began) - _BURST_SECONDS
        if ahead > 0:
            self._is_stopped = True
            self._slot.signal(signal.SIGSTOP)
            self._due = now + ahead / self._bounds.cpus

    def _resume(self) -> None:
        self._is_stopped = False
        self._slot.signal(signal.SIGCONT)

    # --- memory ---

    def _memory(self, processes: list[_Process]) -> int:
        """Return the memory in use, in bytes: first by what is cheap to ask and never too little; then exactly."""
        files = self._slot.scratch_bytes() + self._memfds()
        at_most = files + sum(process.resident_bytes for process in processes)
        if at_most <= self._bounds.memory_bytes:
            return at_most
        anonymous, shared = _mapped_bytes(self._slot.proc, processes)
        # What is in /dev/shm or a memfd and mapped as well is to count once.
        return anonymous + max(shared, files)

    def _memfds(self) -> int:
        """Return the bytes in memfds, as of the last time when there was time to look at every descriptor."""
        began = time.monotonic()
        if began >= self._memfds_due:
            self._memfd_bytes = bytes_in_memfds(self._slot.proc)
            now = time.monotonic()
            self._memfds_due = now + _REST * _REST * (now - began)
        return self._memfd_bytes


def _processes(proc: int) -> Iterator[_Process]:
    """Yield what is in a container's /proc, init's children included: orphans are among them when they have ended."""
    for pid in pids(proc):
        if text := read(proc, f"{pid}/stat"):
            # The name, in parentheses, may hold anything; field numbers are those of proc_pid_stat(5), less 3.
            fields = text.rpartition(b")")[2].split()
            user, system, children_user, children_system = map(int, fields[11:15])
            own, resident = (0, 0) if pid == INIT else (user + system, int(fields[21]) * _PAGE)
            yield _Process(pid, own, children_user + children_system, resident)


def _cpu_seconds(processes: list[_Process]) -> float:
    """Return the CPU time of all processes, and of all that have ended and were waited for."""
    return sum(process.own_ticks + process.children_ticks for process in processes) * _TICK


def _mapped_bytes(proc: int, processes: list[_Process]) -> tuple[int, int]:
    """Return the bytes of private and of shared memory that processes have mapped; a page of several counts once."""
    anonymous = shared = 0
    for pid, *_ in processes:
        if pid != INIT:
            # A program that its user may not read shows this to nobody; what it shows counts shared pages repeatedly.
            text = read(proc, f"{pid}/smaps_rollup") or read(proc, f"{pid}/status")
            fields = {key: value for key, _, value in (line.partition(b":") for line in text.splitlines())}
            anonymous += sum(_kibibytes(fields, name) for name in (b"Pss_Anon", b"SwapPss", b"RssAnon", b"VmSwap"))
            shared += sum(_kibibytes(fields, name) for name in (b"Pss_Shmem", b"RssShmem"))
    return anonymous, shared


def _kibibytes(fields: Mapping[bytes, bytes], name: bytes) -> int:
    return int(fields[name].split(maxsplit=1)[0]) * 1024 if name in fields else 0
