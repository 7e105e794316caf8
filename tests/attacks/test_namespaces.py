"""Namespaces, mounts and privileges: a job can neither make any, nor have others, nor leave anything set-user-ID.

A user namespace gives whoever makes it every capability over what is made in it, and with that every bug in the
kernel's mounts, network filters and file systems: CVE-2022-0185 (fsopen), CVE-2022-0492 (cgroup release_agent),
CVE-2021-22555 (setsockopt of netfilter), CVE-2022-25636, CVE-2023-0386 and CVE-2021-3493 (overlayfs), CVE-2022-34918,
CVE-2023-32233, CVE-2024-1086 (nf_tables). CVE-2014-8989, CVE-2018-18955: id maps that gave more than was meant.
CVE-2021-41103, CVE-2022-29162: set-user-ID files and capabilities that others could use.
"""

import os

import prctl
import pytest
from attempts import (
    LANDLOCKED,
    Attempts,
    Need,
    Refusal,
    Row,
    attempt,
    each,
    each_alone,
    each_refusal,
    number_of,
    require_all,
    surroundings,
)
from removals import (
    CAPABILITIES,
    INNER_NAMESPACE,
    LANDLOCK,
    NOT_DUMPABLE,
    SECCOMP,
    allowing,
    without,
    without_in,
)

from jhansi_runtime.isolation import idmap, inside, seccomp

CLONE_NEW = {
    "time": 0x00000080,
    "mount": 0x00020000,
    "cgroup": 0x02000000,
    "hostname": 0x04000000,
    "ipc": 0x08000000,
    "pid": 0x20000000,
    "network": 0x40000000,
}
CLONE_NEWUSER = 0x10000000
ONE_MORE = without(idmap, "allow_one_more_namespace")
NONE_INSIDE = without(idmap, "allow_no_namespace")

UNSHARE_USER = f"done(LIBC.unshare({CLONE_NEWUSER}))"
CLONE_USER = f"""
child = call("clone", {CLONE_NEWUSER} | signal.SIGCHLD, 0, 0, 0, 0)
if child == 0:
    os._exit(0)
print("escaped")
"""
CLONE3_USER = f"""
arguments = struct.pack("11Q", {CLONE_NEWUSER}, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, 0)
child = call("clone3", arguments, len(arguments))
if child == 0:
    os._exit(0)
print("escaped")
"""
# What only somebody with power over the container's own mounts can do. MS_REMOUNT | MS_BIND | MS_NOSUID | MS_NODEV.
REMOUNT = """
if LIBC.mount(b"none", b"/", None, ctypes.c_ulong(0x20 | 0x1000 | 0x2 | 0x4), None) != 0:
    raise OSError(ctypes.get_errno(), "")
open("/etc/owned", "w").close(); os.unlink("/etc/owned"); print("escaped")
"""
CLEAR_READ_ONLY = """
record = struct.pack("QQQQ", 0, 1, 0, 0)  # attr_clr: MOUNT_ATTR_RDONLY
call("mount_setattr", -100, b"/", 0, record, len(record))
open("/etc/owned", "w").close(); os.unlink("/etc/owned"); print("escaped")
"""
MOVE_MASK = """
mask = call("open_tree", -100, b"/proc/key-users", 0)
call("move_mount", mask, b"", -100, b"/dev/null", 0x4)
print("escaped" if open("/proc/key-users").read(1) else "")
"""
NEW_PROC = """
assert LIBC.mount(b"proc", b"/tmp", b"proc", ctypes.c_ulong(0), None) == 0, ctypes.get_errno()
print("escaped" if open("/tmp/key-users").read(1) else "")
"""
NEW_FILE_SYSTEM = """
context = call("fsopen", b"tmpfs", 0)
call("fsconfig", context, 6, 0, 0, 0)
call("fsmount", context, 0, 0)
print("escaped")
"""
CLONED_TREE = """
call("open_tree", -100, b"/", 1)
print("escaped")
"""
CHROOT = """
os.makedirs("/tmp/root", exist_ok=True); os.chroot("/tmp/root")
print("escaped")
"""
PIVOT = """
assert LIBC.mount(b"none", b"/tmp", b"tmpfs", ctypes.c_ulong(0), None) == 0, ctypes.get_errno()
call("pivot_root", b"/tmp", b"/tmp")
print("escaped" if os.path.exists("/proc") is False else "")
"""
OWN_MOUNTS = "LIBC.unshare(0x20000)\n"
NO_POWER = (CAPABILITIES, SECCOMP)

