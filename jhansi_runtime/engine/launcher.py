"""Who builds the containers: a launcher process, or this very process where it has one thread and little memory.

Both offer the same verbs, and a Slot does not tell them apart.
"""

import _thread
import errno
import os
import select
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, TypeVar

from jhansi_runtime.engine.delegation import Delegation, delegate, none
from jhansi_runtime.errors import HostError
from jhansi_runtime.isolation import cgroup
from jhansi_runtime.isolation import channel as messages
from jhansi_runtime.isolation.channel import Channel, Container, Failure, Reaped, Zygote
from jhansi_runtime.isolation.spawn import Spawned, spawn

__all__ = ["Connection", "InProcess", "Launcher", "LauncherProcess", "Parent"]

_Answer = TypeVar("_Answer")

_ATTEMPTS = 2  # the first may find that the launcher has died since it was last used


class Parent(Protocol):
    """Whose child an init is, and who alone can wait for it: no launcher that is started after it."""

    def reap(self, pid: int) -> Reaped:
        """Wait until the kernel has taken a killed container down, and return what it used."""

    def release(self, pid: int) -> None:
        """See that an init is reaped that is ending by itself; this need not wait for it."""


class Launcher(Protocol):
    """What a Slot needs: someone to clone init."""

    def delegation(self) -> Delegation:
        """Return where this launcher makes the cgroups of containers, or why it makes none."""

    def launch(self, container: Container, channel: Channel) -> Parent:
        """Begin a container whose init talks over `channel`; how it goes is told there. Return init's parent."""

    def begin(self, busy: tuple[int, ...]) -> None:
        """Prepare for the next launch, if that is to be done ahead, off the CPUs that are busy; this does not wait."""

    def close(self) -> None:
        """End the launcher, and every container of its; wait() returns when it has ended."""

    def wait(self) -> None:
        """See close."""


class InProcess:
    """This process is the launcher: it must have one thread, and is copied for each container with all it holds."""

    def delegation(self) -> Delegation:
        """See Launcher. To hand controllers down this process would have to be moved, which its owner has not asked."""
        return none("this process is its own launcher", remedy="let a launcher process build the containers")

    def launch(self, container: Container, channel: Channel) -> Parent:
        """See Launcher."""
        from jhansi_runtime.isolation.launch import launch  # noqa: PLC0415 - a launcher process loads it elsewhere

        launch(container, channel)
        return self

    def begin(self, busy: tuple[int, ...]) -> None:
        """See Launcher. Whoever is a launcher by the way does nothing ahead."""

    def reap(self, pid: int) -> Reaped:
        """See Parent."""
        from jhansi_runtime.isolation.launch import reap  # noqa: PLC0415 - likewise

        return reap(pid)

    def release(self, pid: int) -> None:
        """See Parent. Here somebody has to wait."""
        self.reap(pid)

    def close(self) -> None:
        """Nothing to end."""

    def wait(self) -> None:
        """Nothing to wait for."""


class Connection:
    """Requests to somebody who launches, over a channel: the parent of what it launches (Parent).

    May be used by several threads.

    BrokenPipeError where whoever launches is gone, and a container is wanted of it.
    """

    def __init__(self, channel: Channel) -> None:
        self._mutex = _thread.allocate_lock()
        self._channel: Channel | None = channel

    def launch(self, container: Container, channel: Channel) -> Parent:
        """See Launcher."""
        self._send(messages.LAUNCH, messages.encode_container(container), (channel.fileno(),))
        return self

    def launch_zygote(self, zygote: Zygote, channel: Channel) -> Parent:
        """Start a zygote that talks over `channel`; how it goes is told there. Return its parent."""
        self._send(messages.ZYGOTE, messages.encode_zygote(zygote), (channel.fileno(),))
        return self

    def begin(self, busy: tuple[int, ...]) -> None:
        """See Launcher."""
        with suppress(BrokenPipeError):
            self._send(messages.BEGIN, messages.encode_processors(busy))

    def reap(self, pid: int) -> Reaped:
        """See Parent. The kernel has reaped an init whose launcher is gone, and tells nobody what it used."""
        with suppress(BrokenPipeError):
            kind, body = self._ask(messages.REAP, messages.encode_pid(pid))
            if kind == messages.REAPED:
                return messages.decode_reaped(body)
        return Reaped(0.0, 0)

    def release(self, pid: int) -> None:
        """See Parent."""
        with suppress(BrokenPipeError):
            self._send(messages.RELEASE, messages.encode_pid(pid))

    def delegate(self, base: str) -> Failure:
        """Have the cgroups of containers made below that one. A failure without an errno is none."""
        kind, body = self._ask(messages.DELEGATE, os.fsencode(base))
        if kind != messages.DELEGATED:
            raise BrokenPipeError(errno.EPIPE, "the launcher has died")
        return messages.decode_failure(body)

    def has_ended(self) -> bool:
        """Say whether whoever launches is gone: its end of the channel is closed before its children know."""
        if not self._mutex.acquire(blocking=False):
            return False  # whoever talks to it now may have to wait, and will notice
        try:
            if self._channel is None:
                return True
            poll = select.poll()
            poll.register(self._channel.fileno(), select.POLLRDHUP)
            return bool(poll.poll(0))
        finally:
            self._mutex.release()

    def close(self) -> None:
        """Leave whoever launches, which ends it."""
        with self._mutex:
            if self._channel is not None:
                self._channel.close()
                self._channel = None

    def _send(self, kind: bytes, body: bytes = b"", descriptors: tuple[int, ...] = ()) -> None:
        with self._mutex:
            self._open().send(kind, body, descriptors)

    def _ask(self, kind: bytes, body: bytes) -> tuple[bytes, bytes]:
        with self._mutex:
            channel = self._open()
            channel.send(kind, body)
            answer, text, _ = channel.receive()
        return answer, text

    def _open(self) -> Channel:
        if self._channel is None:
            raise BrokenPipeError(errno.EPIPE, "whoever launches has been left")
        return self._channel


