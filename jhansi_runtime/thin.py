"""The thin client: a command line that a server of this installation runs in our place, as if it were this process.

Theory of operation. Beside its socket a server has another, at which workers wait that have loaded everything already
(attendant.py). One of them is sent what makes a process the one it is: its arguments, environment, working directory,
umask, and the three descriptors themselves; it runs the command and says with which status to exit. Meanwhile this
process stands for it: what signals it gets it passes on; it stops and goes on as it is told to; should it be killed,
the worker is told to end.

  connect -> HELLO (the worker's pidfd) -> the request -> NOT_MINE: this process runs the command itself
                                                          STATUS: it exits so
                                                          end of file: the worker was killed, and it fails

What could differ runs here, as without a server: another installation, another user, group or namespace, names that
mean this very process (/proc/self, /dev/fd), a terminal that somebody else is using.

A tenth of a bare interpreter's start is what all this may cost: it imports built-in modules alone, and is loaded before
`site` has looked for any other (the script jhansi-run beside this).
"""

import _signal
import _socket
import marshal
import posix
import select
import sys

__all__ = [
    "BESIDE",
    "HELLO",
    "NOT_MINE",
    "STATUS",
    "VERSION",
    "descriptors_in",
    "identity",
    "passing",
    "peer",
    "run_by_server",
]

VERSION = 1
BESIDE = b".cli"  # the name of the workers' socket, after that of the server's
HELLO = b"h"  # worker (descriptor: its pidfd)
NOT_MINE = b"n"  # worker: it has done nothing, and will not
STATUS = b"s"  # worker: exit with this one, a byte

_HELLO_WITHIN = 5000  # milliseconds; later than that we are on our own, as without a server
_AT_HOME = {b"serve", b"doctor", b"completion"}  # what is about this process and its surroundings
_COMPLETION = b"_JHANSI_RUN_COMPLETE"
_OF_A_PROCESS = (b"/dev/fd/", b"/proc/")
_FAILED = 125
_STOPPING = {_signal.SIGTSTP, _signal.SIGTTIN, _signal.SIGTTOU}
_ENDING = {_signal.SIGHUP, _signal.SIGINT, _signal.SIGQUIT, _signal.SIGTERM, _signal.SIGUSR1, _signal.SIGUSR2}
_PASSED_ON = {*_ENDING, _signal.SIGTSTP, _signal.SIGWINCH}
_OF_THE_INTERPRETER = {_signal.SIGPIPE, _signal.SIGXFSZ}  # which every Python ignores
_LOST = b"jhansi-run: error: the server that ran this command has ended; run it again, or start: jhansi-run serve\n"


def run_by_server() -> int | None:
    """Have a server run the command line of this process; its exit status, None where it is to be run here.

    Where that is None nothing has happened, but that closed standard streams are /dev/null. It does not return where
    the command was ended by a signal: then this process is, too.
    """
    words = [word.encode(sys.getfilesystemencoding(), "surrogateescape") for word in sys.argv[1:]]
    address = _address(posix.environ)
    if address is None or _belongs_here(words):
        return None
    try:
        posix.stat(address)
        _complete_stdio()
        connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    except OSError:
        return None
    worker = _worker(connection, address)
    if worker is None:
        connection.close()
        return None
    return _Standing(connection, worker).until_ended(words)


def identity() -> tuple[object, ...]:
    """What two processes have in common to whom the same names mean the same. OSError where that cannot be told."""
    root = posix.stat("/")
    spaces = [posix.stat(f"/proc/self/ns/{name}").st_ino for name in ("mnt", "pid", "user")]
    return (
        (posix.getresuid(), posix.getresgid(), tuple(sorted(posix.getgroups()))),
        (root.st_dev, root.st_ino, *spaces),
        sys.getfilesystemencoding(),
    )


