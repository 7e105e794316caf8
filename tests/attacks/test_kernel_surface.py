"""What of the kernel a job can talk to at all: every kind of call that the filter refuses, and every family of sockets.

Each row is one that has no use for a program and a history with kernels: io_uring (CVE-2022-29582, CVE-2023-2598), bpf
(CVE-2021-3490, CVE-2023-2163), perf (CVE-2013-2094, CVE-2023-2235), keyrings (CVE-2016-0728), userfaultfd and FUSE as
tools to win races with, handles (the `shocker` escape of 2014), modify_ldt (CVE-2015-5157), vsock (CVE-2021-26708) and
the families named in test_sockets.py.

A refusal is seen three ways. The call is told what the profile says. It is told another number once the filter answers
with another number: it is the filter that refuses, and not a kernel that would have done so anyway. And where the
kernel says something else than the filter, that is seen without a filter, in a job that has no capability either way.
"""

import errno
import json
import os
import signal
import socket
from typing import NamedTuple

import pytest
from attempts import Attempts, Need, Row, attempt, each, number_of, surroundings
from removals import SECCOMP, answering_with

AT_FDCWD = -100
MARK = errno.ENOANO  # no call here is ever told this by the kernel


class Call(NamedTuple):
    """A system call with its arguments, and what the filter says; `differs` if the kernel says something else."""

    what: str
    name: str
    arguments: tuple = ()
    refusal: int = errno.EPERM
    differs: bool = True


def same(what, name, *arguments):
    """A call that the kernel refuses with EPERM as well, before it has looked at the arguments."""
    return Call(what, name, arguments, differs=False)