# Ways to leave a file in the workspace that runs with its owner's rights.
SETUID = """
def left(path):
    mode = os.stat(path).st_mode
    os.unlink(path)
    return mode & (stat.S_ISUID | stat.S_ISGID)
PATH = "/workspace/setuid"
"""
WAYS_TO_SETUID = {
    "chmod": 'open(PATH, "w").close(); call("chmod", PATH.encode(), MODE)',
    "fchmod": 'file = open(PATH, "w"); call("fchmod", file.fileno(), MODE)',
    "fchmodat": 'open(PATH, "w").close(); call("fchmodat", -100, PATH.encode(), MODE)',
    "open": 'call("open", PATH.encode(), os.O_CREAT | os.O_WRONLY, MODE)',
    "openat": 'call("openat", -100, PATH.encode(), os.O_CREAT | os.O_WRONLY, MODE)',
    "creat": 'call("creat", PATH.encode(), MODE)',
    "mknod": 'call("mknod", PATH.encode(), stat.S_IFREG | MODE, 0)',
    "mknodat": 'call("mknodat", -100, PATH.encode(), stat.S_IFREG | MODE, 0)',
    "O_TMPFILE": """
descriptor = call("openat", -100, b"/workspace", os.O_TMPFILE | os.O_WRONLY, MODE)
def left(path):
    return os.fstat(descriptor).st_mode & (stat.S_ISUID | stat.S_ISGID)
""",
}

TABLE = [
    Row("no user namespace but the job's can be made", (ONE_MORE,), UNSHARE_USER, also=(SECCOMP, NONE_INSIDE)),
    Row("no user namespace can be made in the job's own", (NONE_INSIDE,), UNSHARE_USER, also=(SECCOMP, ONE_MORE)),
    Row("seccomp keeps user namespaces from being made", (SECCOMP,), UNSHARE_USER, also=(ONE_MORE, NONE_INSIDE)),
    Row("seccomp keeps a child from having a user namespace", (SECCOMP,), CLONE_USER, also=(ONE_MORE, NONE_INSIDE)),
    Row("clone3, whose flags a filter does not see, is refused", (SECCOMP,), CLONE3_USER, also=(ONE_MORE, NONE_INSIDE)),
    *(
        Row(
            f"seccomp keeps a {kind} namespace from being made",
            (SECCOMP,),
            f"done(LIBC.unshare({flag}))",
            (CAPABILITIES,),
        )
        for kind, flag in CLONE_NEW.items()
    ),
    *(
        Row(
            f"the job has no capability to make a {kind} namespace",
            (CAPABILITIES,),
            f"done(LIBC.unshare({flag}))",
            (SECCOMP,),
        )
        for kind, flag in CLONE_NEW.items()
    ),
    Row("the job's own user namespace", (INNER_NAMESPACE,), REMOUNT, also=(*NO_POWER, LANDLOCK)),
    Row(
        "Landlock keeps the mounts as they are",
        (LANDLOCK,),
        REMOUNT,
        also=(*NO_POWER, INNER_NAMESPACE),
        needs=(LANDLOCKED,),
    ),
    Row("seccomp keeps the mounts as they are", (SECCOMP,), REMOUNT, also=(CAPABILITIES, INNER_NAMESPACE, LANDLOCK)),
    *(
        Row(what, (INNER_NAMESPACE,), attack, also=(*NO_POWER, LANDLOCK))
        for what, attack in {
            "no mount is made writable": CLEAR_READ_ONLY,
            "no mask is moved away": MOVE_MASK,
            "no second /proc is mounted, without masks": NEW_PROC,
            "no file system is mounted": NEW_FILE_SYSTEM,
            "no tree of mounts is cloned": CLONED_TREE,
            "the root is not changed by pivot_root": PIVOT,
        }.items()
    ),
    Row("the root is not changed by chroot", (SECCOMP,), CHROOT, also=(CAPABILITIES,)),
    Row("the job has no capability to change its root", (CAPABILITIES,), CHROOT, also=(SECCOMP,)),
    Row(
        "another's namespace is not entered",
        (SECCOMP,),
        OWN_MOUNTS
        + """
call("setns", os.open("/proc/self/ns/uts", os.O_RDONLY), 0)
print("escaped")
""",
        also=(INNER_NAMESPACE, CAPABILITIES),
    ),
    *(
        Row(
            f"init's {name} namespace is not entered",
            (NOT_DUMPABLE,),
            f'call("setns", os.open("/proc/1/ns/{name}", os.O_RDONLY), 0); print("escaped")',
            also=(INNER_NAMESPACE, CAPABILITIES, SECCOMP, LANDLOCK),
        )
        for name in ("mnt", "net", "pid")
    ),
    Row(
        "the hostname",
        (without_in(inside, "_socket", "sethostname"),),
        'print("escaped" if socket.gethostname() == E["HOST"] else "")',
    ),
    *(
        Row(
            f"a {kind} file is not left by {way}",
            (SECCOMP,),
            f"{SETUID}MODE = {mode}\n{source}\nprint('escaped' if left(PATH) else '')",
        )
        for kind, mode in (("set-user-ID", 0o4755), ("set-group-ID", 0o2755))
        for way, source in WAYS_TO_SETUID.items()
        if way == "O_TMPFILE" or number_of(way) >= 0  # some machines have the calls of today alone
    ),
    Row(
        "fchmodat2, whose mode a filter has not learnt of, is refused",
        (allowing("fchmodat2"),),
        f'{SETUID}open(PATH, "w").close(); call("fchmodat2", -100, PATH.encode(), 0o4755, 0)\n'
        "print('escaped' if left(PATH) else '')",
        needs=(
            Need(
                "fchmodat2 came with Linux 6.6, and libseccomp has to know it",
                lambda: is_since(6, 6) and number_of("fchmodat2") >= 0,
            ),
        ),
    ),
    Row(
        "openat2, whose mode a filter does not see, is refused",
        (allowing("openat2"),),
        f"""{SETUID}
how = struct.pack("QQQ", os.O_CREAT | os.O_WRONLY, 0o4755, 0)
call("openat2", -100, PATH.encode(), how, len(how))
print('escaped' if left(PATH) else '')
""",
    ),
]


