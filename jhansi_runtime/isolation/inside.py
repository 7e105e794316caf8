"""init: PID 1 of a container, from its first instruction to its last. Trusted; the job is not (job.py).

`main` is its whole life: prepare, wait, run, exit. Each step either succeeds or ends the container with a FAILED
message that names it. init must never return into the code it was cloned from.
"""

import _socket
import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from typing import NamedTuple, NoReturn

import prctl

from jhansi_runtime.isolation import channel as messages
from jhansi_runtime.isolation import idmap, job, landlock, mounts, net, processors, terminal
from jhansi_runtime.isolation.channel import Channel, Container, Failure, Order, Outcome
from jhansi_runtime.isolation.detach import detach
from jhansi_runtime.isolation.steps import StepError, step
from jhansi_runtime.isolation.syscalls import clone3, erase

__all__ = ["EXECUTED", "JobLeft", "StartJob", "main"]

HOSTNAME = "sandbox"
_FOR_ALL = frozenset({signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT})
_REPORT_BYTES = 4096


class StartJob(NamedTuple):
    """How init comes by the job: a fork, and what the child then does with its channel, its report and a host id."""

    fork: Callable[[], int]
    main: Callable[[Channel, int, int | None], NoReturn]


class JobLeft(BaseException):
    """The job of a zygote leaves all that was called before it was forked; main() of zygote.py goes on with it."""

    def __init__(self, channel: Channel, report: int, host_id: int | None) -> None:
        super().__init__()
        self.waiting = channel, report, host_id


def fork() -> int:
    """Fork as cheaply as can be: os.fork would run the at-fork handlers of whoever launches, and touch 150 more pages.

    0 in the child, its pid in the parent.
    """
    pid, pidfd = clone3(0)
    if pid:
        os.close(pidfd)
    return pid


EXECUTED = StartJob(fork, job.main)


def main(launcher: Channel, host_id: int | None, command_line: tuple[int, int], start_job: StartJob) -> NoReturn:
    """Be init. Never returns: what was cloned must not run on as a second launcher. The job, its fork, may leave.

    The launcher says MAPPED when the id map is written, and LAUNCH when it knows what to build. command_line is where
    the launcher's arguments lie in memory: anyone in the container may read /proc/1/cmdline, whatever the dumpable
    flag says.
    """
    is_job = False
    try:
        erase(*command_line)
        with suppress(BrokenPipeError):  # the launcher or the host is gone, and with it whoever would want to know
            _live(launcher, host_id, start_job)
    except JobLeft:
        is_job = True
        raise
    finally:
        if not is_job:
            os._exit(0)
    raise AssertionError("init has ended")


class _Waiting(NamedTuple):
    """The job, forked and confining itself: what it is told, and what it reports before it becomes the program."""

    pid: int
    channel: Channel
    report: int


class _Built(NamedTuple):
    """The container around init: a descriptor of its root, Landlock's ABI, a ruleset for the job if there is one."""

    root: int
    landlock: int
    ruleset: int | None


def _live(launcher: Channel, host_id: int | None, start_job: StartJob) -> None:
    begun = _begun(launcher, host_id, start_job)
    container, channel = _await_launch(launcher)
    try:
        if isinstance(begun, StepError):
            raise begun
        processors.prefer(container.built_on)
        built = _build(container, begun)
        _say_ready(built.root, channel)
        outcome = _run(built, begun, channel)
    except StepError as error:
        channel.send(messages.FAILED, messages.encode_failure(error.failure))
    else:
        channel.send(messages.EXIT, messages.encode_outcome(outcome))


def _begun(launcher: Channel, host_id: int | None, start_job: StartJob) -> _Waiting | StepError:
    """Return what `_begin` does, or why it failed: nobody is there yet to be told."""
    try:
        return _begin(launcher, host_id, start_job)
    except StepError as error:
        return error


