"""Sending calls: the one thing in which the two clients differ.

Connection waits, AsyncConnection awaits; line by line they do the same. What is sent, whether it may be sent again, and
what an answer means is said in calls, attempts and problems.
"""

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, closing, contextmanager
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import httpx

from jhansi_runtime.client.attempts import Attempts
from jhansi_runtime.client.calls import Call
from jhansi_runtime.client.problems import connection_error
from jhansi_runtime.errors import InvalidRequestError
from jhansi_runtime.paths import Paths, api_key

__all__ = ["RETRIES", "TIMEOUT", "AsyncConnection", "Connection", "Server"]

_T = TypeVar("_T")

RETRIES = 3
TIMEOUT = 60.0  # seconds
# Shorter than a server keeps an idle connection: a request must not meet one that is just being closed.
_IDLE_SECONDS = 3.0
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class Server(NamedTuple):
    """Which server, and how to reach it: `socket` is the path of its Unix socket, None over TCP."""

    base_url: str
    socket: str | None
    key: str | None
    timeout: float | None
    retries: int

    @classmethod
    def of(
        cls, base_url: str | None, socket: str | None, key: str | None, timeout: float | None, retries: int
    ) -> "Server":
        """Fill in what is not given from the environment. InvalidRequestError names what cannot be used."""
        key = api_key() if key is None else key
        if key is not None and not (key.isascii() and key.isprintable()):
            raise InvalidRequestError("the API key holds characters that no key has", remedy="check JHANSI_API_KEY")
        if base_url is None:
            return cls("http://localhost", socket or Paths.from_environment().socket, key, timeout, retries)
        if socket is not None:
            raise InvalidRequestError("base_url and socket exclude each other", remedy="give one of them")
        parts = urlsplit(base_url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise InvalidRequestError(f"not an address: {base_url!r}", remedy="such as http://127.0.0.1:8700")
        return cls(base_url, None, key, timeout, retries)

    @property
    def address(self) -> str:
        """What messages call it."""
        return self.socket or self.base_url

    def options(self) -> dict[str, Any]:
        """What httpx's two clients are given alike. No proxy stands between this machine and itself."""
        return {
            "base_url": self.base_url,
            "headers": {"Authorization": f"Bearer {self.key}"} if self.key else {},
            "timeout": self.timeout,
            "trust_env": self.socket is None and urlsplit(self.base_url).hostname not in _LOOPBACK,
            "limits": _LIMITS,
        }

    def request(self, call: Call[Any]) -> dict[str, Any]:
        """What httpx's two clients make the request from alike. What waits for a job is ended by the job's limits."""
        patience = {"read": None} if call.is_patient else {}
        return {
            "method": call.method,
            "url": call.path,
            "params": call.query or None,
            "headers": call.headers,
            "timeout": httpx.Timeout(self.timeout, **patience),
        }

    def attempts(self, call: Call[Any]) -> Attempts:
        """The attempts that this client makes at a call."""
        return Attempts(call, left=self.retries, address=self.address)


_LIMITS = httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=_IDLE_SECONDS)


class Connection:
    """Sends calls and waits for the answers. Any number of threads may use one."""

    def __init__(self, server: Server) -> None:
        self.server = server
        transport = httpx.HTTPTransport(uds=server.socket, limits=_LIMITS) if server.socket else None
        self._http = httpx.Client(transport=transport, **server.options())

    def close(self) -> None:
        """Close what is open; an answer that is still being read ends."""
        self._http.close()

    def perform(self, call: Call[_T]) -> _T:
        """Send a call and read its answer. Raises the JhansiError that an error tells of."""
        with self.opened(call, whole=True) as response:
            return call.decode(response)

    @contextmanager
    def opened(self, call: Call[Any], *, whole: bool = False) -> Iterator[httpx.Response]:
        """The answer to a call, which is no error: read when it is to be `whole`, else still to be read."""
        attempts = self.server.attempts(call)
        delay: float | None
        while True:
            try:
                response = self._sent(call)
                if whole or response.is_error:
                    response.read()
            except httpx.RequestError as error:
                delay = attempts.after_failure(error)
            else:
                with closing(response):
                    delay = attempts.after_answer(response)
                    if delay is None:
                        with _explained(self.server):
                            yield response
                        return
            time.sleep(delay)

    def _sent(self, call: Call[Any]) -> httpx.Response:
        if isinstance(call.body, bytes):
            return self._http.send(self._request(call, call.body), stream=True)
        with closing(call.body.chunks()) as chunks:
            return self._http.send(self._request(call, chunks), stream=True)

    def _request(self, call: Call[Any], content: bytes | Iterator[bytes]) -> httpx.Request:
        return self._http.build_request(content=content, **self.server.request(call))


class AsyncConnection:
    """Sends calls and awaits the answers, under asyncio or trio. Files are read and written by threads."""

    def __init__(self, server: Server) -> None:
        self.server = server
        transport = httpx.AsyncHTTPTransport(uds=server.socket, limits=_LIMITS) if server.socket else None
        self._http = httpx.AsyncClient(transport=transport, **server.options())

    async def close(self) -> None:
        """Close what is open; an answer that is still being read ends."""
        await self._http.aclose()

    async def perform(self, call: Call[_T]) -> _T:
        """Send a call and read its answer. Raises the JhansiError that an error tells of."""
        async with self.opened(call, whole=True) as response:
            return call.decode(response)

    @asynccontextmanager
    async def opened(self, call: Call[Any], *, whole: bool = False) -> AsyncIterator[httpx.Response]:
        """The answer to a call, which is no error: read when it is to be `whole`, else still to be read."""
        attempts = self.server.attempts(call)
        delay: float | None
        while True:
            try:
                response = await self._sent(call)
                if whole or response.is_error:
                    await response.aread()
            except httpx.RequestError as error:
                delay = attempts.after_failure(error)
            else:
                async with aclosing(response):
                    delay = attempts.after_answer(response)
                    if delay is None:
                        with _explained(self.server):
                            yield response
                        return
            await anyio.sleep(delay)

    async def _sent(self, call: Call[Any]) -> httpx.Response:
        if isinstance(call.body, bytes):
            return await self._http.send(self._request(call, call.body), stream=True)
        with closing(call.body.chunks()) as chunks:
            return await self._http.send(self._request(call, _from_thread(chunks)), stream=True)

    def _request(self, call: Call[Any], content: bytes | AsyncIterator[bytes]) -> httpx.Request:
        return self._http.build_request(content=content, **self.server.request(call))


async def _from_thread(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    while (chunk := await anyio.to_thread.run_sync(next, chunks, None)) is not None:
        yield chunk


@contextmanager
def _explained(server: Server) -> Iterator[None]:
    """An answer that breaks off while it is read is told of like one that never came."""
    try:
        yield
    except httpx.RequestError as error:
        raise connection_error(error, server.address) from error
