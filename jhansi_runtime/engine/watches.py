"""What keeps an eye on a job while it runs: each watch says when it wants to look next, and what it saw.

Where the container has a cgroup the kernel enforces memory, processes and CPU share; all that is left to watch is the
CPU time that its processes have used together. Elsewhere the watchdog (watchdog.py) does what it can. What a job has
removed from its workspace and holds open is watched everywhere; what is in there, the workspace's owner counts.
"""

import time
from typing import Literal, NamedTuple, Protocol

from jhansi_runtime.engine.descriptors import bytes_in_removed_files
from jhansi_runtime.isolation import cgroup

__all__ = ["AFTER_RLIMIT_SECONDS", "Bounds", "GroupWatch", "Reason", "RemovedFilesWatch", "Watch"]

Reason = Literal["timed_out", "output_limit", "cancelled", "cpu_time_exceeded", "oom_killed", "disk_limit"]

# RLIMIT_CPU sends the one process that has used it all SIGXCPU, which says more than SIGKILL does: it comes first.
AFTER_RLIMIT_SECONDS = 0.1
_SHORTEST_SECONDS = 0.02
_REMOVED_FILES_SECONDS = 0.2
_REST = 20  # times as long as it took, nobody looks at removed files again


class Bounds(NamedTuple):
    """What ends an exec: seconds of wall time and of CPU time, bytes of output, of memory and of removed files.

    cpus is its CPU share.
    """

    timeout: float
    cpu_seconds: float
    output_bytes: int
    memory_bytes: int
    disk_bytes: int
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


class RemovedFilesWatch:
    """What a job holds open that no walk of the workspace finds: with the name gone, only the disk knows of it."""

    def __init__(self, proc: int, bounds: Bounds) -> None:
        self._proc = proc
        self._allowed = bounds.disk_bytes
        self._due = time.monotonic() + _REMOVED_FILES_SECONDS

    def due_in(self) -> float:
        """See Watch."""
        return self._due - time.monotonic()

    def look(self) -> Reason | None:
        """See Watch."""
        began = time.monotonic()
        if bytes_in_removed_files(self._proc) > self._allowed:
            return "disk_limit"
        now = time.monotonic()
        self._due = now + max(_REMOVED_FILES_SECONDS, _REST * (now - began))
        return None