def _begin(launcher: Channel, host_id: int | None, start_job: StartJob) -> _Waiting:
    """Do what is the same for every container, before anyone asks for this one; return the job that waits in it."""
    # First of all: a page that is written both before and after a fork is copied twice.
    with step("fork"):
        waiting = _fork_job(host_id, start_job)
    with step("detach from the launcher"):
        detach((launcher.fileno(), waiting.channel.fileno(), waiting.report))
    if launcher.receive()[0] != messages.MAPPED:
        raise BrokenPipeError
    prctl.set_dumpable(0)  # the id map was all that the launcher had to reach it for
    _tell(waiting, messages.READY)
    with step("loopback"):
        net.loopback_up()
    with step("hostname"):
        _socket.sethostname(HOSTNAME)
    return waiting


def _await_launch(launcher: Channel) -> tuple[Container, Channel]:
    """Wait until somebody wants the container, and return what is to be built and the channel to whoever wants it."""
    kind = messages.MAPPED
    while kind == messages.MAPPED:  # not read yet, should a step have failed before
        kind, body, descriptors = launcher.receive()
    if kind != messages.LAUNCH:
        raise BrokenPipeError
    launcher.close()
    return messages.decode_container(body), Channel.of(descriptors[0])


def _build(container: Container, waiting: _Waiting) -> _Built:
    """Build the container around this process and the job that waits in it."""
    with step("sources"):
        # Before the ids change: started by root, only root's own id may reach what lies in root's folders.
        sources = mounts.open_sources(container.tree, container.workspaces, container.binds)
    with step("ids"):
        idmap.become_sandbox(container.host_id)
    with step("process"):
        # Again, after the ids: when they change, the kernel forgets the one, and sets the other by fs.suid_dumpable.
        prctl.set_pdeathsig(signal.SIGKILL)
        prctl.set_dumpable(0)
    with step("user namespace limit"):
        idmap.allow_one_more_namespace()
    with step("mounts"):
        root = mounts.build_root(sources, container.tmp_bytes, container.processors)
    # Half way through pivot_root the root of this mount namespace is not that of its processes, and the kernel refuses
    # a user namespace to such (unshare(2), EPERM: chroot): the job must have its own by then.
    _await_job(waiting)
    with step("pivot_root"):
        # This moves the job's root and working directory, too: it has the same ones still.
        mounts.enter_root(root)
    with step("landlock ruleset"):
        ruleset = landlock.new_ruleset(root, container.landlock) if container.landlock else None
    return _Built(root, container.landlock, ruleset)


def _say_ready(root: int, channel: Channel) -> None:
    processors.prefer(())  # once it has been built, it is in nobody's way
    with step("descriptors for the host"):
        descriptors = mounts.open_for_host(root)
    channel.send(messages.READY, descriptors=descriptors)
    for descriptor in descriptors:
        os.close(descriptor)


def _fork_job(host_id: int | None, start_job: StartJob) -> _Waiting:
    ours, theirs = messages.pair()
    report, reported = os.pipe2(os.O_CLOEXEC)
    pid = start_job.fork()
    if pid == 0:
        start_job.main(theirs, reported, host_id)
    os.close(reported)
    theirs.close()
    return _Waiting(pid, ours, report)


def _run(built: _Built, waiting: _Waiting, channel: Channel) -> Outcome:
    kind, _, passed = channel.receive()
    if kind != messages.ORDER:
        raise BrokenPipeError
    order = messages.read_order(os.dup(passed[0]))
    with step("standard streams"):
        streams = _streams(order, passed[1:], channel)
    rulesets = [] if built.ruleset is None else [built.ruleset]
    _tell(waiting, messages.ORDER, (passed[0], built.root, *streams, *rulesets))
    # While the job does what it can: the kernel lets a mount go only when no processor can be looking at it any more.
    with step("workspace"):
        mounts.attach_workspace(built.root, order.workspace)
        for ruleset in rulesets:
            landlock.add_workspace(ruleset, built.root, built.landlock)
    with step("children"):
        wakeup = _watch_children()
    for descriptor in {passed[0], built.root, *streams, *rulesets}:
        os.close(descriptor)
    _start_job(waiting)
    return _supervise(waiting.pid, wakeup, channel)


