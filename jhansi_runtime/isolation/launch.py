"""The launcher's side of a container: clone init, map its ids, and hold what is needed to talk to it and to end it."""

import errno
import os
import signal
from functools import cache

from jhansi_runtime.isolation import channel as messages
from jhansi_runtime.isolation import idmap, inside
from jhansi_runtime.isolation.channel import Channel, Container, Reaped
from jhansi_runtime.isolation.steps import StepError, step
from jhansi_runtime.isolation.syscalls import (
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    clone3,
    command_line_span,
)

__all__ = ["NAMESPACES", "launch", "reap"]

NAMESPACES = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP


def launch(container: Container, channel: Channel) -> None:
    """Begin a container whose init talks over `channel`: LAUNCHED with its pid and pidfd, or FAILED, comes first there.

    Whoever calls this must have one thread, must reap the pid, and takes the container along when it dies.
    """
    try:
        _clone(container, channel)
    except StepError as error:
        channel.send(messages.FAILED, messages.encode_failure(error.failure))


def reap(pid: int) -> Reaped:
    """Wait for an init that is ending, and return what the kernel accounted to its container."""
    _, _, usage = os.wait4(pid, 0)
    return Reaped(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def _clone(container: Container, channel: Channel) -> None:
    with step("one thread"):
        _require_one_thread()
    command_line = _command_line()
    with step("channel"):
        readable, writable = os.pipe2(os.O_CLOEXEC)
    pid = pidfd = -1
    begun = False
    try:
        with step("namespaces"):
            pid, pidfd = clone3(NAMESPACES)
        if pid == 0:
            inside.main(container, channel, readable, command_line)
        with step("id map"):
            idmap.map_from_parent(pid, container.host_id)
            channel.send(messages.LAUNCHED, messages.encode_pid(pid), (pidfd,))
            os.write(writable, inside.MAPPED)
        begun = True
    finally:
        os.close(readable)
        os.close(writable)
        if not begun:
            _end(pid, pidfd)
    os.close(pidfd)


@cache
def _command_line() -> tuple[int, int]:
    return command_line_span()


def _require_one_thread() -> None:
    # A lock that another thread holds at the clone stays held in init, which then hangs at its first allocation.
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise OSError(errno.EDEADLK, f"this process has {threads} threads, and a container is cloned from one alone")


def _end(pid: int, pidfd: int) -> None:
    if pid > 0:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(pidfd)
