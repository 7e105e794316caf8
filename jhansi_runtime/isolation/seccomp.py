"""System call filters: a readable profile in OCI JSON, compiled by libseccomp, installed as BPF (seccomp(2)).

A profile is an allow-list with conditional refusals. libseccomp cannot hold an unconditional `allow` and a conditional
`refuse` for one call in one filter, so a profile becomes two programs: the allow-list, and a second filter that allows
all but the refusals. The kernel runs both and takes the stricter answer. Compiling is for the host, off the exec path;
the job only installs.
"""

import errno
import os
from collections.abc import Mapping
from typing import Any

from jhansi_runtime.isolation.syscalls import BPF_PROGRAM_UNIT, seccomp_set_filter

__all__ = ["compile_profile", "install"]

_ALLOW = "SCMP_ACT_ALLOW"
_REFUSE = "SCMP_ACT_ERRNO"

_BINARY_TREE = 2  # SCMP_FLTATR_CTL_OPTIMIZE, seccomp_attr_set(3)
_NR_SCMP_ERROR = -1  # seccomp_syscall_resolve_name(3)


def install(programs: tuple[bytes, ...]) -> None:
    """Install every program on this process. OSError when there is none, or the kernel refuses one."""
    if not programs:
        raise OSError(errno.EINVAL, "there is no seccomp program: nothing runs without a filter")
    for program in programs:
        if not program or len(program) % BPF_PROGRAM_UNIT:
            raise OSError(errno.EINVAL, "a seccomp program is not a whole number of instructions")
        seccomp_set_filter(program)


def compile_profile(profile: Mapping[str, Any]) -> tuple[bytes, ...]:
    """Return the BPF programs of an OCI seccomp profile for this machine's architecture.

    The fields are those of the OCI runtime specification, config-linux.md, "Seccomp": defaultAction must be
    SCMP_ACT_ERRNO; each entry of syscalls has names, action, and optionally errnoRet and args (all must match). A name
    this libseccomp does not know is left out, which refuses it: the default is refusal. ValueError says what is wrong.
    """
    import pyseccomp  # noqa: PLC0415 - 25 ms, and only when a profile is compiled

    if profile.get("defaultAction") != _REFUSE:
        raise ValueError("defaultAction must be SCMP_ACT_ERRNO: a profile is an allow-list")
    allowed = _new_filter(pyseccomp, pyseccomp.ERRNO(profile.get("defaultErrnoRet", errno.EPERM)))
    refused = _new_filter(pyseccomp, pyseccomp.ALLOW)
    for entry in profile["syscalls"]:
        action, arguments = entry["action"], [_argument(pyseccomp, argument) for argument in entry.get("args", ())]
        if action == _ALLOW:
            target, code = allowed, pyseccomp.ALLOW
        elif action == _REFUSE:
            target, code = refused, pyseccomp.ERRNO(entry.get("errnoRet", errno.EPERM))
        else:
            raise ValueError(f"action must be {_ALLOW} or {_REFUSE}, not {action!r}")
        for name in entry["names"]:
            _add_rule(pyseccomp, target, code, name, arguments)
    return _export(allowed), _export(refused)


def _new_filter(pyseccomp: Any, default_action: int) -> Any:  # noqa: ANN401 - the library has no types
    new_filter = pyseccomp.SyscallFilter(default_action)
    # Calls of another architecture (i386, x32) would be read by the wrong table; ending the process is the safe answer.
    new_filter.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    # A tree instead of a list: fewer instructions for each call, and the kernel tries every call when it installs it.
    new_filter.set_attr(pyseccomp.Attr.CTL_OPTIMIZE, _BINARY_TREE)
    return new_filter


def _argument(pyseccomp: Any, argument: Mapping[str, Any]) -> Any:  # noqa: ANN401 - likewise
    operation = getattr(pyseccomp, argument["op"].removeprefix("SCMP_CMP_"))
    # valueTwo of the specification is the value that a MASKED_EQ compares with; value is its mask.
    return pyseccomp.Arg(argument["index"], operation, argument["value"], argument.get("valueTwo", 0))


def _add_rule(pyseccomp: Any, target: Any, code: int, name: str, arguments: list[Any]) -> None:  # noqa: ANN401
    if pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name) == _NR_SCMP_ERROR:
        return
    target.add_rule(code, name, *arguments)


def _export(program_filter: Any) -> bytes:  # noqa: ANN401 - likewise
    descriptor = os.memfd_create("bpf", os.MFD_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        program_filter.export_bpf(file)
        file.seek(0)
        return file.read()
