"""The kernel's calls that Python lacks: each a thin wrapper that raises OSError.

The host's only user of ctypes; a zygote's interpreter has more (cpython.py).
Constants stand beside the call they belong to, under the kernel's own names, with the man page that explains
them. Nothing here decides anything. Paths are bytes or text as os.fsencode takes them; a directory
descriptor `at` and a relative path name a place without resolving a string twice.
"""

import ctypes
import errno
import os
import struct
from functools import cache

__all__ = [
    "BPF_PROGRAM_UNIT",
    "PTRACE_EVENT_EXIT",
    "capability_ambient",
    "capbset_drop",
    "capset_empty",
    "capset_inheritable",
    "clone3",
    "close_range",
    "command_line_span",
    "erase",
    "fsconfig_create",
    "fsconfig_string",
    "fsmount",
    "fsopen",
    "landlock_abi",
    "landlock_add_path",
    "landlock_create_ruleset",
    "landlock_restrict_self",
    "madvise_populate_write",
    "mount_private",
    "mount_setattr",
    "move_mount",
    "open_tree",
    "openat2",
    "pivot_root",
    "ptrace_seize_until_exit",
    "seccomp_set_filter",
    "set_memory_map",
    "signal_default",
    "umount_detach",
    "unshare",
]

# These are one number on every architecture (asm-generic, 2019 and later) ...
_NR_OPEN_TREE = 428
_NR_MOVE_MOUNT = 429
_NR_FSOPEN = 430
_NR_FSCONFIG = 431
_NR_FSMOUNT = 432
_NR_CLONE3 = 435
_NR_CLOSE_RANGE = 436
_NR_OPENAT2 = 437
_NR_MOUNT_SETATTR = 442
_NR_LANDLOCK_CREATE_RULESET = 444
_NR_LANDLOCK_ADD_RULE = 445
_NR_LANDLOCK_RESTRICT_SELF = 446
# ... and these are not.
_MACHINE = os.uname().machine
_NR_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}.get(_MACHINE, -1)
_NR_RT_SIGACTION = {"x86_64": 13, "aarch64": 134}.get(_MACHINE, -1)
_NR_SECCOMP = {"x86_64": 317, "aarch64": 277}.get(_MACHINE, -1)

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

# PyDLL keeps the interpreter lock across the call: clone3's child starts with it held, as its only thread must.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    if number < 0:
        raise OSError(errno.ENOSYS, f"jhansi-runtime has no system call table for {_MACHINE}")
    # Every integer is passed as a long: ctypes' default, int, would cut 64-bit flags.
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    result: int = _libc.syscall(ctypes.c_long(number), *words)
    if result == -1:
        raise _oserror()
    return result


def _oserror(path: str | bytes | None = None) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), path)


# --- openat2(2) -------------------------------------------------------------------------------------------

RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10


def openat2(at: int, path: str | bytes, flags: int, *, resolve: int, mode: int = 0) -> int:
    """Open `path` from the directory `at` and return a close-on-exec descriptor.

    resolve is a set of RESOLVE_* flags. OSError: ELOOP for a refused link, EXDEV for a path that leaves `at`,
    EAGAIN when a rename raced with a `..` (tried again here, as the man page asks), ENOSYS before Linux 5.6.
    """
    how = struct.pack("QQQ", flags | os.O_CLOEXEC, mode, resolve)
    name = os.fsencode(path)
    if b"\0" in name:
        raise OSError(errno.EINVAL, "a path holds a NUL byte", path)
    for _ in range(128):
        fd = _libc.syscall(ctypes.c_long(_NR_OPENAT2), ctypes.c_long(at), name, how, ctypes.c_long(len(how)))
        if fd >= 0:
            return int(fd)
        if ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR):
            break
    raise _oserror(path)


# --- processes: clone(2), unshare(2), close_range(2) ------------------------------------------------------

CLONE_PIDFD = 0x00001000
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_INTO_CGROUP = 0x200000000

_SIGCHLD = 17
_CLONE_ARGS = struct.Struct("11Q")


