"""Whatever crosses a border, made up: it is understood, and means what it says, or it is refused in the way we refuse.

Nothing here knows of a particular mistake. Each test draws values or bytes that somebody could send, hand over or leave
on the disk, and asserts what must hold for all of them; tests that name what goes wrong are with their subjects.

Each run draws the same examples, so that a test does not fail on one day and pass on the other. JHANSI_FUZZ_EXAMPLES is
the number of others to draw instead.
"""

import contextlib
import fcntl
import gzip
import io
import json
import lzma
import os
import pathlib
import random
import re
import shutil
import stat
import struct
import tarfile
import tempfile
import typing

import msgspec
import pyseccomp
import pytest
import zstandard
from conftest import CHECKOUT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jhansi_runtime import spec
from jhansi_runtime.api.ranges import Span, is_unchanged, requested
from jhansi_runtime.archive import Limits as ArchiveLimits
from jhansi_runtime.archive import decompressed, unpack
from jhansi_runtime.audit import AuditLog
from jhansi_runtime.chain import parse_anchor
from jhansi_runtime.errors import AuditError, InvalidRequestError, JhansiError, NotFoundError, RootfsError
from jhansi_runtime.frames import LONGEST_PAYLOAD, encoded, frames
from jhansi_runtime.isolation import channel
from jhansi_runtime.isolation.cgroup import Limits as CgroupLimits
from jhansi_runtime.keys import KeyStore
from jhansi_runtime.places import inside
from jhansi_runtime.profiles import compiled_for, read_profile
from jhansi_runtime.rootfs import RootfsStore
from jhansi_runtime.settings import load
from jhansi_runtime.workspace import open_workspace

EXAMPLES = int(os.environ.get("JHANSI_FUZZ_EXAMPLES", "0"))
SECRET = b"the host's secret"


