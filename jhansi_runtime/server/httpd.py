"""An ASGI application on uvicorn, over any number of sockets, until this process is told to end.

Theory of operation. There is one process and one event loop (uvloop). Its end has four steps, each of which the one
before may have made needless:

  1. a signal (SIGTERM, SIGINT): no more connections; idle ones are closed, requests in flight go on within the grace
  2. the grace is over, or a second signal came: what is still in flight is cancelled
  3. the application shuts down, and ends its jobs; that takes a few seconds at most
  4. what is open is cut off. Should a thread still hold on, the kernel ends the process with SIGALRM

uvicorn is taken as it is but for three things that it has no setting for: that end; a limit on the size of a request's
head and on the time it takes to come; and that a request says whether it came over a Unix socket, which needs no key:
scope["state"]["over_unix_socket"]. uvicorn knows no client of such a request, but neither of one over TCP whose client
has reset the connection, and that is in the buffer still and will be served. So the listener is asked, not the peer,
and a peer over TCP that is gone still has an address here.
"""

import asyncio
import gc
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from socket import socket
from time import monotonic
from typing import Any, TypeAlias

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState

from jhansi_runtime.errors import HostError
from jhansi_runtime.logs import log
from jhansi_runtime.server.listening import BACKLOG, Listener
from jhansi_runtime.server.supervision import Supervisor
from jhansi_runtime.thin import peer

__all__ = ["OVER_UNIX_SOCKET", "serve"]

OVER_UNIX_SOCKET = "over_unix_socket"  # in scope["state"] of each request and WebSocket: whether it came over one

HEAD_LIMIT = 64 * 1024  # bytes of a request's line and headers
HEAD_TIMEOUT = 10.0  # seconds for them to come
WRITE_BUFFER = 16 * 1024  # bytes of answers that wait for who does not read, beyond which no more are made
KEEP_ALIVE = 5  # seconds that a connection may be idle between two requests
WEBSOCKET_MESSAGE_LIMIT = 1024 * 1024  # bytes
SHUTDOWN_TIMEOUT = 10.0  # seconds for the application to end its jobs
LAST_RESORT = 20  # seconds from the end of the grace until the kernel ends us

# From Python 3.13 on a loop takes away the file of a socket that it closes, also of one that a supervisor opened.
_KEEPS_FILE: dict[str, Any] = {"cleanup_socket": False}
_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LOOK_AGAIN = 0.02  # seconds, while requests in flight end
_GONE = ("0.0.0.0", 0)  # noqa: S104 - nothing is bound to it: the client of a TCP connection that was reset
_REFUSALS = {  # title and detail of the problem document
    400: ("Bad Request", "this is no request of HTTP/1.1"),
    408: ("Request Timeout", f"the head of a request has to come within {HEAD_TIMEOUT:.0f} seconds"),
    431: ("Request Header Fields Too Large", f"the head of a request may be {HEAD_LIMIT} bytes long"),
}


Application: TypeAlias = Callable[..., Any]  # ASGI 3


def serve(app: Application, listeners: Sequence[Listener], *, grace: float, supervisor: Supervisor) -> bool:
    """Serve the application until SIGTERM or SIGINT; whether it shut down in order. Only in the main thread.

    Requests in flight have grace seconds to end. HostError: the application did not start.
    """
    server = _Server(app, listeners, grace, supervisor)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(server.serve())
    finally:
        signal.alarm(0)
    return server.is_orderly


