"""The room in a workspace: what the host may still add, and what is remembered of it, by any number of processes."""

import io
import multiprocessing
import os
import signal
import sys
import tarfile
import time
from contextlib import closing

import pytest

from jhansi_runtime import disk, room
from jhansi_runtime.disk import Usage, measure
from jhansi_runtime.errors import DiskLimitError
from jhansi_runtime.room import MANY, Room, changing
from jhansi_runtime.sandboxes import Sandboxes
from jhansi_runtime.spec import Limits

FORK = multiprocessing.get_context("fork")
NO_LIMIT = Usage(1 << 62, 1 << 40)
MIB = 1024**2


@pytest.fixture
def store(tmp_path):
    return Sandboxes(str(tmp_path / "workspaces"))


@pytest.fixture
def sandbox(store):
    """The id of a sandbox."""
    return store.create(language="python", limits=Limits()).id


@pytest.fixture
def folder(store, sandbox):
    """The folder of its workspace, as a job sees it."""
    return os.path.join(store.root, store.workspace_path(sandbox))


@pytest.fixture
def beside(store, sandbox):
    """The descriptor of the folder that holds the workspace. What is tested leaves no other open."""
    fd = os.open(os.path.join(store.root, sandbox), os.O_RDONLY)
    before = os.listdir("/proc/self/fd")
    yield fd
    assert os.listdir("/proc/self/fd") == before, "a descriptor was left open"
    os.close(fd)


def fill(folder, count=MANY + 1):
    """Make so many files."""
    start = len(os.listdir(folder))
    for number in range(start, start + count):
        os.mknod(os.path.join(folder, f"{number}"))


def sparse(path, size):
    with open(path, "wb") as file:
        file.truncate(size)


def held(beside):
    """What there is in the workspace beside which that folder lies."""
    with closing_fd(os.open("workspace", os.O_PATH, dir_fd=beside)) as top:
        return measure(top, NO_LIMIT)


def closing_fd(fd):
    from jhansi_runtime.beneath import closing

    return closing(fd)


def remembered(beside):
    """What the next to change the workspace would know of it; the record is left in its place."""
    with changing(beside) as change:
        if change.before is not None:
            change.remember(change.before)
        return change.before


def run_job(workspace, job=lambda: None):
    """What an exec does with the room of its workspace."""
    workspace.room.require()
    with closing(workspace.room.watch()):
        job()
    return workspace.room.settle()


def archive_of(contents):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, size in contents.items():
            member = tarfile.TarInfo(name)
            member.size = size
            tar.addfile(member, io.BytesIO(bytes(size)))
    packed.seek(0)
    return packed


# --- what the host may add ---


def test_a_write_that_does_not_fit_changes_nothing(store, sandbox, folder):
    with store.hold_to_change(sandbox, Limits(disk=MIB)) as workspace:
        workspace.write("a/file", [b"x" * 100_000])
        with pytest.raises(DiskLimitError, match="no room"):
            workspace.write("a/large", [b"x" * 500_000] * 2)
        with pytest.raises(DiskLimitError):
            workspace.write("a/file", [b"x" * 500_000] * 3)

    assert os.listdir(f"{folder}/a") == ["file"]
    assert os.path.getsize(f"{folder}/a/file") == 100_000


def test_an_upload_ends_as_soon_as_it_does_not_fit(store, sandbox):
    taken = []

    def endless():
        while len(taken) < 100:
            taken.append(len(taken))
            yield bytes(100_000)

    with store.hold_to_change(sandbox, Limits(disk=MIB)) as workspace, pytest.raises(DiskLimitError):
        workspace.write("file", endless())
    assert len(taken) < 15


def test_a_file_may_take_the_room_of_the_one_it_replaces(store, sandbox, folder):
    with store.hold_to_change(sandbox, Limits(disk=MIB, disk_files=1)) as workspace:
        for _ in range(5):
            workspace.write("file", [b"x" * 500_000] * 2)
            workspace.write("file", [b"x" * 500_000])
        with pytest.raises(DiskLimitError):
            workspace.write("other", [b""])
    sparse(f"{folder}/file", 10 * MIB)
    with store.hold_to_change(sandbox, Limits(disk=MIB)) as workspace:
        workspace.write("file", [b"x"])
        workspace.write("other", [b"x"])