def fuzz(examples):
    """The settings of a test: how many examples, unless it is told; no deadline, for machines are slow."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        database=None,  # the checkout may be somebody else's
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


any_text = st.text(st.characters(codec=None), max_size=40)  # lone surrogates included: undecodable bytes are such
any_bytes = st.binary(max_size=200)
numbers = st.one_of(
    st.integers(-5, 100), st.sampled_from([2**bits + off for bits in (31, 32, 53, 63, 64, 900) for off in (-1, 0, 1)])
)
any_json = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.floats(), any_text),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(any_text, inner, max_size=4)),
    max_leaves=12,
)


def seldom(values, usual):
    """A strategy that draws from the first one time out of twenty, else from the other."""
    return st.integers(0, 19).flatmap(lambda number: usual if number else values)


# --- between the host, the launcher and init ------------------------------------------------------------------
# Both ends are ours, whatever a job does: orders and containers are marshalled, which is fit for no other. So what is
# asked of those is that all values arrive; of the others also that bytes which are none are told from those that are.

signed = st.integers(-(2**31), 2**31 - 1)
unsigned = st.integers(0, 2**64 - 1)
seconds = st.floats(allow_nan=False)
counts = st.integers(0, 2**63 - 1)
cpus = st.lists(st.integers(0, 8191), max_size=8).map(tuple)
paths = st.lists(st.tuples(any_text, any_text), max_size=4).map(tuple)

containers = st.builds(
    channel.Container,
    tree=any_text,
    binds=paths,
    workspaces=any_text,
    tmp_bytes=counts,
    host_id=st.none() | st.integers(0, 2**32 - 1),
    processors=cpus,
    cgroup=st.none() | st.builds(CgroupLimits, memory=counts, processes=counts, cpus=seconds),
)
orders = st.builds(
    channel.Order,
    workspace=any_text,
    argv=st.lists(st.binary(max_size=300), max_size=20),
    environment=st.dictionaries(any_bytes, any_bytes, max_size=10),
    processors=cpus,
    filters=st.lists(st.binary(max_size=10_000), max_size=3).map(tuple),
)
step_names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)
CODECS = {
    "container": (channel.encode_container, channel.decode_container, containers),
    "outcome": (
        channel.encode_outcome,
        channel.decode_outcome,
        st.builds(channel.Outcome, signed, seconds, seconds, seconds, unsigned),
    ),
    "reaped": (channel.encode_reaped, channel.decode_reaped, st.builds(channel.Reaped, seconds, unsigned)),
    "pid": (channel.encode_pid, channel.decode_pid, signed),
    "failure": (
        channel.encode_failure,
        channel.decode_failure,
        st.builds(channel.Failure, step_names, signed, st.text()),
    ),
}


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@fuzz(150)
@given(data=st.data())
def test_what_is_encoded_is_decoded_to_the_same(codec, data):
    encode, decode, values = codec
    value = data.draw(values)
    body = encode(value)
    assert decode(body) == value
    assert type(decode(body)) is type(value)


@fuzz(100)
@given(order=orders)
def test_an_order_arrives_whole_and_its_descriptor_is_closed(order):
    before = os.listdir("/proc/self/fd")
    assert channel.read_order(channel.write_order(order)) == order
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("kind", ["outcome", "reaped", "pid", "failure"])
@fuzz(150)
@given(data=st.data())
def test_a_message_that_is_none_is_no_record(kind, data):
    encode, decode, values = CODECS[kind]
    genuine = encode(data.draw(values))
    body = data.draw(st.one_of(any_bytes, st.integers(0, len(genuine)).map(lambda size: genuine[:size])))
    try:
        decode(body)
    except struct.error:
        assert len(body) < 4 if kind == "failure" else len(body) != len(genuine)


@fuzz(100)
@given(step=any_text, number=signed, detail=st.builds(str.__mul__, any_text, st.integers(0, 200)))
def test_any_failure_can_be_told_in_one_message(step, number, detail):
    body = channel.encode_failure(channel.Failure(step, number, detail))
    assert len(body) <= 4096  # PIPE_BUF: what a pipe takes at once
    assert channel.decode_failure(body).errno == number


@fuzz(100)
@given(kind=st.binary(min_size=1, max_size=1), body=st.binary(max_size=100) | st.integers(16_000, 17_000).map(bytes))
def test_a_message_arrives_whole_or_not_at_all(kind, body):
    ours, theirs = channel.pair()
    with contextlib.closing(ours), contextlib.closing(theirs):
        ours.send(kind, body)
        try:
            assert theirs.receive() == (kind, body, [])
        except OSError:
            assert len(body) >= 1 << 14


@fuzz(50)
@given(chosen=st.lists(st.integers(0, 2), max_size=8))
def test_the_descriptors_that_were_passed_arrive_in_order_and_stay_in_the_process(chosen):
    files = [os.memfd_create(str(number)) for number in range(3)]
    ours, theirs = channel.pair()
    with contextlib.closing(ours), contextlib.closing(theirs):
        ours.send(b"x", b"", tuple(files[number] for number in chosen))
        _, _, arrived = theirs.receive()
    assert all(fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for descriptor in arrived)
    assert [os.fstat(descriptor).st_ino for descriptor in arrived] == [os.fstat(files[n]).st_ino for n in chosen]
    for descriptor in (*arrived, *files):
        os.close(descriptor)


# --- what users send ------------------------------------------------------------------------------------------

plausible = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(0, 2**34),
    st.floats(0, 1e6),
    st.sampled_from(
        ["python", "main.py", "box", "default", "strict", "recipe", "host", "text", "base64", "", "always"]
    ),
    st.lists(st.sampled_from(["ls", "-la", "read", "admin"]), max_size=3),
    st.dictionaries(st.sampled_from(["A", "memory", "pids", "timeout", "require_cgroup"]), st.integers(0, 2**34)),
    st.dictionaries(st.sampled_from(["A", "B"]), st.sampled_from(["x", ""])),
)
REQUESTS = [
    spec.ExecBody,
    spec.Key,
    spec.Limits,
    spec.Recipe,
    spec.SandboxBody,
    spec.SandboxChange,
    spec.ServerSettings,
    spec.TerminalControl,
    spec.TerminalQuery,
]
every_request = pytest.mark.parametrize("record", REQUESTS, ids=lambda record: record.__name__)


def documents(record):
    """Documents with the fields of a record, most of them with values that may be meant."""
    names = [field.encode_name for field in msgspec.structs.fields(record)]
    fields = st.fixed_dictionaries({}, optional=dict.fromkeys(names, plausible | any_json))
    others = st.dictionaries(st.sampled_from(["\ud800", "\0", ""]) | any_text, any_json, max_size=2)
    return fields | st.builds(dict.__or__, fields, others)


def is_in_range(record):
    """Whether each number is within the bounds that its declaration names."""
    for name, hint in typing.get_type_hints(type(record), include_extras=True).items():
        value = getattr(record, name)
        for bounds in getattr(hint, "__metadata__", ()):
            if bounds.ge is not None and not value >= bounds.ge:
                return False
            if (bounds.gt is not None and not value > bounds.gt) or (bounds.le is not None and not value <= bounds.le):
                return False
    return True


@every_request
@fuzz(250)
@given(data=st.data())
def test_a_request_is_refused_or_understood_and_written_as_it_was_understood(record, data):
    document = data.draw(documents(record) | any_json)
    try:
        understood = spec.from_json(json.dumps(document), record, where="the request")
    except InvalidRequestError:
        return
    written = spec.to_json(understood)
    assert is_in_range(understood)
    assert spec.to_json(spec.from_json(written, record, where="the request")) == written
    assert written.isascii()


@every_request
@fuzz(80)
@given(text=any_bytes | any_text | st.integers(1, 100_000).map(lambda depth: "[" * depth))
def test_a_text_that_is_no_document_is_refused(record, text):
    with contextlib.suppress(InvalidRequestError):
        spec.from_json(text, record, where="the request")


@fuzz(250)
@given(changes=documents(spec.Limits))
def test_limits_are_changed_to_limits_or_not_at_all(changes):
    try:
        changed = spec.Limits().changed(changes)
    except InvalidRequestError:
        return
    assert is_in_range(changed)
    unchanged = msgspec.structs.asdict(spec.Limits())
    assert msgspec.structs.asdict(changed) == unchanged | changes


@fuzz(200)
@given(earlier=st.floats(-1e15, 1e15), later=st.floats(-1e15, 1e15))
def test_instants_are_ordered_as_texts_as_the_times_are(earlier, later):
    earlier, later = sorted((earlier, later))
    assert spec.instant(earlier) <= spec.instant(later)
    assert len(spec.instant(earlier)) == len("2026-01-31T12:00:00.000000Z")


# --- HTTP headers ---------------------------------------------------------------------------------------------

numerals = st.integers(0, 2**70).map(str) | st.text("0123456789", max_size=30) | st.just("9" * 5000)
range_headers = st.one_of(
    any_text,
    st.builds("bytes={}-{}".format, numerals, numerals),
    st.builds("bytes={}{}-{},{}-".format, st.sampled_from(["", " ", "-", "+", "\u0661"]), numerals, numerals, numerals),
)
tags = st.sampled_from(['"a-1"', '"b-2"', 'W/"a-1"', "*", "a-1", ""]) | any_text


@fuzz(400)
@given(header=range_headers, size=st.integers(0, 2**40), if_range=st.none() | tags, etag=tags)
def test_a_range_is_within_the_file_and_what_was_asked_for(header, size, if_range, etag):
    headers = {"range": header} | ({} if if_range is None else {"if-range": if_range})
    plain = re.fullmatch(r"bytes=([0-9]{1,18})-([0-9]{1,18})", header, re.ASCII)
    try:
        span = requested(headers, size, etag)
    except ValueError:
        assert plain is None or int(plain[1]) >= size
        return
    assert span is None or 0 <= span.start < span.end <= size
    if plain and int(plain[1]) <= int(plain[2]) and if_range in {None, etag}:
        assert span == Span(int(plain[1]), min(size, int(plain[2]) + 1))


@fuzz(200)
@given(listed=st.lists(tags, max_size=4), etag=st.sampled_from(['"a-1"', 'W/"a-1"']))
def test_a_file_is_unchanged_when_its_tag_is_among_those_that_are_named(listed, etag):
    expected = ", ".join(listed).strip() == "*" or any(
        tag.strip().removeprefix("W/") == '"a-1"' for tag in ", ".join(listed).split(",")
    )
    assert is_unchanged({"if-none-match": ", ".join(listed)}, etag) == expected


# --- files that somebody may have written ---------------------------------------------------------------------

toml_values = st.one_of(
    st.integers(-(2**63), 2**63).map(str),
    st.floats().map(str),
    st.sampled_from(["true", '"always"', "'group'", "[]", "{}", "1979-05-27", "1979-05-27T99:00:00Z", '"\\ud800"']),
    st.text(max_size=10).map(json.dumps),
    st.integers(0, 5000).map(lambda depth: "[" * depth + "]" * depth),
    st.integers(0, 5000).map(lambda digits: "9" * digits),
)
toml_names = st.sampled_from([*spec.ServerSettings.__struct_fields__, *spec.Recipe.__struct_fields__, "fsync", "a.b"])
toml_lines = st.one_of(
    st.builds("{} = {}".format, toml_names, toml_values),
    st.sampled_from(["[server]", "[audit]", "[[server]]", "[server.audit]", "", "# é", "\t", "x = '''"]),
    st.text(max_size=20),
)
toml_files = any_bytes | st.lists(toml_lines, max_size=8).map(lambda lines: "\n".join(lines).encode())


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@fuzz(300)
@given(content=toml_files)
def test_a_settings_file_is_refused_or_all_in_range(scratch, content):
    (scratch / "config.toml").write_bytes(content)
    try:
        found = load(str(scratch / "config.toml"))
    except InvalidRequestError:
        return
    assert is_in_range(found.server)


@fuzz(200)
@given(content=toml_files)
def test_a_recipe_is_refused_or_one(scratch, content):
    (scratch / "recipes").mkdir(exist_ok=True)
    (scratch / "recipes" / "python.toml").write_bytes(content)
    with contextlib.suppress(InvalidRequestError, RootfsError):
        RootfsStore(str(scratch / "store"), str(scratch / "recipes"))._recipe("python")


TOKENS = [b"", b" ", b"\n", b"0", b"-", b'"', b",", b"{}", b"\0", b"\xff"]


def damaged(data, content):
    """Some bytes of it changed, put in or taken out. What is drawn does not depend on the content."""
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 2**16)) % (len(content) + 1)
        length = data.draw(st.integers(0, 4))
        content[place : place + length] = data.draw(st.sampled_from(TOKENS) | st.binary(max_size=4))
    return bytes(content)


@pytest.fixture(scope="module")
def keys(scratch):
    """A store with two keys, the token of one, and its file as it was written."""
    store = KeyStore(str(scratch / "keys" / "keys.json"))
    store.create(name="other")
    _, token = store.create(name="ci", scopes=["read"], ttl=3600, max_execs=2)
    return store, token, pathlib.Path(store.path).read_bytes()


@fuzz(150)
@given(data=st.data())
def test_a_damaged_key_file_is_an_error_of_ours_or_holds_keys_still(keys, data):
    store, token, genuine = keys
    pathlib.Path(store.path).write_bytes(damaged(data, genuine))
    try:
        key = KeyStore(store.path).verify(token)
        KeyStore(store.path).list()
    except JhansiError:
        return
    assert key is None or set(key.scopes) <= set(typing.get_args(spec.Scope))


@fuzz(150)
@given(reference=any_text | st.from_regex(r"(key_)?[0-9a-f]{0,17}", fullmatch=True))
def test_no_text_finds_a_key_whose_name_or_beginning_it_is_not(keys, reference):
    store, _, genuine = keys
    pathlib.Path(store.path).write_bytes(genuine)
    before = store.list()
    try:
        revoked = store.revoke(reference)
    except (InvalidRequestError, NotFoundError):
        assert store.list() == before
        return
    assert reference == revoked.name or revoked.id.startswith((reference, f"key_{reference}"))


@pytest.fixture(scope="module")
def audit(tmp_path_factory):
    """The folder of an audit log of five records, its log and its head."""
    folder = tmp_path_factory.mktemp("audit")
    log = AuditLog(str(folder))
    for number in range(5):
        log.append("exec.start", actor="uid:1000", run_id=f"run_{number}", argv=["python3", "é\udcff"], size=number)
    log.close()
    return folder, (folder / "audit.jsonl").read_bytes(), (folder / "head").read_bytes()


@fuzz(300)
@given(data=st.data())
def test_a_log_of_which_any_byte_has_changed_does_not_verify(audit, data):
    folder, log, head = audit
    changed = damaged(data, log)
    (folder / "audit.jsonl").write_bytes(changed)
    (folder / "head").write_bytes(head)
    found = AuditLog(str(folder)).verify()
    # Half a line at the end is what a kill leaves: no record, and nothing of a record is lost.
    is_whole = changed.startswith(log) and b"\n" not in changed[len(log) :]
    assert found.ok == is_whole
    assert found.ok or 1 <= found.line <= changed.count(b"\n") + 1


@fuzz(200)
@given(data=st.data())
def test_a_damaged_log_is_read_shown_and_written_to_with_no_other_error_than_its_own(audit, data):
    folder, log, head = audit
    (folder / "audit.jsonl").write_bytes(damaged(data, log))
    (folder / "head").write_bytes(head)
    for use in (
        lambda log: list(log.records(run_id="run_1")),
        lambda log: log.unended(["run_1"]),
        lambda log: log.append("exec.end", actor="uid:1000", run_id="run_1"),
        AuditLog.verify,
    ):
        with contextlib.suppress(AuditError), contextlib.closing(AuditLog(str(folder))) as opened:
            use(opened)


head_values = st.one_of(st.none(), st.booleans(), st.integers(-1, 2000), st.floats(), st.text(max_size=3), st.just([]))


@fuzz(200)
@given(
    fields=st.dictionaries(st.sampled_from(["boot", "cut", "lost", "other"]), head_values),
    marks=st.dictionaries(st.tuples(st.sampled_from(["last", "flushed"]), st.integers(0, 2)), head_values),
)
def test_a_head_that_says_something_odd_is_no_reason_for_another_error(audit, fields, marks):
    folder, log, head = audit
    document = json.loads(head) | fields
    for (mark, place), value in marks.items():
        document[mark][place] = value
    (folder / "audit.jsonl").write_bytes(log)
    (folder / "head").write_text(json.dumps(document))
    with contextlib.suppress(AuditError), contextlib.closing(AuditLog(str(folder))) as opened:
        assert opened.verify().records in {0, 4, 5}
        opened.append("exec.end", actor="uid:1000", run_id="run_1")


@fuzz(200)
@given(anchor=any_text | st.builds("{}:{}".format, numerals, st.text("0123456789abcdef", min_size=64, max_size=64)))
def test_an_anchor_is_refused_or_understood(anchor):
    with contextlib.suppress(InvalidRequestError):
        mark = parse_anchor(anchor)
        assert f"{mark.seq}:{mark.hash}" == re.sub(r"^0+(?=\d)", "", anchor).lower()


# --- the journal of a detached run ----------------------------------------------------------------------------

payloads = st.lists(
    st.tuples(
        st.sampled_from(["stdout", "stderr"]),
        st.binary(min_size=1, max_size=40) | st.integers(1, LONGEST_PAYLOAD).map(lambda size: b"x" * size),
    ),
    max_size=8,
)


@contextlib.contextmanager
def journal_of(written):
    with tempfile.TemporaryFile() as file:
        for stream, payload in written:
            file.write(encoded(file.tell(), stream, payload))
        file.flush()
        yield file.fileno()


def content(found):
    return [(frame.stream, frame.data) for frame in found]


@fuzz(120)
@given(written=payloads, data=st.data())
def test_a_journal_that_is_cut_off_gives_the_frames_that_are_whole(written, data):
    with journal_of(written) as journal:
        whole = list(frames(journal, 0))
        assert content(whole) == written
        size = data.draw(st.integers(0, os.fstat(journal).st_size))
        os.ftruncate(journal, size)
        assert list(frames(journal, 0)) == [frame for frame in whole if frame.position <= size]


@fuzz(120)
@given(written=payloads.filter(bool), data=st.data())
def test_a_damaged_journal_ends_with_an_error_or_gives_frames_within_it(written, data):
    with journal_of(written) as journal:
        size = os.fstat(journal).st_size
        for _ in range(data.draw(st.integers(1, 3))):
            os.pwrite(journal, data.draw(st.binary(min_size=1, max_size=4)), data.draw(st.integers(0, size - 1)))
        position = data.draw(st.integers(-1, size + 1) | st.sampled_from([2**63, 2**70]))
        with contextlib.suppress(JhansiError):
            for frame in frames(journal, position):
                assert position < frame.position <= os.fstat(journal).st_size
                position = frame.position


# --- archives -------------------------------------------------------------------------------------------------

COMPRESSIONS = [
    lambda data: data,
    gzip.compress,
    lzma.compress,
    zstandard.ZstdCompressor(write_checksum=True).compress,
]
plain_names = st.sampled_from(["a", "b", "c", "a/b", "a/new", "b/new", "out", "out/new", "./a/", "out/secret"])
odd_parts = st.sampled_from(["a", "b", "..", ".", "", "out", "é", "\udcff", "x" * 255, "x" * 256])
odd_names = st.one_of(
    st.lists(odd_parts, min_size=1, max_size=4).map("/".join),
    st.sampled_from(
        ["OUTSIDE/secret", "OUTSIDE/new", "../outside/secret", "a/../../outside/new", "/", "a\0b", "a" * 5000]
    ),
    st.text(max_size=10).map(lambda text: text.replace("\0", "")),
)
names = seldom(odd_names, plain_names)
ways_out = st.sampled_from(["../outside", "OUTSIDE", "../outside/secret", "OUTSIDE/secret", "../outside/new", "../.."])
kinds = st.sampled_from(
    [tarfile.REGTYPE] * 4
    + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE] * 3
    + [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, b"Z", b"\0"]
)
pax = st.dictionaries(
    st.sampled_from(["path", "linkpath", "size", "mtime", "uid", "hdrcharset", "SCHILY.xattr.security.capability"])
    | st.sampled_from([f"GNU.sparse.{name}" for name in ("size", "map", "major", "minor", "name", "realsize")]),
    st.sampled_from(["1", "0", "-1", "1e9", "nan", "0,1,2", "OUTSIDE/secret", "../outside/new", "9" * 30, "BINARY", ""])
    | st.text(max_size=8).map(lambda text: text.replace("\0", "")),
    max_size=2,
)


WITH_CONTENT = {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, b"Z"}


class Member(typing.NamedTuple):
    name: str
    kind: bytes
    link: str
    content: bytes
    mode: int
    mtime: float
    size: int | None
    pax: dict


members = st.builds(
    Member,
    names,
    kinds,
    ways_out | names,
    st.binary(max_size=30),
    st.integers(0, 0o7777),
    seldom(st.sampled_from([0, -1, 2**40, 1e18]), st.just(1_600_000_000)),
    seldom(st.sampled_from([0, 1, 1 << 20, 1 << 40]), st.none()),
    seldom(pax, st.just({})),
)


planted = ways_out.map(lambda target: [Member("out", tarfile.SYMTYPE, target, b"", 0o777, 0, None, {})])
archives = st.builds(list.__add__, planted | st.just([]), st.lists(members, max_size=6))


def archive_of(members, outside):
    """A tar of these members. Sizes need not be those of contents, so that the next header may be anything."""
    buffer = io.BytesIO()
    for member in members:
        info = tarfile.TarInfo(member.name.replace("OUTSIDE", outside))
        info.linkname = member.link.replace("OUTSIDE", outside)
        info.type, info.mode, info.mtime = member.kind, member.mode, member.mtime
        content = member.content if member.kind in WITH_CONTENT else b""
        info.size = len(content) if member.size is None else member.size
        info.devmajor, info.devminor = 1, 3
        info.pax_headers = {name: value.replace("OUTSIDE", outside) for name, value in member.pax.items()}
        with contextlib.suppress(ValueError, UnicodeError):  # this one cannot be written down
            buffer.write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
            buffer.write(content + bytes(-len(content) % 512))
    return buffer.getvalue() + bytes(1024)


class Outside:
    """A folder of the host beside the one that is fuzzed, to be found as it was."""

    def __init__(self, above):
        self.path = os.path.join(above, "outside")
        os.mkdir(self.path)
        pathlib.Path(self.path, "secret").write_bytes(SECRET)
        self._before = self._state(above)
        self._above = above

    @staticmethod
    def _state(above):
        found = sorted(os.listdir(above)), sorted(os.listdir(os.path.join(above, "outside")))
        secret = os.stat(os.path.join(above, "outside", "secret"))
        return *found, secret.st_mode, secret.st_nlink, secret.st_mtime_ns, secret.st_size

    def is_untouched(self):
        return self._state(self._above) == self._before


def walked(folder):
    """Each path below a folder with its status."""
    for above, folders, files in os.walk(os.fsencode(folder)):
        for name in (*folders, *files):
            path = os.path.join(above, name)
            yield os.path.relpath(path, os.fsencode(folder)), os.lstat(path)


def remove(above):
    for folder, _, _ in os.walk(os.fsencode(above)):
        os.chmod(folder, 0o700)
    shutil.rmtree(above)


@contextlib.contextmanager
def beside_the_outside(scratch):
    """Within: a new empty folder, and what lies outside of it."""
    above = tempfile.mkdtemp(dir=scratch)
    try:
        os.mkdir(os.path.join(above, "inside"))
        yield os.path.join(above, "inside"), Outside(above)
    finally:
        remove(above)


@fuzz(250)
@given(members=archives, compress=st.sampled_from(COMPRESSIONS), data=st.data())
def test_no_archive_reaches_outside_or_leaves_anything_but_files_folders_and_links(scratch, members, compress, data):
    with beside_the_outside(scratch) as (folder, outside):
        packed = compress(archive_of(members, outside.path))
        if data.draw(st.integers(0, 3)) == 0:
            packed = damaged(data, packed)
        if data.draw(st.integers(0, 3)) == 0:
            packed = packed[: data.draw(st.integers(0, 2**16)) % (len(packed) + 1)]
        keep_modes, world_readable = data.draw(st.booleans()), data.draw(st.booleans())
        tree = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        before = os.listdir("/proc/self/fd")
        try:
            unpacked = unpack(
                decompressed(io.BytesIO(packed), "the archive"),
                tree,
                limits=ArchiveLimits(contents=1 << 20),
                keep_modes=keep_modes,
                world_readable=world_readable,
            )
        except JhansiError:
            unpacked = None
        finally:
            left_open = os.listdir("/proc/self/fd")
            os.close(tree)
        assert left_open == before
        found = [status for _, status in walked(folder)]
        assert outside.is_untouched()
        assert {stat.S_IFMT(status.st_mode) for status in found} <= {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK}
        assert not any(status.st_mode & (stat.S_ISUID | stat.S_ISGID) for status in found)
        own = [status for status in found if not stat.S_ISLNK(status.st_mode)]
        assert keep_modes or not any(status.st_mode & 0o022 for status in own)
        assert unpacked is None or unpacked.inert_count <= 2 * unpacked.members
        assert sum(status.st_size for status in found if stat.S_ISREG(status.st_mode)) <= 1 << 20


def state(folder):
    """All below a folder: its kinds, permissions, contents and link targets."""
    found = {}
    for path, status in walked(folder):
        whole, content = os.path.join(os.fsencode(folder), path), b""
        if stat.S_ISREG(status.st_mode) and status.st_mode & stat.S_IRUSR:
            content = pathlib.Path(os.fsdecode(whole)).read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(whole)
        found[path] = (status.st_mode, content)
    return found


@fuzz(120)
@given(members=archives)
def test_an_upload_of_an_archive_is_taken_whole_or_leaves_the_workspace_as_it_was(scratch, members):
    with beside_the_outside(scratch) as (folder, outside):
        inner = os.path.join(folder, "workspace")
        os.makedirs(os.path.join(inner, "a"))
        pathlib.Path(inner, "a", "b").write_bytes(b"old")
        pathlib.Path(inner, "b").write_bytes(b"old")
        os.symlink(outside.path, os.path.join(inner, "out"))
        os.symlink("a", os.path.join(inner, "c"))
        before = state(inner)
        with open_workspace(inner) as workspace:
            try:
                workspace.unarchive(io.BytesIO(archive_of(members, outside.path)))
            except JhansiError:
                assert state(inner) == before
        assert outside.is_untouched()
        assert set(os.listdir(folder)) <= {"workspace", ".writing"}
        kept = {stat.S_IFMT(mode) for mode, _ in state(inner).values()}
        assert kept <= {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK}


file_names = st.sampled_from(
    [b"a", b"b", b"-rf", b"\xff\xfe", "é".encode(), b"new\nline", b" ", b"n" * 255]
) | st.binary(min_size=1, max_size=8).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in {b".", b".."}
)
trees = st.recursive(
    st.tuples(st.just("file"), st.binary(max_size=2000), st.sampled_from([0o644, 0o600, 0o755, 0o444]))
    | st.tuples(st.just("link"), st.sampled_from([b"a", b"../b", b"\xff", b"x/y"])),
    lambda below: st.tuples(st.just("folder"), st.dictionaries(file_names, below, max_size=4)),
    max_leaves=10,
)


def grow(folder, tree):
    for name, (kind, value, *mode) in tree.items():
        path = os.path.join(folder, name)
        if kind == "folder":
            os.mkdir(path)
            grow(path, value)
        elif kind == "link":
            os.symlink(value, path)
        else:
            pathlib.Path(os.fsdecode(path)).write_bytes(value)
            os.chmod(path, mode[0])


@fuzz(80)
@given(tree=st.dictionaries(file_names, trees, max_size=5))
def test_a_workspace_packed_and_unpacked_is_the_same(scratch, tree):
    with beside_the_outside(scratch) as (folder, _):
        first, second = (os.path.join(folder, name, "workspace") for name in ("first", "second"))
        os.makedirs(first), os.makedirs(second)
        grow(os.fsencode(first), tree)
        with open_workspace(first) as source, open_workspace(second) as target:
            target.unarchive(io.BytesIO(b"".join(source.archive())))
        assert state(second) == state(first)


# --- paths ----------------------------------------------------------------------------------------------------

path_parts = st.one_of(
    st.sampled_from(["a", "b", "new", "out", "secret", "link", "round", "..", ".", "", "workspace", "/workspace"]),
    st.sampled_from(["\0", "é", "\udcff", "\ud800", " ", "\n", "~", "*", "n" * 255, "n" * 256, ".jhansi-0"]),
)
path_texts = st.one_of(
    st.lists(path_parts, max_size=6).map("/".join),
    st.lists(path_parts, max_size=3).map(lambda parts: "OUTSIDE/" + "/".join(parts)),
    st.sampled_from(["/", "//", "", ".", "a/" * 2500, "../outside/secret", "/proc/self/root/etc/passwd", "out/secret"]),
    any_text,
)
VERBS = ["write", "read", "open", "stat", "files", "open_program", "remove", "put", "get"]


def attempt(workspace, verb, path, host_folder):
    """What a verb gives back of the content of a file; b"" for what is none."""
    match verb:
        case "read":
            return b"".join(workspace.read(path))
        case "open":
            with workspace.open(path) as opened:
                return b"".join(opened.chunks())
        case "write":
            workspace.write(path, [b"written"])
        case "files":
            list(workspace.files(path, recursive=True))
        case "put":
            workspace.put(os.path.join(host_folder, "put"), path)
        case "get":
            target = os.path.join(host_folder, "got")
            shutil.rmtree(target, ignore_errors=True)
            os.mkdir(target)
            workspace.get(path, target)
            return b"".join(
                pathlib.Path(os.fsdecode(above), os.fsdecode(name)).read_bytes()
                for above, _, files in os.walk(os.fsencode(target))
                for name in files
                if not os.path.islink(os.path.join(above, name))
            )
        case _:
            getattr(workspace, verb)(path)
    return b""


@pytest.fixture(scope="module")
def host_folder(tmp_path_factory):
    """A folder of the caller's, with a file to put."""
    folder = tmp_path_factory.mktemp("host")
    (folder / "put").write_bytes(b"put")
    return str(folder)


