"""/v1/sandboxes/{id}/terminal: a pty over a WebSocket, as a person at a terminal or a page with one would use it.

Theory of operation. The engine gives a job a pty of its own where the host's side is a terminal; so the server opens
one, hands the engine its slave, and joins the master to the socket:

  socket  <->  master | slave  <->  engine  <->  master | slave of the container  <->  job

The pty here is raw, and passes every byte on: what ^C means, and what is echoed, is decided in the container. Nothing
on the way holds more than a frame: a client that does not read holds up the job, a job that does not read the client.
(Then its pongs are not read either: after some 40 seconds uvicorn takes it for dead.)

A session ends with its job, when the client leaves, sends what is no frame of this protocol or takes nothing for too
long, or with the server. Whatever it was, the job is over and every descriptor closed when the handler returns.

Whoever may not open one is refused before the handshake, with the status and problem document of any other route.
After it, what goes wrong is a close code: 1013 too many at once, 1003 and 1008 a bad frame, and 4000 plus the HTTP
status where there is one.
"""

import asyncio
import errno
import os
import signal
import termios
import tty
from asyncio import Task
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from http import HTTPStatus
from typing import Any, NamedTuple, Self, cast

import anyio
import msgspec
from litestar import Response, WebSocket
from litestar.exceptions import WebSocketDisconnect
from litestar.handlers import WebsocketRouteHandler

from jhansi_runtime.api.access import AnyConnection, Caller
from jhansi_runtime.api.problems import EXCEPTION_HANDLERS
from jhansi_runtime.api.service import Control, Service
from jhansi_runtime.engine import Streams
from jhansi_runtime.errors import BusyError, HostError, InvalidRequestError, JhansiError
from jhansi_runtime.logs import log
from jhansi_runtime.runtime import Runtime
from jhansi_runtime.spec import (
    SESSION,
    SESSION_LIMITS,
    ExecRequest,
    ExecResult,
    TerminalControl,
    TerminalExit,
    TerminalQuery,
    TerminalSize,
    to_json,
)

__all__ = ["ROUTES"]

SUBPROTOCOL = "jhansi.terminal"
STALLED_SECONDS = 60.0  # for which a client may take nothing of what is sent
PROBE_SECONDS = 2.0  # after which a client whose typing waits for the job is asked whether it is still there
CHUNK = 1 << 16
RETRY_AFTER = 1.0

_NORMAL, _UNSUPPORTED, _VIOLATION, _TRY_AGAIN, _OWN = 1000, 1003, 1008, 1013, 4000  # RFC 6455, section 7.4, and IANA
_REASON_BYTES = 123  # RFC 6455, section 5.5: a control frame has 125, of which the code takes two
_REFUSED = "refused"

AnySocket = WebSocket[Any, Any, Any]


class _Close(NamedTuple):
    code: int
    reason: str


class _Gone(Exception):  # noqa: N818 - it is no error, and never leaves this module
    """The client has left, or takes nothing any more."""


class _Terminal(WebsocketRouteHandler):
    """A WebSocket that is refused by its handler: Litestar itself would close it, and give no status and no reason.

    Whom the guards have not let in has no `caller` in the scope either.
    """

    async def authorize_connection(self, connection: AnyConnection) -> None:
        """Run the guards, and keep what they raise for the handler."""
        try:
            await super().authorize_connection(connection)
        except JhansiError as error:
            connection.scope["state"][_REFUSED] = error


