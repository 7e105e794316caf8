"""Waiting for what ends by itself: how often to ask, and what the end of a detached run means."""

import time
from collections.abc import Iterator
from contextlib import suppress

from jhansi_runtime.errors import HostError
from jhansi_runtime.spec import ExecResult, RunInfo

__all__ = ["ended", "pauses", "settling"]

FIRST_PAUSE = 0.02
LONGEST_PAUSE = 1.0
_SETTLES_WITHIN = 5.0  # seconds: a job that is asked to end has two


def pauses(timeout: float | None) -> Iterator[float]:
    """Seconds to sleep between two questions: short at first, never long. TimeoutError when `timeout` is over."""
    deadline = None if timeout is None else time.monotonic() + timeout
    pause = FIRST_PAUSE
    while True:
        left = LONGEST_PAUSE if deadline is None else deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"the run has not ended within {timeout} s")
        yield min(pause, left)
        pause = min(1.5 * pause, LONGEST_PAUSE)


def settling() -> Iterator[float]:
    """Seconds to sleep between attempts at what an exec that is ending still stands in the way of; not many."""
    with suppress(TimeoutError):
        yield from pauses(_SETTLES_WITHIN)


def ended(info: RunInfo) -> ExecResult:
    """The result of a run that is no longer under way. HostError when it has none."""
    if info.result is None:
        raise HostError(f"the run {info.run_id} was lost: the server that ran it was killed", remedy="run it again")
    return info.result