@fuzz(250)
@given(steps=st.lists(st.tuples(st.sampled_from(VERBS), path_texts), min_size=1, max_size=8))
def test_no_path_leads_a_verb_out_of_the_workspace(scratch, host_folder, steps):
    with beside_the_outside(scratch) as (above, outside):
        folder = os.path.join(above, "workspace")
        os.makedirs(os.path.join(folder, "a", "b"))
        pathlib.Path(folder, "a", "secret").write_bytes(b"harmless")
        for name, target in (("out", outside.path), ("link", "a"), ("round", "round"), ("a/out", "../../../outside")):
            os.symlink(target, os.path.join(folder, name))
        with open_workspace(folder) as workspace:
            before = os.listdir("/proc/self/fd")
            for verb, text in steps:
                with contextlib.suppress(JhansiError):
                    given_back = attempt(workspace, verb, text.replace("OUTSIDE", outside.path), host_folder)
                    assert SECRET not in given_back
                assert os.listdir("/proc/self/fd") == before
        assert outside.is_untouched()
        assert set(os.listdir(above)) <= {"workspace", ".writing"}


@fuzz(200)
@given(path=path_texts, content=st.binary(max_size=100))
def test_what_was_written_is_what_is_read_back(scratch, path, content):
    with beside_the_outside(scratch) as (above, _):
        folder = os.path.join(above, "workspace")
        os.mkdir(folder)
        with open_workspace(folder) as workspace:
            try:
                written = workspace.write(path, [content])
            except JhansiError:
                assert os.listdir(folder) == []
                return
            assert b"".join(workspace.read(path)) == content
            assert workspace.stat(path) == written.info
            (found,) = [name for name, status in walked(folder) if stat.S_ISREG(status.st_mode)]
            assert os.fsdecode(found) == written.info.path
            workspace.remove(path)


