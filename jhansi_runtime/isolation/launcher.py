"""The launcher process: builds containers for a host that may have threads, secrets and much memory; it has none.

It obeys one request after the other: LAUNCH a container, on a channel that the host has made for it; REAP its init, and
say what the kernel accounted to it; RELEASE one that needs no account; BEGIN a container that the next LAUNCH takes.
It holds no state but that one and its children, and dies with them when the socket closes.
"""

import _socket
import gc
import os
from contextlib import suppress
from typing import NoReturn

from jhansi_runtime.isolation import channel as messages
from jhansi_runtime.isolation.channel import Channel
from jhansi_runtime.isolation.idmap import host_id_by_default
from jhansi_runtime.isolation.launch import Begun, begin, end, launch, reap
from jhansi_runtime.isolation.spawn import CONNECTION
from jhansi_runtime.isolation.steps import StepError
from jhansi_runtime.isolation.syscalls import close_range

__all__ = ["main"]


def main(*, ahead: bool = False) -> NoReturn:
    """Be a launcher, until whoever started it is gone. ahead: the first request will be to launch."""
    close_range(CONNECTION + 1)
    os.chdir("/")
    gc.disable()
    channel = Channel(_socket.socket(fileno=CONNECTION))
    begun = _begin(None) if ahead else None
    with suppress(BrokenPipeError):  # the host is gone
        while True:
            kind, body, descriptors = channel.receive()
            if kind == messages.BEGIN:
                begun = _begin(begun)
            elif kind == messages.LAUNCH:
                _launch(body, Channel.of(descriptors[0]), begun)
                begun = None
            elif kind == messages.REAP:
                channel.send(messages.REAPED, messages.encode_reaped(reap(messages.decode_pid(body))))
            elif kind == messages.RELEASE:
                reap(messages.decode_pid(body))
            else:
                break
    if begun is not None:
        end(begun)
    os._exit(0)


def _begin(begun: Begun | None) -> Begun | None:
    with suppress(StepError):  # the launch tries again, and tells why it cannot be
        return begun or begin(host_id_by_default())
    return None


def _launch(body: bytes, init: Channel, begun: Begun | None) -> None:
    try:
        launch(messages.decode_container(body), init, begun)
    except BrokenPipeError:
        pass  # the host has given this container up already
    finally:
        init.close()
