"""The attendant of a server, and its workers: they run command lines for thin clients (thin.py).

Theory of operation. A server starts this as a process of its own, with one thread, which loads all that a command line
may need and forks a few workers ahead. Each waits for one client, becomes what the client is (its arguments,
environment, working directory, umask, limits, ignored signals, and the very descriptors that are its standard streams),
runs the one command and ends; nothing of it is left for the next. For containers a worker borrows the server's slots
(engine/lending.py).

Whoever may connect acts as the user that the server runs as, and is that user: the socket is that user's alone, and the
kernel says who the peer is. A client that is not in the same namespaces, or names another installation in its
environment, is told that it is on its own.

Death is passed on. The attendant is killed with its server, a worker with the attendant, and the server ends the slot
that it had. A worker whose client is gone gets SIGTERM, as if the client's terminal had been told to end it.
"""

import fcntl
import gc
import marshal
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper
from types import TracebackType
from typing import NamedTuple, NoReturn

import prctl

from jhansi_runtime import thin
from jhansi_runtime.__main__ import unfinished
from jhansi_runtime.cli import run
from jhansi_runtime.cli.commands import MODULE_OF
from jhansi_runtime.cli.opening import open_runtime
from jhansi_runtime.engine.lending import BorrowedSlots
from jhansi_runtime.errors import JhansiError
from jhansi_runtime.isolation.channel import Channel
from jhansi_runtime.paths import Paths

__all__ = ["main"]

_WAITING = 2  # workers that are there ahead
_ENDED_WITHIN_SECONDS = 10.0
_LOOK_SECONDS = 1.0  # a worker that is stopped
_RETRY_MILLISECONDS = 1000  # after a fork that failed, or a worker that died as it waited
_LOADED_AHEAD = (
    *(f"jhansi_runtime.cli.{name}" for name in ("commands", *sorted({*MODULE_OF.values()} - {"server", "host"}))),
    *(f"jhansi_runtime.{name}" for name in ("cli.execs", "engine.terminal", "isolation.terminal", "rendering")),
    "encodings.ascii",
    "importlib.metadata",
    "tomllib",
)
# What Python's own variables change of a process that has started already is in the request, or nothing.
_HARMLESS = {"PYTHONUNBUFFERED", "PYTHONIOENCODING", "PYTHONSTARTUP", "PYTHONDONTWRITEBYTECODE"}
_LIMITS = sorted({getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")})
_STREAMS = ("stdin", "stdout", "stderr")
_IGNORED_BY_PYTHON = {signal.SIGPIPE, signal.SIGXFSZ}


class _Request(NamedTuple):
    """What a client sends, and nothing else decides what its command does; see thin.py for where it comes from.

    ignored are numbers of signals; streams are encoding, errors and whether nothing is buffered, of stdin, stdout and
    stderr, None for one that was closed.
    """

    version: int
    argv: list[bytes]
    environment: dict[bytes, bytes]
    umask: int
    ignored: list[int]
    streams: tuple[tuple[str, str, bool] | None, ...]
    identity: tuple[object, ...]


def main(listener: int, door: int) -> NoReturn:
    """Be the attendant of the process that started us, until that closes its end of the door.

    listener is the descriptor of the socket that clients connect to, door that of our end of the door to its slots.
    """
    prctl.set_pdeathsig(signal.SIGKILL)
    gc.disable()
    _load()
    gc.freeze()
    _Attendant(socket.socket(fileno=listener), Channel.of(door)).attend()
    os._exit(0)


def _load() -> None:
    """Load what commands load when they come to it."""
    for name in _LOADED_AHEAD:
        import_module(name)
    _warm_up()


def _warm_up() -> None:
    """Do once what most commands begin with: here for what is made once, in a worker for its own copies of memory."""
    # What is wrong with this installation, whoever runs a command is told.
    with suppress(JhansiError, OSError), open_runtime() as runtime:
        runtime.sandboxes()
        runtime.rootfs_infos()


class _Attendant:
    """The process that forks workers: those that wait, and those that have a client."""

    def __init__(self, listener: socket.socket, door: Channel) -> None:
        self._listener = listener
        self._door = door
        self._identity = thin.identity()
        self._waiting: set[int] = set()
        self._busy: set[int] = set()
        self._taken, self._takes = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._ended, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)

    def attend(self) -> None:
        """See that workers wait, until the server is gone; then have all of them end."""
        poll = select.poll()
        for descriptor in (self._door.fileno(), self._taken, self._ended):
            poll.register(descriptor, select.POLLIN)
        while True:
            is_short = not self._fill()
            ready = {descriptor for descriptor, _ in poll.poll(_RETRY_MILLISECONDS if is_short else None)}
            if self._door.fileno() in ready:
                return self._end()
            if self._ended in ready:
                os.read(self._ended, 4096)
            if self._reap():  # one that has died before it had a client: the next may do so, too
                time.sleep(_RETRY_MILLISECONDS / 1000)

    def _fill(self) -> bool:
        """Fork what is missing. False where that cannot be at the moment."""
        while len(self._waiting) < _WAITING:
            try:
                pid = os.fork()
            except OSError:
                return False
            if pid == 0:
                _work(self._listener, self._door, self._takes, self._identity)
            self._waiting.add(pid)
        return True

    def _reap(self) -> bool:
        """Take note of who has a client, and of who has ended. Return whether one had none."""
        with suppress(BlockingIOError):
            while pids := os.read(self._taken, 4096):
                taken = set(memoryview(pids).cast("i"))
                self._waiting -= taken
                self._busy |= taken
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG)[0]) > 0:
                if ended in self._waiting:
                    self._waiting.discard(ended)
                    return True
                self._busy.discard(ended)
        return False

    def _end(self) -> None:
        """Tell every worker to end; those that do not are killed when we have ended."""
        self._listener.close()
        for worker in (*self._waiting, *self._busy):
            os.kill(worker, signal.SIGTERM)
        deadline = time.monotonic() + _ENDED_WITHIN_SECONDS
        poll = select.poll()
        poll.register(self._ended, select.POLLIN)
        while (self._waiting or self._busy) and (left := deadline - time.monotonic()) > 0:
            poll.poll(left * 1000)
            self._reap()