@fuzz(200)
@given(text=path_texts)
def test_a_file_that_is_named_from_the_host_is_in_the_folder_or_not_run(scratch, text):
    with beside_the_outside(scratch) as (folder, outside):
        os.symlink("../outside", os.path.join(folder, "out"))
        with contextlib.suppress(JhansiError), open_workspace(folder) as workspace:
            path = inside(folder, text.replace("OUTSIDE", outside.path))
            assert workspace.open_program(path) is None, "there is nothing in it"


# --- seccomp profiles -----------------------------------------------------------------------------------------

# What libseccomp makes of a profile is run here, by an interpreter of the few instructions that it takes, and compared
# with the document. The constants are those of linux/filter.h, linux/seccomp.h and linux/audit.h.
LOAD, AND, RETURN, JUMP = 0x20, 0x54, 0x06, 0x05
CONDITIONS = {0x15: int.__eq__, 0x25: int.__gt__, 0x35: int.__ge__, 0x45: lambda word, bits: bool(word & bits)}
KILL_PROCESS, ERRNO, ALLOW = 0x8000_0000, 0x0005_0000, 0x7FFF_0000
ACTION = 0xFFFF_0000
AUDIT_ARCH = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}
FOREIGN = [0x4000_0003, 0x4000_0028, 0xC000_003E, 0xC000_00B7, 0, 0xFFFF_FFFF]
X32 = 0x4000_0000
SKIPPED = 0xFFFF_FFFF  # -1, which a tracer sets to have a call left out
every_machine = pytest.mark.parametrize("machine", AUDIT_ARCH)


