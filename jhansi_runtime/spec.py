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
from msgspec import UNSET, Meta, Struct, UnsetType

from jhansi_runtime.errors import InvalidRequestError

__all__ = [
    "SESSION",
    "SESSION_LIMITS",
    "Check",
    "ExecBody",
    "ExecRequest",
    "ExecResult",
    "FieldProblem",
    "FileInfo",
    "Key",
    "Limits",
    "Modules",
    "Problem",
    "Recipe",
    "RootfsInfo",
    "RunInfo",
    "Sandbox",
    "SandboxBody",
    "SandboxChange",
    "SandboxPage",
    "SeccompProfile",
    "ServerSettings",
    "Settings",
    "TerminalControl",
    "TerminalExit",
    "TerminalQuery",
    "TerminalSize",
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
Accounting = Literal["exact", "sampled"]
Encoding = Literal["text", "base64"]
Scope = Literal["read", "write", "exec", "audit", "admin"]
RootfsChoice = Literal["recipe", "host"]
Characters = Annotated[int, Meta(ge=1, le=10_000)]

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

# A session is left by its user, not by a clock, and its output is read as it comes: the widest limits there are.
SESSION_LIMITS: dict[str, float] = {"timeout": 86_400.0, "cpu_time": 86_400.0, "output": GIB}
SESSION = ["/bin/sh", "-c", "[ -x /bin/bash ] && exec /bin/bash -l; exec /bin/sh -l"]


# What JSON Schema is told of texts that the stores check themselves: an error of theirs says more than a pattern.
_NAME = r"^(?!(?:sb|run)_)(?![0-9a-f]{16}$)[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$"
_LABEL_KEY = r"^[A-Za-z0-9_][A-Za-z0-9._/-]{0,63}$"
_PRINTABLE = r"^(?: |[^\p{C}\p{Z}])*$"
_LONGEST_TTL = 100 * 366 * 86_400  # seconds
PATH_PATTERN = r"^(?!/)(?!(.*/)?\.\.(/|$))[^\u0000]+$"  # relative, and nowhere upwards

Name = Annotated[str, Meta(extra_json_schema={"pattern": _NAME})]
Labels = Annotated[
    dict[
        Annotated[str, Meta(extra_json_schema={"pattern": _LABEL_KEY})],
        Annotated[str, Meta(extra_json_schema={"maxLength": 256, "pattern": _PRINTABLE}, description="printable")],
    ],
    Meta(extra_json_schema={"maxProperties": 64}),
]
Ttl = Annotated[
    float,
    Meta(extra_json_schema={"exclusiveMinimum": 0, "maximum": _LONGEST_TTL}, description="seconds until its end"),
]
Text = Annotated[str, Meta(extra_json_schema={"pattern": r"^[^\u0000]*$"})]
Path = Annotated[str, Meta(extra_json_schema={"pattern": PATH_PATTERN})]
# A profile of the package, or one that was added: sha256-... of its text.
ProfileName = Annotated[
    str, Meta(pattern=r"\A[a-z0-9][a-z0-9._-]{0,99}\Z", description="the name of a seccomp profile")
]
# Modules to be imported ahead: of the rootfs, by names that could be in a program; none that is a program, a test, or
# a joke that starts a browser.
_COMPONENT = "[A-Za-z_][A-Za-z0-9_]*"
MODULE_PATTERN = rf"\A(?!(?:.*[.])?(?:__|tests?(?:[.]|\Z)|antigravity\Z)){_COMPONENT}(?:[.]{_COMPONENT})*\Z"
LONGEST_MODULE = 100
MOST_MODULES = 32
Modules = Annotated[
    list[Annotated[str, Meta(max_length=LONGEST_MODULE, pattern=MODULE_PATTERN)]],
    Meta(max_length=MOST_MODULES, description="names of modules that its execs find imported"),
]
Preload = Modules | Literal["auto"]  # auto: what the file of each exec imports (imports.py)
Word = Annotated[int, Meta(ge=0)]  # of 64 bits, which is more than msgspec has bounds for
Errno = Annotated[int, Meta(ge=1, le=4094)]  # libseccomp takes one less than the kernel has
SystemCall = Annotated[str, Meta(pattern=r"\A[a-z0-9_]{1,64}\Z")]
Variable = Annotated[str, Meta(extra_json_schema={"pattern": r"^[^=\u0000]+$"})]


class Limits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one exec may use. Every limit named here is enforced on every host; ExecResult.enforcement says how.

    require_cgroup is no limit but a demand: to refuse the exec where control groups cannot enforce these.
    """

    memory: Annotated[int, Meta(ge=8 * MIB, le=64 * 1024 * GIB, description="bytes of memory")] = 512 * MIB
    cpus: Annotated[float, Meta(ge=0.01, le=10_000, description="share of CPU time, in CPUs")] = 1.0
    pids: Annotated[int, Meta(ge=1, le=4_000_000, description="processes and threads at once")] = 128
    timeout: Annotated[float, Meta(gt=0, le=86_400, description="wall time, seconds")] = 30.0
    cpu_time: Annotated[float, Meta(gt=0, le=86_400, description="CPU time of all processes, seconds")] = 30.0
    output: Annotated[int, Meta(ge=0, le=GIB, description="bytes of stdout and stderr together")] = MIB
    file_size: Annotated[int, Meta(ge=0, le=1024 * GIB, description="bytes of the largest file written")] = 256 * MIB
    tmp: Annotated[int, Meta(ge=64 * KIB, le=64 * GIB, description="bytes in /tmp, HOME, /dev/shm together")] = 64 * MIB
    nofile: Annotated[int, Meta(ge=8, le=1_048_576, description="open files of each process")] = 1024
    disk: Annotated[int, Meta(ge=0, le=1024 * 1024 * GIB, description="bytes in the workspace")] = GIB
    disk_files: Annotated[int, Meta(ge=0, le=1_000_000_000, description="files in the workspace")] = 250_000
    require_cgroup: Annotated[bool, Meta(description="refuse to run where control groups cannot enforce")] = False

    def changed(self, changes: Mapping[str, object]) -> "Limits":
        """These limits with some replaced. InvalidRequestError names a field that is unknown or out of range."""
        return from_builtins({**msgspec.structs.asdict(self), **changes}, Limits, where="limits") if changes else self


class Sandbox(Struct, frozen=True, kw_only=True):
    """A persistent workspace and its settings.

    zygote: its execs may be forks of an interpreter that was started ahead, with the modules of preload imported; auto:
    what the file of each imports beyond the standard library; None: what its language's settings say.
    """

    id: str
    language: str
    created_at: str
    name: str | None = None
    labels: dict[str, str] = {}
    limits: Limits = Limits()
    rootfs: RootfsChoice = "recipe"
    seccomp: str = "default"
    expires_at: str | None = None
    owner: str | None = None
    zygote: bool = True
    preload: list[str] | Literal["auto"] | None = None


class SandboxBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What POST /v1/sandboxes asks for. ttl is in seconds; limits are those that differ from the defaults.

    zygote false gives each exec an interpreter of its own. preload is what is imported ahead: auto is what the file of
    an exec imports beyond the standard library, null what the language's settings say.
    """

    language: str = "python"
    name: Name | None = None
    labels: Labels = {}
    ttl: Ttl | None = None
    limits: dict[str, float | bool] = {}
    rootfs: RootfsChoice = "recipe"
    seccomp: ProfileName = "default"
    zygote: bool = True
    preload: Preload | None = None


class SandboxPage(Struct, frozen=True, kw_only=True):
    """Some sandboxes, and where the next begin: None after the last."""

    items: list[Sandbox]
    next_cursor: str | None


class SandboxChange(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What PATCH changes of a sandbox: the fields that are given.

    null takes a name, an end or a preload away; labels replace all labels; ttl is in seconds from now; limits are those
    that are to differ from what they are.
    """

    name: Name | UnsetType | None = UNSET
    labels: Labels | UnsetType = UNSET
    ttl: Ttl | UnsetType | None = UNSET
    limits: dict[str, float | bool] | UnsetType = UNSET
    seccomp: ProfileName | UnsetType = UNSET
    zygote: bool | UnsetType = UNSET
    preload: Preload | UnsetType | None = UNSET


class Job(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One program to run: a file of the workspace (filename) or a program of the rootfs (command), never both.

    env is all the job sees beyond PATH, HOME, LANG. limits are the fields of Limits to change for this exec; seccomp is
    the profile to run it under, if not the sandbox's.
    """

    filename: Path | None = None
    command: list[Text] = []
    args: list[Text] = []
    env: dict[Variable, Text] = {}
    limits: dict[str, float | bool] = {}
    rootfs: RootfsChoice | None = None
    seccomp: ProfileName | None = None
    encoding: Encoding = "text"


class ExecRequest(Job, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A job, and where to run it: sandbox is an id, a unique prefix of one, or a name. stdin is what to feed it."""

    sandbox: str
    stdin: str | bytes = b""


class ExecBody(Job, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What POST /v1/sandboxes/{id}/exec asks for. stdin is text; a detached job goes on without its caller."""

    stdin: str = ""
    detach: bool = False


class ExecResult(Struct, frozen=True, kw_only=True):
    """What became of one exec (CONTRACT: ExecResult).

    exit_code is None unless status is `exited`; stdout and stderr are None when they were passed through; sandbox_id is
    None for a one-shot run. accounting says whether the CPU time and the peak of memory are the kernel's own, of every
    process, or what was seen of them at intervals. seccomp and seccomp_digest are the profile that was enforced,
    landlock is the ABI of Landlock, 0 where the kernel has none.
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
    accounting: Accounting = "sampled"
    seccomp: str = "default"
    seccomp_digest: str = ""
    landlock: int = 0
    rootfs: str
    limits: Limits
    started_at: str


class TerminalSize(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The size of a terminal, in characters."""

    rows: Characters
    columns: Characters


class TerminalQuery(TerminalSize, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the query of a terminal's address says: its size, its type (term) and the program, if not a login shell."""

    rows: Characters = 24
    columns: Characters = 80
    term: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9._+-]{1,64}\Z")] = "xterm-256color"
    command: list[str] = []


class TerminalControl(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A text frame of a terminal's client: the window has a new size."""

    resize: TerminalSize


class TerminalExit(Struct, frozen=True, kw_only=True):
    """The last text frame of a terminal's server."""

    exit: ExecResult


class RunInfo(Struct, frozen=True, kw_only=True):
    """A detached run. result is None while it is running, and for one that was lost: whoever ran it was killed.

    owner is the id of the key that began it, None where there are no keys.
    """

    run_id: str
    sandbox_id: str
    owner: str | None
    status: Literal["running", "lost"] | Status
    started_at: str
    ended_at: str | None = None
    result: ExecResult | None = None


class FileInfo(Struct, frozen=True, kw_only=True):
    """One entry of a workspace; path is relative to it, mode the permission bits, mtime an instant."""

    path: str
    type: Literal["file", "directory", "link", "fifo", "socket", "device"]
    size: int
    mode: int
    mtime: str


class Unarchived(Struct, frozen=True, kw_only=True):
    """What was unpacked into a workspace: members, bytes of their contents, the first twenty of what was left out."""

    members: int
    bytes: int
    left_out: list[str]


class Recipe(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to make and use the rootfs of a language (rootfs/LANGUAGE.toml).

    run is the argv that runs a file, where "{file}" is replaced by its path in the container. extensions name the
    files that `run` takes; any other file runs only if it is executable. left_out are paths in the tree, relative and
    with a shell's wildcards, of what packages bring and programs can do without. zygote: the interpreter is a CPython
    that can be started ahead of the execs, and forked for each; preload names modules that it is then to import ahead.
    """

    language: str
    suite: str
    packages: list[str]
    interpreter: str
    extensions: list[str]
    run: list[str]
    left_out: list[Annotated[str, Meta(pattern=r"\A(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9_.+*?/-]*\Z")]] = []
    zygote: bool = False
    preload: Modules = []


class Language(Struct, frozen=True, kw_only=True):
    """A language to run files in, and the extensions they have. rootfs is its digest, None until there is one."""

    language: str
    extensions: list[str]
    rootfs: str | None


class RootfsInfo(Struct, frozen=True, kw_only=True):
    """One unpacked rootfs. digest is "sha256:..." over paths, modes and contents, or "host"."""

    language: str
    digest: str
    size: int
    files: int
    created_at: str
    source: str


class SeccompArgument(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A comparison with one argument of a call. With SCMP_CMP_MASKED_EQ, value is the mask and valueTwo the value."""

    index: Annotated[int, Meta(ge=0, le=5)]
    value: Word
    valueTwo: Word = 0  # noqa: N815 - the specification's own name
    op: Literal[
        "SCMP_CMP_NE",
        "SCMP_CMP_LT",
        "SCMP_CMP_LE",
        "SCMP_CMP_EQ",
        "SCMP_CMP_GE",
        "SCMP_CMP_GT",
        "SCMP_CMP_MASKED_EQ",
    ]


class SeccompRule(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What becomes of the calls of these names whose arguments all match; of several rules the refusal wins."""

    names: Annotated[list[SystemCall], Meta(min_length=1)]
    action: Literal["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"]
    errnoRet: Errno = 1  # noqa: N815 - likewise
    args: Annotated[list[SeccompArgument], Meta(max_length=6)] = []
    comment: str = ""


class SeccompProfile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A seccomp profile: an allow-list, as the OCI runtime specification writes it (config-linux.md, "Seccomp").

    architectures may be there, and changes nothing: calls of another architecture than the machine's end the process.
    """

    defaultAction: Literal["SCMP_ACT_ERRNO"]  # noqa: N815 - likewise
    defaultErrnoRet: Errno = 1  # noqa: N815 - likewise
    architectures: list[str] = []
    syscalls: list[SeccompRule]
    comment: str = ""


class AuditSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When audit records reach the disk: `group`, within 50 ms; `always`, before anything else happens."""

    fsync: Literal["group", "always"] = "group"


class PoolSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Slots that wait for execs: at most so many of all kinds, at least so many of each kind that was wanted twice.

    Without a maximum there are slots for the execs of a server, and none elsewhere (pooling.py).
    memory is what they and the zygotes may take together, as far as the pool can tell, which looks twice a minute.
    zygotes: interpreters are started ahead and forked for each exec, which then share what a process draws at its
    start: the layout of its memory, and the seed of str's hash; or that by language, true where one is not named.
    preload names, by language, modules to import ahead; auto is what the file of each exec imports.
    """

    minimum: Annotated[int, Meta(ge=0, le=10_000, description="slots of each kind, at least")] = 0
    maximum: Annotated[int, Meta(ge=0, le=10_000, description="slots that wait, at most; 0: no pool")] | None = None
    memory: Annotated[int, Meta(ge=MIB, le=64 * 1024 * GIB, description="bytes that what waits may take")] = GIB
    zygotes: bool | dict[str, bool] = True
    preload: dict[str, Preload] = {}


class ServerSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one server takes on. Beyond max_execs, execs wait, max_queue of them at most; sizes are bytes."""

    max_execs: Annotated[int, Meta(ge=1, le=10_000, description="execs at once")] = 16
    max_queue: Annotated[int, Meta(ge=0, le=100_000, description="execs that wait for their turn")] = 64
    max_terminals: Annotated[int, Meta(ge=0, le=10_000, description="terminals open at once")] = 16
    max_body: Annotated[int, Meta(ge=KIB, le=GIB, description="bytes of a JSON body")] = 16 * MIB
    max_upload: Annotated[int, Meta(ge=KIB, le=1024 * GIB, description="bytes of an upload")] = 16 * GIB
    keep_runs: Annotated[int, Meta(ge=1, le=1_000_000, description="detached runs kept after their end")] = 1000
    keep_runs_for: Annotated[float, Meta(gt=0, description="seconds a detached run is kept after its end")] = 86_400.0
    grace: Annotated[float, Meta(ge=0, le=3600, description="seconds for execs to end when the server stops")] = 10.0
    allowed_hosts: list[str] = []


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings file (TOML): one table for each subject."""

    audit: AuditSettings = AuditSettings()
    pool: PoolSettings = PoolSettings()
    server: ServerSettings = ServerSettings()


class Health(Struct, frozen=True, kw_only=True):
    """Whether a server answers (live), and whether it can isolate (ready): a program was run. detail says why not."""

    live: bool
    ready: bool
    detail: str


class FieldProblem(Struct, frozen=True, kw_only=True):
    """One field of a request that is wrong, and how."""

    field: str
    message: str


class Problem(Struct, frozen=True, kw_only=True):
    """A failure of a request (RFC 9457): detail says what is wrong and what to do, errors which fields are wrong."""

    type: Literal["about:blank"] = "about:blank"
    title: str
    status: int
    detail: str
    errors: list[FieldProblem] | UnsetType = UNSET


class Check(Struct, frozen=True, kw_only=True):
    """One thing the doctor tried: what is wrong with it here, if anything, and the line that mends it."""

    name: str
    ok: bool
    detail: str
    remedy: str | None = None


class Key(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An API key without its secret: who may use the HTTP API, for what, and how much of it.

    expires_at null is never; max_execs null is the server's own; max_sandboxes null is any number.
    """

    id: str
    scopes: Annotated[list[Scope], Meta(min_length=1)]
    created_at: str
    name: str | None = None
    expires_at: str | None = None
    max_execs: Annotated[int, Meta(ge=1, le=10_000, description="execs at once")] | None = None
    max_sandboxes: Annotated[int, Meta(ge=1, le=1_000_000, description="sandboxes at once")] | None = None


_Record = TypeVar("_Record")


def from_builtins(value: object, record: type[_Record], *, where: str) -> _Record:
    """Check `value` (dicts, lists, text, numbers) against a record class; InvalidRequestError says where it differs."""
    try:
        return msgspec.convert(value, record, strict=True)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"{where}: {error}") from None
    except UnicodeEncodeError:  # a name of a field that JSON can write, and no text can hold
        raise InvalidRequestError(f"{where}: it holds half of a surrogate pair, which is no character") from None


def to_json(value: object, *, indent: int | None = None) -> str:
    """One JSON document, keys in declared order, ASCII only: safe on any terminal and free of lone surrogates."""
    return json.dumps(msgspec.to_builtins(value), indent=indent, ensure_ascii=True)


def from_json(text: str | bytes, record: type[_Record], *, where: str) -> _Record:
    """The record in a JSON document; InvalidRequestError says where it differs."""
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{where}: not JSON: {error}") from None
    return from_builtins(value, record, where=where)


_FIRST_INSTANT, _LAST_INSTANT = -62_135_596_800, 253_402_300_799  # the years 1 to 9999, all that RFC 3339 can write


def instant(seconds: float) -> str:
    """RFC 3339 in UTC, to the microsecond, always as wide: two instants compare as text.

    seconds count from the epoch. A time that RFC 3339 cannot write (a job may set any on its files) becomes the
    nearest one that it can.
    """
    microseconds = min(max(round(seconds * 1_000_000), _FIRST_INSTANT * 1_000_000), _LAST_INSTANT * 1_000_000 + 999_999)
    whole, fraction = divmod(microseconds, 1_000_000)
    year, month, day, hour, minute, second = time.gmtime(whole)[:6]
    return f"{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{fraction:06}Z"
