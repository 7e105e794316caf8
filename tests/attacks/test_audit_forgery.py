"""Someone who got hold of the audit log changes it: verify names the first record concerned.

Every change is tried at every place of a log of eight records.
"""

import hashlib
import json
import os
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jhansi_runtime.audit import AuditLog
from jhansi_runtime.errors import AuditError, InvalidRequestError

COUNT = 8


@pytest.fixture(scope="module")
def genuine(tmp_path_factory):
    """The lines of a log, and its head file."""
    log = AuditLog(str(tmp_path_factory.mktemp("genuine")))
    for number in range(COUNT):
        log.append("exec.start", actor="uid:1000", run_id=f"run_{number}", argv=["python3", "main.py"])
    log.close()
    with open(log._where.log, "rb") as lines, open(log._where.head, "rb") as head:
        return lines.readlines(), head.read()


@pytest.fixture(scope="module")
def verify(genuine, tmp_path_factory):
    """`verify(lines)` is what verify says of a log of these lines with the genuine head."""
    directory = tmp_path_factory.mktemp("forged")

    def verify(lines, *, head=genuine[1], anchor=None):
        (directory / "audit.jsonl").write_bytes(b"".join(lines))
        (directory / "head").write_bytes(head)
        return AuditLog(str(directory)).verify(anchor)

    return verify


def rehashed(line, **changes):
    """Return a record with other fields and a hash that is right for them."""
    record = json.loads(line) | changes
    del record["hash"]
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":")).encode("ascii")
    record["hash"] = hashlib.sha256(canonical).hexdigest()
    return json.dumps(record, separators=(",", ":")).encode("ascii") + b"\n"


def rewritten(lines, **changes):
    """Return the chain with the first record changed and every hash made anew."""
    result, previous = [rehashed(lines[0], **changes)], None
    for line in lines[1:]:
        previous = json.loads(result[-1])["hash"]
        result.append(rehashed(line, prev=previous))
    return result


def assert_named(found, *, seq, line, saying):
    assert not found.ok
    assert (found.seq, found.line) == (seq, line)
    assert saying in found.problem
    assert found.records == min(seq, line) - 1 or "second time" in found.problem


every_record = pytest.mark.parametrize("k", range(1, COUNT + 1))
every_neighbour = pytest.mark.parametrize("k", range(1, COUNT))


def test_the_genuine_log_is_sound(genuine, verify):
    found = verify(genuine[0])

    assert found[:2] == (True, COUNT)
    assert found.head == json.loads(genuine[0][-1])["hash"]


@every_record
@pytest.mark.parametrize(
    ("old", "new"), [(b"uid:1000", b"uid:1001"), (b'"seq":', b'"seq":1'), (b'"prev":"', b'"prev":"a'), (b":", b": ")]
)
def test_an_altered_record_is_named(genuine, verify, k, old, new):
    lines = list(genuine[0])
    lines[k - 1] = lines[k - 1].replace(old, new, 1)

    assert_named(verify(lines), seq=k, line=k, saying=f"record {k} was altered")


@every_record
def test_a_record_with_a_key_that_other_parsers_see_first_is_named(genuine, verify, k):
    lines = list(genuine[0])
    lines[k - 1] = lines[k - 1].replace(b'"actor":', b'"actor":"uid:0","actor":', 1)

    assert_named(verify(lines), seq=k, line=k, saying=f"record {k} was altered")


@every_record
@pytest.mark.parametrize("line", [b"\n", b"[]\n", b"{}\n", b"{\xff}\n", b'{"seq":"1"}\n', b"[" * 100_000 + b"\n"])
def test_a_line_that_is_no_record_at_all_is_named(genuine, verify, k, line):
    lines = list(genuine[0])
    lines[k - 1] = line

    assert_named(verify(lines), seq=k, line=k, saying=f"record {k} was altered")


@every_record
def test_a_record_altered_and_given_a_new_hash_is_named(genuine, verify, k):
    lines = list(genuine[0])
    lines[k - 1] = rehashed(lines[k - 1], actor="uid:1001")

    found = verify(lines)
    saying = "given a new hash" if k < COUNT else "not the one that the head file names"
    assert_named(found, seq=k, line=k, saying=saying)