def test_the_folders_that_a_write_makes_are_entries_too(store, sandbox, folder):
    with store.hold_to_change(sandbox, Limits(disk_files=3)) as workspace:
        with pytest.raises(DiskLimitError):
            workspace.write("a/b/c/file", [b""])
        assert os.listdir(folder) == []
        workspace.write("a/b/file", [b""])
        workspace.write("a/b/file", [b"x"])
        with pytest.raises(DiskLimitError):
            workspace.write("a/b/other", [b""])


def test_a_put_that_does_not_fit_is_refused(store, sandbox, folder, tmp_path):
    (tmp_path / "source").mkdir()
    sparse(tmp_path / "source" / "large", 2 * MIB)
    sparse(tmp_path / "large", 2 * MIB)
    with store.hold_to_change(sandbox, Limits(disk=MIB)) as workspace:
        for source in ("source", "large"):
            with pytest.raises(DiskLimitError):
                workspace.put(str(tmp_path / source))
    assert not os.path.exists(f"{folder}/large")
    assert not os.path.exists(f"{folder}/source/large")


def test_a_folder_may_be_put_again_and_again(store, sandbox, tmp_path):
    (tmp_path / "source" / "sub").mkdir(parents=True)
    for number in range(9):
        (tmp_path / "source" / "sub" / f"{number}").write_bytes(bytes(60_000))
    with store.hold_to_change(sandbox, Limits(disk=MIB, disk_files=11)) as workspace:
        for _ in range(5):
            workspace.put(str(tmp_path / "source"))
        os.mknod(tmp_path / "source" / "more")
        with pytest.raises(DiskLimitError):
            workspace.put(str(tmp_path / "source"))


def test_what_was_put_already_does_not_count_twice(store, sandbox, tmp_path):
    (tmp_path / "source").mkdir()
    for number in range(100):
        (tmp_path / "source" / f"{number}").write_bytes(bytes(4096))  # a block too many is set aside for each
    with store.hold_to_change(sandbox, Limits(disk=600_000)) as workspace:
        workspace.put(str(tmp_path / "source"))


def test_an_archive_that_does_not_fit_leaves_the_workspace_as_it_was(store, sandbox, folder):
    with store.hold_to_change(sandbox, Limits(disk=MIB)) as workspace:
        workspace.write("file", [b"kept"])
        with pytest.raises(DiskLimitError):
            workspace.unarchive(archive_of({"file": 10, "large": 2 * MIB}))
    with store.hold_to_change(sandbox, Limits(disk_files=10)) as workspace:
        with pytest.raises(DiskLimitError):
            workspace.unarchive(archive_of({f"{number}": 0 for number in range(11)}))
        assert os.listdir(folder) == ["file"]
        workspace.unarchive(archive_of({f"{number}": 0 for number in range(9)}))
        assert len(os.listdir(folder)) == 10
    with open(f"{folder}/file", "rb") as file:
        assert file.read() == b"kept"


def test_a_workspace_that_holds_too_much_can_be_read_and_emptied_but_not_run_in(store, sandbox, folder):
    sparse(f"{folder}/large", 2 * MIB)
    os.mknod(f"{folder}/small")
    with store.hold_to_change(sandbox, Limits(disk=MIB)) as workspace:
        with pytest.raises(DiskLimitError):
            workspace.room.require()
        with pytest.raises(DiskLimitError):
            workspace.write("new", [b""])
        assert b"".join(workspace.read("small")) == b""
        workspace.remove("large")
        workspace.room.require()
        workspace.write("new", [b""])


def test_a_larger_limit_for_one_exec_makes_room_for_the_next(store, sandbox, folder):
    sparse(f"{folder}/large", 2 * MIB)
    with store.hold_to_change(sandbox, Limits(disk=4 * MIB)) as workspace:
        assert run_job(workspace, lambda: os.unlink(f"{folder}/large")) == (0, 0)
    with store.hold_to_change(sandbox, Limits(disk=MIB)) as workspace:
        workspace.room.require()


