"""Control groups (cgroups(7); cgroup-v2.rst in the kernel's documentation): one for each exec, entered at its clone.

Which cgroup is ours to make them in is for others to find out (engine/delegation.py); here that is the *base*. Below it
each launcher has a branch of its own, which it holds a flock on as long as it lives:

    BASE/jhansi-HEX/            the branch; its controllers are handed down
        launcher/               the launcher itself: a cgroup that hands controllers down may hold no process
        1/ 2/ 3/ ...            one for each container: its init and its job, nothing else
    BASE/jhansi-others/         whoever was in BASE before, for the same reason

A branch that nobody holds is a killed launcher's, and whoever comes next sweeps it away. All of it is the launcher's to
do, but reading the figures of an exec, for which the host is given a descriptor.
"""

import errno
import fcntl
import os
from contextlib import suppress
from typing import NamedTuple

__all__ = [
    "CONTROLLERS",
    "Branch",
    "Figures",
    "Group",
    "Limits",
    "branch",
    "cpu_seconds",
    "figures",
    "hand_over",
    "limit",
    "make",
    "remove",
    "sweep",
]

CONTROLLERS = ("cpu", "memory", "pids")

_BRANCH = "jhansi-"
_RANDOM_BYTES = 8
_OTHERS = "jhansi-others"
_LAUNCHER = "launcher"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PERIOD_MICROSECONDS = 100_000  # of cpu.max; the kernel's own default
_SHORTEST_QUOTA = 1000  # microseconds: the kernel takes no less
_INIT = 1  # PID 1 of a container counts as a process of its cgroup, and not as one of the job's
_ATTEMPTS = 50
_READ = 4096


class Branch(NamedTuple):
    """A launcher's part of the tree: its path, and a descriptor of it that holds the flock."""

    path: str
    descriptor: int


class Group(NamedTuple):
    """The cgroup of one container: its name in the branch, and a descriptor of it."""

    name: str
    descriptor: int


class Limits(NamedTuple):
    """What the processes of a job may use together: bytes of memory, processes and threads, CPUs' worth of time."""

    memory: int
    processes: int
    cpus: float


class Figures(NamedTuple):
    """What the kernel has counted in one cgroup.

    CPU seconds, init's own included; the peak of memory in bytes, None before Linux 5.19; how often memory ran out and
    processes were killed for it; how often a fork was refused for the limit of processes.
    """

    cpu_seconds: float
    peak_bytes: int | None
    oom_kills: int
    forks_refused: int


def branch(base: str) -> Branch:
    """Make a branch of the base with this process in it, and hand the controllers down. OSError: it cannot be had.

    What killed launchers have left there is swept away first.
    """
    top = _locked(base)
    try:
        _sweep(top)
        name = f"{_BRANCH}{os.urandom(_RANDOM_BYTES).hex()}"
        os.mkdir(name, dir_fd=top)
        descriptor = os.open(name, _DIRECTORY, dir_fd=top)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _enter(descriptor, _LAUNCHER, (os.getpid(),))
            _hand_down_from_base(top)
            _hand_down(descriptor)
        except OSError:
            os.close(descriptor)
            raise
    finally:
        os.close(top)
    return Branch(f"{base}/{name}", descriptor)


def sweep(base: str) -> None:
    """Remove the branches of launchers that have ended. OSError when one of them cannot be removed."""
    top = _locked(base)
    try:
        _sweep(top)
    finally:
        os.close(top)


def hand_over(place: Branch, owner: int) -> None:
    """Let a user and group of that id make cgroups in a branch, and clone into them from another cgroup of it.

    That is what the kernel calls delegation, and takes no more than these two: cgroup-v2.rst. The limits of the branch
    itself stay ours.
    """
    for path in (".", "cgroup.procs"):
        os.chown(path, owner, owner, dir_fd=place.descriptor, follow_symlinks=False)


def make(place: Branch) -> Group:
    """Make the cgroup of one container in a branch."""
    name = os.urandom(8).hex()
    os.mkdir(name, dir_fd=place.descriptor)
    return Group(name, os.open(name, _DIRECTORY, dir_fd=place.descriptor))


def limit(group: int, limits: Limits) -> None:
    """Set the limits of a cgroup. OSError when one of them cannot be enforced."""
    _write(group, "memory.max", str(limits.memory))
    # All or nothing: a job of which the kernel has killed some process is a job that goes on in an unknown state.
    _write(group, "memory.oom.group", "1")
    try:
        _write(group, "memory.swap.max", "0")
    except FileNotFoundError:  # a kernel without accounting of swap, which must then have none
        if _has_swap():
            raise
    _write(group, "pids.max", str(limits.processes + _INIT))
    quota = max(_SHORTEST_QUOTA, round(limits.cpus * _PERIOD_MICROSECONDS))
    _write(group, "cpu.max", f"{quota} {_PERIOD_MICROSECONDS}")


