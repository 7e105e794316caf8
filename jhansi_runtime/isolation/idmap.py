"""Which id inside a user namespace is which outside (user_namespaces(7)).

One id is mapped, 1000, because that is all an ordinary user may map without help: no subuid entries, no setuid
newuidmap. Everyone else's files appear as owned by nobody.
"""

import os

__all__ = [
    "HOST_ID_FOR_ROOT",
    "SANDBOX_ID",
    "allow_no_namespace",
    "allow_one_more_namespace",
    "become_sandbox",
    "host_id_by_default",
    "map_from_parent",
    "map_self",
]

SANDBOX_ID = 1000
# Whom a sandbox is outside when root starts it: an id that no system hands out (systemd's UIDS-GIDS: unused range).
HOST_ID_FOR_ROOT = 1_900_000_000


def host_id_by_default() -> int | None:
    """Return whom a sandbox is outside unless something else is asked for: None stands for the caller."""
    return HOST_ID_FOR_ROOT if os.geteuid() == 0 else None


def map_from_parent(pid: int, host_id: int | None) -> None:
    """Map SANDBOX_ID in the namespace of `pid` to host_id, or to the caller when it is None."""
    uid, gid = (os.geteuid(), os.getegid()) if host_id is None else (host_id, host_id)
    # Without setgroups denied, the kernel refuses an unprivileged gid map (CVE-2014-8989). With a host_id the writer
    # is root, and the child must still be able to drop root's supplementary groups.
    if host_id is None:
        _write(f"/proc/{pid}/setgroups", "deny")
    _write(f"/proc/{pid}/uid_map", f"{SANDBOX_ID} {uid} 1")
    _write(f"/proc/{pid}/gid_map", f"{SANDBOX_ID} {gid} 1")


def become_sandbox(host_id: int | None) -> None:
    """Leave root's ids, which the map does not hold, for the sandbox's. An ordinary user has them already."""
    if host_id is not None:
        os.setgroups([])
        os.setresgid(SANDBOX_ID, SANDBOX_ID, SANDBOX_ID)
        os.setresuid(SANDBOX_ID, SANDBOX_ID, SANDBOX_ID)


def allow_one_more_namespace() -> None:
    """Let one user namespace be made inside this one: the job's. The count is kept for all that is nested below.

    The file is per user namespace and speaks of the reader's own (namespaces(7), /proc/sys/user).
    """
    _write("/proc/sys/user/max_user_namespaces", "1")


def allow_no_namespace() -> None:
    """Let no user namespace be made inside this one, the job's own."""
    _write("/proc/sys/user/max_user_namespaces", "0")


def map_self() -> None:
    """Map SANDBOX_ID to itself in the user namespace this process has just made for itself."""
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{SANDBOX_ID} {SANDBOX_ID} 1")
    _write("/proc/self/gid_map", f"{SANDBOX_ID} {SANDBOX_ID} 1")


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
