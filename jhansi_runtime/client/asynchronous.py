"""The client that awaits: AsyncClient, and what it gives: AsyncSandboxHandle, AsyncRunHandle, AsyncJobStream.

Line by line what blocking.py is, with awaits; it works under asyncio and trio.
"""

from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Self, Unpack

import anyio
import anyio.to_thread
import httpx

from jhansi_runtime.client import verbs
from jhansi_runtime.client.binding import AsyncSender
from jhansi_runtime.client.calls import Call
from jhansi_runtime.client.connection import RETRIES, TIMEOUT, AsyncConnection, Server
from jhansi_runtime.client.events import Event, JobEvents
from jhansi_runtime.client.transfer import Target, target
from jhansi_runtime.client.verbs import JobOptions, RunVerbs, SandboxOptions, SandboxVerbs, ServerVerbs
from jhansi_runtime.client.waiting import ended, pauses, settling
from jhansi_runtime.errors import ConflictError, NotFoundError
from jhansi_runtime.spec import Encoding, ExecResult, RunInfo, Sandbox

__all__ = ["AsyncClient", "AsyncJobStream", "AsyncRunHandle", "AsyncSandboxHandle"]


class AsyncClient(ServerVerbs, AsyncSender):
    """A server's sandboxes, over HTTP. A context manager; any number of tasks may use one.

    base_url is its address, such as http://127.0.0.1:8700, or socket the path of its Unix socket; by default the socket
    that the environment names. key is an API key, by default JHANSI_API_KEY. timeout is in seconds and bounds each wait
    for the server, except for a job, which its own limits end; None waits forever. retries is how often a call may be
    sent again, where that is safe.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        socket: str | None = None,
        key: str | None = None,
        timeout: float | None = TIMEOUT,
        retries: int = RETRIES,
    ) -> None:
        self.connection = AsyncConnection(Server.of(base_url, socket, key, timeout, retries))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections to the server."""
        await self.connection.close()

    async def create_sandbox(self, language: str = "python", **options: Unpack[SandboxOptions]) -> "AsyncSandboxHandle":
        """Make a sandbox. ttl is in seconds; limits are those that differ from the defaults.

        Two creates with the same idempotency_key make one sandbox; by default each has its own.
        """
        return AsyncSandboxHandle(self.connection, await self.connection.perform(verbs.create(language, options)))

    async def sandbox(self, reference: str) -> "AsyncSandboxHandle":
        """The sandbox with this id, unique prefix of an id, or name. NotFoundError when there is none."""
        return AsyncSandboxHandle(self.connection, await self.connection.perform(verbs.sandbox(reference)))

    async def sandboxes(self, labels: Mapping[str, str] | None = None) -> "AsyncGenerator[AsyncSandboxHandle]":
        """Every sandbox that has all these labels, oldest first, asked for page by page."""
        cursor = None
        while True:
            page = await self.connection.perform(verbs.page(labels or {}, cursor))
            for info in page.items:
                yield AsyncSandboxHandle(self.connection, info)
            if (cursor := page.next_cursor) is None:
                return

    async def runs(self, sandbox: str | None = None) -> "list[AsyncRunHandle]":
        """The detached runs of a sandbox, or all, newest first."""
        return [AsyncRunHandle(self.connection, info) for info in await self.connection.perform(verbs.runs(sandbox))]

    async def run(self, run_id: str) -> "AsyncRunHandle":
        """The detached run with this id. NotFoundError when there is none."""
        return AsyncRunHandle(self.connection, await self.connection.perform(verbs.run(run_id)))


