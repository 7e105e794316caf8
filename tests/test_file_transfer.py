"""Files of a workspace as a server moves them: in pieces, with conditions, and all at once as a tar."""

import contextlib
import gzip
import io
import lzma
import os
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time

import pytest
import zstandard
from test_archive import directory, hard_link, link, member, tar
from test_workspace import ODD_NAMES, tree

from jhansi_runtime.errors import (
    ConflictError,
    HostileArchiveError,
    InvalidRequestError,
    JhansiError,
    NotFoundError,
    PreconditionFailedError,
)
from jhansi_runtime.paths import Paths
from jhansi_runtime.runtime import Runtime
from jhansi_runtime.workspace import open_workspace

MIB = 1024**2
DEVICE = member("null", kind=tarfile.CHRTYPE)
FIFO = member("fifo", kind=tarfile.FIFOTYPE)


@pytest.fixture
def folder(tmp_path):
    """The folder of the workspace, as a job sees it."""
    (tmp_path / "sandbox" / "root").mkdir(parents=True)
    return tmp_path / "sandbox" / "root"


@pytest.fixture
def workspace(folder):
    with open_workspace(str(folder)) as opened:
        before = os.listdir("/proc/self/fd")
        yield opened
        assert os.listdir("/proc/self/fd") == before, "a descriptor was left open"
    assert set(os.listdir(folder.parent)) <= {"root", ".writing"}, "something was left beside the workspace"


def opened(workspace, path):
    """All of a file, and its entity tag."""
    with workspace.open(path) as file:
        return b"".join(file.chunks()), file.etag


def packed(workspace):
    return b"".join(workspace.archive())


