"""The messages between the launcher and init, over one SOCK_SEQPACKET socket.

Each message is one packet: a byte that says what it is, then its body. The launcher's end and init's end both belong
to trusted code; the job never holds either. An order may be larger than a socket takes (an argument list can be 2 MB),
so it travels in a memfd, passed like the streams.
"""

import _socket
import array
import errno
import marshal
import os
import struct
from typing import NamedTuple

from jhansi_runtime.isolation.cgroup import Limits

__all__ = ["EXECVE", "Channel", "Container", "Failure", "Order", "Outcome", "Reaped", "Zygote", "pair"]

LAUNCHED = b"d"  # launcher, in init's name: it is cloned (descriptors: its pidfd, and its cgroup if it has one)
READY = b"r"  # init: the container is built (descriptors: the filesystem of /tmp, HOME and /dev/shm; its /proc)
# Run this. Descriptors from the launcher: the order, the streams that are no pty; to the job: the order, root, streams,
# and a Landlock ruleset if there is one. What the job can do without its workspace, it then does.
ORDER = b"o"
MOUNTED = b"p"  # init to the job: the workspace is there, and no other is
TERMINAL = b"t"  # init: the job's terminal (descriptor: the pty's master)
SIGNAL = b"s"  # launcher: send the job this signal; SIGKILL, SIGSTOP, SIGCONT are for everything in the container
EXIT = b"x"  # init: the job has ended, and how
FAILED = b"f"  # init: a step failed, nothing was run
# host to launcher: a container will be wanted; do what is the same for all, on other CPUs than these if there are any
BEGIN = b"b"
LAUNCH = b"l"  # host to launcher, launcher to init: build this container (descriptor: init's end of its channel)
MAPPED = b"m"  # launcher to init: the id map is written
ZYGOTE = b"z"  # host to launcher: start this zygote (descriptor: its end of its channel), which is a launcher then
REAP = b"w"  # host to launcher: wait for this init, and tell
RELEASE = b"q"  # host to launcher: wait for this init, which is ending by itself
DELEGATE = b"g"  # host to launcher: make the cgroups of containers below this one
DELEGATED = b"c"  # launcher: done, or why it cannot be
REAPED = b"e"  # launcher: it is gone, and what it used

EXECVE = "execve"  # the step whose failure is the program's fault
PLACEHOLDER = "/workspace/\N{REPLACEMENT CHARACTER}"  # for the file that a zygote's jobs run: no file of anyone's

_MARSHAL = 4  # the version that every Python from 3.4 on reads: a zygote's is not ours
_PACKET = 1 << 14
_REPORT = 4032
_DESCRIPTORS = 8
_EXIT = struct.Struct("=idddQ")
_FAILED = struct.Struct("=i")
_PID = struct.Struct("=i")
_REAPED = struct.Struct("=dQ")


class Container(NamedTuple):
    """What a container is built from, before anyone knows which workspace and program it is for.

    tree is the rootfs; binds are (host path, path in the tree) laid over it read-only; workspaces is the folder that
    an order's workspace lies in; tmp_bytes bounds /tmp, HOME and /dev/shm together; host_id is the id outside that
    uid and gid 1000 stand for, None for the caller's own; processors are the numbers of the CPUs that are seen inside,
    built_on of those that it is built on, where that is to be out of somebody's way, else ();
    landlock is the ABI that its job's ruleset is made for, 0 for a kernel that has none; cgroup is what its cgroup
    limits it to, None for a container that is to have no cgroup of its own.
    """

    tree: str
    binds: tuple[tuple[str, str], ...]
    workspaces: str
    tmp_bytes: int
    host_id: int | None
    processors: tuple[int, ...]
    built_on: tuple[int, ...]
    landlock: int
    cgroup: Limits | None


class Zygote(NamedTuple):
    """What a zygote is started from: an interpreter of a rootfs that will be launcher of containers of that rootfs.

    tree, binds, workspaces and host_id are as in Container. argv starts the interpreter, with PLACEHOLDER for the file
    that it is to run; environment is that of every job; preload names modules to import ahead. processors is how many
    CPUs its jobs see, which some libraries count as they are loaded; 0 where nothing is preloaded.
    """

    tree: str
    binds: tuple[tuple[str, str], ...]
    workspaces: str
    host_id: int | None
    argv: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    preload: tuple[str, ...]
    processors: int


class Order(NamedTuple):
    """What to run in a container that waits.

    terminal is (rows, columns) of a pty to make for it, or None; on_terminal says which of stdin, stdout and stderr
    are that pty, and the others are the descriptors passed with the order, in that sequence.
    argv and environment are bytes as execve takes them; cpu_seconds, file_bytes, open_files and processes are rlimits;
    processors are the CPUs that the job may run on; filters are compiled seccomp programs, all installed, the strictest
    answer wins; with sole_program nothing else than the program itself can be executed. as_main says that argv is what
    the zygote's interpreter was started with, with the file's path and arguments in place of the placeholder: the job,
    which is that interpreter, runs the file, and nothing is executed.
    """

    workspace: str
    argv: list[bytes]
    environment: dict[bytes, bytes]
    terminal: tuple[int, int] | None
    on_terminal: tuple[bool, bool, bool]
    cpu_seconds: int
    file_bytes: int
    open_files: int
    processes: int
    processors: tuple[int, ...]
    filters: tuple[bytes, ...]
    sole_program: bool
    as_main: bool


class Outcome(NamedTuple):
    """How the job ended: its wait status, CPU seconds of all processes but init, peak resident bytes of the largest.

    counted_seconds are the CPU seconds of the job's first process as its limit, RLIMIT_CPU, counts them; init_seconds
    are init's own.
    """

    wait_status: int
    cpu_seconds: float
    counted_seconds: float
    init_seconds: float
    peak_bytes: int


