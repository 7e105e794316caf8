"""What this host can enforce, what it cannot, and the line that mends it: by trying, not by reading settings.

The heart is one container like any other, for which a tree is made in a temporary folder: every step of isolation/ is
gone through in its order, up to a program of the host that ran. A step that fails is named with the kernel's reason and
the remedy that an exec would quote (remedies.py). Around it stand the facts of the host that explain such a failure,
and what the stores need. Nothing is left behind, and nothing of JHANSI_HOME is written.

It must be called with one thread, as whoever starts a container.
"""

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from tempfile import TemporaryDirectory

from jhansi_runtime import remedies
from jhansi_runtime.engine import Bounds, InProcess, Launcher, LauncherProcess, Slot, Streams, execute
from jhansi_runtime.errors import HostError, JhansiError, StepFailedError
from jhansi_runtime.isolation import cgroup, syscalls
from jhansi_runtime.isolation.channel import Container, Order
from jhansi_runtime.isolation.idmap import HOST_ID_FOR_ROOT
from jhansi_runtime.isolation.landlock import OLDEST_ABI, usable_abi
from jhansi_runtime.paths import Paths, shipped
from jhansi_runtime.profiles import DEFAULT, ProfileStore
from jhansi_runtime.quantities import size_text
from jhansi_runtime.rootfs import RootfsStore
from jhansi_runtime.spec import Check, Limits

__all__ = ["STEPS", "checks"]

# Every step between nothing and a program that runs, by the names that isolation/ gives them. The job's first steps run
# beside init's, up to where init waits for them: there they stand.
STEPS = (
    *("one thread", "processors of the host", "channel", "namespaces", "id map"),  # launch.py
    *("fork", "detach from the launcher", "loopback", "hostname"),  # inside.py, before it is known what to build
    *("sources", "ids", "process", "user namespace limit", "mounts"),  # inside.py
    *("detach from init", "job's ids", "user namespace", "capabilities", "no_new_privs", "fixed limits"),  # job.py
    *("pivot_root", "landlock ruleset", "descriptors for the host"),  # inside.py
    *("standard streams", "workspace", "children"),
    *("streams", "processors", "limits", "working directory"),  # job.py
    *("landlock restriction", "descriptors", "seccomp", "execve"),
)

# And those of a container that is to have a cgroup.
CGROUP_STEPS = ("cgroup", "cgroup limits")  # launch.py

_NAMESPACES: Mapping[str, int] = {
    "mnt": syscalls.CLONE_NEWNS,
    "pid": syscalls.CLONE_NEWPID,
    "net": syscalls.CLONE_NEWNET,
    "ipc": syscalls.CLONE_NEWIPC,
    "uts": syscalls.CLONE_NEWUTS,
    "cgroup": syscalls.CLONE_NEWCGROUP,
}
_MACHINES = ("x86_64", "aarch64")

# The language of the doctor's own rootfs, which asks no more of the host than /bin/true.
_PROGRAM = "/bin/true"
_WORKSPACE = "one"
_LANGUAGE = "true"
_RECIPE = (
    f'language = "{_LANGUAGE}"\nsuite = ""\npackages = []\ninterpreter = "{_PROGRAM}"\nextensions = []\nrun = []\n'
)

_ROOM_BYTES = 512 << 20  # a python rootfs, and the tar it is made from
_REPORT = "mend the other problems first; if there is none, report this with the output of: jhansi-run doctor --json"


def checks(paths: Paths | None = None) -> list[Check]:
    """Try everything, and say of each thing whether it is as it should be here; each failure carries a remedy.

    Facts that only inform are ok. Names are unique. paths say where things live, by default as the environment does.
    """
    paths = paths or Paths.from_environment()
    calls = list(_call_checks())
    missing = next((call.name for call in calls if not call.ok), None)
    container, groups = _try_container() if missing is None else ([_not_tried("container", missing)], None)
    works = all(check.ok for check in container)
    return [
        *_machine_checks(),
        *calls,
        *_setting_checks(works=works),
        _proc_check(works=works),
        *_namespace_checks(),
        _landlock_check(),
        *container,
        _folder_check("JHANSI_HOME", paths.home, executable=True),
        _folder_check("PETRI_WORKSPACE_ROOT", paths.workspaces, executable=False),
        *_rootfs_checks(paths),
        groups or _not_tried("cgroup", next(check.name for check in container if not check.ok)),
    ]


