"""The sockets that the server listens on: TCP, its Unix socket, and those that a supervisor opened for it.

Who may connect decides what a socket is: `unix`, a socket in the file system that only this user may open; `loopback`,
every user of this host; `network`, anybody. Nothing here is opened to the network unless there are API keys, and a Unix
socket that others may open is refused.

The Unix socket has a lock file beside it, which one server at a time holds (flock(2)); whoever holds it may take away
what a killed server left. The lock file is gone after the server too, so taking it means to look whether it is still
the one at that path. A server without the lock (its socket came from a supervisor) is found by connecting to it.
"""

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from ipaddress import ip_address
from typing import Literal, NamedTuple

from jhansi_runtime.errors import ConflictError, HostError, InvalidRequestError, JhansiError

__all__ = [
    "Kind",
    "Listener",
    "Where",
    "adopt",
    "is_wildcard",
    "listen",
    "passed_descriptors",
    "private_socket",
    "tcp_addresses",
]

Kind = Literal["unix", "loopback", "network"]

BACKLOG = 1024
FIRST_PASSED = 3  # SD_LISTEN_FDS_START of sd_listen_fds(3)
LAST_PORT = 65_535
ANSWER_WITHIN = 1.0  # seconds for the kernel to accept a connection for a server that lives

_PRIVATE = 0o077  # what a umask takes from everybody else
_OTHERS_WRITE = 0o022


class Where(NamedTuple):
    """What to listen on: a TCP address unless host is None, and the path of a Unix socket."""

    host: str | None
    port: int
    path: str


class Listener(NamedTuple):
    """A socket that listens, and who can reach it."""

    socket: socket.socket
    kind: Kind

    @property
    def address(self) -> str:
        """The address for a person: a URL, or `unix`, which is all that a log may hold of a path."""
        if self.kind == "unix":
            return "unix"
        host, port = self.socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def listen(where: Where, *, has_keys: bool) -> Iterator[list[Listener]]:
    """Listen there until the end of the block; the Unix socket's file is gone then, unless it is another's by now.

    ConflictError: a server is there already. InvalidRequestError: what was asked for cannot be listened on, or needs
    keys.
    """
    with ExitStack() as stack:
        listeners = []
        if where.host is not None:
            addresses = tcp_addresses(where.host, where.port)
            for family, address in addresses:
                kind = _require_keys(_kind_of(address), has_keys=has_keys)
                listeners.append(Listener(stack.enter_context(_tcp_socket(family, address)), kind))
        listeners.append(Listener(stack.enter_context(private_socket(os.path.abspath(where.path))), "unix"))
        yield listeners


@contextmanager
def adopt(descriptors: Iterable[int], *, has_keys: bool) -> Iterator[list[Listener]]:
    """Use sockets that are open already, until the end of the block. Their files remain whose they are."""
    with ExitStack() as stack:
        listeners = []
        for descriptor in descriptors:
            try:
                passed = stack.enter_context(socket.socket(fileno=descriptor))
                listens = passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            except OSError as error:
                raise InvalidRequestError(f"descriptor {descriptor} was passed: {error.strerror}") from None
            if not listens or passed.type != socket.SOCK_STREAM:
                raise InvalidRequestError(
                    f"descriptor {descriptor} was passed, and is no stream socket that listens",
                    remedy="pass sockets of ListenStream= with Accept=no",
                )
            passed.set_inheritable(False)
            listeners.append(Listener(passed, _require_keys(_kind_of_passed(passed), has_keys=has_keys)))
        yield listeners


def passed_descriptors(environ: Mapping[str, str]) -> list[int]:
    """The descriptors that a supervisor passed to this very process: sd_listen_fds(3)."""
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = environ.get("LISTEN_FDS", "")
    if not count.isdecimal():
        raise InvalidRequestError("LISTEN_FDS is not a number", remedy="unset LISTEN_PID and LISTEN_FDS")
    return list(range(FIRST_PASSED, FIRST_PASSED + int(count)))


def tcp_addresses(host: str, port: int) -> list[tuple[int, tuple[str, int]]]:
    """Address family and socket address of everything that the host name stands for."""
    if not 0 <= port <= LAST_PORT:
        raise InvalidRequestError(f"not a port: {port}", remedy=f"take one from 1 to {LAST_PORT}, or 0 for any")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        raise InvalidRequestError(
            f"not an address of this host: {host!r}", remedy="take 127.0.0.1, ::1 or another address of this host"
        ) from None
    return list(dict.fromkeys((int(family), (str(address[0]), port)) for family, _, _, _, address in found))


def is_wildcard(host: str) -> bool:
    """Whether it stands for every address of this host."""
    with suppress(ValueError):
        return ip_address(host).is_unspecified
    return not host