def figures(group: int) -> Figures:
    """Return what the kernel has counted so far in the cgroup of that descriptor."""
    try:
        peak = int(_read(group, "memory.peak"))
    except FileNotFoundError:
        peak = None
    return Figures(
        cpu_seconds=cpu_seconds(group),
        peak_bytes=peak,
        oom_kills=_table(group, "memory.events")["oom_kill"],
        forks_refused=_table(group, "pids.events")["max"],
    )


def cpu_seconds(group: int) -> float:
    """Return the CPU time that all processes of a cgroup have used, those that have ended included."""
    return _table(group, "cpu.stat")["usage_usec"] / 1e6


def remove(place: Branch, group: Group) -> None:
    """Kill whatever is left in a container's cgroup, and remove it from its branch."""
    try:
        _remove(place.descriptor, group.name)
    finally:
        os.close(group.descriptor)


# --- within -------------------------------------------------------------------------------------------------


def _locked(base: str) -> int:
    """Return a descriptor of the base, locked: nobody else makes or sweeps a branch until it is closed."""
    top = os.open(base, _DIRECTORY)
    try:
        fcntl.flock(top, fcntl.LOCK_EX)
    except OSError:
        os.close(top)
        raise
    return top


def _sweep(top: int) -> None:
    """Remove the branches that no launcher holds any more."""
    for name in filter(_is_branch, os.listdir(top)):
        left = os.open(name, _DIRECTORY, dir_fd=top)
        try:
            fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for group in _children(left):
                _remove(left, group)
            _remove(top, name)
        except BlockingIOError:
            continue  # a launcher lives there
        finally:
            os.close(left)


def _is_branch(name: str) -> bool:
    digits = name.removeprefix(_BRANCH)
    return name.startswith(_BRANCH) and len(digits) == 2 * _RANDOM_BYTES and set(digits) <= set("0123456789abcdef")


def _children(descriptor: int) -> list[str]:
    with os.scandir(descriptor) as entries:
        return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def _remove(parent: int, name: str) -> None:
    """Kill what is in a cgroup that has no children, wait until it is gone, and remove the cgroup."""
    group = os.open(name, _DIRECTORY, dir_fd=parent)
    try:
        _write(group, "cgroup.kill", "1")
        for attempt in range(_ATTEMPTS):
            try:
                os.rmdir(name, dir_fd=parent)
            except OSError as error:
                if error.errno != errno.EBUSY or attempt == _ATTEMPTS - 1:
                    raise
                _await_empty(group)
            else:
                return
    finally:
        os.close(group)


def _await_empty(group: int) -> None:
    """Return when the kernel says that something has changed about who is in a cgroup, or soon after."""
    import select  # noqa: PLC0415 - only for one that is not empty yet

    events = os.open("cgroup.events", os.O_RDONLY | os.O_CLOEXEC, dir_fd=group)
    try:
        poll = select.poll()
        poll.register(events, select.POLLPRI)
        if b"populated 1" in os.read(events, _READ):
            poll.poll(100)
    finally:
        os.close(events)


def _hand_down_from_base(top: int) -> None:
    """Hand the controllers of the base down, after all that is in it has been moved aside."""
    if set(CONTROLLERS) <= set(_read(top, "cgroup.subtree_control").split()):
        return
    for attempt in range(_ATTEMPTS):
        try:
            _hand_down(top)
        except OSError as error:  # EBUSY: there are processes in it, and only the root of the tree may have both
            if error.errno != errno.EBUSY or attempt == _ATTEMPTS - 1:
                raise
            _enter(top, _OTHERS, tuple(map(int, _read(top, "cgroup.procs").split())))
        else:
            return


def _hand_down(descriptor: int) -> None:
    _write(descriptor, "cgroup.subtree_control", " ".join(f"+{controller}" for controller in CONTROLLERS))


def _enter(parent: int, name: str, pids: tuple[int, ...]) -> None:
    """Move processes into a child of a cgroup, made if it is missing. One that has ended meanwhile is no matter."""
    with suppress(FileExistsError):
        os.mkdir(name, dir_fd=parent)
    for pid in pids:
        with suppress(ProcessLookupError):
            _write(parent, f"{name}/cgroup.procs", str(pid))


def _has_swap() -> bool:
    with open("/proc/swaps", encoding="ascii", errors="replace") as file:
        return len(file.readlines()) > 1  # the first line is a heading


def _table(group: int, name: str) -> dict[str, int]:
    """Return a file of `name number` lines."""
    return {key: int(value) for key, value in (line.split() for line in _read(group, name).splitlines())}


def _read(at: int, name: str) -> str:
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=at)
    try:
        content = b""
        while chunk := os.read(descriptor, _READ):
            content += chunk
        return content.decode("ascii")
    finally:
        os.close(descriptor)


def _write(at: int, name: str, text: str) -> None:
    descriptor = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=at)
    try:
        os.write(descriptor, text.encode("ascii"))
    finally:
        os.close(descriptor)
