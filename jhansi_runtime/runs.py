"""The ledger of runs under way: one locked file an exec, so that the next start can settle what a kill left.

$JHANSI_HOME/runs/<run_id>.json holds a note of what the exec has made (its cgroup, its one-shot workspace ...) and is
held under flock(2) by whoever runs it. The kernel drops the lock with the last descriptor, however the owner dies:
a file that can be locked is a lost run, and no pid is ever looked up. A process forked while a run is under way
shares the lock until it closes the descriptor or executes a program, so what it confines counts as under way, too.

A file gets its name only when it is written and locked; before that it is called `.<run_id>.json`, and nothing has
been started for it. Nothing is flushed to the disk: after a power cut a note may be empty, and the name remains.
"""

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

from jhansi_runtime.errors import DiskLimitError, HostError

__all__ = ["LostRun", "Run", "Runs", "new_run_id"]

_SUFFIX = ".json"


def new_run_id() -> str:
    """Return "run_" and 22 hexadecimal digits: microseconds since 1970, then 32 random bits. Sorts by time."""
    return f"run_{time.time_ns() // 1000:014x}{os.urandom(4).hex()}"


class Run:
    """A run under way. end() takes it off the ledger.

    Whoever writes the exec's exec.start sets awaits_end first, and clears it when the exec.end is written. Left as a
    context manager, a run that awaits its end only gives up the lock: the next start settles it as lost. Any other is
    ended.
    """

    def __init__(self, path: str, descriptor: int) -> None:
        self.awaits_end = False
        self._path = path
        self._descriptor = descriptor

    def end(self) -> None:
        """Take the run off the ledger; its exec.end is written and nothing that the note names is left."""
        with suppress(FileNotFoundError):  # off the ledger it is
            os.unlink(self._path)
        self.release()

    def release(self) -> None:
        """Give up the lock; a run that was not ended is lost from now on."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.awaits_end:
            self.release()
        else:
            self.end()


class LostRun:
    """A run whose owner is dead, locked until it is settled or released: no other start has it meanwhile.

    note is what begin() was given, empty where a power cut took it.
    """

    def __init__(self, path: str, descriptor: int, note: Mapping[str, Any]) -> None:
        self._path = path
        self._descriptor = descriptor
        self.run_id = os.path.basename(path).removesuffix(_SUFFIX)
        self.note = note

    def settle(self) -> None:
        """Take it off the ledger, once what it left is gone and its end is in the audit log."""
        os.unlink(self._path)
        self.release()

    def release(self) -> None:
        """Leave it, if it has not been settled, to the next start."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Runs:
    """The ledger in one directory, which the first run makes."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def begin(self, run_id: str, note: Mapping[str, Any]) -> Run:
        """Enter a run and hold its lock. Raises HostError or DiskLimitError, and then nothing may be started."""
        path = os.path.join(self._directory, run_id + _SUFFIX)
        hidden = os.path.join(self._directory, f".{run_id}{_SUFFIX}")
        content = json.dumps(note).encode("ascii")
        with _reported(self._directory):
            while True:
                descriptor = self._create(hidden)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                    rest = content
                    while rest:
                        rest = rest[os.write(descriptor, rest) :]
                    os.rename(hidden, path)
                    return Run(path, descriptor)
                except OSError as error:
                    os.close(descriptor)  # which leaves a hidden file to the next start
                    if not isinstance(error, FileNotFoundError):
                        raise
                # Not there to rename: a start took it for a dead one's before it was locked. Once more.

    def lost(self) -> Iterator[LostRun]:
        """Yield the runs whose owner is dead, oldest first, each for the caller to settle or release."""
        try:
            names = sorted(os.listdir(self._directory))
        except FileNotFoundError:
            return
        for name in names:
            path = os.path.join(self._directory, name)
            with _reported(self._directory):
                descriptor = _lock_if_lost(path)
            if descriptor < 0:
                continue
            if name.startswith("."):
                with suppress(FileNotFoundError):  # renamed, and its owner killed, since it was listed
                    os.unlink(path)  # begin() never returned, so nothing was started
                os.close(descriptor)
            else:
                yield LostRun(path, descriptor, _read_note(descriptor))

    def _create(self, path: str) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            return os.open(path, flags, 0o600)
        except FileNotFoundError:
            os.makedirs(self._directory, mode=0o700, exist_ok=True)
            return os.open(path, flags, 0o600)


def _lock_if_lost(path: str) -> int:
    """Return a descriptor that holds the lock of a lost run's file; -1 when it is under way or has ended."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return -1
    # It may have ended, or been settled by another start, between the two calls above.
    if os.fstat(descriptor).st_nlink == 0:
        os.close(descriptor)
        return -1
    return descriptor


def _read_note(descriptor: int) -> dict[str, Any]:
    try:
        note = json.loads(os.pread(descriptor, os.fstat(descriptor).st_size, 0))
    except ValueError:
        return {}  # a power cut came between the name and the content
    return note if isinstance(note, dict) else {}


@contextmanager
def _reported(directory: str) -> Iterator[None]:
    """Turn an OSError into the error that names the remedy."""
    try:
        yield
    except OSError as error:
        message = f"no run can be entered in {directory}: {error.strerror}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskLimitError(message, remedy="free some space on its disk") from error
        remedy = "make it writable for this user, or set JHANSI_HOME to a folder that is"
        raise HostError(message, remedy=remedy) from error
