"""How to take a step of confinement out: by replacing a function of the product, in a process made for one attempt.

Each value is called before a container is cloned. A name that the product does not have any more is an error when
this module is loaded, so the table of test_escapes.py cannot go on to test what is no longer there.
"""

import ctypes
import functools
import os
import struct

import prctl

from jhansi_runtime.engine.slot import Slot
from jhansi_runtime.engine.watchdog import Watchdog
from jhansi_runtime.isolation import caps, detach, job, launch, mounts, seccomp, syscalls

LIBC = ctypes.CDLL(None, use_errno=True)


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
    return without(launch, "NAMESPACES", launch.NAMESPACES & ~flag)


def without_operations(is_taken_out):
    """The mounts but for some."""
    genuine = mounts.operations

    def remaining(*arguments):
        return tuple(operation for operation in genuine(*arguments) if not is_taken_out(operation))

    return without(mounts, "operations", remaining)


def is_mask(operation):
    return getattr(operation, "source", None) in {mounts.EMPTY_FILE, mounts.EMPTY_DIRECTORY}


def is_read_only_proc(operation):
    return operation.target.startswith("proc/") and getattr(operation, "source", None) == operation.target


def without_umount_of(place):
    genuine = mounts.umount_detach
    return without(mounts, "umount_detach", lambda path: None if path == place else genuine(path))


def without_read_only():
    genuine = mounts.mount_setattr

    def writable(mount, attributes, **options):
        genuine(mount, attributes & ~syscalls.MOUNT_ATTR_RDONLY, **options)

    return without(mounts, "mount_setattr", writable)


def with_much_scratch():
    genuine = mounts.operations
    return without(mounts, "operations", lambda sources, tmp_bytes, cpus: genuine(sources, tmp_bytes * 64, cpus))


def keep_capabilities():
    """Keep them across execve. An execve of somebody who is not root drops all that are not ambient."""
    header, sets = struct.pack("Ii", 0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert LIBC.capget(header, sets) == 0
    sets[2], sets[5] = sets[1], sets[4]  # the inheritable ones are to be the permitted ones
    assert LIBC.capset(header, sets) == 0
    for capability in range(64):
        LIBC.prctl(47, 2, ctypes.c_ulong(capability), 0, 0)  # PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE


def with_the_hosts_own_stdout():
    """The job is given the host's file itself, not a pipe."""
    genuine = Slot.start

    def start(slot, order, streams):
        private = os.open(os.environ["SECRET_FILE"], os.O_WRONLY | os.O_APPEND)
        genuine(slot, order, [streams[0], private, streams[2]])

    return without(Slot, "start", start)


def without_watchdog():
    """Nobody looks at a job while it runs."""
    return without(Watchdog, "due_in", lambda _: 3600.0)


NOT_DUMPABLE = without(prctl, "set_dumpable")
INNER_NAMESPACE = without(job, "_leave_init_powers")
CAPABILITIES = without(caps, "drop_all", keep_capabilities)
SECCOMP = without(seccomp, "install")
SESSION = without_in(detach, "os", "setsid")
DESCRIPTORS_OF_INIT = without(detach, "close_range")
DESCRIPTORS_OF_JOB = without(job, "close_range")
