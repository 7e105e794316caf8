"""The verbs: what is sent for each and how its answer is read, for both clients alike (CONTRACT: HTTP /v1).

A function here takes what the caller gives and returns a Call; nothing is sent. The classes at the end say which of
them are methods of a client, of a sandbox and of a run.
"""

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict, TypeVar, Unpack

import httpx

from jhansi_runtime.client.binding import Verb, VerbOfId
from jhansi_runtime.client.calls import JSON, Call, Source, as_json, bytes_of, nothing, part, path_in_workspace, record
from jhansi_runtime.client.transfer import Content, Local, Tree, content_of
from jhansi_runtime.spec import (
    Encoding,
    ExecBody,
    ExecResult,
    FileInfo,
    Health,
    Language,
    RootfsChoice,
    RunInfo,
    Sandbox,
    SandboxBody,
    SandboxChange,
    SandboxPage,
    Unarchived,
)

__all__ = [
    "Changes",
    "JobOptions",
    "RunVerbs",
    "SandboxOptions",
    "SandboxVerbs",
    "ServerVerbs",
    "archive",
    "change",
    "content",
    "create",
    "detach",
    "events",
    "follow",
    "page",
    "run",
    "runs",
    "sandbox",
]

_T = TypeVar("_T")

_EVENTS: Mapping[str, str] = {"Accept": "text/event-stream"}
_ACCEPTED = 202


class SandboxOptions(TypedDict, total=False):
    """What may be said of a new sandbox: the fields of SandboxBody, and the key that makes a repetition the same."""

    name: str | None
    labels: dict[str, str]
    ttl: float | None
    limits: dict[str, float | bool]
    rootfs: RootfsChoice
    seccomp: str
    zygote: bool
    preload: list[str] | Literal["auto"] | None
    idempotency_key: str


class Changes(TypedDict, total=False):
    """What may be changed of a sandbox: the fields of SandboxChange."""

    name: str | None
    labels: dict[str, str]
    ttl: float | None
    limits: dict[str, float | bool]
    seccomp: str
    zygote: bool
    preload: list[str] | Literal["auto"] | None


class JobOptions(TypedDict, total=False):
    """What may be said of a job: the fields of ExecBody. stdin may also be bytes, whatever they are."""

    command: Sequence[str]
    env: Mapping[str, str]
    stdin: str | bytes
    limits: Mapping[str, float | bool]
    rootfs: RootfsChoice
    seccomp: str
    encoding: Encoding


# --- the server ---


def create(language: str, options: SandboxOptions) -> Call[Sandbox]:
    """Make a sandbox. Its key tells the server that a repetition is the same create."""
    given = {**options}
    key = str(given.pop("idempotency_key", None) or uuid.uuid4())
    body = as_json(SandboxBody(language=language, **given))  # type: ignore[arg-type] # SandboxOptions has its fields
    headers = {**JSON, "Idempotency-Key": key}
    return Call("POST", "/v1/sandboxes", record(Sandbox), headers=headers, body=body, can_repeat=True)


def page(labels: Mapping[str, str], cursor: str | None) -> Call[SandboxPage]:
    """The sandboxes that have all these labels, from a cursor on."""
    query = [("label", f"{name}={value}") for name, value in labels.items()]
    query += [("cursor", cursor)] if cursor else []
    return Call("GET", "/v1/sandboxes", record(SandboxPage), query=tuple(query), can_repeat=True)


def sandbox(reference: str) -> Call[Sandbox]:
    """One sandbox, by its id, a unique prefix of that, or its name."""
    return Call("GET", _of_sandbox(reference), record(Sandbox), can_repeat=True)


def runs(sandbox: str | None) -> Call[list[RunInfo]]:
    """The detached runs of a sandbox, or all."""
    query = (("sandbox", sandbox),) if sandbox else ()
    return Call("GET", "/v1/runs", record(list[RunInfo]), query=query, can_repeat=True)


def languages() -> Call[list[Language]]:
    """The languages that files can be run in."""
    return Call("GET", "/v1/languages", record(list[Language]), can_repeat=True)


def health() -> Call[Health]:
    """Whether the server answers and can isolate. HostError when it cannot."""
    return Call("GET", "/v1/health", record(Health), can_repeat=True, is_patient=True)


