"""Which part of the host's cgroup v2 tree is ours: asked once for each launcher, answered with a path or a reason.

In this order: the cgroup we are in, where it was delegated to us (a service with Delegate=yes, a container's root);
a transient scope that systemd makes for the launcher, over D-Bus: the user's manager, or for root the system's; for
root, the root of the tree. systemd owns the rest of the tree (https://systemd.io/CGROUP_DELEGATION): we write nowhere
else.

What is wrong where there is none is told with the line that mends it, which the doctor and --require-cgroup quote.
"""

import errno
import os
import time
from typing import NamedTuple

from jhansi_runtime import remedies
from jhansi_runtime.isolation.cgroup import CONTROLLERS

__all__ = ["Delegation", "Tree", "delegate", "none", "tree"]

_USER_BUS = "/run/user/{uid}/bus"
_SYSTEM_BUS = "/run/dbus/system_bus_socket"
_SYSTEMD = "/run/systemd/system"  # sd_booted(3)
_DELEGATED = (
    "user.delegate",
    "trusted.delegate",
)  # extended attributes that systemd sets; the second is root's to read
_MOVED_WITHIN_SECONDS = 10.0
_MANAGER = "org.freedesktop.systemd1"


class Delegation(NamedTuple):
    """Where cgroups for containers can be made: the path of a cgroup, and how it was had; or why there is none."""

    base: str | None
    detail: str
    remedy: str | None = None


class Tree(NamedTuple):
    """The cgroup v2 tree as this process sees it: where it is mounted, which cgroup of it is the process's own."""

    mount: str
    own: str
    is_read_only: bool

    def controllers(self, path: str) -> frozenset[str]:
        """Return the controllers that a cgroup may hand down."""
        with open(f"{path}/cgroup.controllers", encoding="ascii") as file:
            return frozenset(file.read().split())


def none(reason: str, remedy: str | None = None) -> Delegation:
    """There are no cgroups to be had, for this reason."""
    return Delegation(None, reason, remedy)


def delegate(launcher: int) -> Delegation:
    """Find a part of the tree for the containers of a launcher, which is moved there if systemd has to make one."""
    found = tree()
    if isinstance(found, Delegation):
        return found
    own = _own(found)
    if own is not None:
        return _with_controllers(found, own, "the one that this process was delegated", to_service=True)
    scope = _from_systemd(found, launcher)
    if scope.base is None and os.geteuid() == 0 and not _sees_systemd():
        return _with_controllers(found, found.mount, "the root of the tree, which is root's", to_service=True)
    return scope


def tree() -> Tree | Delegation:
    """Return the tree, or why it is of no use to anyone."""
    mounts = list(_mounts())
    if not mounts:
        return none("no cgroup v2 tree is mounted", remedies.UNIFIED)
    mount, root, is_read_only = mounts[-1]  # of several at one place, the one on top
    own = _own_path()
    inside = os.path.relpath(own, root) if own.startswith(root) else "."
    found = Tree(mount, os.path.normpath(os.path.join(mount, inside)), is_read_only)
    missing = set(CONTROLLERS) - found.controllers(mount)
    if missing:
        names = ", ".join(sorted(missing))
        return none(f"the cgroup v2 tree at {mount} lacks {names}, which cgroup v1 has taken", remedies.UNIFIED)
    if is_read_only:
        return none(f"the cgroup v2 tree at {mount} is mounted read-only", remedies.WRITABLE_CGROUPS)
    return found


# --- our own ------------------------------------------------------------------------------------------------


def _own(found: Tree) -> str | None:
    """Return the cgroup of this process, or the one above it, if it was delegated to whoever runs this.

    The one above it, because whoever is delegated one has to move down in it (systemd: DelegateSubgroup=). The manager
    of a user's session has one as well, which is not for us to write in.
    """
    for path in dict.fromkeys((found.own, os.path.dirname(found.own))):
        if not path.startswith(found.mount) or os.path.basename(path).startswith("user@"):
            continue
        is_containers_root = path == found.mount and os.path.exists(f"{path}/cgroup.type")
        if (is_containers_root or _is_marked(path)) and os.access(f"{path}/cgroup.procs", os.W_OK):
            return path
    return None


def _is_marked(path: str) -> bool:
    for name in _DELEGATED:
        try:
            if os.getxattr(path, name) == b"1":
                return True
        except OSError as error:
            if error.errno not in {errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM}:
                raise
    return False


