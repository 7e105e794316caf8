"""Which CPUs the next job may run on: as many as its limit needs, the least used ones of those that we have.

An affinity is what most programs take for the number of CPUs there are, so each job gets one (isolation/processors.py).
Its price is that the kernel cannot move the job to a CPU that is idle; hence the choice, and the count of who is where.
"""

import _thread
import math
import os
from collections.abc import Callable

__all__ = ["Processors"]


class Processors:
    """The CPUs of this process and how many of its jobs each has: those that run, and all, with those that wait.

    May be used by several threads.
    """

    def __init__(self) -> None:
        self._mutex = _thread.allocate_lock()
        self._jobs: dict[int, int] = {}
        self._running: dict[int, int] = {}
        self._next = os.getpid()  # processes of one host that each start a job do not all begin with the same CPU

    def take(self, cpus: float, *, ahead: bool = False) -> tuple[int, ...]:
        """Return the CPUs for a job that may use so many CPUs' worth of time; each has one job more from now on.

        A job that is to wait is spread among those that wait, for who runs now has ended by then.
        """
        with self._mutex:
            chosen = self._choose(math.ceil(cpus), self._waiting if ahead else self.running)
            for number in chosen:
                self._jobs[number] = self._jobs.get(number, 0) + 1
        return chosen

    def begin(self, processors: tuple[int, ...]) -> None:
        """The job that these CPUs were taken for begins to run."""
        with self._mutex:
            for number in processors:
                self._running[number] = self._running.get(number, 0) + 1

    def end(self, processors: tuple[int, ...]) -> None:
        """It runs no more."""
        with self._mutex:
            for number in processors:
                self._running[number] -= 1

    def give_back(self, processors: tuple[int, ...]) -> None:
        """The job that these CPUs were taken for is gone."""
        with self._mutex:
            for number in processors:
                self._jobs[number] -= 1

    def load(self, processors: tuple[int, ...]) -> int:
        """Return how many jobs run on these, each counted for each."""
        return sum(map(self.running, processors))

    def running(self, number: int) -> int:
        """Return how many jobs run on this CPU."""
        return self._running.get(number, 0)

    def free(self) -> tuple[int, ...]:
        """Return the CPUs that no job runs on, () where all are free or none is."""
        ours = sorted(os.sched_getaffinity(0))
        free = tuple(number for number in ours if not self.running(number))
        return free if len(free) < len(ours) else ()

    def _waiting(self, number: int) -> int:
        return self._jobs.get(number, 0) - self.running(number)

    def _choose(self, count: int, load: Callable[[int], int]) -> tuple[int, ...]:
        ours = sorted(os.sched_getaffinity(0))
        if count >= len(ours):
            return tuple(ours)
        start = self._next % len(ours)
        self._next += count
        in_turn = ours[start:] + ours[:start]
        # Stable: of equals, who is next in turn.
        in_turn.sort(key=lambda number: (load(number), self._jobs.get(number, 0)))
        return tuple(sorted(in_turn[:count]))