class _Server(uvicorn.Server):
    def __init__(self, app: Application, listeners: Sequence[Listener], grace: float, supervisor: Supervisor) -> None:
        super().__init__(
            uvicorn.Config(
                partial(_telling_why_it_does_not_start, app),
                interface="asgi3",
                http=_Connection,
                ws=_WebSocket,
                ws_max_size=WEBSOCKET_MESSAGE_LIMIT,
                ws_per_message_deflate=False,  # what a client sends is small; what it would unpack to need not be
                lifespan="on",
                log_config=None,
                access_log=False,  # the application has its own
                proxy_headers=False,  # anybody could claim to be anybody
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE,
                workers=1,
            )
        )
        self.listeners = listeners
        self.grace = grace
        self.supervisor = supervisor
        self.is_orderly = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Be told to end by a signal. uvicorn's own would end us by that very signal afterwards."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_log_loop_error)
        for number in _ENDING_SIGNALS:
            loop.add_signal_handler(number, self.end)
        watchdog = asyncio.create_task(self._keep_watchdog_quiet())
        try:
            yield
        finally:
            watchdog.cancel()
            for number in _ENDING_SIGNALS:
                loop.remove_signal_handler(number)

    def end(self) -> None:
        """End in order; called again, without any grace."""
        if self.should_exit:
            self.force_exit = True
            signal.alarm(LAST_RESORT)
        self.should_exit = True

    async def startup(self, sockets: list[socket] | None = None) -> None:  # noqa: ARG002 - the signature is uvicorn's
        """Start the application, then accept connections on every socket."""
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            raise HostError("the application of the server did not start", remedy="the log above says why")
        loop = asyncio.get_running_loop()
        self.servers = []
        for listener, kind in self.listeners:
            state = self.lifespan.state | {OVER_UNIX_SOCKET: kind == "unix"}
            protocol = partial(_Connection, self.config, self.server_state, state)
            if kind == "unix":
                server = await loop.create_unix_server(protocol, sock=listener, backlog=BACKLOG, **_KEEPS_FILE)
            else:
                server = await loop.create_server(protocol, sock=listener, backlog=BACKLOG)
            self.servers.append(server)
        self.started = True
        gc.collect()
        gc.freeze()  # what was loaded stays: no collection needs to walk it again
        log("server.ready", addresses=[listener.address for listener in self.listeners])
        self._tell("READY=1")

    async def shutdown(self, sockets: list[socket] | None = None) -> None:  # noqa: ARG002 - the signature is uvicorn's
        """Steps 1 to 4 of the theory above."""
        self._tell("STOPPING=1")
        connections, tasks = self.server_state.connections, self.server_state.tasks
        log("server.stopping", connections=len(connections), requests=len(tasks))
        for server in self.servers:
            server.close()
        for connection in list(connections):
            connection.shutdown()
        await self._idle(monotonic() + self.grace)
        signal.alarm(LAST_RESORT)
        if tasks:
            log("server.cancelling", requests=len(tasks))
        for task in list(tasks):
            task.cancel()
        try:
            async with asyncio.timeout(SHUTDOWN_TIMEOUT):
                await self.lifespan.shutdown()
        except TimeoutError:
            log("server.shutdown_timeout")
            self.is_orderly = False
        self.is_orderly = self.is_orderly and not self.lifespan.should_exit
        for connection in list(connections):
            connection.transport.abort()
        log("server.stopped", orderly=self.is_orderly)

    async def _idle(self, deadline: float) -> None:
        """Wait for the requests in flight, up to the deadline or a second signal."""
        in_flight = self.server_state
        # uvicorn keeps sets of them, and tells nobody when one becomes empty.
        while (in_flight.connections or in_flight.tasks) and monotonic() < deadline and not self.force_exit:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_AGAIN)

    async def _keep_watchdog_quiet(self) -> None:
        """Give a sign of life twice in the time that the supervisor waits for one, as long as the loop turns."""
        while self.supervisor.watchdog is not None:
            self._tell("WATCHDOG=1")
            await asyncio.sleep(self.supervisor.watchdog / 2)

    def _tell(self, state: str) -> None:
        try:
            self.supervisor.tell(state)
        except OSError as error:  # it will act on what it does not hear; we can only say so
            log("server.notify_failed", error=error)


