"""One exec from request to result: the program resolved, the start recorded, the container run, the end recorded.

The container is begun before the audit record is written, so that the kernel builds it meanwhile; it is given nothing
to run before that record is there.
"""

import errno
import fcntl
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

from msgspec import structs

from jhansi_runtime.audit import AuditLog
from jhansi_runtime.disk import allowed, ended_message
from jhansi_runtime.engine import Bounds, Ended, Slot, Slots, Streams, Wanted, execute
from jhansi_runtime.errors import HostError, InvalidRequestError, JhansiError, NotExecutableError, ProgramMissingError
from jhansi_runtime.isolation import cgroup
from jhansi_runtime.isolation.channel import PLACEHOLDER, Failure, Order, Zygote
from jhansi_runtime.places import Place
from jhansi_runtime.profiles import Profile
from jhansi_runtime.quantities import size_text
from jhansi_runtime.rootfs import Rootfs
from jhansi_runtime.runs import Run
from jhansi_runtime.spec import Encoding, ExecRequest, ExecResult, Limits, Status
from jhansi_runtime.workspace import Program, Workspace

__all__ = ["Exec", "find_program", "perform"]

_WORKSPACE = "/workspace"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ENVIRONMENT = {"PATH": _PATH, "HOME": "/home/sandbox", "LANG": "C.UTF-8"}
# What an interpreter goes by as it starts, and a zygote's has started already.
_OF_THE_START = ("PYTHON", "LANGUAGE", "LC_", "TZ", "LD_", "MALLOC_", "GLIBC_", "OPENBLAS_", "OMP_", "MKL_")
_SOURCES = (".py", ".pyc", ".pyw")  # what is one module, and not an archive of some
_MISSING = frozenset({errno.ENOENT, errno.ENOTDIR})


class Exec(NamedTuple):
    """One exec, with everything decided: what, where, in what, within what, for whom, under which id.

    found is the file of the workspace to run, None when the request names a program of the rootfs; landlock is the ABI,
    0 for none; preload names what a zygote for it imports ahead, "auto" is what the file imports, None where it is to
    have no zygote.
    """

    run: Run
    run_id: str
    actor: str
    place: Place
    rootfs: Rootfs
    profile: Profile
    landlock: int
    limits: Limits
    request: ExecRequest
    found: Program | None
    preload: Sequence[str] | None


class _Program(NamedTuple):
    """What to execute. by_recipe: argv is the recipe's, with the path of the file in it."""

    argv: list[str]
    file: str | None
    sha256: str | None
    by_recipe: bool = False


def find_program(request: ExecRequest, workspace: Workspace) -> Program | None:
    """Return the file that the request is to run, None when it names a program of the rootfs.

    ProgramMissingError, NotExecutableError; InvalidRequestError when the request names both or neither.
    """
    if (request.filename is None) == (not request.command):
        raise InvalidRequestError("name either a file of the workspace or a command, and not both")
    return None if request.filename is None else workspace.open_program(request.filename)


def perform(this: Exec, slots: Slots, audit: AuditLog, streams: Streams) -> ExecResult:
    """Run one exec in a slot of those, and return its result.

    ProgramMissingError and NotExecutableError say that there was nothing to run, DiskLimitError that the workspace is
    full already, HostError that the job could not be confined; in each case nothing was run, and if the start was
    recorded, so is the end.
    """
    environment = _environment(this.request)
    program = _program(this)
    room = this.place.files.room
    assert room is not None  # noqa: S101 - a place is a workspace that is held to be changed
    _require_cgroup(this, slots)
    with _in_use(this.rootfs) as identity, slots.taken(_wanted(this, program, environment, identity)) as slot:
        order = _order(this, program, environment, slot)
        room.require()
        started_at = _record_start(this, audit, program)
        ended = None
        try:
            with closing(room.watch()) as watch:
                ended = execute(
                    slot,
                    order,
                    streams,
                    _bounds(this.limits),
                    stdin=_bytes(this.request.stdin),
                    watches=(watch,),
                )
        except OSError as error:
            raise HostError(f"the job's output or input could not be passed on: {error}") from error
        finally:
            if ended is None:
                _record_failure(this, audit, str(sys.exception()))
        # Not every job is there long enough to be looked at.
        if ended.reason is None and not room.settle().fits(room.most):
            ended = ended._replace(reason="disk_limit")
        result = _result(this, ended, streams, started_at)
        _record_end(this, audit, result, ended)
    if ended.failure is not None:
        raise _not_run(ended.failure, program)
    return result


