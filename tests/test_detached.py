"""The store of detached runs: what a job wrote is read back whole, as it came, whoever was killed meanwhile."""

import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest
from conftest import CHECKOUT

from jhansi_runtime import detached
from jhansi_runtime.detached import DetachedRuns
from jhansi_runtime.errors import ConflictError, InvalidRequestError, JhansiError, NotFoundError
from jhansi_runtime.runs import new_run_id
from jhansi_runtime.spec import ExecResult, Limits, to_json

DIGITS = "0" * 22  # of a run id
LONGEST = 64 * 1024  # bytes of a frame in the journal

# Writes numbered lines to argv[2]'s journal, each as long as it says, until it is killed.
WRITER = """
import os, sys
from jhansi_runtime.detached import DetachedRuns

journal = DetachedRuns(sys.argv[1]).begin(sys.argv[2], "sb_1", "key_1")
os.write(1, b"begun\\n")
number = 0
while True:
    length = number * 7919 % 10_000 + 20
    journal.write(("stdout", "stderr")[number % 2], (b"%08d %08d " % (number, length)).ljust(length, b"x"))
    number += 1
"""

# Writes what comes on stdin, a line at a time, and ends.
COPIER = """
import sys
from jhansi_runtime.detached import DetachedRuns
from jhansi_runtime.spec import ExecResult, from_json

with DetachedRuns(sys.argv[1]).begin(sys.argv[2], "sb_1", None) as journal:
    print("begun", flush=True)
    for line in sys.stdin:
        journal.write("stdout", line.encode())
    journal.end(from_json(sys.argv[3], ExecResult, where="argv"))
"""

FOLLOWER = """
import resource, sys
from jhansi_runtime.detached import DetachedRuns

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

runs, count = DetachedRuns(sys.argv[1]), 0
before = peak()
for frame in runs.follow(sys.argv[2]):
    count += len(frame.data)
for piece in runs.read(sys.argv[2], "stderr", 1000):
    count += len(piece)
print(count, peak() - before)
"""

# Fills the disk under argv[1], and then ends its run.
FILLER = """
import os, sys
from contextlib import suppress
from jhansi_runtime.detached import DetachedRuns
from jhansi_runtime.errors import DiskLimitError
from jhansi_runtime.spec import ExecResult, from_json

runs, run_id = DetachedRuns(sys.argv[1]), sys.argv[2]
with runs.begin(run_id, "sb_1", None) as journal:
    for _ in range(1000):
        try:
            journal.write("stdout", b"x" * 10_001)
        except DiskLimitError as error:
            print(error.remedy)
            break
    with suppress(OSError), open(os.path.join(sys.argv[1], "filler"), "wb", buffering=0) as filler:
        while filler.write(bytes(512)):
            pass
    try:
        journal.write("stderr", b"")
        journal.write("stderr", b"x")
    except DiskLimitError:
        print("still full")
    journal.end(from_json(sys.argv[3], ExecResult, where="argv"))
print(runs.find(run_id).status, {len(frame.data) for frame in runs.frames(run_id)})
"""


def python(program, *arguments, **options):
    environment = {**os.environ, "PYTHONPATH": CHECKOUT}
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, **options
    )


def result(run_id, **changes):
    fields = {
        "run_id": run_id,
        "sandbox_id": "sb_1",
        "status": "exited",
        "exit_code": 3,
        "signal": None,
        "stdout": None,
        "stderr": None,
        "stdout_bytes": 5,
        "stderr_bytes": 0,
        "stdout_truncated": False,
        "stderr_truncated": False,
        "wall_time_ms": 1.5,
        "cpu_time_ms": 1.0,
        "memory_peak_bytes": 1000,
        "timed_out": False,
        "oom_killed": False,
        "message": "exited with status 3",
        "enforcement": "watchdog",
        "rootfs": "sha256:0",
        "limits": Limits(),
        "started_at": "2026-01-01T00:00:00.000000Z",
    }
    return ExecResult(**(fields | changes))


@pytest.fixture
def runs(tmp_path):
    return DetachedRuns(str(tmp_path / "detached"))


@pytest.fixture
def journal(runs):
    with runs.begin(new_run_id(), "sb_1", "key_1") as journal:
        yield journal


def ended_run(runs, *, sandbox_id="sb_1", owner=None, ended_ago=0.0, output=b"hello"):
    run_id = new_run_id()
    with runs.begin(run_id, sandbox_id, owner) as journal:
        journal.write("stdout", output)
        journal.end(result(run_id))
    moment = time.time() - ended_ago
    os.utime(os.path.join(runs._directory, run_id, "result.json"), (moment, moment))
    return run_id