class _Pty:
    """A raw pty: the master for the event loop, the slave for the engine. A context manager, for the loop's thread.

    The slave has to be closed first, and by `hang_up`: what was written to it can still be read, up to the end.
    """

    def __init__(self, size: TerminalSize) -> None:
        try:
            self._master, slave = os.openpty()
        except OSError as error:
            raise HostError(f"no terminal can be opened: {error.strerror}") from error
        # The engine polls both of its ends, each by a number of its own.
        self._slaves = [slave, os.dup(slave)]
        tty.setraw(slave)
        # A terminal that polls as writable may yet not have room for what the engine writes at once.
        os.set_blocking(slave, False)
        os.set_blocking(self._master, False)
        self.resize(size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        os.close(self._master)

    def streams(self, control: Control) -> Streams:
        """What a job on this terminal is joined to."""
        keyboard, screen = self._slaves
        return Streams(stdin=keyboard, stdout=screen, stderr=screen, control=control.readable, terminal=True)

    def hang_up(self) -> None:
        """Close the slave: the job has ended."""
        while self._slaves:
            os.close(self._slaves.pop())

    def resize(self, size: TerminalSize) -> None:
        """Set the size, which the engine copies when it is told of SIGWINCH."""
        termios.tcsetwinsize(self._master, (size.rows, size.columns))

    async def read(self) -> bytes:
        """What the job has written, CHUNK bytes at most; b"" after hang_up, when that was all."""
        await anyio.wait_readable(self._master)
        chunk = bytearray()
        while len(chunk) < CHUNK:  # the kernel gives a page at a time
            try:
                some = os.read(self._master, CHUNK - len(chunk))
            except BlockingIOError:
                return bytes(chunk) or await self.read()
            except OSError as error:
                if error.errno != errno.EIO:  # there is no slave any more
                    raise
                break
            chunk += some
        return bytes(chunk)

    async def write(self, content: bytes) -> bytes:
        """Type. What is left after PROBE_SECONDS is returned: a job may take its time to read."""
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                while content:
                    try:
                        content = content[os.write(self._master, content[:CHUNK]) :]
                    except BlockingIOError:
                        await anyio.wait_writable(self._master)
        except TimeoutError:
            return content
        except OSError as error:
            if error.errno != errno.EIO:  # there is no slave any more
                raise
        return b""

    async def discard(self) -> None:
        """Read to the end: a job whose output nobody takes would never come to its own."""
        while await self.read():
            pass


@_Terminal("/v1/sandboxes/{sandbox_id:str}/terminal", opt={"needs": "exec"})
async def terminal(socket: AnySocket, sandbox_id: str) -> None:
    """Open a terminal in a fresh container: the login shell, or ?command=PROG&command=ARG...

    Binary frames are the terminal's bytes both ways. Text frames are JSON: {"resize": {"rows": R, "columns": C}} from
    the client, and {"exit": ExecResult} from the server, as the last one before it closes with 1000.
    """
    service = cast("Service", socket.app.state.service)
    with ExitStack() as stack:
        stack.push(lambda _kind, error, _traceback: _note(service, error))
        try:
            query, wanted = await _admitted(socket, service, sandbox_id)
        except JhansiError as error:
            await _refuse(socket, error)
            return
        is_ours = SUBPROTOCOL in socket.scope["subprotocols"]
        await socket.accept(subprotocols=SUBPROTOCOL if is_ours else None)
        try:
            with _place(service, _caller(socket)):
                last = await _session(socket, service, wanted, query)
        except JhansiError as error:
            service.telemetry.note_error(error)
            code = _TRY_AGAIN if isinstance(error, BusyError) else _OWN + error.http_status
            last = _Close(code, service.discreet(error))
        if last is not None:
            with suppress(_Gone):
                await _send(socket.close(last.code, _shortened(last.reason)))


ROUTES = (terminal,)


async def _admitted(socket: AnySocket, service: Service, sandbox_id: str) -> tuple[TerminalQuery, ExecRequest]:
    """What was asked for, of somebody who may. JhansiError when it is refused."""
    refused = socket.scope["state"].get(_REFUSED)
    if refused is not None:
        raise cast("JhansiError", refused)
    query = _query(socket)
    wanted = ExecRequest(
        sandbox=sandbox_id, command=query.command or SESSION, env={"TERM": query.term}, limits=SESSION_LIMITS
    )
    await service.in_thread(_runtime(socket, service).check, wanted)
    return query, wanted


def _query(socket: AnySocket) -> TerminalQuery:
    given = socket.query_params.dict()
    try:
        # strict=False: in a query numbers are text
        return msgspec.convert(
            {name: values if name == "command" else values[-1] for name, values in given.items()},
            TerminalQuery,
            strict=False,
        )
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"query: {error}") from None


def _caller(socket: AnySocket) -> Caller:
    return cast("Caller", socket.scope["state"]["caller"])


def _runtime(socket: AnySocket, service: Service) -> Runtime:
    return service.runtime_of(_caller(socket))


def _note(service: Service, error: BaseException | None) -> None:
    """Tell the log of what nobody expected: Litestar closes the socket, and says nothing."""
    if isinstance(error, Exception):
        service.telemetry.note_defect(error)


async def _refuse(socket: AnySocket, error: JhansiError) -> None:
    """Answer in place of the handshake (the ASGI specification's "Websocket Denial Response")."""
    response = cast("Response[bytes]", EXCEPTION_HANDLERS[JhansiError](socket, error))
    headers = {"content-type": str(response.media_type), **response.headers}
    encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    status = response.status_code or HTTPStatus.FORBIDDEN
    start = {"type": "websocket.http.response.start", "status": status, "headers": encoded}
    await socket.send(cast("Any", start))  # Litestar's types do not know of this extension
    await socket.send(cast("Any", {"type": "websocket.http.response.body", "body": response.content}))


