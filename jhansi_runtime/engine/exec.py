"""One exec: a slot, its order, its streams, its clock, and what became of it.

Everything that can end an exec early meets in one poll loop: the job's own end, the wall clock, the output limit, a
signal to the caller, what a watch has seen. Whichever comes first is the reason; the slot is then killed as a whole,
and what the job had written until then is still passed on.
"""

import errno
import math
import os
import select
import signal
import time
from collections.abc import Sequence
from typing import NamedTuple

from jhansi_runtime.digest import sha256
from jhansi_runtime.engine.pump import Output
from jhansi_runtime.engine.slot import Progress, Slot, step_failed
from jhansi_runtime.engine.watchdog import Watchdog
from jhansi_runtime.engine.watches import Bounds, GroupWatch, Reason, RemovedFilesWatch, Watch
from jhansi_runtime.engine.wiring import Streams, Wiring
from jhansi_runtime.errors import HostError
from jhansi_runtime.isolation import cgroup
from jhansi_runtime.isolation.channel import EXECVE, Failure, Order, Outcome

__all__ = ["Ended", "execute"]

_READY_WITHIN_SECONDS = 30.0
_GRACE_SECONDS = 2.0
_ENDED_WITHIN_SECONDS = 1.0
_ENDING = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
_PASSED_ON = frozenset({signal.SIGUSR1, signal.SIGUSR2})
_LONGEST_WAIT_SECONDS = 3600.0


class Written(NamedTuple):
    """What came out of one stream: its size in bytes, its SHA-256, whether more was cut off, and what was kept."""

    size: int
    sha256: str
    truncated: bool
    captured: bytes


class Usage(NamedTuple):
    """What the processes of an exec have used: CPU seconds, the peak of memory in bytes, forks that were refused.

    is_exact: the kernel has counted it all. Otherwise what init has reaped, and what the watchdog has seen.
    """

    cpu_seconds: float
    peak_bytes: int
    forks_refused: int
    is_exact: bool


class Ended(NamedTuple):
    """How an exec ended: reason says why early, if it was; failure, why the program did not start.

    in_cgroup: its limits were the kernel's to enforce.
    """

    outcome: Outcome | None
    failure: Failure | None
    reason: Reason | None
    stdout: Written
    stderr: Written
    wall_seconds: float
    usage: Usage
    in_cgroup: bool


def execute(
    slot: Slot,
    order: Order,
    streams: Streams,
    bounds: Bounds,
    *,
    stdin: bytes,
    watches: Sequence[Watch] = (),
) -> Ended:
    """Run one order in a slot, which its owner then closes.

    stdin is fed when streams.stdin is None; watches look while the job runs, besides the one that goes with the slot.

    HostError when a step of isolation fails: nothing was run. OSError when the host's own streams cannot be used.
    """
    with Wiring(streams, stdin) as wiring:
        size = wiring.size
        slot.start(order._replace(terminal=size, on_terminal=wiring.on_terminal), wiring.passed)
        wiring.passed_on()
        run = _Run(slot, wiring, streams.control, bounds, watches)
        run.until_ended()
        return Ended(
            outcome=run.outcome,
            failure=run.failure,
            reason=run.reason,
            stdout=_written(wiring.stdout),
            stderr=_written(wiring.stderr),
            wall_seconds=run.wall_seconds,
            usage=_usage(slot, run),
            in_cgroup=slot.group is not None,
        )


