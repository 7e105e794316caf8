"""/v1/sandboxes/{id}/files and /archive: files in and out, streamed both ways, whatever their size.

A file gets its place once it is whole: an upload that breaks leaves the old one. Nothing is held in memory but the
piece that is under way, and no thread waits for a caller: each piece goes to the disk by itself.
"""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from io import FileIO
from tempfile import TemporaryFile
from typing import Annotated, Any, TypeVar
from urllib.parse import unquote_to_bytes

from litestar import Response, delete, get, head, post, put
from litestar.params import HeaderParameter, Parameter, QueryParameter
from litestar.response import Stream
from multipart import (  # type: ignore[import-untyped] # it ships none
    MultipartError,
    MultipartSegment,
    PushMultipartParser,
    parse_options_header,
)

from jhansi_runtime.api.document import BYTES, FORM, answer, described, nothing
from jhansi_runtime.api.ranges import is_unchanged, requested
from jhansi_runtime.api.routes import AnyRequest, Close, Document, Sent
from jhansi_runtime.api.service import Service
from jhansi_runtime.errors import InvalidRequestError, TooLargeError
from jhansi_runtime.explanations import explained
from jhansi_runtime.runtime import Runtime
from jhansi_runtime.spec import PATH_PATTERN, FileInfo, Unarchived
from jhansi_runtime.workspace import Opened, Upload

__all__ = ["ROUTES"]

_Value = TypeVar("_Value")

_OK, _CREATED, _NOT_MODIFIED, _PARTIAL, _NOT_SATISFIABLE = 200, 201, 304, 206, 416
_PART_NAME = "file"
_MOST_PARTS = 10_000
_BINARY = "application/octet-stream"
_TAR = "application/x-tar"
_FILES = "/v1/sandboxes/{sandbox_id:str}/files"
_FILE = "/v1/sandboxes/{sandbox_id:str}/files/{path:path}"
_ARCHIVE = "/v1/sandboxes/{sandbox_id:str}/archive"

Folder = Annotated[
    str,
    QueryParameter(
        name="path", schema_extra={"pattern": "^$|" + PATH_PATTERN}, description="a folder of the workspace"
    ),
]
FilePath = Annotated[
    str,
    Parameter(schema_extra={"pattern": PATH_PATTERN}, description="relative to the workspace; `/` need not be escaped"),
]
IfMatch = Annotated[str | None, HeaderParameter(name="If-Match", description="write only over what has this ETag")]
IfNoneMatch = Annotated[
    str | None,
    HeaderParameter(
        name="If-None-Match", schema_extra={"enum": ["*"]}, description="`*`: write only what is not there"
    ),
]


@get(_FILES, opt={"needs": "read"}, summary="List files", **described("listFiles", 404, 409, 422))
async def list_(
    sandbox_id: str, service: Service, runtime: Runtime, folder: Folder = "", recursive: bool = False
) -> list[FileInfo]:
    """What is in a folder of the workspace, by path; links are not followed."""
    return await service.in_thread(lambda: runtime.files(sandbox_id, folder, recursive=recursive))


@post(
    _FILES,
    opt={"needs": "write"},
    summary="Upload files",
    request_max_body_size=None,
    **described("uploadFiles", 400, 404, 409, 413, 422, 507, takes={"multipart/form-data": FORM}),
)
async def upload(
    sandbox_id: str, request: AnyRequest, service: Service, runtime: Runtime, folder: Folder = ""
) -> list[FileInfo]:
    """Write the parts named `file` of a multipart form, each under its file name, which may hold folders.

    Each gets its place when its part is complete; parts that came before one that fails are written.
    """
    _, options = parse_options_header(request.headers.get("content-type", ""))
    if not options.get("boundary"):
        raise InvalidRequestError("content-type: not multipart/form-data", remedy="send it as: curl -F file=@main.py")
    parser = PushMultipartParser(options["boundary"], max_segment_count=_MOST_PARTS)
    written = []
    try:
        with parser:
            async with AsyncExitStack() as stack:
                received: Upload | None = None
                async for event in _events(parser, request, service):
                    if isinstance(event, MultipartSegment):
                        if event.name == _PART_NAME:
                            path = "/".join(name for name in (folder, _file_name(event)) if name)
                            receiving = _in_threads(service, runtime.receiving(sandbox_id, path))
                            received = await stack.enter_async_context(receiving)
                    elif received is None:
                        continue
                    elif event:
                        await service.in_thread(received.add, event)
                    else:
                        written.append((await service.in_thread(received.publish)).info)
                        received = None
                        await stack.aclose()
    except MultipartError as error:
        raise InvalidRequestError(f"body: not a multipart form: {error}") from None
    if not written:
        raise InvalidRequestError("body: no part is named `file`", remedy="send it as: curl -F file=@main.py")
    return written


