"""/v1/sandboxes/{id}/exec: run a file of a workspace, and tell what became of it: at the end, as it goes, or later."""

import asyncio
from contextlib import AsyncExitStack

from litestar import Response, post
from msgspec import structs

from jhansi_runtime.api.access import Caller
from jhansi_runtime.api.document import TEXT, answer, described
from jhansi_runtime.api.events import MEDIA_TYPE, NOT_STORED, events
from jhansi_runtime.api.routes import AnyRequest, Document, Sent, cancelled_when_left, exact
from jhansi_runtime.api.service import Control, Service, end
from jhansi_runtime.background import run_detached
from jhansi_runtime.engine import Streams
from jhansi_runtime.errors import InvalidRequestError
from jhansi_runtime.runs import new_run_id
from jhansi_runtime.runtime import Runtime
from jhansi_runtime.spec import ExecBody, ExecRequest, ExecResult, RunInfo

__all__ = ["ROUTES"]

_ACCEPTED = 202


@post(
    "/v1/sandboxes/{sandbox_id:str}/exec",
    status_code=200,
    opt={"needs": "exec"},
    summary="Run a file",
    **described(
        "exec",
        400,
        404,
        409,
        413,
        422,
        429,
        503,
        507,
        also={_ACCEPTED: answer(RunInfo, "detached: it goes on by itself")},
        headers={_ACCEPTED: ["Location"]},
        media={200: {MEDIA_TYPE: TEXT}},
    ),
)
async def exec_(
    sandbox_id: str, data: ExecBody, request: AnyRequest, service: Service, caller: Caller, runtime: Runtime
) -> Response[ExecResult]:
    """Run a file of the workspace, or a program of the rootfs, in a fresh container.

    A program that fails is no error: its failure is in the result. Accept: text/event-stream asks for events as they
    come (start, stdout, stderr, end); with `detach` the answer is 202 with the run, which goes on without its caller.
    """
    _check(data)
    wanted = ExecRequest(
        sandbox=sandbox_id, **{field: getattr(data, field) for field in data.__struct_fields__ if field != "detach"}
    )
    wanted = structs.replace(wanted, limits=exact(data.limits))
    if data.detach:
        info = await _begin(service, caller, runtime, wanted)
        return Document(info, status_code=_ACCEPTED, headers={"Location": f"/v1/runs/{info.run_id}"})  # type: ignore[arg-type] # the schema tells of the usual answer
    if MEDIA_TYPE in request.headers.get("accept", ""):
        info = await _begin(service, caller, runtime, wanted)

        async def leave() -> None:
            service.cancel(info.run_id)
            await service.forget(info.run_id)

        told = events(service, info, encoding=wanted.encoding)
        return Sent(told, leave, service, media_type=MEDIA_TYPE, headers=NOT_STORED)  # type: ignore[return-value] # likewise
    return Document(await _result(service, caller, runtime, wanted, request))


ROUTES = (exec_,)


def _check(data: ExecBody) -> None:
    """Refuse what no program can be given, before anything begins: a caller who has left would not hear of it."""
    if data.command and not data.command[0]:
        raise InvalidRequestError("command: its first word names no program")
    if not all(name and "=" not in name for name in data.env):
        raise InvalidRequestError("env: a name is empty or holds a `=`")
    for field, words in (("command", data.command), ("args", data.args), ("env", [*data.env, *data.env.values()])):
        if any("\0" in word for word in words):
            raise InvalidRequestError(f"{field}: a NUL byte cannot be passed to a program")


async def _result(
    service: Service, caller: Caller, runtime: Runtime, wanted: ExecRequest, request: AnyRequest
) -> ExecResult:
    """Run it to its end. A caller who leaves ends the job."""
    began = service.telemetry.clock()
    async with cancelled_when_left(request), service.turn(caller) as queued:
        with Control() as control:
            streams = Streams(control=control.readable)
            result = await service.attended(control, lambda: runtime.exec(wanted, streams))
    seconds = service.telemetry.clock() - began
    # The caller need not wait for that: it is done once the answer is on its way.
    asyncio.get_running_loop().call_soon(lambda: service.telemetry.note_exec(result, queued=queued, seconds=seconds))
    return result


async def _begin(service: Service, caller: Caller, runtime: Runtime, wanted: ExecRequest) -> RunInfo:
    """Begin it in the background, where it keeps its turn until it has ended."""
    began = service.telemetry.clock()
    sandbox = await service.in_thread(runtime.check, wanted)
    limits = sandbox.limits.changed(wanted.limits)
    async with AsyncExitStack() as stack:
        queued = await stack.enter_async_context(service.turn(caller))
        journal = await service.in_thread(service.runs.begin, new_run_id(), sandbox.id, caller.actor)
        kept = stack.pop_all()

    def run(control: Control) -> ExecResult:
        return run_detached(
            runtime,
            wanted,
            journal,
            limits=limits,
            control=control.readable,
            cancel=lambda: end(control),
            describe=service.discreet,
        )

    async def attend() -> None:
        async with kept:
            with journal, Control() as control, service.known(journal.info.run_id, control):
                result = await service.attended(control, lambda: run(control))
        service.telemetry.note_exec(result, queued=queued, seconds=service.telemetry.clock() - began)

    service.spawn(attend())
    return journal.info