def lost_run(runs):
    run_id = new_run_id()
    with runs.begin(run_id, "sb_1", None) as journal:
        journal.write("stdout", b"hello")
    return run_id


def content(frames):
    return [(frame.stream, frame.data) for frame in frames]


def names(runs):
    return sorted(os.listdir(runs._directory))


# --- what was written is read -----------------------------------------------------------------------------


def test_both_streams_come_back_in_the_order_in_which_they_were_written(runs, journal):
    written = [(("stdout", "stderr")[number % 3 == 0], b"%d\n" % number) for number in range(5000)]
    for stream, data in written:
        journal.write(stream, data)

    assert content(runs.frames(journal.info.run_id)) == written


def test_a_write_longer_than_a_frame_is_cut_into_frames_and_nothing_is_lost(runs, journal):
    data = random.Random(1).randbytes(1_000_003)
    journal.write("stderr", data)
    journal.write("stdout", b"after")
    *frames, last = runs.frames(journal.info.run_id)

    assert b"".join(frame.data for frame in frames) == data
    assert {frame.stream for frame in frames} == {"stderr"}
    assert max(len(frame.data) for frame in frames) <= LONGEST
    assert (last.stream, last.data) == ("stdout", b"after")


def test_a_reader_that_resumes_after_any_frame_gets_exactly_the_rest(runs, journal):
    lengths = random.Random(2)
    for number in range(200):
        journal.write(("stdout", "stderr")[number % 2], bytes([number]) * lengths.choice([1, 8, 100, 30_000, 65_528]))
    frames = list(runs.frames(journal.info.run_id))

    for index, frame in enumerate(frames):
        assert next(runs.frames(journal.info.run_id, frame.position), None) == (*frames[index + 1 :], None)[0]
    for frame in frames[::25]:
        assert list(runs.frames(journal.info.run_id, frame.position)) == frames[frames.index(frame) + 1 :]


def test_a_reader_that_resumes_anywhere_else_is_told_so(runs, journal):
    journal.write("stdout", b"\0" * 5 + b"\0\5\1hello" * 3)  # a payload that looks like frames
    journal.write("stderr", b"there")
    positions = {0, *(frame.position for frame in runs.frames(journal.info.run_id))}
    size = max(positions)

    # Where less than a header is left, half a frame may have come; there is nothing to give yet.
    for position in {-1, *range(size - 7), size + 1, 2**70} - positions:
        with pytest.raises(InvalidRequestError, match="no position"):
            list(runs.frames(journal.info.run_id, position))


def test_one_stream_is_read_from_any_of_its_bytes(runs, journal):
    for number in range(100):
        journal.write("stdout", b"%d out\n" % number)
        journal.write("stderr", b"%d err\n" % number * 50)
    for stream, line in (("stdout", b"%d out\n"), ("stderr", b"%d err\n")):
        whole = b"".join(line % number * (1 if stream == "stdout" else 50) for number in range(100))
        for offset in (0, 1, 6, 7, 300, len(whole) - 1, len(whole), len(whole) + 5):
            pieces = list(runs.read(journal.info.run_id, stream, offset))
            assert b"".join(pieces) == whole[offset:]
            assert all(pieces)
    with pytest.raises(InvalidRequestError):
        next(runs.read(journal.info.run_id, "stdout", -1))


def test_two_readers_do_not_disturb_each_other_or_the_writer(runs, journal):
    first, second = runs.frames(journal.info.run_id), runs.frames(journal.info.run_id)
    journal.write("stdout", b"one")
    journal.write("stdout", b"two")

    assert next(first).data == b"one"
    assert [frame.data for frame in second] == [b"one", b"two"]
    journal.write("stdout", b"three")
    assert [frame.data for frame in first] == [b"two", b"three"]


def test_a_reader_of_what_is_empty_gets_nothing(runs, journal):
    journal.write("stdout", b"")

    assert list(runs.frames(journal.info.run_id)) == []
    assert list(runs.read(journal.info.run_id, "stderr")) == []


# --- how a run stands -------------------------------------------------------------------------------------