def clone3(flags: int, cgroup: int | None = None) -> tuple[int, int]:
    """Fork with CLONE_* flags: (0, -1) in the child, (pid, pidfd) in the parent; the pidfd is close-on-exec.

    The child begins in the cgroup of that descriptor, if one is given (CLONE_INTO_CGROUP).

    Only for a process with one thread: the C library is not told, so a lock another thread held stays held.
    The child's own copy of everything is as after fork(2).
    """
    pidfd = ctypes.c_int(-1)
    if cgroup is not None:
        flags |= CLONE_INTO_CGROUP
    arguments = _CLONE_ARGS.pack(
        flags | CLONE_PIDFD, ctypes.addressof(pidfd), 0, 0, _SIGCHLD, 0, 0, 0, 0, 0, cgroup or 0
    )
    pid = _syscall(_NR_CLONE3, arguments, len(arguments))
    return pid, pidfd.value if pid else -1


def unshare(flags: int) -> None:
    """Leave the namespaces named by CLONE_* flags for fresh ones."""
    if _libc.unshare(ctypes.c_int(flags)) == -1:
        raise _oserror()


def close_range(first: int, last: int = 0x7FFFFFFF) -> None:
    """Close every descriptor from first to last, both included."""
    if first <= last:
        _syscall(_NR_CLOSE_RANGE, first, last, 0)


# --- mounts by descriptor: open_tree(2), move_mount(2), mount_setattr(2), fsopen(2), pivot_root(2) --------

OPEN_TREE_CLONE = 0x1
_OPEN_TREE_CLOEXEC = os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 0x4
_MOVE_MOUNT_T_EMPTY_PATH = 0x40
_FSOPEN_CLOEXEC = 0x1
_FSMOUNT_CLOEXEC = 0x1
_FSCONFIG_SET_STRING = 1
_FSCONFIG_CMD_CREATE = 6
_MS_REC = 0x4000
_MS_PRIVATE = 0x40000
_MNT_DETACH = 2

MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8


def open_tree(at: int, *, recursive: bool) -> int:
    """Clone the mount that the descriptor `at` lies in, from `at` downwards, as a detached mount."""
    flags = OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    return _syscall(_NR_OPEN_TREE, at, b"", flags)


def move_mount(mount: int, target: int) -> None:
    """Attach the detached mount at the file or directory that the descriptor `target` names."""
    _syscall(_NR_MOVE_MOUNT, mount, b"", target, b"", _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH)


def mount_setattr(mount: int, attributes: int, *, recursive: bool = False) -> None:
    """Set MOUNT_ATTR_* on a mount, and on all below it when recursive; clear none.

    Make them private, too (MS_PRIVATE): what the host mounts later must not appear there.
    """
    record = struct.pack("QQQQ", attributes, 0, _MS_PRIVATE, 0)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    _syscall(_NR_MOUNT_SETATTR, mount, b"", flags, record, len(record))


def fsopen(filesystem: bytes) -> int:
    """Begin a new filesystem instance of that type."""
    return _syscall(_NR_FSOPEN, filesystem, _FSOPEN_CLOEXEC)


def fsconfig_string(context: int, key: bytes, value: bytes) -> None:
    """Set one option of a filesystem not yet created."""
    _syscall(_NR_FSCONFIG, context, _FSCONFIG_SET_STRING, key, value, 0)


def fsconfig_create(context: int) -> None:
    """Create the filesystem."""
    _syscall(_NR_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)


def fsmount(context: int, attributes: int) -> int:
    """Return a detached mount of a created filesystem, with MOUNT_ATTR_* attributes."""
    return _syscall(_NR_FSMOUNT, context, _FSMOUNT_CLOEXEC, attributes)


def mount_private() -> None:
    """Cut every mount of this namespace off from the one it was copied from (MS_REC | MS_PRIVATE)."""
    if _libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None) == -1:
        raise _oserror("/")