@contextlib.contextmanager
def little_memory(most):
    """Within: this process's memory must not grow by more bytes than that (proc_pid_status(5), VmHWM)."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # from now on it is the peak since now
    before = peak()
    yield
    assert peak() - before < most


def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))


class Trickle:
    """A stream that cannot seek and gives a few bytes at a time, whatever is asked for."""

    def __init__(self, data, at_once=7):
        self._file, self._at_once = io.BytesIO(data), at_once

    def read(self, size):
        return self._file.read(min(size, self._at_once))


class Joined:
    """A stream of what an iterator gives."""

    def __init__(self, chunks):
        self._chunks, self._rest = iter(chunks), b""

    def read(self, size):
        if not self._rest:
            self._rest = next(self._chunks, b"")
        data, self._rest = self._rest[:size], self._rest[size:]
        return data


# --- looking and reading ---


def test_a_stat_follows_links_that_stay_inside_only(workspace, folder):
    (folder / "file").write_bytes(b"12345")
    (folder / "link").symlink_to("file")
    (folder / "out").symlink_to("/etc/passwd")
    os.mkfifo(folder / "fifo")

    assert workspace.stat("link").size == 5
    assert [workspace.stat(path).type for path in ("file", "link", "fifo", ".", "")] == [
        "file",
        "file",
        "fifo",
        "directory",
        "directory",
    ]
    with pytest.raises(InvalidRequestError, match="leads out"):
        workspace.stat("out")
    with pytest.raises(NotFoundError):
        workspace.stat("nothing")


def test_a_slice_is_the_bytes_of_that_place(workspace, folder):
    content = os.urandom(MIB + 12_345)
    (folder / "file").write_bytes(content)

    with workspace.open("file") as file:
        assert file.info.size == len(content)
        for start, end in ((0, 1), (5, 5), (1, MIB), (MIB - 3, MIB + 12_345), (0, len(content))):
            pieces = list(file.chunks(start, end))
            assert b"".join(pieces) == content[start:end]
            assert all(len(piece) <= 256 * 1024 for piece in pieces)


def test_a_file_of_any_size_is_read_in_little_memory(workspace, folder):
    with open(folder / "sparse", "wb") as file:
        file.truncate(300 * MIB)

    with little_memory(8 * MIB), workspace.open("sparse") as file:
        assert sum(len(chunk) for chunk in file.chunks()) == 300 * MIB
    with little_memory(16 * MIB):
        assert sum(len(chunk) for chunk in workspace.archive()) > 300 * MIB


def test_an_upload_and_an_archive_of_any_size_come_in_in_little_memory(workspace):
    with little_memory(16 * MIB):
        workspace.write("file", (bytes(MIB) for _ in range(200)))
        workspace.unarchive(Joined(workspace.archive()))  # over itself, while it is read
    assert workspace.stat("file").size == 200 * MIB


def test_a_file_that_is_cut_short_breaks_off_and_one_that_grows_ends_where_it_did(workspace, folder):
    (folder / "file").write_bytes(b"x" * MIB)
    (folder / "log").write_bytes(b"x" * MIB)

    with workspace.open("file") as file, workspace.open("log") as log:
        chunks = file.chunks()
        next(chunks)
        os.truncate(folder / "file", 10)
        with pytest.raises(JhansiError, match="cut short"):
            list(chunks)
        with open(folder / "log", "ab") as more:
            more.write(b"more")
        assert sum(map(len, log.chunks())) == MIB
    with pytest.raises(JhansiError, match="not open"):
        next(log.chunks())


def test_what_is_open_is_read_whatever_takes_its_name(workspace, folder):
    (folder / "file").write_bytes(b"old")

    with workspace.open("file") as file:
        (folder / "file").unlink()
        os.mkfifo(folder / "file")
        assert b"".join(file.chunks()) == b"old"
    with pytest.raises(InvalidRequestError, match="fifo"):
        opened(workspace, "file")


# --- entity tags ---


def test_every_change_of_a_file_changes_its_tag(workspace, folder):
    def cut():
        os.truncate(folder / "file", 2)

    def rewrite_in_place():
        with open(folder / "file", "r+b") as file:
            file.write(b"zz")

    def rewrite_and_set_the_old_time():
        times = ((folder / "file").stat().st_atime_ns, (folder / "file").stat().st_mtime_ns)
        (folder / "file").write_bytes(b"yy")
        os.utime(folder / "file", ns=times)

    tags = [workspace.write("file", [b"xxx"]).etag]
    assert opened(workspace, "file")[1] == tags[0] == opened(workspace, "file")[1]
    for change in (cut, rewrite_in_place, rewrite_and_set_the_old_time, lambda: workspace.write("file", [b"yy"])):
        change()
        tags.append(opened(workspace, "file")[1])
    assert len(set(tags)) == 5
    assert all(tag.startswith('"') and tag.endswith('"') for tag in tags)


def test_changes_in_quick_succession_are_told_apart(workspace, folder):
    (folder / "file").write_bytes(b"0000")
    tags = []
    with open(folder / "file", "r+b", buffering=0) as file:
        for number in range(50):
            os.pwrite(file.fileno(), b"%04d" % number, 0)
            content, tag = opened(workspace, "file")
            tags.append(tag)
            assert content == b"%04d" % number

    assert len(set(tags)) == 50


_WRITES_ALL_THE_TIME = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY)
while os.getppid() == int(sys.argv[2]):
    os.pwrite(fd, b"y", 0)
    os.fstat(fd)  # so that the kernel gives every write a time of its own
"""


def test_a_file_that_is_written_all_the_time_has_a_weak_tag(workspace, folder):
    (folder / "file").write_bytes(b"x")
    tag = opened(workspace, "file")[1]
    command = [sys.executable, "-c", _WRITES_ALL_THE_TIME, folder / "file", str(os.getpid())]
    with subprocess.Popen(command) as writer:
        deadline = time.monotonic() + 20
        while not tag.startswith('W/"') and time.monotonic() < deadline:
            tag = opened(workspace, "file")[1]
        writer.kill()

    assert tag.startswith('W/"')
    with pytest.raises(PreconditionFailedError):
        workspace.write("file", [b"z"], if_match=tag)


# --- conditional writes ---


def test_a_write_says_what_it_made(workspace, folder):
    before = time.time_ns()
    first = workspace.write("a/file", [b"one"])
    assert before <= (folder / "a/file").stat().st_mtime_ns <= time.time_ns()
    second = workspace.write("a/file", [b"four"])

    assert (first.created, second.created) == (True, False)
    assert (second.info.path, second.info.size) == ("a/file", 4)
    assert opened(workspace, "a/file") == (b"four", second.etag)


