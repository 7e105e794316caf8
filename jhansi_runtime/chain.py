"""The hash chain of the audit log: what makes a line sound, and what is wrong with one that is not. Opens no file.

A record's hash is SHA-256 over its canonical form: JSON with the keys sorted, no spaces and in ASCII, without the
hash itself but with `prev`, the hash of the record before it. The line in the file has the same content with its
fields in reading order. Record n stands in line n.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jhansi_runtime.digest import sha256
from jhansi_runtime.errors import InvalidRequestError

__all__ = ["Mark", "Verification", "Witness", "check", "last_chained", "parse_anchor", "seal"]

_NO_HASH = "0" * 64  # the prev of the first record
_MOST_DIGITS = 19  # of the number of a record
_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode
_in_order = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class Mark(NamedTuple):
    """A place in the log: record `seq` with its hash, and the offset in bytes right after it."""

    seq: int = 0
    hash: str = _NO_HASH
    end: int = 0


class Witness(NamedTuple):
    """Something outside the log that knows one of its records."""

    mark: Mark
    name: str


class Verification(NamedTuple):
    """What a check found. records and head (the hash of the last) count what is sound, from the first record on.

    problem is a sentence about the first record that is not sound: its number is seq, the place it shows is line.
    """

    ok: bool
    records: int
    head: str
    problem: str | None = None
    seq: int | None = None
    line: int | None = None


def seal(fields: Mapping[str, Any], after: Mark) -> tuple[dict[str, Any], bytes]:
    """Return the record of these fields chained to the one before, as a reader will parse it, and its line."""
    # Hashed is what a reader parses: keys are text there, and two surrogates that make a pair are one character.
    record: dict[str, Any] = json.loads(_in_order({**fields, "prev": after.hash}))
    record["hash"] = _hash_of(record)
    return record, _line_of(record)


def last_chained(lines: Iterable[bytes], mark: Mark) -> Mark:
    """Walk on from a known record along the lines behind it while they are chained to it; return the last."""
    for line in lines:
        record = _parse(line)
        if record is None or not _follows(record, mark):
            break
        mark = Mark(record["seq"], record["hash"], mark.end + len(line))
    return mark


def check(lines: Iterable[bytes], witnesses: Sequence[Witness]) -> Verification:
    """Walk a whole log and name the first record that is altered, missing, moved, doubled or cut off.

    Memory does not grow with the log. A record that is chained behind the last one any witness knows passes.
    """
    rest = iter(lines)
    before, mark = Mark(), Mark()
    for line in rest:
        record = _parse(line)
        if record is None and not line.endswith(b"\n"):
            break  # half a record at the end: its append never returned, or a witness knows that it was whole
        if record is None:
            text = f"record {mark.seq + 1} was altered: what line {mark.seq + 1} holds does not have its hash"
            return _broken(mark, text)
        if not _follows(record, mark):
            return _explain(record, before, mark, rest, witnesses)
        before, mark = mark, Mark(record["seq"], record["hash"], mark.end + len(line))
        for known, name in witnesses:
            if known.seq == mark.seq and known.hash != mark.hash:
                text = f"record {mark.seq} is not the one that {name} names: it, or all up to it, was rewritten"
                return _broken(before, text)
    for known, name in witnesses:
        if known.seq > mark.seq:
            return _broken(
                mark, f"{_span(mark.seq + 1, known.seq)} cut off at the end: {name} names record {known.seq}"
            )
    return Verification(True, mark.seq, mark.hash)


def parse_anchor(anchor: str) -> Mark:
    """Read "SEQ:HASH"; the offset is not known."""
    seq, _, digest = anchor.partition(":")
    if not (seq.isascii() and seq.isdecimal() and len(seq) <= _MOST_DIGITS) or len(digest) != len(_NO_HASH):
        remedy = "give SEQ:HASH as `jhansi-run audit export --anchor` prints it"
        raise InvalidRequestError(f"not an anchor: {anchor!r}", remedy=remedy)
    return Mark(int(seq), digest.lower())


def _hash_of(content: Mapping[str, Any]) -> str:
    return sha256(_canonical(content).encode("ascii")).hexdigest()


def _line_of(record: Mapping[str, Any]) -> bytes:
    return _in_order(record).encode("ascii") + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line that is just what seal writes; None for any other."""
    try:
        record = json.loads(line)
        # Written again it must give the same bytes: of a key that is there twice, parsers see different ones.
        if not isinstance(record, dict) or _line_of(record) != line:
            return None
    except (ValueError, RecursionError):
        return None
    content = {name: value for name, value in record.items() if name != "hash"}
    return record if isinstance(record.get("seq"), int) and record.get("hash") == _hash_of(content) else None


def _follows(record: Mapping[str, Any], mark: Mark) -> bool:
    return record["seq"] == mark.seq + 1 and record.get("prev") == mark.hash


def _broken(sound: Mark, problem: str, *, seq: int | None = None) -> Verification:
    """Return the finding about the line after the last sound record; seq is that of the record meant, if another."""
    return Verification(False, sound.seq, sound.hash, problem, sound.seq + 1 if seq is None else seq, sound.seq + 1)


def _span(first: int, last: int) -> str:
    return f"record {first} is" if first == last else f"records {first} to {last} are"


def _explain(
    record: Mapping[str, Any], before: Mark, mark: Mark, rest: Iterator[bytes], witnesses: Sequence[Witness]
) -> Verification:
    """Say why a record that is whole in itself does not follow mark, the last sound one, nor `before` that."""
    expected, found = mark.seq + 1, record["seq"]
    if found > expected:
        for number, line in enumerate(rest, expected + 1):
            other = _parse(line)
            if other is not None and _follows(other, mark):
                where = f"it is in line {number}, and line {expected} holds record {found}"
                return _broken(mark, f"record {expected} is out of order: {where}")
        return _broken(mark, f"{_span(expected, found - 1)} missing: line {expected} holds record {found}")
    if found < expected:
        return _broken(mark, f"record {found} is there a second time, in line {expected}", seq=found)
    # Of two neighbours one was altered and given a new hash: not the one that a witness or the next record knows.
    after = _parse(next(rest, b""))
    known = {witness.mark.seq: witness.mark.hash for witness in witnesses}
    confirmed = after.get("prev") if after else known.get(found, record["hash"])
    earlier_is_right = mark.seq in known or confirmed != record["hash"]
    altered = mark if earlier_is_right else before
    text = f"record {altered.seq + 1} was altered and given a new hash, and its neighbour still names the old one"
    return _broken(altered, text)