def run_filter(program, data):
    """What a classic BPF program answers about a call; data is its struct seccomp_data."""
    instructions = list(struct.iter_unpack("<HBBI", program))
    place = accumulator = 0
    while True:
        code, if_true, if_false, operand = instructions[place]
        place += 1
        if code == LOAD:
            (accumulator,) = struct.unpack_from("<I", data, operand)
        elif code == AND:
            accumulator &= operand
        elif code == JUMP:
            place += operand
        elif code == RETURN:
            return operand
        else:
            place += if_true if CONDITIONS[code](accumulator, operand) else if_false


def answer_of(compiled, architecture, number, words):
    """What the kernel does with a call: the strictest answer of all, and of equal ones that of the last installed."""
    data = struct.pack("<IIQ6Q", number, architecture, 0x7FFF_0000_1234, *words)
    answers = [run_filter(program, data) for program in reversed(compiled.programs)]
    return min(answers, key=lambda answer: (answer & ACTION) - (1 << 32) * (answer >> 31))


def holds(comparison, words):
    word, value, second = words[comparison["index"]], comparison["value"], comparison.get("valueTwo", 0)
    return {
        "SCMP_CMP_NE": word != value,
        "SCMP_CMP_LT": word < value,
        "SCMP_CMP_LE": word <= value,
        "SCMP_CMP_EQ": word == value,
        "SCMP_CMP_GE": word >= value,
        "SCMP_CMP_GT": word > value,
        "SCMP_CMP_MASKED_EQ": word & value == second,
    }[comparison["op"]]