# --- the container ------------------------------------------------------------------------------------------


def _try_container() -> tuple[list[Check], Check | None]:
    """Run a program in a container; return the checks of its seccomp profile and each step, and that of its cgroup.

    None for the last when there is no container to have one.
    """
    try:
        with TemporaryDirectory(prefix="jhansi-doctor-") as scratch:
            profile, filters = _try_profile(scratch)
            steps = _try_steps(scratch, filters)
            works = all(step.ok for step in steps)
            return [profile, *steps], _try_cgroup(scratch, filters) if works else None
    except OSError as error:
        remedy = "set TMPDIR to a folder that you can write to, with room in it"
        return [_problem("temporary folder", error, remedy)], None


def _try_profile(scratch: str) -> tuple[Check, tuple[bytes, ...]]:
    name = "seccomp profile"
    try:
        # A cache of its own: what an earlier run compiled says nothing about libseccomp now.
        store = ProfileStore(shipped("seccomp"), os.path.join(scratch, "none"), os.path.join(scratch, "cache"))
        profiles = {one: store.open(one) for one in store.names()}
    except JhansiError as error:
        return Check(name=name, ok=False, detail=error.message, remedy=error.remedy or _REPORT), ()
    detail = f"compiled by libseccomp: {', '.join(profiles)}"
    return Check(name=name, ok=True, detail=detail), profiles[DEFAULT].compiled.programs


def _try_steps(scratch: str, filters: tuple[bytes, ...]) -> list[Check]:
    try:
        with _prepared(scratch) as container:
            _run_true(container, filters, InProcess())
    except StepFailedError as error:
        return list(_steps_until(error))
    except JhansiError as error:
        return [Check(name="container", ok=False, detail=error.message, remedy=error.remedy or _REPORT)]
    return [Check(name=step, ok=True, detail="done") for step in STEPS]


def _try_cgroup(scratch: str, filters: tuple[bytes, ...]) -> Check:
    """Run a program in a container with a cgroup of its own, as every exec does where there is one to be had."""
    name, launcher = "cgroup", LauncherProcess(ahead=False)
    try:
        delegation = launcher.delegation()
        if delegation.base is None:
            detail = f"{delegation.detail}; memory, CPU time and CPU share are watched instead (enforcement: watchdog)"
            return Check(name=name, ok=False, detail=detail, remedy=delegation.remedy or _REPORT)
        limits = Limits()
        with _prepared(scratch) as container:
            enforced = cgroup.Limits(limits.memory, limits.pids, limits.cpus)
            _run_true(container._replace(cgroup=enforced), filters, launcher)
    except JhansiError as error:
        return Check(name=name, ok=False, detail=error.message, remedy=error.remedy or _REPORT)
    finally:
        launcher.close()
        launcher.wait()
    return Check(name=name, ok=True, detail=f"memory, processes and CPU share are limited in {delegation.detail}")


@contextmanager
def _prepared(scratch: str) -> Iterator[Container]:
    """Within: what it takes to do what `jhansi-run exec --rootfs host` does, for /bin/true, in a folder of its own."""
    with TemporaryDirectory(dir=scratch) as folder:
        yield _container(folder)


def _container(scratch: str) -> Container:
    host_id = HOST_ID_FOR_ROOT if os.geteuid() == 0 else None
    recipes = os.path.join(scratch, "recipes")
    workspaces = os.path.join(scratch, "workspaces")
    workspace = os.path.join(workspaces, _WORKSPACE)
    for folder in (recipes, workspaces, workspace):
        os.mkdir(folder)
    if host_id is not None:
        # A root that may not give it away may not map the id either, and that is a step, which will say so.
        with suppress(OSError):
            os.chown(workspace, host_id, host_id)
        os.chmod(workspaces, 0o711)  # noqa: S103 - init, which is host_id then, looks the workspace up in it
    with open(os.path.join(recipes, f"{_LANGUAGE}.toml"), "w", encoding="ascii") as file:
        file.write(_RECIPE)
    rootfs = RootfsStore(os.path.join(scratch, "rootfs"), recipes).host(_LANGUAGE)
    processors = tuple(os.sched_getaffinity(0))
    return Container(
        tree=rootfs.tree,
        binds=rootfs.binds,
        workspaces=workspaces,
        tmp_bytes=Limits().tmp,
        host_id=host_id,
        processors=processors,
        built_on=(),
        landlock=usable_abi(),
        cgroup=None,
    )