def _work(listener: socket.socket, door: Channel, takes: int, identity: tuple[object, ...]) -> NoReturn:
    """Be a worker: wait for a client, and run its command."""
    attendant = os.getppid()
    prctl.set_pdeathsig(signal.SIGKILL)
    if os.getppid() != attendant:
        os._exit(1)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCONT})  # see _pause
    _warm_up()
    try:
        slots = BorrowedSlots(door)
    except BrokenPipeError:  # the server is ending, and the attendant about to
        os._exit(0)
    door.close()
    connection, _ = listener.accept()
    os.write(takes, os.getpid().to_bytes(4, sys.byteorder))
    listener.close()
    request, descriptors = _received(connection)
    if not _is_ours(request, identity) or not _is_there(descriptors[0]):
        connection.send(thin.NOT_MINE)
        os._exit(0)
    _become(request, connection, descriptors)

    def end(status: int) -> NoReturn:
        with suppress(BrokenPipeError):
            connection.send(thin.STATUS + bytes([status]), socket.MSG_NOSIGNAL)
        os._exit(0)

    def end_unfinished(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> NoReturn:
        end(unfinished(kind, error, traceback))

    sys.excepthook = end_unfinished
    end(run(sys.argv[1:], slots))


def _received(connection: socket.socket) -> tuple[_Request, list[int]]:
    """What the client asks for; descriptors of its working directory and of its three streams. Without one, end."""
    if thin.peer(connection) != os.geteuid():
        os._exit(1)
    try:
        connection.sendmsg([thin.HELLO], thin.passing([os.pidfd_open(os.getpid())]))
        said, ancillary, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(5 * 4), socket.MSG_CMSG_CLOEXEC)
    except ConnectionError:
        os._exit(0)
    content, *others = thin.descriptors_in(ancillary) or [-1]
    if not said or not others:
        os._exit(0)
    with open(content, "rb") as file:
        file.seek(0)
        return _Request(*marshal.loads(file.read())), others  # noqa: S302 - written by thin.py, by this very user


