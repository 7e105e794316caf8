"""Starts the attendant beside a server, and ends it: the process that runs command lines for thin clients."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from jhansi_runtime import thin
from jhansi_runtime.logs import log
from jhansi_runtime.server.listening import private_socket

__all__ = ["Attendant", "attendant"]

BESIDE = os.fsdecode(thin.BESIDE)
LONGEST = 107  # bytes of a socket's path: unix(7)
ENDED_WITHIN = 15.0  # seconds; jobs have two of them

_PROGRAM = """import sys
listener, door, *sys.path[:] = sys.argv[1:]
from jhansi_runtime.attendant import main
main(int(listener), int(door))
"""


class Attendant:
    """The process, and our end of the door through which it is lent slots."""

    def __init__(self, process: "subprocess.Popen[bytes]", door: socket.socket) -> None:
        self.door = door
        self._process = process

    def end(self) -> None:
        """Have it end what it runs, and end; called again, do nothing."""
        if self._process.poll() is None:
            self.door.shutdown(socket.SHUT_RDWR)
            try:
                self._process.wait(ENDED_WITHIN)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


@contextmanager
def attendant(path: str) -> Iterator[Attendant | None]:
    """Within: an attendant of the server whose Unix socket has that path. Only before there are threads.

    The kernel kills it when this thread ends; its environment, by which it knows whose clients are ours, is our own.
    None where that path is so long that there can be no socket beside it: then no command line looks for one.
    """
    if len(os.fsencode(path + BESIDE)) > LONGEST:
        log("server.no_command_lines", bytes=len(os.fsencode(path)), most=LONGEST - len(BESIDE))
        yield None
        return
    with private_socket(path + BESIDE) as listener:
        door, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with door:
            # What was imported here was found here, but for the working directory: anyone may put something there.
            places = [entry for entry in sys.path if os.path.isabs(entry)]
            with theirs:
                descriptors = (listener.fileno(), theirs.fileno())
                process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _PROGRAM, *map(str, descriptors), *places],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=descriptors,
                    start_new_session=True,  # a terminal's ^C is for the server
                )
            listener.close()  # where nobody attends, nobody is to wait
            found = Attendant(process, door)
            try:
                yield found
            finally:
                found.end()
