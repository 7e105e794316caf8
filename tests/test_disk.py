"""What a workspace holds: counted, whatever its shape and whoever changes it meanwhile, and watched."""

import errno
import os
import resource
import stat
import subprocess
import sys
import time
from contextlib import closing, contextmanager

import pytest

from jhansi_runtime import beneath
from jhansi_runtime.disk import REST, SLICE, Usage, Watch, _Walk, ended_message, measure, refusal

TIB = 1024**4
NO_LIMIT = Usage(1 << 62, 1 << 40)
BLOCK = 4096  # of the file systems that tests run on
UNPRIVILEGED = os.geteuid() != 0


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def top(folder):
    """The O_PATH descriptor of a workspace; no other is left open by what is tested."""
    fd = os.open(folder, os.O_PATH)
    before = os.listdir("/proc/self/fd")
    yield fd
    assert os.listdir("/proc/self/fd") == before, "a descriptor was left open"
    os.close(fd)


@pytest.fixture
def few_descriptors():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def counted(*paths):
    """What these are to count, by their own status."""
    found = [os.lstat(path) for path in paths]
    return Usage(sum(max(status.st_size, status.st_blocks * 512) for status in found), len(found))


def deepen(folder, depth, size):
    """Folders one in another, and a file of that size in the last: by descriptor, for no path is long enough."""
    fd = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    with open("file", "wb", opener=lambda name, flags: os.open(name, flags, dir_fd=fd)) as file:
        file.truncate(size)
    os.close(fd)


def sparse(path, size):
    with open(path, "wb") as file:
        file.truncate(size)


@contextmanager
def shut(*folders):
    """Within: nobody but root may enter these; the last one is shut first."""
    for path in reversed(folders):
        path.chmod(0)
    try:
        yield
    finally:
        for path in folders:
            path.chmod(0o700)