def test_a_write_with_the_tag_that_is_there_wins_and_with_an_old_one_fails(workspace):
    first = workspace.write("file", [b"one"])
    second = workspace.write("file", [b"two"], if_match=first.etag)

    with pytest.raises(PreconditionFailedError, match="has changed") as caught:
        workspace.write("file", [b"three"], if_match=first.etag)
    assert caught.value.http_status == 412
    assert opened(workspace, "file") == (b"two", second.etag)
    workspace.write("file", [b"four"], if_match=f'"other", {second.etag}')
    workspace.write("file", [b"five"], if_match="*")
    assert opened(workspace, "file")[0] == b"five"


def test_a_condition_on_a_link_is_one_on_what_it_leads_to(workspace, folder):
    target = workspace.write("target", [b"old"])
    (folder / "link").symlink_to("target")
    (folder / "dangling").symlink_to("nothing")

    for path in ("link", "dangling"):
        with pytest.raises(PreconditionFailedError):
            workspace.write(path, [b"new"], if_match='"other"')
        with pytest.raises(PreconditionFailedError):
            workspace.write(path, [b"new"], if_none_match=True)
    workspace.write("link", [b"new"], if_match=target.etag)
    assert opened(workspace, "link")[0] == b"new"
    assert opened(workspace, "target")[0] == b"old"


def test_a_condition_that_cannot_be_met_reads_nothing_and_makes_nothing(workspace, folder):
    def unread():
        raise AssertionError
        yield b""

    workspace.write("file", [b"old"])
    for path, condition in (
        ("file", {"if_none_match": True}),
        ("file", {"if_match": '"other"'}),
        ("new/file", {"if_match": "*"}),
        ("new/file", {"if_match": '"other"'}),
    ):
        with pytest.raises(PreconditionFailedError):
            workspace.write(path, unread(), **condition)
    assert tree(folder) == {"file": ("file", 0o644, b"old")}


@pytest.mark.parametrize("is_there", [True, False])
def test_of_many_writers_with_one_condition_exactly_one_wins(workspace, folder, is_there):
    condition = {"if_match": workspace.write("file", [b"old"]).etag} if is_there else {"if_none_match": True}
    together = threading.Barrier(8)
    won, lost = [], []

    def write(number):
        def content():
            together.wait()  # all have seen by now that the condition is met
            yield b"%d" % number

        with open_workspace(str(folder)) as own:
            try:
                own.write("file", content(), **condition)
            except PreconditionFailedError:
                lost.append(number)
            else:
                won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 7)
    assert tree(folder) == {"file": ("file", 0o644, b"%d" % won[0])}


def test_a_new_file_never_takes_the_place_of_one_that_a_job_has_just_made(workspace, folder):
    made, lost, done = 0, 0, threading.Event()

    def job():
        nonlocal made, lost
        while not done.is_set():
            with contextlib.suppress(FileExistsError), open(folder / "file", "xb") as file:
                made += 1
                lost += not os.path.samestat(os.stat(file.fileno()), (folder / "file").stat())
            (folder / "file").unlink(missing_ok=True)

    thread = threading.Thread(target=job)
    thread.start()
    written = 0
    try:
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            with contextlib.suppress(PreconditionFailedError):
                workspace.write("file", [], if_none_match=True)
                written += 1
    finally:
        done.set()
        thread.join()
    assert made
    assert written
    assert not lost


def test_a_file_keeps_its_permissions_when_it_is_written_anew(workspace, folder):
    workspace.write("tool", [b"one"], mode=0o750)
    workspace.write("tool", [b"two"])
    assert tree(folder) == {"tool": ("file", 0o750, b"two")}

    (folder / "tool").chmod(0o4050)
    assert workspace.write("tool", [b"three"]).info.mode == 0o650


