"""The line that mends a host, for each way it can fail to isolate. Quoted by the doctor and by every such failure.

A remedy says when it needs root; what then stands between `run as root: ` and a parenthesis can be pasted.
"""

import errno
import os
from itertools import takewhile
from typing import NamedTuple

__all__ = [
    "ASK_DOCTOR",
    "COVERED_PROC",
    "LANDLOCK",
    "NO_SYSTEMD",
    "OLDEST_KERNEL",
    "SETTINGS",
    "UNIFIED",
    "WRITABLE_CGROUPS",
    "Setting",
    "covered_proc",
    "delegate_controllers",
    "kernel_version",
    "no_bus",
    "remedy_for",
]

OLDEST_KERNEL = (5, 14)  # RLIMIT_NPROC counts for each user namespace; cgroup.kill
ASK_DOCTOR = "run: jhansi-run doctor"


class Setting(NamedTuple):
    """A sysctl, the value with which it forbids namespaces, and one with which it allows them."""

    name: str
    forbidding: str
    allowing: str

    @property
    def remedy(self) -> str:
        """The line that allows them."""
        line = f"sysctl -w {self.name}={self.allowing}"
        return f"run as root: {line} (it lasts until the next boot; a file in /etc/sysctl.d keeps it)"

    def value(self) -> str | None:
        """What it is now, for this user namespace; None where the kernel has no such setting, or hides it."""
        try:
            with open("/proc/sys/" + self.name.replace(".", "/"), encoding="ascii") as file:
                return file.read().strip()
        except (FileNotFoundError, PermissionError):
            return None

    def forbids(self) -> bool:
        """Whether it forbids namespaces now."""
        return self.value() == self.forbidding


_PERMISSIONS = (
    Setting("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),  # Ubuntu
    Setting("kernel.unprivileged_userns_clone", "0", "1"),  # Debian
)
_COUNTS = tuple(  # namespaces(7): The /proc/sys/user directory
    Setting(f"user.max_{kind}_namespaces", "0", "15000")
    for kind in ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")
)
SETTINGS = (*_PERMISSIONS, *_COUNTS)

_OLD_KERNEL = "boot Linux 5.14 or newer: RLIMIT_NPROC of a user namespace is needed, clone3, openat2 and mount_setattr"
_OUTER_RULES = (
    "something around this process forbids it: start the container that this is with --security-opt seccomp=unconfined "
    "--security-opt apparmor=unconfined, or the systemd service without RestrictNamespaces= and SystemCallFilter="
)
COVERED_PROC = (
    "this host is itself a container that masks parts of /proc: start that container with an unmasked one "
    "(podman: --security-opt unmask=ALL, docker: --security-opt systempaths=unconfined)"
)
_OUTER_COUNT = (
    "a namespace around this one has reached its limit; on the machine itself, run as root: "
    "sysctl -w user.max_user_namespaces=15000 (or nest less: 32 levels are the kernel's own limit)"
)
_ROOT_WITHOUT_IDS = "this root may not give a job an unprivileged id, as in many containers: run it as an ordinary user"
_BY_ERRNO = {
    errno.EDEADLK: "run jhansi-run from such a process, or keep a process with one thread for it",
    errno.ENOMEM: "free memory, or run fewer execs at once",
    errno.EAGAIN: "there are too many processes: raise `ulimit -u`, or the limit of the container or service around",
    errno.EMFILE: "raise the limit of open files: ulimit -n 4096",
    errno.ENFILE: "run as root: sysctl -w fs.file-max=1000000 (the machine has too many files open)",
}

LANDLOCK = (
    "boot Linux 5.19 or newer, with landlock added to the kernel argument lsm= (/sys/kernel/security/lsm tells it)"
)

# What mends a host without cgroups for us.
UNIFIED = "boot with the kernel argument systemd.unified_cgroup_hierarchy=1 (cgroup v1 is not used)"
WRITABLE_CGROUPS = (
    "this host is itself a container: start it with a writable cgroup tree (docker: --cgroupns=private --privileged, "
    "podman: --cgroupns=private --security-opt unmask=/sys/fs/cgroup)"
)
NO_SYSTEMD = "start it in a service or container that is delegated a cgroup, or as root, or boot with systemd"
_NO_MANAGER = "run as root: loginctl enable-linger {uid} (it starts this user's systemd now, and at every boot)"
_NO_SESSION_BUS = "run as root: apt-get install -y dbus-user-session (then log in again)"
_STOPPED_BUS = "run: systemctl --user unmask dbus.socket dbus.service && systemctl --user start dbus.socket"
_NO_SYSTEM_BUS = "run as root: apt-get install -y dbus && systemctl start dbus.socket"
_SESSION_BUS_UNITS = ("/usr/lib/systemd/user/dbus.socket", "/etc/systemd/user/dbus.socket")
_DELEGATE = (
    "run as root: mkdir -p /etc/systemd/system/user@.service.d && "
    "printf '[Service]\\nDelegate=cpu memory pids\\n' >/etc/systemd/system/user@.service.d/99-jhansi.conf && "
    "systemctl daemon-reload && systemctl restart user@{uid}.service (that ends what runs in this user's own systemd)"
)
_DELEGATE_TO_SERVICE = "give the service Delegate=yes, in which this runs"

# Here a refusal is about the permissions of a folder of the user's, not about what the host allows.
_STEPS_ON_FILES = frozenset({"sources", "workspace", "working directory"})
_FOLDERS = "see that the workspace, PETRI_WORKSPACE_ROOT and JHANSI_HOME are this user's, to read and to enter"

# Directories of /proc that are there, and empty for good, to be mounted on: what covers one hides nothing.
_EMPTY_IN_PROC = ("/sys/fs/binfmt_misc", "/fs/nfsd", "/openprom")


def remedy_for(step: str, number: int) -> str | None:
    """Return what mends a host on which this step of isolation failed with this errno, if that is known."""
    if number == errno.ENOSYS:
        return _OLD_KERNEL if kernel_version() < OLDEST_KERNEL else _OUTER_RULES
    if step in _STEPS_ON_FILES:
        return _FOLDERS if number in {errno.EPERM, errno.EACCES} else None
    if number in {errno.ENOSPC, errno.EUSERS}:
        return _count_remedy(step)
    if number in {errno.EPERM, errno.EACCES, errno.EROFS}:
        return _permission_remedy(step, number)
    return _BY_ERRNO.get(number)


def kernel_version() -> tuple[int, int]:
    """Major and minor number of the running kernel, as uname(2) tells it."""
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(takewhile(str.isdigit, minor)))


