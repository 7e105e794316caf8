"""The launcher's side of a container: clone init, map its ids, and hand it to whoever wants a container.

What is the same for every container can be done before anyone asks: `begin` one ahead, and `launch` takes it.
"""

import errno
import os
import signal
from functools import cache
from typing import NamedTuple

import prctl

from jhansi_runtime.isolation import cgroup, idmap, inside, outer, processors
from jhansi_runtime.isolation import channel as messages
from jhansi_runtime.isolation.cgroup import Branch, Group
from jhansi_runtime.isolation.channel import Channel, Container, Reaped, Zygote
from jhansi_runtime.isolation.inside import EXECUTED, StartJob
from jhansi_runtime.isolation.steps import StepError, step
from jhansi_runtime.isolation.syscalls import (
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    clone3,
    command_line_span,
)

__all__ = ["NAMESPACES", "Begun", "begin", "end", "launch", "launch_zygote", "reap"]

NAMESPACES = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP
# A zygote makes the cgroups of its containers in the launcher's branch, which it has to see for that (cgroups(7)).
_ZYGOTES_NAMESPACES = NAMESPACES & ~CLONE_NEWCGROUP


class Begun(NamedTuple):
    """A container of which nobody knows yet what is to be in it: its init, how to talk to it, and as whom it lives.

    group is its cgroup, None when there is no branch to make one in.
    """

    pid: int
    pidfd: int
    init: Channel
    host_id: int | None
    group: Group | None


def begin(host_id: int | None, branch: Branch | None = None, start_job: StartJob = EXECUTED) -> Begun:
    """Clone an init, which prepares as far as it can and waits. StepError when the kernel refuses.

    With a branch, it begins in a new cgroup there, without limits yet. start_job is how it comes by its job.
    Whoever calls this must have one thread, must reap the pid, and takes the container along when it dies.
    """
    with step("one thread"):
        _require_one_thread()
    with step("processors of the host"):
        processors.remember()
    command_line = _command_line()
    with step("channel"):
        ours, theirs = messages.pair()
    begun = group = None
    try:
        if branch is not None:
            with step("cgroup"):
                group = cgroup.make(branch)
        with step("namespaces"):
            pid, pidfd = _clone(NAMESPACES, group)
        if pid == 0:
            inside.main(theirs, host_id, command_line, start_job)
        begun = Begun(pid, pidfd, ours, host_id, group)
        with step("id map"):
            idmap.map_from_parent(pid, host_id)
            ours.send(messages.MAPPED)
    except StepError:
        if begun is not None:
            end(begun, branch)
        else:
            ours.close()
            _remove_group(branch, group)
        raise
    finally:
        theirs.close()
    return begun


def launch(
    container: Container,
    channel: Channel,
    begun: Begun | None = None,
    branch: Branch | None = None,
    start_job: StartJob = EXECUTED,
) -> Begun | None:
    """Have a container built whose init talks over `channel`; return it, to be reaped, or None if there is none.

    LAUNCHED comes first there, with its pid, its pidfd and a descriptor of its cgroup if it has one; or FAILED.
    begun is one to take, if it will do. Conditions are those of `begin`.
    """
    if begun is not None and not _is_fit(begun, container):
        end(begun, branch)
        begun = None
    try:
        begun = begun or begin(container.host_id, None if container.cgroup is None else branch, start_job)
        with step("cgroup limits"):
            _limit(begun, container, branch)
    except StepError as error:
        channel.send(messages.FAILED, messages.encode_failure(error.failure))
        return None
    descriptors = (begun.pidfd,) if begun.group is None else (begun.pidfd, begun.group.descriptor)
    try:
        channel.send(messages.LAUNCHED, messages.encode_pid(begun.pid), descriptors)
    except BrokenPipeError:  # whoever wanted it has given it up already
        end(begun, branch)
        raise
    try:
        begun.init.send(messages.LAUNCH, messages.encode_container(container), (channel.fileno(),))
    except BrokenPipeError:
        pass  # it has died this very moment: the channel closes, and whoever wanted it has it reaped
    finally:
        begun.init.close()
        os.close(begun.pidfd)
    return begun


def launch_zygote(zygote: Zygote, channel: Channel, branch: Branch | None = None) -> int | None:
    """Start a zygote that talks over `channel`; return its pid, to be reaped, or None if there is none.

    LAUNCHED comes first there, with its pid and its pidfd; then the zygote's own READY. Or FAILED. Conditions are those
    of `begin`.
    """
    try:
        with step("one thread"):
            _require_one_thread()
        if branch is not None and zygote.host_id is not None:
            with step("cgroup"):
                cgroup.hand_over(branch, zygote.host_id)
        with step("channel"):
            ours, theirs = messages.pair()
        try:
            with step("namespaces"):
                pid, pidfd = _clone(_ZYGOTES_NAMESPACES, None)
            if pid == 0:
                outer.main(theirs, channel, zygote, None if branch is None else branch.descriptor)
            try:
                with step("id map"):
                    idmap.map_from_parent(pid, zygote.host_id)
                channel.send(messages.LAUNCHED, messages.encode_pid(pid), (pidfd,))
                ours.send(messages.MAPPED)
            except (StepError, BrokenPipeError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise
            finally:
                os.close(pidfd)
        finally:
            ours.close()
            theirs.close()
    except StepError as error:
        channel.send(messages.FAILED, messages.encode_failure(error.failure))
        return None
    return pid


def end(begun: Begun, branch: Branch | None = None) -> None:
    """End a container that nobody wants, and return when the kernel has taken it down."""
    signal.pidfd_send_signal(begun.pidfd, signal.SIGKILL)
    os.waitpid(begun.pid, 0)
    os.close(begun.pidfd)
    begun.init.close()
    _remove_group(branch, begun.group)


def reap(pid: int) -> Reaped:
    """Wait for an init that is ending, and return what the kernel accounted to its container."""
    _, _, usage = os.wait4(pid, 0)
    return Reaped(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def _limit(begun: Begun, container: Container, branch: Branch | None) -> None:
    """Set the limits that the container's cgroup is to enforce; end the container where they cannot be."""
    if container.cgroup is None:
        return
    if begun.group is None:
        end(begun, branch)
        raise OSError(errno.ENOENT, "the launcher has no cgroup to make one for a container in")
    try:
        cgroup.limit(begun.group.descriptor, container.cgroup)
    except OSError:
        end(begun, branch)
        raise


def _remove_group(branch: Branch | None, group: Group | None) -> None:
    if branch is not None and group is not None:
        cgroup.remove(branch, group)


def _is_fit(begun: Begun, container: Container) -> bool:
    """Say whether it lives, and as whom it should; it is not reaped yet if not."""
    has_ended = os.waitid(os.P_PID, begun.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    has_its_cgroup = (begun.group is None) == (container.cgroup is None)
    return begun.host_id == container.host_id and has_its_cgroup and not has_ended


def _clone(namespaces: int, group: Group | None) -> tuple[int, int]:
    """Clone init as a process whose id map this one may write: one that is dumpable. It sees to the rest itself."""
    before = prctl.get_dumpable()
    prctl.set_dumpable(1)
    pid = -1
    try:
        pid, pidfd = clone3(namespaces, group.descriptor if group else None)
    finally:
        if pid != 0:
            prctl.set_dumpable(before)
    return pid, pidfd


@cache
def _command_line() -> tuple[int, int]:
    return command_line_span()


def _require_one_thread() -> None:
    # A lock that another thread holds at the clone stays held in init, which then hangs at its first allocation.
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise OSError(errno.EDEADLK, f"this process has {threads} threads, and a container is cloned from one alone")
