"""A slot: one container, ready ahead of its one exec, and the state it is in.

prepare -> wait -> run -> exit. `Slot(container)` prepares; `start` gives it the order; `receive` tells what init says;
`kill` ends everything in it at once; `close` reaps it. A slot runs one order, no more.

A cold exec makes its slot and orders at once; whoever has slots ahead waits until one `is_ready`, and it then waits for
its order as long as it has to.
"""

import os
import select
import signal
from contextlib import suppress
from enum import Enum
from types import TracebackType
from typing import NamedTuple, Self

from jhansi_runtime.engine.launcher import Launcher, Parent
from jhansi_runtime.errors import HostError, StepFailedError
from jhansi_runtime.isolation import channel as messages
from jhansi_runtime.isolation.channel import Container, Failure, Order, Outcome, Reaped

__all__ = ["BorrowedSlot", "Lent", "Progress", "Reaped", "Slot", "step_failed"]


class Progress(Enum):
    """How far a container has come that has not ended: init is cloned; it is built, and takes its order."""

    LAUNCHED = "launched"
    READY = "ready"


class Lent(NamedTuple):
    """A slot as another process takes it over: all that it knows, and that it has not ended.

    descriptors are those of its channel and of its init; then of its cgroup, if has_group; then, if is_ready, those of
    the filesystem of its /tmp and of its /proc. They remain the lender's.
    """

    container: Container
    has_interpreter: bool
    pid: int
    has_group: bool
    is_ready: bool
    descriptors: tuple[int, ...]


