"""The line that mends a host, for each way it can fail to isolate. Quoted by the doctor and by every such failure."""

import errno

__all__ = ["remedy_for"]

# A setting of the host, the value that forbids user namespaces to ordinary users, and what allows them.
_SETTINGS = (
    (
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "run as root: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
    ),
    ("/proc/sys/kernel/unprivileged_userns_clone", "0", "run as root: sysctl -w kernel.unprivileged_userns_clone=1"),
    ("/proc/sys/user/max_user_namespaces", "0", "run as root: sysctl -w user.max_user_namespaces=15000"),
)
_KERNEL = "this needs Linux 5.12 or newer with clone3, openat2 and mount_setattr; boot such a kernel"
_MASKED_PROC = (
    "this host is itself a container that hides parts of /proc; start that container with an unmasked /proc "
    "(podman --security-opt unmask=ALL, docker --security-opt systempaths=unconfined)"
)
_OUTER_FILTER = (
    "something around this process forbids it; in a container, start that with --security-opt seccomp=unconfined "
    "--security-opt apparmor=unconfined"
)


def remedy_for(step: str, number: int) -> str | None:
    """Return what mends a host on which this step of isolation failed with this errno, if that is known."""
    if number == errno.ENOSYS:
        return _KERNEL
    if step in {"namespaces", "user namespace", "ids", "user namespace limit"}:
        return _namespace_remedy(number)
    if step == "mounts":
        # mount(2) of proc answers EPERM when every proc in sight hides something (mount_too_revealing in the kernel).
        return _namespace_remedy(number) if _restricted() else _MASKED_PROC
    if number in {errno.EPERM, errno.EACCES}:
        return _namespace_remedy(number)
    if number == errno.ENOMEM:
        return "free memory, or lower the number of execs at once"
    return "run: jhansi-run doctor"


def _restricted() -> bool:
    return any(_reads(path, forbidding) for path, forbidding, _ in _SETTINGS)


def _namespace_remedy(number: int) -> str:
    for path, forbidding, remedy in _SETTINGS:
        if _reads(path, forbidding):
            return remedy
    if number in {errno.ENOSPC, errno.EUSERS}:
        return (
            "run as root: sysctl -w user.max_user_namespaces=15000 (the limit, or the nesting depth of 32, is reached)"
        )
    return _OUTER_FILTER


def _reads(path: str, value: str) -> bool:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip() == value
    except FileNotFoundError:
        return False
