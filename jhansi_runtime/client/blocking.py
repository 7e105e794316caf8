"""The client that waits: Client, and what it gives: SandboxHandle, RunHandle, JobStream.

Its verbs are those of verbs.py. Here is only what takes more than one question, or an answer that comes in pieces;
asynchronous.py is the same with awaits.
"""

import time
from collections.abc import Generator, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Self, Unpack

import httpx

from jhansi_runtime.client import verbs
from jhansi_runtime.client.binding import Sender
from jhansi_runtime.client.calls import Call
from jhansi_runtime.client.connection import RETRIES, TIMEOUT, Connection, Server
from jhansi_runtime.client.events import Event, JobEvents
from jhansi_runtime.client.transfer import Target, target
from jhansi_runtime.client.verbs import JobOptions, RunVerbs, SandboxOptions, SandboxVerbs, ServerVerbs
from jhansi_runtime.client.waiting import ended, pauses, settling
from jhansi_runtime.errors import ConflictError, NotFoundError
from jhansi_runtime.spec import Encoding, ExecResult, RunInfo, Sandbox

__all__ = ["Client", "JobStream", "RunHandle", "SandboxHandle"]


class Client(ServerVerbs, Sender):
    """A server's sandboxes, over HTTP. A context manager; any number of threads may use one.

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
        self.connection = Connection(Server.of(base_url, socket, key, timeout, retries))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections to the server."""
        self.connection.close()

    def create_sandbox(self, language: str = "python", **options: Unpack[SandboxOptions]) -> "SandboxHandle":
        """Make a sandbox. ttl is in seconds; limits are those that differ from the defaults.

        Two creates with the same idempotency_key make one sandbox; by default each has its own.
        """
        return SandboxHandle(self.connection, self.connection.perform(verbs.create(language, options)))

    def sandbox(self, reference: str) -> "SandboxHandle":
        """The sandbox with this id, unique prefix of an id, or name. NotFoundError when there is none."""
        return SandboxHandle(self.connection, self.connection.perform(verbs.sandbox(reference)))

    def sandboxes(self, labels: Mapping[str, str] | None = None) -> "Generator[SandboxHandle]":
        """Every sandbox that has all these labels, oldest first, asked for page by page."""
        cursor = None
        while True:
            page = self.connection.perform(verbs.page(labels or {}, cursor))
            yield from (SandboxHandle(self.connection, info) for info in page.items)
            if (cursor := page.next_cursor) is None:
                return

    def runs(self, sandbox: str | None = None) -> "list[RunHandle]":
        """The detached runs of a sandbox, or all, newest first."""
        return [RunHandle(self.connection, info) for info in self.connection.perform(verbs.runs(sandbox))]

    def run(self, run_id: str) -> "RunHandle":
        """The detached run with this id. NotFoundError when there is none."""
        return RunHandle(self.connection, self.connection.perform(verbs.run(run_id)))


class SandboxHandle(SandboxVerbs, Sender):
    """One sandbox. info is what the server last said of it. As a context manager it removes the sandbox in the end.

    An exec that was left has a few seconds to end then; ConflictError when one goes on.
    """

    def __init__(self, connection: Connection, info: Sandbox) -> None:
        self.connection = connection
        self.info = info

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.info!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(NotFoundError):  # it was removed within, or its time to live was over
            for pause in settling():
                with suppress(ConflictError):
                    self.delete()
                    return
                time.sleep(pause)
            self.delete()

    @property
    def id(self) -> str:
        """Its id."""
        return self.info.id

    def refresh(self) -> Sandbox:
        """Ask how it stands now."""
        self.info = self.connection.perform(verbs.sandbox(self.id))
        return self.info

    def change(self, **changes: Unpack[verbs.Changes]) -> Sandbox:
        """Change what is given: None takes a name or an end away, labels replace all labels, ttl counts from now."""
        self.info = self.connection.perform(verbs.change(self.id, changes))
        return self.info

    def download(self, path: str, output: Target) -> None:
        """Copy one file of the workspace to a file of this machine, or into one that is open in binary."""
        self._receive(verbs.content(self.id, path), output)

    def archive(self, output: Target) -> None:
        """Write a tar of the whole workspace to a file of this machine, or into one that is open in binary."""
        self._receive(verbs.archive(self.id), output)

    def stream(self, filename: str | None = None, *args: str, **options: Unpack[JobOptions]) -> "JobStream":
        """Run a file of the workspace, or the `command` of the rootfs, and tell what it writes as it does.

        It begins with the first event that is asked for. Closing the stream before its end ends the job.
        """
        return JobStream(self.connection, verbs.events(self.id, filename, args, options))

    def start(self, filename: str | None = None, *args: str, **options: Unpack[JobOptions]) -> "RunHandle":
        """Run a file of the workspace, or the `command` of the rootfs, whether or not anybody waits for it."""
        info = self.connection.perform(verbs.detach(self.id, filename, args, options))
        return RunHandle(self.connection, info)

    def _receive(self, call: Call[None], output: Target) -> None:
        with self.connection.opened(call) as response, target(output) as file:
            for chunk in response.iter_bytes():
                file.write(chunk)


class RunHandle(RunVerbs, Sender):
    """One detached run. info is what the server last said of it."""

    def __init__(self, connection: Connection, info: RunInfo) -> None:
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

    def refresh(self) -> RunInfo:
        """Ask how it stands now."""
        self.info = self.connection.perform(verbs.run(self.id))
        return self.info

    def wait(self, timeout: float | None = None) -> ExecResult:
        """Wait until it has ended. TimeoutError after so many seconds; HostError when the run was lost."""
        for pause in pauses(timeout):
            if self.refresh().status != "running":
                break
            time.sleep(pause)
        return ended(self.info)

    def output(self, *, follow: bool = True, encoding: Encoding = "text") -> "JobStream":
        """What it wrote, from the beginning; with `follow` until its end. A connection that breaks is made anew."""
        call = verbs.follow(self.id, follow=follow, encoding=encoding)
        return JobStream(self.connection, call, until_end=follow)


class JobStream:
    """The events of a job, one by one: an iterator, and a context manager that stops listening in the end.

    After the last event `result` is what became of the job, without the output, which the events have told.
    """

    def __init__(self, connection: Connection, call: Call[None], *, until_end: bool = True) -> None:
        self._connection = connection
        self._seen = JobEvents()
        self._events = self._read(call, until_end=until_end)

    @property
    def result(self) -> ExecResult | None:
        """What became of the job; None until all events were read."""
        return self._seen.result

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        return next(self._events)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening."""
        self._events.close()

    def _read(self, call: Call[None], *, until_end: bool) -> Generator[Event]:
        seen, attempts = self._seen, self._connection.server.attempts(call)
        while True:
            position = seen.last_id
            with self._connection.opened(seen.resumed(call)) as response:
                try:
                    for chunk in response.iter_bytes():
                        yield from seen.feed(chunk)
                    broken = seen.missing_end() if until_end else None
                except httpx.RequestError as error:
                    broken = None if seen.result else error
            if broken is None:
                return
            if seen.last_id != position:  # it is not the same place at which it breaks again and again
                attempts = self._connection.server.attempts(call)
            time.sleep(attempts.after_failure(broken))