@contextmanager
def _place(service: Service, caller: Caller) -> Iterator[None]:
    """Within: one of the terminals of this server, and of the execs of this key. BusyError when there are too many."""
    at_most = service.settings.max_terminals
    if service.terminals >= at_most:
        raise BusyError(f"{at_most} terminals are open, which is this server's limit", retry_after=RETRY_AFTER)
    service.terminals += 1
    try:
        with service.admission.share(caller.actor or "", None if caller.key is None else caller.key.max_execs):
            yield
    finally:
        service.terminals -= 1


async def _session(socket: AnySocket, service: Service, wanted: ExecRequest, size: TerminalSize) -> _Close | None:
    """Run it until it has ended, and say how to close: None when there is nobody to close anything to."""
    began = service.telemetry.clock()
    runtime = _runtime(socket, service)
    with _Pty(size) as pty, Control() as control:
        streams = pty.streams(control)
        job = asyncio.create_task(service.attended(control, lambda: runtime.exec(wanted, streams)))
        job.add_done_callback(lambda _: pty.hang_up())
        incoming = asyncio.create_task(_take_in(socket, pty, control))
        outgoing = asyncio.create_task(_give_out(socket, pty))
        try:
            await asyncio.wait({incoming, outgoing}, return_when=asyncio.FIRST_COMPLETED)
            has_heard_all = outgoing.done() and outgoing.exception() is None
        finally:
            await _end(job, pty, control, {incoming, outgoing})
    result = job.result()
    seconds = service.telemetry.clock() - began
    service.telemetry.note_bytes("stdout", result.stdout_bytes)
    log("terminal", run_id=result.run_id, sandbox_id=result.sandbox_id, status=result.status, seconds=round(seconds, 6))
    try:
        if has_heard_all:
            await _send(socket.send_text(to_json(TerminalExit(exit=result))))
            return _Close(_NORMAL, "")
        return incoming.result() if incoming.done() and not incoming.cancelled() else outgoing.result()
    except _Gone:
        return None


async def _end(job: "Task[ExecResult]", pty: _Pty, control: Control, others: set["Task[Any]"]) -> None:
    """Stop moving bytes, and see the job to its end, as of a terminal that was hung up."""
    for task in others:
        task.cancel()
    await asyncio.wait(others)
    if not job.done():
        control.send(signal.SIGHUP)  # an interactive shell would not hear of SIGTERM
    discarding = asyncio.create_task(pty.discard())
    await asyncio.wait({job, discarding}, return_when=asyncio.ALL_COMPLETED)
    discarding.result()


async def _take_in(socket: AnySocket, pty: _Pty, control: Control) -> _Close:
    """Type what the client sends, until it sends what is no frame of ours. _Gone when it has left."""
    while True:
        message = cast("dict[str, Any]", await socket.receive())
        if message["type"] == "websocket.disconnect":
            raise _Gone
        content = message.get("bytes")
        if content is not None:
            while content := await pty.write(content):
                # Nothing is received meanwhile, so that the client has left would not be heard: an empty frame tells.
                await _send(socket.send_bytes(b""))
            continue
        try:
            frame = msgspec.json.decode(message["text"], type=TerminalControl)
        except msgspec.ValidationError as error:
            return _Close(_VIOLATION, f"not a control frame: {error}")
        except msgspec.DecodeError:
            return _Close(_UNSUPPORTED, "a text frame has to be JSON; what is typed goes in binary frames")
        pty.resize(frame.resize)
        control.send(signal.SIGWINCH)


async def _give_out(socket: AnySocket, pty: _Pty) -> None:
    """Send what the job writes, to its end. _Gone when the client does not take it."""
    while chunk := await pty.read():
        await _send(socket.send_bytes(chunk))


async def _send(sending: Any) -> None:  # noqa: ANN401 - a coroutine of Litestar's
    """Send, and wait until there is room for more. _Gone when that takes too long, or the client has left."""
    try:
        async with asyncio.timeout(STALLED_SECONDS):
            await sending
    except (OSError, WebSocketDisconnect):  # TimeoutError is an OSError, and so is what ASGI servers raise
        raise _Gone from None


def _shortened(reason: str) -> str:
    return reason.encode()[:_REASON_BYTES].decode(errors="ignore")
