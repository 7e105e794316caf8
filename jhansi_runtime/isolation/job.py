"""The job's own steps: from a copy of init to an untrusted program with nothing in its hands.

The job is forked ahead of its order and confines itself while init still builds the container, on another processor
if there is one. `prepare` is what needs no order, `equip` what needs no workspace, which init mounts meanwhile, and
`confine` the rest; the order of the steps matters and is explained beside each.
"""

import errno
import math
import os
import resource
import warnings  # noqa: F401 - os.execvpe loads it, from Python 3.13 on for the first time, when nothing can be read any more
from collections.abc import Callable
from typing import NoReturn

import prctl

from jhansi_runtime.isolation import caps, idmap, landlock, processors, seccomp, terminal
from jhansi_runtime.isolation import channel as messages
from jhansi_runtime.isolation.channel import EXECVE, Channel, Failure, Order, encode_failure
from jhansi_runtime.isolation.detach import detach
from jhansi_runtime.isolation.steps import StepError, step
from jhansi_runtime.isolation.syscalls import CLONE_NEWUSER, close_range, unshare

__all__ = ["CONFINED", "Become", "confined", "main"]

# Makes an interpreter that runs already what execve would make of the process, for the order that it is given.
Become = Callable[[Order], None]

CONFINED = b"."
_WORKSPACE = "/workspace"
_STACK_BYTES = 8 << 20
_LOCKED_BYTES = 64 << 10
_STREAMS = 3
# What every job is limited to, soft and hard; the order says the rest.
_LIMITS = {
    # No file is as small. A program that core_pattern names is run, as root of the host and whatever the limit, unless
    # it is this one (core(5)); the filter keeps it.
    resource.RLIMIT_CORE: (1, 1),
    resource.RLIMIT_MEMLOCK: (_LOCKED_BYTES, _LOCKED_BYTES),
    resource.RLIMIT_STACK: (_STACK_BYTES, resource.RLIM_INFINITY),
    resource.RLIMIT_NICE: (0, 0),
    resource.RLIMIT_RTPRIO: (0, 0),
}


def main(channel: Channel, report: int, host_id: int | None) -> NoReturn:
    """Give everything up, wait for the order, and become its program."""
    confined(channel, report, host_id)
    os._exit(1)  # never: there is nothing but a program to be had


def confined(
    channel: Channel,
    report: int,
    host_id: int | None,
    become: Become | None = None,
    meanwhile: Callable[[], object] = lambda: None,
) -> Order:
    """Give everything up, wait for the order, and execute it; or return it, when it is for the interpreter there is.

    CONFINED is written to `report` when all is given up, so that a job that died on the way is never taken for a
    program that ran; a failure of a step, or of execve, is written as itself. Only a zygote's job can `become` what the
    order asks for, and only there this returns. meanwhile is done while it waits.
    """
    failure = Failure("fork", 0, "the job ended before its program began")
    has_program = False
    try:
        _prepare(channel, report, host_id)
        channel.send(messages.READY)
        meanwhile()
        kind, _, descriptors = channel.receive()
        if kind == messages.ORDER:
            content, root, *others = descriptors
            order = messages.read_order(content)
            _equip(order, others[:_STREAMS], become)
            _confine(order, channel, root, others[_STREAMS:], report)
            os.write(report, CONFINED)
            if not order.as_main:
                _execute(order)
            os.close(report)  # as execve does
            has_program = True
            return order
    except StepError as error:
        failure = error.failure
    finally:  # whatever it was that came up: there is no program
        if not has_program:
            try:
                os.write(report, encode_failure(failure))
            finally:
                os._exit(1)
    raise AssertionError("a job without a program has ended")


def _prepare(channel: Channel, report: int, host_id: int | None) -> None:
    with step("detach from init"):
        detach((channel.fileno(), report))
    if channel.receive()[0] != messages.READY:
        raise StepError(Failure("fork", 0, "init ended before the job was confined"))
    with step("job's ids"):
        idmap.become_sandbox(host_id)
    with step("user namespace"):
        _leave_init_powers()
    with step("capabilities"):
        caps.drop_all()
    with step("no_new_privs"):
        prctl.set_no_new_privs(1)
    with step("fixed limits"):
        _limit(_LIMITS)
    processors.prefer(())