def _with_controllers(found: Tree, base: str, how: str, *, to_service: bool) -> Delegation:
    missing = set(CONTROLLERS) - found.controllers(base)
    if not missing:
        return Delegation(base, how)
    names = ", ".join(sorted(missing))
    remedy = remedies.delegate_controllers(os.geteuid(), to_service=to_service)
    return none(f"the cgroup {base} was delegated without {names}", remedy)


# --- systemd's ----------------------------------------------------------------------------------------------


def _from_systemd(found: Tree, launcher: int) -> Delegation:
    """Have systemd put the launcher into a scope of its own, and wait until it is there."""
    if not _sees_systemd():
        return none("this process was delegated no cgroup, and there is no systemd to ask for one", remedies.NO_SYSTEMD)
    uid = os.geteuid()
    bus = _SYSTEM_BUS if uid == 0 else _USER_BUS.format(uid=uid)
    if not os.path.exists(bus):
        return none(f"there is no bus at {bus} to ask systemd over", remedies.no_bus(uid))
    name = f"jhansi-{os.urandom(8).hex()}.scope"
    problem = _start_scope(bus, name, launcher)
    if problem is not None:
        return none(f"systemd makes no scope: {problem}", remedies.no_bus(uid))
    deadline = time.monotonic() + _MOVED_WITHIN_SECONDS
    while not (path := _own_path(launcher)).endswith(f"/{name}"):
        if time.monotonic() > deadline:
            return none(f"systemd has not moved the launcher into {name}", remedies.ASK_DOCTOR)
        time.sleep(0.001)
    return _with_controllers(found, found.mount + path, "a scope of systemd's", to_service=False)


def _sees_systemd() -> bool:
    """Say whether systemd is this machine's init, and would understand our pids: they are told to it as numbers."""
    if not os.path.isdir(_SYSTEMD) or os.readlink("/proc/self") != str(os.getpid()):
        return False
    with open("/proc/1/comm", encoding="utf-8", errors="replace") as file:
        return file.read().strip() == "systemd"


def _start_scope(bus: str, name: str, launcher: int) -> str | None:
    """Ask systemd for a transient scope with the launcher in it (org.freedesktop.systemd1(5)). Return what is wrong."""
    from jeepney import DBusAddress, new_method_call  # noqa: PLC0415 - 14 ms, only with systemd
    from jeepney.io.blocking import open_dbus_connection  # noqa: PLC0415 - likewise
    from jeepney.wrappers import DBusErrorResponse, unwrap_msg  # noqa: PLC0415 - likewise

    manager = DBusAddress(f"/{_MANAGER.replace('.', '/')}", _MANAGER, f"{_MANAGER}.Manager")
    properties = [
        ("Description", ("s", "Containers of jhansi-runtime")),
        ("PIDs", ("au", [launcher])),
        ("Delegate", ("b", True)),
        ("TasksMax", ("t", 2**64 - 1)),  # each container has a limit of its own
        ("CollectMode", ("s", "inactive-or-failed")),
    ]
    call = new_method_call(manager, "StartTransientUnit", "ssa(sv)a(sa(sv))", (name, "fail", properties, []))
    try:
        with open_dbus_connection(f"unix:path={bus}", auth_timeout=_MOVED_WITHIN_SECONDS) as connection:
            unwrap_msg(connection.send_and_get_reply(call, timeout=_MOVED_WITHIN_SECONDS))
    except (OSError, DBusErrorResponse) as error:
        return str(error)
    return None


# --- where things are -----------------------------------------------------------------------------------------


def _mounts() -> list[tuple[str, str, bool]]:
    """Return for each mount of the tree its place, which part of the tree is seen there, whether it is read-only."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            _, _, _, root, place, options, *rest = line.split()
            if rest[rest.index("-") + 1] == "cgroup2":
                found.append((place, root, "ro" in options.split(",")))
    return found


def _own_path(pid: int | None = None) -> str:
    """Return the path of a process's cgroup in the v2 tree, as this process's cgroup namespace shows it."""
    with open(f"/proc/{pid or 'self'}/cgroup", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            hierarchy, _, path = line.rstrip("\n").split(":", 2)
            if hierarchy == "0":
                return path
    return "/"