def meant(profile, name, words):
    """The answers that a profile may mean, read as it stands there: of several rules the refusal wins."""
    rules = [rule for rule in profile["syscalls"] if name in rule["names"]]
    matching = [rule for rule in rules if all(holds(comparison, words) for comparison in rule.get("args", []))]
    refusals = {ERRNO | rule.get("errnoRet", 1) for rule in matching if rule["action"] == "SCMP_ACT_ERRNO"}
    default = ERRNO | profile.get("defaultErrnoRet", 1)
    allowed = {name for rule in profile["syscalls"] for name in rule["names"] if rule["action"] == "SCMP_ACT_ALLOW"}
    if name == "seccomp" and name not in allowed:  # two filters are installed, and the first must not refuse the second
        return refusals | {default}
    if name == "execve" and not allowed & {"execve", "execveat"}:  # but for the program itself; Landlock knows which
        return refusals | {ALLOW} if refusals <= {default} else refusals
    if refusals:
        return refusals
    return {ALLOW if any(rule["action"] == "SCMP_ACT_ALLOW" for rule in matching) else default}


def numbers_on(machine):
    """The names of the calls of an architecture, by number."""
    architecture = getattr(pyseccomp.Arch, machine.upper())
    names = {}
    for number in range(600):
        with contextlib.suppress(ValueError):
            names[number] = pyseccomp.resolve_syscall(architecture, number).decode()
    return names