def _equip(order: Order, streams: list[int], become: Become | None) -> None:
    with step("streams"):
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        if order.terminal:
            terminal.adopt(order.on_terminal.index(True))
    with step("processors"):
        processors.run_on(order.processors)
    with step("limits"):
        _limit(_limits(order))
    if order.as_main:
        _become(order, become)


def _confine(order: Order, channel: Channel, root: int, rulesets: list[int], report: int) -> None:
    if channel.receive()[0] != messages.MOUNTED:
        raise StepError(Failure("fork", 0, "init ended before the workspace was mounted"))
    channel.close()
    with step("working directory"):
        _enter_workspace(root)
    with step("landlock restriction"):
        for ruleset in rulesets:
            landlock.restrict(ruleset)
        if order.sole_program:
            landlock.restrict_to_program(root, order.argv[0], order.environment.get(b"PATH", os.defpath.encode()))
    # Late, because every step before may have opened something.
    with step("descriptors"):
        close_range(3, report - 1)
        close_range(report + 1)
    # Last: the filter refuses most of the steps above.
    with step("seccomp"):
        seccomp.install(order.filters)


def _become(order: Order, become: Become | None) -> None:
    """Do what execve would."""
    with step("main program"):
        if become is None:
            raise OSError(errno.ENOEXEC, "there is no interpreter here that could run the file")
        become(order)
        prctl.set_dumpable(1)  # what is its own in /proc is for it to read


def _execute(order: Order) -> NoReturn:
    try:
        os.execvpe(order.argv[0], order.argv, order.environment)  # noqa: S606 - no shell: this is execve
    except OSError as error:
        raise StepError(Failure(EXECVE, error.errno or 0, os.fsdecode(order.argv[0]))) from error


def _enter_workspace(root: int) -> None:
    # init's pivot_root moved this process along; should it ever not, the host would lie open here.
    if not os.path.samestat(os.fstat(root), os.stat("/")):
        raise OSError(errno.EXDEV, "the root directory is not the container's")
    os.chdir(_WORKSPACE)
    # A working directory outside the root would let `..` walk the host (CVE-2024-21626); getcwd tells such a one.
    if os.getcwd() != _WORKSPACE:
        raise OSError(errno.EXDEV, "the working directory is not the workspace")
    os.umask(0o022)


def _limits(order: Order) -> dict[int, tuple[int, int]]:
    return {
        # SIGXCPU first, which says what happened; SIGKILL a second later for a program that ignores it.
        resource.RLIMIT_CPU: (order.cpu_seconds, order.cpu_seconds + 1),
        resource.RLIMIT_FSIZE: (order.file_bytes, order.file_bytes),
        resource.RLIMIT_NOFILE: (order.open_files, order.open_files),
        # Of the job's own user namespace, in which there is nobody else (before Linux 5.14: of all of the user's).
        resource.RLIMIT_NPROC: (order.processes, order.processes),
    }


def _limit(limits: dict[int, tuple[int, int]]) -> None:
    for kind, wanted in limits.items():
        # The host's own ceiling may be lower, and cannot be raised from here.
        ceiling = _finite(resource.getrlimit(kind)[1])
        soft, hard = (_infinite(min(_finite(value), ceiling)) for value in wanted)
        resource.setrlimit(kind, (soft, hard))


def _finite(value: int) -> float:
    return math.inf if value == resource.RLIM_INFINITY else value


def _infinite(value: float) -> int:
    return resource.RLIM_INFINITY if value == math.inf else int(value)


def _leave_init_powers() -> None:
    # The files in /proc/self belong to root while a process is not dumpable, and the id map could not be written.
    # Nobody is there yet to make use of the moment: this is the first process but init in the pid namespace.
    prctl.set_dumpable(1)
    unshare(CLONE_NEWUSER)
    idmap.map_self()
    idmap.allow_no_namespace()
    prctl.set_dumpable(0)