def test_what_a_job_leaves_is_counted_after_it(store, sandbox, folder):
    with store.hold_to_change(sandbox, Limits(disk=MIB)) as workspace:
        used = run_job(workspace, lambda: sparse(f"{folder}/large", 2 * MIB))

    assert not used.fits(workspace.room.most)


# --- what is remembered ---


def test_a_large_workspace_is_walked_once_for_an_exec_and_not_at_all_for_a_write(
    store, sandbox, folder, beside, monkeypatch
):
    walks = []
    fill(folder)
    with store.hold_to_change(sandbox, Limits()) as workspace:
        run_job(workspace)
    monkeypatch.setattr(room, "measure", lambda *words: walks.append(words) or disk.measure(*words))

    for number in range(3):
        with store.hold_to_change(sandbox, Limits()) as workspace:
            workspace.write(f"new{number}/file", [b"x" * 10_000])
    with store.hold_to_change(sandbox, Limits()) as workspace:
        workspace.remove("new2")
    assert walks == []
    assert remembered(beside).files == MANY + 1 + 3 * 2
    assert remembered(beside).bytes >= held(beside).bytes
    with store.hold_to_change(sandbox, Limits()) as workspace:
        run_job(workspace, lambda: fill(folder, 5))
    assert len(walks) == 1
    assert remembered(beside) == held(beside)


def test_writes_alone_come_to_remember_too(store, sandbox, folder, beside):
    fill(folder)
    with store.hold_to_change(sandbox, Limits()) as workspace:
        workspace.write("file", [b"x"])

    assert remembered(beside).files == MANY + 2


def test_of_a_small_workspace_nothing_is_remembered(store, sandbox, folder, beside):
    fill(folder, MANY)
    for _ in range(3):
        with store.hold_to_change(sandbox, Limits()) as workspace:
            run_job(workspace)

    assert remembered(beside) is None
    assert sorted(os.listdir(f"{folder}/..")) == [".changing", "sandbox.json", "workspace"]


def test_a_refusal_believes_no_record(store, sandbox, folder, beside):
    fill(folder)
    sparse(f"{folder}/large", 2 * MIB)
    with store.hold_to_change(sandbox, Limits()) as workspace:
        run_job(workspace)
    os.unlink(f"{folder}/large")  # by hand

    assert remembered(beside).bytes >= 2 * MIB
    with store.hold_to_change(sandbox, Limits(disk=MIB)) as workspace:
        workspace.room.require()
    assert remembered(beside).bytes < MIB


def test_nothing_is_remembered_of_an_exec_whose_end_nobody_saw(store, sandbox, folder, beside):
    fill(folder)

    def job():
        fill(folder, 10)
        raise KeyboardInterrupt

    for _ in range(2):
        with store.hold_to_change(sandbox, Limits()) as workspace, pytest.raises(KeyboardInterrupt):
            run_job(workspace, job)
        assert remembered(beside) is None


def test_more_than_was_counted_is_not_remembered(store, sandbox, folder, beside):
    fill(folder)
    with store.hold_to_change(sandbox, Limits(disk_files=MANY + 10)) as workspace:
        run_job(workspace, lambda: fill(folder, 100))

    assert remembered(beside) is None


def test_nothing_is_remembered_beside_a_folder_of_the_callers(folder):
    fill(folder)
    with closing_fd(os.open(folder, os.O_PATH)) as top, closing(Room(top, NO_LIMIT)) as own:
        own.require()
        with closing(own.watch()):
            pass
        assert own.settle().files == MANY + 1

    assert sorted(os.listdir(f"{folder}/..")) == ["sandbox.json", "workspace"]


def test_a_record_does_not_outlive_the_boot_of_the_host(beside):
    with changing(beside) as change:
        change.mark()
        change.remember(Usage(1, 2))
    assert remembered(beside) == (1, 2)
    path = f"/proc/self/fd/{beside}/.holds"
    with open(path) as file:
        boot, rest = file.read().split(" ", 1)
    with open(path, "w") as file:
        file.write(f"{boot[::-1]} {rest}")

    assert remembered(beside) is None


# --- several at once ---


def test_nobody_remembers_what_somebody_else_has_begun_to_change(beside):
    with changing(beside) as first:
        assert first.mark()
        with changing(beside):
            first.remember(Usage(1, 2))
        assert remembered(beside) is None
    assert remembered(beside) is None