@every_record
def test_a_record_that_is_given_another_predecessor_is_named(genuine, verify, k):
    lines = list(genuine[0])
    lines[k - 1] = rehashed(lines[k - 1], prev="f" * 64)

    assert_named(verify(lines), seq=k, line=k, saying=f"record {k} was altered and given a new hash")


@every_neighbour
def test_a_deleted_record_is_named(genuine, verify, k):
    lines = genuine[0][: k - 1] + genuine[0][k:]

    assert_named(verify(lines), seq=k, line=k, saying=f"record {k} is missing")


def test_a_deleted_stretch_is_named(genuine, verify):
    lines = genuine[0][:2] + genuine[0][5:]

    assert_named(verify(lines), seq=3, line=3, saying="records 3 to 5 are missing: line 3 holds record 6")


@pytest.mark.parametrize(("k", "other"), [(k, other) for other in range(2, COUNT + 1) for k in range(1, other)])
def test_swapped_records_are_named(genuine, verify, k, other):
    lines = list(genuine[0])
    lines[k - 1], lines[other - 1] = lines[other - 1], lines[k - 1]

    saying = f"record {k} is out of order: it is in line {other}, and line {k} holds record {other}"
    assert_named(verify(lines), seq=k, line=k, saying=saying)


@every_record
@pytest.mark.parametrize("distance", range(1, COUNT + 1))
def test_a_record_that_is_there_twice_is_named(genuine, verify, k, distance):
    lines = list(genuine[0])
    place = min(k + distance, COUNT + 1)
    lines.insert(place - 1, lines[k - 1])

    assert_named(verify(lines), seq=k, line=place, saying=f"record {k} is there a second time, in line {place}")


@every_record
def test_a_record_put_in_between_is_named(genuine, verify, k):
    lines = list(genuine[0])
    forged = rehashed(lines[k - 1], actor="uid:1001")
    lines.insert(k - 1, forged)

    found = verify(lines)
    if k < COUNT:
        assert_named(found, seq=k, line=k + 1, saying=f"record {k} is there a second time")
    else:
        assert_named(found, seq=k, line=k, saying="not the one that the head file names")


@every_record
def test_a_log_cut_off_after_a_record_is_named(genuine, verify, k):
    found = verify(genuine[0][: k - 1])

    span = f"records {k} to {COUNT} are" if k < COUNT else f"record {k} is"
    assert_named(found, seq=k, line=k, saying=f"{span} cut off at the end: the head file names record {COUNT}")


@every_record
@pytest.mark.parametrize("kept", [1, 100, -1])
def test_a_log_cut_off_within_a_record_is_named(genuine, verify, k, kept):
    found = verify([*genuine[0][: k - 1], genuine[0][k - 1][:kept]])

    assert_named(found, seq=k, line=k, saying="cut off at the end")


@settings(database=None, deadline=None)
@given(data=st.data())
def test_the_record_that_any_changed_byte_belongs_to_is_named(genuine, verify, data):
    k = data.draw(st.integers(1, COUNT), label="record")
    lines = [bytearray(line) for line in genuine[0]]
    place = data.draw(st.integers(0, len(lines[k - 1]) - 1), label="offset")
    lines[k - 1][place] ^= data.draw(st.integers(1, 255), label="difference")

    assert verify(lines).seq == k


@settings(database=None, deadline=None)
@given(data=st.data())
def test_no_other_order_or_choice_of_the_lines_is_sound(genuine, verify, data):
    places = data.draw(st.lists(st.integers(0, COUNT - 1), max_size=COUNT + 2), label="places")
    first_wrong = next((n for n, place in enumerate(places) if place != n), len(places)) + 1

    found = verify([genuine[0][place] for place in places])

    assert found.ok == (places == list(range(COUNT)))
    assert found.ok or first_wrong in (found.seq, found.line)


# --- the head ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [b"", b"{}", b"null\n", b'{"last":[1]}'])
def test_a_log_without_its_head_is_not_sound_and_takes_no_record(genuine, verify, tmp_path, head):
    found = verify(genuine[0], head=head)
    assert (found.ok, found.records, found.seq) == (False, COUNT, None)
    assert "the file `head` is missing" in found.problem

    (tmp_path / "audit.jsonl").write_bytes(b"".join(genuine[0]))
    (tmp_path / "head").write_bytes(head)
    with pytest.raises(AuditError, match="is missing, beside a log that is not empty"):
        AuditLog(str(tmp_path)).append("exec.start", actor="me")


