"""Whoever appends to the audit log: its two files as one process has them open (audit.py says what is in them).

All that changes a file is here, and is done under the lock: of threads by a mutex, of processes by a flock(2).
"""

import errno
import fcntl
import json
import os
import time
from _thread import allocate_lock  # all of threading that is needed, without its import
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal, NamedTuple

from jhansi_runtime.chain import Mark, last_chained, seal
from jhansi_runtime.errors import AuditError
from jhansi_runtime.flusher import Flusher

__all__ = ["HEAD_SIZE", "Appender", "Head", "Where", "lines_between", "parse_head", "reported"]

HEAD_SIZE = 512  # one disk sector: on the disk it is the old one or the new one
RECORD_LIMIT = 64 * 1024 * 1024  # bytes a reader may have to hold; no argv and environment come near it

_FLUSH_AFTER = 0.025  # seconds; of the 50 ms that are promised, the rest is the disk's


class Where(NamedTuple):
    """Where a log is."""

    directory: str
    log: str
    head: str

    def headless(self) -> AuditError:
        """Return the error for a log that has records and no head."""
        return AuditError(f"{self.head} is missing, beside a log that is not empty", remedy=self.evidence())

    def evidence(self) -> str:
        """Return the remedy where somebody has changed the log."""
        return f"run `jhansi-run audit verify`, then move {self.directory} aside as evidence, and a new log begins"


class Head(NamedTuple):
    """The head file. cut (bytes) and lost (records) are what a repair took away and has yet to record."""

    last: Mark
    flushed: Mark
    boot: str
    cut: int = 0
    lost: int = 0


