"""The ledger of runs under way: a run is lost when whoever ran it is dead, and is settled once."""

import fcntl
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time

import pytest

from jhansi_runtime.errors import HostError
from jhansi_runtime.runs import Runs, new_run_id

CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# Begins argv[2] runs, says so, and waits to be killed; or begins and ends one after another until it is.
OWNER = """
import os, signal, sys
from jhansi_runtime.runs import Runs, new_run_id

runs = Runs(sys.argv[1])
held = [runs.begin(new_run_id(), {"number": number}) for number in range(int(sys.argv[2]))]
os.write(1, b"begun\\n")
while not held:
    runs.begin(new_run_id(), {"filler": "x" * 1000}).end()
signal.pause()
"""


def owner(directory, *, count):
    environment = {**os.environ, "PYTHONPATH": CHECKOUT}
    argv = [sys.executable, "-c", OWNER, str(directory), str(count)]
    process = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"begun\n"
    return process


def kill(process):
    with process:
        process.send_signal(signal.SIGKILL)


@pytest.fixture
def runs(tmp_path):
    return Runs(str(tmp_path / "runs"))


def settle(runs):
    settled = []
    for lost in runs.lost():
        settled.append((lost.run_id, lost.note))
        lost.settle()
    return settled


def names(runs):
    return sorted(os.listdir(runs._directory))


def test_run_ids_are_different_and_sort_by_time():
    early = [new_run_id() for _ in range(1000)]
    time.sleep(0.002)
    late = new_run_id()

    assert len(set(early)) == 1000
    assert max(early) < late
    assert {(len(run_id), run_id[:4]) for run_id in early} == {(26, "run_")}


def test_a_ledger_that_was_never_begun_holds_no_lost_run(runs):
    assert list(runs.lost()) == []


def test_a_run_under_way_is_in_the_folder_with_its_note_and_not_lost(runs):
    run = runs.begin("run_1", {"cgroup": "/a\udcff"})

    with open(os.path.join(runs._directory, "run_1.json"), encoding="ascii") as file:
        assert json.loads(file.read()) == {"cgroup": "/a\udcff"}
    assert settle(runs) == []
    assert names(runs) == ["run_1.json"]
    run.end()
    assert names(runs) == []


def test_a_run_that_ended_leaves_nothing(runs):
    before = os.listdir("/proc/self/fd")
    for _ in range(100):
        with runs.begin(new_run_id(), {}) as run:
            run.end()

    assert (names(runs), settle(runs)) == ([], [])
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_run_left_by_an_exception_between_its_start_and_its_end_is_lost(runs):
    def fail_midway():
        with runs.begin("run_1", {"a": 1}) as run:
            run.awaits_end = True
            raise KeyError

    with pytest.raises(KeyError):
        fail_midway()

    assert settle(runs) == [("run_1", {"a": 1})]
    assert settle(runs) == []


def test_a_run_left_before_its_start_or_after_its_end_leaves_nothing(runs):
    def fail(run_id, *, recorded):
        with runs.begin(run_id, {}) as run:
            if recorded:
                run.awaits_end = True
                run.awaits_end = False
            raise KeyError

    for run_id, recorded in (("run_1", False), ("run_2", True)):
        with pytest.raises(KeyError):
            fail(run_id, recorded=recorded)

    assert names(runs) == []


def test_nobody_else_may_read_the_ledger(runs):
    with runs.begin("run_1", {}) as run:
        paths = [runs._directory, os.path.join(runs._directory, "run_1.json")]
        assert [stat.S_IMODE(os.stat(path).st_mode) for path in paths] == [0o700, 0o600]
        run.end()


def test_runs_of_a_killed_process_are_lost_oldest_first_and_those_of_a_live_one_are_not(runs):
    with runs.begin("run_mine", {}) as mine:
        other = owner(runs._directory, count=8)
        assert settle(runs) == []
        kill(other)

        settled = settle(runs)
        assert [note["number"] for _, note in settled] == list(range(8))
        assert [run_id for run_id, _ in settled] == sorted(run_id for run_id, _ in settled)
        assert names(runs) == ["run_mine.json"]
        mine.end()


def test_a_lost_run_that_one_start_is_settling_is_not_given_to_another(runs):
    kill(owner(runs._directory, count=2))

    first, second = runs.lost(), Runs(runs._directory).lost()
    held = next(first)
    other = next(second)
    assert held.run_id != other.run_id
    assert next(second, None) is None
    held.settle()
    other.settle()

    assert list(first) == []
    assert names(runs) == []


