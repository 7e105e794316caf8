"""System call filters: a profile compiled by libseccomp, installed as BPF (seccomp(2)).

A profile is an allow-list with conditional refusals. libseccomp cannot hold an unconditional `allow` and a conditional
`refuse` for one call in one filter, so a profile becomes two programs: the allow-list, and a second filter that allows
all but the refusals. The kernel runs both and takes the stricter answer; where both refuse, that of the filter that was
installed last, the refusals', whose errno is the one that was chosen. Compiling is for the host, off the exec path; the
job only installs.

Two calls are made under a filter that need not list them. seccomp installs the second one, which then refuses it.
execve starts the program: a profile that does not list it means that the program starts no other, which is left to
Landlock, and Compiled says so.
"""

import errno
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

from jhansi_runtime.isolation.syscalls import BPF_PROGRAM_UNIT, seccomp_set_filter

__all__ = ["ARCHITECTURES", "Argument", "Compiled", "Rule", "compile_profile", "install", "unknown_names"]

ARCHITECTURES = ("x86_64", "aarch64")  # as uname(2) has them

_BINARY_TREE = 2  # SCMP_FLTATR_CTL_OPTIMIZE, seccomp_attr_set(3)
_NR_SCMP_ERROR = -1  # seccomp_syscall_resolve_name(3)
_INSTALLING = "seccomp"
_EXECUTING = ("execve", "execveat")


class Argument(NamedTuple):
    """A comparison of one argument of a call, the position-th from 0: operation is as in seccomp_rule_add(3).

    With MASKED_EQ, value is the mask, and second what the masked argument is compared with.
    """

    position: int
    operation: str
    value: int
    second: int


class Rule(NamedTuple):
    """What becomes of calls by these names whose arguments all match; refused_with is an errno, None to allow them."""

    names: tuple[str, ...]
    refused_with: int | None
    arguments: tuple[Argument, ...]


class Compiled(NamedTuple):
    """BPF programs, to be installed in this order; and whether nothing but the program itself is to be executed."""

    programs: tuple[bytes, ...]
    sole_program: bool


def install(programs: tuple[bytes, ...]) -> None:
    """Install every program on this process. OSError when there is none, or the kernel refuses one."""
    if not programs:
        raise OSError(errno.EINVAL, "there is no seccomp program: nothing runs without a filter")
    for program in programs:
        if not program or len(program) % BPF_PROGRAM_UNIT:
            raise OSError(errno.EINVAL, "a seccomp program is not a whole number of instructions")
        seccomp_set_filter(program)


def compile_profile(rules: Iterable[Rule], default: int, machine: str | None = None) -> Compiled:
    """Return what to install for a profile; default is the errno of a call that no rule names.

    machine is one of ARCHITECTURES, by default this one. A name that this libseccomp does not know is left out, which
    refuses it. ValueError says which rule cannot be; ImportError and RuntimeError that libseccomp is not there.
    """
    import pyseccomp  # noqa: PLC0415 - 25 ms, and only when a profile is compiled

    machine = machine or os.uname().machine
    allowed = _new_filter(pyseccomp, pyseccomp.ERRNO(default), machine)
    refused = _new_filter(pyseccomp, pyseccomp.ALLOW, machine)
    rules = tuple(rules)
    listed = {name for rule in rules if rule.refused_with is None for name in rule.names}
    for rule in rules:
        for name in rule.names:
            if rule.refused_with is None:
                _add(pyseccomp, allowed, pyseccomp.ALLOW, name, rule.arguments)
            # To say of what is not allowed that it is refused takes no instruction.
            elif rule.arguments or name in listed or rule.refused_with != default:
                _add(pyseccomp, refused, pyseccomp.ERRNO(rule.refused_with), name, rule.arguments)
    if _INSTALLING not in listed:
        _add(pyseccomp, allowed, pyseccomp.ALLOW, _INSTALLING)
        _add(pyseccomp, refused, pyseccomp.ERRNO(default), _INSTALLING)
    sole_program = not listed.intersection(_EXECUTING)
    if sole_program:
        _add(pyseccomp, allowed, pyseccomp.ALLOW, "execve")
    return Compiled((_export(allowed), _export(refused)), sole_program)


def unknown_names(names: Iterable[str]) -> list[str]:
    """Return those that this libseccomp knows on no architecture."""
    import pyseccomp  # noqa: PLC0415 - likewise

    return [name for name in names if pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name) == _NR_SCMP_ERROR]


def _new_filter(pyseccomp: Any, default_action: int, machine: str) -> Any:  # noqa: ANN401 - the library has no types
    new_filter = pyseccomp.SyscallFilter(default_action)
    wanted = getattr(pyseccomp.Arch, machine.upper(), None) if machine in ARCHITECTURES else None
    if wanted is None:
        raise ValueError(f"there are filters for {' and '.join(ARCHITECTURES)}, and none for {machine}")
    if wanted != pyseccomp.system_arch():
        new_filter.add_arch(wanted)
        new_filter.remove_arch(pyseccomp.Arch.NATIVE)
    # Calls of another architecture (i386, x32) would be read by the wrong table; ending the process is the safe answer.
    new_filter.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    # A tree instead of a list: fewer instructions for each call, and the kernel tries every call when it installs it.
    new_filter.set_attr(pyseccomp.Attr.CTL_OPTIMIZE, _BINARY_TREE)
    return new_filter


def _add(  # the library has no types
    pyseccomp: Any,  # noqa: ANN401
    target: Any,  # noqa: ANN401
    action: int,
    name: str,
    arguments: tuple[Argument, ...] = (),
) -> None:
    if pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name) == _NR_SCMP_ERROR:
        return
    if any(number >> 64 for argument in arguments for number in (argument.value, argument.second)):
        raise ValueError(f"a rule of {name!r} compares with a number of more than 64 bits")
    if any(argument.operation == "MASKED_EQ" and argument.second & ~argument.value for argument in arguments):
        # libseccomp would compare what is left of it under the mask: an `allow` that can never be would be one always.
        raise ValueError(f"a rule of {name!r} compares a masked argument with what is outside of the mask")
    comparisons = [
        pyseccomp.Arg(argument.position, getattr(pyseccomp, argument.operation), argument.value, argument.second)
        for argument in arguments
    ]
    try:
        target.add_rule(action, name, *comparisons)
    except OSError as error:
        raise ValueError(f"libseccomp takes no such rule of {name!r}: {os.strerror(error.errno or 0)}") from error


def _export(program_filter: Any) -> bytes:  # noqa: ANN401 - likewise
    descriptor = os.memfd_create("bpf", os.MFD_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        program_filter.export_bpf(file)
        file.seek(0)
        return file.read()