def pivot_root(new_root: bytes, put_old: bytes) -> None:
    """Make new_root the root mount; with "." and "." the old root is left stacked on top of it."""
    _syscall(_NR_PIVOT_ROOT, new_root, put_old)


def umount_detach(path: bytes) -> None:
    """Take a mount and all below it out of the tree at once (MNT_DETACH)."""
    if _libc.umount2(path, ctypes.c_int(_MNT_DETACH)) == -1:
        raise _oserror(path)


# --- rt_sigaction(2) --------------------------------------------------------------------------------------

_SIGSET_BYTES = 8


def signal_default(number: int) -> None:
    """Give a signal its default action, also one that the C library keeps for itself and hides from sigaction(3)."""
    _syscall(_NR_RT_SIGACTION, number, bytes(32), None, _SIGSET_BYTES)  # struct sigaction: SIG_DFL, no flags, no mask


# --- seccomp(2) -------------------------------------------------------------------------------------------

SECCOMP_SET_MODE_FILTER = 1
BPF_PROGRAM_UNIT = 8  # sizeof(struct sock_filter)


def seccomp_set_filter(program: bytes) -> None:
    """Install a compiled BPF program as this process's filter, for good."""
    buffer = ctypes.create_string_buffer(program, len(program))
    count = len(program) // BPF_PROGRAM_UNIT
    record = struct.pack("HxxxxxxQ", count, ctypes.addressof(buffer))  # struct sock_fprog
    _syscall(_NR_SECCOMP, SECCOMP_SET_MODE_FILTER, 0, record)


# --- landlock_create_ruleset(2), landlock_add_rule(2), landlock_restrict_self(2) -------------------------------------

LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET = 1 << 0
LANDLOCK_SCOPE_SIGNAL = 1 << 1

_LANDLOCK_CREATE_RULESET_VERSION = 1
_LANDLOCK_RULE_PATH_BENEATH = 1


def landlock_abi() -> int:
    """Return the version of Landlock's interface in this kernel; 0 where it was left out or is turned off."""
    try:
        return _syscall(_NR_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_CREATE_RULESET_VERSION)
    except OSError as error:
        if error.errno in {errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}:  # the last from a filter around us
            return 0
        raise


def landlock_create_ruleset(rights: int, scopes: int) -> int:
    """Return a ruleset that refuses these LANDLOCK_ACCESS_FS_* where no rule allows them, and LANDLOCK_SCOPE_*."""
    # Kernels of another ABI know a shorter record: what they do not know has to be left out, and not merely zero.
    record = struct.pack("QQQ", rights, 0, scopes) if scopes else struct.pack("Q", rights)
    return _syscall(_NR_LANDLOCK_CREATE_RULESET, record, len(record), 0)


def landlock_add_path(ruleset: int, path: int, rights: int) -> None:
    """Allow LANDLOCK_ACCESS_FS_* on the file that the descriptor `path` names, and beneath it."""
    _syscall(_NR_LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_RULE_PATH_BENEATH, struct.pack("=Qi", rights, path), 0)


def landlock_restrict_self(ruleset: int) -> None:
    """Put this thread under the ruleset, for good."""
    _syscall(_NR_LANDLOCK_RESTRICT_SELF, ruleset, 0)


# --- prctl(2), capset(2), the command line in /proc -----------------------------------------------------------------

_PR_CAPBSET_DROP = 24
_LINUX_CAPABILITY_VERSION_3 = 0x20080522


def capbset_drop(capability: int) -> bool:
    """Drop one capability from the bounding set; False when this kernel has none of that number (prctl(2), EINVAL)."""
    if _libc.prctl(ctypes.c_int(_PR_CAPBSET_DROP), ctypes.c_ulong(capability)) == 0:
        return True
    if ctypes.get_errno() == errno.EINVAL and capability > 0:
        return False
    raise _oserror()


def capset_empty() -> None:
    """Clear the effective, permitted and inheritable sets of this process, whatever capabilities there are."""
    header = struct.pack("Ii", _LINUX_CAPABILITY_VERSION_3, 0)
    if _libc.capset(header, bytes(24)) == -1:
        raise _oserror()