def _require_cgroup(this: Exec, slots: Slots) -> None:
    """HostError when the limits are to be control groups' to enforce, and there are none."""
    if this.limits.require_cgroup:
        delegation = slots.delegation()
        if delegation.base is None:
            raise HostError(f"the limits cannot be enforced by cgroups: {delegation.detail}", remedy=delegation.remedy)


def _wanted(this: Exec, program: _Program, environment: dict[str, str], identity: tuple[int, int]) -> Wanted:
    limits = this.limits
    return Wanted(
        tree=this.rootfs.tree,
        identity=identity,
        binds=this.rootfs.binds,
        workspaces=this.place.workspaces,
        tmp_bytes=limits.tmp,
        host_id=this.place.host_id,
        landlock=this.landlock,
        cpus=limits.cpus,
        limits=cgroup.Limits(limits.memory, limits.pids, limits.cpus),
        zygote=_zygote(this, program, environment),
    )


def _zygote(this: Exec, program: _Program, environment: dict[str, str]) -> Zygote | None:
    """Return the zygote whose slots can run it, None where it takes an interpreter of its own."""
    recipe = this.rootfs.recipe
    if not program.by_recipe or not recipe.zygote or not this.rootfs.is_trusted or this.preload is None:
        return None
    if any(name.startswith(_OF_THE_START) for name in environment) or not _ENVIRONMENT.items() <= environment.items():
        return None
    preload = _preload(this)
    return Zygote(
        tree=this.rootfs.tree,
        binds=this.rootfs.binds,
        workspaces=this.place.workspaces,
        host_id=this.place.host_id,
        argv=tuple(PLACEHOLDER if word == "{file}" else word for word in recipe.run),
        environment=tuple(_ENVIRONMENT.items()),
        preload=preload,
        processors=min(math.ceil(this.limits.cpus), len(os.sched_getaffinity(0))) if preload else 0,
    )


def _preload(this: Exec) -> tuple[str, ...]:
    found = this.found
    # An archive may hold modules of any name, and of those a program finds its own first.
    if found is None or this.preload is None or not found.path.endswith(_SOURCES):
        return ()
    if this.preload == "auto":
        from jhansi_runtime.imports import imported  # noqa: PLC0415 - only where that is wanted

        return imported(found.head, this.place.files.fd, found.path)
    return tuple(this.preload)


def _order(this: Exec, program: _Program, environment: dict[str, str], slot: Slot) -> Order:
    return Order(
        workspace=this.place.workspace,
        argv=[os.fsencode(word) for word in program.argv],
        environment={os.fsencode(name): os.fsencode(value) for name, value in environment.items()},
        terminal=None,
        on_terminal=(False, False, False),
        cpu_seconds=math.ceil(this.limits.cpu_time),
        file_bytes=this.limits.file_size,
        open_files=this.limits.nofile,
        processes=this.limits.pids + (slot.container.cgroup is not None),  # it refuses first, and counts how often
        processors=slot.container.processors,
        filters=this.profile.compiled.programs,
        sole_program=this.profile.compiled.sole_program,
        as_main=slot.has_interpreter and program.by_recipe,
    )


def _bounds(limits: Limits) -> Bounds:
    return Bounds(limits.timeout, limits.cpu_time, limits.output, limits.memory, limits.disk, limits.cpus)


