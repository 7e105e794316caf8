"""What users do with the files of a workspace: list, read, write, remove, put, get, and name one to be run."""

import hashlib
import os
import stat
import subprocess
import sys

import pytest

from jhansi_runtime.errors import (
    ConflictError,
    DiskLimitError,
    InvalidRequestError,
    NotExecutableError,
    NotFoundError,
    ProgramMissingError,
)
from jhansi_runtime.workspace import open_workspace

# Names that a careless path function would trip over: as os.fsdecode gives them.
ODD_NAMES = ["a b", "new\nline", "\x1b[31mred", "caf\u00e9", "\udcff\udc80", "-rf", "*", "..x", "x" * 255, "\u202egnp"]
NOWHERE = ["/etc/passwd", "../x", "a/../b", "..", "a\0b", "/workspace/../x", "\ud800"]


@pytest.fixture
def folder(tmp_path):
    """The folder of the workspace, as a job sees it."""
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def workspace(folder):
    with open_workspace(str(folder)) as opened:
        before = os.listdir("/proc/self/fd")
        yield opened
        assert os.listdir("/proc/self/fd") == before, "a descriptor was left open"


@pytest.fixture
def outside(tmp_path):
    """A folder of the host that is none of a job's business."""
    (tmp_path / "outside").mkdir()
    return tmp_path / "outside"


def read(workspace, path):
    return b"".join(workspace.read(path))


def tree(folder):
    """Everything below a folder: path -> (permissions, what is in it)."""
    found = {}
    for above, folders, files in os.walk(folder):
        for name in folders + files:
            path = os.path.join(above, name)
            mode = stat.S_IMODE(os.lstat(path).st_mode)
            if os.path.islink(path):
                content = ("link", os.readlink(path))
            elif os.path.isdir(path):
                content = ("directory", mode)
            else:
                with open(path, "rb") as file:
                    content = ("file", mode, file.read())
            found[os.path.relpath(path, folder)] = content
    return found


# --- paths ---


@pytest.mark.parametrize("path", ["", *NOWHERE])
def test_a_path_that_is_not_in_the_workspace_is_refused(workspace, path):
    for verb in (workspace.open_program, workspace.remove, lambda path: workspace.write(path, [])):
        with pytest.raises(InvalidRequestError):
            verb(path)
    with pytest.raises(InvalidRequestError):
        read(workspace, path)


@pytest.mark.parametrize("path", ["a/b", "./a//b", "a/./b/", "/workspace/a/b"])
def test_one_file_has_many_spellings(workspace, path):
    assert workspace.write(path, [b"x"]).info.path == "a/b"
    assert read(workspace, path) == b"x"
    assert workspace.open_program(path).path == "a/b"


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_may_hold_any_bytes(workspace, folder, outside, name):
    info = workspace.write(f"{name}/{name}", [b"x"]).info

    assert info.path == f"{name}/{name}"
    assert [file.path for file in workspace.files(recursive=True)] == [name, f"{name}/{name}"]
    assert workspace.get(name, str(outside)) == 1
    assert tree(outside) == tree(folder)
    workspace.remove(name)
    assert [file.path for file in workspace.put(os.path.join(outside, name))] == [name, f"{name}/{name}"]
    assert tree(outside) == tree(folder)


def test_a_message_holds_no_character_that_a_terminal_obeys(workspace):
    with pytest.raises(NotFoundError) as caught:
        workspace.remove("\x1b[31mred\n\udcff")

    assert str(caught.value).isprintable()


# --- the program ---


def test_a_program_is_known_by_its_path_hash_and_permissions(workspace, folder):
    content = os.urandom(3_000_000)
    (folder / "main.py").write_bytes(content)

    digest, head = hashlib.sha256(content).hexdigest(), content[: 64 * 1024]
    assert workspace.open_program("main.py") == ("main.py", digest, False, 3_000_000, head)
    (folder / "main.py").chmod(0o755)
    assert workspace.open_program("main.py").executable


def test_a_program_may_be_reached_by_a_link_that_stays_inside(workspace, folder):
    (folder / "source").mkdir()
    (folder / "source" / "real.py").write_text("pass")
    (folder / "source" / "up.py").symlink_to("../source/real.py")
    (folder / "main.py").symlink_to("source/up.py")

    assert workspace.open_program("main.py").size == 4
    assert workspace.open_program("main.py").path == "main.py"


