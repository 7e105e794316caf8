"""What a zygote has and sees, asked of the kernel from outside: who owns its user namespace may look into it.

It is trusted, and its jobs see nothing of it. But an interpreter is large, and what it has not got it cannot lose.
"""

import ctypes
import os
import pathlib
import signal
import time
from contextlib import contextmanager
from typing import NamedTuple

import prctl
import psutil
import pytest
from test_inside import DEVICES, FLAGS, LENT, NAMESPACES

from jhansi_runtime import ExecRequest, Paths, Runtime
from jhansi_runtime.engine import LauncherProcess
from jhansi_runtime.engine.pool import Pool, Sizes
from jhansi_runtime.isolation import spawn

WITHIN_SECONDS = 60
PATIENCE = {"timeout": 300, "cpu_time": 300}
PIDFD_GETFD = 438
HIGHEST = 256
LEAKED = "/etc/passwd"
READ_ONLY = {"ro", "nosuid", "nodev"}
# As in test_inside.py. Beside these there are devices, and what is lent, twice: for itself, and for its containers.
MOUNTS = {
    "/": (None, READ_ONLY),
    "/proc": ("proc", {"rw", "nosuid", "nodev", "noexec"}),
    "/dev": ("tmpfs", {"ro", "nosuid", "noexec"}),
    **{f"/dev/{name}": (None, {"ro", "nosuid", "noexec"}) for name in DEVICES},
    "/tmp": ("tmpfs", READ_ONLY),
    "/tmp/site/jhansi_runtime": (None, READ_ONLY),
    "/tmp/tree": (None, READ_ONLY),
    "/tmp/workspaces": (None, {"rw", "nosuid", "nodev"}),
}
LIBC = ctypes.CDLL(None, use_errno=True)


class Zygote(NamedTuple):
    """A zygote in which a slot waits, and its pidfd."""

    process: psutil.Process
    pidfd: int


@pytest.fixture(scope="module")
def _careless_launcher():
    """A launcher keeps a descriptor that it was given, ignores a signal, and writes for nobody else."""
    with pytest.MonkeyPatch.context() as patch, open(LEAKED, "rb") as file:
        os.set_inheritable(file.fileno(), True)
        before, after = spawn._PROGRAM.split("main(", 1)
        kept = "from jhansi_runtime.isolation import launcher; launcher.close_range = lambda *_: None\n"
        careless = "import os, signal; os.umask(0o077); signal.signal(signal.SIGUSR2, signal.SIG_IGN)\n"
        patch.setattr(spawn, "_PROGRAM", f"{before}{kept}{careless}main({after}")
        yield


@pytest.fixture(scope="module", params=["recipe", "host"])
def rootfs(request):
    return request.param


def eventually(holds):
    deadline = time.monotonic() + WITHIN_SECONDS
    while not (found := holds()):
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)
    return found


@contextmanager
def waiting(environment, rootfs):
    """Within: a Zygote of that rootfs."""
    pool = Pool(LauncherProcess(), Sizes(minimum=1))
    with Runtime(Paths.from_environment(environment), slots=pool) as runtime:
        box = runtime.create(rootfs=rootfs).id
        runtime.write(box, "main.py", b"")

        def made():
            runtime.exec(ExecRequest(sandbox=box, filename="main.py", limits=PATIENCE))
            return [made for shelf in pool._shelves.values() for made in list(shelf.idle) if made.source]

        pidfd = eventually(made)[0].source.process.pidfd
        with open(f"/proc/self/fdinfo/{pidfd}") as file:
            pid = next(int(line.split()[1]) for line in file if line.startswith("Pid:"))
        yield Zygote(psutil.Process(pid), pidfd)
        runtime.remove(box)


@pytest.fixture(scope="module")
def zygote(rootfs, _careless_launcher, runtime_environment):
    with waiting(runtime_environment, rootfs) as zygote:
        yield zygote


def told(process, name):
    return pathlib.Path(f"/proc/{process.pid}/{name}").read_text()


def test_every_namespace_is_its_own_but_that_of_cgroups(zygote):
    theirs = {name: os.readlink(f"/proc/{zygote.process.pid}/ns/{name}") for name in NAMESPACES}
    assert {name for name in NAMESPACES if theirs[name] == os.readlink(f"/proc/self/ns/{name}")} == {"cgroup"}


def test_it_is_not_root_inside_and_no_other_id_is_mapped(zygote):
    for name, own in (("uid_map", os.getuid()), ("gid_map", os.getgid())):
        assert told(zygote.process, name).split() == ["1000", str(own), "1"]


def test_every_mount_is_accounted_for_and_has_its_flags(zygote, rootfs):
    mounts = [line.split(" ") for line in told(zygote.process, "mountinfo").splitlines()]
    lent = {mount[4] for mount in mounts if mount[4] in LENT or mount[4].startswith("/tmp/bind-")}
    assert bool(lent) == (rootfs == "host")
    assert {mount[4] for mount in mounts} == {*MOUNTS, *lent}
    for mount in mounts:
        wanted_kind, wanted = MOUNTS.get(mount[4], (None, READ_ONLY))
        assert set(mount[5].split(",")) & FLAGS == wanted, mount
        assert wanted_kind in {None, mount[mount.index("-") + 1]}, mount
        assert mount[6] == "-", mount  # nothing that the host mounts later appears there


def open_files(pidfd):
    """The inode of each file that a process has open, by the number of its descriptor."""
    found = {}
    for number in range(HIGHEST):
        descriptor = LIBC.syscall(ctypes.c_long(PIDFD_GETFD), pidfd, number, 0)
        if descriptor >= 0:
            found[number] = os.fstat(descriptor).st_ino
            os.close(descriptor)
    return found


def test_it_has_nothing_of_the_launchers(zygote):
    found = open_files(zygote.pidfd)
    assert [number for number, inode in found.items() if inode == found[spawn.CONNECTION]] == [spawn.CONNECTION]
    assert os.stat(LEAKED).st_ino not in found.values()
    status = dict(line.split(":\t", 1) for line in told(zygote.process, "status").splitlines())
    assert status["Umask"].strip() == "0000"
    assert not int(status["SigIgn"], 16) >> (signal.SIGUSR2 - 1) & 1
    assert os.getsid(zygote.process.pid) == zygote.process.pid


def test_proc_shows_neither_its_memory_nor_that_of_what_waits_in_it_to_their_user(zygote):
    family = [zygote.process, *zygote.process.children(recursive=True)]
    assert len(family) >= 3  # an init in it, and that one's job
    for process in family:
        for name in ("mem", "environ", "fd"):
            # What writes an id map is open for that long.
            eventually(lambda path=f"/proc/{process.pid}/{name}": not os.access(path, os.R_OK))


def assert_it_dies_with(victim, process):
    """Kill whoever is above the process, which itself can do nothing about it: only the kernel can act."""
    prctl.set_child_subreaper(1)
    orphans = [process, *([process.parent()] if process.parent() != victim else [])]
    process.suspend()
    try:
        victim.kill()
        assert psutil.wait_procs(orphans, timeout=WITHIN_SECONDS)[1] == []
    finally:
        if process.is_running():
            process.kill()
        prctl.set_child_subreaper(0)


def test_a_killed_launcher_takes_it_along(zygote):
    assert_it_dies_with(zygote.process.parent(), zygote.process)