class Appender:
    """The log open for appending, made if there is none. May be used by several threads of the process that made it."""

    def __init__(self, where: Where, *, always: bool) -> None:
        self._where = where
        self._always = always
        self._flusher = Flusher(self._flush, _FLUSH_AFTER)
        self._mutex = allocate_lock()  # a flock keeps other processes out, not threads that share its descriptor
        self._flushing = allocate_lock()
        self._end = self._flushed = 0  # of the last record written here, and of what is known to be on the disk
        with reported(where.log, "written"):
            with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
                self._boot = file.read().strip()
            os.makedirs(where.directory, mode=0o700, exist_ok=True)
            self._log = os.open(where.log, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                self._head = os.open(where.head, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError:
                os.close(self._log)
                raise

    def append(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Write one record, and return it as a reader will see it. Raises also what a flush has raised meanwhile."""
        with self._locked():
            _, record = self._add(self._settled(), fields)
        if self._always:
            self._flush()
        else:
            self._flusher.want()
        self._flusher.tell()
        return record

    def flush(self) -> None:
        """Bring all that was written here to the disk. Raises also what a flush has raised meanwhile."""
        self._flush()
        self._flusher.tell()

    def close(self) -> None:
        """Flush, and close the files, which nobody uses any more."""
        try:
            self._flusher.stop()
            if self._flushed < self._end:
                self._flush()
            self._flusher.tell()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close the files and no more: those of the process that this one was forked from, say, which has the lock."""
        os.close(self._log)
        os.close(self._head)

    def _flush(self) -> None:
        with self._flushing:  # who comes second finds that the first has flushed for both
            with self._locked():
                head = self._settled()
            if head.flushed.end < self._end:
                with reported(self._where.log, "written"):
                    os.fdatasync(self._log)  # not under the lock: others may append meanwhile
                with self._locked():
                    current = self._settled()
                    if current.flushed.end < head.last.end:
                        self._write_head(current._replace(flushed=head.last))
            self._flushed = max(head.flushed.end, head.last.end)

    # --- under the lock -----------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the log for this thread of this process alone."""
        with self._mutex, reported(self._where.log, "written"):
            fcntl.flock(self._log, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._log, fcntl.LOCK_UN)

    def _settled(self) -> Head:
        """Return the head of a log that is whole, once what a kill or a power cut left is mended."""
        status = os.fstat(self._log)
        if status.st_nlink == 0:
            raise AuditError(f"{self._where.log} was removed while in use", remedy=self._where.evidence())
        head = parse_head(os.pread(self._head, HEAD_SIZE, 0))
        if head is None and status.st_size:
            raise self._where.headless()
        if head is None:
            return self._begin()
        if head.last.end == status.st_size and head.boot == self._boot and not head.cut and not head.lost:
            return head
        return self._recover(head, status.st_size)

    def _begin(self) -> Head:
        head = Head(Mark(), Mark(), self._boot)
        self._write_head(head)
        # Flushed with its name this once: a log that a power cut leaves then always has a head beside it.
        os.fsync(self._head)
        directory = os.open(self._where.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        return head

    def _recover(self, head: Head, size: int) -> Head:
        """Find the last whole record, cut off half a one behind it, and record what was lost."""
        # Since this boot nothing that was written goes by itself; from before it, only what was flushed is sure.
        sure = head.last if head.boot == self._boot else head.flushed
        if size < sure.end:
            message = f"{self._where.log} was cut off: record {sure.seq} ended at byte {sure.end}, and it has {size}"
            raise AuditError(message, remedy=self._where.evidence())
        with open(self._log, "rb", closefd=False) as file:
            last = last_chained(lines_between(self._where.log, file, sure.end, size), sure)
        torn = os.pread(self._log, size - last.end, last.end)
        if b"\n" in torn:  # no write that was cut short leaves a whole line
            message = f"line {last.seq + 1} of {self._where.log} is not chained to the one before it"
            raise AuditError(message, remedy=self._where.evidence())
        cut = len(torn) or head.cut
        lost = max(0, head.last.seq - last.seq) or head.lost
        head = head._replace(last=last, boot=self._boot, cut=cut, lost=lost)
        self._write_head(head)  # before the cut, so that a kill in between does not hide it
        os.ftruncate(self._log, last.end)
        if cut or lost:
            who = {"event": "audit.repair", "actor": "jhansi-runtime", "sandbox_id": None, "run_id": None}
            head, _ = self._add(head._replace(cut=0, lost=0), {**who, "cut_bytes": cut, "lost_records": lost})
        return head

    def _add(self, head: Head, fields: Mapping[str, Any]) -> tuple[Head, dict[str, Any]]:
        """Write one record and the head that names it, or neither."""
        seq = head.last.seq + 1
        record, line = seal({"seq": seq, "time": _now(), **fields}, head.last)
        if len(line) > RECORD_LIMIT:
            raise AuditError(f"an audit record of {len(line)} bytes is too long", remedy=f"at most {RECORD_LIMIT} fit")
        head = head._replace(last=Mark(seq, record["hash"], head.last.end + len(line)))
        try:
            rest = line
            while rest:  # one write; a second only where the first stopped short, to learn why
                rest = rest[os.write(self._log, rest) :]
            self._write_head(head)
        except OSError:
            os.ftruncate(self._log, head.last.end - len(line))
            raise
        self._end = head.last.end
        return head, record

    def _write_head(self, head: Head) -> None:
        text = json.dumps(head._asdict(), separators=(",", ":")).encode("ascii")
        if os.pwrite(self._head, text.ljust(HEAD_SIZE - 1) + b"\n", 0) != HEAD_SIZE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._where.head)


@contextmanager
def reported(path: str, wanted: Literal["written", "read"]) -> Iterator[None]:
    """Turn an OSError into an AuditError that names the remedy."""
    directory = os.path.dirname(path)
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = f"free some space on the disk that holds {directory}"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            remedy = f"give this user {directory} to write in, or set JHANSI_HOME to a folder of its own"
        else:
            remedy = f"check the disk that holds {directory}"
        raise AuditError(f"the audit log {path} cannot be {wanted}: {error.strerror}", remedy=remedy) from error


def lines_between(path: str, file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    """Yield the lines of an open log between two offsets. One without its newline is the last, or over the limit."""
    with reported(path, "read"):
        file.seek(start)
        while start < end and (line := file.readline(min(RECORD_LIMIT, end - start))):
            start += len(line)
            yield line


def parse_head(text: bytes) -> Head | None:
    """Return what a head file says, or None when it is empty or not whole."""
    try:
        fields = json.loads(text)
        head = Head(Mark(*fields.pop("last")), Mark(*fields.pop("flushed")), **fields)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    numbers = (head.last.seq, head.last.end, head.flushed.seq, head.flushed.end, head.cut, head.lost)
    texts = (head.last.hash, head.flushed.hash, head.boot)
    is_sound = all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)
    return head if is_sound and all(isinstance(text, str) for text in texts) else None


def _now() -> str:
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{nanoseconds // 1000:06d}Z"