def test_a_broken_upload_leaves_nothing_but_what_was_there(workspace, folder):
    workspace.write("file", [b"old"])

    def broken():
        yield b"new"
        assert tree(folder) == {"file": ("file", 0o644, b"old")}, "a job would see the draft"
        raise ConnectionError

    for path in ("file", "new/folder/file"):
        with pytest.raises(ConnectionError):
            workspace.write(path, broken())
    assert tree(folder) == {"file": ("file", 0o644, b"old")}


_WRITES_FOREVER = """
import sys
from jhansi_runtime.workspace import open_workspace
def endless():
    yield b"x" * 1_000_000
    print("up", flush=True)
    sys.stdin.read()
with open_workspace(sys.argv[1]) as workspace:
    workspace.write("file", endless())
"""


def test_a_killed_write_leaves_no_draft(workspace, folder):
    workspace.write("file", [b"old"])
    command = [sys.executable, "-c", _WRITES_FOREVER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"up\n"
        writer.send_signal(signal.SIGKILL)

    assert tree(folder) == {"file": ("file", 0o644, b"old")}
    assert workspace.write("file", [b"new"]).created is False


# As on a file system that knows no files without a name: the kernel refuses O_TMPFILE, beyond what O_DIRECTORY is.
_WITHOUT_TMPFILE = """
import errno, os, sys
import pyseccomp
from jhansi_runtime.errors import PreconditionFailedError
from jhansi_runtime.workspace import open_workspace
refusing = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
nameless = os.O_TMPFILE & ~os.O_DIRECTORY
action = pyseccomp.ERRNO(errno.EOPNOTSUPP)
refusing.add_rule(action, "openat", pyseccomp.Arg(2, pyseccomp.MASKED_EQ, nameless, nameless))
refusing.load()
def drafts():
    return [name for name in os.listdir(sys.argv[1]) if name.startswith(".jhansi-")]
def broken():
    yield b"x"
    assert len(drafts()) == 1
    raise ConnectionError
with open_workspace(sys.argv[1]) as workspace:
    for content in (b"one", b"two"):
        workspace.write("a/file", [content])
    try:
        workspace.write("new/file", broken())
    except ConnectionError:
        pass
    workspace.write("new", [b"four"], if_none_match=True)
    def late():
        os.link(sys.argv[1] + "/new", sys.argv[1] + "/late")
        yield b"five"
    try:
        workspace.write("late", late(), if_none_match=True)
    except PreconditionFailedError:
        print("there", drafts())
"""


def test_a_file_system_without_nameless_files_will_do(folder):
    (folder / "a").mkdir()
    answer = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TMPFILE, folder], capture_output=True, text=True, check=False
    )

    assert (answer.stdout, answer.stderr) == ("there []\n", "")
    assert tree(folder) == {
        "a": ("directory", 0o755),
        "a/file": ("file", 0o644, b"two"),
        "late": ("file", 0o644, b"four"),
        "new": ("file", 0o644, b"four"),
    }


# --- out as a tar ---


def test_a_workspace_comes_back_from_its_archive_as_it_was(workspace, folder, tmp_path):
    for name in ODD_NAMES:
        workspace.write(f"{name}/{name}", [name.encode("utf-8", "surrogateescape") * 1000], mode=0o640)
    (folder / "tool").write_text("#!/bin/sh\n")
    (folder / "tool").chmod(0o755)
    (folder / "empty").mkdir(mode=0o711)
    (folder / "empty file").touch(mode=0o444)
    (folder / "link").symlink_to("new\nline/\udcff")
    (folder / "out").symlink_to("/etc/passwd")
    os.utime(folder / "tool", (0, 1_600_000_000))
    (tmp_path / "copy" / "root").mkdir(parents=True)

    archived = packed(workspace)
    with open_workspace(str(tmp_path / "copy" / "root")) as copy:
        unpacked = copy.unarchive(Trickle(archived))

    assert tree(tmp_path / "copy" / "root") == tree(folder)
    assert unpacked.members == len(tree(folder))
    assert (tmp_path / "copy" / "root" / "tool").stat().st_mtime == 1_600_000_000