@get(
    _FILE,
    opt={"needs": "read"},
    summary="Download a file",
    media_type=_BINARY,
    **described(
        "downloadFile",
        404,
        409,
        422,
        also={
            _PARTIAL: answer(bytes, "the Range that was asked for", _BINARY),
            _NOT_MODIFIED: nothing("the caller has it (If-None-Match)"),
            _NOT_SATISFIABLE: nothing("no byte of the Range is there"),
        },
        headers={
            _OK: ["ETag", "Accept-Ranges", "Content-Length"],
            _PARTIAL: ["ETag", "Accept-Ranges", "Content-Length", "Content-Range"],
            _NOT_MODIFIED: ["ETag"],
            _NOT_SATISFIABLE: ["ETag", "Content-Range"],
        },
        media={_OK: {_BINARY: BYTES}, _PARTIAL: {_BINARY: BYTES}},
        reads={
            "If-None-Match": "ETags that the caller has: 304 when the file still has one of them",
            "Range": "`bytes=FIRST-LAST`, `bytes=FIRST-` or `bytes=-LENGTH`: send these bytes alone",
            "If-Range": "mind Range only while the file has this ETag",
        },
    ),
)
async def download(request: AnyRequest, service: Service, runtime: Runtime, sandbox_id: str, path: FilePath) -> Stream:  # noqa: ARG001 - the path is read as it was sent
    """The bytes of one file, or the Range of them that is asked for; 304 when the caller has them (If-None-Match)."""
    opening = _in_threads(service, runtime.opened(sandbox_id, _path(request)))
    async with AsyncExitStack() as stack:
        opened = await stack.enter_async_context(opening)
        kept = stack.pop_all()
    size, headers = opened.info.size, _headers(opened)
    if is_unchanged(request.headers, opened.etag):
        await kept.aclose()
        return Sent(_nothing(), kept.aclose, service, status_code=_NOT_MODIFIED, media_type=_BINARY, headers=headers)
    try:
        span = requested(request.headers, size, opened.etag)
    except ValueError:
        await kept.aclose()
        headers["Content-Range"] = f"bytes */{size}"
        return Sent(_nothing(), kept.aclose, service, status_code=_NOT_SATISFIABLE, media_type=_BINARY, headers=headers)
    start, end = span or (0, size)
    headers["Content-Length"] = str(end - start)
    if span:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    content = _pieces(service, opened.chunks(start, end), kept.aclose)
    status = _PARTIAL if span else _OK
    return Sent(content, kept.aclose, service, status_code=status, media_type=_BINARY, headers=headers)


@head(
    _FILE,
    opt={"needs": "read"},
    summary="Look at a file",
    media_type=_BINARY,
    **described(
        "lookAtFile",
        404,
        409,
        422,
        also={_NOT_MODIFIED: nothing("the caller has it (If-None-Match)")},
        headers={_OK: ["ETag", "Accept-Ranges", "Content-Length"], _NOT_MODIFIED: ["ETag"]},
        reads={"If-None-Match": "ETags that the caller has: 304 when the file still has one of them"},
    ),
)
async def look(
    request: AnyRequest,
    service: Service,
    runtime: Runtime,
    sandbox_id: str,
    path: FilePath,  # noqa: ARG001 - likewise
) -> Response[None]:
    """The headers that GET would answer with."""
    async with _in_threads(service, runtime.opened(sandbox_id, _path(request))) as opened:
        headers = {**_headers(opened), "Content-Length": str(opened.info.size)}
        status = _NOT_MODIFIED if is_unchanged(request.headers, opened.etag) else _OK
    return Document(None, status_code=status, media_type=_BINARY, headers=headers)


@put(
    _FILE,
    opt={"needs": "write"},
    summary="Write a file",
    request_max_body_size=None,
    **described(
        "writeFile",
        404,
        409,
        412,
        413,
        422,
        507,
        also={_CREATED: answer(FileInfo, "it was not there before")},
        headers={_OK: ["ETag"], _CREATED: ["ETag"]},
        takes={_BINARY: BYTES},
        may_be_empty=True,
    ),
)
async def write(
    request: AnyRequest,
    service: Service,
    runtime: Runtime,
    sandbox_id: str,
    path: FilePath,  # noqa: ARG001 - likewise
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
) -> Response[FileInfo]:
    """Make a file (201) or replace it (200), with the body as its content; folders on the way are made."""
    if if_none_match not in {None, "*"}:
        raise InvalidRequestError("If-None-Match: only * has a meaning here", remedy="use If-Match for an ETag")
    receiving = runtime.receiving(
        sandbox_id, _path(request), if_match=if_match, if_none_match=if_none_match is not None
    )
    async with _in_threads(service, receiving) as received:
        async for piece in _body(request, service):
            await service.in_thread(received.add, piece)
            del piece  # see _body
        written = await service.in_thread(received.publish)
    return Document(written.info, status_code=_CREATED if written.created else _OK, headers={"ETag": written.etag})


@delete(_FILE, opt={"needs": "write"}, summary="Remove a file", **described("removeFile", 404, 409, 422))
async def remove(request: AnyRequest, service: Service, runtime: Runtime, sandbox_id: str, path: FilePath) -> None:  # noqa: ARG001 - likewise
    """Remove a file, or a folder with all that is in it."""
    await service.in_thread(runtime.remove_file, sandbox_id, _path(request))


