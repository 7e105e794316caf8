"""One exec whose output goes into a journal (detached.py) instead of to whoever asked for it.

It takes two threads: the caller's, which waits in Runtime.exec, and one of its own, which copies from the job's two
pipes into the journal as it comes. A journal is a file: it has no reader that could stall the job, and nothing of the
output is held in memory. The exec lives no longer than this process; one killed in the midst of it leaves a lost run.
"""

import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from io import FileIO

from msgspec import structs

from jhansi_runtime.detached import Journal, Stream
from jhansi_runtime.engine import Streams
from jhansi_runtime.errors import HostError, JhansiError
from jhansi_runtime.runtime import Runtime
from jhansi_runtime.spec import ExecRequest, ExecResult, Limits

__all__ = ["run_detached"]

_CHUNK = 16 * 1024  # bytes; of which a reader who stops reading has several in memory, so it is not more
# A job that writes byte by byte would have a frame for each. After a short read the pipe is given a moment to fill.
_SHORT = 4096
_MOMENT = 0.001  # seconds


def run_detached(
    runtime: Runtime,
    request: ExecRequest,
    journal: Journal,
    *,
    limits: Limits,
    control: int,
    cancel: Callable[[], object],
    describe: Callable[[JhansiError], str] = str,
) -> ExecResult:
    """Run an exec under the journal's run id, end the journal with its result, and return that.

    control is what Streams.control is, and cancel, called in another thread, makes it say SIGTERM: that is how the job
    ends when its output cannot be kept, with the status `disk_limit`. What Runtime.exec raises becomes a result of
    status `failed`, within these limits and with no rootfs, whose message is what describe makes of the error.
    """
    with journal:
        copy = _Copy(journal, cancel)
        try:
            result = _exec(runtime, request, copy, control)
        except (JhansiError, OSError) as error:
            failure = error if isinstance(error, JhansiError) else HostError(f"no pipe: {error.strerror}")
            result = _failed(copy, limits, describe(failure))
        if copy.error is not None:
            message = describe(copy.error)
            result = structs.replace(result, status="disk_limit", exit_code=None, message=message)
        journal.end(result)
    return result


def _exec(runtime: Runtime, request: ExecRequest, copy: "_Copy", control: int) -> ExecResult:
    """Run it. On return, and when it raises, all of its output is in the journal."""
    run_id = copy.journal.info.run_id
    with ExitStack() as stack:
        stdout, job_stdout = _pipe(stack)
        stderr, job_stderr = _pipe(stack)
        copying = threading.Thread(target=copy.run, args=(stdout, stderr), name=f"{run_id} output")
        copying.start()
        try:
            streams = Streams(stdout=job_stdout.fileno(), stderr=job_stderr.fileno(), control=control)
            return runtime.exec(request, streams, run_id=run_id)
        finally:
            job_stdout.close()
            job_stderr.close()
            copying.join()


class _Copy:
    """What goes from the job's two pipes into the journal, in the order in which it comes.

    counts are the bytes of each stream that the journal has; error is what ended the copying before its time.
    """

    def __init__(self, journal: Journal, cancel: Callable[[], object]) -> None:
        self.journal = journal
        self.counts: dict[Stream, int] = {"stdout": 0, "stderr": 0}
        self.error: JhansiError | None = None
        self._cancel = cancel

    def run(self, stdout: FileIO, stderr: FileIO) -> None:
        """Copy until both have ended, and close them."""
        with stdout, stderr:
            try:
                self._copy({stdout.fileno(): "stdout", stderr.fileno(): "stderr"})
            except JhansiError as error:
                self.error = error
                self._cancel()

    def _copy(self, sources: dict[int, Stream]) -> None:
        poll = select.poll()
        for source in sources:
            poll.register(source, select.POLLIN)
        while sources:
            taken = 0
            for source, _ in poll.poll():
                chunk = os.read(source, _CHUNK)
                if chunk:
                    self.journal.write(sources[source], chunk)
                    self.counts[sources[source]] += len(chunk)
                    taken += len(chunk)
                else:
                    poll.unregister(source)
                    del sources[source]
            if 0 < taken < _SHORT:
                time.sleep(_MOMENT)


def _pipe(stack: ExitStack) -> tuple[FileIO, FileIO]:
    """Return the end to read and the end to write of a pipe, each open until it is closed or the stack is."""
    readable, writable = os.pipe2(os.O_CLOEXEC)
    return stack.enter_context(FileIO(readable, "rb")), stack.enter_context(FileIO(writable, "wb"))


def _failed(copy: _Copy, limits: Limits, message: str) -> ExecResult:
    """Return the result of an exec that raised. Its rootfs is empty, for it may not have come to one."""
    info = copy.journal.info
    return ExecResult(
        run_id=info.run_id,
        sandbox_id=info.sandbox_id,
        status="failed",
        exit_code=None,
        signal=None,
        stdout=None,
        stderr=None,
        stdout_bytes=copy.counts["stdout"],
        stderr_bytes=copy.counts["stderr"],
        stdout_truncated=False,
        stderr_truncated=False,
        wall_time_ms=0.0,
        cpu_time_ms=0.0,
        memory_peak_bytes=0,
        timed_out=False,
        oom_killed=False,
        message=message,
        enforcement="watchdog",
        rootfs="",
        limits=limits,
        started_at=info.started_at,
    )
