"""The audit log: append to it, read it, verify it (CONTRACT: Audit log).

Theory of operation. Two files in one directory, both guarded by a flock(2) on the first (appender.py writes them):

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

Flushing. A written record survives any kill. Against a power cut, fsync="always" flushes before append returns; with
"group" a thread that is there only meanwhile does it for all records together, within 50 ms of the first of them
(flusher.py), and no caller waits for the disk but close. What such a flush has raised, the next append raises, or
flush, or close; the record of that append is written nevertheless. A process that was killed has no thread any more:
what it wrote within its last 50 ms is flushed with the next record of any process, or by the kernel after a while.

What two files cannot show: whoever may write both can write a new chain. An anchor, kept elsewhere, shows that.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal, NamedTuple, TypeAlias

from jhansi_runtime.appender import HEAD_SIZE, Appender, Head, Where, lines_between, parse_head, reported
from jhansi_runtime.chain import Mark, Verification, Witness, check, parse_anchor
from jhansi_runtime.errors import AuditError, InvalidRequestError

__all__ = ["AuditLog", "Json", "Verification"]

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"

FOLLOW_INTERVAL = 0.1  # seconds between two looks at a log that is followed

_RESERVED = frozenset({"seq", "time", "prev", "hash"})


class _View(NamedTuple):
    """The log at a moment when nobody appended: an open file, how much of it counts, the head if there is one."""

    file: BinaryIO
    size: int
    head: Head | None


class AuditLog:
    """The log in one directory, which the first append makes. One object may be used by several threads.

    A method that cannot do its work raises AuditError; who gets one from append must not do what it was to record.
    """

    def __init__(self, directory: str, *, fsync: Literal["group", "always"] = "group") -> None:
        self._where = Where(directory, os.path.join(directory, "audit.jsonl"), os.path.join(directory, "head"))
        self._always = fsync == "always"
        self._appenders: dict[int, Appender] = {}  # by the process that opened it, which is this one but after a fork

    def append(
        self, event: str, *, actor: str, sandbox_id: str | None = None, run_id: str | None = None, **fields: Json
    ) -> dict[str, Any]:
        """Write one record and return it as a reader will see it. From then on it survives this process."""
        if not _RESERVED.isdisjoint(fields):
            raise ValueError(f"fields that the log itself sets: {_RESERVED & fields.keys()}")
        return self._appender().append(
            {"event": event, "actor": actor, "sandbox_id": sandbox_id, "run_id": run_id, **fields}
        )

    def flush(self) -> None:
        """Bring all that was written here to the disk, unless another process has done so meanwhile."""
        appender = self._appenders.get(os.getpid())
        if appender is not None:
            appender.flush()

    def close(self) -> None:
        """Flush, and let go of the files, to which nobody may be appending. A later append opens them again."""
        appender = self._appenders.pop(os.getpid(), None)
        if appender is not None:
            appender.close()

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
                    raise AuditError(f"{self._where.log} was cut off while it was read", remedy=self._where.evidence())
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
                raise self._where.headless()
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
            found = check(lines_between(self._where.log, view.file, 0, view.size), witnesses)
        if found.ok and view.head is None and view.size:
            return found._replace(
                ok=False, problem="the file `head` is missing: records cut off at the end do not show"
            )
        return found

    # --- the files ----------------------------------------------------------------------------------------

    def _appender(self) -> Appender:
        pid = os.getpid()
        appender = self._appenders.get(pid)
        if appender is None:
            made = Appender(self._where, always=self._always)
            appender = self._appenders.setdefault(pid, made)
            if appender is not made:  # another thread came first
                made.abandon()
            for parent in self._appenders.keys() - {pid}:
                if (inherited := self._appenders.pop(parent, None)) is not None:
                    inherited.abandon()
        return appender

    @contextmanager
    def _view(self) -> Iterator[_View]:
        """Open the log for reading; one that was never begun is empty."""
        with reported(self._where.log, "read"):
            path = self._where.log if os.path.exists(self._where.log) else os.memfd_create("no log yet")
            file = open(path, "rb")  # noqa: SIM115 - closed below; here only the errors of opening are ours
        with file:
            with reported(self._where.log, "read"):
                fcntl.flock(file, fcntl.LOCK_SH)
                size = os.fstat(file.fileno()).st_size
                head = parse_head(_content(self._where.head))
                fcntl.flock(file, fcntl.LOCK_UN)
            yield _View(file, size, head)

    def _whole_lines(self, view: _View, start: int = 0) -> Iterator[bytes]:
        """Leave out half a record at the end, which the next append cuts off."""
        return (line for line in lines_between(self._where.log, view.file, start, view.size) if line.endswith(b"\n"))

    def _decode(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
            if isinstance(record, dict) and {"time", "event", "sandbox_id", "run_id"} <= record.keys():
                return record
        except ValueError:
            pass  # it is no record either, which is said below
        raise AuditError(f"line {number} of {self._where.log} is not a record", remedy="run `jhansi-run audit verify`")


def _content(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(HEAD_SIZE)
    except FileNotFoundError:
        return b""


def _instant(text: str) -> str:
    """Write an ISO 8601 instant the way records have it, so that the two compare as text."""
    from datetime import UTC, datetime  # noqa: PLC0415 - only `audit show --since` needs it

    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidRequestError(f"not an instant: {text!r}", remedy="write it as 2026-01-31T12:00:00Z") from None
    instant = instant.replace(tzinfo=UTC) if instant.tzinfo is None else instant.astimezone(UTC)
    return instant.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