@contextmanager
def _in_use(rootfs: Rootfs) -> Iterator[tuple[int, int]]:
    """Keep the rootfs from being removed meanwhile. Yield what tells it from any other: device and inode."""
    tree = os.open(rootfs.tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(tree, fcntl.LOCK_SH)
        status = os.fstat(tree)
        yield status.st_dev, status.st_ino
    finally:
        os.close(tree)


def _program(this: Exec) -> _Program:
    """Return what to execute: the file of the workspace as its language runs it, or a program of the rootfs."""
    request, recipe, found = this.request, this.rootfs.recipe, this.found
    if any("\0" in word for word in (*request.command, *request.args)):
        raise InvalidRequestError("args: an argument cannot hold a NUL character")
    if found is None:
        if not request.command[0]:
            raise InvalidRequestError(
                "command: the name of the program is empty", remedy="name a program of the rootfs"
            )
        return _Program([*request.command, *request.args], None, None)
    path = f"{_WORKSPACE}/{found.path}"
    extension = os.path.splitext(found.path)[1]
    if extension in recipe.extensions or (not extension and not found.executable):
        start, by_recipe = [path if word == "{file}" else word for word in recipe.run], True
    elif found.executable:
        start, by_recipe = [path], False
    else:
        raise NotExecutableError(
            f"{found.path!r} is not one of {' '.join(recipe.extensions)}, and is not executable",
            remedy="make it executable, with a #! line; or run a program of the rootfs on it with --command",
        )
    return _Program([*start, *request.args], found.path, found.sha256, by_recipe)


def _environment(request: ExecRequest) -> dict[str, str]:
    for name, value in request.env.items():
        if not name or "=" in name or "\0" in name + value:
            raise InvalidRequestError(f"not the name and value of an environment variable: {name!r}")
    return {**_ENVIRONMENT, **request.env}


def _bytes(stdin: str | bytes) -> bytes:
    return stdin if isinstance(stdin, bytes) else stdin.encode(errors="surrogateescape")


def _who(this: Exec) -> dict[str, Any]:
    return {"actor": this.actor, "sandbox_id": this.place.sandbox_id, "run_id": this.run_id}


def _record_start(this: Exec, audit: AuditLog, program: _Program) -> str:
    this.run.awaits_end = True
    record = audit.append(
        "exec.start",
        **_who(this),
        file=program.file,
        file_sha256=program.sha256,
        argv=program.argv,
        environment=sorted(this.request.env),
        rootfs=this.rootfs.digest,
        seccomp=this.profile.name,
        profile=this.profile.digest,
        landlock=this.landlock,
        limits=structs.asdict(this.limits),
        network="none",
    )
    return str(record["time"])


def _record_failure(this: Exec, audit: AuditLog, reason: str) -> None:
    audit.append("exec.end", **_who(this), status="failed", message=reason)
    this.run.awaits_end = False


def _record_end(this: Exec, audit: AuditLog, result: ExecResult, ended: Ended) -> None:
    audit.append(
        "exec.end",
        **_who(this),
        status=result.status,
        exit_code=result.exit_code,
        signal=result.signal,
        message=result.message,
        enforcement=result.enforcement,
        accounting=result.accounting,
        wall_time_ms=result.wall_time_ms,
        cpu_time_ms=result.cpu_time_ms,
        memory_peak_bytes=result.memory_peak_bytes,
        stdout_bytes=result.stdout_bytes,
        stderr_bytes=result.stderr_bytes,
        stdout_sha256=ended.stdout.sha256,
        stderr_sha256=ended.stderr.sha256,
    )
    this.run.awaits_end = False


def _result(this: Exec, ended: Ended, streams: Streams, started_at: str) -> ExecResult:
    status, exit_code, number = _status(this, ended)
    captured = this.request.encoding
    return ExecResult(
        run_id=this.run_id,
        sandbox_id=this.place.sandbox_id,
        status=status,
        exit_code=exit_code,
        signal=None if number is None else _signal_name(number),
        stdout=_text(ended.stdout.captured, captured) if streams.stdout is None else None,
        stderr=_text(ended.stderr.captured, captured) if streams.stderr is None else None,
        stdout_bytes=ended.stdout.size,
        stderr_bytes=ended.stderr.size,
        stdout_truncated=ended.stdout.truncated,
        stderr_truncated=ended.stderr.truncated,
        wall_time_ms=round(ended.wall_seconds * 1000, 3),
        cpu_time_ms=round(ended.usage.cpu_seconds * 1000, 3),
        memory_peak_bytes=ended.usage.peak_bytes,
        timed_out=status == "timed_out",
        oom_killed=status == "oom_killed",
        message=_message(status, exit_code, number, this.limits) + _refused(ended.usage.forks_refused, this.limits),
        enforcement="cgroup" if ended.in_cgroup else "watchdog",
        accounting="exact" if ended.usage.is_exact else "sampled",
        seccomp=this.profile.name,
        seccomp_digest=this.profile.digest,
        landlock=this.landlock,
        rootfs=this.rootfs.digest,
        limits=this.limits,
        started_at=started_at,
    )


def _status(this: Exec, ended: Ended) -> tuple[Status, int | None, int | None]:
    """Return the status, the exit code if it exited, and the signal's number if one ended it."""
    if ended.failure is not None or (ended.outcome is None and ended.reason is None):
        return "failed", None, None
    if ended.reason is not None:
        return ended.reason, None, int(signal.SIGKILL)
    assert ended.outcome is not None  # noqa: S101 - said by the lines above
    wait_status = ended.outcome.wait_status
    if os.WIFEXITED(wait_status):
        return "exited", os.WEXITSTATUS(wait_status), None
    number = os.WTERMSIG(wait_status)
    # RLIMIT_CPU sends SIGXCPU at the limit and SIGKILL a second later. Anyone may send them earlier, so the time is
    # looked at: as that limit counts it, which is in whole ticks, and not what getrusage says was really used.
    limit = math.ceil(this.limits.cpu_time)
    if number in {signal.SIGXCPU, signal.SIGKILL} and ended.outcome.counted_seconds >= limit:
        return "cpu_time_exceeded", None, number
    return "signaled", None, number


def _message(status: Status, exit_code: int | None, number: int | None, limits: Limits) -> str:
    if status == "exited":
        return f"exited with status {exit_code}"
    if status == "signaled" and number is not None:
        return f"ended by {_signal_name(number)}"
    return {
        "timed_out": f"ended at the wall time limit of {limits.timeout:g} s; raise it with --timeout",
        "cpu_time_exceeded": f"ended at the CPU time limit of {limits.cpu_time:g} s; raise it with --cpu-time",
        "output_limit": f"ended at the output limit of {limits.output} bytes; raise it with --output",
        "disk_limit": ended_message(allowed(limits)),
        "oom_killed": f"ended at the memory limit of {size_text(limits.memory)}; raise it with --memory",
        "cancelled": "ended because its caller was told to end",
    }.get(status, "the program could not be started")


def _refused(forks: int, limits: Limits) -> str:
    return f"; it was refused processes at its limit of {limits.pids}, which --pids raises" if forks else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # the real-time signals between SIGRTMIN and SIGRTMAX have no names of their own
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"


def _text(content: bytes, encoding: Encoding) -> str:
    if encoding == "text":
        return content.decode(errors="replace")
    from base64 import b64encode  # noqa: PLC0415 - seldom asked for

    return b64encode(content).decode()


def _not_run(failure: Failure, program: _Program) -> JhansiError:
    what = program.argv[0] if program.file is None else program.file
    reason = os.strerror(failure.errno)
    if failure.errno in _MISSING:
        return ProgramMissingError(f"{what!r} is not there, or the interpreter in its #! line is not: {reason}")
    if failure.errno == errno.E2BIG:
        return InvalidRequestError(
            "the arguments and the environment are too long together", remedy="pass them on stdin"
        )
    return NotExecutableError(f"{what!r} cannot be executed: {reason}")
