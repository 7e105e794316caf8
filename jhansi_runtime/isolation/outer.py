"""The outer container of a zygote: the namespaces and mounts around an interpreter that launches containers.

What runs in there is trusted until a job's program begins: an interpreter of a rootfs that was built from a recipe, and
this package. It has all capabilities over its namespaces, to make further ones in them, and sees nothing of the host's
but the workspaces, which it needs for its containers. What its containers are made of lies below /tmp, a tmpfs: the
rootfs once more, with nothing mounted in it, and the workspaces.
"""

import fcntl
import os
import signal
from typing import NoReturn

import prctl

from jhansi_runtime.isolation import caps, idmap, mounts
from jhansi_runtime.isolation import channel as messages
from jhansi_runtime.isolation.channel import Channel, Failure, Zygote
from jhansi_runtime.isolation.detach import detach
from jhansi_runtime.isolation.spawn import CONNECTION
from jhansi_runtime.isolation.steps import StepError, step

__all__ = ["BRANCH", "PRELOAD", "PROCESSORS", "main"]

BRANCH = CONNECTION + 1  # the zygote's descriptor of the launcher's branch of the cgroup tree
PRELOAD = "JHANSI_PRELOAD"  # the variable that tells a zygote what to import
PROCESSORS = "JHANSI_PROCESSORS"  # likewise, on how many CPUs
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main(launcher: Channel, host: Channel, zygote: Zygote, branch: int | None) -> NoReturn:
    """Build the container around this process, its PID 1, and execute the interpreter. Never returns.

    The launcher says MAPPED when the id map is written; a failure is told to the host.
    """
    failure = Failure("fork", 0, "the zygote ended before it began")
    try:
        _become(launcher, host, zygote, branch)
    except StepError as error:
        failure = error.failure
    finally:
        try:
            host.send(messages.FAILED, messages.encode_failure(failure))
        finally:
            os._exit(1)


def _become(launcher: Channel, host: Channel, zygote: Zygote, branch: int | None) -> NoReturn:
    with step("detach from the launcher"):
        kept = (launcher.fileno(), host.fileno(), *(() if branch is None else (branch,)))
        detach(kept)
    if launcher.receive()[0] != messages.MAPPED:
        os._exit(1)
    launcher.close()
    with step("sources"):
        sources = mounts.open_sources(zygote.tree, zygote.workspaces, zygote.binds)
        package = os.open(_PACKAGE, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    with step("ids"):
        # Not root inside: whoever is would own what /proc tells of a process that is not dumpable, init for one, and
        # the jobs are the same user outside.
        idmap.become_sandbox(zygote.host_id)
    with step("process"):
        prctl.set_pdeathsig(signal.SIGKILL)
    with step("mounts"):
        root = mounts.build_zygotes_root(sources, package)
    with step("pivot_root"):
        mounts.enter_root(root)
    with step("zygote"):
        caps.keep_all()
        _execute(zygote, host.fileno(), branch)


def _execute(zygote: Zygote, host: int, branch: int | None) -> NoReturn:
    # Out of the way first: either may have the other's number.
    host = _above(host)
    branch = None if branch is None else _above(branch)
    os.dup2(host, CONNECTION)
    if branch is not None:
        os.dup2(branch, BRANCH)
    path = f"/{mounts.ZYGOTES_PACKAGE}/isolation/interpreter:/{mounts.ZYGOTES_SITE}"
    ours = {"PYTHONPATH": path, PRELOAD: ",".join(zygote.preload), PROCESSORS: str(zygote.processors)}
    os.execve(zygote.argv[0], zygote.argv, {**dict(zygote.environment), **ours})  # noqa: S606 - no shell: this is execve


def _above(descriptor: int) -> int:
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, BRANCH + 1)
