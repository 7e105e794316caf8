"""The audit log under use: many writers, killed writers, full disks, lost power; what is read back is what was written.

What happens to a log that somebody changes is in attacks/test_audit_forgery.py.
"""

import errno
import hashlib
import io
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from jhansi_runtime.audit import AuditLog
from jhansi_runtime.errors import AuditError, InvalidRequestError

CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# Appends argv[2] records, or goes on until it is killed when that is 0. Each is on stdout once append has returned.
WRITER = """
import itertools, os, sys
from jhansi_runtime.audit import AuditLog

log = AuditLog(sys.argv[1])
for number in range(int(sys.argv[2])) if int(sys.argv[2]) else itertools.count():
    record = log.append("exec.start", actor=f"writer {os.getpid()}", number=number, filler="x" * int(sys.argv[3]))
    os.write(1, b"%d\\n" % record["seq"])
"""


def writer(directory, *, count=0, filler=10, **options):
    argv = [sys.executable, "-c", WRITER, str(directory), str(count), str(filler)]
    environment = {**os.environ, "PYTHONPATH": CHECKOUT}
    return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, **options)


def seqs(log):
    return [record["seq"] for record in log.records()]


def assert_sound(log):
    found = log.verify()
    assert found.ok, found
    assert seqs(log) == list(range(1, found.records + 1))


@pytest.fixture
def log(tmp_path):
    with_records = AuditLog(str(tmp_path / "audit"))
    yield with_records
    with_records.close()


@pytest.fixture
def idle():
    """`idle()` waits for the thread that flushes to end: Python warns of a fork beside a thread."""
    before = len(threads())
    return lambda: eventually(lambda: len(threads()) == before)


