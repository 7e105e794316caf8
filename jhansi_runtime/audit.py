"""The audit log: append to it, read it, verify it (CONTRACT: Audit log).

Theory of operation. Two files in one directory, both guarded by a flock(2) on the first:

  audit.jsonl   the records, one JSON object a line, chained by hash (chain.py); only appended to, by one write(2) each
  head          512 bytes, overwritten in place after each append: number, hash and end offset of the last record

The chain shows what was altered, inserted, removed or moved; the head shows what was cut off at the end. An append
trusts the head when the log ends where the head says, and so costs the same however long the log is.

The log is written first and the head second, and a kill may fall between. Whole chained records beyond the head
are therefore taken as they are; half a record at the end (a kill or a power cut within the write: its append never
returned) is cut off, and a record `audit.repair` says so. A log that ends before the head was cut off by
someone, and nothing is appended to it any more. One exception: the head also says up to where the log was flushed
to the disk, and under which boot of the kernel it was written. What is missing beyond that point after a restart
was the power cut's, and `audit.repair` says how many records.

Flushing. A written record survives any kill. Against a power cut, fsync="always" flushes before append returns;
"group" flushes once the oldest unflushed record is 50 ms old: in append, and in close. There is no thread and no timer
here, so an owner that stays keeps the 50 ms itself: it calls flush when flush_in says so while it waits for a job,
and before it falls idle.

What two files cannot show: whoever may write both can write a new chain. An anchor, kept elsewhere, shows that.
"""

import errno
import fcntl
import json
import os
import time
from _thread import allocate_lock  # all of threading that is needed, without its import
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal, NamedTuple, TypeAlias

from jhansi_runtime.chain import Mark, Verification, Witness, check, last_chained, parse_anchor, seal
from jhansi_runtime.errors import AuditError, InvalidRequestError

__all__ = ["AuditLog", "Json", "Verification"]

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"

FLUSH_AFTER = 0.05  # seconds
FOLLOW_INTERVAL = 0.1  # seconds between two looks at a log that is followed
RECORD_LIMIT = 64 * 1024 * 1024  # bytes a reader may have to hold; no argv and environment come near it

_HEAD_SIZE = 512  # one disk sector: on the disk it is the old one or the new one
_RESERVED = frozenset({"seq", "time", "prev", "hash"})


class _Head(NamedTuple):
    """The head file. cut (bytes) and lost (records) are what a repair took away and has yet to record."""

    last: Mark
    flushed: Mark
    boot: str
    cut: int = 0
    lost: int = 0


class _View(NamedTuple):
    """The log at a moment when nobody appended: an open file, how much of it counts, the head if there is one."""

    file: BinaryIO
    size: int
    head: _Head | None