@pytest.mark.parametrize("path", ["main.py", "sub/main.py", "file/main.py", "dangling", "x" * 256, "x/" * 3000 + "x"])
def test_a_program_that_is_not_there_is_missing(workspace, folder, path):
    (folder / "file").write_text("")
    (folder / "dangling").symlink_to("nothing")

    with pytest.raises(ProgramMissingError):
        workspace.open_program(path)


def test_what_cannot_be_a_program_is_told_apart(workspace, folder, outside):
    (outside / "secret").write_text("secret")
    (folder / "directory").mkdir()
    os.mkfifo(folder / "fifo")
    os.mknod(folder / "socket", stat.S_IFSOCK | 0o600)
    (folder / "absolute").symlink_to(outside / "secret")
    (folder / "climbing").symlink_to("../outside/secret")
    (folder / "circle").symlink_to("circle")
    with open(folder / "huge", "wb") as file:
        file.truncate(2 * 1024**3)

    for path, reason in {
        "directory": "directory",
        ".": "directory",
        "fifo": "fifo",
        "socket": "socket",
        "absolute": "leads out",
        "climbing": "leads out",
        "circle": "circles",
        "huge": "bytes",
    }.items():
        with pytest.raises(NotExecutableError, match=reason):
            workspace.open_program(path)


# --- listing ---


def test_files_are_listed_in_order_with_what_they_are(workspace, folder):
    (folder / "b").mkdir(mode=0o750)
    (folder / "b" / "inner").write_text("12345")
    (folder / "a.txt").write_text("123")
    (folder / "a.txt").chmod(0o640)
    os.utime(folder / "a.txt", (0, 1_700_000_000.25))
    (folder / "c").symlink_to("/etc/passwd")

    listed = list(workspace.files())
    assert [(file.path, file.type) for file in listed] == [("a.txt", "file"), ("b", "directory"), ("c", "link")]
    assert (listed[0].size, listed[0].mode, listed[0].mtime) == (3, 0o640, "2023-11-14T22:13:20.250000Z")
    assert [file.path for file in workspace.files(recursive=True)] == ["a.txt", "b", "b/inner", "c"]
    assert [file.path for file in workspace.files("b")] == ["b/inner"]


def test_a_listing_follows_a_link_it_is_given_but_none_that_it_meets(workspace, folder):
    (folder / "real").mkdir()
    (folder / "real" / "file").write_text("")
    (folder / "link").symlink_to("real")

    assert [file.path for file in workspace.files("link")] == ["link/file"]
    assert [file.path for file in workspace.files(recursive=True)] == ["link", "real", "real/file"]


def test_a_listing_says_what_is_wrong_with_its_folder(workspace, folder):
    (folder / "file").write_text("")

    with pytest.raises(NotFoundError):
        list(workspace.files("nothing"))
    with pytest.raises(InvalidRequestError, match="not a folder"):
        list(workspace.files("file"))


def test_a_listing_is_bounded(workspace, folder):
    for number in range(5):
        (folder / f"d{number}").mkdir()
        (folder / f"d{number}" / "file").write_text("")

    assert len(list(workspace.files(limit=5))) == 5
    assert len(list(workspace.files(recursive=True, limit=10))) == 10
    for limit, recursive in ((4, False), (9, True)):
        with pytest.raises(InvalidRequestError, match="too many"):
            list(workspace.files(recursive=recursive, limit=limit))


@pytest.mark.parametrize("seconds", [-(2**40), -1, 2**32, 2**40])
def test_a_time_that_no_calendar_has_is_listed_as_the_nearest_that_has_one(workspace, folder, seconds):
    (folder / "file").write_text("")
    os.utime(folder / "file", (seconds, seconds))

    assert len(next(workspace.files()).mtime) == len("2023-11-14T22:13:20.250000Z")


# --- reading, writing, removing ---


def test_what_is_written_is_read_and_belongs_to_a_new_file(workspace, folder):
    (folder / "file").write_bytes(b"old")
    (folder / "same").hardlink_to(folder / "file")

    info = workspace.write("file", [b"new ", b"", b"content"], mode=0o4750).info

    assert (info.size, info.mode, info.type) == (11, 0o750, "file")
    assert read(workspace, "file") == b"new content"
    assert (folder / "same").read_bytes() == b"old"
    assert workspace.write("empty", [], mode=0o6755).info.mode == 0o755
    assert tree(folder).keys() == {"file", "same", "empty"}


