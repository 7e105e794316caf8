"""Keeps an attendant beside a server: the process that runs command lines for thin clients.

One that dies, whoever has killed it, is followed by the next, and what its workers ran ends with it. Meanwhile clients
wait at the socket, which the server keeps open; if one attendant after the other dies at once it is closed, and command
lines run by themselves from then on.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from jhansi_runtime import thin
from jhansi_runtime.logs import log
from jhansi_runtime.server.listening import private_socket

__all__ = ["Attending", "attending"]

BESIDE = os.fsdecode(thin.BESIDE)
LONGEST = 107  # bytes of a socket's path: unix(7)
ENDED_WITHIN = 15.0  # seconds; jobs have two of them
RETRY = 0.5  # seconds until the second attendant after a death at once, twice as many until the third
TRIES = 4
LASTING = 10.0  # seconds; who lives as long has not died at once

_PROGRAM = """import sys
listener, door, *sys.path[:] = sys.argv[1:]
from jhansi_runtime.attendant import main
main(int(listener), int(door))
"""


class Attending:
    """A thread that starts an attendant and waits for its end, again and again.

    The kernel kills an attendant when the thread that has started it ends. Its environment, by which it knows whose
    clients are ours, is our own.
    """

    def __init__(self, listener: socket.socket, lend: Callable[[socket.socket], None]) -> None:
        """Start. lend is called with our end of each attendant's door, which is the callee's from then on."""
        self._listener = listener
        self._lend = lend
        self._mutex = threading.Lock()
        self._is_ending = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._door: socket.socket | None = None
        self._thread = threading.Thread(target=self._keep, name="jhansi-attending", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Have the attendant end what it runs, and end; called again, do nothing."""
        with self._mutex:
            self._is_ending.set()
            if self._door is not None:
                self._door.shutdown(socket.SHUT_RDWR)
        self._thread.join(ENDED_WITHIN)
        if self._thread.is_alive() and self._process is not None:
            self._process.kill()
        self._thread.join()

    def _keep(self) -> None:
        failures = 0
        while failures < TRIES:
            began = time.monotonic()
            if not self._attend():
                return
            failures = 1 if time.monotonic() - began > LASTING else failures + 1
            self._is_ending.wait(RETRY * 2 ** (failures - 1))
        self._listener.close()  # where nobody attends, nobody is to wait
        log("server.no_command_lines", attendants=failures)

    def _attend(self) -> bool:
        """Start one, and wait for its end; whether there is to be another."""
        with self._mutex:
            if self._is_ending.is_set():
                return False
            try:
                process, door = self._start()
            except (OSError, RuntimeError) as error:  # no descriptors, processes or threads are to be had
                log("server.attendant_missing", error=error)
                return True
            self._process, self._door = process, door
        status = process.wait()
        with self._mutex, door:
            self._door = None
        if self._is_ending.is_set():
            return False
        log("server.attendant_ended", status=status)
        return True

    def _start(self) -> "tuple[subprocess.Popen[bytes], socket.socket]":
        """Start one; it, and our end of its door."""
        # What was imported here was found here, but for the working directory: anyone may put something there.
        places = [entry for entry in sys.path if os.path.isabs(entry)]
        door, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ExitStack() as unless_started, theirs:
            unless_started.enter_context(door)
            self._lend(door.dup())  # which ends with the last end of the door
            descriptors = (self._listener.fileno(), theirs.fileno())
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, *map(str, descriptors), *places],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=descriptors,
                start_new_session=True,  # a terminal's ^C is for the server
            )
            unless_started.pop_all()
        return process, door


@contextmanager
def attending(path: str, lend: Callable[[socket.socket], None]) -> Iterator[Attending | None]:
    """Within: an attendant of the server whose Unix socket has that path. Only before others here make files.

    None where that path is so long that there can be no socket beside it: then no command line looks for one.
    """
    if len(os.fsencode(path + BESIDE)) > LONGEST:
        log("server.no_command_lines", bytes=len(os.fsencode(path)), most=LONGEST - len(BESIDE))
        yield None
        return
    with private_socket(path + BESIDE) as listener:
        found = Attending(listener, lend)
        try:
            yield found
        finally:
            found.end()
