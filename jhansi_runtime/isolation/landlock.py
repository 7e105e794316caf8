"""Landlock: a second fence behind the mount namespace, of rules on files that the job carries with it (landlock(7)).

Reading and executing is allowed beneath the root of the container, writing beneath the four places that are the job's,
and the use of devices beneath /dev and of message queues; nothing else, whatever is mounted where. From ABI 6 on no
signal and no connection to an abstract socket leaves the job either. The ruleset is made by init, ahead of the order,
and carried out by the job.

A second ruleset can be laid over the first, which lets one program be executed and no other.
"""

import errno
import os
import stat
import struct
from collections.abc import Iterator

from jhansi_runtime.isolation.syscalls import (
    LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET,
    LANDLOCK_SCOPE_SIGNAL,
    RESOLVE_IN_ROOT,
    RESOLVE_NO_MAGICLINKS,
    RESOLVE_NO_SYMLINKS,
    fsconfig_create,
    fsmount,
    fsopen,
    landlock_abi,
    landlock_add_path,
    landlock_create_ruleset,
    landlock_restrict_self,
    openat2,
)

__all__ = ["OLDEST_ABI", "add_workspace", "new_ruleset", "restrict", "restrict_to_program", "usable_abi"]

# Before ABI 2 no file can be moved or linked from one folder to another, whatever a ruleset allows: git does both.
OLDEST_ABI = 2

# linux/landlock.h: LANDLOCK_ACCESS_FS_*
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = (1 << bit for bit in range(4))
_MAKE_CHAR, _MAKE_BLOCK = 1 << 6, 1 << 11
_REFER = 1 << 13
_ALL_SINCE = {2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}  # REFER, then TRUNCATE, then IOCTL_DEV
_IOCTL_DEV = 1 << 15
_SCOPES_SINCE = 6

_READ = _EXECUTE | _READ_FILE | _READ_DIR
_WRITABLE = ("tmp", "home/sandbox", "dev/shm")
_WORKSPACE = "workspace"

_INTERPRETERS = 5  # a #! line may name a script: exec_binprm in the kernel's fs/exec.c
_LINE = 256  # BINPRM_BUF_SIZE, binfmt_script.c
_PATH_BYTES = 4096
_PT_INTERP = 3
_MOST_HEADERS = 64
_ELF_HEADER_BYTES = 64
_PROGRAM_HEADER_BYTES = 56


def usable_abi() -> int:
    """Return the ABI that this kernel offers and that jobs can live with; 0 where there is none."""
    abi = landlock_abi()
    return abi if abi >= OLDEST_ABI else 0


def new_ruleset(root: int, abi: int) -> int:
    """Return a ruleset for the container of that root, but for its workspace, which is not there yet."""
    scopes = LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | LANDLOCK_SCOPE_SIGNAL if abi >= _SCOPES_SINCE else 0
    ruleset = landlock_create_ruleset(_all(abi), scopes)
    _add(ruleset, root, ".", _READ)
    # Devices are opened and asked, not made.
    _add(ruleset, root, "dev", (_WRITE_FILE | _IOCTL_DEV) & _all(abi))
    for place in _WRITABLE:
        _add(ruleset, root, place, _owned(abi))
    queues = _message_queues()
    if queues is not None:
        landlock_add_path(ruleset, queues, _owned(abi))
        os.close(queues)
    return ruleset


def add_workspace(ruleset: int, root: int, abi: int) -> None:
    """Let the job write beneath the workspace, once it is mounted."""
    _add(ruleset, root, _WORKSPACE, _owned(abi))


def restrict(ruleset: int) -> None:
    """Put this process, and all that descends from it, under the ruleset, for good."""
    landlock_restrict_self(ruleset)


