"""Start a launcher: a fresh interpreter with one thread, an empty environment and nothing of its starter's in reach.

This imports next to nothing, so that a command can start its launcher first of all and load the rest meanwhile.
"""

import _socket
import os
import sys
from typing import NamedTuple

__all__ = ["CONNECTION", "Spawned", "spawn"]

CONNECTION = 3  # the launcher's descriptor of its end of the socket
_PROGRAM = """import sys
ahead, *sys.path[:] = sys.argv[1:]
from jhansi_runtime.isolation.launcher import main
main(ahead=bool(ahead))
"""


class Spawned(NamedTuple):
    """A launcher that is starting: its pid, and our end of a SOCK_SEQPACKET socket to it."""

    pid: int
    socket: _socket.socket


def spawn(*, ahead: bool = False) -> Spawned:
    """Start a launcher. It ends when our end of the socket is closed, and every container of its with it.

    ahead: it begins a container at once, for the launch that is to come.
    """
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    try:
        # Isolated from the environment and from site's start-up files. It finds modules where we do, but for the
        # working directory, in which anyone may have put something.
        path = [entry for entry in sys.path if os.path.isabs(entry)]
        actions = [
            *((os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_RDWR, 0) for stream in range(CONNECTION)),
            (os.POSIX_SPAWN_DUP2, theirs.fileno(), CONNECTION),
        ]
        argv = [sys.executable, "-I", "-S", "-c", _PROGRAM, "ahead" if ahead else "", *path]
        # A session of its own: a terminal's ^C is for whoever started it, who tells the job.
        pid = os.posix_spawn(sys.executable, argv, {}, file_actions=actions, setsid=True)
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    return Spawned(pid, ours)
