"""Which CPUs the next job may run on: as many as its limit needs, the least used ones of those that we have.

An affinity is what most programs take for the number of CPUs there are, so each job gets one (isolation/processors.py).
Its price is that the kernel cannot move the job to a CPU that is idle; hence the choice, and the count of who is where.
"""

import _thread
import math
import os

__all__ = ["Processors"]


class Processors:
    """The CPUs of this process and how many of its jobs each has. May be used by several threads."""

    def __init__(self) -> None:
        self._mutex = _thread.allocate_lock()
        self._jobs: dict[int, int] = {}
        self._next = os.getpid()  # processes of one host that each start a job do not all begin with the same CPU

    def take(self, cpus: float) -> tuple[int, ...]:
        """Return the CPUs for a job that may use so many CPUs' worth of time; each has one job more from now on."""
        with self._mutex:
            chosen = self._choose(math.ceil(cpus))
            for number in chosen:
                self._jobs[number] = self._jobs.get(number, 0) + 1
        return chosen

    def give_back(self, processors: tuple[int, ...]) -> None:
        """The job that these CPUs were taken for has ended."""
        with self._mutex:
            for number in processors:
                self._jobs[number] -= 1

    def _choose(self, count: int) -> tuple[int, ...]:
        ours = sorted(os.sched_getaffinity(0))
        if count >= len(ours):
            return tuple(ours)
        start = self._next % len(ours)
        self._next += count
        in_turn = ours[start:] + ours[:start]
        in_turn.sort(key=lambda number: self._jobs.get(number, 0))  # stable: of equals, who is next in turn
        return tuple(sorted(in_turn[:count]))
