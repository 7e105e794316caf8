"""What the routes share: the runtime, who may call, who may run now, the threads that wait, the runs under way.

The event loop never waits for a disk or a job: whatever may is called through `in_thread` or `attended`.
"""

import asyncio
import os
import signal
from asyncio import AbstractEventLoop, Future, Task
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from threading import Lock
from typing import Any, Self, TypeVar

from jhansi_runtime.api.access import Caller
from jhansi_runtime.api.admission import Admission
from jhansi_runtime.api.telemetry import Telemetry
from jhansi_runtime.detached import DetachedRuns
from jhansi_runtime.errors import BusyError, ConflictError, JhansiError, NotFoundError
from jhansi_runtime.keys import KeyStore
from jhansi_runtime.runtime import Runtime
from jhansi_runtime.spec import Health, ServerSettings

__all__ = ["Control", "Service"]

_Result = TypeVar("_Result")

FILE_THREADS = 8
HOUSEKEEPING_SECONDS = 60.0
HEALTH_SECONDS = 60.0
RESTART_SECONDS = 5.0
FORGET_SECONDS = 0.1


class Control:
    """A way to end an exec from elsewhere: what the engine reads, and what is written to it. A context manager."""

    def __init__(self) -> None:
        self.readable, self._writable = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, number: int) -> None:
        """Pass a signal on: SIGTERM asks the job to end, a second one does not ask; SIGWINCH tells of a new size."""
        if self._writable >= 0:
            with suppress(BlockingIOError):  # it was asked so often that the pipe is full
                os.write(self._writable, bytes([number]))

    def close(self) -> None:
        """Close both ends; later signals go nowhere."""
        if self._writable >= 0:
            os.close(self._writable)
            os.close(self.readable)
            self._writable = -1


