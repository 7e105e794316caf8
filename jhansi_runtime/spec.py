r"""Every record that crosses a border, declared once.

The command line, the Python API, the metadata on disk and (later) HTTP all use these classes, so a field has one name,
one unit and one range everywhere. Sizes are bytes, times seconds unless the name says milliseconds, instants
RFC 3339 in UTC. Text that came from a file name or an argument may hold surrogate escapes (PEP 383); to_json
writes those as JSON's own \udcxx escapes, so no byte is lost.
"""

import json
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from jhansi_runtime.errors import InvalidRequestError

__all__ = [
    "Check",
    "ExecRequest",
    "ExecResult",
    "FileInfo",
    "Limits",
    "Recipe",
    "RootfsInfo",
    "Sandbox",
    "Settings",
    "from_builtins",
    "instant",
    "to_json",
]

Status = Literal[
    "exited",
    "signaled",
    "timed_out",
    "cpu_time_exceeded",
    "oom_killed",
    "output_limit",
    "disk_limit",
    "cancelled",
    "failed",
]
Enforcement = Literal["cgroup", "watchdog"]
Encoding = Literal["text", "base64"]

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


class Limits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one exec may use. Every limit named here is enforced on every host."""

    timeout: Annotated[float, Meta(gt=0, le=86_400, description="wall time, seconds")] = 30.0
    cpu_time: Annotated[float, Meta(gt=0, le=86_400, description="CPU time of each process, seconds")] = 30.0
    output: Annotated[int, Meta(ge=0, le=GIB, description="bytes of stdout and stderr together")] = MIB
    file_size: Annotated[int, Meta(ge=0, le=1024 * GIB, description="bytes of the largest file written")] = 256 * MIB
    tmp: Annotated[int, Meta(ge=64 * KIB, le=64 * GIB, description="bytes in /tmp, HOME, /dev/shm together")] = 64 * MIB
    nofile: Annotated[int, Meta(ge=8, le=1_048_576, description="open files of each process")] = 1024

    def changed(self, changes: Mapping[str, object]) -> "Limits":
        """These limits with some replaced. InvalidRequestError names a field that is unknown or out of range."""
        return from_builtins({**msgspec.structs.asdict(self), **changes}, Limits, where="limits") if changes else self


class Sandbox(Struct, frozen=True, kw_only=True):
    """A persistent workspace and its settings."""

    id: str
    language: str
    created_at: str
    name: str | None = None
    labels: dict[str, str] = {}
    limits: Limits = Limits()
    rootfs: Literal["recipe", "host"] = "recipe"
    expires_at: str | None = None


class ExecRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One program to run: a file of the workspace (filename) or a program of the rootfs (command), never both.

    sandbox is an id, a unique prefix of one, or a name. env is all the job sees beyond PATH, HOME, LANG.
    limits are the fields of Limits to change for this exec. stdin is the text or bytes to feed.
    """

    sandbox: str
    filename: str | None = None
    command: list[str] = []
    args: list[str] = []
    env: dict[str, str] = {}
    stdin: str | bytes = b""
    limits: dict[str, float] = {}
    rootfs: Literal["recipe", "host"] | None = None
    encoding: Encoding = "text"


class ExecResult(Struct, frozen=True, kw_only=True):
    """What became of one exec (CONTRACT: ExecResult).

    exit_code is None unless status is `exited`; stdout and stderr are None when they were passed through; sandbox_id is
    None for a one-shot run.
    """

    run_id: str
    sandbox_id: str | None
    status: Status
    exit_code: int | None
    signal: str | None
    stdout: str | None
    stderr: str | None
    stdout_bytes: int
    stderr_bytes: int
    stdout_truncated: bool
    stderr_truncated: bool
    wall_time_ms: float
    cpu_time_ms: float
    memory_peak_bytes: int
    timed_out: bool
    oom_killed: bool
    message: str
    enforcement: Enforcement
    rootfs: str
    limits: Limits
    started_at: str


class FileInfo(Struct, frozen=True, kw_only=True):
    """One entry of a workspace; path is relative to it, mode the permission bits, mtime an instant."""

    path: str
    type: Literal["file", "directory", "link", "fifo", "socket", "device"]
    size: int
    mode: int
    mtime: str


class Recipe(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to make and use the rootfs of a language (rootfs/LANGUAGE.toml).

    run is the argv that runs a file, where "{file}" is replaced by its path in the container. extensions name the
    files that `run` takes; any other file runs only if it is executable.
    """

    language: str
    suite: str
    packages: list[str]
    interpreter: str
    extensions: list[str]
    run: list[str]


class RootfsInfo(Struct, frozen=True, kw_only=True):
    """One unpacked rootfs. digest is "sha256:..." over paths, modes and contents, or "host"."""

    language: str
    digest: str
    size: int
    files: int
    created_at: str
    source: str


class AuditSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When audit records reach the disk: `group`, within 50 ms; `always`, before anything else happens."""

    fsync: Literal["group", "always"] = "group"


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings file (TOML): one table for each subject."""

    audit: AuditSettings = AuditSettings()


class Check(Struct, frozen=True, kw_only=True):
    """One thing the doctor tried: what is wrong with it here, if anything, and the line that mends it."""

    name: str
    ok: bool
    detail: str
    remedy: str | None = None


_Record = TypeVar("_Record")


def from_builtins(value: object, record: type[_Record], *, where: str) -> _Record:
    """Check `value` (dicts, lists, text, numbers) against a record class; InvalidRequestError says where it differs."""
    try:
        return msgspec.convert(value, record, strict=True)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"{where}: {error}") from None


def to_json(value: object, *, indent: int | None = None) -> str:
    """One JSON document, keys in declared order, ASCII only: safe on any terminal and free of lone surrogates."""
    return json.dumps(msgspec.to_builtins(value), indent=indent, ensure_ascii=True)


def from_json(text: str | bytes, record: type[_Record], *, where: str) -> _Record:
    """The record in a JSON document; InvalidRequestError says where it differs."""
    try:
        value: Any = json.loads(text)
    except ValueError as error:
        raise InvalidRequestError(f"{where}: not JSON: {error}") from None
    return from_builtins(value, record, where=where)


_FIRST_INSTANT, _LAST_INSTANT = -62_135_596_800, 253_402_300_799  # the years 1 to 9999, all that RFC 3339 can write


def instant(seconds: float) -> str:
    """RFC 3339 in UTC, to the microsecond, always as wide: two instants compare as text.

    seconds count from the epoch. A time that RFC 3339 cannot write (a job may set any on its files) becomes the
    nearest one that it can.
    """
    whole, fraction = divmod(round(seconds * 1_000_000), 1_000_000)
    year, month, day, hour, minute, second = time.gmtime(min(max(whole, _FIRST_INSTANT), _LAST_INSTANT))[:6]
    return f"{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{fraction:06}Z"