CALLS = [
    # Namespaces and mounts.
    Call("mount", "mount", ("none", "/nowhere", "tmpfs", 0, 0)),
    Call("umount", "umount2", ("/nowhere", 2)),
    Call("chroot", "chroot", ("/nowhere",)),
    same("pivot_root", "pivot_root", "/nowhere", "/nowhere"),
    Call("unshare what threads share", "unshare", (0x400,)),
    Call("setns", "setns", (-1, 0)),
    Call("clone a namespace", "clone", (0x20000 | 0x200 | signal.SIGCHLD, 0, 0, 0, 0)),  # CLONE_FS as well: EINVAL
    Call("clone3", "clone3", (0, 0), errno.ENOSYS),
    Call("open_tree", "open_tree", (AT_FDCWD, "/nowhere", 0)),
    Call("move_mount", "move_mount", (AT_FDCWD, "/nowhere", AT_FDCWD, "/nowhere", 0), differs=False),
    same("fsopen", "fsopen", "tmpfs", 0),
    Call("fsconfig", "fsconfig", (-1, 99, 0, 0, 0)),
    same("fsmount", "fsmount", -1, 0, 0),
    same("fspick", "fspick", AT_FDCWD, "/", 0),
    Call("mount_setattr", "mount_setattr", (AT_FDCWD, "/", 0, 0, 0)),
    Call("sethostname", "sethostname", ("x", 1), differs=False),
    Call("setdomainname", "setdomainname", ("x", 1), differs=False),
    # Others' processes.
    Call("ptrace a process that is not there", "ptrace", (16, 0, 0, 0)),
    Call("ask to be traced", "ptrace", (0, 0, 0, 0)),
    Call("process_vm_readv", "process_vm_readv", (0, 0, 0, 0, 0, 1)),
    Call("process_vm_writev", "process_vm_writev", (0, 0, 0, 0, 0, 1)),
    Call("process_madvise", "process_madvise", (-1, 0, 0, 0, 0)),
    Call("pidfd_getfd", "pidfd_getfd", (-1, 0, 0)),
    Call("kcmp", "kcmp", (0, 0, 99, 0, 0)),
    Call("prlimit of another", "prlimit64", (1 << 22, 7, 0, 0)),
    # Memory of the machine.
    Call("userfaultfd", "userfaultfd", (0xFF,)),
    Call("move_pages", "move_pages", (0, 0, 0, 0, 0, 0x80)),
    Call("migrate_pages", "migrate_pages", (1 << 22, 0, 0, 0)),
    Call("mbind", "mbind", (0, 4096, 99, 0, 0, 0)),
    Call("set_mempolicy", "set_mempolicy", (99, 0, 0)),
    Call("get_mempolicy", "get_mempolicy", (0, 0, 0, 0, 99)),
    Call("set_mempolicy_home_node", "set_mempolicy_home_node", (0, 4096, 99, 99)),
    # Machinery of the kernel's.
    Call("io_uring_setup", "io_uring_setup", (1, 0), errno.ENOSYS),
    Call("io_uring_enter", "io_uring_enter", (-1, 0, 0, 0, 0), errno.ENOSYS),
    Call("io_uring_register", "io_uring_register", (-1, 0, 0, 0), errno.ENOSYS),
    Call("bpf", "bpf", (1, 0, 1 << 20)),  # BPF_MAP_LOOKUP_ELEM
    Call("perf_event_open", "perf_event_open", (0, 0, -1, -1, 0)),
    Call("add_key", "add_key", (0, 0, 0, 0, 0)),
    Call("request_key", "request_key", (0, 0, 0, 0)),
    Call("keyctl", "keyctl", (99, 0, 0)),
    Call("fanotify_init", "fanotify_init", (0, 99), differs=False),
    Call("fanotify_mark", "fanotify_mark", (-1, 1, 0, AT_FDCWD, "/")),
    same("init_module", "init_module", 0, 0, ""),
    same("finit_module", "finit_module", -1, "", 0),
    same("delete_module", "delete_module", "nothing", 0),
    Call("create_module", "create_module", ("nothing", 0)),
    Call("query_module", "query_module", (0, 0, 0, 0, 0)),
    Call("get_kernel_syms", "get_kernel_syms", (0,)),
    same("kexec_load", "kexec_load", 0, 0, 0, 0),
    same("kexec_file_load", "kexec_file_load", -1, -1, 0, "", 0),
    # The machine.
    same("reboot", "reboot", 0xFEE1DEAD, 0x28121969, 0, 0),
    same("swapon", "swapon", "/nowhere", 0),
    same("swapoff", "swapoff", "/nowhere"),
    same("acct", "acct", "/nowhere"),
    same("syslog", "syslog", 5, 0, 0),
    same("vhangup", "vhangup"),
    Call("settimeofday", "settimeofday", (1, 0)),
    Call("clock_settime", "clock_settime", (99, 0)),
    Call("adjtimex", "adjtimex", (1,)),
    Call("clock_adjtime", "clock_adjtime", (99, 0)),
    Call("iopl", "iopl", (9,)),
    Call("ioperm", "ioperm", (1, 0, 1)),
    Call("modify_ldt", "modify_ldt", (99, 0, 0)),
    Call("uselib", "uselib", ("/nowhere",)),
    Call("quotactl", "quotactl", (0xFF, 0, 0, 0)),
    Call("quotactl_fd", "quotactl_fd", (-1, 0xFF, 0, 0)),
    Call("nfsservctl", "nfsservctl", (0, 0, 0)),
    Call("_sysctl", "_sysctl", (0,)),
    Call("sysfs", "sysfs", (99, 0, 0)),
    Call("ustat", "ustat", (0, 0)),
    # Files by other ways than their names.
    Call("name_to_handle_at", "name_to_handle_at", (AT_FDCWD, "/", 0, 0, 0x8)),
    Call("open_by_handle_at", "open_by_handle_at", (-1, 0, 0), differs=False),
    Call("lookup_dcookie", "lookup_dcookie", (0, 0, 0), differs=False),
    Call("openat2", "openat2", (AT_FDCWD, "/", 0, 0), errno.ENOSYS),
    # How the process itself runs.
    Call("personality without address randomisation", "personality", (0x0040000,)),
    Call("personality with executable data", "personality", (0x0400000,)),
    # Terminals, on the pipe that is stdin.
    Call("TIOCSTI", "ioctl", (0, 0x5412, "x")),
    Call("TIOCLINUX", "ioctl", (0, 0x541C, "x")),
    Call("TIOCSETD", "ioctl", (0, 0x5423, "x")),
    Call("TIOCSTI in the low half of 64 bits", "ioctl", (0, 1 << 32 | 0x5412, "x")),
]

# A number is negative where this machine's table has no such call.
CALLS = [call for call in CALLS if number_of(call.name) >= 0]

