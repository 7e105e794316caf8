"""How to take a step of confinement out: by replacing a function of the product, in a process made for one attempt.

Each value is called before a container is cloned, and may be called after others. A name that the product does not
have any more is an error when this module or a table is loaded, so no table can go on to test what is no longer there.
"""

import contextlib
import ctypes
import functools
import json
import os
import struct
import time

import prctl

from jhansi_runtime import execution
from jhansi_runtime.engine.slot import Slot
from jhansi_runtime.engine.watchdog import Watchdog
from jhansi_runtime.engine.watches import RemovedFilesWatch
from jhansi_runtime.isolation import caps, detach, inside, job, landlock, launch, mounts, net, seccomp, syscalls
from jhansi_runtime.isolation import channel as messages
from jhansi_runtime.paths import shipped
from jhansi_runtime.profiles import compiled_for, read_profile

LIBC = ctypes.CDLL(None, use_errno=True)
_BPF_RETURN, _SECCOMP_RET_ERRNO = 0x06, 0x00050000


def nothing(*_arguments, **_options):
    """What a step does once it is taken out."""


def without(module, name, replacement=nothing):
    """A function of the product replaced. A name that is not there any more is an error of this table."""
    getattr(module, name)
    return functools.partial(setattr, module, name, replacement)


class Lacking:
    """A module as seen by one other module, with a function that does nothing."""

    def __init__(self, module, name):
        self._module, self._name = module, name
        getattr(module, name)

    def __getattr__(self, name):
        return nothing if name == self._name else getattr(self._module, name)


def without_in(module, imported, name):
    """A function of what a module imports, taken out for that module alone."""
    return functools.partial(setattr, module, imported, Lacking(getattr(module, imported), name))


def without_namespace(flag):
    def take_out():
        launch.NAMESPACES &= ~flag

    return take_out


# --- mounts -----------------------------------------------------------------------------------------------------


def with_operations(change):
    """The mounts changed: `change` is given the genuine operations, and returns others."""
    getattr(mounts, "operations")  # noqa: B009 - it has to be there when the table is loaded

    def take_out():
        genuine = mounts.operations
        mounts.operations = lambda *arguments: tuple(change(genuine(*arguments)))

    return take_out


def without_operations(is_taken_out):
    """The mounts but for some."""
    return with_operations(lambda genuine: (operation for operation in genuine if not is_taken_out(operation)))


def is_mask(operation):
    return getattr(operation, "source", None) in {mounts.EMPTY_FILE, mounts.EMPTY_DIRECTORY}


def without_mask_of(path):
    return without_operations(lambda operation: is_mask(operation) and operation.target == path)


def is_read_only_proc(operation):
    return operation.target.startswith("proc/") and getattr(operation, "source", None) == operation.target