NAMES = {machine: numbers_on(machine) for machine in AUDIT_ARCH}
POOL = ["read", "write", "socket", "ioctl", "clone", "kill", "prlimit64", "openat", "getpid", "execve", "execveat"]
ODD = ["seccomp", "no_such_call", "socketcall", "send", "stat64", "ipc"]  # special, or of other architectures
WORDS = [0, 1, 2, 1000, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
words64 = st.sampled_from(WORDS) | unsigned
places = st.integers(0, 5)
masked = st.builds(
    lambda index, mask, bits: {"index": index, "op": "SCMP_CMP_MASKED_EQ", "value": mask, "valueTwo": mask & bits},
    places,
    words64,
    words64,
)
unmasked = st.fixed_dictionaries(
    {
        "index": places,
        "op": st.sampled_from([f"SCMP_CMP_{name}" for name in ("NE", "LT", "LE", "EQ", "GE", "GT")]),
        "value": words64,
    },
    optional={"valueTwo": words64},
)
comparisons = masked | unmasked
rules = st.fixed_dictionaries(
    {
        "names": st.lists(st.sampled_from(POOL) | st.sampled_from(ODD), min_size=1, max_size=3),
        "action": st.sampled_from(["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"]),
    },
    optional={
        "errnoRet": st.integers(1, 4094),
        "args": st.lists(comparisons, max_size=3, unique_by=lambda comparison: comparison["index"]),
    },
)
profiles = st.fixed_dictionaries(
    {"defaultAction": st.just("SCMP_ACT_ERRNO"), "syscalls": st.lists(rules, max_size=8)},
    optional={"defaultErrnoRet": st.integers(1, 4094)},
)


def compiled_to(profile, machine):
    """What a profile is compiled to; None where it is refused."""
    with contextlib.suppress(InvalidRequestError):
        return compiled_for(read_profile(json.dumps(profile).encode(), "drawn"), "drawn", machine)


def assert_means_what_it_says(profile, compiled, machine, chance, count):
    """Ask about calls, most of them such that a rule names, with arguments that are next to what it compares with."""
    ruled = {name for rule in profile["syscalls"] for name in rule["names"]}
    numbers = [number for number, name in NAMES[machine].items() if name in ruled.union(POOL)]
    seen = [comparison for rule in profile["syscalls"] for comparison in rule.get("args", [])]
    values = [comparison.get(field, 0) for comparison in seen for field in ("value", "valueTwo")]
    for _ in range(count):
        number = chance.choice(numbers) if chance.random() < 0.8 else chance.randrange(700)
        words = [
            chance.choice([*values, *WORDS, chance.getrandbits(64)]) + chance.choice([0, 0, 0, 1, -1]) & 2**64 - 1
            for _ in range(6)
        ]
        answer = answer_of(compiled, AUDIT_ARCH[machine], number, words)
        assert answer in meant(profile, NAMES[machine].get(number), words), (number, words)


@every_machine
@fuzz(400)
@given(profile=profiles, chance=st.randoms(use_true_random=True))
def test_a_profile_does_what_it_says(machine, profile, chance):
    compiled = compiled_to(profile, machine)
    if compiled is not None:
        assert_means_what_it_says(profile, compiled, machine, chance, 100)


@every_machine
@fuzz(150)
@given(name=st.sampled_from(["read\0", "", "READ", " read", "read ", "0", "-1", *ODD]) | any_text)
def test_a_profile_that_allows_a_name_allows_no_call_of_another(machine, name):
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": [name], "action": "SCMP_ACT_ALLOW"}]}
    compiled = compiled_to(profile, machine)
    for number in range(600 if compiled else 0):
        assert answer_of(compiled, AUDIT_ARCH[machine], number, [0] * 6) in meant(
            profile, NAMES[machine].get(number), [0] * 6
        )


@every_machine
@fuzz(100)
@given(index=places, mask=words64, value=words64, action=st.sampled_from(["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"]))
def test_a_comparison_that_cannot_match_does_not(machine, index, mask, value, action):
    never = {"index": index, "op": "SCMP_CMP_MASKED_EQ", "value": mask, "valueTwo": value}
    rule = {"names": ["read"], "action": action, "args": [never]}
    allowed = {"names": ["read", "write"], "action": "SCMP_ACT_ALLOW"}
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [rule, *[allowed] * (action == "SCMP_ACT_ERRNO")]}
    compiled = compiled_to(profile, machine)
    if compiled is not None:
        assert_means_what_it_says(profile, compiled, machine, random.Random(1), 100)