def audit(
    *, sandbox: str | None = None, run: str | None = None, since: str | None = None, limit: int | None = None
) -> Call[list[dict[str, Any]]]:
    """The newest audit records, oldest first: of one sandbox or run, from an instant (RFC 3339) on."""
    named = {"sandbox": sandbox, "run": run, "since": since, "limit": None if limit is None else str(limit)}
    query = tuple((name, value) for name, value in named.items() if value is not None)
    return Call("GET", "/v1/audit", record(list[dict[str, Any]]), query=query, can_repeat=True)


# --- a sandbox ---


def change(sandbox_id: str, changes: Changes) -> Call[Sandbox]:
    """Change what is given."""
    return Call("PATCH", _of_sandbox(sandbox_id), record(Sandbox), headers=JSON, body=as_json(SandboxChange(**changes)))


def delete(sandbox_id: str) -> Call[None]:
    """Remove the sandbox and all its files. ConflictError while an exec is under way in it."""
    return Call("DELETE", _of_sandbox(sandbox_id), nothing, can_repeat=True, is_patient=True)


def files(sandbox_id: str, directory: str = "", *, recursive: bool = False) -> Call[list[FileInfo]]:
    """What is in a folder of the workspace, sorted by path."""
    query = (("path", directory), ("recursive", str(recursive).lower()))
    return Call("GET", f"{_of_sandbox(sandbox_id)}/files", record(list[FileInfo]), query=query, can_repeat=True)


def write(
    sandbox_id: str, path: str, content: Content, *, if_match: str | None = None, if_none_match: str | None = None
) -> Call[FileInfo]:
    """Write one file, whole or not at all; folders on the way are made. content is bytes or a file open in binary.

    if_match is the etag the file must have, if_none_match one that it must not have ("*": there must be none); else
    ConflictError.
    """
    conditions = {"If-Match": if_match, "If-None-Match": if_none_match}
    headers = {name: value for name, value in conditions.items() if value is not None}
    # After a write that succeeded, its own condition no longer holds.
    return Call(
        "PUT",
        _of_file(sandbox_id, path),
        record(FileInfo),
        headers=headers,
        body=content_of(content),
        can_repeat=not headers,
        is_patient=True,
    )


def read(sandbox_id: str, path: str) -> Call[bytes]:
    """The content of one file. For one that is too large for memory there is download."""
    return Call("GET", _of_file(sandbox_id, path), bytes_of, can_repeat=True)


def etag(sandbox_id: str, path: str) -> Call[str]:
    """What changes whenever the content of the file does, as if_match and if_none_match of write take it."""
    return Call("HEAD", _of_file(sandbox_id, path), _etag, can_repeat=True)


def remove_file(sandbox_id: str, path: str) -> Call[None]:
    """Remove a file, or a folder with all that is in it."""
    return Call("DELETE", _of_file(sandbox_id, path), nothing, can_repeat=True, is_patient=True)


def put(sandbox_id: str, source: Local, to: str = "") -> Call[Unarchived]:
    """Copy a file or folder of this machine into the folder `to` of the workspace, under its own name.

    Permission bits and times of change are kept; a folder that is there is merged into.
    """
    return _unarchive(sandbox_id, Tree(source, to))


def unarchive(sandbox_id: str, source: Content) -> Call[Unarchived]:
    """Unpack a tar, plain or compressed, into the workspace: what it says, and what was left out of it."""
    return _unarchive(sandbox_id, content_of(source))


def content(sandbox_id: str, path: str) -> Call[None]:
    """One file, to be read as it comes."""
    return Call("GET", _of_file(sandbox_id, path), nothing, can_repeat=True)


def archive(sandbox_id: str) -> Call[None]:
    """A tar of the whole workspace, to be read as it comes."""
    return Call("GET", f"{_of_sandbox(sandbox_id)}/archive", nothing, can_repeat=True, is_patient=True)


def exec_(sandbox_id: str, filename: str | None = None, *args: str, **options: Unpack[JobOptions]) -> Call[ExecResult]:
    """Run a file of the workspace, or the `command` of the rootfs, to its end.

    A program that fails is a result; what raises is a failure to run it. It is sent again only when it cannot have
    been run.
    """
    return _job(sandbox_id, record(ExecResult), filename, args, options)


