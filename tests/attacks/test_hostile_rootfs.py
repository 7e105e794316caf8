"""The root tree is hostile, too: its mountpoints are links, its masks lead to the host, its programs are traps.

CVE-2019-19921, CVE-2021-30465, CVE-2023-27561, CVE-2025-31133, CVE-2025-52565, CVE-2025-52881, CVE-2026-41579,
CVE-2026-47766 and CVE-2026-87766 are all of one kind: a mountpoint, or what is mounted there, was reached through a
path with a link in it. Here nothing is: openat2 refuses every link in every path (mounts.py).

Trees are unpacked by us and checked then (test_hostile_archives.py); these have become so afterwards.
"""

import contextlib
import os
import pathlib
import stat
from collections.abc import Callable
from typing import NamedTuple

import pytest
from attempts import LANDLOCKED, LIMITS, SECRET, attempt, require_all, surroundings
from removals import LINKS_REFUSED, LINKS_REFUSED_BY_MOUNTS, without

from jhansi_runtime.isolation import job, mounts

# Every place of the tree that something is mounted on or from.
PLACES = [
    "proc",
    "dev",
    "tmp",
    "home",
    "home/sandbox",
    "workspace",
    "usr",
    mounts.COVERS,
    mounts.EMPTY_FILE,
    mounts.EMPTY_DIRECTORY,
    mounts.HIDDEN_WORKSPACES,
]
IN_PYTHON = ("/usr/bin/python3", "-c")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    with surroundings(tmp_path_factory.mktemp("host")) as host:
        set_traps(host)
        yield host


def set_traps(host):
    """Make a folder of the host's that could stand for the one with the masks."""
    trap = host.folder / "trap"
    (trap / "workspaces").mkdir(parents=True)
    (trap / "empty-directory").mkdir()
    (trap / "empty-directory" / "secret").write_text(SECRET)
    (trap / "empty-file").write_text(SECRET)


@contextlib.contextmanager
def replaced(host, place, make):
    """Within: something else is at that place of the root tree, for it is somebody's who may change it."""
    path = host.tree / place
    above = path.parent
    mode = stat.S_IMODE(above.stat().st_mode)
    above.chmod(0o755)
    genuine = path.with_name("genuine")
    if os.path.lexists(path):
        path.rename(genuine)
    try:
        make(path)
        yield
    finally:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        if os.path.lexists(genuine):
            genuine.rename(path)
        above.chmod(mode)


def a_link_to(target):
    return lambda path: path.symlink_to(target)


def failure(told):
    return told.get("error", str(told))


# --- links --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("target", ["/private", "../../private", "workspace", "/proc/self/cwd"])
def test_a_link_at_a_mountpoint_ends_the_exec_before_anything_runs(host, place, target):
    target = str(host.folder) + target if target == "/private" else target
    with replaced(host, place, a_link_to(target)):
        told = attempt(host, 'print("escaped")')
    step = "workspace" if place == "workspace" else "mounts"
    assert f"isolation failed at the step '{step}'" in failure(told)


class Link(NamedTuple):
    """A link in the tree that leads out once links are followed, and the program that is then outside.

    taken_out is what stops it besides. `target` is given the host.
    """

    place: str
    target: Callable
    attack: str
    taken_out: tuple = ()


READ_SECRET = 'print("escaped" if open({path}).read() == SECRET else "")'
IS_NO_MOUNT = 'print("escaped" if not os.path.ismount("/{place}") else "")'
IS_THE_WORKSPACE = 'print("escaped" if os.path.realpath("/{place}") == "/workspace" else "")'
# What leads where: a mask to a file of the host's; the folder that workspaces wait in, to the one that the job gets.
LEADING_OUT = {
    "the mask of files is the host's secret": Link(
        mounts.EMPTY_FILE,
        lambda host: host.environment["SECRET_FILE"],
        READ_SECRET.format(path='"/proc/key-users"'),
    ),
    "the mask of folders is a folder of the host's": Link(
        mounts.EMPTY_DIRECTORY,
        lambda host: host.folder / "trap" / "empty-directory",
        """
masks = [f"/proc/{name}" for name in ("acpi", "asound", "driver", "scsi") if os.path.isdir(f"/proc/{name}")]
"""
        + READ_SECRET.format(path='masks[0] + "/secret"'),
    ),
    "both masks are in a folder of the host's": Link(
        mounts.COVERS,
        lambda host: host.folder / "trap",
        READ_SECRET.format(path='"/proc/key-users"'),
        # The folder of workspaces is in there, too, and is not found after pivot_root: there is no workspace then.
        taken_out=(without(mounts, "attach_workspace"), without(job, "_enter_workspace")),
    ),
    "all workspaces wait where the one is mounted": Link(
        mounts.HIDDEN_WORKSPACES,
        lambda _: "../workspace",
        READ_SECRET.format(path='"/workspace/" + E["NEIGHBOUR"] + "/workspace/note"'),
    ),
    "the workspace is mounted where all of them wait": Link(
        "workspace",
        lambda _: mounts.HIDDEN_WORKSPACES,
        READ_SECRET.format(path='"/.jhansi/workspaces/" + E["NEIGHBOUR"] + "/workspace/note"'),
        taken_out=(without(job, "_enter_workspace"),),
    ),
    "the home is mounted on a folder of the host's": Link(
        "home/sandbox", lambda host: host.folder / "here", IS_NO_MOUNT.format(place="home/sandbox")
    ),
    "the devices are mounted on a folder of the host's": Link(
        "dev", lambda host: host.folder / "here", IS_NO_MOUNT.format(place="dev")
    ),
    "the home is in the workspace": Link(
        "home/sandbox", lambda _: "../workspace", IS_THE_WORKSPACE.format(place="home/sandbox")
    ),
    "the scratch folder is in the workspace": Link("tmp", lambda _: "workspace", IS_THE_WORKSPACE.format(place="tmp")),
    "the devices are in the workspace": Link("dev", lambda _: "workspace", IS_THE_WORKSPACE.format(place="dev")),
    "the masks are in a folder that the job writes to": Link(
        "proc", lambda _: "tmp", IS_NO_MOUNT.format(place="proc/sys")
    ),
}
MADE_BY_LANDLOCK = [link for link in LEADING_OUT.values() if link.place in {"tmp", "dev", "home/sandbox", "workspace"}]