def covered_proc() -> list[str]:
    """What is mounted over parts of /proc; nothing where one proc is in sight that hides nothing.

    Only then does the kernel let an ordinary user mount another (mount_too_revealing in its fs/namespace.c).
    """
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        mounts = [line.split() for line in file]
    above: list[str] = []
    for identity, _, _, root, place, options, *rest in mounts:
        if root != "/" or rest[rest.index("-") + 1] != "proc":
            continue
        empty = {place + path for path in _EMPTY_IN_PROC}
        above = [mount[4] for mount in mounts if mount[1] == identity and mount[4] not in empty]
        if "ro" in options.split(","):
            above.append(f"{place} (read-only)")
        if not above:
            return []
    return above  # of the last one, which is the one that is seen at /proc


def no_bus(uid: int) -> str:
    """Return what brings the systemd of a user, or of root the system's, within reach."""
    if uid == 0:
        return _NO_SYSTEM_BUS
    if not os.path.exists(f"/run/user/{uid}/systemd"):
        return _NO_MANAGER.format(uid=uid)
    return _STOPPED_BUS if any(map(os.path.exists, _SESSION_BUS_UNITS)) else _NO_SESSION_BUS


def delegate_controllers(uid: int, *, to_service: bool) -> str:
    """Return what hands controllers down to this user, or to the one service that this process is in."""
    return _DELEGATE_TO_SERVICE if to_service or uid == 0 else _DELEGATE.format(uid=uid)


def _count_remedy(step: str) -> str:
    if step == "mounts":
        return "run as root: sysctl -w fs.mount-max=100000 (there are too many mounts)"
    return next((setting.remedy for setting in _COUNTS if setting.forbids()), _OUTER_COUNT)


def _permission_remedy(step: str, number: int) -> str:
    # A container's read-only /proc/sys refuses the write of a limit, its masked /proc the mount of a new one.
    if (number == errno.EROFS or step == "mounts") and covered_proc():
        return COVERED_PROC
    if step == "id map" and os.geteuid() == 0:
        return _ROOT_WITHOUT_IDS
    return next((setting.remedy for setting in _PERMISSIONS if setting.forbids()), _OUTER_RULES)