@get(
    _ARCHIVE,
    opt={"needs": "read"},
    summary="Download the workspace",
    media_type=_TAR,
    **described("downloadArchive", 404, 409, 422, media={_OK: {_TAR: BYTES}}),
)
async def pack(sandbox_id: str, service: Service, runtime: Runtime) -> Stream:
    """A tar of the whole workspace; devices, FIFOs and sockets are left out."""
    archive = await service.in_thread(runtime.archive, sandbox_id)

    async def close() -> None:
        await service.in_thread(archive.close)

    return Sent(_pieces(service, archive, close), close, service, media_type=_TAR)


@put(
    _ARCHIVE,
    opt={"needs": "write"},
    summary="Unpack into the workspace",
    request_max_body_size=None,
    **described("unpackArchive", 404, 409, 413, 422, 507, takes={_TAR: BYTES}),
)
async def unpack(sandbox_id: str, request: AnyRequest, service: Service, runtime: Runtime) -> Unarchived:
    """Unpack a tar (plain, gzip, xz or zstd) over what is there, all of it or nothing."""
    await service.in_thread(runtime.sandbox, sandbox_id)
    # Unpacked by a thread that reads it, which must not wait for the caller: so all of it comes to the disk first, to
    # that of the workspaces, for /tmp is the host's memory on many.
    async with _in_threads(service, TemporaryFile(buffering=0, dir=runtime.paths.workspaces)) as spooled:
        async for piece in _body(request, service):
            await service.in_thread(_append, spooled, piece)
            del piece  # see _body
        spooled.seek(0)
        unpacked = await service.in_thread(runtime.unarchive, sandbox_id, spooled)
    return Unarchived(members=unpacked.members, bytes=unpacked.contents, left_out=list(unpacked.inert))


ROUTES = (list_, upload, download, look, write, remove, pack, unpack)


# --- what comes in ------------------------------------------------------------------------------------------


async def _body(request: AnyRequest, service: Service) -> AsyncIterator[bytes]:
    """The body as it comes, up to the limit of an upload."""
    # Not request.stream(), which keeps hold of a piece until the next has come: of many callers who stall, many pieces.
    count, is_more = 0, True
    while is_more:
        message: dict[str, Any] = await request.receive()  # type: ignore[assignment] # of one type or the other
        if message["type"] == "http.disconnect":
            raise InvalidRequestError("the body is not whole")
        is_more = message.get("more_body", False)
        count += len(message.get("body", b""))
        if count > service.settings.max_upload:
            raise TooLargeError(f"the body is larger than {service.settings.max_upload} bytes")
        yield message.pop("body", b"")
    service.telemetry.note_bytes("upload", count)


def _append(file: FileIO, piece: bytes) -> None:
    rest = memoryview(piece)
    with explained("archive"):
        while rest:  # one write stops short where the disk becomes full, and the next says so
            rest = rest[file.write(rest) :]


async def _events(
    parser: PushMultipartParser, request: AnyRequest, service: Service
) -> AsyncIterator[MultipartSegment | bytes | None]:
    async for piece in _body(request, service):
        for event in parser.parse(piece):
            yield bytes(event) if isinstance(event, bytearray) else event


def _file_name(part: MultipartSegment) -> str:
    if not part.filename:
        raise InvalidRequestError("body: a part named `file` has no file name", remedy="add one: filename=main.py")
    return str(part.filename)


def _path(request: AnyRequest) -> str:
    """The path of a file as its bytes were sent, which need not be UTF-8."""
    raw: bytes = request.scope["raw_path"]
    return os.fsdecode(unquote_to_bytes(raw.split(b"/", 5)[5]))


@asynccontextmanager
async def _in_threads(service: Service, manager: AbstractContextManager[_Value]) -> AsyncIterator[_Value]:
    """A context manager that may wait for the disk on its way in and out."""
    value = await service.in_thread(manager.__enter__)
    try:
        yield value
    except BaseException as error:
        if not await service.in_thread(manager.__exit__, type(error), error, error.__traceback__):
            raise
    else:
        await service.in_thread(manager.__exit__, None, None, None)


# --- what goes out ------------------------------------------------------------------------------------------


def _headers(opened: Opened) -> dict[str, str]:
    return {"ETag": opened.etag, "Accept-Ranges": "bytes", "X-Content-Type-Options": "nosniff"}


async def _pieces(service: Service, chunks: Iterator[bytes], close: Close) -> AsyncIterator[bytes]:
    """The pieces as they are read. By the time that the last is sent, nothing is held any more."""
    ahead = await service.in_thread(next, chunks, None)
    while ahead is not None:
        chunk, ahead = ahead, await service.in_thread(next, chunks, None)
        if ahead is None:
            await close()
        service.telemetry.note_bytes("download", len(chunk))
        yield chunk
    await close()


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield b""