class _Run:
    """The poll loop and what it has learnt. The slot is alive until init has said its last word."""

    def __init__(
        self,
        slot: Slot,
        wiring: Wiring,
        control: int | None,
        bounds: Bounds,
        watches: Sequence[Watch],
    ) -> None:
        self.outcome: Outcome | None = None
        self.failure: Failure | None = None
        self.reason: Reason | None = None
        self.wall_seconds = 0.0
        self.watchdog: Watchdog | None = None
        self._watches = list(watches)
        self._slot = slot
        self._wiring = wiring
        self._control = control
        self._bounds = bounds
        self._ready = False
        self._began = time.monotonic()
        self._deadline = self._began + _READY_WITHIN_SECONDS
        self._cancelling = False
        self._alive = True
        if slot.is_ready:
            self._begin()

    def until_ended(self) -> None:
        """Move bytes, watch the clock and pass signals on, until the slot has ended and its output is delivered."""
        while self._alive or any(output.interest() for output in self._wiring.outputs):
            ready = self._poll()
            if self._alive and self._slot.channel in ready:
                self._hear()
            if self._control in ready:
                self._obey()
            self._move(ready)
            if self._alive and time.monotonic() >= self._deadline:
                self._expire()
            if self._is_watched:
                self._look()

    @property
    def _is_watched(self) -> bool:
        return self._alive and self._ready and self.reason is None

    def _look(self) -> None:
        for watch in self._watches:
            if watch.due_in() <= 0 and (reason := watch.look()) is not None:
                self._end(reason)
                return

    def _poll(self) -> set[int]:
        poll = select.poll()
        if self._alive:
            poll.register(self._slot.channel, select.POLLIN)
        if self._control is not None:
            poll.register(self._control, select.POLLIN)
        interests = [output.interest() for output in self._wiring.outputs]
        if self._alive and self._wiring.input is not None:
            interests.append(self._wiring.input.interest())
        for interest in interests:
            if interest is not None:
                poll.register(*interest)
        return {descriptor for descriptor, _ in poll.poll(self._milliseconds_left())}

    def _milliseconds_left(self) -> int:
        """Return the time until something is due that no descriptor tells of."""
        seconds = _LONGEST_WAIT_SECONDS
        if self._alive:
            seconds = min(seconds, self._deadline - time.monotonic())
        if self._is_watched:
            seconds = min(seconds, *(watch.due_in() for watch in self._watches))
        return max(0, math.ceil(seconds * 1000))

    def _move(self, ready: set[int]) -> None:
        for output in self._wiring.outputs:
            interest = output.interest()
            if interest is None or interest[0] not in ready:
                continue
            allowance = self._bounds.output_bytes - sum(other.count for other in self._wiring.outputs)
            if not output.advance(allowance):
                self._end("output_limit")
        if self._wiring.input is not None:
            interest = self._wiring.input.interest()
            if interest is not None and interest[0] in ready:
                self._wiring.input.advance()

    def _hear(self) -> None:
        message = self._slot.receive()
        if message is Progress.LAUNCHED:
            return
        if message is Progress.READY:
            self._begin()
            return
        if isinstance(message, int):
            self._wiring.connect_terminal(message)
            return
        # What init says last, it says when nothing else is left in the container: its own end need not be waited for.
        self._alive = False
        self.wall_seconds = time.monotonic() - self._began
        if isinstance(message, Outcome):
            self.outcome = message
            if self._cancelling and os.WIFSIGNALED(message.wait_status):
                self.reason = self.reason or "cancelled"
        elif message is None:
            if _ran_out_of_memory(self._slot):
                self.reason = self.reason or "oom_killed"
            if self.reason is None:
                raise HostError("init ended without saying how the job did")
        elif message.step == EXECVE:
            self.failure = message
        else:
            raise step_failed(message)

    def _begin(self) -> None:
        """The container is built, and the job's time begins."""
        self._ready = True
        self._began = time.monotonic()
        self._deadline = self._began + self._bounds.timeout if not self._cancelling else self._deadline
        self._watches += [self._own_watch(), RemovedFilesWatch(self._slot.proc, self._bounds)]

    def _own_watch(self) -> Watch:
        if self._slot.group is not None:
            return GroupWatch(self._slot.group, self._bounds)
        self.watchdog = Watchdog(self._slot, self._bounds)
        return self.watchdog

    def _obey(self) -> None:
        assert self._control is not None  # noqa: S101 - it was polled
        for number in os.read(self._control, 64):
            if number == signal.SIGWINCH:
                self._wiring.resize()
            elif number in _PASSED_ON and self._alive:
                self._slot.signal(number)
            elif number in _ENDING:
                self._cancel(number)

    def _cancel(self, number: int) -> None:
        """First ask, with the signal itself; a second signal, or the end of the grace, does not ask."""
        if not self._alive:
            for output in self._wiring.outputs:
                output.abandon()
        elif self._cancelling:
            self._end("cancelled")
        else:
            self._cancelling = True
            self._slot.signal(number)
            self._deadline = min(self._deadline, time.monotonic() + _GRACE_SECONDS)

    def _expire(self) -> None:
        if not self._ready and not self._cancelling:
            raise HostError(f"the container was not ready within {_READY_WITHIN_SECONDS:g} seconds")
        if self.reason is None:
            self._end("cancelled" if self._cancelling else "timed_out")
        else:
            self._slot.kill()
            self._deadline = math.inf

    def _end(self, reason: Reason) -> None:
        """Have init end everything and account for it; should it not do so in time, it ends with everything."""
        self.reason = self.reason or reason
        self._slot.signal(signal.SIGKILL)
        self._deadline = time.monotonic() + _ENDED_WITHIN_SECONDS


def _ran_out_of_memory(slot: Slot) -> bool:
    """Say whether that is why init is gone: the kernel then ends all that is in the cgroup."""
    if slot.group is None:
        return False
    try:
        return cgroup.figures(slot.group).oom_kills > 0
    except OSError as error:  # the cgroup has gone as well, with a launcher that was killed
        if error.errno not in {errno.ENOENT, errno.ENODEV}:
            raise
        return False


def _usage(slot: Slot, run: _Run) -> Usage:
    """Return what an exec that has ended has used. Without an outcome, whatever is left of it is ended first."""
    outcome = run.outcome
    if slot.group is not None:
        if outcome is None:
            slot.kill()
        figures = cgroup.figures(slot.group)
        cpu_seconds = figures.cpu_seconds - (outcome.init_seconds if outcome else 0.0)
        peak = figures.peak_bytes
        if peak is not None:
            return Usage(max(0.0, cpu_seconds), peak, figures.forks_refused, is_exact=True)
        peak = outcome.peak_bytes if outcome else 0
        return Usage(max(0.0, cpu_seconds), peak, figures.forks_refused, is_exact=False)
    seen = run.watchdog.peak_bytes if run.watchdog else 0
    # init reaps all there is before it reports; only what could not report is accounted for by the kernel alone.
    used = outcome or slot.close()
    return Usage(used.cpu_seconds, max(used.peak_bytes, seen), forks_refused=0, is_exact=False)


def _written(output: Output | None) -> Written:
    if output is None:
        return Written(0, sha256().hexdigest(), truncated=False, captured=b"")
    return Written(output.count, output.digest, output.truncated, bytes(output.captured))
