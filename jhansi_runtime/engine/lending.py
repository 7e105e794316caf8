"""Slots of one process for the execs of another: a server lends those of its pool to the command lines beside it.

Over a *door*, one end of a SOCK_SEQPACKET socket that both have inherited, a borrower passes one end of a connection of
its own; any number of borrowers may share their end of the door. Over the connection it borrows one slot after the
other: the slot's descriptors are passed to it, and it runs its exec in it as in one of its own, but for the end, which
is the lender's: init is its launcher's child. A borrower that is gone has its slot killed.
"""

import marshal
import threading
from _socket import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

from jhansi_runtime.engine.delegation import Delegation
from jhansi_runtime.engine.slot import BorrowedSlot, Lent, Slot
from jhansi_runtime.engine.slots import Slots, Wanted
from jhansi_runtime.errors import HostError
from jhansi_runtime.isolation import channel as messages
from jhansi_runtime.isolation.cgroup import Limits
from jhansi_runtime.isolation.channel import Channel, Reaped, Zygote

__all__ = ["BorrowedSlots", "Lender"]

_CONNECT = b"k"  # over the door (descriptor: the lender's end of a connection)
_DELEGATION = b"g"  # borrower: where are cgroups made? Lender: there
_TAKE = b"l"  # borrower: a slot for this exec. Lender: here it is (its descriptors)
_REFUSED = b"f"  # lender: there is none, and why
_RELEASE = b"q"  # borrower: the slot's outcome has been received
_REAP = b"w"  # borrower: kill it, and tell what it used
_REAPED = b"e"  # lender: this


class Lender:
    """Lends slots through a door, by a thread for each connection, until no end of it is left."""

    def __init__(self, slots: Slots, door: socket) -> None:
        self._slots = slots
        self._door = Channel(door)
        threading.Thread(target=self._open, name="jhansi-lender", daemon=True).start()

    def _open(self) -> None:
        with closing(self._door):
            while (message := self._door.receive())[0] == _CONNECT:
                channel = Channel.of(message[2][0])
                threading.Thread(target=self._lend, args=(channel,), name="jhansi-slot", daemon=True).start()

    def _lend(self, channel: Channel) -> None:
        with closing(channel), suppress(BrokenPipeError):  # the borrower is gone, and its slot closed on the way here
            while True:
                kind, body, _ = channel.receive()
                if kind not in {_DELEGATION, _TAKE}:
                    return
                try:
                    if kind == _DELEGATION:
                        channel.send(kind, marshal.dumps(tuple(self._slots.delegation())))
                    else:
                        self._lend_one(channel, _decode_wanted(body))
                except HostError as error:
                    channel.send(_REFUSED, marshal.dumps((error.message, error.remedy)))

    def _lend_one(self, channel: Channel, wanted: Wanted) -> None:
        with self._slots.taken(wanted) as slot:
            lent = slot.lend()
            channel.send(_TAKE, _encode_lent(lent), lent.descriptors)
            kind, _, _ = channel.receive()
            if kind == _RELEASE:
                slot.has_ended = True
            elif kind == _REAP:
                channel.send(_REAPED, messages.encode_reaped(slot.close()))


class BorrowedSlots:
    """The slots of a lender (engine.Slots), for one exec at a time; and the parent of their inits (Parent).

    The connection is made at once; BrokenPipeError where the lender is gone by then, HostError where it is later.
    """

    def __init__(self, door: Channel) -> None:
        self._channel, theirs = messages.pair()
        with closing(theirs):
            door.send(_CONNECT, descriptors=(theirs.fileno(),))

    def delegation(self) -> Delegation:
        """See Slots."""
        body, _ = self._ask(_DELEGATION)
        return Delegation(*_decoded(body))

    @contextmanager
    def taken(self, wanted: Wanted) -> Iterator[Slot]:
        """See Slots."""
        body, descriptors = self._ask(_TAKE, _encode_wanted(wanted))
        with BorrowedSlot(_decode_lent(body, descriptors), self) as slot:
            yield slot

    def figures(self) -> None:
        """See Slots. The lender knows."""

    def close(self) -> None:
        """See Slots: what is taken is ended."""
        self._channel.close()

    def wait(self) -> None:
        """See Slots. The lender sees to it."""

    def reap(self, pid: int) -> Reaped:
        """See Parent."""
        del pid  # of the one slot that this connection has
        with suppress(BrokenPipeError):
            self._channel.send(_REAP)
            kind, body, _ = self._channel.receive()
            if kind == _REAPED:
                return messages.decode_reaped(body)
        return Reaped(0.0, 0)

    def release(self, pid: int) -> None:
        """See Parent."""
        del pid
        with suppress(BrokenPipeError):
            self._channel.send(_RELEASE)

    def _ask(self, kind: bytes, body: bytes = b"") -> tuple[bytes, list[int]]:
        with suppress(BrokenPipeError):
            self._channel.send(kind, body)
            answered, answer, descriptors = self._channel.receive()
            if answered == kind:
                return answer, descriptors
            if answered == _REFUSED:
                message, remedy = _decoded(answer)
                raise HostError(message, remedy=remedy)
        raise HostError("the server that has the containers is gone")


def _encode_wanted(wanted: Wanted) -> bytes:
    """Return it as marshal takes it, which knows no records."""
    zygote = None if wanted.zygote is None else tuple(wanted.zygote)
    return marshal.dumps(tuple(wanted._replace(limits=tuple(wanted.limits), zygote=zygote)))  # type: ignore[arg-type] # see above


def _decode_wanted(body: bytes) -> Wanted:
    wanted = Wanted(*_decoded(body))
    zygote = None if wanted.zygote is None else Zygote(*wanted.zygote)
    return wanted._replace(limits=Limits(*wanted.limits), zygote=zygote)


def _encode_lent(lent: Lent) -> bytes:
    container = messages.encode_container(lent.container)
    return marshal.dumps((container, lent.has_interpreter, lent.pid, lent.has_group, lent.is_ready))


def _decode_lent(body: bytes, descriptors: list[int]) -> Lent:
    container, has_interpreter, pid, has_group, is_ready = _decoded(body)
    return Lent(messages.decode_container(container), has_interpreter, pid, has_group, is_ready, tuple(descriptors))


def _decoded(body: bytes) -> Any:  # noqa: ANN401 - whatever the other end, which is this code, has encoded
    return marshal.loads(body)  # noqa: S302 - written by this module, never by a job