# AF_UNIX, AF_INET, AF_INET6, and AF_NETLINK are what a job may have; of the last only how interfaces are asked for.
FAMILIES = {
    number: next(
        (name for name in dir(socket) if name.startswith("AF_") and getattr(socket, name) == number), "unnamed"
    )
    for number in sorted({*range(46)} - {1, 2, 10, 16})
}
NETLINKS = {2: "USERSOCK", 4: "SOCK_DIAG", 6: "XFRM", 9: "AUDIT", 10: "FIB_LOOKUP", 11: "CONNECTOR", 12: "NETFILTER"}
NETLINKS |= {15: "KOBJECT_UEVENT", 16: "GENERIC", 20: "RDMA", 21: "CRYPTO"}
RAW, STREAM = int(socket.SOCK_RAW), int(socket.SOCK_STREAM)
SOCKETS = [
    *(Call(f"{name}, {number}", "socket", (number, RAW, 0), differs=False) for number, name in FAMILIES.items()),
    *(Call(f"NETLINK_{name}", "socket", (16, RAW, number), differs=False) for number, name in NETLINKS.items()),
    Call("NETLINK_NETFILTER without a filter", "socket", (16, RAW, 12)),
    Call("AF_ALG in the low half of 64 bits", "socket", (1 << 32 | 38, STREAM, 0), differs=False),
    Call("a pair of AF_INET", "socketpair", (2, STREAM, 0, 0)),
    Call("a pair of AF_TIPC", "socketpair", (30, STREAM, 0, 0), differs=False),
]
EVERY = [*CALLS, *SOCKETS]
DIFFERENT = [call for call in EVERY if call.differs]

# Each in a process of its own: what is not refused may change what the next one finds.
TRY_ALL = """
ANSWERS = {}
for what, number, arguments in json.loads(CALLS):
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        words = [word.encode() if isinstance(word, str) else ctypes.c_long(word) for word in arguments]
        result = LIBC.syscall(ctypes.c_long(number), *words)
        os.write(writable, str(ctypes.get_errno() if result == -1 else 0).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writable)
    ANSWERS[what] = int(os.read(readable, 100) or -1)
    os.close(readable)
print(json.dumps(ANSWERS))
"""


def answers(host, taken_out=(), calls=EVERY):
    """The errno that each call is told, 0 where it is none; -1 where the call did not come back."""
    asked = json.dumps([(call.what, number_of(call.name), call.arguments) for call in calls])
    told = attempt(host, f"CALLS = {asked!r}\n{TRY_ALL}", taken_out)
    assert len(told.get("lines", ())) == 1, told
    return json.loads(told["lines"][0])


# Of some of them, what a job would have.
RING = """
os.close(call("io_uring_setup", 1, ctypes.create_string_buffer(120)))
print("escaped")
"""
HANDLE = """
handle, mount = ctypes.create_string_buffer(struct.pack("Ii", 128, 0), 136), ctypes.c_int()
call("name_to_handle_at", -100, b"/tmp", handle, ctypes.byref(mount), 0)
print("escaped")
"""
KEYRING = """
text = ctypes.create_string_buffer(100)
key = call("keyctl", 10, -3, b"user", b"jhansi-test", 0)  # KEYCTL_SEARCH of the session's keyring
call("keyctl", 11, key, text, 100)  # KEYCTL_READ
print("escaped" if text.value == SECRET.encode() else "")
"""
SECOND_DESCRIPTOR = """
call("pidfd_getfd", os.pidfd_open(os.getpid()), 0, 0)
print("escaped")
"""


def gives(name, *arguments):
    return f'call("{name}", {", ".join(map(str, arguments))})\nprint("escaped")'


def is_setting(path, value):
    """Whether a setting of the kernel's, if there is such, has this value."""
    try:
        with open(path) as file:
            return file.read().strip() == value
    except FileNotFoundError:
        return True


