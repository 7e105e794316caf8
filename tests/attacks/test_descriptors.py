"""What the host has open, and where it stands, does not come along: descriptors, folders, programs and streams.

CVE-2024-21626: a descriptor of a folder of the host's was inherited, and as a working directory, or through
/proc/self/fd, led out. CVE-2016-9962: init's descriptors were in reach before the job began. CVE-2019-5736:
/proc/self/exe and /proc/1/exe led to the runtime's own program, which was then overwritten.
"""

import os

import pytest
from attempts import (
    LANDLOCKED,
    READ,
    Attempts,
    Refusal,
    Row,
    attempt,
    each,
    each_alone,
    each_refusal,
    surroundings,
)
from removals import (
    CAPABILITIES,
    DESCRIPTORS_OF_INIT,
    DESCRIPTORS_OF_JOB,
    INNER_NAMESPACE,
    LANDLOCK,
    NOT_DUMPABLE,
    with_late_workspace,
    with_the_hosts_own,
    without,
    without_in,
    without_new_root,
    without_umount_of,
    without_wait_for_workspace,
)

from jhansi_runtime.isolation import detach, job, mounts

NOT_PRIVATE = (INNER_NAMESPACE, CAPABILITIES, LANDLOCK)  # each of these, too, keeps what /proc tells of init


def secret_file(flags):
    """A descriptor of the host's secret file, for `with_the_hosts_own`."""
    return lambda: os.open(os.environ["SECRET_FILE"], flags)


