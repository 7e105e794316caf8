"""Zygotes, as the host sees them: launchers whose containers have the interpreter of a rootfs running already.

A zygote takes the time of an interpreter's start and of what it preloads, once; whoever wants a container of it
meanwhile is told that it is not ready. One that has died is not started again here: its owner does that.
"""

import os
import select
import signal
from contextlib import suppress

from jhansi_runtime.engine.delegation import Delegation
from jhansi_runtime.engine.launcher import Connection, LauncherProcess, Parent
from jhansi_runtime.engine.slot import step_failed
from jhansi_runtime.errors import HostError
from jhansi_runtime.isolation import channel as messages
from jhansi_runtime.isolation import mounts
from jhansi_runtime.isolation.channel import Channel, Container, Zygote

__all__ = ["ZygoteProcess"]


class ZygoteProcess:
    """A zygote (engine.Launcher). May be used by several threads.

    HostError where it cannot be started.
    """

    def __init__(self, zygote: Zygote, launcher: LauncherProcess) -> None:
        self._delegation = launcher.delegation()
        ours, theirs = messages.pair()
        try:
            self._parent = launcher.launch_zygote(zygote, theirs)
        except HostError:
            ours.close()
            raise
        finally:
            theirs.close()
        kind, body, descriptors = ours.receive()
        if kind != messages.LAUNCHED:
            ours.close()
            raise _failed(kind, body)
        self._pid, self._pidfd = messages.decode_pid(body), descriptors[0]
        self._channel = ours
        self._connection = Connection(ours)
        self._skipped: tuple[str, ...] | None = None

    @property
    def pid(self) -> int:
        """Its number among the processes of the host, and nobody else's before wait() has returned."""
        return self._pid

    @property
    def pidfd(self) -> int:
        """A descriptor that is readable once it has died."""
        return self._pidfd

    @property
    def channel(self) -> int:
        """The descriptor that is readable when await_ready will not have to wait."""
        return self._channel.fileno()

    def await_ready(self) -> tuple[str, ...]:
        """Wait until it has loaded all it is to; return what of it could not be imported. HostError: it cannot be."""
        if self._skipped is None:
            kind, body, _ = self._channel.receive()
            if kind != messages.READY:
                raise _failed(kind, body)
            self._skipped = tuple(name for name in body.decode().split(",") if name)
        return self._skipped

    def delegation(self) -> Delegation:
        """See Launcher."""
        return self._delegation

    def launch(self, container: Container, channel: Channel) -> Parent:
        """See Launcher. The container is one of the zygote's rootfs and workspaces. HostError: the zygote has died."""
        try:
            return self._connection.launch(_as_seen_within(container), channel)
        except BrokenPipeError:
            raise HostError("the zygote has died") from None

    def has_ended(self) -> bool:
        """Say whether it has died."""
        return self._connection.has_ended()

    def begin(self, busy: tuple[int, ...]) -> None:
        """See Launcher."""
        self._connection.begin(busy)

    def close(self) -> None:
        """End it, and with it every container of its."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)  # first: somebody may be waiting for its answer
        self._connection.close()
        self._parent.release(self._pid)

    def wait(self) -> None:
        """See Launcher: it has ended once its pidfd says so."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        poll.poll()
        os.close(self._pidfd)


def _as_seen_within(container: Container) -> Container:
    binds = tuple((f"/{mounts.zygotes_bind(number)}", target) for number, (_, target) in enumerate(container.binds))
    return container._replace(
        tree=f"/{mounts.ZYGOTES_TREE}", workspaces=f"/{mounts.ZYGOTES_WORKSPACES}", binds=binds, host_id=None
    )


def _failed(kind: bytes, body: bytes) -> HostError:
    if kind == messages.FAILED:
        return step_failed(messages.decode_failure(body))
    return HostError("the zygote ended as it was started")