_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE = 47, 2


def capset_inheritable() -> None:
    """Make every permitted capability inheritable and effective as well."""
    header, data = struct.pack("Ii", _LINUX_CAPABILITY_VERSION_3, 0), ctypes.create_string_buffer(24)
    if _libc.capget(header, data) == -1:
        raise _oserror()
    _, low, _, _, high, _ = struct.unpack("6I", data.raw)
    if _libc.capset(header, struct.pack("6I", low, low, low, high, high, high)) == -1:
        raise _oserror()


def capability_ambient(capability: int) -> bool:
    """Have one capability outlive execve; False when this kernel has none of that number (prctl(2), EINVAL)."""
    arguments = (_PR_CAP_AMBIENT_RAISE, capability, 0, 0)
    if _libc.prctl(_PR_CAP_AMBIENT, *map(ctypes.c_ulong, arguments)) == 0:
        return True
    if ctypes.get_errno() == errno.EINVAL and capability > 0:
        return False
    raise _oserror()


def command_line_span() -> tuple[int, int]:
    """Return where in memory /proc/PID/cmdline is read from, and its length: arg_start, arg_end of /proc/PID/stat."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    if not 0 < start < end:
        raise OSError(errno.EPERM, "/proc/self/stat does not say where the command line is")
    return start, end - start


def erase(start: int, length: int) -> None:
    """Overwrite memory with zeros."""
    ctypes.memset(start, 0, length)


_PR_SET_MM = 35
_PR_SET_MM_MAP = 14
# Of /proc/PID/stat, counted from its third field on: start_code, end_code, start_data, end_data, start_brk; startstack.
_STAT_SEGMENTS = (23, 24, 42, 43, 44)
_STAT_STACK = 25


@cache
def _segments() -> tuple[tuple[int, ...], int]:
    """Return where code, data and heap of this process lie, and its stack; a fork's are where its parent's were."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    return tuple(int(fields[index]) for index in _STAT_SEGMENTS), int(fields[_STAT_STACK])


def set_memory_map(arguments: tuple[int, int], environment: tuple[int, int]) -> None:
    """Have /proc/self/cmdline and environ be read from these spans of memory, (start, end).

    OSError: EINVAL from a kernel without CONFIG_CHECKPOINT_RESTORE.
    """
    segments, stack = _segments()
    _libc.sbrk.restype = ctypes.c_void_p
    record = struct.pack(  # struct prctl_mm_map, linux/prctl.h
        "11QQII",
        *segments,
        _libc.sbrk(ctypes.c_long(0)),
        stack,
        *arguments,
        *environment,
        0,
        0,
        0xFFFFFFFF,  # -1: /proc/self/exe stays what it is
    )
    buffer = ctypes.create_string_buffer(record, len(record))
    option = ctypes.c_ulong(_PR_SET_MM_MAP)
    if _libc.prctl(_PR_SET_MM, option, buffer, ctypes.c_ulong(len(record)), ctypes.c_ulong(0)) == -1:
        raise _oserror()


# --- madvise(2), ptrace(2) ------------------------------------------------------------------------------------------

_MADV_POPULATE_WRITE = 23
_PTRACE_SEIZE = 0x4206
PTRACE_EVENT_EXIT = 6
_PTRACE_O_TRACEEXIT = 1 << PTRACE_EVENT_EXIT


def madvise_populate_write(start: int, length: int) -> None:
    """Have pages there that are this process's own, as if it had written to them. OSError: EINVAL before Linux 5.14."""
    if _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(_MADV_POPULATE_WRITE)) == -1:
        raise _oserror()


def ptrace_seize_until_exit(pid: int) -> None:
    """Have this process stop, as our tracee, when it is about to exit: its memory is there until it goes on."""
    if _libc.ptrace(*map(ctypes.c_long, (_PTRACE_SEIZE, pid, 0, _PTRACE_O_TRACEEXIT))) == -1:
        raise _oserror()