def _run_true(container: Container, filters: tuple[bytes, ...], launcher: Launcher) -> None:
    """Run /bin/true. HostError says why it cannot be."""
    limits = Limits()
    order = Order(
        workspace=_WORKSPACE,
        argv=[_PROGRAM.encode()],
        environment={},
        terminal=None,
        on_terminal=(False, False, False),
        cpu_seconds=int(limits.cpu_time),
        file_bytes=limits.file_size,
        open_files=limits.nofile,
        processes=limits.pids,
        processors=container.processors,
        filters=filters,
        sole_program=False,
        as_main=False,
    )
    with Slot(container, launcher) as slot:
        bounds = Bounds(limits.timeout, limits.cpu_time, limits.output, limits.memory, limits.disk, limits.cpus)
        ended = execute(slot, order, Streams(), bounds, stdin=b"")
    if ended.failure is not None:
        raise StepFailedError(ended.failure.step, os.strerror(ended.failure.errno))
    if ended.outcome is None or ended.outcome.wait_status != 0:
        raise HostError(f"{_PROGRAM} did not end as it should: {ended}")


def _steps_until(failed: StepFailedError) -> Iterator[Check]:
    """One check of each step: those before the one that failed, that one, and those that were not tried."""
    position = STEPS.index(failed.step)
    for step in STEPS[:position]:
        yield Check(name=step, ok=True, detail="done")
    remedy = failed.remedy if failed.remedy not in {None, remedies.ASK_DOCTOR} else _REPORT
    yield Check(name=failed.step, ok=False, detail=failed.reason, remedy=remedy)
    for step in STEPS[position + 1 :]:
        yield _not_tried(step, failed.step)


# --- the host -----------------------------------------------------------------------------------------------


def _machine_checks() -> Iterator[Check]:
    system = os.uname()
    oldest = ".".join(map(str, remedies.OLDEST_KERNEL))
    yield _check(
        "kernel",
        ok=remedies.kernel_version() >= remedies.OLDEST_KERNEL,
        detail=f"{system.sysname} {system.release}",
        remedy=f"boot Linux {oldest} or newer",
    )
    yield _check(
        "architecture",
        ok=system.machine in _MACHINES,
        detail=system.machine,
        remedy=f"use a machine that is one of: {', '.join(_MACHINES)}",
    )
    yield Check(name="python", ok=True, detail=f"{sys.version.split()[0]}, {sys.executable}")


def _call_checks() -> Iterator[Check]:
    """Call what a kernel may lack, or a filter around this process hide, in a way that changes nothing."""

    def openat2() -> None:
        os.close(syscalls.openat2(syscalls.AT_FDCWD, "/", os.O_PATH, resolve=0))

    def mount_setattr() -> None:
        syscalls.mount_setattr(-1, 0)

    yield _call_check("clone3", lambda: _clone(0))
    yield _call_check("openat2", openat2)
    # Nobody outside a container of ours may mount: to be refused, or told of the bad descriptor, is the answer.
    yield _call_check("mount_setattr", mount_setattr, expected=(errno.EPERM, errno.EBADF))


def _call_check(name: str, call: Callable[[], None], expected: tuple[int, ...] = ()) -> Check:
    try:
        call()
    except OSError as error:
        if error.errno not in expected:
            return _problem(name, error, remedies.remedy_for(name, error.errno or 0))
    return Check(name=name, ok=True, detail="the kernel answers")


def _setting_checks(*, works: bool) -> Iterator[Check]:
    """Settings about user namespaces, and those that forbid another kind. What works in spite of one is no problem."""
    for setting in remedies.SETTINGS:
        value, forbids = setting.value(), setting.forbids()
        if forbids or (value is not None and "user" in setting.name.removeprefix("user.")):
            detail = f"{value}, and this user is allowed namespaces nevertheless" if forbids and works else str(value)
            yield _check(setting.name, ok=works or not forbids, detail=detail, remedy=setting.remedy)