class Service:
    """One server's state. Made in the event loop's thread; `close` ends what is under way."""

    def __init__(self, runtime: Runtime, keys: KeyStore | None, settings: ServerSettings) -> None:
        self.runtime = runtime
        self.keys = keys
        self.settings = settings
        self.telemetry = Telemetry()
        self.admission = Admission(settings.max_execs, settings.max_queue)
        self.runs = DetachedRuns(runtime.paths.detached)
        self.background: dict[str, Control] = {}
        self.terminals = 0
        self._under_way: set[Control] = set()
        self._tasks: set[Task[None]] = set()
        self._needs_key = keys is not None and not keys.is_empty()
        self._closing = False
        self._probing = asyncio.Lock()
        self._health: Health | None = None
        self._health_stands_until = 0.0
        self.creating = Lock()
        self._files = ThreadPoolExecutor(FILE_THREADS, "file")
        # Each waits for one job; admission sees to it that there are no more than that.
        self._execs = ThreadPoolExecutor(settings.max_execs + settings.max_terminals + 1, "exec")
        for name, documentation, value in (
            ("jhansi_execs_running", "Execs under way.", lambda: float(self.admission.running)),
            ("jhansi_execs_waiting", "Execs that wait for their turn.", lambda: float(self.admission.waiting)),
            ("jhansi_terminals", "Terminals open.", lambda: float(self.terminals)),
        ):
            self.telemetry.watch(name, documentation, value)
        self.telemetry.watch_pool(runtime.pool_figures)

    def needs_key(self) -> bool:
        """Whether a caller over TCP needs a key: once there has been one, from then on."""
        if not self._needs_key and self.keys is not None:
            self._needs_key = not self.keys.is_empty()
        return self._needs_key

    def runtime_of(self, caller: Caller) -> Runtime:
        """The runtime as this caller sees it."""
        if caller.actor is None:
            return self.runtime
        return self.runtime.on_behalf_of(caller.actor, owner=caller.owner)

    async def in_thread(self, function: Callable[..., _Result], *arguments: object) -> _Result:
        """Call what may wait for a disk. It is finished even when whoever asked for it is gone."""
        return await _finished(_loop().run_in_executor(self._files, function, *arguments))

    async def attended(self, control: Control, work: Callable[[], _Result]) -> _Result:
        """Call what runs a job; when whoever asked for it is gone, the job is ended, and then this.

        When it is the server that ends, they are still there, and are told how the job has ended.
        """
        if self._closing:
            raise BusyError("the server is stopping", retry_after=RESTART_SECONDS)
        self._under_way.add(control)
        working = _loop().run_in_executor(self._execs, work)
        try:
            return await _finished(working, on_cancel=lambda: end(control))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._closing or task is None:
                raise
            task.uncancel()
            return working.result()
        finally:
            self._under_way.discard(control)

    @asynccontextmanager
    async def turn(self, caller: Caller) -> AsyncIterator[float]:
        """Within: one of the execs that may be under way at once. Yields the seconds it was waited for."""
        at_most = None if caller.key is None else caller.key.max_execs
        with self.admission.share(caller.actor or "", at_most):
            began = self.telemetry.clock()
            await self.admission.enter()
            try:
                yield self.telemetry.clock() - began
            finally:
                self.admission.leave()

    @contextmanager
    def known(self, run_id: str, control: Control) -> Iterator[None]:
        """Within: the run is one that `cancel` ends."""
        self.background[run_id] = control
        try:
            yield
        finally:
            del self.background[run_id]

    def cancel(self, run_id: str) -> bool:
        """Ask a job in the background to end; False when there is none of that run here."""
        control = self.background.get(run_id)
        if control is not None:
            end(control)
        return control is not None

    async def forget(self, run_id: str) -> None:
        """Remove a run whose reader is gone, once it has ended."""
        while True:
            try:
                await self.in_thread(self.runs.forget, run_id)
            except ConflictError:
                await asyncio.sleep(FORGET_SECONDS)
            except NotFoundError:
                return
            else:
                return

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something whose end nobody waits for but `close`."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: "Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.telemetry.note_defect(error)

    def discreet(self, error: JhansiError) -> str:
        """What an error says, without telling a caller where things lie on this host."""
        text = str(error)
        paths = self.runtime.paths
        for path, name in ((paths.workspaces, "$PETRI_WORKSPACE_ROOT"), (paths.home, "$JHANSI_HOME")):
            text = text.replace(path, name)
        return text

    async def health(self) -> Health:
        """Whether a program can be run, as was found out within the last minute or is found out now."""
        async with self._probing:
            now = self.telemetry.clock()
            if self._health is None or now >= self._health_stands_until:
                self._health = await self._probed()
                self._health_stands_until = now + HEALTH_SECONDS
            return self._health

    async def _probed(self) -> Health:
        with Control() as control:
            try:
                await self.attended(control, self.runtime.probe)
            except JhansiError as error:
                return Health(live=True, ready=False, detail=self.discreet(error))
        return Health(live=True, ready=True, detail="a program was run in a container")

    async def keep_house(self) -> None:
        """Remove what is past its time and what the killed have left, at once and ever again, until cancelled."""
        while True:
            try:
                for sandbox in await self.in_thread(self.runtime.collect_garbage):
                    await self.in_thread(self.runs.forget_sandbox, sandbox.id)
                await self.in_thread(self.runs.sweep, self.settings.keep_runs_for, self.settings.keep_runs)
                await self.in_thread(self.runtime.audit.flush)  # raises what no record since has raised
            except (JhansiError, OSError) as error:  # a full disk, say: the next time may do better
                self.telemetry.note_defect(error)
            await asyncio.sleep(HOUSEKEEPING_SECONDS)

    async def close(self) -> None:
        """End every exec under way, and wait for them and for all that is being written."""
        self._closing = True
        for control in self._under_way:
            end(control)
        while self._tasks:
            await asyncio.wait(self._tasks)
        await asyncio.to_thread(self._execs.shutdown)
        await asyncio.to_thread(self._files.shutdown)


def end(control: Control) -> None:
    """Ask the job to end; the engine gives it two seconds."""
    control.send(signal.SIGTERM)


def _loop() -> AbstractEventLoop:
    return asyncio.get_running_loop()


async def _finished(future: "Future[_Result]", on_cancel: Callable[[], None] = lambda: None) -> _Result:
    """Await a thread's work. Whoever is cancelled meanwhile still waits for its end: it uses what they will close."""
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        on_cancel()
        await _settled(future)
        raise


async def _settled(future: "Awaitable[object]") -> None:
    await asyncio.gather(future, return_exceptions=True)