def test_an_archive_is_read_by_tar(workspace, folder, tmp_path):
    for name in ODD_NAMES:
        workspace.write(name, [b"x"])
    (folder / "link").symlink_to("a b")
    (tmp_path / "out").mkdir()

    subprocess.run(["tar", "-x", "-C", tmp_path / "out"], input=packed(workspace), check=True)
    assert tree(tmp_path / "out") == tree(folder)


def test_an_archive_holds_no_special_file_no_setuid_bit_and_nothing_of_the_host(workspace, folder):
    (folder / "tool").touch()
    (folder / "tool").chmod(0o6755)
    (folder / "closed").touch(mode=0)
    (folder / "shut").mkdir(mode=0)
    os.mkfifo(folder / "fifo")
    os.mknod(folder / "socket", stat.S_IFSOCK | 0o600)

    with tarfile.open(fileobj=io.BytesIO(packed(workspace))) as archive:
        members = {info.name: info for info in archive.getmembers()}
    assert members.keys() == {"tool", "shut"}
    assert members["tool"].mode == 0o755
    assert {(info.uid, info.gid, info.uname) for info in members.values()} == {(1000, 1000, "sandbox")}
    (folder / "shut").chmod(0o700)  # for pytest, which removes it


def test_a_file_that_changes_its_size_meanwhile_breaks_no_archive(workspace, folder):
    for name in ("cut", "grown"):
        (folder / name).write_bytes(b"x" * 3 * MIB)
    (folder / "last").write_bytes(b"last")

    chunks = workspace.archive()
    archived = [next(chunks)]
    os.truncate(folder / "cut", MIB)
    archived += [next(chunks) for _ in range(14)]  # which ends within the second
    with open(folder / "grown", "ab") as file:
        file.write(b"more")
    archived += list(chunks)

    with tarfile.open(fileobj=io.BytesIO(b"".join(archived))) as archive:
        contents = {info.name: archive.extractfile(info).read() for info in archive.getmembers()}
    assert contents == {"cut": b"x" * MIB + bytes(2 * MIB), "grown": b"x" * 3 * MIB, "last": b"last"}


def test_an_archive_that_nobody_takes_to_its_end_leaves_nothing_open(workspace, folder):
    (folder / "file").write_bytes(b"x" * MIB)

    chunks = workspace.archive()
    next(chunks)
    chunks.close()


# --- in from a tar ---


@pytest.mark.parametrize(
    "compress", [bytes, gzip.compress, lzma.compress, zstandard.ZstdCompressor().compress], ids=["", "gz", "xz", "zst"]
)
def test_a_compressed_archive_is_known_by_its_first_bytes_and_merged_in(workspace, folder, compress):
    workspace.write("both/mine", [b"mine"])
    workspace.write("both/file", [b"old"])
    (folder / "link").symlink_to("both/mine")
    data = tar(
        directory("both", 0o700),
        member("both/file", b"new", mode=0o600),
        member("link", b"no link"),
        member("new/deep/file", b"x" * 100_000),
        hard_link("new/same", "new/deep/file"),
    )

    unpacked = workspace.unarchive(Trickle(compress(data)))

    assert (unpacked.members, unpacked.contents, unpacked.inert) == (5, 100_010, ())
    assert tree(folder) == {
        "both": ("directory", 0o755),
        "both/mine": ("file", 0o644, b"mine"),
        "both/file": ("file", 0o600, b"new"),
        "link": ("file", 0o644, b"no link"),
        "new": ("directory", 0o755),
        "new/deep": ("directory", 0o755),
        "new/deep/file": ("file", 0o644, b"x" * 100_000),
        "new/same": ("file", 0o644, b"x" * 100_000),
    }


@pytest.mark.parametrize(
    "evil",
    [
        [member("../evil", b"x")],
        [member("a/../../evil", b"x")],
        [member("/tmp/evil", b"x")],
        [link("out", ".."), member("out/evil", b"x")],
        [link("out", "/tmp"), member("out/evil", b"x")],
        [hard_link("passwd", "/etc/passwd")],
        [link("up", "../root"), hard_link("stolen", "up/kept")],
    ],
)
def test_an_archive_that_wants_out_changes_nothing(workspace, folder, evil):
    workspace.write("kept", [b"kept"])
    around = tree(folder.parent)

    with pytest.raises(HostileArchiveError):
        workspace.unarchive(io.BytesIO(tar(member("first", b"x"), member("kept", b"lost"), *evil)))
    assert tree(folder.parent) == around