def test_the_umask_does_not_change_what_is_written(workspace, folder):
    before = os.umask(0o077)
    try:
        workspace.write("a/b", [b""], mode=0o666)
    finally:
        os.umask(before)

    assert tree(folder) == {"a": ("directory", 0o755), "a/b": ("file", 0o666, b"")}


def test_a_write_that_fails_midway_keeps_the_old_file(workspace, folder):
    workspace.write("file", [b"old"])

    def broken():
        yield b"new"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        workspace.write("file", broken())
    assert tree(folder) == {"file": ("file", 0o644, b"old")}


def test_a_write_goes_through_no_link_and_over_no_folder(workspace, folder, outside):
    (outside / "file").write_text("kept")
    (folder / "real").mkdir()
    (folder / "inside").symlink_to("real")
    (folder / "out").symlink_to(outside)
    (folder / "link").symlink_to(outside / "file")

    for path in ("inside/x", "out/x", "out/new/x"):
        with pytest.raises(InvalidRequestError, match="link"):
            workspace.write(path, [b"x"])
    with pytest.raises(ConflictError, match="folder"):
        workspace.write("real", [b"x"])
    workspace.write("link", [b"x"])
    assert not (folder / "link").is_symlink()
    assert tree(outside) == {"file": ("file", 0o644, b"kept")}


def test_a_read_goes_through_links_that_stay_inside_only(workspace, folder, outside):
    (outside / "file").write_text("secret")
    (folder / "file").write_text("mine")
    (folder / "inside").symlink_to("./file")
    (folder / "out").symlink_to("../outside/file")
    os.mkfifo(folder / "fifo")

    assert read(workspace, "inside") == b"mine"
    for path, reason in (("out", "leads out"), ("fifo", "fifo"), (".", "directory")):
        with pytest.raises(InvalidRequestError, match=reason):
            read(workspace, path)
    with pytest.raises(NotFoundError):
        read(workspace, "nothing")


def test_a_file_or_a_folder_is_removed_and_a_link_is_not_followed(workspace, folder, outside):
    (outside / "file").write_text("kept")
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "file").write_text("")
    (folder / "file").write_text("")
    (folder / "link").symlink_to(outside)

    for path in ("a", "file", "link"):
        workspace.remove(path)
    assert tree(folder) == {}
    assert tree(outside) == {"file": ("file", 0o644, b"kept")}
    with pytest.raises(NotFoundError):
        workspace.remove("file")
    with pytest.raises(InvalidRequestError):
        workspace.remove(".")


_ON_AN_OVERLAY = """
import os, subprocess, sys
from jhansi_runtime.workspace import open_workspace
top = sys.argv[1]
os.makedirs(top + "/lower/a/b/c/d")
for path in ("lower/a/b/file", "lower/a/b/c/d/file"):
    open(f"{top}/{path}", "w").close()
for name in ("upper", "work", "workspace"):
    os.mkdir(f"{top}/{name}")
options = f"userxattr,lowerdir={top}/lower,upperdir={top}/upper,workdir={top}/work"
subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", top + "/workspace"], check=True)
with open_workspace(top + "/workspace") as workspace:
    workspace.write("a/b/e/new", [b"x"])
    workspace.remove("a")
    print(list(workspace.files()))
"""