TABLE = [
    Row(
        "init's standard streams are not the launcher's",
        (without_in(detach, "os", "dup2"),),
        'PATH = "/proc/1/fd/0"' + READ,
        also=(NOT_DUMPABLE, *NOT_PRIVATE),
    ),
    Row(
        "init closes the launcher's descriptors",
        (DESCRIPTORS_OF_INIT,),
        'print("escaped" if os.pread(int(E["DESCRIPTOR"]), 100, 0) == SECRET.encode() else "")',
        also=(DESCRIPTORS_OF_JOB,),
    ),
    Row(
        "init has none of the launcher's descriptors in its /proc",
        (DESCRIPTORS_OF_INIT,),
        'PATH = "/proc/1/fd/" + E["DESCRIPTOR"]' + READ,
        also=(NOT_DUMPABLE, *NOT_PRIVATE),
    ),
    Row(
        "the job closes every descriptor",
        (DESCRIPTORS_OF_JOB,),
        'print("escaped" if os.pread(int(E["DESCRIPTOR"]), 100, 0) == SECRET.encode() else "")',
        also=(DESCRIPTORS_OF_INIT,),
    ),
    Row(
        "the job closes what lies below its own descriptors as well",
        (DESCRIPTORS_OF_JOB,),
        'print("escaped" if os.pread(int(E["LOW_DESCRIPTOR"]), 100, 0) == SECRET.encode() else "")',
        also=(DESCRIPTORS_OF_INIT,),
    ),
    Row(
        "no descriptor of a folder of the host's is inherited",
        (DESCRIPTORS_OF_JOB,),
        """
folder = int(E["FOLDER_DESCRIPTOR"])
print("escaped" if os.read(os.open("secret", os.O_RDONLY, dir_fd=folder), 100) == SECRET.encode() else "")
""",
        also=(DESCRIPTORS_OF_INIT, LANDLOCK),
    ),
    Row(
        "a working directory is not left by way of a descriptor",
        (DESCRIPTORS_OF_JOB,),
        'os.chdir("/proc/self/fd/" + E["FOLDER_DESCRIPTOR"]); PATH = "secret"' + READ,
        also=(DESCRIPTORS_OF_INIT, LANDLOCK),
    ),
    Row(
        "what lies beneath an inherited descriptor stays shut",
        (LANDLOCK,),
        'PATH = "/proc/self/fd/" + E["FOLDER_DESCRIPTOR"] + "/../private/secret"' + READ,
        also=(DESCRIPTORS_OF_INIT, DESCRIPTORS_OF_JOB),
        needs=(LANDLOCKED,),
    ),
    Row(
        "the working directory is the workspace",
        (without(job, "_enter_workspace"),),
        'PATH = "../private/secret"' + READ,
        also=(LANDLOCK,),
    ),
    Row(
        "a working directory of the host's leads to nothing that Landlock does not allow",
        (LANDLOCK,),
        'PATH = "../private/secret"' + READ,
        also=(without(job, "_enter_workspace"),),
        needs=(LANDLOCKED,),
    ),
    Row(
        "the old root is detached",
        (without_umount_of(b"."),),
        'PATH = "/.." + E["SECRET_FILE"]' + READ,
        also=(LANDLOCK,),
    ),
    Row(
        "an old root leads to nothing that Landlock does not allow",
        (LANDLOCK,),
        'PATH = "/.." + E["SECRET_FILE"]' + READ,
        also=(without_umount_of(b"."),),
        needs=(LANDLOCKED,),
    ),
    Row(
        "the other workspaces are detached",
        (without_umount_of(b"/" + mounts.HIDDEN_WORKSPACES.encode()),),
        'PATH = "/.jhansi/workspaces/" + E["NEIGHBOUR"] + "/workspace/note"' + READ,
    ),
    Row(
        "the job begins once the other workspaces are detached",
        (without_wait_for_workspace,),
        """
try:
    print("escaped" if open("/.jhansi/workspaces/" + E["NEIGHBOUR"] + "/workspace/note").read() == SECRET else "")
finally:
    open("/tmp/tried", "w").close()
""",
        also=(with_late_workspace,),
        command=("/usr/bin/python3", "-c"),
    ),
    Row(
        "a workspace of others cannot be written even if it is in sight",
        (LANDLOCK,),
        'open("/.jhansi/workspaces/" + E["NEIGHBOUR"] + "/workspace/note", "r+"); print("escaped")',
        also=(without_umount_of(b"/" + mounts.HIDDEN_WORKSPACES.encode()),),
        needs=(LANDLOCKED,),
    ),
    Row(
        "stdout is a pipe, not the host's file",
        (with_the_hosts_own(1, secret_file(os.O_WRONLY | os.O_APPEND)),),
        """
import sys
text = os.read(os.open("/proc/self/fd/1", os.O_RDONLY | os.O_NONBLOCK), 100)
print("escaped" if text == SECRET.encode() else "", file=sys.stderr)
""",
        also=(LANDLOCK,),
        alone=True,
    ),
    Row(
        "stdin is a pipe, not the host's file that could be opened once more, for writing",
        (with_the_hosts_own(0, secret_file(os.O_RDONLY)),),
        """
writable = os.open("/proc/self/fd/0", os.O_WRONLY | os.O_NONBLOCK)
print("escaped" if os.pwrite(writable, SECRET.encode(), 0) else "")
""",
        also=(LANDLOCK,),
    ),
    Row(
        "a file of the host's that was passed in is not opened once more, for writing",
        (LANDLOCK,),
        """
writable = os.open("/dev/stdin", os.O_WRONLY | os.O_NONBLOCK)
print("escaped" if os.pwrite(writable, SECRET.encode(), 0) else "")
""",
        also=(with_the_hosts_own(0, secret_file(os.O_RDONLY)),),
        needs=(LANDLOCKED,),
    ),
    # What init is made of. Its program is the host's own interpreter.
    *(
        Row(f"/proc/1/{path} {what}", (NOT_DUMPABLE,), attack, also=NOT_PRIVATE)
        for path, what, attack in (
            ("exe", "does not lead to the host's program", 'open("/proc/1/exe", "rb").read(4); print("escaped")'),
            (
                "exe",
                "does not name the host's program",
                'print("escaped" if os.readlink("/proc/1/exe") else "")',
            ),
            ("cwd", "leads nowhere", 'os.chdir("/proc/1/cwd"); print("escaped")'),
            ("root", "leads nowhere", 'os.listdir("/proc/1/root"); print("escaped")'),
            ("fd", "is not listed", 'os.listdir("/proc/1/fd"); print("escaped")'),
            ("fdinfo", "tells nothing", 'os.listdir("/proc/1/fdinfo"); print("escaped")'),
            ("map_files", "is not listed", 'os.listdir("/proc/1/map_files"); print("escaped")'),
            ("maps", "does not tell where its memory is", 'open("/proc/1/maps").read(1); print("escaped")'),
            ("auxv", "tells nothing", 'open("/proc/1/auxv", "rb").read(1); print("escaped")'),
            ("environ", "does not tell the host's variables", 'open("/proc/1/environ").read(1); print("escaped")'),
            (
                "task/1/environ",
                "is no other way to them",
                'open("/proc/1/task/1/environ").read(1); print("escaped")',
            ),
            ("syscall", "tells nothing", 'open("/proc/1/syscall").read(1); print("escaped")'),
            ("ns/mnt", "is not opened", 'os.open("/proc/1/ns/mnt", os.O_RDONLY); print("escaped")'),
        )
    ),
    Row(
        "init's memory is not read",
        (NOT_DUMPABLE,),
        """
start = int(open("/proc/1/maps").read().split("-")[0], 16)
print("escaped" if os.pread(os.open("/proc/1/mem", os.O_RDONLY), 4, start) == b"\\x7fELF" else "")
""",
        also=NOT_PRIVATE,
    ),
    Row(
        "init's memory is not written",
        (NOT_DUMPABLE,),
        'os.open("/proc/1/mem", os.O_RDWR); print("escaped")',
        also=NOT_PRIVATE,
    ),
    Row(
        "the job's own user namespace keeps init's memory",
        (INNER_NAMESPACE,),
        'open("/proc/1/environ").read(1); print("escaped")',
        also=(NOT_DUMPABLE, CAPABILITIES, LANDLOCK),
    ),
    Row(
        "the lack of capabilities keeps init's memory",
        (CAPABILITIES,),
        'open("/proc/1/environ").read(1); print("escaped")',
        also=(NOT_DUMPABLE, INNER_NAMESPACE, LANDLOCK),
    ),
    Row(
        "Landlock keeps init's memory",
        (LANDLOCK,),
        'open("/proc/1/environ").read(1); print("escaped")',
        also=(NOT_DUMPABLE, INNER_NAMESPACE, CAPABILITIES),
        needs=(LANDLOCKED,),
    ),
]

