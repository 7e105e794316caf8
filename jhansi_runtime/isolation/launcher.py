"""The launcher process: builds containers for a host that may have threads, secrets and much memory; it has none.

It obeys one request after the other: LAUNCH a container, on a channel that the host has made for it; REAP its init, and
say what the kernel accounted to it; RELEASE one that needs no account; BEGIN a container that the next LAUNCH takes;
start a ZYGOTE, which then obeys the same requests on a channel of its own; DELEGATE: have every container from now on
in a cgroup of its own. It holds no state but its children, the one begun ahead and the branch of the cgroup tree that
they are in, and dies with them when the socket closes.
"""

import _socket
import gc
import os
from contextlib import suppress
from typing import NoReturn

import prctl

from jhansi_runtime.isolation import cgroup, processors
from jhansi_runtime.isolation import channel as messages
from jhansi_runtime.isolation.cgroup import Branch, Group
from jhansi_runtime.isolation.channel import Channel, Failure, Reaped
from jhansi_runtime.isolation.idmap import host_id_by_default
from jhansi_runtime.isolation.inside import EXECUTED, StartJob
from jhansi_runtime.isolation.launch import Begun, begin, end, launch, launch_zygote, reap
from jhansi_runtime.isolation.spawn import CONNECTION
from jhansi_runtime.isolation.steps import StepError
from jhansi_runtime.isolation.syscalls import close_range

__all__ = ["Launcher", "main"]


def main(*, ahead: bool = False) -> NoReturn:
    """Be a launcher, until whoever started it is gone. ahead: the first request will be to launch."""
    close_range(CONNECTION + 1)
    os.chdir("/")
    prctl.set_dumpable(0)
    gc.disable()
    launcher = Launcher(host_id_by_default())
    if ahead:
        launcher.begin()
    launcher.serve(Channel(_socket.socket(fileno=CONNECTION)))
    os._exit(0)


class Launcher:
    """Whose children the containers are: the cgroup of each is there until its init is reaped, and no longer.

    host_id is whom the sandbox of a container begun ahead is outside, start_job how its init comes by its job; branch
    is where cgroups are made from the start.
    """

    def __init__(self, host_id: int | None, start_job: StartJob = EXECUTED, branch: Branch | None = None) -> None:
        self._host_id = host_id
        self._start_job = start_job
        self._begun: Begun | None = None
        self._branch = branch
        self._groups: dict[int, Group] = {}
        processors.remember()

    def serve(self, channel: Channel) -> None:
        """Do what is asked for, until there is nobody left to ask."""
        with suppress(BrokenPipeError):  # the host is gone
            while self.obey(channel):
                pass
        self.give_up()

    def obey(self, channel: Channel) -> bool:
        """Do what the next message asks for. False at the end."""
        kind, body, descriptors = channel.receive()
        if kind == messages.BEGIN:
            processors.prefer((), busy=messages.decode_processors(body))
            self.begin()
        elif kind == messages.LAUNCH:
            self._launch(body, Channel.of(descriptors[0]))
        elif kind == messages.ZYGOTE:
            self._launch_zygote(body, Channel.of(descriptors[0]))
        elif kind == messages.REAP:
            channel.send(messages.REAPED, messages.encode_reaped(self._reap(messages.decode_pid(body))))
        elif kind == messages.RELEASE:
            self._reap(messages.decode_pid(body))
        elif kind == messages.DELEGATE:
            channel.send(messages.DELEGATED, messages.encode_failure(self._delegate(os.fsdecode(body))))
        else:
            return False
        return True

    def begin(self) -> None:
        """Begin a container ahead, if none is."""
        with suppress(StepError):  # the launch tries again, and tells why it cannot be
            self._begun = self._begun or begin(self._host_id, self._branch, self._start_job)

    def give_up(self) -> None:
        """End the container that was begun ahead."""
        if self._begun is not None:
            end(self._begun, self._branch)

    def _launch(self, body: bytes, init: Channel) -> None:
        container = messages.decode_container(body)
        processors.prefer(container.built_on)
        begun, self._begun = self._begun, None
        try:
            launched = launch(container, init, begun, self._branch, self._start_job)
        except BrokenPipeError:
            return  # the host has given this container up already
        finally:
            init.close()
        if launched is not None and launched.group is not None:
            self._groups[launched.pid] = launched.group

    def _launch_zygote(self, body: bytes, zygote: Channel) -> None:
        processors.prefer(())
        with suppress(BrokenPipeError):  # the host has given it up already
            launch_zygote(messages.decode_zygote(body), zygote, self._branch)
        zygote.close()

    def _reap(self, pid: int) -> Reaped:
        reaped = reap(pid)
        if self._branch is not None and pid in self._groups:
            # Should something in it not die, it is the next launcher that cannot sweep it away, and says so. This one
            # has other containers.
            with suppress(OSError):
                cgroup.remove(self._branch, self._groups.pop(pid))
        return reaped

    def _delegate(self, base: str) -> Failure:
        """Move into a branch of the base. Return why that cannot be; the failure without an errno is none."""
        self.give_up()  # it was begun in no cgroup of its own
        self._begun = None
        try:
            self._branch = cgroup.branch(base)
        except OSError as error:
            return Failure("cgroup", error.errno or 0, str(error))
        return Failure("cgroup", 0, "")