class Slot:
    """One container. A context manager: leaving it kills and reaps whatever is still there.

    group is a descriptor of its cgroup, None before it is launched and where it has none; proc is one of its /proc,
    once it is ready. has_interpreter: its job is the interpreter of its rootfs, which a zygote's are. has_ended: its
    outcome was received, and nothing is left in it but init, on its way out.
    """

    def __init__(
        self, container: Container, launcher: Launcher, *, has_interpreter: bool = False, begins_next: bool = True
    ) -> None:
        """Have a container launched. begins_next: the launcher is then to begin the one for the launch to come."""
        self.container = container
        self.has_interpreter = has_interpreter
        self._begins_next = begins_next
        self._launcher = launcher
        self._pid = self._pidfd = -1
        self._scratch = self.proc = -1
        self.group: int | None = None
        self._ordered = self.has_ended = False
        self._reaped: Reaped | None = None
        self._channel, theirs = messages.pair()
        try:
            self._parent = launcher.launch(container, theirs)
        except HostError:
            self._channel.close()
            raise
        finally:
            theirs.close()

    def lend(self) -> Lent:
        """Return what another process needs to take it over, who alone may use it then; we may still close it.

        HostError: it has ended before there was anything to lend.
        """
        while self._pidfd < 0:
            said = self.receive()
            if isinstance(said, Failure):
                raise step_failed(said)
            if said is None:
                raise HostError("init ended as it was launched", remedy="run: jhansi-run doctor")
        group = () if self.group is None else (self.group,)
        built = (self._scratch, self.proc) if self.is_ready else ()
        return Lent(
            container=self.container,
            has_interpreter=self.has_interpreter,
            pid=self._pid,
            has_group=bool(group),
            is_ready=bool(built),
            descriptors=(self.channel, self._pidfd, *group, *built),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def scratch_bytes(self) -> int:
        """Return how many bytes there are in /tmp, HOME and /dev/shm of a container that is ready."""
        status = os.statvfs(self._scratch)
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    @property
    def channel(self) -> int:
        """The descriptor that is readable when `receive` has something to tell."""
        return self._channel.fileno()

    @property
    def is_ready(self) -> bool:
        """Whether the container is built, and waits for nothing but its order."""
        return self.proc >= 0

    def has_died(self) -> bool:
        """Say whether the init of a slot that is ready has ended, which then has told nobody why."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def start(self, order: Order, streams: list[int]) -> None:
        """Give the container its order. It need not be ready: init reads the order when it is."""
        if self._ordered:
            raise HostError("a slot runs one order, and this one has had its own")
        self._ordered = True
        content = messages.write_order(order)
        try:
            with suppress(BrokenPipeError):  # init has failed, and receive() tells how
                self._channel.send(messages.ORDER, descriptors=(content, *streams))
        finally:
            os.close(content)

    def receive(self) -> Outcome | Failure | Progress | int | None:
        """Return what init says: how far it is, the master of the job's terminal, a failure or the outcome.

        None when it has ended without another word.
        """
        kind, body, descriptors = self._channel.receive()
        if kind == messages.LAUNCHED:
            self._pid = messages.decode_pid(body)
            self._pidfd, *group = descriptors
            self.group = group[0] if group else None
            return Progress.LAUNCHED
        if kind == messages.READY:
            self._scratch, self.proc = descriptors
            if self._begins_next:
                # Now, while this host and init have nothing to do but wait for the job.
                self._launcher.begin(self.container.processors)
            return Progress.READY
        if kind == messages.TERMINAL:
            return descriptors[0]
        if kind == messages.FAILED:
            return messages.decode_failure(body)
        if kind != messages.EXIT:
            return None
        self.has_ended = True
        return messages.decode_outcome(body)

    def signal(self, number: int) -> None:
        """Send the job a signal; nothing happens when it has ended already."""
        try:
            self._channel.send(messages.SIGNAL, bytes([number]))
        except BrokenPipeError:
            return

    def kill(self) -> None:
        """End every process of the container. By pidfd: a pid could by now be someone else's."""
        if self._is_launched():
            with suppress(ProcessLookupError):  # it has ended with its launcher, and somebody else has reaped it
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> Reaped:
        """Kill what is left, wait until the kernel has taken the container down, and return what it used.

        Nobody asks what one used that has_ended.
        """
        if self._reaped is None:
            self._reaped = Reaped(0.0, 0)
            if self._is_launched():
                if self.has_ended:
                    self._parent.release(self._pid)
                    _wait(self._pidfd)
                else:
                    self.kill()
                    self._reaped = self._parent.reap(self._pid)
                os.close(self._pidfd)
            for descriptor in (self._scratch, self.proc, self.group):
                if descriptor is not None and descriptor >= 0:
                    os.close(descriptor)
            self._channel.close()
        return self._reaped

    def _is_launched(self) -> bool:
        """Say whether there is an init. The launcher's first message tells, and may have to be waited for."""
        return self._pidfd >= 0 or self.receive() is Progress.LAUNCHED


class BorrowedSlot(Slot):
    """A slot of another process's, whose descriptors are ours now; parent reaps its init for us."""

    def __init__(self, lent: Lent, parent: Parent) -> None:
        self.container, self.has_interpreter = lent.container, lent.has_interpreter
        self._begins_next = False
        self._parent = parent
        channel, self._pidfd, *others = lent.descriptors
        self._channel = messages.Channel.of(channel)
        self._pid = lent.pid
        self.group = others.pop(0) if lent.has_group else None
        self._scratch, self.proc = others if lent.is_ready else (-1, -1)
        self._ordered = self.has_ended = False
        self._reaped = None


def _wait(pidfd: int) -> None:
    """Return when the process has ended and its namespaces are gone, reaped or not (pidfd_open(2))."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll()


def step_failed(failure: Failure) -> StepFailedError:
    """Return the error that a failed step of isolation is to its caller, with the doctor's remedy for it."""
    from jhansi_runtime.remedies import ASK_DOCTOR, remedy_for  # noqa: PLC0415 - needed only when something is wrong

    remedy = remedy_for(failure.step, failure.errno) or ASK_DOCTOR
    return StepFailedError(failure.step, failure.detail, remedy=remedy)