def _proc_check(*, works: bool) -> Check:
    covered = remedies.covered_proc()
    detail = f"covered: {' '.join(covered)}" if covered else "hides nothing, so that a container may have its own"
    return _check("/proc", ok=works or not covered, detail=detail, remedy=remedies.COVERED_PROC)


def _namespace_checks() -> Iterator[Check]:
    """Say which namespace it is that a container cannot have: a user namespace, or one of the others in it."""
    name = "user namespaces"
    try:
        _clone(syscalls.CLONE_NEWUSER)
    except OSError as error:
        yield _problem(name, error, remedies.remedy_for("namespaces", error.errno or 0))
        return
    yield Check(name=name, ok=True, detail="allowed")
    for kind, flag in _NAMESPACES.items():
        name = f"{kind} namespaces"
        try:
            _clone(syscalls.CLONE_NEWUSER | flag)
        except OSError as error:
            yield _problem(name, error, remedies.remedy_for("namespaces", error.errno or 0))
        else:
            yield Check(name=name, ok=True, detail="allowed in a user namespace")


def _landlock_check() -> Check:
    """Which Landlock there is. Without one an exec goes on, and says so: it is a second fence."""
    abi = syscalls.landlock_abi()
    detail = f"ABI {abi}" if abi else "not in this kernel, or not turned on"
    if 0 < abi < OLDEST_ABI:
        detail += ", which would keep files from being moved between folders: not used"
    return _check("landlock", ok=usable_abi() > 0, detail=detail, remedy=remedies.LANDLOCK)


def _clone(flags: int) -> None:
    """Start a process with these CLONE_* flags, which ends at once."""
    pid, pidfd = syscalls.clone3(flags)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(pidfd)


# --- what the stores need -------------------------------------------------------------------------------------


def _folder_check(variable: str, path: str, *, executable: bool) -> Check:
    """Whether a folder can be made and written, with room in it; `executable`: and its programs can be run."""
    there = path
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    another = f"set {variable} to another folder"
    if not os.path.isdir(there):
        return Check(name=variable, ok=False, detail=f"{there} is not a folder", remedy=another)
    if not os.access(there, os.W_OK | os.X_OK):
        return Check(name=variable, ok=False, detail=f"{path} cannot be written", remedy=another)
    filesystem = os.statvfs(there)
    if executable and filesystem.f_flag & os.ST_NOEXEC:
        return Check(name=variable, ok=False, detail=f"{path} is on a filesystem mounted noexec", remedy=another)
    free = filesystem.f_bavail * filesystem.f_frsize
    return _check(
        variable,
        ok=free >= _ROOM_BYTES,
        detail=f"{path}, {size_text(free)} free",
        remedy=f"free disk space until there are {size_text(_ROOM_BYTES)}, or {another}",
    )


def _rootfs_checks(paths: Paths) -> Iterator[Check]:
    """The rootfs of each language that has one, and what builds one."""
    try:
        infos = RootfsStore(paths.rootfs, shipped("rootfs")).infos()
    except JhansiError as error:
        yield Check(name="rootfs", ok=False, detail=error.message, remedy=error.remedy or _REPORT)
        return
    built = ", ".join(f"{info.language} {info.digest}" for info in infos)
    yield Check(name="rootfs", ok=True, detail=built or "none yet; the first exec of a language builds its own")
    builder = shutil.which("mmdebstrap")
    yield _check(
        "mmdebstrap",
        ok=bool(builder or infos),
        detail=f"{builder or 'not here'}; needed only to build a rootfs",
        remedy="run as root: apt-get install mmdebstrap (or use the host's own programs, with --rootfs host)",
    )


# --- records --------------------------------------------------------------------------------------------------


def _check(name: str, *, ok: bool, detail: str, remedy: str) -> Check:
    return Check(name=name, ok=ok, detail=detail, remedy=None if ok else remedy)


def _not_tried(name: str, before: str) -> Check:
    return Check(name=name, ok=False, detail="not tried", remedy=f"mend '{before}' first")


def _problem(name: str, error: OSError, remedy: str | None) -> Check:
    return Check(name=name, ok=False, detail=error.strerror or str(error), remedy=remedy or _REPORT)
