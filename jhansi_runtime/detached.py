"""The store of detached runs: what outlives the client that asked for an exec, and the server that ran it.

    $JHANSI_HOME/detached/          0700
        RUN_ID/                     0700; its writer holds a flock(2) on this folder
            run.json                spec.RunInfo as it began
            output                  the journal: what the job has written, in the order in which it came
            result.json             spec.RunInfo as it ended; until then `.result`, a file of zeros that keeps its place
        .new-RUN_ID .gone-RUN_ID    not there yet, not there any more

A run without result.json whose folder nobody has locked is lost: its writer was killed, and the kernel dropped the
lock. No pid is ever looked up. A folder comes and goes by one rename; what a kill leaves half made or half removed has
a dot-name, which the next sweep clears away.

The journal is a sequence of frames (frames.py), each appended by one write(2): a kill within it leaves half a frame at
the end, which readers pass over. The exec's output limit bounds the journal; nothing here does.

run.json and result.json are flushed to the disk, the journal is not: a power cut may take the end of it.
"""

import errno
import fcntl
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from jhansi_runtime.errors import (
    ConflictError,
    DiskLimitError,
    HostError,
    InvalidRequestError,
    JhansiError,
    NotFoundError,
)
from jhansi_runtime.frames import LONGEST_PAYLOAD, Frame, Stream, encoded, frames
from jhansi_runtime.spec import ExecResult, RunInfo, from_json, instant, to_json

__all__ = ["DetachedRuns", "Frame", "Journal", "Stream"]

POLL_INTERVAL = 0.1  # seconds between two looks at a run that another process writes
_END_WITHIN_SECONDS, _END_LOOK_SECONDS = 2.0, 0.01

_RUN_ID = re.compile(r"run_[0-9a-f]{16,32}")
_NEW, _GONE = ".new-", ".gone-"
_START, _OUTPUT, _RESERVED, _RESULT = "run.json", "output", ".result", "result.json"
_RESERVED_BYTES = 16 * 1024  # a result with its longest message; what is longer takes its chance
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

_Listing = list[RunInfo]  # within the class, `list` is its method