MAPPED = """
folder = "/proc/self/map_files/"
os.open(folder + os.listdir(folder)[0], os.O_RDONLY)
"""
# The way of CVE-2019-5736: hold the program by a descriptor, and open it for writing when nobody runs it any more.
OWN_PROGRAM = """
held = os.open("/proc/self/exe", os.O_PATH)
os.open(f"/proc/self/fd/{held}", os.O_WRONLY)
"""
REFUSALS = [
    Refusal("a mapped file is opened by /proc/self/map_files", MAPPED, ("EPERM",)),
    Refusal("the own program is opened for writing", 'os.open("/proc/self/exe", os.O_WRONLY)', ("EACCES",)),
    Refusal("the own program is opened for writing by a descriptor of it", OWN_PROGRAM, ("EACCES",)),
    Refusal(
        "the root of the own process leads to the host",
        'os.stat("/proc/self/root/.." + E["SECRET_FILE"])',
        ("ENOENT",),
    ),
    Refusal(
        "the root of a thread leads to the host", 'os.stat("/proc/thread-self/root" + E["SECRET_FILE"])', ("ENOENT",)
    ),
    Refusal("another thread of init has descriptors", 'os.listdir("/proc/1/task/1/fd")', ("EACCES", "EPERM")),
    Refusal(
        "a descriptor beyond the three is open",
        "for number in range(5, 1024):  # 3 and 4 are the pipe that it answers through\n    os.fstat(number)",
        ("EBADF",),
    ),
]


@pytest.fixture(scope="module")
def attempts(tmp_path_factory):
    with surroundings(tmp_path_factory.mktemp("host")) as host:
        yield Attempts(host, TABLE, REFUSALS)


@each(TABLE)
def test_the_attack_fails(attempts, row):
    attempts.assert_it_fails(row)


@each_alone(TABLE)
def test_the_step_alone_stops_the_attack(attempts, row):
    attempts.assert_it_fails(row, row.also)


@each(TABLE)
def test_the_attack_succeeds_without_the_step(attempts, row):
    attempts.assert_it_succeeds(row)


@each_refusal(REFUSALS)
def test_the_attack_is_refused(attempts, refusal):
    attempts.assert_it_is_refused(refusal)


# --- what the job looks at itself before it begins: other steps have seen to it already -------------------------------

UNSEEN = without(job, "_enter_workspace")
MISPLACED = {
    "its working directory is one of the host's": ((without_in(job, "os", "chdir"), LANDLOCK), "../private/secret"),
    "its root is the host's": ((without_new_root,), None),
}


@pytest.mark.parametrize(("taken_out", "path"), MISPLACED.values(), ids=MISPLACED)
def test_a_job_in_the_wrong_place_does_not_begin(attempts, taken_out, path):
    path = path or attempts.host.environment["SECRET_FILE"]
    argv = ("/usr/bin/python3", "-c")
    attack = f"PATH = {path!r}{READ}"
    told = attempt(attempts.host, attack, taken_out, command=argv)
    assert "isolation failed at the step 'working directory'" in told.get("error", ""), told
    assert attempt(attempts.host, attack, (*taken_out, UNSEEN), command=argv)["lines"] == ["escaped"]


def test_no_file_of_the_host_has_been_changed(attempts):
    with open(attempts.host.environment["SECRET_FILE"]) as file:
        assert file.read() == "the host's secret"
