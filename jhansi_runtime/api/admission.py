"""Who may run now: so many execs at once, a bounded queue behind them, and one key's share of both.

The event loop's own thread is the only one here, so nothing needs a lock. Whoever is refused has had nothing done.
"""

from asyncio import Future, get_running_loop
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

from jhansi_runtime.errors import BusyError

__all__ = ["Admission"]

_RETRY_AFTER = 1.0  # seconds; an exec takes a fraction of that, unless it is long, and then nobody knows


class Admission:
    """`at_once` turns, given in the order in which they were asked for; `queue` may wait for one."""

    def __init__(self, at_once: int, queue: int) -> None:
        self._at_once = at_once
        self._queue = queue
        self._waiting: deque[Future[None]] = deque()
        self._held: Counter[str] = Counter()
        self.running = 0

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._waiting)

    @contextmanager
    def share(self, whose: str, at_most: int | None) -> Iterator[None]:
        """Within: one of somebody's own turns, waiting or running. BusyError when there are `at_most` already."""
        if at_most is not None and self._held[whose] >= at_most:
            raise BusyError(f"this key has {at_most} execs under way, which is its limit", retry_after=_RETRY_AFTER)
        self._held[whose] += 1
        try:
            yield
        finally:
            self._held[whose] -= 1
            if not self._held[whose]:
                del self._held[whose]

    async def enter(self) -> None:
        """Wait for a turn, which `leave` gives back. BusyError when too many wait already."""
        if self.running < self._at_once and not self._waiting:
            self.running += 1
            return
        if len(self._waiting) >= self._queue:
            raise BusyError(
                f"{self.running} execs are under way and {len(self._waiting)} wait", retry_after=_RETRY_AFTER
            )
        turn: Future[None] = get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self.leave()  # it was this one's turn at the very moment it was given up
            elif turn in self._waiting:
                self._waiting.remove(turn)
            raise

    def leave(self) -> None:
        """Give the turn to whoever has waited longest, if any."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1
