"""What a cloned process does first: let go of everything that was the launcher's."""

import gc
import os
import signal

import prctl

from jhansi_runtime.isolation import signals
from jhansi_runtime.isolation.syscalls import close_range

__all__ = ["detach"]


def detach(keep: tuple[int, ...]) -> None:
    """Close every descriptor but `keep`, lead a session of one's own, die with the parent, handle no signal."""
    gc.disable()  # a collection would run the launcher's finalizers in the wrong process
    prctl.set_pdeathsig(signal.SIGKILL)
    os.setsid()
    os.umask(0)
    signals.reset()
    null = os.open("/dev/null", os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    first = 3
    for descriptor in sorted(keep):
        close_range(first, descriptor - 1)
        first = descriptor + 1
    close_range(first)