def test_a_run_is_running_then_has_the_status_of_its_result(runs):
    run_id = new_run_id()
    with runs.begin(run_id, "sb_1", "key_1") as journal:
        running = runs.find(run_id)
        assert (running.status, running.owner, running.sandbox_id) == ("running", "key_1", "sb_1")
        assert (running.ended_at, running.result) == (None, None)
        assert not runs.is_ended(run_id)
        journal.end(result(run_id, status="timed_out", message="\udcff"))

    ended = runs.find(run_id)
    assert (ended.status, ended.owner, ended.started_at) == ("timed_out", "key_1", running.started_at)
    assert ended.ended_at >= ended.started_at
    assert ended.result == result(run_id, status="timed_out", message="\udcff")
    assert runs.is_ended(run_id)
    assert DetachedRuns(runs._directory).find(run_id) == ended  # as after a restart


def test_a_run_that_its_writer_leaves_without_an_end_is_lost_and_keeps_its_output(runs):
    run_id = lost_run(runs)

    assert runs.find(run_id).status == "lost"
    assert runs.is_ended(run_id)
    assert content(runs.frames(run_id)) == [("stdout", b"hello")]


def test_runs_are_listed_newest_first_by_owner_and_sandbox(runs):
    assert runs.list() == []
    first = ended_run(runs, sandbox_id="sb_1", owner="key_1")
    second = ended_run(runs, sandbox_id="sb_2", owner="key_1")
    third = ended_run(runs, sandbox_id="sb_1", owner="key_2")

    def ids(**which):
        return [info.run_id for info in runs.list(**which)]

    assert ids() == [third, second, first]
    assert ids(owner="key_1") == [second, first]
    assert ids(sandbox_id="sb_1") == [third, first]
    assert ids(owner="key_1", sandbox_id="sb_1") == [first]
    assert ids(owner="key_3") == []


@pytest.mark.parametrize(
    "run_id",
    [
        *("", ".", "..", "run_", "run_../../etc", f"../run_{DIGITS}", f"run_{DIGITS[1:]}/", f"run_{DIGITS}\n"),
        *(f"run_{DIGITS}\0", f".new-run_{DIGITS}", f"RUN_{DIGITS}", "run_" + "G" * 22, "run_" + "\u0663" * 22),
    ],
)
def test_what_is_not_a_whole_run_id_is_no_run(runs, run_id):
    ended_run(runs)
    for ask in (runs.find, runs.is_ended, runs.forget):
        with pytest.raises(NotFoundError):
            ask(run_id)
    for read in (runs.frames, runs.follow, lambda wrong: runs.read(wrong, "stdout")):
        with pytest.raises(NotFoundError):
            next(read(run_id))
    with pytest.raises(InvalidRequestError):
        runs.begin(run_id, "sb_1", None)
    assert len(names(runs)) == 1


def test_the_beginning_of_a_run_id_finds_no_run(runs):
    with pytest.raises(NotFoundError):
        runs.find(ended_run(runs)[:-1])


def test_an_id_is_taken_once(runs):
    run_id = ended_run(runs)

    with pytest.raises(ConflictError):
        runs.begin(run_id, "sb_2", None)
    assert runs.find(run_id).sandbox_id == "sb_1"
    assert names(runs) == [run_id]


def test_nobody_else_may_read_what_a_job_wrote(runs):
    run_id = ended_run(runs)
    folder = os.path.join(runs._directory, run_id)
    paths = [runs._directory, folder, *(os.path.join(folder, name) for name in os.listdir(folder))]

    assert len(paths) == 5
    assert {stat.S_IMODE(os.stat(path).st_mode) & 0o077 for path in paths} == {0}


def test_a_damaged_run_is_reported_left_out_of_the_list_and_can_be_forgotten(runs):
    whole, damaged = ended_run(runs), ended_run(runs)
    with open(os.path.join(runs._directory, damaged, "result.json"), "r+b") as file:
        file.truncate(20)

    with pytest.raises(JhansiError, match="damaged") as caught:
        runs.find(damaged)
    assert runs._directory not in str(caught.value)
    assert [info.run_id for info in runs.list()] == [whole]
    runs.forget(damaged)
    assert names(runs) == [whole]


# --- followers --------------------------------------------------------------------------------------------


