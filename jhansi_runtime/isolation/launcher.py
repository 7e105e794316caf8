"""The launcher process: builds containers for a host that may have threads, secrets and much memory; it has none.

It answers one request after the other: LAUNCH a container, and pass on the pidfd and the channel of its init; REAP
that init, and say what the kernel accounted to it. It holds no state but its children, and dies with them when the
socket closes.
"""

import _socket
import gc
import marshal
import os
from typing import NoReturn

from jhansi_runtime.isolation import channel as messages
from jhansi_runtime.isolation.channel import Channel, Container
from jhansi_runtime.isolation.launch import launch, reap
from jhansi_runtime.isolation.spawn import CONNECTION
from jhansi_runtime.isolation.steps import StepError
from jhansi_runtime.isolation.syscalls import close_range

__all__ = ["main"]


def main() -> NoReturn:
    """Be a launcher, until whoever started it is gone."""
    close_range(CONNECTION + 1)
    os.chdir("/")
    gc.disable()
    channel = Channel(_socket.socket(fileno=CONNECTION))
    try:
        while _answer(channel):
            pass
    except BrokenPipeError:
        pass  # the host is gone
    os._exit(0)


def _answer(channel: Channel) -> bool:
    kind, body, _ = channel.receive()
    if kind == messages.LAUNCH:
        _launch(channel, Container(*marshal.loads(body)))  # noqa: S302 - written by the host, never by a job
    elif kind == messages.REAP:
        channel.send(messages.REAPED, messages.encode_reaped(reap(messages.decode_pid(body))))
    return kind != b""


def _launch(channel: Channel, container: Container) -> None:
    try:
        init = launch(container)
    except StepError as error:
        channel.send(messages.FAILED, messages.encode_failure(error.failure))
        return
    try:
        channel.send(messages.LAUNCHED, messages.encode_pid(init.pid), (init.pidfd, init.channel.fileno()))
    finally:
        os.close(init.pidfd)
        init.channel.close()
