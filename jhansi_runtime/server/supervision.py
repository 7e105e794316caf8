"""What a supervisor such as systemd is told: sd_notify(3) and its watchdog. Without one, nothing."""

import os
import socket
from collections.abc import Mapping
from typing import NamedTuple, Self

__all__ = ["Supervisor"]


class Supervisor(NamedTuple):
    """Where to tell it, None for nowhere; and every how many seconds it wants a sign of life, None for never."""

    address: str | None = None
    watchdog: float | None = None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Self:
        """The one that started this process, from NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID."""
        usec = environ.get("WATCHDOG_USEC", "")
        is_for_us = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        watchdog = int(usec) / 1_000_000 if usec.isdecimal() and is_for_us else 0
        return cls(environ.get("NOTIFY_SOCKET") or None, watchdog or None)

    def tell(self, state: str) -> None:
        """Tell it a state, such as READY=1. OSError: it is not there, or so busy that this would have to wait."""
        if self.address is None:
            return
        # "@" stands for the NUL that an abstract name begins with.
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as teller:
            teller.setblocking(False)
            teller.sendto(state.encode(), address)
