"""What keeps an eye on a job while it runs: each watch says when it wants to look next, and what it saw.

Where the container has a cgroup the kernel enforces memory, processes and CPU share; all that is left to watch is the
CPU time that its processes have used together. Elsewhere the watchdog (watchdog.py) does what it can.
"""

import time
from typing import Literal, NamedTuple, Protocol

from jhansi_runtime.isolation import cgroup

__all__ = ["AFTER_RLIMIT_SECONDS", "Bounds", "GroupWatch", "Reason", "Watch"]

Reason = Literal["timed_out", "output_limit", "cancelled", "cpu_time_exceeded", "oom_killed", "disk_limit"]

# RLIMIT_CPU sends the one process that has used it all SIGXCPU, which says more than SIGKILL does: it comes first.
AFTER_RLIMIT_SECONDS = 0.1
_SHORTEST_SECONDS = 0.02


class Bounds(NamedTuple):
    """What ends an exec: seconds of wall time and of CPU time, bytes of output and of memory; cpus is its CPU share."""

    timeout: float
    cpu_seconds: float
    output_bytes: int
    memory_bytes: int
    cpus: float


class Watch(Protocol):
    """Somebody who looks at a running job from time to time."""

    def due_in(self) -> float:
        """Return the seconds until the next look."""

    def look(self) -> Reason | None:
        """Look. A reason ends the job."""


class GroupWatch:
    """The CPU time of a cgroup. Nothing is read before as much as is allowed can have been used."""

    def __init__(self, group: int, bounds: Bounds) -> None:
        self._group = group
        self._allowed = bounds.cpu_seconds + AFTER_RLIMIT_SECONDS
        self._cpus = bounds.cpus
        self._due = time.monotonic() + self._allowed / self._cpus

    def due_in(self) -> float:
        """See Watch."""
        return self._due - time.monotonic()

    def look(self) -> Reason | None:
        """See Watch."""
        left = self._allowed - cgroup.cpu_seconds(self._group)
        if left <= 0:
            return "cpu_time_exceeded"
        self._due = time.monotonic() + max(_SHORTEST_SECONDS, left / self._cpus)
        return None