class AsyncSandboxHandle(SandboxVerbs, AsyncSender):
    """One sandbox. info is what the server last said of it. As a context manager it removes the sandbox in the end.

    An exec that was left has a few seconds to end then; ConflictError when one goes on.
    """

    def __init__(self, connection: AsyncConnection, info: Sandbox) -> None:
        self.connection = connection
        self.info = info

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.info!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(NotFoundError):  # it was removed within, or its time to live was over
            for pause in settling():
                with suppress(ConflictError):
                    await self.delete()
                    return
                await anyio.sleep(pause)
            await self.delete()

    @property
    def id(self) -> str:
        """Its id."""
        return self.info.id

    async def refresh(self) -> Sandbox:
        """Ask how it stands now."""
        self.info = await self.connection.perform(verbs.sandbox(self.id))
        return self.info

    async def change(self, **changes: Unpack[verbs.Changes]) -> Sandbox:
        """Change what is given: None takes a name or an end away, labels replace all labels, ttl counts from now."""
        self.info = await self.connection.perform(verbs.change(self.id, changes))
        return self.info

    async def download(self, path: str, output: Target) -> None:
        """Copy one file of the workspace to a file of this machine, or into one that is open in binary."""
        await self._receive(verbs.content(self.id, path), output)

    async def archive(self, output: Target) -> None:
        """Write a tar of the whole workspace to a file of this machine, or into one that is open in binary."""
        await self._receive(verbs.archive(self.id), output)

    def stream(self, filename: str | None = None, *args: str, **options: Unpack[JobOptions]) -> "AsyncJobStream":
        """Run a file of the workspace, or the `command` of the rootfs, and tell what it writes as it does.

        It begins with the first event that is asked for. Closing the stream before its end ends the job.
        """
        return AsyncJobStream(self.connection, verbs.events(self.id, filename, args, options))

    async def start(self, filename: str | None = None, *args: str, **options: Unpack[JobOptions]) -> "AsyncRunHandle":
        """Run a file of the workspace, or the `command` of the rootfs, whether or not anybody waits for it."""
        info = await self.connection.perform(verbs.detach(self.id, filename, args, options))
        return AsyncRunHandle(self.connection, info)

    async def _receive(self, call: Call[None], output: Target) -> None:
        async with self.connection.opened(call) as response:
            with target(output) as file:
                async for chunk in response.aiter_bytes():
                    await anyio.to_thread.run_sync(file.write, chunk)


class AsyncRunHandle(RunVerbs, AsyncSender):
    """One detached run. info is what the server last said of it."""

    def __init__(self, connection: AsyncConnection, info: RunInfo) -> None:
        self.connection = connection
        self.info = info

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.info!r})"

    @property
    def id(self) -> str:
        """Its id."""
        return self.info.run_id

    @property
    def result(self) -> ExecResult | None:
        """What became of it, as far as the server last said."""
        return self.info.result

    async def refresh(self) -> RunInfo:
        """Ask how it stands now."""
        self.info = await self.connection.perform(verbs.run(self.id))
        return self.info

    async def wait(self, timeout: float | None = None) -> ExecResult:  # noqa: ASYNC109 - the same verb as the client that waits
        """Wait until it has ended. TimeoutError after so many seconds; HostError when the run was lost."""
        for pause in pauses(timeout):
            if (await self.refresh()).status != "running":
                break
            await anyio.sleep(pause)
        return ended(self.info)

    def output(self, *, follow: bool = True, encoding: Encoding = "text") -> "AsyncJobStream":
        """What it wrote, from the beginning; with `follow` until its end. A connection that breaks is made anew."""
        call = verbs.follow(self.id, follow=follow, encoding=encoding)
        return AsyncJobStream(self.connection, call, until_end=follow)


class AsyncJobStream:
    """The events of a job, one by one: an iterator, and a context manager that stops listening in the end.

    After the last event `result` is what became of the job, without the output, which the events have told.
    """

    def __init__(self, connection: AsyncConnection, call: Call[None], *, until_end: bool = True) -> None:
        self._connection = connection
        self._seen = JobEvents()
        self._events = self._read(call, until_end=until_end)

    @property
    def result(self) -> ExecResult | None:
        """What became of the job; None until all events were read."""
        return self._seen.result

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        return await anext(self._events)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop listening."""
        await self._events.aclose()

    async def _read(self, call: Call[None], *, until_end: bool) -> AsyncGenerator[Event]:
        seen, attempts = self._seen, self._connection.server.attempts(call)
        while True:
            position = seen.last_id
            async with self._connection.opened(seen.resumed(call)) as response:
                try:
                    async for chunk in response.aiter_bytes():
                        for event in seen.feed(chunk):
                            yield event
                    broken = seen.missing_end() if until_end else None
                except httpx.RequestError as error:
                    broken = None if seen.result else error
            if broken is None:
                return
            if seen.last_id != position:  # it is not the same place at which it breaks again and again
                attempts = self._connection.server.attempts(call)
            await anyio.sleep(attempts.after_failure(broken))