def led_out(host, link, taken_out):
    with replaced(host, link.place, a_link_to(link.target(host))):
        return attempt(host, link.attack, taken_out, command=IN_PYTHON)


@pytest.mark.parametrize("link", LEADING_OUT.values(), ids=LEADING_OUT)
def test_a_link_leads_nowhere(host, link):
    assert "isolation failed at the step" in failure(led_out(host, link, link.taken_out))


@pytest.mark.parametrize("link", LEADING_OUT.values(), ids=LEADING_OUT)
def test_a_link_leads_out_once_links_are_followed(host, link):
    told = led_out(host, link, (LINKS_REFUSED, *link.taken_out))
    assert "escaped" in told.get("lines", ()), told


@pytest.mark.parametrize(
    "link", MADE_BY_LANDLOCK, ids=[f"{link.place} to {number}" for number, link in enumerate(MADE_BY_LANDLOCK)]
)
def test_landlock_makes_no_rule_of_a_link_either(host, link):
    require_all((LANDLOCKED,))
    assert "isolation failed at the step" in failure(led_out(host, link, (LINKS_REFUSED_BY_MOUNTS, *link.taken_out)))


# --- other things than mountpoints --------------------------------------------------------------------------------


def gone(_path):
    """There is nothing."""


def a_file(path):
    path.write_text("")


OTHERS = {"nothing": gone, "a file": a_file, "a FIFO": os.mkfifo}


@pytest.mark.parametrize(
    ("make", "place"),
    # A file of any kind covers a file.
    [(make, place) for make in OTHERS for place in PLACES if make == "nothing" or place != mounts.EMPTY_FILE],
)
def test_what_is_no_mountpoint_ends_the_exec_before_anything_runs(host, make, place):
    with replaced(host, place, OTHERS[make]):
        told = attempt(host, 'print("escaped")')
    assert "isolation failed at the step" in failure(told)
    reasons = ("No such file or directory",) if make == "nothing" else ("Not a directory", "Invalid argument")
    assert any(reason in failure(told) for reason in reasons), failure(told)


def test_a_folder_covers_no_file(host):
    with replaced(host, mounts.EMPTY_FILE, pathlib.Path.mkdir):
        assert "isolation failed at the step 'mounts'" in failure(attempt(host, 'print("escaped")'))


# --- files that anybody might read ----------------------------------------------------------------------------------

ETC = (
    "etc/passwd",
    "etc/group",
    "etc/hosts",
    "etc/hostname",
    "etc/resolv.conf",
    "etc/nsswitch.conf",
)


@pytest.mark.parametrize("place", ETC)
def test_nobody_of_ours_waits_for_a_fifo(host, place):
    with replaced(host, place, os.mkfifo):
        told = attempt(host, "", command=("/bin/true",))
    assert told.get("status") == "exited", told


def test_a_job_that_waits_for_a_fifo_before_it_begins_ends_at_its_time_limit(host):
    with replaced(host, "etc/ld.so.preload", os.mkfifo):
        told = attempt(host, "", command=("/bin/true",), limits=LIMITS | {"timeout": 1})
    assert told.get("status") == "timed_out", told


@pytest.mark.parametrize("place", ETC)
def test_a_link_in_etc_leads_nowhere(host, place):
    with replaced(host, place, a_link_to(host.environment["SECRET_FILE"])):
        told = attempt(host, f'print(open("/{place}").read())')
    assert SECRET not in str(told)


def a_script(text):
    def make(path):
        path.write_text(text)
        path.chmod(0o755)

    return make


# A program of the tree, and what its caller is told.
PROGRAMS = {
    "a FIFO": (os.mkfifo, "cannot be executed: Permission denied"),
    "a folder": (pathlib.Path.mkdir, "cannot be executed: Permission denied"),
    "a link to itself": (a_link_to("trap"), "cannot be executed: Too many levels of symbolic links"),
    "a link to the host": (a_link_to("/private/secret"), "is not there"),
    "a script for itself": (a_script("#!/trap\n"), "cannot be executed: Too many levels of symbolic links"),
    "a script for nothing": (a_script("#!/nothing\n"), "is not there"),
    "an empty file": (a_script(""), "cannot be executed: Exec format error"),
    "the head of a program": (a_script("\x7fELF\x02\x01"), "cannot be executed: Exec format error"),
}


@pytest.mark.parametrize(("make", "error"), PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_that_is_a_trap_is_an_error_that_says_so(host, make, error):
    with replaced(host, "trap", make):
        assert error in failure(attempt(host, "", command=("/trap",)))


def test_a_dynamic_linker_of_the_jobs_own_is_none_for_anybody_else(host):
    if not os.path.islink("/lib64"):
        pytest.skip("this machine's dynamic linker is in a folder that is mounted")
    with replaced(host, "lib64", a_link_to("/workspace")):
        assert "is not there, or the interpreter" in failure(attempt(host, "", command=("/usr/bin/true",)))
    assert attempt(host, "", command=("/usr/bin/true",))["status"] == "exited"