def test_what_is_harmless_once_left_out_is_left_out_and_told(workspace, folder):
    unpacked = workspace.unarchive(io.BytesIO(tar(DEVICE, FIFO, member("tool", b"x", mode=0o6755))))

    assert tree(folder) == {"tool": ("file", 0o755, b"x")}
    assert unpacked.inert_count == 3
    assert [line.rpartition(": ")[2] for line in unpacked.inert] == ["'null'", "'fifo'", "'tool'"]


def test_a_link_that_is_already_in_the_workspace_is_not_unpacked_through(workspace, folder, tmp_path):
    (tmp_path / "host").mkdir()
    (folder / "out").symlink_to(tmp_path / "host")
    (folder / "round").symlink_to(".")

    for name in ("out", "round"):
        with pytest.raises(ConflictError, match=f"'{name}' is a link in the workspace"):
            workspace.unarchive(io.BytesIO(tar(member("first"), member(f"{name}/file", b"x"))))
    assert os.listdir(tmp_path / "host") == []
    assert sorted(os.listdir(folder)) == ["out", "round"]


@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress, zstandard.ZstdCompressor().compress])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_an_archive_that_breaks_off_changes_nothing(workspace, folder, compress, part):
    workspace.write("kept", [b"kept"])
    around = tree(folder.parent)
    data = compress(tar(member("kept", b"lost"), *(member(f"file{number}", os.urandom(9_999)) for number in range(9))))

    with pytest.raises(InvalidRequestError):
        workspace.unarchive(Trickle(data[: int(len(data) * part)], at_once=5_000))
    assert tree(folder.parent) == around


def test_a_stream_that_fails_changes_nothing(workspace, folder):
    workspace.write("kept", [b"kept"])
    around = tree(folder.parent)

    class Failing(Trickle):
        def read(self, size):
            if data := super().read(size):
                return data
            raise EOFError("the client is gone")

    with pytest.raises((EOFError, JhansiError)):
        workspace.unarchive(Failing(tar(member("kept", b"lost" * 10_000))[:20_000]))
    assert tree(folder.parent) == around


@pytest.mark.parametrize(
    ("there", "members"),
    [
        ("file/below", [member("file", b"x")]),
        ("file", [member("file/below", b"x")]),
        ("shut/file", [member("shut/other", b"x")]),
    ],
)
def test_an_archive_that_does_not_fit_changes_nothing(workspace, folder, there, members):
    workspace.write(there, [b"kept"])
    if there.startswith("shut"):
        (folder / "shut").chmod(0o500)
    around = tree(folder.parent)

    with pytest.raises((ConflictError, InvalidRequestError), match="nothing was unpacked"):
        workspace.unarchive(io.BytesIO(tar(member("aaa", b"x"), *members, member("zzz", b"x"))))
    assert tree(folder.parent) == around


_UNPACKS_FOREVER = """
import sys
from jhansi_runtime.workspace import open_workspace
with open_workspace(sys.argv[1]) as workspace:
    workspace.unarchive(sys.stdin.buffer)
"""