class Journal:
    """A run under way, and the only writer of its journal. One thread at a time may use it.

    Left as a context manager without end(), or killed, it leaves a lost run.
    """

    def __init__(
        self, info: RunInfo, folder: int, output: int, changed: Callable[[], None], released: Callable[[], None]
    ) -> None:
        self.info = info
        self._folder = folder
        self._output = output
        self._changed = changed
        self._released = released
        self._size = 0
        self._is_full = False

    def write(self, stream: Stream, data: bytes) -> None:
        """Append what the job wrote, in as many frames as it takes.

        DiskLimitError when the disk is full, and ever after; what is there then is whole frames.
        """
        for start in range(0, len(data), LONGEST_PAYLOAD):
            self._append(stream, data[start : start + LONGEST_PAYLOAD])
        self._changed()

    def end(self, result: ExecResult) -> None:
        """Say how the run ended; there is room for that on a full disk. Then it is under way no more."""
        ended = RunInfo(
            run_id=self.info.run_id,
            sandbox_id=self.info.sandbox_id,
            owner=self.info.owner,
            status=result.status,
            started_at=self.info.started_at,
            ended_at=instant(time.time()),
            result=result,
        )
        with _reported():
            _fill(self._folder, _RESERVED, ended, os.O_WRONLY | os.O_CLOEXEC)
            os.rename(_RESERVED, _RESULT, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            os.fsync(self._folder)
        self.release()

    def release(self) -> None:
        """Give up the lock; a run that was not ended is lost from now on."""
        if self._folder >= 0:
            os.close(self._output)
            os.close(self._folder)
            self._folder = self._output = -1
            self._released()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _append(self, stream: Stream, payload: bytes) -> None:
        frame = encoded(self._size, stream, payload)
        with _reported():
            if self._is_full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            try:
                rest = frame
                while rest:  # one write; a second only where the first stopped short, to learn why
                    rest = rest[os.write(self._output, rest) :]
            except OSError:
                # Nothing is written over the half frame: a reader that is at it would take parts of both for one.
                self._is_full = True
                os.ftruncate(self._output, self._size)
                raise
        self._size += len(frame)


class DetachedRuns:
    """The detached runs in one folder, which the first of them makes. Any number of processes may use it at once.

    A run id is given in full. NotFoundError says that there is no such run, or that it is no run id at all.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._mutex = threading.Lock()
        self._written_here: set[str] = set()
        self._watchers: dict[str, list[Callable[[], None]]] = {}

    def begin(self, run_id: str, sandbox_id: str, owner: str | None) -> Journal:
        """Enter a run. ConflictError when there is one of that id; DiskLimitError and HostError: it was not entered."""
        if not _RUN_ID.fullmatch(run_id):
            raise InvalidRequestError("not the id of a run", remedy="take one that new_run_id has made")
        info = RunInfo(
            run_id=run_id, sandbox_id=sandbox_id, owner=owner, status="running", started_at=instant(time.time())
        )
        with _reported():
            os.makedirs(self._directory, mode=0o700, exist_ok=True)
            folder, output = self._make(info)
        with self._mutex:
            self._written_here.add(run_id)
        return Journal(info, folder, output, lambda: self._tell(run_id), lambda: self._released(run_id))

    def find(self, run_id: str) -> RunInfo:
        """How the run stands. JhansiError when a power cut or a person has damaged what is known of it."""
        with self._opened(run_id) as folder:
            return _info(folder, run_id)

    def list(self, *, owner: str | None = None, sandbox_id: str | None = None) -> _Listing:
        """The runs of an owner and of a sandbox, or of all, newest first; those that are damaged are left out."""
        found = [
            info for info in self._infos() if owner in {None, info.owner} and sandbox_id in {None, info.sandbox_id}
        ]
        return sorted(found, key=lambda info: (info.started_at, info.run_id), reverse=True)

    def is_ended(self, run_id: str) -> bool:
        """Whether nothing will be written any more; a lost run has ended, too."""
        with self._opened(run_id) as folder:
            return _is_ended(folder)

    def frames(self, run_id: str, after: int = 0) -> Iterator[Frame]:
        """Yield the frames that are there beyond a position, and stop. It holds 64 KiB, however long the journal is.

        InvalidRequestError when no frame ends at `after`.
        """
        with self._opened_output(run_id) as output:
            yield from frames(output, after)

    def read(self, run_id: str, stream: Stream, offset: int = 0) -> Iterator[bytes]:
        """Yield what is there of one stream, from `offset` of its bytes on, in pieces of at most 64 KiB."""
        if offset < 0:
            raise InvalidRequestError("an offset below 0", remedy="count from the first byte, which is 0")
        for frame in self.frames(run_id):
            if frame.stream == stream:
                if offset < len(frame.data):
                    yield frame.data[offset:]
                offset = max(0, offset - len(frame.data))

    def follow(self, run_id: str, after: int = 0) -> Iterator[Frame]:
        """Yield the frames beyond a position as they come, until the run has ended. Blocks while there is none."""
        changed = threading.Event()
        with self.watch(run_id, changed.set) as is_told:
            while True:
                changed.clear()
                ended = self.is_ended(run_id)  # asked first: whatever was written before the end is read below
                for frame in self.frames(run_id, after):
                    yield frame
                    after = frame.position
                if ended:
                    return
                changed.wait(None if is_told else POLL_INTERVAL)

    @contextmanager
    def watch(self, run_id: str, changed: Callable[[], None]) -> Iterator[bool]:
        """Within: `changed` is called, in the writer's thread, after each write and after the end.

        Yields whether it will be: False when the run has no writer in this process. Such a one has to be looked at
        again every POLL_INTERVAL seconds, until is_ended. Look once within, before the first wait.
        """
        with self._mutex:
            self._watchers.setdefault(run_id, []).append(changed)
            is_told = run_id in self._written_here
        try:
            yield is_told
        finally:
            with self._mutex:
                self._watchers[run_id].remove(changed)
                if not self._watchers[run_id]:
                    del self._watchers[run_id]

    def forget(self, run_id: str) -> None:
        """Remove a run and its output. ConflictError while it is under way."""
        with self._opened(run_id) as folder:
            if not _is_ended(folder):
                raise ConflictError(f"the run {run_id} is under way", remedy="cancel it, and wait until it has ended")
        with _reported():
            self._discard(run_id)

    def forget_sandbox(self, sandbox_id: str) -> None:
        """Remove the runs of a sandbox that is deleted.

        One that is under way has nothing left to run in, and is waited for a little: its end may not be written yet.
        One that goes on because its turn has not come is left to `sweep`.
        """
        deadline = time.monotonic() + _END_WITHIN_SECONDS
        for info in self.list(sandbox_id=sandbox_id):
            with suppress(NotFoundError, ConflictError):  # forgotten by somebody else meanwhile; or under way
                while not self.is_ended(info.run_id) and time.monotonic() < deadline:
                    time.sleep(_END_LOOK_SECONDS)
                self.forget(info.run_id)

    def sweep(self, older_than_seconds: float, keep_at_most: int) -> None:
        """Remove what ended longer ago, then the oldest of what has ended until only so many such are kept.

        Clears away, too, what killed processes left half made or half removed.
        """
        with _reported():
            self._clear_away()
        ended = sorted(self._ends())
        oldest_kept = time.time() - older_than_seconds
        excess = max(0, len(ended) - keep_at_most)
        for number, (moment, run_id) in enumerate(ended):
            if number < excess or moment < oldest_kept:
                with _reported(), suppress(FileNotFoundError):  # forgotten by somebody else meanwhile
                    self._discard(run_id)

    # --- within ---

    def _make(self, info: RunInfo) -> tuple[int, int]:
        """Make the folder of a run and return it, locked, with its journal."""
        path = os.path.join(self._directory, info.run_id)
        hidden = os.path.join(self._directory, _NEW + info.run_id)
        while True:
            try:
                os.mkdir(hidden, 0o700)
                made = _furnish(hidden, info)
            except FileExistsError:
                raise _taken(info.run_id) from None
            except FileNotFoundError:
                continue  # a sweep took it for a dead one's before it was locked; once more
            except OSError:
                _empty(hidden)
                raise
            try:
                os.rename(hidden, path)
            except OSError as error:
                os.close(made[1])
                os.close(made[0])
                _empty(hidden)
                if error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
                    raise _taken(info.run_id) from None
                raise
            return made

    def _tell(self, run_id: str) -> None:
        """Call those who watch a run."""
        with self._mutex:
            watchers = tuple(self._watchers.get(run_id, ()))
        for changed in watchers:
            changed()

    def _released(self, run_id: str) -> None:
        with self._mutex:
            self._written_here.discard(run_id)
        self._tell(run_id)

    @contextmanager
    def _opened(self, run_id: str) -> Iterator[int]:
        """Within: the folder of a run."""
        if not _RUN_ID.fullmatch(run_id):
            raise _not_found()
        with _reported():
            try:
                folder = os.open(os.path.join(self._directory, run_id), _DIRECTORY)
            except FileNotFoundError:
                raise _not_found() from None
        try:
            yield folder
        finally:
            os.close(folder)

    @contextmanager
    def _opened_output(self, run_id: str) -> Iterator[int]:
        with self._opened(run_id) as folder, _reported():
            try:
                output = os.open(_OUTPUT, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            except FileNotFoundError:
                raise _not_found() from None  # forgotten meanwhile
        try:
            yield output
        finally:
            os.close(output)

    def _ids(self) -> Iterator[str]:
        with suppress(FileNotFoundError), os.scandir(self._directory) as entries:
            yield from (entry.name for entry in entries if _RUN_ID.fullmatch(entry.name))

    def _infos(self) -> Iterator[RunInfo]:
        for run_id in self._ids():
            with suppress(JhansiError):  # forgotten meanwhile, or damaged, of which `find` tells
                yield self.find(run_id)

    def _ends(self) -> Iterator[tuple[float, str]]:
        """Yield the runs that have ended, each with the time of its end, in seconds since the epoch."""
        for run_id in self._ids():
            with suppress(NotFoundError), self._opened(run_id) as folder:  # forgotten meanwhile
                if _is_ended(folder):
                    yield _end_of(folder), run_id

    def _discard(self, run_id: str) -> None:
        gone = os.path.join(self._directory, _GONE + run_id)
        os.rename(os.path.join(self._directory, run_id), gone)
        _empty(gone)

    def _clear_away(self) -> None:
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return
        for name in names:
            path = os.path.join(self._directory, name)
            if name.startswith(_GONE):
                _empty(path)
            elif name.startswith(_NEW):
                with suppress(FileNotFoundError):  # it is made by now
                    _clear_if_dead(path, os.path.join(self._directory, _GONE + name.removeprefix(_NEW)))


# --- the folder of a run ----------------------------------------------------------------------------------


def _furnish(path: str, info: RunInfo) -> tuple[int, int]:
    """Lock a folder and put there what a run begins with. Return it and the journal, open to be appended to."""
    folder = os.open(path, _DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        _fill(folder, _START, info, _CREATE)
        reserved = os.open(_RESERVED, _CREATE, 0o600, dir_fd=folder)
        try:
            os.posix_fallocate(reserved, 0, _RESERVED_BYTES)
        finally:
            os.close(reserved)
        return folder, os.open(_OUTPUT, _CREATE | os.O_APPEND, 0o600, dir_fd=folder)
    except OSError:
        os.close(folder)
        raise


def _fill(folder: int, name: str, info: RunInfo, flags: int) -> None:
    """Write a record over what there is in a file, and flush it to the disk."""
    content = to_json(info).encode("ascii")
    descriptor = os.open(name, flags, 0o600, dir_fd=folder)
    try:
        rest = content
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.ftruncate(descriptor, len(content))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _info(folder: int, run_id: str) -> RunInfo:
    is_under_way = _is_locked(folder)  # asked first: one that ends meanwhile has its result by then
    name = _RESULT if _is_there(folder, _RESULT) else _START
    try:
        with open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder), "rb") as file:
            info = from_json(file.read(), RunInfo, where=f"{name} of {run_id}")
    except FileNotFoundError:
        raise _not_found() from None  # forgotten meanwhile
    except InvalidRequestError as error:
        raise JhansiError(
            f"what is known of the run is damaged: {error.message}", remedy="forget the run; its output is lost"
        ) from None
    if name == _START and not is_under_way:
        info = RunInfo(
            run_id=run_id, sandbox_id=info.sandbox_id, owner=info.owner, status="lost", started_at=info.started_at
        )
    return info


def _is_ended(folder: int) -> bool:
    return _is_there(folder, _RESULT) or not _is_locked(folder)


def _is_there(folder: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _is_locked(folder: int) -> bool:
    """Whether the writer of a run lives. Readers share the lock that they probe with, so none takes another for it."""
    try:
        fcntl.flock(folder, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(folder, fcntl.LOCK_UN)
    return False


def _end_of(folder: int) -> float:
    """When a run ended, or was last written to, whatever of it is left."""
    for name in (_RESULT, _OUTPUT):
        with suppress(FileNotFoundError):
            return os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime
    return os.fstat(folder).st_mtime


def _clear_if_dead(path: str, gone: str) -> None:
    """Clear a half-made folder away, unless its maker lives."""
    folder = os.open(path, _DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(path, gone)
        _empty(gone)
    except BlockingIOError:
        pass  # it is being made
    finally:
        os.close(folder)


def _empty(path: str) -> None:
    """Remove a folder of files. Several may do so at once."""
    with suppress(FileNotFoundError):
        for name in os.listdir(path):
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(path, name))
        os.rmdir(path)


# --- what can go wrong ------------------------------------------------------------------------------------


@contextmanager
def _reported() -> Iterator[None]:
    """Turn an OSError into the error that names the remedy, and no path of the host."""
    try:
        yield
    except OSError as error:
        message = f"the store of detached runs cannot be used: {error.strerror}"
        if error.errno in _NO_ROOM:
            remedy = "free some space on the disk that holds JHANSI_HOME, or forget runs that have ended"
            raise DiskLimitError(message, remedy=remedy) from error
        remedy = "make JHANSI_HOME writable for the user that runs this, or set it to a folder that is"
        raise HostError(message, remedy=remedy) from error


def _not_found() -> NotFoundError:
    return NotFoundError("there is no such run", remedy="give the full id of a detached run that was not forgotten")


def _taken(run_id: str) -> ConflictError:
    return ConflictError(f"there is a run {run_id} already", remedy="take a new id for each run")
