"""A job has shaped its workspace to make the host read, write, remove, open or wait for what it must not."""

import fcntl
import functools
import operator
import os
import resource
import stat
import subprocess
import sys
import threading
from contextlib import suppress

import pytest

from jhansi_runtime.errors import InvalidRequestError, JhansiError, NotExecutableError
from jhansi_runtime.sandboxes import Sandboxes
from jhansi_runtime.spec import Limits
from jhansi_runtime.workspace import open_workspace

DEEP = 4096  # longer than any path may be
RACES = 400
SECRET = b"the host's secret"


@pytest.fixture
def folder(tmp_path):
    """The folder of the workspace, as a job sees it."""
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture(autouse=True)
def _nothing_stays(tmp_path):
    """Remove what a test made, for pytest's own removal recurses by path: with the tools made for such trees."""
    yield
    subprocess.run(["chmod", "-R", "u+rwx", "--", tmp_path], check=True)
    subprocess.run(["rm", "-rf", "--", tmp_path], check=True)


@pytest.fixture
def workspace(folder):
    with open_workspace(str(folder)) as opened:
        before = os.listdir("/proc/self/fd")
        yield opened
        assert os.listdir("/proc/self/fd") == before, "a descriptor was left open"


@pytest.fixture
def outside(tmp_path):
    """A folder of the host, to be found as it is after every attack."""
    outside = tmp_path / "outside"
    (outside / "folder").mkdir(parents=True)
    for path in (outside / "secret", outside / "folder" / "secret"):
        path.write_bytes(SECRET)
    before = state(outside)
    yield outside
    assert state(outside) == before, "the host's files were touched"


@pytest.fixture
def few_descriptors():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def state(folder):
    """Names, contents, permissions and inodes of all below a folder."""
    found = {}
    for above, folders, files in os.walk(folder):
        for name in folders + files:
            path = os.path.join(above, name)
            status = os.lstat(path)
            content = b""
            if stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    content = file.read()
            found[path] = (status.st_mode, status.st_ino, status.st_mtime_ns, content)
    return found


def deepen(folder, depth, name="d", **make):
    """Folders one in another, and a file in the last: made by descriptor, for no path is long enough."""
    fd = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, **make, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=fd))
    os.close(fd)


# --- links out ---


def links_out(folder, outside):
    """Plant every kind of link to a file and to a folder outside; return their names."""
    (folder / "sub").mkdir()
    (folder / "hop").symlink_to("sub/hop")
    (folder / "sub" / "hop").symlink_to("../../outside")
    targets = {
        "absolute": outside,
        "climbing": "../outside",
        "chain": "hop",
        "self": f"/proc/self/cwd/{os.path.relpath(outside)}",
        "root": f"/proc/self/root{outside}",
        "thread": f"/proc/thread-self/root{outside}",
        "up": f"sub/{'../' * 60}{outside}",
    }
    for name, target in targets.items():
        (folder / name).symlink_to(target)
    return list(targets)


def test_no_verb_follows_a_link_out(workspace, folder, outside, tmp_path):
    names = links_out(folder, outside)
    (tmp_path / "mine").write_text("mine")

    for name in names:
        for path in (f"{name}/secret", f"{name}/folder/secret"):
            with pytest.raises(NotExecutableError):
                workspace.open_program(path)
            with pytest.raises(InvalidRequestError):
                b"".join(workspace.read(path))
            with pytest.raises(InvalidRequestError):
                workspace.get(path, str(tmp_path / "got"))
            with pytest.raises(InvalidRequestError):
                workspace.write(path, [b"overwritten"])
            with pytest.raises(InvalidRequestError):
                workspace.remove(path)
        for path in (name, f"{name}/folder"):
            with pytest.raises(InvalidRequestError):
                list(workspace.files(path))
            with pytest.raises(InvalidRequestError):
                workspace.put(str(tmp_path / "mine"), path)
            with pytest.raises(InvalidRequestError):
                workspace.get(path, str(tmp_path / "got"))
    assert not (tmp_path / "got").exists()
    listed = {file.path: file.type for file in workspace.files(recursive=True)}
    assert listed == {**dict.fromkeys([*names, "hop", "sub/hop"], "link"), "sub": "directory"}
    for name in names:
        workspace.remove(name)