def test_a_folder_that_came_with_a_container_image_is_removed(folder):
    command = ["unshare", "-Urm", sys.executable, "-c", _ON_AN_OVERLAY, str(folder)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (answer.stdout, answer.stderr) == ("[]\n", "")
    subprocess.run(["chmod", "-R", "u+rwx", folder], check=True)  # overlayfs shuts the folder it works in


# --- putting ---


def test_a_folder_is_put_as_it_is(workspace, folder, outside):
    (outside / "sub" / "empty").mkdir(parents=True)
    (outside / "sub" / "tool").write_text("#!/bin/sh\n")
    (outside / "sub" / "tool").chmod(0o4755)
    (outside / "link").symlink_to("sub/tool")
    (outside / "sub" / "up").symlink_to("../sub/tool")
    os.utime(outside / "sub" / "tool", ns=(0, 1_600_000_000_123_456_789))
    (outside / "sub").chmod(0o555)
    try:
        put = workspace.put(str(outside), "deep/er")
        again = workspace.put(str(outside), "deep/er")
    finally:
        (outside / "sub").chmod(0o755)

    assert [file.path for file in put] == [
        f"deep/er/outside{below}" for below in ("", "/link", "/sub", "/sub/empty", "/sub/tool", "/sub/up")
    ]
    assert [file.path for file in again] == [file.path for file in put]
    copied = folder / "deep/er/outside"
    assert tree(copied) == {
        "link": ("link", "sub/tool"),
        "sub": ("directory", 0o555),
        "sub/empty": ("directory", 0o755),
        "sub/tool": ("file", 0o755, b"#!/bin/sh\n"),
        "sub/up": ("link", "../sub/tool"),
    }
    assert (copied / "sub/tool").stat().st_mtime_ns == 1_600_000_000_123_456_789
    (copied / "sub").chmod(0o755)  # for pytest, which removes it


def test_a_file_is_put_under_its_own_name_and_a_source_that_is_a_link_is_followed(workspace, folder, outside):
    (outside / "real").write_text("content")
    (outside / "name").symlink_to("real")

    assert [file.path for file in workspace.put(str(outside / "name"))] == ["name"]
    assert tree(folder) == {"name": ("file", 0o644, b"content")}


def test_a_folder_is_merged_into_the_one_that_is_there(workspace, outside):
    workspace.write("outside/mine", [b"mine"])
    workspace.write("outside/both", [b"old"])
    (outside / "both").write_text("new")

    workspace.put(str(outside))

    assert read(workspace, "outside/mine") == b"mine"
    assert read(workspace, "outside/both") == b"new"


@pytest.mark.parametrize("target", ["/etc/passwd", "..", "../outside2", "sub/../../x", "sub/../file", "../../../etc"])
def test_a_folder_with_a_link_that_may_lead_out_is_refused_before_anything_is_copied(
    workspace, folder, outside, target
):
    (outside / "file").write_text("")
    (outside / "sub").mkdir()
    (outside / "zz").symlink_to(target)

    with pytest.raises(InvalidRequestError, match="leads out"):
        workspace.put(str(outside))
    assert tree(folder) == {}


def test_special_and_missing_sources_are_refused(workspace, folder, outside):
    os.mkfifo(outside / "fifo")

    for source, kind in ((outside, "fifo"), (outside / "fifo", "fifo"), ("/dev/null", "device"), ("/", "name")):
        with pytest.raises(InvalidRequestError, match=kind):
            workspace.put(str(source))
    with pytest.raises(NotFoundError):
        workspace.put(str(outside / "nothing"))
    assert tree(folder) == {}


def test_a_folder_that_holds_the_workspace_is_refused(workspace, folder):
    with pytest.raises(InvalidRequestError, match="workspace itself"):
        workspace.put(str(folder.parent))
    assert tree(folder) == {}


def test_a_file_whose_size_is_not_known_before_it_is_read_is_put_whole(workspace):
    workspace.put("/proc/version")

    with open("/proc/version", "rb") as file:
        assert read(workspace, "version") == file.read()


def test_the_holes_of_a_sparse_file_stay_holes(workspace, folder, outside):
    with open(outside / "sparse", "wb") as file:
        file.write(b"head")
        file.seek(200 * 1024**2)
        file.write(b"middle")
        file.truncate(1024**4)

    workspace.put(str(outside / "sparse"))
    assert workspace.get("sparse", str(outside / "back")) == 1024**4

    for copy in (folder / "sparse", outside / "back"):
        assert copy.stat().st_size == 1024**4
        assert copy.stat().st_blocks * 512 < 1024**2
        with open(copy, "rb") as file:
            assert file.read(6) == b"head\0\0"
            file.seek(200 * 1024**2)
            assert file.read(7) == b"middle\0"


# --- getting ---


def test_what_is_got_is_what_was_put(workspace, outside, tmp_path):
    (outside / "sub").mkdir(mode=0o700)
    (outside / "sub" / "file").write_bytes(os.urandom(100_000))
    (outside / "sub" / "tool").write_text("")
    (outside / "sub" / "tool").chmod(0o555)
    (outside / "link").symlink_to("sub")
    workspace.put(str(outside))

    assert workspace.get("outside", str(tmp_path / "back")) == 100_000
    assert tree(tmp_path / "back") == tree(outside)
    assert (tmp_path / "back/sub").stat().st_mtime_ns == (outside / "sub").stat().st_mtime_ns


def test_a_file_goes_to_the_name_or_into_the_folder_that_is_there(workspace, outside):
    workspace.write("sub/file", [b"content"])
    (outside / "old").write_text("longer than the new content")

    workspace.get("sub/file", str(outside / "new"))
    workspace.get("sub/file", str(outside / "old"))
    workspace.get("sub/file", str(outside))

    assert tree(outside) == dict.fromkeys(("new", "old", "file"), ("file", 420, b"content"))


def test_the_whole_workspace_goes_to_a_folder_of_that_name(workspace, outside):
    workspace.write("a/file", [b"content"])

    workspace.get(".", str(outside))
    workspace.get("", str(outside / "copy"))

    assert (
        tree(outside / "workspace")
        == tree(outside / "copy")
        == {
            "a": ("directory", 0o755),
            "a/file": ("file", 0o644, b"content"),
        }
    )


def test_what_cannot_be_got_is_left_out_and_told(workspace, folder, outside):
    (folder / "sub").mkdir()
    (folder / "sub" / "out").symlink_to("../../outside")
    (folder / "sub" / "absolute").symlink_to("/workspace/sub")
    os.mkfifo(folder / "sub" / "fifo")
    (folder / "sub" / "file").write_text("content")
    (folder / "sub" / "file").chmod(0o6755)
    told = []

    workspace.get("sub", str(outside / "copy"), left_out=told.append)

    assert tree(outside / "copy") == {"file": ("file", 0o755, b"content")}
    assert [line.split()[0] for line in told] == ["'absolute'", "'fifo'", "'out'"]
    with pytest.raises(InvalidRequestError, match=r"all was copied but.*'absolute'.*'fifo'.*'out'"):
        workspace.get("sub", str(outside / "again"))
    assert tree(outside / "again") == tree(outside / "copy")


def test_a_get_that_cannot_be_is_explained(workspace, folder, outside):
    workspace.write("file", [b"x"])
    os.mkfifo(folder / "fifo")

    for path, output, error in (
        ("nothing", outside / "x", NotFoundError),
        ("fifo", outside / "x", InvalidRequestError),
        ("file", outside / "no" / "x", NotFoundError),
        ("../x", outside / "x", InvalidRequestError),
    ):
        with pytest.raises(error):
            workspace.get(path, str(output))
    (outside / "file").mkdir()
    with pytest.raises(ConflictError, match="folder"):
        workspace.get("file", str(outside))
    assert tree(outside) == {"file": ("directory", 0o755)}


# --- a full disk ---

_ON_A_FULL_DISK = """
import os, subprocess, sys
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", sys.argv[1]], check=True)
from jhansi_runtime.errors import DiskLimitError
from jhansi_runtime.workspace import open_workspace
os.mkdir(sys.argv[1] + "/workspace")
big = sys.argv[2]
with open(big, "wb") as file:
    file.write(bytes(range(256)) * 8192)
with open_workspace(sys.argv[1] + "/workspace") as workspace:
    workspace.write("big", [b"old"])
    for attempt in (lambda: workspace.write("big", [b"x" * 4096] * 1024), lambda: workspace.put(big)):
        try:
            attempt()
        except DiskLimitError as error:
            print(error)
    assert b"".join(workspace.read("big")) == b"old"
    assert [file.path for file in workspace.files()] == ["big"]
    workspace.write("other", [b"x" * 500_000])
    try:
        workspace.get("other", sys.argv[1] + "/one")
        workspace.get("other", sys.argv[1] + "/two")
    except DiskLimitError as error:
        print(error)
    assert not os.path.exists(sys.argv[1] + "/two")
"""


def test_a_full_disk_costs_nothing_that_was_there(folder, outside):
    command = ["unshare", "-Urm", sys.executable, "-c", _ON_A_FULL_DISK, str(folder), str(outside / "big")]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)

    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("is full") == 3
    assert DiskLimitError.http_status == 507