class Reaped(NamedTuple):
    """What the kernel accounted to a container as a whole: CPU seconds, init's own included; peak resident bytes."""

    cpu_seconds: float
    peak_bytes: int


class Failure(NamedTuple):
    """A step that failed, and why; nothing was run. The step `execve` failing is the program's fault, not ours."""

    step: str
    errno: int
    detail: str


class Channel:
    """One end. Once the other end is gone, send raises BrokenPipeError and receive returns an empty kind."""

    def __init__(self, socket: _socket.socket) -> None:
        self._socket = socket

    @classmethod
    def of(cls, descriptor: int) -> "Channel":
        """Return the channel of a descriptor that was passed to us."""
        return cls(_socket.socket(fileno=descriptor))

    def fileno(self) -> int:
        """Return the descriptor, for poll."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def send(self, kind: bytes, body: bytes = b"", descriptors: tuple[int, ...] = ()) -> None:
        """Send one message, passing descriptors along."""
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        try:
            self._socket.sendmsg([kind + body], rights, _socket.MSG_NOSIGNAL)
        except ConnectionResetError as error:  # likewise; the other end is gone all the same
            raise BrokenPipeError(error.errno, "the other end of the channel is gone") from error

    def receive(self) -> tuple[bytes, bytes, list[int]]:
        """Wait for one message: (kind, body, passed descriptors, close-on-exec). (b"", b"", []) at the end."""
        space = _socket.CMSG_SPACE(_DESCRIPTORS * array.array("i").itemsize)
        try:
            packet, ancillary, flags, _ = self._socket.recvmsg(_PACKET, space, _socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            # Said once, ahead of what the other end had sent, when that end closed without reading our last message.
            packet, ancillary, flags, _ = self._socket.recvmsg(_PACKET, space, _socket.MSG_CMSG_CLOEXEC)
        descriptors = array.array("i")
        for level, kind, data in ancillary:
            if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS):
                descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
        if flags & (_socket.MSG_TRUNC | _socket.MSG_CTRUNC):
            raise OSError(errno.EMSGSIZE, "a message on the channel was cut off")
        return packet[:1], packet[1:], list(descriptors)


def pair() -> tuple[Channel, Channel]:
    """Return both ends of a new channel, close-on-exec."""
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    return Channel(ours), Channel(theirs)


def write_order(order: Order) -> int:
    """Return a memfd that holds the order. marshal is fit: both ends are this code, and agree on the version."""
    content = memoryview(marshal.dumps(tuple(order), _MARSHAL))
    descriptor = os.memfd_create("order", os.MFD_CLOEXEC)
    try:
        while content:
            content = content[os.write(descriptor, content) :]
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def read_order(descriptor: int) -> Order:
    """Return the order in a memfd, and close the descriptor."""
    try:
        content = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    finally:
        os.close(descriptor)
    return Order(*marshal.loads(content))  # noqa: S302 - written by write_order, never by a job


def encode_container(container: Container) -> bytes:
    """Return the body of a LAUNCH message."""
    cgroup = None if container.cgroup is None else tuple(container.cgroup)
    return marshal.dumps((*container[:-1], cgroup), _MARSHAL)


def decode_container(body: bytes) -> Container:
    """Return what a LAUNCH message asks for."""
    container = Container(*marshal.loads(body))  # noqa: S302 - written by encode_container, never by a job
    return container._replace(cgroup=None if container.cgroup is None else Limits(*container.cgroup))


def encode_processors(processors: tuple[int, ...]) -> bytes:
    """Return the body of a BEGIN message."""
    return marshal.dumps(processors, _MARSHAL)


def decode_processors(body: bytes) -> tuple[int, ...]:
    """Return the CPUs that a BEGIN message names."""
    return tuple(marshal.loads(body))  # noqa: S302 - written by encode_processors, never by a job


def encode_outcome(outcome: Outcome) -> bytes:
    """Return the body of an EXIT message."""
    return _EXIT.pack(*outcome)


def decode_outcome(body: bytes) -> Outcome:
    """Return what an EXIT message says."""
    return Outcome(*_EXIT.unpack(body))


def encode_zygote(zygote: Zygote) -> bytes:
    """Return the body of a ZYGOTE message."""
    return marshal.dumps(tuple(zygote), _MARSHAL)


def decode_zygote(body: bytes) -> Zygote:
    """Return what a ZYGOTE message asks for."""
    return Zygote(*marshal.loads(body))  # noqa: S302 - written by encode_zygote, never by a job


def encode_failure(failure: Failure) -> bytes:
    """Return the body of a FAILED message."""
    text = f"{failure.step}\0{failure.detail}".encode(errors="replace")
    return _FAILED.pack(failure.errno) + text[:_REPORT]


def decode_failure(body: bytes) -> Failure:
    """Return what a FAILED message says."""
    step, _, detail = body[_FAILED.size :].decode(errors="replace").partition("\0")
    return Failure(step, _FAILED.unpack(body[: _FAILED.size])[0], detail)


def encode_pid(pid: int) -> bytes:
    """Return the body of a LAUNCHED or REAP message."""
    return _PID.pack(pid)


def decode_pid(body: bytes) -> int:
    """Return whom a LAUNCHED or REAP message is about."""
    return int(_PID.unpack(body)[0])


def encode_reaped(reaped: Reaped) -> bytes:
    """Return the body of a REAPED message."""
    return _REAPED.pack(*reaped)


def decode_reaped(body: bytes) -> Reaped:
    """Return what a REAPED message says."""
    return Reaped(*_REAPED.unpack(body))