def test_magic_links_of_an_open_descriptor_are_not_followed(workspace, folder, outside):
    with open(outside / "secret", "rb") as file:
        (folder / "main.py").symlink_to(f"/proc/self/fd/{file.fileno()}")
        with pytest.raises(NotExecutableError):
            workspace.open_program("main.py")


def test_a_got_folder_holds_no_way_out_of_itself(workspace, folder, outside, tmp_path):
    links_out(folder, outside)
    # Each of these stays inside when read as text; together they climb out: sub/step is the top, so step/.. is above.
    (folder / "sub" / "step").symlink_to("..")
    (folder / "sub" / "sneaky").symlink_to("step/../outside/secret")
    told = []

    workspace.get(".", str(tmp_path / "got"), left_out=told.append)

    copied = [path for path in (tmp_path / "got").rglob("*") if path.is_symlink()]
    # `hop` and `chain` dangle: what they led to, sub/hop, is not copied.
    assert {str(path.relative_to(tmp_path / "got")) for path in copied} == {"hop", "chain", "sub/step"}
    for path in copied:
        assert os.path.realpath(path).startswith(str(tmp_path / "got"))
    assert any("sneaky" in line for line in told)


def test_a_get_does_not_write_through_a_link_in_its_output(workspace, folder, outside, tmp_path):
    (folder / "tree" / "folder").mkdir(parents=True)
    (folder / "tree" / "folder" / "secret").write_text("overwritten")
    (folder / "tree" / "secret").write_text("overwritten")
    (tmp_path / "got" / "tree").mkdir(parents=True)
    (tmp_path / "got" / "tree" / "secret").symlink_to(outside / "secret")

    workspace.get("tree", str(tmp_path / "got"))
    assert not (tmp_path / "got" / "tree" / "secret").is_symlink()

    beneath_output = tmp_path / "again" / "tree"
    beneath_output.mkdir(parents=True)
    (beneath_output / "folder").symlink_to(outside / "folder")
    with pytest.raises(JhansiError):
        workspace.get("tree", str(tmp_path / "again"))


def test_a_copy_that_is_broken_off_holds_nothing_open(workspace, folder, outside, tmp_path):
    (tmp_path / "tree" / "folder").mkdir(parents=True)
    (tmp_path / "got" / "tree").mkdir(parents=True)
    workspace.put(str(tmp_path / "tree"))
    (tmp_path / "got" / "tree" / "folder").symlink_to(outside / "folder")
    (folder / "place" / "tree").mkdir(parents=True)
    (folder / "place" / "tree" / "folder").symlink_to(outside / "folder")
    before = os.listdir("/proc/self/fd")

    with pytest.raises(JhansiError) as of_get:
        workspace.get("tree", str(tmp_path / "got"))
    with pytest.raises(JhansiError) as of_put:
        workspace.put(str(tmp_path / "tree"), "place")

    # While there is an error, there is all that it came through; and in Python 3.13 it may be there for long.
    assert os.listdir("/proc/self/fd") == before, (of_get, of_put)


# --- what must not be opened ---

LEASE = """
import fcntl, os, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)
fcntl.fcntl(os.open(sys.argv[1], os.O_RDWR), fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("leased", flush=True)
input()
"""