TABLE = [
    Row("seccomp keeps the host's keyring out of reach", (SECCOMP,), KEYRING),
    Row("seccomp keeps address randomisation on", (SECCOMP,), gives("personality", 0x40000)),
    Row("seccomp keeps data from being executable by default", (SECCOMP,), gives("personality", 0x400000)),
    Row(
        "seccomp keeps io_uring from the job",
        (SECCOMP,),
        RING,
        needs=(Need("io_uring is off here", lambda: is_setting("/proc/sys/kernel/io_uring_disabled", "0")),),
    ),
    Row("seccomp keeps userfaultfd from the job", (SECCOMP,), gives("userfaultfd", 1)),
    Row("seccomp keeps handles of files from the job", (SECCOMP,), HANDLE),
    Row("seccomp keeps the job from being told of files by fanotify", (SECCOMP,), gives("fanotify_init", 0x200, 0)),
    Row("seccomp keeps descriptors where they are", (SECCOMP,), SECOND_DESCRIPTOR),
    Row(
        "seccomp keeps the job from comparing processes",
        (SECCOMP,),
        gives("kcmp", "os.getpid()", "os.getpid()", 1, 0, 0),
    ),
    Row("seccomp keeps the job from being traced", (SECCOMP,), gives("ptrace", 0, 0, 0, 0)),
    Row(
        "seccomp keeps memory where the host has it",
        (SECCOMP,),
        gives("set_mempolicy", 0, 0, 0),
        needs=(Need("this kernel knows of no places for memory", lambda: os.path.exists("/proc/self/numa_maps")),),
    ),
]


@pytest.fixture(scope="module")
def attempts(tmp_path_factory):
    with surroundings(tmp_path_factory.mktemp("host")) as host:
        yield Attempts(host, TABLE)


@pytest.fixture(scope="module")
def host(attempts):
    return attempts.host


@each(TABLE)
def test_the_attack_fails(attempts, row):
    attempts.assert_it_fails(row)


@each(TABLE)
def test_the_attack_succeeds_without_the_step(attempts, row):
    attempts.assert_it_succeeds(row)


@pytest.fixture(scope="module")
def told(host):
    return answers(host)


@pytest.fixture(scope="module")
def told_by_a_marked_filter(host):
    return answers(host, (answering_with(MARK),))


@pytest.fixture(scope="module")
def told_by_the_kernel(host):
    return answers(host, (SECCOMP,), DIFFERENT)


def each_call(calls):
    return pytest.mark.parametrize("call", calls, ids=[call.what for call in calls])


@each_call(EVERY)
def test_the_call_is_refused(told, call):
    assert told[call.what] == call.refusal


@each_call(EVERY)
def test_it_is_the_filter_that_refuses_it(told_by_a_marked_filter, call):
    assert told_by_a_marked_filter[call.what] == MARK


@each_call(DIFFERENT)
def test_without_the_filter_the_kernel_is_asked(told_by_the_kernel, call):
    if told_by_the_kernel[call.what] == errno.ENOSYS == call.refusal:
        pytest.skip("this kernel has no such call")
    assert told_by_the_kernel[call.what] != call.refusal


# --- doors of other architectures, and filters of the job's own -----------------------------------------------------

# mov eax, 20 (getpid); int 0x80; ret
OF_I386 = """
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex("b814000000cd80c3"))
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))())
"""
OF_X32 = "LIBC.syscall(ctypes.c_long(0x40000000 | 39)); print(ctypes.get_errno())"  # getpid
# Allow everything, install it, and try: the kernel takes the strictest of all answers.
OWN_FILTER = """
allow = struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000)
program = ctypes.create_string_buffer(allow, len(allow))
call("seccomp", 1, 0, struct.pack("HxxxxxxQ", 1, ctypes.addressof(program)))
call("unshare", 0x10000000)
"""
ON = {
    "in another thread": """
import threading
thread = threading.Thread(target=lambda: LIBC.unshare(0x10000000) == -1 and print(errno.errorcode[ctypes.get_errno()]))
thread.start(); thread.join()
""",
    "in another program": """
import subprocess
tries = "import ctypes; libc = ctypes.CDLL(None, use_errno=True); libc.unshare(0x10000000); print(ctypes.get_errno())"
print(errno.errorcode[int(subprocess.check_output(["python3", "-c", tries]))])
""",
}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="only x86-64 has these doors")
@pytest.mark.parametrize("source", [OF_I386, OF_X32], ids=["of i386", "of x32"])
def test_a_call_of_another_architecture_ends_the_process_and_the_filter_is_why(host, source):
    program = f"print(*lines_of({source!r}))"
    assert attempt(host, program)["lines"] == ["SIGSYS"]
    assert "SIGSYS" not in attempt(host, program, (SECCOMP,))["lines"][0]


@pytest.mark.parametrize("place", ON)
def test_the_filter_holds(host, place):
    assert attempt(host, ON[place])["lines"] == ["EPERM"]


def test_a_filter_of_the_jobs_own_allows_nothing_more(host):
    assert attempt(host, f"print(*lines_of({OWN_FILTER!r}))")["lines"] == ["EPERM"]