def forked(work):
    """Do it in a child, which a minute ends at the latest; its wait status."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def head_of(log):
    with open(log._where.head, "rb") as file:
        return json.loads(file.read())


def change_head(log, **fields):
    with open(log._where.head, "r+b") as file:
        file.write(json.dumps(head_of(log) | fields).encode().ljust(511) + b"\n")


# --- one record ----------------------------------------------------------------------------------------------


def test_a_record_is_one_line_with_its_fields_in_reading_order(log):
    written = log.append(
        "exec.start", actor="uid:1000", sandbox_id="sb", run_id="run", argv=["a", "b"], limits={"x": 1.5}
    )

    with open(log._where.log, encoding="ascii") as file:
        lines = file.read().splitlines()

    assert [json.loads(line) for line in lines] == [written]
    assert list(json.loads(lines[0])) == [
        *("seq", "time", "event", "actor", "sandbox_id", "run_id"),
        *("argv", "limits", "prev", "hash"),
    ]


def test_the_hash_can_be_computed_by_anyone_who_read_the_contract(log):
    first = log.append("sandbox.create", actor="me", name="caf\u00e9", nested={"z": 1, "a": [True, None]})
    second = log.append("sandbox.delete", actor="me")

    for record in (first, second):
        content = {name: value for name, value in record.items() if name != "hash"}
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")
        assert record["hash"] == hashlib.sha256(canonical).hexdigest()
    assert (first["prev"], second["prev"]) == ("0" * 64, first["hash"])


def test_a_name_of_any_bytes_comes_back_as_it_was(log):
    name = os.fsdecode(b"caf\xe9 \xff\n\"'\\\xf0\x9f\x98\x80")

    log.append("exec.start", actor="me", filename=name)

    assert os.fsencode(next(log.records())["filename"]) == os.fsencode(name)
    assert_sound(log)


def test_keys_that_json_changes_on_the_way_do_not_break_the_chain(log):
    log.append("exec.start", actor="me", odd={10: 1, 9: 2}, pair=("\ud83d\ude00", "x"))

    assert_sound(log)


def test_a_record_of_two_megabytes_is_kept_whole(log):
    log.append("exec.start", actor="me")
    log.append("exec.start", actor="me", argv=["x" * 2_000_000])
    log.append("exec.end", actor="me")

    assert [len(record.get("argv", [""])[0]) for record in log.records()] == [0, 2_000_000, 0]
    assert_sound(log)


def test_a_caller_cannot_set_what_the_log_sets(log):
    with pytest.raises(ValueError, match="seq"):
        log.append("exec.start", actor="me", seq=7)


def test_nobody_else_may_read_the_log(log):
    log.append("exec.start", actor="me")

    assert stat.S_IMODE(os.stat(log._where.directory).st_mode) == 0o700
    assert [stat.S_IMODE(os.stat(path).st_mode) for path in (log._where.log, log._where.head)] == [0o600, 0o600]


def test_no_descriptor_of_the_log_reaches_a_program_that_is_started(log):
    log.append("exec.start", actor="me")

    listing = subprocess.run(["ls", "-l", "/proc/self/fd"], close_fds=False, capture_output=True, text=True, check=True)

    assert log._where.directory not in listing.stdout


def test_looking_at_a_log_that_was_never_begun_makes_none(log):
    assert (list(log.records()), log.verify().ok, log.anchor()) == ([], True, "0:" + "0" * 64)
    assert log.unended(["run_1"]) == set()
    assert not os.path.exists(log._where.directory)


# --- many writers, and their deaths --------------------------------------------------------------------------


def test_eight_processes_append_at_once_and_no_record_is_lost_or_doubled(log):
    writers = [writer(log._where.directory, count=200) for _ in range(8)]
    acknowledged = [int(line) for each in writers for line in each.communicate()[0].split()]

    assert [each.returncode for each in writers] == [0] * 8
    assert sorted(acknowledged) == list(range(1, 1601))
    assert log.verify()[:2] == (True, 1600)
    assert len({(record["actor"], record["number"]) for record in log.records()}) == 1600


def test_threads_and_forked_children_share_one_object(log, idle):
    log.append("first", actor="me")
    idle()

    def append_fifty():
        for _ in range(50):
            log.append("exec.start", actor="me")

    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            append_fifty()
            os._exit(0)
        children.append(child)
    threads = [threading.Thread(target=append_fifty) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert log.verify()[:2] == (True, 301)


def test_killing_writers_at_any_moment_loses_no_record_whose_append_returned(log):
    chance = random.Random(0)
    acknowledged = set()
    for _ in range(20):
        writers = [writer(log._where.directory, filler=filler) for filler in (10, 200_000)]
        acknowledged |= {int(each.stdout.readline()) for each in writers}
        time.sleep(chance.uniform(0, 0.03))
        for each in writers:
            each.send_signal(signal.SIGKILL)
            acknowledged |= {
                int(line) for line in each.communicate()[0].splitlines(keepends=True) if line[-1:] == b"\n"
            }
        assert log.verify().ok

    log.append("exec.start", actor="after")  # mends what the last kill left
    assert_sound(log)
    assert acknowledged <= set(seqs(log))


def test_records_written_before_a_kill_that_came_before_the_head_was_written_are_kept(log):
    log.append("one", actor="me")
    head = head_of(log)
    log.append("two", actor="me")
    log.append("three", actor="me")
    change_head(log, **head)

    assert log.verify().ok
    log.append("four", actor="me")
    assert [record["event"] for record in log.records()] == ["one", "two", "three", "four"]
    assert_sound(log)


@pytest.mark.parametrize("torn", [b"{", b'{"seq":2,"time":"2026-', b"\0" * 5000])
def test_half_a_record_at_the_end_is_cut_off_and_said_so(log, torn):
    log.append("one", actor="me")
    with open(log._where.log, "ab") as file:
        file.write(torn)

    assert log.verify().ok
    assert [record["event"] for record in log.records()] == ["one"]
    log.append("two", actor="me")

    assert [record["event"] for record in log.records()] == ["one", "audit.repair", "two"]
    assert [record["cut_bytes"] for record in log.records() if record["event"] == "audit.repair"] == [len(torn)]
    assert_sound(log)


@pytest.mark.parametrize("call", ["write", "pwrite", "ftruncate"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_repair_that_is_killed_at_any_step_is_recorded_by_the_next(log, idle, monkeypatch, call, when):
    log.append("one", actor="me")
    idle()
    with open(log._where.log, "ab") as file:
        file.write(b'{"seq":2,"time"')

    child = os.fork()
    if child == 0:
        genuine = getattr(os, call)

        def die(*arguments):
            if when == "after":
                genuine(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(os, call, die)
        log.append("two", actor="me")
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    log.append("two", actor="me")

    found = [(record["event"], record.get("cut_bytes")) for record in log.records()]
    # Killed after the repair's record and before the head, it is recorded twice: better than not at all.
    assert found in (
        [("one", None), ("audit.repair", 15), ("two", None)],
        [("one", None), ("audit.repair", 15), ("audit.repair", 15), ("two", None)],
    )
    assert_sound(log)


# --- the disk ------------------------------------------------------------------------------------------------

# A log on a disk of 128 KiB, in a namespace of its own: appends until it is full, makes room, appends again.
FULL_DISK = """
import json, os, sys
from jhansi_runtime.audit import AuditLog
from jhansi_runtime.errors import AuditError