def is_since(*version):
    return tuple(map(int, os.uname().release.split(".")[:2])) >= version


CAPSET = """
header, sets = struct.pack("Ii", 0x20080522, 0), (ctypes.c_uint32 * 6)(*[0xFFFFFFFF, 0xFFFFFFFF, 0, 0, 0, 0])
call("capset", header, sets)
"""
# A file capability: revision 2, effective, CAP_SETUID.
FILE_CAPABILITY = """
open("/workspace/capable", "w").close()
os.setxattr("/workspace/capable", "security.capability", struct.pack("<IIIII", 0x02000001, 1 << 7, 0, 0, 0))
"""
ANOTHER_MAP = """
child = os.fork()
if child == 0:
    signal.pause()
try:
    os.write(os.open(f"/proc/{child}/uid_map", os.O_WRONLY), b"0 0 4294967295")
finally:
    os.kill(child, signal.SIGKILL)
"""
REFUSALS = [
    Refusal("no_new_privs is taken back", 'call("prctl", 38, 0, 0, 0, 0)', ("EINVAL",)),
    Refusal("the filter is taken off", 'call("prctl", 22, 0, 0, 0, 0)', ("EINVAL",)),
    Refusal("capabilities are taken", CAPSET, ("EPERM",)),
    Refusal("an ambient capability is raised", 'call("prctl", 47, 2, 21, 0, 0)', ("EPERM",)),
    Refusal("securebits are cleared", 'call("prctl", 28, 0, 0, 0, 0)', ("EPERM",)),
    Refusal("capabilities are kept", 'call("prctl", 8, 1, 0, 0, 0)', ("EPERM",)),
    Refusal("the start of the heap is moved", 'call("prctl", 35, 6, 0x1000, 0, 0)', ("EPERM",)),
    Refusal(
        "the program that runs is exchanged",
        'call("prctl", 35, 13, os.open("/usr/bin/env", os.O_RDONLY), 0, 0)',
        ("EPERM",),
    ),
    Refusal("the user is changed to root", "os.setresuid(0, 0, 0)", ("EINVAL",)),
    Refusal("the group is changed to root", "os.setresgid(0, 0, 0)", ("EINVAL",)),
    Refusal("the user is changed to nobody", "os.setuid(65534)", ("EINVAL",)),
    Refusal("groups are given up", "os.setgroups([])", ("EPERM",)),
    Refusal("groups are taken", "os.setgroups([0])", ("EPERM",)),
    Refusal("file accesses are made as root", 'call("setfsuid", 0); print(call("setfsuid", 0))', ("1000",)),
    Refusal("the id map is written again", ANOTHER_MAP, ("EPERM", "EACCES")),
    Refusal("a file is given to root", 'open("mine", "w").close(); os.chown("mine", 0, -1)', ("EINVAL",)),
    Refusal("a file is given to a group", 'open("mine", "w").close(); os.chown("mine", -1, 0)', ("EINVAL",)),
    Refusal("a file is given capabilities", FILE_CAPABILITY, ("EPERM",)),
    Refusal(
        "a file is given a label",
        'open("mine", "w").close(); os.setxattr("mine", "security.label", b"x")',
        ("EPERM", ""),  # where the kernel's bpf module has a say (Linux 6.1), anybody may, and nobody reads it
    ),
    Refusal(
        "a file is given a trusted attribute",
        'open("mine", "w").close(); os.setxattr("mine", "trusted.overlay.opaque", b"y")',
        ("EPERM",),
    ),
    Refusal(
        "a file is made immutable",
        'fcntl.ioctl(open("mine", "w"), 0x40086602, struct.pack("l", 0x10))',  # FS_IOC_SETFLAGS, FS_IMMUTABLE_FL
        ("EPERM", "ENOTTY", "EOPNOTSUPP"),
    ),
    Refusal("the file system of the workspace is frozen", 'fcntl.ioctl(os.open(".", 0), 0xC0045877, 0)', ("EPERM",)),
    Refusal("the blocks of a file are asked for", 'fcntl.ioctl(open("main.py"), 1, struct.pack("i", 0))', ("EPERM",)),
    Refusal("a disk is made", 'os.mknod("disk", stat.S_IFBLK | 0o666, os.makedev(254, 0))', ("EPERM", "EACCES")),
    Refusal(
        "a character device is made", 'os.mknod("mem", stat.S_IFCHR | 0o666, os.makedev(1, 1))', ("EPERM", "EACCES")
    ),
    Refusal(
        "randomness is taken out of the kernel", 'fcntl.ioctl(os.open("/dev/urandom", os.O_RDWR), 0x5206)', ("EPERM",)
    ),
    Refusal(
        "the parent of the user namespace is opened",
        'fcntl.ioctl(os.open("/proc/self/ns/user", 0), 0xB702)',
        ("EPERM",),
    ),
    Refusal(
        "the owner of the mount namespace is opened", 'fcntl.ioctl(os.open("/proc/self/ns/mnt", 0), 0xB701)', ("EPERM",)
    ),
    Refusal(
        "the parent of the pid namespace is opened", 'fcntl.ioctl(os.open("/proc/self/ns/pid", 0), 0xB702)', ("EPERM",)
    ),
    Refusal(
        "a namespace of init is opened by its pidfd",
        "fcntl.ioctl(os.pidfd_open(1), 0xFF03)",
        ("EACCES", "EPERM"),
        needs=(Need("pidfds know namespaces since Linux 6.11", lambda: is_since(6, 11)),),
    ),
    Refusal(
        "other mounts are listed",
        'call("listmount", struct.pack("IIQQ", 24, 0, 0xFFFFFFFFFFFFFFFF, 0), bytes(80), 10, 0)',
        ("ENOSYS", "EPERM"),  # EPERM where libseccomp has no name for it yet
    ),
    Refusal(
        "the number of users' processes is raised",
        "resource.setrlimit(resource.RLIMIT_NPROC, (9999, 9999))",
        ("ValueError('not allowed to raise maximum limit')",),
    ),
    Refusal("the niceness is lowered", "os.nice(-1)", ("EPERM", "EACCES")),
    Refusal("real-time scheduling is taken", "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))", ("EPERM",)),
    Refusal("a keyring of the kernel's is joined", 'call("keyctl", 1, 0)', ("EPERM",)),
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


def test_without_no_new_privs_nothing_runs(attempts):
    told = attempt(attempts.host, 'print("escaped")', (without(prctl, "set_no_new_privs"), LANDLOCK))
    assert "isolation failed at the step 'seccomp'" in told["error"]


def test_without_no_new_privs_landlock_restricts_nobody_and_nothing_runs(attempts):
    require_all((LANDLOCKED,))
    told = attempt(attempts.host, 'print("escaped")', (without(prctl, "set_no_new_privs"),))
    assert "isolation failed at the step 'landlock restriction'" in told["error"]


def test_without_a_filter_nothing_runs(attempts):
    genuine = seccomp.install
    told = attempt(attempts.host, 'print("escaped")', (without(seccomp, "install", lambda _: genuine(())),))
    assert "isolation failed at the step 'seccomp'" in told["error"]


def test_the_limit_of_user_namespaces_is_the_kernels_own_and_not_the_filters(attempts):
    assert attempt(attempts.host, UNSHARE_USER, (SECCOMP,))["lines"] == ["No space left on device"]