class LauncherProcess:
    """A process of its own, started at the first launch or handed over as `spawned`. May be used by several threads.

    One that has died is started again at the next launch; its containers died with it. ahead: as soon as a container is
    built, another is begun for the launch to come; not for a caller who wants no more than one. delegate finds the
    cgroup for the containers of a launcher of that pid; by default delegation.delegate does.
    """

    def __init__(
        self,
        spawned: Spawned | None = None,
        *,
        ahead: bool = True,
        delegate: Callable[[int], Delegation] = delegate,
    ) -> None:
        self._mutex = _thread.allocate_lock()
        self._ahead = ahead
        self._delegate = delegate
        self._delegation: Delegation | None = None
        self._pid = -1
        self._started = 0
        self._connection: Connection | None = None
        if spawned is not None:
            self._adopt(spawned)

    def delegation(self) -> Delegation:
        """See Launcher. The launcher is started for it, if it has not been."""
        return self._attempt(lambda _, delegation: delegation)

    def launch(self, container: Container, channel: Channel) -> Parent:
        """See Launcher. This does not wait: the launcher clones while the caller goes on."""
        return self._attempt(lambda connection, _: connection.launch(container, channel))

    def launch_zygote(self, zygote: Zygote, channel: Channel) -> Parent:
        """Start a zygote that talks over `channel`; how it goes is told there. Return its parent."""
        return self._attempt(lambda connection, _: connection.launch_zygote(zygote, channel))

    def generation(self) -> int:
        """Return which of the launchers that were started lives, counted from 1; 0 for none.

        What descends from another has ended, or is about to.
        """
        connection, number = self._connection, self._started
        return 0 if connection is None or connection.has_ended() else number

    def begin(self, busy: tuple[int, ...]) -> None:
        """See Launcher."""
        connection = self._connection
        if self._ahead and connection is not None:
            connection.begin(busy)

    def close(self) -> None:
        """See Launcher."""
        with self._mutex:
            self._leave()

    def wait(self) -> None:
        """See Launcher."""
        with self._mutex:
            self._reap()

    def _attempt(self, act: Callable[[Connection, Delegation], _Answer]) -> _Answer:
        """Do something with the launcher there is, or else with a new one."""
        with self._mutex:  # one caller alone finds that it has died, and none ends the new one
            for _ in range(_ATTEMPTS):
                with suppress(BrokenPipeError):
                    connection = self._connection or self._adopt(_spawn())
                    return act(connection, self._delegated(connection))
                self._leave()
                self._reap()
        raise HostError("the launcher dies as soon as it is started", remedy="run: jhansi-run doctor")

    def _leave(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _reap(self) -> None:
        if self._pid > 0:
            with suppress(ChildProcessError):  # a host that ignores SIGCHLD has no children to wait for
                os.waitpid(self._pid, 0)
            self._pid = -1
            if self._delegation is not None and self._delegation.base is not None:
                _sweep(self._delegation.base)
            self._delegation = None

    def _adopt(self, spawned: Spawned) -> Connection:
        self._pid = spawned.pid
        self._started += 1
        self._connection = Connection(Channel(spawned.socket))
        return self._connection

    def _delegated(self, connection: Connection) -> Delegation:
        """Return the delegation of the launcher there is, which is asked for once."""
        if self._delegation is None:
            found = self._delegate(self._pid)
            if found.base is not None:
                failure = connection.delegate(found.base)
                if failure.errno:
                    found = none(f"the cgroup {found.base} cannot be used: {failure.detail}", found.remedy)
            self._delegation = found
        return self._delegation


def _sweep(base: str) -> None:
    """Remove what the launcher has left of its cgroups: it was in one itself. systemd removes its scope on its own."""
    try:
        cgroup.sweep(base)
    except OSError as error:
        if error.errno not in {errno.ENOENT, errno.ENODEV}:
            raise


def _spawn() -> Spawned:
    try:
        return spawn()
    except OSError as error:
        from jhansi_runtime.remedies import remedy_for  # noqa: PLC0415 - needed only when something is wrong

        raise HostError(
            f"the launcher cannot be started: {error}", remedy=remedy_for("fork", error.errno or 0)
        ) from error