os.chdir(sys.argv[1])
ballast = os.open("ballast", os.O_WRONLY | os.O_CREAT)
os.write(ballast, bytes(16384))
log = AuditLog(os.path.join(sys.argv[1], "audit"))
acknowledged, refusals = [], []
while len(refusals) < 3:
    try:
        acknowledged.append(log.append("exec.start", actor="me", filler="x" * 3000)["seq"])
    except AuditError as error:
        refusals.append(str(error))
full = log.verify()
os.ftruncate(ballast, 0)
acknowledged.append(log.append("exec.start", actor="me", filler="x" * 3000)["seq"])
log.close()
found = [record["seq"] for record in log.records()]
print(json.dumps([acknowledged, found, full, log.verify(), refusals]))
"""


def test_a_full_disk_refuses_the_record_and_leaves_the_log_whole(tmp_path):
    mount = f"mount -t tmpfs -o size=128k none '{tmp_path}' && exec \"$@\""
    argv = ["unshare", "-Urm", "sh", "-c", mount, "sh", sys.executable, "-c", FULL_DISK, str(tmp_path)]
    answer = subprocess.run(
        argv, env={**os.environ, "PYTHONPATH": CHECKOUT}, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr

    acknowledged, found, full, after, refusals = json.loads(answer.stdout)
    assert len(acknowledged) > 10
    assert acknowledged == found == list(range(1, len(found) + 1))
    assert (full[0], after[0]) == (True, True)
    assert all("No space left on device; free some space" in refusal for refusal in refusals)


def test_a_write_that_stops_half_way_leaves_nothing_of_its_record(log):
    log.append("one", actor="me")
    limited = (
        "import resource, sys; from jhansi_runtime.audit import AuditLog;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000));"
        "AuditLog(sys.argv[1]).append('two', actor='me', filler='x' * 20_000)"
    )
    environment = {**os.environ, "PYTHONPATH": CHECKOUT}
    argv = [sys.executable, "-c", limited, log._where.directory]
    answer = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)

    assert "AuditError: the audit log" in answer.stderr
    assert "File too large" in answer.stderr
    log.append("three", actor="me")
    assert [record["event"] for record in log.records()] == ["one", "three"]
    assert_sound(log)


def test_a_log_that_cannot_be_made_refuses_with_the_remedy(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(AuditError, match="cannot be written: Not a directory") as refusal:
        AuditLog(str(tmp_path / "file" / "audit")).append("exec.start", actor="me")
    assert refusal.value.remedy


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_log_that_may_not_be_written_refuses_with_the_remedy(log):
    log.append("one", actor="me")
    log.close()
    os.chmod(log._where.log, 0o400)

    with pytest.raises(AuditError, match="Permission denied; give this user"):
        log.append("two", actor="me")
    assert_sound(log)


@pytest.fixture
def flushes(monkeypatch):
    """The thread of each flush of a log, as it begins. What `flushes.error` holds is raised in place of it."""

    class Flushes(list):
        error = None

    flushes, genuine = Flushes(), os.fdatasync

    def fdatasync(descriptor):
        flushes.append(threading.get_ident())
        if flushes.error is not None:
            raise flushes.error
        genuine(descriptor)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    return flushes


def eventually(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.005)


def threads():
    return os.listdir("/proc/self/task")


def test_with_always_a_record_is_on_the_disk_when_append_returns(tmp_path, flushes):
    log = AuditLog(str(tmp_path / "audit"), fsync="always")
    for number in range(3):
        log.append("exec.start", actor="me")

        assert head_of(log)["flushed"] == head_of(log)["last"]
        assert flushes == [threading.get_ident()] * (number + 1)


def test_in_groups_nobody_waits_for_the_disk_and_nobody_need_do_more(log, flushes):
    for _ in range(5):
        log.append("exec.start", actor="me")

    eventually(lambda: head_of(log)["flushed"] == head_of(log)["last"])
    assert threading.get_ident() not in flushes
    assert head_of(log)["last"][0] == 5


def test_records_that_come_during_a_flush_are_flushed_after_it(log, monkeypatch):
    late, genuine = iter(["late"]), os.fdatasync

    def fdatasync(descriptor):
        for event in late:
            log.append(event, actor="me")
        genuine(descriptor)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    log.append("first", actor="me")

    eventually(lambda: head_of(log)["flushed"][0] == 2)


def test_a_log_that_is_idle_has_no_thread(log, idle):
    for _ in range(3):
        log.append("exec.start", actor="me")
        idle()

    assert head_of(log)["flushed"] == head_of(log)["last"]


def test_a_flush_that_fails_is_told_by_the_next_append_whose_record_is_kept(log, idle, flushes):
    flushes.error = OSError(errno.EIO, os.strerror(errno.EIO))
    log.append("one", actor="me")
    idle()

    flushes.error = None
    with pytest.raises(AuditError, match="cannot be written: Input/output error; check the disk"):
        log.append("two", actor="me")
    log.append("three", actor="me")
    log.close()
    assert seqs(log) == [1, 2, 3]


@pytest.mark.parametrize("verb", ["flush", "close"])
def test_a_flush_that_fails_is_told_at_the_latest_by_close(log, idle, flushes, verb):
    flushes.error = OSError(errno.EIO, os.strerror(errno.EIO))
    log.append("one", actor="me")
    idle()

    flushes.error = None  # the second attempt would find nothing wrong: the kernel tells of each failure once
    with pytest.raises(AuditError, match="Input/output error"):
        getattr(log, verb)()


def test_close_brings_the_rest_to_the_disk_and_the_log_can_go_on(log, idle, flushes):
    log.append("one", actor="me")
    log.close()

    assert head_of(log)["flushed"] == head_of(log)["last"]
    idle()
    assert len(flushes) == 1
    log.append("two", actor="me")
    assert_sound(log)


def test_closing_what_is_flushed_flushes_nothing(log, flushes):
    log.append("one", actor="me")
    log.flush()
    log.close()

    assert len(flushes) == 1


def test_a_forked_child_flushes_what_it_has_written(log, idle):
    log.append("one", actor="me")
    idle()

    def child():
        log.append("two", actor="me")
        eventually(lambda: head_of(log)["flushed"][0] == 2)

    assert forked(child) == 0


def test_a_child_forked_while_the_log_is_in_use_can_use_it(log, idle):
    log.append("one", actor="me")
    idle()
    (appender,) = log._appenders.values()
    with appender._mutex, appender._flushing:
        assert forked(lambda: log.append("two", actor="me")) == 0
    assert_sound(log)


# Every thread is refused, as at the limit of processes.
THREADLESS = """
import resource, sys
from jhansi_runtime.audit import AuditLog

resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
log = AuditLog(sys.argv[1])
log.append("one", actor="me")
print(open(sys.argv[1] + "/head").read())
"""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may have any number of processes")
def test_where_no_thread_can_be_started_append_flushes(log):
    environment = {**os.environ, "PYTHONPATH": CHECKOUT}
    argv = [sys.executable, "-c", THREADLESS, log._where.directory]
    head = json.loads(subprocess.run(argv, env=environment, capture_output=True, text=True, check=True).stdout)

    assert head["flushed"] == head["last"]


def test_records_that_a_power_cut_took_are_counted_by_the_next_append(log):
    log.append("one", actor="me")
    log.flush()
    flushed = os.path.getsize(log._where.log)
    log.append("two", actor="me")
    log.append("three", actor="me")
    os.truncate(log._where.log, flushed + 100)
    change_head(log, boot="another")

    assert log.verify().seq == 2
    log.append("four", actor="me")

    repair = [record for record in log.records() if record["event"] == "audit.repair"]
    assert [(record["cut_bytes"], record["lost_records"]) for record in repair] == [(100, 2)]
    assert [record["event"] for record in log.records()] == ["one", "audit.repair", "four"]
    assert_sound(log)


def test_a_restart_explains_no_loss_of_what_was_on_the_disk(log):
    log.append("one", actor="me")
    length = os.path.getsize(log._where.log)
    log.append("two", actor="me")
    log.flush()
    os.truncate(log._where.log, length)
    change_head(log, boot="another")

    with pytest.raises(AuditError, match="was cut off: record 2"):
        log.append("three", actor="me")
    with suppress(AuditError):  # a flush that came after the cut
        log.close()


def test_a_restart_explains_no_loss_of_what_was_written_since(log):
    log.append("one", actor="me")
    change_head(log, boot="another")
    log.append("two", actor="me")
    length = os.path.getsize(log._where.log)
    log.append("three", actor="me")
    os.truncate(log._where.log, length)

    with pytest.raises(AuditError, match="was cut off: record 3"):
        log.append("four", actor="me")
    with pytest.raises(AuditError, match="was cut off: record 3"):
        log.close()


# --- reading -------------------------------------------------------------------------------------------------


def test_records_are_chosen_by_sandbox_by_run_and_by_time(log):
    for sandbox, run in (("sb_a", "run_1"), ("sb_b", "run_2"), ("sb_a", "run_3")):
        log.append("exec.start", actor="me", sandbox_id=sandbox, run_id=run)
    times = [record["time"] for record in log.records()]

    assert [record["run_id"] for record in log.records(sandbox_id="sb_a")] == ["run_1", "run_3"]
    assert [record["sandbox_id"] for record in log.records(run_id="run_2")] == ["sb_b"]
    assert [record["run_id"] for record in log.records(since=times[1])] == ["run_2", "run_3"]
    assert [record["run_id"] for record in log.records(since=times[2].replace("Z", "+00:00"))] == ["run_3"]
    assert list(log.records(since="2999-01-01")) == []
    assert len(list(log.records(since="2001-01-01T00:00:00+05:30"))) == 3


def test_a_time_that_is_none_is_refused(log):
    with pytest.raises(InvalidRequestError, match="not an instant: 'yesterday'; write it as"):
        next(log.records(since="yesterday"))


def test_follow_goes_on_with_what_others_append(log):
    log.append("exec.start", actor="me")
    followed = log.records(follow=True)
    assert next(followed)["seq"] == 1

    with writer(log._where.directory, count=3, filler=100_000):
        assert [next(followed)["seq"] for _ in range(3)] == [2, 3, 4]


def test_runs_without_an_end_are_found_among_those_asked_for(log):
    for event, run in (("start", "a"), ("start", "b"), ("end", "a"), ("start", "c"), ("start", "d"), ("end", "d")):
        log.append(f"exec.{event}", actor="me", run_id=f"run_{run}")
    log.append("files.write", actor='"event":"exec.end"', run_id="run_b")

    assert log.unended(["run_a", "run_b", "run_never", "run_d"]) == {"run_b"}


def test_export_copies_all_lines_or_a_range_unchanged(log):
    for _ in range(5):
        log.append("exec.start", actor="me")
    with open(log._where.log, "rb") as file:
        lines = file.readlines()
    every, some = io.BytesIO(), io.BytesIO()

    assert (log.export(every), log.export(some, first=2, last=4)) == (5, 3)
    assert every.getvalue() == b"".join(lines)
    assert some.getvalue() == b"".join(lines[1:4])


def test_a_line_that_is_no_record_stops_a_reader_and_is_named(log):
    log.append("exec.start", actor="me")
    log.close()
    with open(log._where.log, "ab") as file:
        file.write(b"[]\n")

    with pytest.raises(AuditError, match=r"line 2 of .* is not a record; run `jhansi-run audit verify`"):
        list(log.records())