def passing(descriptors: list[int]) -> list[tuple[int, int, bytes]]:
    """Return the ancillary data that passes descriptors on: SCM_RIGHTS of unix(7)."""
    numbers = b"".join(descriptor.to_bytes(4, sys.byteorder) for descriptor in descriptors)
    return [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, numbers)]


def descriptors_in(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """Return the descriptors that came with a message."""
    numbers = b"".join(data for _, kind, data in ancillary if kind == _socket.SCM_RIGHTS)
    return [int.from_bytes(numbers[start : start + 4], sys.byteorder) for start in range(0, len(numbers), 4)]


def peer(connection: _socket.socket) -> int:
    """Return the user id of the other end: SO_PEERCRED of unix(7)."""
    credentials = connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
    return int.from_bytes(credentials[4:8], sys.byteorder)


class _Standing:
    """This process in place of the worker that runs its command."""

    def __init__(self, connection: _socket.socket, worker: int) -> None:
        self._connection = connection
        self._worker = worker
        self._ended_by: int | None = None
        self._ignored = [
            number
            for number in range(1, 65)
            if _signal.getsignal(number) == _signal.SIG_IGN and number not in _OF_THE_INTERPRETER
        ]
        self._before = {number: _signal.signal(number, _noted) for number in _PASSED_ON if number not in self._ignored}
        self._arrived, self._writer = posix.pipe2(posix.O_CLOEXEC | posix.O_NONBLOCK)
        _signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._terminal = _attributes()

    def until_ended(self, words: list[bytes]) -> int | None:
        """Send the request, stand for the worker until it is done, and return what it says."""
        try:
            self._request(words)
            answer = self._answer()
        except (BrokenPipeError, ConnectionResetError):
            answer = b""
        if answer == NOT_MINE:
            self._leave()
            return None
        if answer[:1] == STATUS:
            return answer[1]
        return self._fail()

    def _request(self, words: list[bytes]) -> None:
        umask = posix.umask(0o077)
        posix.umask(umask)
        streams = tuple(
            stream and (stream.encoding, stream.errors, stream.write_through)  # type: ignore[union-attr] # not while it is Python's own
            for stream in (sys.stdin, sys.stdout, sys.stderr)
        )
        who = [sys.argv[0], *words], posix.environ, umask, self._ignored, streams, identity()
        # In a file: an environment may be larger than what a socket takes.
        content = posix.memfd_create("request", posix.MFD_CLOEXEC)
        rest = memoryview(marshal.dumps((VERSION, *who)))  # type: ignore[arg-type] # what identity() is made of can be
        while rest:
            rest = rest[posix.write(content, rest) :]
        folder = posix.open(".", posix.O_PATH | posix.O_CLOEXEC)
        self._connection.sendmsg([b"r"], passing([content, folder, 0, 1, 2]), _socket.MSG_NOSIGNAL)
        posix.close(content)
        posix.close(folder)

    def _answer(self) -> bytes:
        """Wait for the worker's last word; b"" when it has gone without one."""
        poll = select.poll()
        poll.register(self._connection.fileno(), select.POLLIN)
        poll.register(self._arrived, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if self._arrived in ready:
                for number in posix.read(self._arrived, 64):
                    self._pass_on(number)
            if self._connection.fileno() in ready:
                return self._connection.recv(2)

    def _pass_on(self, number: int) -> None:
        if number in _STOPPING:
            self._stop(number)
        else:
            self._tell(number)
            if number in _ENDING:
                self._ended_by = number

    def _stop(self, number: int) -> None:
        """Stop as a process of a terminal does, and the worker with us; return when both may go on."""
        self._tell(_signal.SIGTSTP)
        while number:
            before = _signal.signal(number, _signal.SIG_DFL)
            posix.kill(posix.getpid(), number)  # what this process stops in
            _signal.signal(number, before)
            # The worker is not the terminal's to stop when it reads in the background: we are.
            number = _signal.SIGTTIN if self._terminal is not None and _is_in_background(0) else 0
        self._tell(_signal.SIGCONT)

    def _tell(self, number: int) -> None:
        try:
            _signal.pidfd_send_signal(self._worker, number)
        except ProcessLookupError:
            return  # it has ended, and its last word is on the way

    def _leave(self) -> None:
        """Be as we were."""
        _signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            _signal.signal(number, handler)
        for descriptor in (self._arrived, self._writer, self._worker):
            posix.close(descriptor)
        self._connection.close()

    def _fail(self) -> int:
        """End as the worker did: by the signal that was passed on, else of the death of the server."""
        if self._terminal is not None:
            import termios  # noqa: PLC0415 - only for who has a terminal

            termios.tcsetattr(0, termios.TCSADRAIN, self._terminal)
        if self._ended_by is not None:
            _signal.signal(self._ended_by, _signal.SIG_DFL)
            posix.kill(posix.getpid(), self._ended_by)
        try:
            posix.write(2, _LOST)
        except OSError:
            return _FAILED  # nobody is left to be told more than that
        return _FAILED


def _noted(_number: int, _frame: object) -> None:
    """Python's part of a signal handler: the byte that poll(2) sees was written before."""


def _address(environment: dict[bytes, bytes]) -> bytes | None:
    """Return the path of the workers' socket; paths.py says the same of the server's. None where it is no path."""
    path = environment.get(b"JHANSI_SOCKET")
    if not path:
        folder = environment.get(b"XDG_RUNTIME_DIR") or environment.get(b"JHANSI_HOME")
        if not folder:
            home = environment.get(b"HOME")
            data = environment.get(b"XDG_DATA_HOME") or (home and home + b"/.local/share")
            folder = data and data + b"/jhansi"
        path = folder and folder + b"/jhansi/jhansi.sock"
    return path + BESIDE if path and path.startswith(b"/") else None


def _belongs_here(words: list[bytes]) -> bool:
    if _COMPLETION in posix.environ or not _AT_HOME.isdisjoint(words[:1]):
        return True
    if any(name in word for word in words for name in _OF_A_PROCESS):
        return True
    return any(_is_in_background(stream) for stream in range(3))


def _is_in_background(descriptor: int) -> bool:
    """Say whether it is our terminal, and others are in its foreground: to use it stops us, and nobody in our place."""
    try:
        return posix.tcgetpgrp(descriptor) != posix.getpgrp()
    except OSError:  # it is closed, or none of ours
        return False


def _complete_stdio() -> None:
    """Put /dev/null where stdin, stdout or stderr was closed, as __main__ does, which will find nothing more to do."""
    while (descriptor := posix.open("/dev/null", posix.O_RDWR | posix.O_CLOEXEC)) <= 2:  # noqa: PLR2004 - stderr, the last
        posix.set_inheritable(descriptor, True)
    posix.close(descriptor)


def _worker(connection: _socket.socket, address: bytes) -> int | None:
    """Return the pidfd of the worker that takes the connection, None where none does."""
    try:
        connection.setblocking(False)  # where too many wait already, nobody need wait as well
        connection.connect(address)
        connection.setblocking(True)
        if peer(connection) != posix.geteuid():
            return None
        poll = select.poll()
        poll.register(connection.fileno(), select.POLLIN)
        if not poll.poll(_HELLO_WITHIN):
            return None
        said, ancillary, _, _ = connection.recvmsg(1, _socket.CMSG_SPACE(4), _socket.MSG_CMSG_CLOEXEC)
    except OSError:
        return None
    return descriptors_in(ancillary)[0] if said == HELLO else None


def _attributes() -> list[int | list[bytes | int]] | None:
    """Return how the terminal is set that a job may be given as its own, None where there is none."""
    if not (posix.isatty(0) and posix.isatty(1)):
        return None
    import termios  # noqa: PLC0415 - see _fail

    return termios.tcgetattr(0)