class AuditLog:
    """The log in one directory, which the first append makes. One object may be used by several threads.

    A method that cannot do its work raises AuditError; who gets one from append must not do what it was to record.
    """

    def __init__(self, directory: str, *, fsync: Literal["group", "always"] = "group") -> None:
        self._directory = directory
        self._log_path = os.path.join(directory, "audit.jsonl")
        self._head_path = os.path.join(directory, "head")
        self._always = fsync == "always"
        self._mutex = allocate_lock()  # a flock keeps other processes out, not threads that share its descriptor
        self._log = self._head = -1
        self._owner = 0  # the process that opened them
        self._boot = ""
        self._end = 0  # of the last record written here
        self._unflushed_since: float | None = None

    def append(
        self, event: str, *, actor: str, sandbox_id: str | None = None, run_id: str | None = None, **fields: Json
    ) -> dict[str, Any]:
        """Write one record and return it as a reader will see it. From then on it survives this process."""
        if not _RESERVED.isdisjoint(fields):
            raise ValueError(f"fields that the log itself sets: {_RESERVED & fields.keys()}")
        with self._locked():
            what = {"event": event, "actor": actor, "sandbox_id": sandbox_id, "run_id": run_id, **fields}
            _, record = self._add(self._settled(), what)
        if self._always or self.flush_in() == 0.0:
            self.flush()
        return record

    def flush_in(self) -> float | None:
        """Return the seconds until flush is due, 0.0 when it is, None when all that was written here is flushed."""
        since = self._unflushed_since
        return None if since is None else max(0.0, since + FLUSH_AFTER - time.monotonic())

    def flush(self) -> None:
        """Bring all that was written here to the disk, unless another process has done so meanwhile."""
        with self._locked():
            head = self._settled()
            self._unflushed_since = None
        if head.flushed.end >= self._end:
            return
        with _reported(self._log_path, "written"):
            os.fdatasync(self._log)  # not under the lock: others may append meanwhile
        with self._locked():
            current = self._settled()
            if current.flushed.end < head.last.end:
                self._write_head(current._replace(flushed=head.last))

    def close(self) -> None:
        """Flush, and let go of the files. A later append opens them again."""
        try:
            if self._unflushed_since is not None:
                self.flush()
        finally:
            self._release()

    def records(
        self,
        *,
        sandbox_id: str | None = None,
        run_id: str | None = None,
        since: str | None = None,
        follow: bool = False,
    ) -> Iterator[dict[str, Any]]:
        """Yield records in order: of one sandbox, of one run, from an instant on (ISO 8601, UTC unless it says else).

        With follow it does not end but waits for more. The chain is not checked.
        """
        earliest = "" if since is None else _instant(since)
        number = position = 0
        while True:
            with self._view() as view:
                if view.size < position:
                    raise AuditError(f"{self._log_path} was cut off while it was read", remedy=self._evidence())
                for line in self._whole_lines(view, position):
                    number += 1
                    position += len(line)
                    record = self._decode(line, number)
                    if (
                        (sandbox_id is None or record["sandbox_id"] == sandbox_id)
                        and (run_id is None or record["run_id"] == run_id)
                        and record["time"] >= earliest
                    ):
                        yield record
            if not follow:
                return
            time.sleep(FOLLOW_INTERVAL)

    def unended(self, run_ids: Iterable[str]) -> set[str]:
        """Return those of run_ids that have an exec.start and no exec.end. Reads the whole log once."""
        asked = frozenset(run_ids)
        unended: set[str] = set()
        with self._view() as view:
            for number, line in enumerate(self._whole_lines(view), 1):
                if b'"event":"exec.' not in line:  # spares most parsing: no text within a record holds bare quotes
                    continue
                record = self._decode(line, number)
                if record["event"] == "exec.start" and record["run_id"] in asked:
                    unended.add(record["run_id"])
                elif record["event"] == "exec.end":
                    unended.discard(record["run_id"])
        return unended

    def export(self, output: BinaryIO, *, first: int = 1, last: int | None = None) -> int:
        """Copy the lines of records first to last, both included, unchanged. Returns how many there were."""
        count = 0
        with self._view() as view:
            for number, line in enumerate(self._whole_lines(view), 1):
                if last is not None and number > last:
                    break
                if number >= first:
                    output.write(line)
                    count += 1
        return count

    def anchor(self) -> str:
        """Return "SEQ:HASH" of the last record. Kept elsewhere, it lets verify notice a log that was written anew."""
        with self._view() as view:
            if view.head is None and view.size:
                raise self._headless()
            last = Mark() if view.head is None else view.head.last
        return f"{last.seq}:{last.hash}"

    def verify(self, anchor: str | None = None) -> Verification:
        """Check the whole log and name the first record that is altered, missing, moved, doubled or cut off.

        anchor is what anchor() once returned: the log must still hold that record.
        """
        witnesses = [] if anchor is None else [Witness(parse_anchor(anchor), "the anchor")]
        with self._view() as view:
            if view.head is not None:
                witnesses.append(Witness(view.head.last, "the head file"))
            found = check(self._lines(view.file, 0, view.size), witnesses)
        if found.ok and view.head is None and view.size:
            return found._replace(
                ok=False, problem="the file `head` is missing: records cut off at the end do not show"
            )
        return found

    # --- the files ----------------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the log for this thread of this process alone."""
        with self._mutex, _reported(self._log_path, "written"):
            self._open()
            fcntl.flock(self._log, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._log, fcntl.LOCK_UN)

    def _open(self) -> None:
        if self._owner == os.getpid():
            return
        self._release()  # after a fork: a descriptor of the parent's would share the parent's lock
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            self._boot = file.read().strip()
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        self._log = os.open(self._log_path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._head = os.open(self._head_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._owner = os.getpid()

    def _release(self) -> None:
        descriptors = (self._log, self._head)
        self._log = self._head = -1
        self._owner = 0
        self._unflushed_since = None
        for descriptor in descriptors:
            if descriptor >= 0:
                os.close(descriptor)

    @contextmanager
    def _view(self) -> Iterator[_View]:
        """Open the log for reading; one that was never begun is empty."""
        with _reported(self._log_path, "read"):
            path = self._log_path if os.path.exists(self._log_path) else os.memfd_create("no log yet")
            file = open(path, "rb")  # noqa: SIM115 - closed below; here only the errors of opening are ours
        with file:
            with _reported(self._log_path, "read"):
                fcntl.flock(file, fcntl.LOCK_SH)
                size = os.fstat(file.fileno()).st_size
                head = _parse_head(_content(self._head_path))
                fcntl.flock(file, fcntl.LOCK_UN)
            yield _View(file, size, head)

    def _lines(self, file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
        """Yield the lines between two offsets. One without its newline is the last, or longer than any record."""
        with _reported(self._log_path, "read"):
            file.seek(start)
            while start < end and (line := file.readline(min(RECORD_LIMIT, end - start))):
                start += len(line)
                yield line

    def _whole_lines(self, view: _View, start: int = 0) -> Iterator[bytes]:
        """Leave out half a record at the end, which the next append cuts off."""
        return (line for line in self._lines(view.file, start, view.size) if line.endswith(b"\n"))

    def _decode(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
            if isinstance(record, dict) and {"time", "event", "sandbox_id", "run_id"} <= record.keys():
                return record
        except ValueError:
            pass  # it is no record either, which is said below
        raise AuditError(f"line {number} of {self._log_path} is not a record", remedy="run `jhansi-run audit verify`")

    def _headless(self) -> AuditError:
        return AuditError(f"{self._head_path} is missing, beside a log that is not empty", remedy=self._evidence())

    def _evidence(self) -> str:
        return f"run `jhansi-run audit verify`, then move {self._directory} aside as evidence, and a new log begins"

    # --- under the lock -----------------------------------------------------------------------------------

    def _settled(self) -> _Head:
        """Return the head of a log that is whole, once what a kill or a power cut left is mended."""
        status = os.fstat(self._log)
        if status.st_nlink == 0:
            raise AuditError(f"{self._log_path} was removed while in use", remedy=self._evidence())
        head = _parse_head(os.pread(self._head, _HEAD_SIZE, 0))
        if head is None and status.st_size:
            raise self._headless()
        if head is None:
            return self._begin()
        if head.last.end == status.st_size and head.boot == self._boot and not head.cut and not head.lost:
            return head
        return self._recover(head, status.st_size)

    def _begin(self) -> _Head:
        head = _Head(Mark(), Mark(), self._boot)
        self._write_head(head)
        # Flushed with its name this once: a log that a power cut leaves then always has a head beside it.
        os.fsync(self._head)
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        return head

    def _recover(self, head: _Head, size: int) -> _Head:
        """Find the last whole record, cut off half a one behind it, and record what was lost."""
        # Since this boot nothing that was written goes by itself; from before it, only what was flushed is sure.
        sure = head.last if head.boot == self._boot else head.flushed
        if size < sure.end:
            message = f"{self._log_path} was cut off: record {sure.seq} ended at byte {sure.end}, and it has {size}"
            raise AuditError(message, remedy=self._evidence())
        with open(self._log, "rb", closefd=False) as file:
            last = last_chained(self._lines(file, sure.end, size), sure)
        torn = os.pread(self._log, size - last.end, last.end)
        if b"\n" in torn:  # no write that was cut short leaves a whole line
            message = f"line {last.seq + 1} of {self._log_path} is not chained to the one before it"
            raise AuditError(message, remedy=self._evidence())
        cut = len(torn) or head.cut
        lost = max(0, head.last.seq - last.seq) or head.lost
        head = head._replace(last=last, boot=self._boot, cut=cut, lost=lost)
        self._write_head(head)  # before the cut, so that a kill in between does not hide it
        os.ftruncate(self._log, last.end)
        if cut or lost:
            who = {"event": "audit.repair", "actor": "jhansi-runtime", "sandbox_id": None, "run_id": None}
            head, _ = self._add(head._replace(cut=0, lost=0), {**who, "cut_bytes": cut, "lost_records": lost})
        return head

    def _add(self, head: _Head, fields: Mapping[str, Json]) -> tuple[_Head, dict[str, Any]]:
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
        if self._unflushed_since is None:
            self._unflushed_since = time.monotonic()
        return head, record

    def _write_head(self, head: _Head) -> None:
        text = json.dumps(head._asdict(), separators=(",", ":")).encode("ascii")
        if os.pwrite(self._head, text.ljust(_HEAD_SIZE - 1) + b"\n", 0) != _HEAD_SIZE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._head_path)


@contextmanager
def _reported(path: str, wanted: Literal["written", "read"]) -> Iterator[None]:
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


def _content(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_HEAD_SIZE)
    except FileNotFoundError:
        return b""


def _parse_head(text: bytes) -> _Head | None:
    """Return what a head file says, or None when it is empty or not whole."""
    try:
        fields = json.loads(text)
        head = _Head(Mark(*fields.pop("last")), Mark(*fields.pop("flushed")), **fields)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    numbers = (head.last.seq, head.last.end, head.flushed.seq, head.flushed.end, head.cut, head.lost)
    texts = (head.last.hash, head.flushed.hash, head.boot)
    is_sound = all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)
    return head if is_sound and all(isinstance(text, str) for text in texts) else None


def _now() -> str:
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{nanoseconds // 1000:06d}Z"


def _instant(text: str) -> str:
    """Write an ISO 8601 instant the way records have it, so that the two compare as text."""
    from datetime import UTC, datetime  # noqa: PLC0415 - only `audit show --since` needs it

    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidRequestError(f"not an instant: {text!r}", remedy="write it as 2026-01-31T12:00:00Z") from None
    instant = instant.replace(tzinfo=UTC) if instant.tzinfo is None else instant.astimezone(UTC)
    return instant.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
