"""Waiting for a detached run: how often to ask, and what its end means."""

import time
from collections.abc import Iterator

from jhansi_runtime.errors import HostError
from jhansi_runtime.spec import ExecResult, RunInfo

__all__ = ["ended", "pauses"]

FIRST_PAUSE = 0.02
LONGEST_PAUSE = 1.0


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


def ended(info: RunInfo) -> ExecResult:
    """The result of a run that is no longer under way. HostError when it has none."""
    if info.result is None:
        raise HostError(f"the run {info.run_id} was lost: the server that ran it was killed", remedy="run it again")
    return info.result