def test_nobody_remembers_while_somebody_else_is_changing(beside):
    with changing(beside) as first:
        with changing(beside) as second:
            assert not second.mark()
            second.remember(Usage(1, 2))
            assert not first.mark()
        assert first.mark(), "alone again"
        first.remember(Usage(3, 4))
    assert remembered(beside) == (3, 4)


def test_who_was_refused_the_lock_alone_still_keeps_others_from_it(beside):
    with changing(beside) as first:
        with changing(beside) as second:
            assert not first.mark()
            assert not second.mark()
        with changing(beside) as third:
            assert not third.mark()
        assert first.mark()
        with changing(beside) as fourth:
            assert not fourth.mark()
            assert not first.is_marked()


def test_two_who_begin_at_once_may_both_know_and_neither_leaves_a_record(beside):
    with changing(beside) as change:
        change.mark()
        change.remember(Usage(1, 2))
    with changing(beside) as first:
        assert first.before == (1, 2)
        with changing(beside) as second:
            assert second.before is None
            first.remember(Usage(5, 6))
    assert remembered(beside) is None


def keep_changing(store, sandbox, folder, number):
    """Add to a workspace for ever, in both of the ways there are."""
    for turn in range(1_000_000):
        name, began = f"{number}-{turn}", time.monotonic()
        with store.hold_to_change(sandbox, Limits()) as workspace:
            if (turn + number) % 2:
                workspace.write(name, [b"x"])
            else:
                run_job(workspace, lambda name=name: os.mknod(f"{folder}/{name}"))
        if turn % 3 == 0:  # so that now and then one alone is changing, however long that takes
            time.sleep(3 * number * (time.monotonic() - began))


def test_whatever_several_do_at_once_no_record_is_ever_short(store, sandbox, folder, beside, monkeypatch):
    monkeypatch.setattr(room, "MANY", 0)
    changers = [FORK.Process(target=keep_changing, args=(store, sandbox, folder, number)) for number in range(3)]
    for changer in changers:
        changer.start()
    records, began = 0, time.monotonic()
    # They leave few records where they have to wait for processors.
    while (taken := time.monotonic() - began) < 4 or (records <= 10 and taken < 60):
        # Files only come, and who begins removes the record: what was there before it was read is in it.
        there = held(beside)
        record = room._read(peeked(beside))
        if record is not None:
            records += 1
            assert record >= there
    for changer in changers:
        assert changer.is_alive()
        changer.kill()
        changer.join()
    assert records > 10


def peeked(beside):
    """What is in the record at this moment; it stays there."""
    try:
        with closing_fd(os.open(".holds", os.O_RDONLY, dir_fd=beside)) as fd:
            return os.read(fd, 256)
    except FileNotFoundError:
        return b""


@pytest.mark.parametrize("verb", ["exec", "write"])
def test_whoever_is_killed_at_whatever_line_leaves_no_short_record(store, sandbox, folder, beside, monkeypatch, verb):
    monkeypatch.setattr(room, "MANY", 0)
    os.mknod(f"{folder}/first")
    with store.hold_to_change(sandbox, Limits()) as workspace:
        run_job(workspace)
    assert remembered(beside) is not None

    line, was_killed, records = 0, True, set()
    while was_killed:
        line += 1
        was_killed = killed_at(line, store, sandbox, folder, verb)
        record = room._read(peeked(beside))
        records.add(record is not None)
        assert record is None or record >= held(beside), f"at line {line}"
        if record is None:  # for the next to find one
            with store.hold_to_change(sandbox, Limits()) as workspace:
                run_job(workspace)
    assert line > 50
    assert records == {True, False}


def killed_at(line, store, sandbox, folder, verb):
    """Whether a process that changes the workspace came to its so many-th line of room.py, and so was killed there."""
    child = os.fork()
    if child == 0:
        left = [line]

        def trace(frame, event, _):
            if frame.f_code.co_filename != room.__file__:
                return None
            if event == "line":
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        with store.hold_to_change(sandbox, Limits()) as workspace:
            if verb == "write":
                workspace.write(f"{line}", [b"x"])
            else:
                run_job(workspace, lambda: os.mknod(f"{folder}/{line}"))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
