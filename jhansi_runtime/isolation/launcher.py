"""The launcher process: builds containers for a host that may have threads, secrets and much memory; it has none.

It obeys one request after the other: LAUNCH a container, on a channel that the host has made for it; REAP its init, and
say what the kernel accounted to it; RELEASE one that needs no account. It holds no state but its children, and dies
with them when the socket closes.
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
    kind, body, descriptors = channel.receive()
    if kind == messages.LAUNCH:
        init = Channel.of(descriptors[0])
        try:
            launch(Container(*marshal.loads(body)), init)  # noqa: S302 - written by the host, never by a job
        except BrokenPipeError:
            pass  # the host has given this container up already
        finally:
            init.close()
    elif kind == messages.REAP:
        channel.send(messages.REAPED, messages.encode_reaped(reap(messages.decode_pid(body))))
    elif kind == messages.RELEASE:
        reap(messages.decode_pid(body))
    return kind != b""