def test_what_a_killed_unpacking_left_is_swept_and_what_a_living_one_needs_is_not(workspace, folder):
    data = tar(member("first", b"x" * MIB), member("second", b"x" * MIB))
    command = [sys.executable, "-c", _UNPACKS_FOREVER, str(folder)]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE) as killed,
        subprocess.Popen(command, stdin=subprocess.PIPE) as living,
    ):
        for process in (killed, living):
            process.stdin.write(data[: len(data) // 2 + 100_000])
            process.stdin.flush()
        until(lambda: len([path for path in tree(folder.parent) if path.endswith("/first")]) == 2)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert tree(folder) == {}

        workspace.sweep()
        assert len([path for path in tree(folder.parent) if path.endswith("/first")]) == 1
        with contextlib.suppress(BrokenPipeError):
            killed.stdin.close()
        living.stdin.write(data[len(data) // 2 + 100_000 :])
        living.stdin.close()
        assert living.wait() == 0
    assert tree(folder).keys() == {"first", "second"}


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# What a job does meanwhile: a folder is a link to the host's and a folder again, a file a FIFO and a file again.
_SWAPS = """
import os, sys
folder, host, parent = sys.argv[1], sys.argv[2], int(sys.argv[3])
os.chdir(folder)
os.symlink(host, "link")
os.mkfifo("fifo")
print("up", flush=True)
while os.getppid() == parent:
    for thing, other in (("folder", "link"), ("file", "fifo")):
        for _ in range(2):
            try:
                os.rename(thing, "aside")
                os.rename(other, thing)
                os.rename("aside", other)
            except OSError:
                pass
"""


def test_a_job_that_swaps_what_is_moved_gains_nothing(workspace, folder, tmp_path):
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "secret").write_text("of the host's")
    workspace.write("folder/file", [b"mine"])
    workspace.write("file", [b"mine"])
    data = tar(member("folder/evil", b"x"), member("folder/secret", b"x"))
    command = [sys.executable, "-c", _SWAPS, folder, tmp_path / "host", str(os.getpid())]
    done = {"packed": 0, "unpacked": 0, "written": 0, "read": 0}
    with subprocess.Popen(command, stdout=subprocess.PIPE) as job:
        job.stdout.readline()
        try:
            deadline = time.monotonic() + 2
            while time.monotonic() < deadline:
                with contextlib.suppress(JhansiError):
                    assert b"of the host's" not in packed(workspace)
                    done["packed"] += 1
                with contextlib.suppress(JhansiError):
                    workspace.unarchive(io.BytesIO(data))
                    done["unpacked"] += 1
                with contextlib.suppress(JhansiError):
                    workspace.write("folder/secret", [b"x"])
                    done["written"] += 1
                with contextlib.suppress(JhansiError):
                    assert opened(workspace, "folder/secret")[0] == b"x"
                    done["read"] += 1
        finally:
            job.kill()

    assert all(done.values()), done
    assert tree(tmp_path / "host") == {"secret": ("file", 0o644, b"of the host's")}


# --- the verbs ---


@pytest.fixture
def runtime(tmp_path):
    paths = Paths.from_environment()._replace(home=str(tmp_path / "home"), workspaces=str(tmp_path / "workspaces"))
    with Runtime(paths) as runtime:
        yield runtime


def test_the_verbs_write_the_audit_log_and_hold_the_sandbox(runtime):
    sandbox = runtime.create(rootfs="host")
    tag = runtime.store(sandbox.id, "a/file", [b"one", b"two"]).etag
    with pytest.raises(PreconditionFailedError):
        runtime.store(sandbox.id, "a/file", [b""], if_none_match=True)
    with runtime.opened(sandbox.id, "a/file") as file:
        assert (b"".join(file.chunks(2, 5)), file.etag) == (b"etw", tag)
        with pytest.raises(ConflictError):
            runtime.remove(sandbox.id)

    chunks = runtime.archive(sandbox.id)
    first = next(chunks)
    with pytest.raises(ConflictError):
        runtime.remove(sandbox.id)
    archived = first + b"".join(chunks)
    runtime.remove_file(sandbox.id, "a")
    assert runtime.files(sandbox.id) == []
    assert runtime.unarchive(sandbox.id, io.BytesIO(archived)).members == 2
    assert runtime.read(sandbox.id, "a/file") == b"onetwo"
    runtime.remove(sandbox.id)

    with pytest.raises(NotFoundError):
        runtime.archive(sandbox.id)
    records = [record for record in runtime.audit.records() if record["event"].startswith("files.")]
    assert [(record["event"], record.get("files"), record.get("bytes")) for record in records] == [
        ("files.write", 1, 6),
        ("files.delete", None, None),
        ("files.write", 2, 6),
    ]