def test_a_lost_run_that_was_not_settled_is_lost_again(runs):
    kill(owner(runs._directory, count=1))

    (lost,) = runs.lost()
    assert settle(runs) == []
    lost.release()
    assert [note for _, note in settle(runs)] == [{"number": 0}]


def test_a_run_is_under_way_as_long_as_a_forked_child_of_its_owner_lives(runs):
    run = runs.begin("run_1", {})
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    run.release()

    assert settle(runs) == []
    os.close(writing)
    os.waitpid(child, 0)
    os.close(reading)
    assert settle(runs) == [("run_1", {})]


def test_a_program_that_is_started_does_not_keep_a_run_under_way(runs):
    run = runs.begin("run_1", {})
    with subprocess.Popen(["sleep", "60"], close_fds=False) as program:
        run.release()

        assert settle(runs) == [("run_1", {})]
        program.kill()


def test_killing_owners_at_any_moment_leaves_at_most_the_run_under_way(runs):
    chance = random.Random(0)
    for _ in range(20):
        process = owner(runs._directory, count=0)
        assert settle(runs) == []
        time.sleep(chance.uniform(0, 0.02))
        assert process.poll() is None
        kill(process)

        assert [note["filler"] for _, note in settle(runs)] in ([], ["x" * 1000])
        assert names(runs) == []


def test_a_run_that_a_start_takes_for_lost_before_it_is_locked_begins_again(runs, monkeypatch):
    genuine, interrupted = fcntl.flock, []

    def after_a_start(descriptor, operation):
        if not interrupted:
            interrupted.append(True)
            assert settle(runs) == []
            assert names(runs) == []
        genuine(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", after_a_start)
    with runs.begin("run_1", {"a": 1}) as run:
        assert names(runs) == ["run_1.json"]
        assert settle(runs) == []
        run.end()


def test_a_run_that_ends_while_a_start_looks_at_it_is_not_lost(runs, monkeypatch):
    run, genuine = runs.begin("run_1", {}), fcntl.flock

    def after_the_end(descriptor, operation):
        run.end()
        genuine(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", after_the_end)
    assert settle(runs) == []


def test_a_run_that_begins_and_is_killed_while_a_start_looks_at_it_is_left_to_the_next(runs, monkeypatch):
    runs.begin("run_1", {"a": 1}).release()
    path, hidden = (os.path.join(runs._directory, name) for name in ("run_1.json", ".run_1.json"))
    os.rename(path, hidden)
    genuine = fcntl.flock

    def after_the_rename(descriptor, operation):
        os.rename(hidden, path)
        genuine(descriptor, operation)

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", after_the_rename)
        assert settle(runs) == []
    assert settle(runs) == [("run_1", {"a": 1})]


def test_what_a_killed_begin_left_is_removed_and_is_no_run(runs):
    runs.begin("run_1", {}).end()
    hidden = os.path.join(runs._directory, ".run_2.json")
    with open(hidden, "w", encoding="ascii") as file:
        file.write('{"half')

    assert settle(runs) == []
    assert names(runs) == []


@pytest.mark.parametrize("content", ["", '{"half', "\0\0\0", "[]"])
def test_a_note_that_a_power_cut_took_leaves_the_run_id(runs, content):
    runs.begin("run_1", {}).end()
    with open(os.path.join(runs._directory, "run_1.json"), "w", encoding="ascii") as file:
        file.write(content)

    assert settle(runs) == [("run_1", {})]


def test_a_folder_that_cannot_be_made_is_an_error_with_the_remedy(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(HostError, match=r"no run can be entered in .*: Not a directory; make it writable"):
        Runs(str(tmp_path / "file")).begin("run_1", {})


FULL_DISK = """
import sys
from jhansi_runtime.errors import DiskLimitError
from jhansi_runtime.runs import Runs

runs = Runs(sys.argv[1])
open(sys.argv[1] + "/ballast.json", "wb", 0).write(bytes(8000))
try:
    runs.begin("run_1", {"filler": "x" * 10000})
except DiskLimitError as error:
    print(error)
print(sorted(lost.run_id for lost in runs.lost()))  # its end releases them
"""


def test_a_full_disk_refuses_the_run(tmp_path):
    mount = f"mount -t tmpfs -o size=16k none '{tmp_path}' && exec \"$@\""
    argv = ["unshare", "-Urm", "sh", "-c", mount, "sh", sys.executable, "-c", FULL_DISK, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": CHECKOUT}
    answer = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)

    assert answer.returncode == 0, answer.stderr
    message, lost = answer.stdout.splitlines()
    assert "No space left on device; free some space" in message
    assert lost == "['ballast']"