class _Connection(HttpToolsProtocol):
    """A connection that may neither take its time with the head of a request nor send a large one."""

    def __init__(self, config: uvicorn.Config, server_state: ServerState, app_state: dict[str, Any]) -> None:
        super().__init__(config, server_state, app_state)
        self._deadline: asyncio.TimerHandle | None = None
        self._in_head = False
        self._head_size = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        super().connection_made(transport)
        if self.app_state[OVER_UNIX_SOCKET] and peer(transport.get_extra_info("socket")) not in {os.geteuid(), 0}:
            transport.abort()  # whatever the mode of the socket's file: who comes by it needs no key
        transport.set_write_buffer_limits(high=WRITE_BUFFER)
        if self.client is None and not self.app_state[OVER_UNIX_SOCKET]:
            self.client = _GONE
        self._set_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        was_in_head = self._in_head
        super().data_received(data)
        if self not in self.connections or self.transport.is_closing():  # a WebSocket by now, or refused
            self._clear_deadline()
            return
        if was_in_head and self._in_head:
            self._head_size += len(data)  # also what makes up no whole header yet
            if self._head_size > HEAD_LIMIT:
                self._refuse(431)
        elif (self._in_head or not self._is_answering()) and self._deadline is None:
            self._set_deadline()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._head_size = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._head_size += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._head_size += len(name) + len(value)
        if self._head_size > HEAD_LIMIT:
            raise OverflowError  # the parser makes it an error of its own, which ends in send_400_response

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_size = 0
        self._clear_deadline()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - the signature is uvicorn's
        self._refuse(431 if self._head_size > HEAD_LIMIT else 400)

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _set_deadline(self) -> None:
        self._deadline = self.loop.call_later(HEAD_TIMEOUT, self._on_deadline)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _on_deadline(self) -> None:
        if self._is_answering():  # the request before is still being answered
            self._set_deadline()
        elif self._in_head:
            self._refuse(408)
        else:
            self.transport.close()

    def _refuse(self, status: int) -> None:
        """Answer with a problem document, unless another answer is on its way, and close."""
        self._clear_deadline()
        if not self._is_answering():
            title, detail = _REFUSALS[status]
            body = json.dumps({"type": "about:blank", "title": title, "status": status, "detail": detail}).encode()
            self.transport.write(
                b"HTTP/1.1 %d %s\r\ncontent-type: application/problem+json\r\ncontent-length: %d\r\n"
                b"connection: close\r\n\r\n%s" % (status, title.encode(), len(body), body)
            )
        self.transport.close()


class _WebSocket(WebSocketsSansIOProtocol):
    """A WebSocket, which asks for its peer anew, and may be refused with an HTTP status."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self.client is None and not self.app_state[OVER_UNIX_SOCKET]:
            self.client = _GONE

    def handle_parser_exception(self) -> None:
        """Close also when the handshake itself could not be read: there is no close frame to send then."""
        if self.conn.close_sent is None:
            self.transport.close()
        else:
            super().handle_parser_exception()

    def keepalive_timeout(self) -> None:
        """Let go of a peer that is dead: one that takes nothing would never let a close in order come to its end."""
        super().keepalive_timeout()
        self.transport.abort()

    async def send(self, message: Any) -> None:  # noqa: ANN401 - an ASGI message
        """Send; a refusal that is complete is no handshake that was left undone, which would be logged as an error."""
        await super().send(message)
        if self.initial_response is not None and self.close_sent:
            self.handshake_complete = True


async def _telling_why_it_does_not_start(app: Application, scope: Any, receive: Any, send: Any) -> None:  # noqa: ANN401 - ASGI
    """The application. Of an error in its start or shutdown a framework hands uvicorn the text alone."""
    if scope["type"] != "lifespan":
        await app(scope, receive, send)
        return
    with ExitStack() as stack:
        stack.push(_log_lifespan_error)
        await app(scope, receive, send)


def _log_lifespan_error(_kind: type[BaseException] | None, error: BaseException | None, _traceback: object) -> None:
    if error is not None:
        log("server.lifespan_error", error=error)


def _log_loop_error(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """In place of the loop's own, which prints values and paths."""
    log("server.loop_error", error=context.get("exception"))