def looked(watch, seconds):
    """What a watch says within so long, asked as a poll loop does it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(min(watch.due_in(), 0.05))
        if reason := watch.look():
            return reason
    return None


# --- counting ---


def test_nothing_is_nothing(top):
    assert measure(top, Usage(0, 0)) == (0, 0)


def test_every_entry_counts_and_every_byte_on_disk(folder, top):
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_bytes(b"x" * 10_000)
    (folder / "small").write_bytes(b"x")
    (folder / "link").symlink_to("x" * 200)
    os.mkfifo(folder / "fifo")
    paths = [folder / name for name in ("sub", "sub/file", "small", "link", "fifo")]

    assert measure(top, NO_LIMIT) == counted(*paths)
    assert measure(top, NO_LIMIT).bytes >= 12_288 + 2 * BLOCK


def test_a_sparse_file_counts_as_what_it_would_be_elsewhere(folder, top):
    sparse(folder / "sparse", TIB)

    assert measure(top, NO_LIMIT) == (TIB, 1)
    assert not measure(top, Usage(TIB - 1, 10)).fits(Usage(TIB - 1, 10))


def test_a_file_of_several_names_has_its_bytes_once(folder, top):
    (folder / "a").mkdir()
    sparse(folder / "file", 1_000_000)
    for name in ("again", "a/again"):
        (folder / name).hardlink_to(folder / "file")

    used = measure(top, NO_LIMIT)

    assert used.files == 4
    assert used.bytes == 1_000_000 + counted(folder / "a").bytes


def test_a_link_is_not_what_it_leads_to(folder, top, tmp_path):
    (tmp_path / "outside").mkdir()
    sparse(tmp_path / "outside" / "large", TIB)
    (folder / "absolute").symlink_to(tmp_path / "outside")
    (folder / "climbing").symlink_to("../outside")
    (folder / "file").symlink_to("../outside/large")
    (folder / "round").symlink_to(".")

    assert measure(top, NO_LIMIT) == counted(*folder.iterdir())


def test_names_may_be_any_bytes(folder, top):
    for name in (b"new\nline", b"\xff\x80", b"-rf", b"..x", b"x" * 255, b"\x1b[31m"):
        os.mkdir(os.path.join(os.fsencode(folder), name))
        sparse(os.path.join(os.fsencode(folder), name, name), 1_000_000)

    assert measure(top, NO_LIMIT).files == 12
    assert measure(top, NO_LIMIT).bytes >= 6_000_000


@pytest.mark.usefixtures("few_descriptors")
def test_a_tree_deeper_than_any_path_is_counted_to_its_end(folder, top):
    deepen(folder, 5000, 1_000_000)
    deepen(folder / "d", 0, 1_000_000)  # one that is counted before the others are entered
    for name in ("e", "d/e", "d/d/e"):  # and some that are left when all of them are
        (folder / name).mkdir()
        sparse(folder / name / "file", 1_000_000)

    used = measure(top, NO_LIMIT)

    assert used.files == 5000 + 2 + 2 * 3
    assert used.bytes >= 5_000_000
    beneath.remove(top, "d")  # pytest cannot


def test_a_folder_of_many_files_and_many_folders_are_counted_once(folder, top):
    for number in range(3000):
        (folder / f"d{number}").mkdir()
        os.mknod(folder / f"f{number}")
    for number in range(100):
        os.mknod(folder / "d1000" / f"{number}")

    assert measure(top, NO_LIMIT).files == 6100


def test_a_count_ends_as_soon_as_it_is_too_much(folder, top):
    for number in range(20_000):
        os.mknod(folder / f"{number}")
    started = time.process_time()
    assert measure(top, NO_LIMIT).files == 20_000
    whole = time.process_time() - started

    started = time.process_time()
    assert measure(top, Usage(NO_LIMIT.bytes, 100)) == (0, 101)
    assert time.process_time() - started < whole / 10


# --- what a job has shut ---


def test_what_lies_in_a_shut_folder_is_counted_and_it_stays_shut(folder, top):
    inner = folder / "a" / "b"
    inner.mkdir(parents=True)
    sparse(inner / "file", TIB)
    with shut(folder / "a", inner):
        assert measure(top, NO_LIMIT).bytes > TIB
        assert stat.S_IMODE((folder / "a").stat().st_mode) == 0
        if not UNPRIVILEGED:
            assert stat.S_IMODE(inner.stat().st_mode) == 0
    with shut(folder):
        assert measure(top, NO_LIMIT).bytes > TIB


@pytest.mark.skipif(not UNPRIVILEGED, reason="nothing is shut to root")
@pytest.mark.parametrize("mode", [0o000, 0o300, 0o400, 0o070, 0o100])
def test_whatever_is_missing_of_the_access_is_given_and_taken_back(folder, top, mode):
    (folder / "a").mkdir()
    sparse(folder / "a" / "file", TIB)
    (folder / "a").chmod(mode)

    assert measure(top, NO_LIMIT).bytes > TIB
    assert stat.S_IMODE((folder / "a").stat().st_mode) == mode
    (folder / "a").chmod(0o700)


@pytest.mark.skipif(not UNPRIVILEGED, reason="nothing is shut to root")
def test_a_watch_that_is_given_up_leaves_folders_as_shut_as_they_were(folder, top):
    nested = [folder / "/".join("d" * depth) for depth in range(1, 21)]
    nested[-1].mkdir(parents=True)
    for number in range(20_000):
        os.mknod(nested[-1] / f"{number}")
    with shut(*nested):
        with closing(Watch(top, NO_LIMIT)) as watch:
            time.sleep(watch.due_in())
            assert watch.look() is None
            assert watch.due_in() == 0, "it is not in the middle of its walk"
            assert stat.S_IMODE(nested[0].stat().st_mode) != 0
        for path in nested:
            assert stat.S_IMODE(path.stat().st_mode) == 0
            path.chmod(0o700)


@pytest.mark.skipif(not UNPRIVILEGED, reason="nothing is shut to root")
@pytest.mark.usefixtures("few_descriptors")
def test_a_deep_tree_that_is_shut_all_the_way_is_counted_and_stays_shut(folder, top):
    nested = [folder / "/".join("d" * depth) for depth in range(1, 41)]
    nested[-1].mkdir(parents=True)
    sparse(nested[-1] / "file", TIB)
    with shut(*nested):
        for most in (NO_LIMIT, Usage(0, 30), Usage(0, 1 << 40)):
            assert not measure(top, most).fits(Usage(0, 30))
            check = subprocess.run(["stat", "-c", "%a", nested[0]], capture_output=True, text=True, check=True)
            assert check.stdout == "0\n"
        for path in nested:
            assert stat.S_IMODE(path.stat().st_mode) == 0
            path.chmod(0o700)


# --- what changes meanwhile ---


CHANGING = """
import ctypes, os, shutil, sys
renameat2 = ctypes.CDLL(None).renameat2
top, trap = map(os.fsencode, sys.argv[1:])
os.chdir(top)
print("changing", flush=True)
while True:
    renameat2(-100, b"place", -100, b"trap", 2)  # swaps a folder and a link: AT_FDCWD is -100, RENAME_EXCHANGE 2
    os.rename("deep/" + "d/" * 20 + "d", "moved")
    os.rename("moved", "deep/" + "d/" * 20 + "d")
    os.mkdir("new")
    open("new/file", "w").close()
    shutil.rmtree("new")
