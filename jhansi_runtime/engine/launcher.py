"""Who builds the containers: a launcher process, or this very process where it has one thread and little memory.

Both offer the same two verbs, launch and reap, and a Slot does not tell them apart.
"""

import _thread
import marshal
import os
from contextlib import suppress
from typing import Protocol

from jhansi_runtime.errors import HostError
from jhansi_runtime.isolation import channel as messages
from jhansi_runtime.isolation.channel import Channel, Container, Init, Reaped
from jhansi_runtime.isolation.spawn import Spawned, spawn
from jhansi_runtime.isolation.steps import StepError

__all__ = ["InProcess", "Launcher", "LauncherProcess"]


class Launcher(Protocol):
    """What a Slot needs: someone to clone init, and later to wait for it, as only its parent can."""

    def launch(self, container: Container) -> Init:
        """Begin a container. StepError when the kernel refuses; HostError when there is nobody to ask."""

    def reap(self, init: Init) -> Reaped:
        """Wait until the kernel has taken a killed container down, and return what it used."""

    def close(self) -> None:
        """End the launcher, and every container of its."""


class InProcess:
    """This process is the launcher: it must have one thread, and is copied for each container with all it holds."""

    def launch(self, container: Container) -> Init:
        """See Launcher."""
        from jhansi_runtime.isolation.launch import launch  # noqa: PLC0415 - a launcher process loads it elsewhere

        return launch(container)

    def reap(self, init: Init) -> Reaped:
        """See Launcher."""
        from jhansi_runtime.isolation.launch import reap  # noqa: PLC0415 - likewise

        return reap(init.pid)

    def close(self) -> None:
        """Nothing to end."""


class LauncherProcess:
    """A process of its own, started at the first launch or handed over as `spawned`. May be used by several threads.

    One that has died is started again at the next launch; its containers died with it.
    """

    def __init__(self, spawned: Spawned | None = None) -> None:
        self._mutex = _thread.allocate_lock()
        self._pid = -1
        self._channel: Channel | None = None
        if spawned is not None:
            self._adopt(spawned)

    def launch(self, container: Container) -> Init:
        """See Launcher."""
        with self._mutex:
            if self._channel is None:
                self._adopt(spawn())
            kind, body, descriptors = self._ask(messages.LAUNCH, marshal.dumps(tuple(container)))
        if kind == messages.FAILED:
            raise StepError(messages.decode_failure(body))
        pidfd, channel = descriptors
        return Init(messages.decode_pid(body), pidfd, Channel.of(channel))

    def reap(self, init: Init) -> Reaped:
        """See Launcher. An init whose launcher is gone was reaped by the kernel: nothing is known of what it used."""
        with self._mutex, suppress(HostError):
            if self._channel is not None:
                return messages.decode_reaped(self._ask(messages.REAP, messages.encode_pid(init.pid))[1])
        return Reaped(0.0, 0)

    def close(self) -> None:
        """End the launcher, and every container of its."""
        with self._mutex:
            self._end()

    def _adopt(self, spawned: Spawned) -> None:
        self._pid, self._channel = spawned.pid, Channel(spawned.socket)

    def _ask(self, kind: bytes, body: bytes) -> tuple[bytes, bytes, list[int]]:
        assert self._channel is not None  # noqa: S101 - whoever asks has looked
        with suppress(BrokenPipeError):  # then there is no answer either
            self._channel.send(kind, body)
        answer = self._channel.receive()
        if not answer[0]:
            self._end()
            raise HostError("the launcher has died; every exec of its has ended", remedy="run it again")
        return answer

    def _end(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
            with suppress(ChildProcessError):  # a host that ignores SIGCHLD has no children to wait for
                os.waitpid(self._pid, 0)