@pytest.fixture(scope="module", params=["default", "strict"])
def shipped(request):
    """A profile of the package, and what it is compiled to for each architecture."""
    text = pathlib.Path(CHECKOUT, "seccomp", f"{request.param}.json").read_bytes()
    compiled = {machine: compiled_for(read_profile(text, "shipped"), "shipped", machine) for machine in AUDIT_ARCH}
    return json.loads(text), compiled


@every_machine
def test_a_shipped_profile_does_what_it_says(shipped, machine):
    profile, compiled = shipped
    assert_means_what_it_says(profile, compiled[machine], machine, random.Random(1), EXAMPLES or 20_000)


@every_machine
@fuzz(80)
@given(
    profile=profiles,
    numbers=st.lists(st.integers(0, 2**32 - 1), min_size=5, max_size=5),
    words=st.tuples(*[words64] * 6),
)
def test_a_call_of_another_architecture_ends_the_process_under_any_profile(machine, profile, numbers, words):
    compiled = compiled_to(profile, machine)
    for number in numbers if compiled else []:
        for architecture in FOREIGN:
            if architecture != AUDIT_ARCH[machine]:
                assert answer_of(compiled, architecture, number, words) == KILL_PROCESS
        if machine == "x86_64" and number | X32 != SKIPPED:
            assert answer_of(compiled, AUDIT_ARCH[machine], number | X32, words) == KILL_PROCESS


@fuzz(250)
@given(text=any_bytes | any_text.map(lambda text: text.encode(errors="surrogatepass")), data=st.data())
def test_what_is_no_profile_is_refused(text, data):
    record = data.draw(st.sampled_from([spec.SeccompProfile, spec.SeccompRule, spec.SeccompArgument]))
    part = data.draw(documents(record))
    rule = part if record is spec.SeccompRule else {"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [part]}
    profile = part if record is spec.SeccompProfile else {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [rule]}
    for candidate in (text, json.dumps(profile).encode()):
        with contextlib.suppress(InvalidRequestError):
            compiled = compiled_for(read_profile(candidate, "drawn"), "drawn", "x86_64")
            assert all(len(program) % 8 == 0 and len(program) <= 8 * 4096 for program in compiled.programs)
