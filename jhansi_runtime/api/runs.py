"""/v1/runs: detached runs, which go on without whoever began them: how they stand, what they wrote, and their end."""

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated, Literal

from litestar import Response, delete, get
from litestar.params import HeaderParameter, Parameter
from litestar.response import Stream

from jhansi_runtime.api.access import Caller
from jhansi_runtime.api.document import BYTES, TEXT, described, nothing
from jhansi_runtime.api.events import MEDIA_TYPE, NOT_STORED, events, frames
from jhansi_runtime.api.routes import AnyRequest
from jhansi_runtime.api.service import Service
from jhansi_runtime.errors import InvalidRequestError, NotFoundError
from jhansi_runtime.runtime import Runtime
from jhansi_runtime.spec import RunInfo

__all__ = ["ROUTES"]

_ACCEPTED, _GONE = 202, 204
_BINARY = "application/octet-stream"

LastEventId = Annotated[
    str | None, HeaderParameter(name="Last-Event-ID", description="resume after the event of that id")
]
Offset = Annotated[int, Parameter(ge=0, description="bytes of the stream to leave out")]


@get("/v1/runs", opt={"needs": "read"}, summary="List detached runs", **described("listRuns", 404, 422))
async def list_(service: Service, caller: Caller, runtime: Runtime, sandbox: str | None = None) -> list[RunInfo]:
    """Newest first: all, or those of one sandbox."""
    sandbox_id = None if sandbox is None else (await service.in_thread(runtime.sandbox, sandbox)).id
    return await service.in_thread(lambda: service.runs.list(owner=caller.owner, sandbox_id=sandbox_id))


@get("/v1/runs/{run_id:str}", opt={"needs": "read"}, summary="Show a detached run", **described("showRun", 404))
async def show(run_id: str, service: Service, caller: Caller) -> RunInfo:
    """How it stands; its result once it has ended."""
    return await _found(service, caller, run_id)


@get(
    "/v1/runs/{run_id:str}/output",
    opt={"needs": "read"},
    summary="Read or follow the output of a run",
    media_type=_BINARY,
    **described("readOutput", 404, 422, media={200: {_BINARY: BYTES, MEDIA_TYPE: TEXT}}),
)
async def output(
    run_id: str,
    request: AnyRequest,
    service: Service,
    caller: Caller,
    stream: Literal["stdout", "stderr"] = "stdout",
    follow: bool = False,
    offset: Offset = 0,
    encoding: Literal["text", "base64"] = "text",
    last_event_id: LastEventId = None,
) -> Stream:
    """The bytes of one stream; with Accept: text/event-stream the events of both.

    With `follow` it goes on until the run has ended. Who was cut off resumes: with `offset`, the number of bytes they
    have, or with the header Last-Event-ID.
    """
    info = await _found(service, caller, run_id)
    if MEDIA_TYPE in request.headers.get("accept", ""):
        after = _position(last_event_id)
        await service.in_thread(lambda: next(service.runs.frames(run_id, after), None))  # is it the end of an event?
        told = events(service, info, after=after, follow=follow, encoding=encoding)
        return Stream(told, media_type=MEDIA_TYPE, headers=NOT_STORED)
    content = _bytes(service, run_id, stream, offset, follow=follow)
    return Stream(content, media_type=_BINARY, headers=NOT_STORED)


@delete(
    "/v1/runs/{run_id:str}",
    status_code=_ACCEPTED,
    opt={"needs": "exec"},
    summary="Cancel or forget a run",
    **described("cancelRun", 404, 409, also={_GONE: nothing("it had ended, and is forgotten")}),
)
async def cancel(run_id: str, service: Service, caller: Caller) -> Response[None]:
    """One that is under way is asked to end, and 202 is the answer; one that has ended is forgotten: 204."""
    await _found(service, caller, run_id)
    if service.cancel(run_id):
        return Response(None, status_code=_ACCEPTED)
    await service.in_thread(service.runs.forget, run_id)
    return Response(None, status_code=_GONE)


ROUTES = (list_, show, output, cancel)


async def _found(service: Service, caller: Caller, run_id: str) -> RunInfo:
    """The run, if it is the caller's; that of another is not there, and in the very same words."""
    with suppress(NotFoundError):
        info = await service.in_thread(service.runs.find, run_id)
        if caller.owner in {None, info.owner}:
            return info
    raise NotFoundError("there is no such run", remedy="give the full id of a detached run that was not forgotten")


def _position(last_event_id: str | None) -> int:
    if last_event_id is None:
        return 0
    if not last_event_id.isascii() or not last_event_id.isdecimal() or len(last_event_id) > _LONGEST_POSITION:
        raise InvalidRequestError("Last-Event-ID: not the id of an event of this run")
    return int(last_event_id)


_LONGEST_POSITION = 15  # digits


async def _bytes(service: Service, run_id: str, stream: str, offset: int, *, follow: bool) -> AsyncIterator[bytes]:
    async for some in frames(service, run_id, 0, follow=follow):
        for frame in some:
            if frame.stream == stream:
                if offset < len(frame.data):
                    yield frame.data[offset:]
                offset = max(0, offset - len(frame.data))