@pytest.mark.parametrize("kept", [0, 1, COUNT - 1])
def test_a_log_that_was_cut_off_takes_no_record_that_would_hide_it(genuine, tmp_path, kept):
    (tmp_path / "audit.jsonl").write_bytes(b"".join(genuine[0][:kept]))
    (tmp_path / "head").write_bytes(genuine[1])
    log = AuditLog(str(tmp_path))

    with pytest.raises(AuditError, match=f"was cut off: record {COUNT} .*move .* aside as evidence"):
        log.append("exec.start", actor="me")
    assert log.verify().seq == kept + 1


def test_a_log_removed_while_a_process_has_it_open_takes_no_record(tmp_path):
    log = AuditLog(str(tmp_path))
    log.append("exec.start", actor="me")
    os.unlink(log._where.log)

    with pytest.raises(AuditError, match="was removed while in use"):
        log.append("exec.start", actor="me")
    assert log.verify().seq == 1
    with suppress(AuditError):  # what was still to be flushed
        log.close()


def test_a_line_put_behind_the_last_record_is_neither_chained_to_nor_cut_off(genuine, tmp_path):
    forged = rehashed(genuine[0][0], seq=COUNT + 1, actor="uid:1001")
    (tmp_path / "audit.jsonl").write_bytes(b"".join([*genuine[0], forged]))
    (tmp_path / "head").write_bytes(genuine[1])
    log = AuditLog(str(tmp_path))

    with pytest.raises(AuditError, match=f"line {COUNT + 1} of .* is not chained"):
        log.append("exec.start", actor="me")
    assert (log.verify().seq, (tmp_path / "audit.jsonl").read_bytes().endswith(forged)) == (COUNT + 1, True)


# --- the anchor ----------------------------------------------------------------------------------------------


def head_for(lines):
    """Return a head file that agrees with these lines, as a careful forger writes it."""
    mark = [len(lines), json.loads(lines[-1])["hash"], sum(map(len, lines))]
    return json.dumps({"last": mark, "flushed": mark, "boot": "", "cut": 0, "lost": 0}).encode().ljust(511) + b"\n"


def anchor_of(lines):
    return f"{len(lines)}:{json.loads(lines[-1])['hash']}"


@every_record
def test_an_anchor_shows_that_the_whole_log_was_written_anew(genuine, verify, k):
    forged = rewritten(genuine[0], actor="uid:1001")
    head = head_for(forged)
    assert verify(forged, head=head).ok, "nothing in the folder itself shows it"

    found = verify(forged, head=head, anchor=anchor_of(genuine[0][:k]))

    assert_named(found, seq=k, line=k, saying=f"record {k} is not the one that the anchor names")


@every_record
def test_an_anchor_shows_that_a_log_was_cut_off_together_with_its_head(genuine, verify, k):
    kept = genuine[0][:k]
    head = head_for(kept)
    assert verify(kept, head=head).ok

    found = verify(kept, head=head, anchor=anchor_of(genuine[0]))
    assert found.ok == (k == COUNT)
    assert found.ok or (found.seq, "the anchor names" in found.problem) == (k + 1, True)


def test_an_anchor_shows_that_the_folder_was_removed(genuine, tmp_path):
    found = AuditLog(str(tmp_path / "nothing")).verify(anchor_of(genuine[0]))

    assert_named(found, seq=1, line=1, saying=f"records 1 to {COUNT} are cut off")


@every_record
def test_an_anchor_of_an_earlier_day_agrees_with_the_log_that_went_on(genuine, verify, k):
    assert verify(genuine[0], anchor=anchor_of(genuine[0][:k])).ok


@pytest.mark.parametrize(
    "anchor", ["", "8", "8:", "x:" + "0" * 64, "-1:" + "0" * 64, "8:" + "0" * 63, "\u0668:" + "0" * 64]
)
def test_what_is_no_anchor_is_refused(genuine, verify, anchor):
    with pytest.raises(InvalidRequestError, match="not an anchor"):
        verify(genuine[0], anchor=anchor)