"""


def test_a_tree_that_changes_all_the_time_is_counted_and_nothing_outside_it(folder, top, tmp_path):
    (tmp_path / "outside").mkdir()
    sparse(tmp_path / "outside" / "large", TIB)
    (folder / "place").mkdir()
    (folder / "trap").symlink_to(tmp_path / "outside")
    (folder / "deep" / "/".join("d" * 40)).mkdir(parents=True)
    command = [sys.executable, "-c", CHANGING, str(folder), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as changer:
        assert changer.stdout.readline() == "changing\n"
        counts = [measure(top, NO_LIMIT) for _ in range(2000)]
        changer.kill()

    assert max(used.bytes for used in counts) < 100 * BLOCK
    assert max(used.files for used in counts) <= 2 * 45
    assert len(set(counts)) > 1, "nothing has changed meanwhile"


def test_a_folder_that_is_moved_out_does_not_lead_the_walk_out(folder, top, tmp_path):
    above = folder / "d" / "d"
    deep = above / "/".join("d" * 12)
    deep.mkdir(parents=True)
    for number in range(1000):
        os.mknod(deep / f"{number}")
    for number in range(50):  # most of them are still to be entered when the walk is at its deepest
        (above / f"x{number}").mkdir()
        (tmp_path / "outside" / f"x{number}").mkdir(parents=True)
        sparse(tmp_path / "outside" / f"x{number}" / "large", TIB)

    with closing(_Walk(top, NO_LIMIT)) as walk:
        while walk.usage.files < 500:
            assert not walk.advance(0)
        os.rename(above / "d", tmp_path / "outside" / "d")
        assert walk.advance(10)
        assert walk.usage.bytes < TIB


def test_a_disk_that_fails_is_no_empty_workspace(folder, monkeypatch):
    handle = os.open(folder, os.O_PATH)

    def failing(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        measure(handle, NO_LIMIT)
    os.close(handle)


# --- watching ---


def test_a_watch_sees_a_file_that_grows_beyond_the_limit(folder, top):
    with closing(Watch(top, Usage(1_000_000, 10))) as watch:
        assert watch.look() is None
        sparse(folder / "file", 1_000_000)
        assert looked(watch, 0.5) is None
        sparse(folder / "file", 1_000_001)
        assert looked(watch, 1.0) == "disk_limit"


def test_a_watch_sees_one_file_too_many(folder, top):
    for number in range(10):
        os.mknod(folder / f"{number}")
    with closing(Watch(top, Usage(1_000_000, 10))) as watch:
        assert looked(watch, 0.5) is None
        os.mkdir(folder / "one")
        assert looked(watch, 1.0) == "disk_limit"


def test_what_was_moved_during_a_walk_is_not_held_against_the_job(folder, top):
    for above in range(10):
        (folder / f"{above}").mkdir()
        for number in range(1000):
            os.mknod(folder / f"{above}" / f"{number}")
    sparse(folder / "large", 600_000_000)
    with os.scandir(folder) as entries:
        last = next(entry.path for entry in entries if entry.is_dir())  # folders are entered from the end

    with closing(Watch(top, Usage(1_000_000_000, 30_000))) as watch:
        time.sleep(watch.due_in())
        assert watch.look() is None
        assert watch.due_in() == 0, "it is not in the middle of its walk"
        os.rename(folder / "large", f"{last}/large")  # to be counted once more
        assert looked(watch, 1.0) is None


def test_a_watch_never_keeps_its_caller_long_and_rests_long_after_a_long_walk(folder, top):
    for above in range(100):
        (folder / f"{above}").mkdir()
        for number in range(1000):
            os.mknod(folder / f"{above}" / f"{number}")

    turns, spent = [], 0.0
    with closing(Watch(top, NO_LIMIT)) as watch:
        time.sleep(watch.due_in())
        while watch.due_in() == 0:
            began, used = time.monotonic(), time.process_time()
            assert watch.look() is None
            turns.append(time.monotonic() - began)
            spent += time.process_time() - used
        rest = watch.due_in()

    assert len(turns) > 10
    assert sorted(turns)[len(turns) // 2] < 2 * SLICE
    assert rest > 0.9 * REST * spent
    assert watch.look() is None


# --- messages ---


def test_a_refusal_says_what_there_is_what_may_be_and_how_to_make_room():
    error = refusal(Usage(1_288_490_189, 3400), Usage(1024**3, 250_000))

    assert error.http_status == 507
    assert "1.2G in 3,400 files" in str(error)
    assert "1G in 250,000 files" in str(error)
    for way in ("--disk", "--disk-files", "rm -r", "DELETE"):
        assert way in error.remedy
    assert "1G in 250,000 files" in ended_message(Usage(1024**3, 250_000))