def _streams(order: Order, passed: list[int], channel: Channel) -> list[int]:
    """Return the job's stdin, stdout and stderr: the container's pty where it is to be one, else what was passed."""
    remaining = iter(passed)
    if order.terminal is None:
        return list(remaining)
    master, slave = terminal.open_pair(*order.terminal)
    channel.send(messages.TERMINAL, descriptors=(master,))
    os.close(master)
    return [slave if is_terminal else next(remaining) for is_terminal in order.on_terminal]


def _watch_children() -> int:
    """Return a descriptor that is readable when a child has ended."""
    readable, writable = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    return readable


def _await_job(waiting: _Waiting) -> None:
    """Return once the job has done all that needs no order. StepError says why it has not."""
    if waiting.channel.receive()[0] != messages.READY:
        raise StepError(_failure(_report(waiting)))


def _tell(waiting: _Waiting, kind: bytes, descriptors: tuple[int, ...] = ()) -> None:
    with suppress(BrokenPipeError):  # it has ended, or was killed; the report says why, or no more than that
        waiting.channel.send(kind, descriptors=descriptors)


def _start_job(waiting: _Waiting) -> None:
    """Let it become the program, and return once execve has succeeded. StepError says why it has not."""
    _tell(waiting, messages.MOUNTED)
    waiting.channel.close()
    report = _report(waiting)
    if report != job.CONFINED:
        raise StepError(_failure(report.removeprefix(job.CONFINED)))


def _report(waiting: _Waiting) -> bytes:
    """Return what the job has reported by the time it closes the pipe: by execve, or by its end."""
    with open(waiting.report, "rb") as file:
        return file.read(_REPORT_BYTES)


def _failure(report: bytes) -> Failure:
    return messages.decode_failure(report) if report else Failure("fork", 0, "the job ended before it was confined")


def _supervise(pid: int, wakeup: int, channel: Channel) -> Outcome:
    """Reap whatever ends, pass signals on, until the job itself has ended."""
    poll = select.poll()
    poll.register(wakeup, select.POLLIN)
    poll.register(channel.fileno(), select.POLLIN)
    while True:
        ended = _reap(pid)
        if ended is not None:
            _end_the_rest()
            return _outcome(*ended)
        ready = {descriptor for descriptor, _ in poll.poll()}
        if wakeup in ready:
            os.read(wakeup, 512)
        if channel.fileno() in ready:
            kind, body, _ = channel.receive()
            if kind != messages.SIGNAL:
                raise BrokenPipeError
            _signal(pid, body[0])


def _signal(pid: int, number: int) -> None:
    """Send it to the job's process group, as a terminal would; those that nobody can catch to all in the container."""
    try:
        if number in _FOR_ALL:
            os.kill(-1, number)
        else:
            os.killpg(pid, number)
    except ProcessLookupError:
        return


def _end_the_rest() -> None:
    """End what the job has left behind. The kernel would, but without accounting its CPU time to anyone."""
    _signal(0, signal.SIGKILL)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


def _reap(job_pid: int) -> tuple[int, float] | None:
    """Reap every child that has ended, orphans included.

    If the job was among them, return its wait status and the CPU seconds that RLIMIT_CPU has counted for it.
    """
    ended = None
    while True:
        try:
            child = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return ended
        if child is None:
            return ended
        # Before it is reaped, and its clock with it.
        counted = time.clock_gettime(_limited_clock(child.si_pid))
        _, status = os.waitpid(child.si_pid, 0)
        if child.si_pid == job_pid:
            ended = status, counted


def _limited_clock(pid: int) -> int:
    """Return the clock of a process that RLIMIT_CPU reads (MAKE_PROCESS_CPUCLOCK with CPUCLOCK_PROF, posix-timers.h).

    It counts whole ticks, so it runs ahead of what getrusage says, or behind it, by several per cent.
    """
    return ~pid << 3


def _outcome(wait_status: int, counted_seconds: float) -> Outcome:
    usage, own = getrusage(RUSAGE_CHILDREN), getrusage(RUSAGE_SELF)
    return Outcome(
        wait_status=wait_status,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        counted_seconds=counted_seconds,
        init_seconds=own.ru_utime + own.ru_stime,
        peak_bytes=usage.ru_maxrss * 1024,
    )