def test_nothing_waits_for_a_fifo_and_nobody_at_its_other_end_notices(workspace, folder, tmp_path):
    os.mkfifo(folder / "main.py")
    (folder / "link").symlink_to("main.py")
    # A writer that does not wait is refused as long as there is no reader, so it tells whether one ever came.
    came = threading.Event()
    stop = threading.Event()

    def watch():
        while not stop.is_set():
            with suppress(OSError):
                os.close(os.open(folder / "main.py", os.O_WRONLY | os.O_NONBLOCK))
                came.set()
            stop.wait(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(200):
        for path in ("main.py", "link"):
            with pytest.raises(NotExecutableError):
                workspace.open_program(path)
            with pytest.raises(InvalidRequestError):
                b"".join(workspace.read(path))
            with pytest.raises(InvalidRequestError):
                workspace.get(path, str(tmp_path / "got"))
    assert [file.type for file in workspace.files()] == ["link", "fifo"]
    stop.set()
    watcher.join()
    workspace.remove("main.py")
    assert not came.is_set()


def test_a_leased_file_makes_nobody_wait(workspace, folder):
    # The kernel makes whoever opens a leased file wait, 45 seconds by default, for its holder to give it up.
    (folder / "main.py").write_text("pass")
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            LEASE,
            str(folder / "main.py"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout.readline() == "leased\n"
        with pytest.raises(NotExecutableError, match="held"):
            workspace.open_program("main.py")
        holder.communicate("\n")
    assert workspace.open_program("main.py").size == 4


def test_a_locked_file_makes_nobody_wait(workspace, folder):
    (folder / "main.py").write_text("pass")
    with open(folder / "main.py", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert workspace.open_program("main.py").size == 4
        assert b"".join(workspace.read("main.py")) == b"pass"


def test_a_file_that_grows_while_it_is_read_comes_to_an_end(workspace, folder):
    (folder / "log").write_bytes(b"x" * 10)
    got = b""
    with open(folder / "log", "ab", buffering=0) as file:
        for chunk in workspace.read("log"):
            got += chunk
            file.write(b"y" * 10)
    assert got == b"x" * 10


# --- shapes that break a careless walk ---


@pytest.mark.usefixtures("few_descriptors")
def test_a_deep_tree_is_listed_and_got_as_far_as_paths_go(workspace, folder, tmp_path):
    deepen(folder, DEEP)

    listed = list(workspace.files(recursive=True))
    assert 1900 < len(listed) <= 2048
    assert all(len(file.path) < 4096 for file in listed)
    with pytest.raises(InvalidRequestError, match="too deep"):
        workspace.get(".", str(tmp_path / "got"))


@pytest.mark.usefixtures("few_descriptors")
@pytest.mark.parametrize("mode", [0o777, 0o500, 0])
def test_a_deep_tree_is_removed_with_few_descriptors(workspace, folder, mode):
    deepen(folder, DEEP)
    top = folder / "d"
    for path in (top / "d" / "d", top / "d", top):
        path.chmod(mode)

    workspace.remove("d")

    assert os.listdir(folder) == []


def test_a_tree_shut_at_every_level_is_removed(workspace, folder):
    for path in ("a/b/c", "a/b/d", "a/e", "f"):
        workspace.write(f"{path}/file", [b"x"])
    for above, folders, _ in os.walk(folder, topdown=False):
        for name in folders:
            os.chmod(os.path.join(above, name), 0)

    workspace.remove("a")
    workspace.remove("f")

    assert os.listdir(folder) == []


def test_many_files_and_folders_are_removed(workspace, folder):
    for number in range(2000):
        (folder / "top" / f"f{number}").mkdir(parents=True)
        (folder / "top" / f"f{number}" / "file").write_text("")
        (folder / "top" / f"g{number}").write_text("")

    workspace.remove("top")

    assert os.listdir(folder) == []


def test_everything_a_job_can_leave_goes_with_its_sandbox(tmp_path, outside):
    store = Sandboxes(str(tmp_path / "workspaces"))
    made = store.create(language="python", limits=Limits())
    folder = tmp_path / "workspaces" / store.workspace_path(made.id)
    links_out(folder, outside)
    os.mkfifo(folder / "fifo")
    os.mknod(folder / "socket", stat.S_IFSOCK | 0o600)
    os.mkdir(os.fsencode(folder) + b"/\xff\n\x1b[2J")
    (folder / "setuid").write_text("")
    (folder / "setuid").chmod(0o6755)
    (folder / ".removing-0").mkdir()
    deepen(folder, DEEP, "x" * 255)
    (folder / "sticky").mkdir()
    (folder / "sticky" / "file").write_text("")
    (folder / "sticky").chmod(0o1000)
    folder.chmod(0)

    store.remove(made.id)

    assert sorted(os.listdir(store.root)) == [".lock", ".unfinished"]
    assert os.listdir(f"{store.root}/.unfinished") == []


def test_a_listing_of_more_than_anyone_can_read_is_refused(workspace, folder):
    for number in range(30):
        (folder / f"{number}").write_text("")

    with pytest.raises(InvalidRequestError, match="too many"):
        list(workspace.files(limit=29))


# --- races ---


# renameat2(2) swaps two names at once: there is always something at both. RENAME_EXCHANGE is 2, AT_FDCWD -100.
FLIP = """
import ctypes, os, sys
renameat2 = ctypes.CDLL(None).renameat2
place, trap = map(os.fsencode, sys.argv[1:])
print("flipping", flush=True)
while True:
    renameat2(-100, place, -100, trap, 2)
"""


@pytest.fixture
def flipping(folder, outside):
    """`place` is now a folder of the workspace that holds a `secret`, now a link to the one outside: all the time."""
    (folder / "place").mkdir()
    (folder / "place" / "secret").write_bytes(b"harmless")
    (folder / "trap").symlink_to(outside / "folder")
    command = [sys.executable, "-c", FLIP, str(folder / "place"), str(folder / "trap")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as flipper:
        assert flipper.stdout.readline() == "flipping\n"
        yield
        flipper.kill()


def raced(attempt):
    """What came of many attempts: at least one got through, or the race was none."""
    outcomes = []
    for number in range(RACES * 50):
        if number >= RACES and outcomes:
            break
        with suppress(JhansiError):
            outcomes.append(attempt(number))
    assert outcomes
    return outcomes


@pytest.mark.usefixtures("flipping")
def test_a_read_never_reads_what_a_flipped_link_leads_to(workspace):
    assert set(raced(lambda _: b"".join(workspace.read("place/secret")))) == {b"harmless"}


@pytest.mark.usefixtures("flipping")
def test_a_program_is_never_what_a_flipped_link_leads_to(workspace):
    assert set(raced(lambda _: workspace.open_program("place/secret").size)) == {len(b"harmless")}


@pytest.mark.usefixtures("flipping")
def test_a_write_or_remove_never_lands_where_a_flipped_link_leads_to(workspace):
    raced(lambda number: workspace.write(f"place/deep{number % 20}/secret", [b"overwritten"]))
    raced(lambda _: workspace.write("place/secret", [b"overwritten"]))
    raced(lambda number: workspace.remove(f"place/deep{number % 20}"))
    raced(lambda _: [workspace.write("place/secret", [b"overwritten"]), workspace.remove("place/secret")])


@pytest.mark.usefixtures("flipping")
def test_a_put_never_lands_where_a_flipped_link_leads_to(workspace, tmp_path):
    source = tmp_path / "source" / "folder"
    source.mkdir(parents=True)
    (source / "secret").write_text("overwritten")

    raced(lambda _: workspace.put(str(source), "place"))
    raced(lambda _: workspace.put(str(source / "secret"), "place"))
    raced(lambda _: workspace.put(str(source / "secret"), ""))


@pytest.mark.usefixtures("flipping")
def test_a_get_or_listing_never_shows_what_a_flipped_link_leads_to(workspace, tmp_path):
    output = tmp_path / "got"
    raced(lambda _: workspace.get(".", str(output), left_out=lambda _: None))
    got = {path.read_bytes() for path in output.rglob("secret")}
    listed = raced(lambda _: [file.size for file in workspace.files(recursive=True) if file.path.endswith("secret")])

    assert got == {b"harmless"}
    assert set(functools.reduce(operator.iadd, listed, [])) == {len(b"harmless")}


@pytest.mark.usefixtures("flipping")
def test_the_removal_of_a_flipping_folder_stays_inside(workspace, folder, outside):
    def remove_and_plant_again(number):
        workspace.remove("place")
        with suppress(FileExistsError):
            (folder / f"new{number}").mkdir()
            (folder / f"new{number}" / "secret").write_bytes(b"harmless")
            os.rename(folder / f"new{number}", folder / "place")
        with suppress(FileExistsError):
            (folder / "trap").symlink_to(outside / "folder")

    raced(remove_and_plant_again)