def _kind_of(address: tuple[str, int]) -> Kind:
    return "loopback" if ip_address(address[0].partition("%")[0]).is_loopback else "network"


def _kind_of_passed(passed: socket.socket) -> Kind:
    name = passed.getsockname()
    if passed.family in {socket.AF_INET, socket.AF_INET6}:
        return _kind_of(name[:2])
    # An abstract socket is bytes here: it has no mode, and everybody on the host may connect to it.
    if passed.family == socket.AF_UNIX and isinstance(name, str) and os.path.isabs(name):
        found = os.stat(name, follow_symlinks=False)
        if found.st_uid == os.getuid() and not found.st_mode & _PRIVATE:
            return "unix"
    raise InvalidRequestError(
        "a socket was passed that other users may connect to", remedy="give the Unix socket a path and SocketMode=0600"
    )


def _require_keys(kind: Kind, *, has_keys: bool) -> Kind:
    if kind == "network" and not has_keys:
        raise InvalidRequestError(
            "an address that is not loopback needs API keys, and there is none",
            remedy="run: jhansi-run keys create (or listen on 127.0.0.1)",
        )
    return kind


@contextmanager
def _tcp_socket(family: int, address: tuple[str, int]) -> Iterator[socket.socket]:
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a server before us may linger
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError as error:
            raise _not_bound(error, address) from None
        yield listener


def _not_bound(error: OSError, address: tuple[str, int]) -> JhansiError:
    message = f"cannot listen on {address[0]} port {address[1]}: {error.strerror}"
    if error.errno == errno.EADDRINUSE:
        return ConflictError(message, remedy="end what listens there, or take another --port")
    if error.errno == errno.EACCES:
        return InvalidRequestError(message, remedy="take a --port from 1024 on")
    return InvalidRequestError(message, remedy="take 127.0.0.1, ::1 or another address of this host")


@contextmanager
def private_socket(path: str) -> Iterator[socket.socket]:
    """A Unix socket of that path which this user alone may connect to, and its file, until the end of the block."""
    _make_folder(os.path.dirname(path))
    with _lock(path), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        _remove_stale(path)
        try:
            with _umask(0o177):  # nobody else may connect, from the very first moment
                listener.bind(path)
        except OSError as error:  # a path of 108 bytes or more has no errno
            raise InvalidRequestError(
                f"cannot make the socket {path}: {error.strerror or error}", remedy="name another, shorter --socket"
            ) from None
        made = os.stat(path, follow_symlinks=False)
        try:
            listener.listen(BACKLOG)
            yield listener
        finally:
            with suppress(FileNotFoundError):
                if os.path.samestat(made, os.stat(path, follow_symlinks=False)):
                    os.unlink(path)


def _make_folder(folder: str) -> None:
    """Make the folder, private. One that is there stays as it is, and must not let others replace what is in it."""
    try:
        with _umask(_PRIVATE):
            os.makedirs(folder, exist_ok=True)
        found = os.stat(folder)
    except OSError as error:
        raise InvalidRequestError(
            f"cannot make the folder {folder}: {error.strerror}", remedy="name another --socket"
        ) from None
    is_shared = found.st_mode & _OTHERS_WRITE and not found.st_mode & stat.S_ISVTX
    if is_shared or found.st_uid not in {os.getuid(), 0}:
        raise InvalidRequestError(
            f"others may replace files in {folder}", remedy=f"run: chmod go-w {folder}, or name another --socket"
        )


@contextmanager
def _lock(path: str) -> Iterator[None]:
    """Be the one server of that socket. ConflictError when there is another."""
    lock_path = f"{path}.lock"
    while True:
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, lock_path):
                break
        except BlockingIOError:
            os.close(descriptor)
            raise _is_live(path) from None
        os.close(descriptor)
    try:
        yield
    finally:
        os.unlink(lock_path)  # while it is held: who opened it before finds that it is gone
        os.close(descriptor)


def _is_at(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _remove_stale(path: str) -> None:
    """Take away the socket of a server that is dead. Anything else at that path is left alone, and an error."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise InvalidRequestError(f"there is something at {path} that is no socket", remedy="name another --socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        caller.settimeout(ANSWER_WITHIN)
        try:
            caller.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except TimeoutError:
            pass  # its queue is full: it lives
        except OSError as error:
            raise HostError(f"cannot tell whether a server listens on {path}: {error.strerror}") from None
    raise _is_live(path)


def _is_live(path: str) -> ConflictError:
    return ConflictError(f"a server is running on {path} already", remedy="end it, or name another --socket")


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    """Only before there are threads: the umask is the whole process's."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