def restrict_to_program(root: int, program: bytes, path: bytes) -> None:
    """Let this process execute `program`, as execvpe(3) finds it on `path`, with its interpreters, and nothing else.

    root is a descriptor of this process's own.
    A program that is not there, or is none, is left for execve to name.
    """
    # A ruleset that does not speak of moves between folders forbids them.
    ruleset = landlock_create_ruleset(_EXECUTE | _REFER, 0)
    try:
        _add(ruleset, root, ".", _REFER)
        for file in _executables(program, path):
            landlock_add_path(ruleset, file, _EXECUTE)
        landlock_restrict_self(ruleset)
    finally:
        os.close(ruleset)


def _all(abi: int) -> int:
    """Every right that a ruleset of this ABI can take away: what is not allowed by a rule is refused."""
    return next(rights for since, rights in reversed(_ALL_SINCE.items()) if abi >= since)


def _owned(abi: int) -> int:
    return _all(abi) & ~(_MAKE_CHAR | _MAKE_BLOCK | _IOCTL_DEV)


def _add(ruleset: int, root: int, place: str, rights: int) -> None:
    resolve = RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS
    descriptor = openat2(root, place, os.O_PATH | os.O_DIRECTORY, resolve=resolve)
    try:
        landlock_add_path(ruleset, descriptor, rights)
    finally:
        os.close(descriptor)


def _message_queues() -> int | None:
    """Return a descriptor of the POSIX message queues of this IPC namespace, None for a kernel without any.

    mq_open(2) finds them there, in a filesystem that need not be mounted anywhere (mq_overview(7)).
    """
    try:
        context = fsopen(b"mqueue")
    except OSError as error:
        if error.errno == errno.ENODEV:
            return None
        raise
    try:
        fsconfig_create(context)
        return fsmount(context, 0)
    finally:
        os.close(context)


# --- one program --------------------------------------------------------------------------------------------------


def _executables(program: bytes, path: bytes) -> Iterator[int]:
    """Yield a descriptor of the program, then of each file that the kernel executes to run it."""
    name: bytes | None = program if b"/" in program else _found(program, path)
    for _ in range(_INTERPRETERS):
        descriptor = None if name is None else _open_program(name)
        if descriptor is None:
            return
        try:
            yield descriptor
            name = _script_interpreter(descriptor) or _elf_interpreter(descriptor)
        finally:
            os.close(descriptor)


def _found(name: bytes, path: bytes) -> bytes | None:
    candidates = (os.path.join(folder, name) for folder in path.split(b":"))
    return next((candidate for candidate in candidates if os.access(candidate, os.X_OK)), None)


def _open_program(name: bytes) -> int | None:
    """Return a descriptor of a plain file, never waiting for a FIFO; None when it is none."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO}:
            return None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        return None
    return descriptor


def _script_interpreter(descriptor: int) -> bytes | None:
    start = os.pread(descriptor, _LINE, 0)
    words = start[2:].split(b"\n", 1)[0].split(None, 1) if start.startswith(b"#!") else []
    return words[0] if words else None


def _elf_interpreter(descriptor: int) -> bytes | None:
    """Return what PT_INTERP names in a 64-bit ELF file (elf(5)). The file may be anyone's: bounds come first."""
    header = _read_at(descriptor, _ELF_HEADER_BYTES, 0)
    if header is None or not header.startswith(b"\x7fELF\x02\x01"):
        return None
    (table,) = struct.unpack_from("<Q", header, 32)
    size, count = struct.unpack_from("<HH", header, 54)
    for number in range(min(count, _MOST_HEADERS)):
        entry = _read_at(descriptor, _PROGRAM_HEADER_BYTES, table + number * size)
        if entry is not None and struct.unpack_from("<I", entry)[0] == _PT_INTERP:
            offset, length = struct.unpack_from("<Q", entry, 8)[0], struct.unpack_from("<Q", entry, 32)[0]
            name = _read_at(descriptor, min(length, _PATH_BYTES), offset)
            return None if name is None else name.split(b"\0", 1)[0] or None
    return None


def _read_at(descriptor: int, length: int, offset: int) -> bytes | None:
    """Return exactly so many bytes, None when the file has not got them there."""
    if offset >= 1 << 63:
        return None
    content = os.pread(descriptor, length, offset)
    return content if len(content) == length else None