def events(sandbox_id: str, filename: str | None, args: tuple[str, ...], options: JobOptions) -> Call[None]:
    """Run it and tell what it writes as it does; it ends when nobody listens any more."""
    return _job(sandbox_id, nothing, filename, args, options)._replace(headers={**JSON, **_EVENTS})


def detach(sandbox_id: str, filename: str | None, args: tuple[str, ...], options: JobOptions) -> Call[RunInfo]:
    """Run it whether or not anybody listens."""
    return _job(sandbox_id, record(RunInfo), filename, args, options, is_detached=True)


# --- a detached run ---


def run(run_id: str) -> Call[RunInfo]:
    """How it stands; its result once it has ended."""
    return Call("GET", _of_run(run_id), record(RunInfo), can_repeat=True)


def follow(run_id: str, *, follow: bool, encoding: Encoding) -> Call[None]:
    """What it wrote, as events; with `follow` until its end."""
    query = (("follow", str(follow).lower()), ("encoding", encoding))
    path = f"{_of_run(run_id)}/output"
    return Call("GET", path, nothing, query=query, headers=_EVENTS, can_repeat=True, is_patient=True)


def written(run_id: str, stream: Literal["stdout", "stderr"] = "stdout", *, offset: int = 0) -> Call[bytes]:
    """The bytes it has written to one stream so far, from an offset on."""
    query = (("stream", stream), ("offset", str(offset)))
    return Call("GET", f"{_of_run(run_id)}/output", bytes_of, query=query, can_repeat=True)


def cancel(run_id: str) -> Call[bool]:
    """End it. True when it is being ended; False when it had ended before, and its output is now forgotten."""
    # Sent twice, the second would forget the run that the first has ended.
    return Call("DELETE", _of_run(run_id), lambda response: response.status_code == _ACCEPTED)


# --- who has which ---


class ServerVerbs:
    """What both clients can do that answers with a record."""

    languages = Verb(languages)
    health = Verb(health)
    audit = Verb(audit)


class SandboxVerbs:
    """What both clients can do with a sandbox that answers with a record."""

    delete = VerbOfId(delete)
    files = VerbOfId(files)
    write = VerbOfId(write)
    read = VerbOfId(read)
    etag = VerbOfId(etag)
    remove_file = VerbOfId(remove_file)
    put = VerbOfId(put)
    unarchive = VerbOfId(unarchive)
    exec = VerbOfId(exec_)


class RunVerbs:
    """What both clients can do with a detached run that answers with a record."""

    written = VerbOfId(written)
    cancel = VerbOfId(cancel)


# --- within ---


def _of_sandbox(sandbox_id: str) -> str:
    return f"/v1/sandboxes/{part(sandbox_id)}"


def _of_file(sandbox_id: str, path: str) -> str:
    return f"{_of_sandbox(sandbox_id)}/files/{path_in_workspace(path)}"


def _of_run(run_id: str) -> str:
    return f"/v1/runs/{part(run_id)}"


def _etag(response: httpx.Response) -> str:
    return str(response.headers["ETag"])


def _unarchive(sandbox_id: str, body: bytes | Source) -> Call[Unarchived]:
    headers = {"Content-Type": "application/x-tar"}
    path = f"{_of_sandbox(sandbox_id)}/archive"
    return Call("PUT", path, record(Unarchived), headers=headers, body=body, can_repeat=True, is_patient=True)


def _job(
    sandbox_id: str,
    decode: Callable[[httpx.Response], _T],
    filename: str | None,
    args: tuple[str, ...],
    options: JobOptions,
    *,
    is_detached: bool = False,
) -> Call[_T]:
    stdin = options.get("stdin", "")
    body = ExecBody(
        filename=filename,
        command=list(options.get("command", ())),
        args=list(args),
        env=dict(options.get("env", {})),
        # A byte that is not UTF-8 crosses as a surrogate escape, and is that byte again on the other side.
        stdin=stdin if isinstance(stdin, str) else stdin.decode("utf-8", "surrogateescape"),
        limits=dict(options.get("limits", {})),
        rootfs=options.get("rootfs"),
        seccomp=options.get("seccomp"),
        encoding=options.get("encoding", "text"),
        detach=is_detached,
    )
    path = f"{_of_sandbox(sandbox_id)}/exec"
    return Call("POST", path, decode, headers=JSON, body=as_json(body), is_patient=True)
