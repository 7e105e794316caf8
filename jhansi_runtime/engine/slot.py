"""A slot: one container, ready ahead of its one exec, and the state it is in.

prepare -> wait -> run -> exit. `Slot(container)` prepares; `start` gives it the order; `receive` tells what init says;
`kill` ends everything in it at once; `close` reaps it. A slot runs one order, no more.
"""

import os
import signal
from contextlib import suppress
from enum import Enum
from types import TracebackType
from typing import Self

from jhansi_runtime.engine.launcher import Launcher
from jhansi_runtime.errors import HostError, StepFailedError
from jhansi_runtime.isolation import channel as messages
from jhansi_runtime.isolation.channel import Container, Failure, Order, Outcome, Reaped
from jhansi_runtime.isolation.steps import StepError

__all__ = ["READY", "Ready", "Reaped", "Slot", "step_failed"]


class Ready(Enum):
    """That a container is built, and waits for its order or has begun with it."""

    READY = "ready"


READY = Ready.READY


class Slot:
    """One container. A context manager: leaving it kills and reaps whatever is still there."""

    def __init__(self, container: Container, launcher: Launcher) -> None:
        self._launcher = launcher
        try:
            self._init = launcher.launch(container)
        except StepError as error:
            raise step_failed(error.failure) from error
        self._ordered = False
        self._reaped: Reaped | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def channel(self) -> int:
        """The descriptor that is readable when `receive` has something to tell."""
        return self._init.channel.fileno()

    def start(self, order: Order, streams: list[int]) -> None:
        """Give the container its order. It need not be ready: init reads the order when it is."""
        if self._ordered:
            raise HostError("a slot runs one order, and this one has had its own")
        self._ordered = True
        content = messages.write_order(order)
        try:
            with suppress(BrokenPipeError):  # init has failed, and receive() tells how
                self._init.channel.send(messages.ORDER, descriptors=(content, *streams))
        finally:
            os.close(content)

    def receive(self) -> Outcome | Failure | Ready | int | None:
        """Return what init says: READY, the master of the job's terminal, a failure or the outcome; None at the end."""
        kind, body, descriptors = self._init.channel.receive()
        if kind == messages.READY:
            return READY
        if kind == messages.EXIT:
            return messages.decode_outcome(body)
        if kind == messages.FAILED:
            return messages.decode_failure(body)
        if kind == messages.TERMINAL:
            return descriptors[0]
        return None

    def signal(self, number: int) -> None:
        """Send the job a signal; nothing happens when it has ended already."""
        try:
            self._init.channel.send(messages.SIGNAL, bytes([number]))
        except BrokenPipeError:
            return

    def kill(self) -> None:
        """End every process of the container. By pidfd: a pid could by now be someone else's."""
        if self._reaped is None:
            signal.pidfd_send_signal(self._init.pidfd, signal.SIGKILL)

    def close(self) -> Reaped:
        """Kill what is left, wait until the kernel has taken the container down, and return what it used."""
        if self._reaped is None:
            self.kill()
            self._reaped = self._launcher.reap(self._init)
            os.close(self._init.pidfd)
            self._init.channel.close()
        return self._reaped


def step_failed(failure: Failure) -> StepFailedError:
    """Return the error that a failed step of isolation is to its caller, with the doctor's remedy for it."""
    from jhansi_runtime.remedies import ASK_DOCTOR, remedy_for  # noqa: PLC0415 - needed only when something is wrong

    remedy = remedy_for(failure.step, failure.errno) or ASK_DOCTOR
    return StepFailedError(failure.step, failure.detail, remedy=remedy)