def _is_ours(request: _Request, identity: tuple[object, ...]) -> bool:
    """Whether what we do for that client is what it would do itself: see thin.py."""
    if request.version != thin.VERSION or request.identity != identity or b"" in request.environment:
        return False
    environment = {os.fsdecode(name): os.fsdecode(value) for name, value in request.environment.items()}
    if _of_python(environment) != _of_python(os.environ):
        return False
    try:
        theirs = Paths.from_environment(environment)
    except JhansiError:  # which the client says itself
        return False
    return theirs._replace(socket="") == Paths.from_environment()._replace(socket="")


def _of_python(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith("PYTHON") and name not in _HARMLESS}


def _is_there(folder: int) -> bool:
    """Go to the client's working directory. False where we may not."""
    try:
        os.fchdir(folder)
    except OSError:
        return False
    return True


def _become(request: _Request, connection: socket.socket, descriptors: list[int]) -> None:
    """Take over all that makes this process the client's."""
    folder, *streams = descriptors
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for descriptor in (folder, *streams):
        os.close(descriptor)
    for number, (name, how) in enumerate(zip(_STREAMS, request.streams, strict=True)):
        setattr(sys, name, _stream(number, how))
    sys.argv[:] = [os.fsdecode(word) for word in request.argv]
    for variable in set(os.environb) - set(request.environment):
        del os.environb[variable]
    os.environb.update(request.environment)
    time.tzset()
    os.umask(request.umask)
    _limit(connection)
    for number in range(1, signal.NSIG):
        if number in request.ignored:
            signal.signal(number, signal.SIG_IGN)
        elif signal.getsignal(number) is signal.SIG_IGN and number not in _IGNORED_BY_PYTHON:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if signal.SIGTSTP not in request.ignored:
        signal.signal(signal.SIGTSTP, lambda _number, _frame: _pause(connection))
    _end_with(connection)


def _stream(number: int, how: tuple[str, str, bool] | None) -> TextIOWrapper | None:
    """A standard stream as Python makes it; __main__ says what becomes of one that was closed."""
    if how is None:
        if number == 0:
            return None
        how = ("utf-8", "strict", False)
    encoding, errors, is_unbuffered = how
    binary = open(number, "wb" if number else "rb", 0 if is_unbuffered and number else -1, closefd=False)  # noqa: SIM115 - for the whole run
    return TextIOWrapper(
        binary,
        encoding,
        errors,
        newline="\n",
        line_buffering=number == 2 or binary.isatty(),  # noqa: PLR2004 - stderr
        write_through=is_unbuffered,
    )


def _limit(connection: socket.socket) -> None:
    """Take the client's soft limits, as far as our own hard ones let us."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    client = int.from_bytes(credentials[:4], sys.byteorder)
    for limit in _LIMITS:
        wanted, (ours, hard) = resource.prlimit(client, limit)[0], resource.getrlimit(limit)
        if hard != resource.RLIM_INFINITY and (wanted == resource.RLIM_INFINITY or wanted > hard):
            wanted = hard
        if wanted != ours:
            resource.setrlimit(limit, (wanted, hard))


def _pause(connection: socket.socket) -> None:
    """Stop until the client goes on, which SIGCONT tells; a process that is stopped would not learn of its death."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    came = None
    # SIGTERM may have come before that, or to the thread that flushes the log; then its handler waits for us.
    while came is None and not _has_left(connection):
        came = signal.sigtimedwait({signal.SIGCONT, signal.SIGTERM}, _LOOK_SECONDS)
    if came is not None and came.si_signo == signal.SIGTERM:
        os.kill(os.getpid(), signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _end_with(connection: socket.socket) -> None:
    """Have the kernel tell us of the client's death, by SIGTERM or, where that is ignored, SIGKILL: fcntl(2)."""
    is_ignored = signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(connection, fcntl.F_SETSIG, signal.SIGKILL if is_ignored else signal.SIGTERM)
    fcntl.fcntl(connection, fcntl.F_SETFL, fcntl.fcntl(connection, fcntl.F_GETFL) | os.O_ASYNC)
    if _has_left(connection):  # before that
        os._exit(0)


def _has_left(connection: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return bool(poll.poll(0))