def test_a_follower_in_another_thread_sees_each_frame_as_it_comes_and_the_end(runs):
    run_id = new_run_id()
    seen, arrived = [], threading.Semaphore(0)

    def follow():
        for frame in runs.follow(run_id):
            seen.append((time.monotonic(), frame.data))
            arrived.release()
        seen.append((time.monotonic(), b"end"))

    with runs.begin(run_id, "sb_1", None) as journal:
        thread = threading.Thread(target=follow)
        thread.start()
        written = []
        for number in range(50):
            written.append((time.monotonic(), b"%d" % number))
            journal.write("stdout", b"%d" % number)
            assert arrived.acquire(timeout=10)
        time.sleep(0.3)  # that nothing comes is not the end
        assert len(seen) == 50
        written.append((time.monotonic(), b"end"))
        journal.end(result(run_id))
        thread.join(10)

    assert [data for _, data in seen] == [data for _, data in written]
    delays = sorted(came - went for (came, _), (went, _) in zip(seen, written, strict=True))
    assert delays[len(delays) // 2] < 0.02  # told, and not by the next look of a poller
    assert runs._watchers == {}


def test_a_follower_in_this_process_learns_that_the_writer_gave_up(runs):
    run_id = new_run_id()
    journal = runs.begin(run_id, "sb_1", None)
    thread = threading.Thread(target=lambda: list(runs.follow(run_id)))
    thread.start()
    time.sleep(0.1)
    journal.release()
    thread.join(10)

    assert not thread.is_alive()


def test_a_follower_of_another_process_sees_each_frame_and_the_end(runs):
    run_id = new_run_id()
    with python(COPIER, runs._directory, run_id, to_json(result(run_id)), stdin=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"begun\n"
        frames = runs.follow(run_id)
        for number in range(5):
            writer.stdin.write(b"%d\n" % number)
            writer.stdin.flush()
            assert next(frames).data == b"%d\n" % number
        writer.stdin.close()
        assert list(frames) == []
    assert runs.find(run_id).status == "exited"


def test_who_watches_is_called_for_each_write_and_the_end(runs):
    run_id = new_run_id()
    calls = []
    with runs.begin(run_id, "sb_1", None) as journal, runs.watch(run_id, lambda: calls.append(None)) as is_told:
        assert is_told
        journal.write("stdout", b"one")
        assert len(calls) == 1
        journal.end(result(run_id))
        assert len(calls) == 2
    with runs.watch(run_id, calls.clear) as is_told:
        assert not is_told


def test_a_follower_of_a_long_journal_stays_small(runs):
    run_id = new_run_id()
    size = 200 * 1024 * 1024
    with runs.begin(run_id, "sb_1", None) as journal:
        for number in range(200):
            journal.write(("stdout", "stderr")[number % 2], bytes(size // 200))
        journal.end(result(run_id))
    with python(FOLLOWER, runs._directory, run_id) as follower:
        count, grown = map(int, follower.stdout.read().split())
    runs.forget(run_id)

    assert count == size + size // 2 - 1000
    assert grown < 4 * 1024  # KiB


# --- kills ------------------------------------------------------------------------------------------------


def test_a_killed_writer_leaves_a_lost_run_with_whole_frames_alone(runs):
    moments = random.Random(3)
    for _ in range(20):
        run_id = new_run_id()
        with python(WRITER, runs._directory, run_id) as writer:
            assert writer.stdout.readline() == b"begun\n"
            following = runs.follow(run_id)
            time.sleep(moments.uniform(0.0, 0.05))
            assert runs.find(run_id).status == "running"
            writer.send_signal(signal.SIGKILL)

        lost = runs.find(run_id)
        assert (lost.status, lost.owner, lost.result) == ("lost", "key_1", None)
        frames = list(following)
        for number, frame in enumerate(frames):
            assert frame.stream == ("stdout", "stderr")[number % 2]
            found, length, filler = frame.data.split(b" ")
            assert (int(found), int(length)) == (number, len(frame.data))
            assert filler.strip(b"x") == b""
        assert list(runs.frames(run_id)) == frames
        runs.forget(run_id)
    assert names(runs) == []


def test_half_a_frame_is_passed_over_wherever_the_kill_fell(runs, journal):
    run_id = journal.info.run_id
    for data in (b"first", b"second" * 10):
        journal.write("stdout", data)
    journal.release()
    path = os.path.join(runs._directory, run_id, "output")
    first, second = (frame.position for frame in runs.frames(run_id))

    for size in range(second, -1, -1):
        os.truncate(path, size)
        expected = [b"first", b"second" * 10][: (size >= first) + (size >= second)]
        assert [frame.data for frame in runs.frames(run_id)] == expected
        assert list(runs.follow(run_id))[-1:] == list(runs.frames(run_id))[-1:]


def test_bytes_that_are_no_frame_are_reported_after_what_is_whole(runs, journal):
    journal.write("stdout", b"whole")
    journal.write("stdout", b"to be spoilt")
    journal.release()
    position = next(runs.frames(journal.info.run_id)).position
    with open(os.path.join(runs._directory, journal.info.run_id, "output"), "r+b") as file:
        file.seek(position)
        file.write(bytes(8))  # as a power cut leaves what was not flushed
    frames = runs.frames(journal.info.run_id)

    assert next(frames).data == b"whole"
    with pytest.raises(JhansiError, match="damaged"):
        next(frames)


def test_a_run_can_end_on_a_full_disk(tmp_path):
    run_id = new_run_id()
    (tmp_path / "disk").mkdir()
    script = 'mount -t tmpfs -o size=512k none "$0" && exec "$@"'
    argv = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, tmp_path / "disk"]
    filled = subprocess.run(
        [*argv, sys.executable, "-c", FILLER, tmp_path / "disk" / "runs", run_id, to_json(result(run_id))],
        env={**os.environ, "PYTHONPATH": CHECKOUT},
        capture_output=True,
        text=True,
        check=True,
    )

    remedy, still, end = filled.stdout.splitlines()
    assert "free some space" in remedy
    assert still == "still full"
    assert end == "exited {10001}"


# --- what goes --------------------------------------------------------------------------------------------


def test_a_run_is_forgotten_once_it_has_ended(runs, journal):
    run_id = journal.info.run_id
    with pytest.raises(ConflictError):
        runs.forget(run_id)
    journal.end(result(run_id))
    runs.forget(run_id)

    with pytest.raises(NotFoundError):
        runs.find(run_id)
    with pytest.raises(NotFoundError):
        runs.forget(run_id)
    assert names(runs) == []


def test_a_reader_keeps_what_is_forgotten_meanwhile(runs):
    run_id = ended_run(runs, output=b"x" * 300_000)
    frames = runs.frames(run_id)
    first = next(frames)
    runs.forget(run_id)

    assert len(first.data) + sum(len(frame.data) for frame in frames) == 300_000


def test_a_sandboxs_runs_go_with_it_and_one_that_is_about_to_end_is_waited_for(runs, journal):
    other = ended_run(runs, sandbox_id="sb_2")
    ended_run(runs)
    lost_run(runs)
    ending = threading.Timer(0.3, journal.end, [result(journal.info.run_id)])
    ending.start()
    runs.forget_sandbox("sb_1")

    assert names(runs) == [other]
    ending.join()


def test_a_sandboxs_run_that_waits_for_its_turn_is_left(runs, journal, monkeypatch):
    monkeypatch.setattr(detached, "_END_WITHIN_SECONDS", 0.1)
    ended_run(runs)
    runs.forget_sandbox("sb_1")

    assert names(runs) == [journal.info.run_id]


def test_a_sweep_removes_what_is_old_and_then_the_oldest(runs, journal):
    oldest = ended_run(runs, ended_ago=5000)
    kept = [ended_run(runs, ended_ago=seconds) for seconds in (400, 300, 200)]
    lost = lost_run(runs)
    runs.sweep(1000, 10)
    assert names(runs) == sorted([*kept, lost, journal.info.run_id])
    assert oldest not in names(runs)

    runs.sweep(1000, 2)
    assert names(runs) == sorted([kept[2], lost, journal.info.run_id])
    runs.sweep(0, 10)
    assert names(runs) == [journal.info.run_id]


def test_a_sweep_clears_away_what_kills_left_half_made_but_nothing_under_way(runs, journal):
    half = os.path.join(runs._directory, ".new-" + new_run_id())
    gone = os.path.join(runs._directory, ".gone-" + new_run_id())
    for path in (half, gone):
        os.mkdir(path)
        with open(os.path.join(path, "run.json"), "x"):
            pass
    runs.sweep(1000, 10)

    assert names(runs) == [journal.info.run_id]


def test_runs_begin_whole_while_others_sweep(runs):
    stop = threading.Event()

    def sweep():
        while not stop.is_set():
            runs.sweep(1000, 10**6)

    sweepers = [threading.Thread(target=sweep) for _ in range(2)]
    for sweeper in sweepers:
        sweeper.start()
    try:
        begun = [ended_run(runs) for _ in range(100)]
    finally:
        stop.set()
        for sweeper in sweepers:
            sweeper.join()

    assert names(runs) == sorted(begun)
    assert {info.status for info in runs.list()} == {"exited"}


def test_no_descriptor_is_left_open(runs):
    def opened():
        return len(os.listdir("/proc/self/fd"))

    before = opened()
    run_id = ended_run(runs)
    runs.list()
    next(runs.follow(run_id))
    with pytest.raises(ConflictError):
        runs.begin(run_id, "sb_1", None)
    lost_run(runs)
    runs.sweep(0, 0)

    assert opened() == before