def with_the_hosts(target, place):
    """What the container should have of its own at `target` is the host's: the folder `place`, or that variable."""

    def change(genuine):
        own = [operation for operation in genuine if operation.target == target][-1]
        source = os.open(os.environ.get(place, place), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        hosts = mounts.Bind(source, target, 0)
        return [hosts if operation is own else operation for operation in genuine]

    return with_operations(change)


def without_umount_of(place):
    def take_out():
        genuine = mounts.umount_detach
        mounts.umount_detach = lambda path: None if path == place else genuine(path)

    return take_out


def without_attribute(attribute):
    """No mount of ours has it: MOUNT_ATTR_*."""

    def take_out():
        set_attributes, new_mount = mounts.mount_setattr, mounts.fsmount
        mounts.mount_setattr = lambda mount, attributes, **options: set_attributes(
            mount, attributes & ~attribute, **options
        )
        mounts.fsmount = lambda context, attributes: new_mount(context, attributes & ~attribute)

    return take_out


def without_refusal_of_links():
    """Links in the root tree are followed. Landlock's rules, of the same paths and as strict, are out as well."""
    without(mounts, "_NO_LINKS", 0)()
    without(landlock, "_add")()
    without(landlock, "restrict")()


def without_new_root():
    """The container is built, but the host's root stays where it is; the workspace is the folder /tmp there."""
    without(mounts, "enter_root")()
    without_umount_of(b"/" + mounts.HIDDEN_WORKSPACES.encode())()
    without(landlock, "restrict")()
    without(job, "_WORKSPACE", "/tmp")()


def with_late_workspace():
    """init takes seconds to attach the workspace, unless the job has been at work by then, and says so in /tmp."""
    genuine = mounts.attach_workspace

    def attach(*arguments):
        for _ in range(500):
            if os.path.exists("/tmp/tried"):
                break
            time.sleep(0.01)
        genuine(*arguments)

    mounts.attach_workspace = attach


class _Told:
    """The job's channel, on which init has said already that the workspace is there."""

    @staticmethod
    def receive():
        return messages.MOUNTED, b"", []

    @staticmethod
    def close():
        """It stays open until there is a program."""


def without_wait_for_workspace():
    """The job begins whether its workspace is there or not."""
    genuine = job._confine
    job._confine = lambda order, _channel, *others: genuine(order, _Told, *others)


def with_much_scratch():
    genuine = mounts.operations
    return without(mounts, "operations", lambda sources, tmp_bytes, cpus: genuine(sources, tmp_bytes * 64, cpus))


# --- the job's own steps ----------------------------------------------------------------------------------------


def keep_capabilities():
    """Keep them across execve. An execve of somebody who is not root drops all that are not ambient."""
    header, sets = struct.pack("Ii", 0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert LIBC.capget(header, sets) == 0
    sets[2], sets[5] = sets[1], sets[4]  # the inheritable ones are to be the permitted ones
    assert LIBC.capset(header, sets) == 0
    for capability in range(64):
        LIBC.prctl(47, 2, ctypes.c_ulong(capability), 0, 0)  # PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE


def with_the_hosts_own(number, opened):
    """The job is given a file of the host's as its standard stream of that number, not a pipe."""
    genuine = Slot.start

    def start(slot, order, streams):
        genuine(slot, order, [opened() if at == number else stream for at, stream in enumerate(streams)])

    return without(Slot, "start", start)


def with_profile(change):
    """A filter made of the default profile, after `change` of what its file says."""

    def take_out():
        path = os.path.join(shipped("seccomp"), "default.json")
        with open(path, encoding="utf-8") as file:
            profile = json.load(file)
        change(profile)
        programs = compiled_for(read_profile(json.dumps(profile).encode(), "changed"), "changed").programs
        genuine = seccomp.install
        seccomp.install = lambda _programs: genuine(programs)

    return take_out


def answering_with(number):
    """The same filter, but each call that it refuses is told that errno.

    A program is instructions of eight bytes (bpf(4), linux/filter.h); one that ends it with SECCOMP_RET_ERRNO has the
    errno in the lower half of its value.
    """

    def take_out():
        genuine = seccomp.install

        def marked(program):
            for code, if_true, if_false, value in struct.iter_unpack("HBBI", program):
                is_refusal = code == _BPF_RETURN and value & 0xFFFF0000 == _SECCOMP_RET_ERRNO
                told = _SECCOMP_RET_ERRNO | number if is_refusal else value
                yield struct.pack("HBBI", code, if_true, if_false, told)

        seccomp.install = lambda programs: genuine(tuple(b"".join(marked(program)) for program in programs))

    return take_out


def without_rule_of(name, value):
    """The filter without the refusals of a call that compare an argument with that value."""

    def change(profile):
        value_of_32_bits = value & 0xFFFFFFFF
        rules = profile["syscalls"]
        kept = [rule for rule in rules if not (name in rule["names"] and _compares_with(rule, value_of_32_bits))]
        assert len(kept) < len(rules), "the profile has no such rule"
        profile["syscalls"] = kept

    return with_profile(change)


def _compares_with(rule, value):
    compared = (argument.get("valueTwo", argument["value"]) for argument in rule.get("args", ()))
    return rule["action"] == "SCMP_ACT_ERRNO" and value in compared


def allowing(*names):
    """The filter with these calls allowed, whatever their arguments."""

    def change(profile):
        for rule in profile["syscalls"]:
            rule["names"] = [name for name in rule["names"] if name not in names]
        profile["syscalls"] = [rule for rule in profile["syscalls"] if rule["names"]]
        profile["syscalls"].append({"names": list(names), "action": "SCMP_ACT_ALLOW"})

    return with_profile(change)


# --- the host's own ---------------------------------------------------------------------------------------------


def without_watchdog():
    """Nobody looks at a job while it runs."""
    return without(Watchdog, "due_in", lambda _: 3600.0)


def without_network_of_its_own():
    """The container is in the host's network namespace, whose loopback is not its to set up."""
    without_namespace(syscalls.CLONE_NEWNET)()
    without(net, "loopback_up")()


def without_ipc_of_its_own():
    """The container is in the host's IPC namespace, of whose message queues init can make no rule for Landlock."""
    without_namespace(syscalls.CLONE_NEWIPC)()
    without(landlock, "_message_queues")()


def without_processes_of_its_own():
    """The container is in the host's pid namespace, and sees the host's /proc.

    init is not PID 1 then: what it sends to everybody would reach all of its user's processes, so it sends nothing,
    and nobody counts what all processes in sight use.
    """
    for take_out in (
        without_namespace(syscalls.CLONE_NEWPID),
        with_the_hosts("proc", "/proc"),
        without(inside, "_end_the_rest"),
        without(inside, "_signal"),
        without_watchdog(),
        without(RemovedFilesWatch, "due_in", lambda _: 3600.0),
    ):
        take_out()


NOT_DUMPABLE = without(prctl, "set_dumpable")
INNER_NAMESPACE = without(job, "_leave_init_powers")
CAPABILITIES = without(caps, "drop_all", keep_capabilities)
LANDLOCK = without(landlock, "restrict")
SECCOMP = without(seccomp, "install")
SESSION = without_in(detach, "os", "setsid")
DESCRIPTORS_OF_INIT = without(detach, "close_range")
DESCRIPTORS_OF_JOB = without(job, "close_range")
READ_ONLY = without_attribute(syscalls.MOUNT_ATTR_RDONLY)
LINKS_REFUSED_BY_MOUNTS = without(mounts, "_NO_LINKS", 0)
LINKS_REFUSED = without_refusal_of_links
NETWORK = without_network_of_its_own
IPC = without_ipc_of_its_own
PROCESSES = without_processes_of_its_own
TREE_HELD = without(execution, "_in_use", contextlib.nullcontext)
