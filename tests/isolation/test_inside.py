"""What a job sees and can do in its container, told by a program that looks at everything (facts.py).

Asked twice, in a root tree of our own and in the host's programs: nothing may depend on which.
"""

import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys

import pyseccomp
import pytest
from conftest import run

FACTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "facts.py")
SECRET = "a-secret-on-the-command-line"
NAMESPACES = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")

CLONE_NEWUSER, CLONE_NEWNS = 0x10000000, 0x00020000
ADDR_NO_RANDOMIZE = 0x0040000
SOCK_STREAM, SOCK_RAW, SOCK_SEQPACKET = 1, 3, 5
TIOCSTI, TIOCLINUX, TIOCSETD = 0x5412, 0x541C, 0x5423
AT_FDCWD, O_CREAT = -100, 0o100
DEVICE_OF_A_DISK = (254 << 8) | 0


def number_of(call):
    return pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, call)


# What is tried, the call, its arguments, and the error that a job gets. Where another argument would be harmless, the
# dangerous one stands here; the others are such that only the filter says EPERM before the kernel has looked at them.
CALLS = [
    ("mount", "mount", ["none", "/tmp", "tmpfs", 0, 0], "EPERM"),
    ("remount the root writable", "mount", ["none", "/", "", 0x1020, 0], "EPERM"),
    ("umount2", "umount2", ["/proc/sys", 2], "EPERM"),
    ("pivot_root", "pivot_root", ["/tmp", "/tmp"], "EPERM"),
    ("chroot", "chroot", ["/tmp"], "EPERM"),
    ("open_tree", "open_tree", [AT_FDCWD, "/", 1], "EPERM"),
    ("move_mount", "move_mount", [AT_FDCWD, "/tmp", AT_FDCWD, "/home", 0], "EPERM"),
    ("fsopen", "fsopen", ["tmpfs", 0], "EPERM"),
    ("fspick", "fspick", [AT_FDCWD, "/", 0], "EPERM"),
    ("mount_setattr", "mount_setattr", [AT_FDCWD, "/", 0, 0, 0], "EPERM"),
    ("unshare the user namespace", "unshare", [CLONE_NEWUSER], "EPERM"),
    ("unshare the mount namespace", "unshare", [CLONE_NEWNS], "EPERM"),
    ("setns", "setns", [0, 0], "EPERM"),
    ("clone into a user namespace", "clone", [CLONE_NEWUSER | signal.SIGCHLD, 0, 0, 0, 0], "EPERM"),
    ("clone3", "clone3", [0, 0], "ENOSYS"),
    ("ptrace", "ptrace", [0, 0, 0, 0], "EPERM"),
    ("process_vm_readv", "process_vm_readv", [1, 0, 0, 0, 0, 0], "EPERM"),
    ("process_vm_writev", "process_vm_writev", [1, 0, 0, 0, 0, 0], "EPERM"),
    ("pidfd_getfd", "pidfd_getfd", [0, 0, 0], "EPERM"),
    ("kcmp", "kcmp", [1, 1, 0, 0, 0], "EPERM"),
    ("bpf", "bpf", [0, 0, 0], "EPERM"),
    ("perf_event_open", "perf_event_open", [0, 0, -1, -1, 0], "EPERM"),
    ("keyctl", "keyctl", [0, -3, 1], "EPERM"),
    ("add_key", "add_key", ["user", "name", "payload", 7, -3], "EPERM"),
    ("request_key", "request_key", ["user", "name", 0, 0], "EPERM"),
    ("io_uring_setup", "io_uring_setup", [1, 0], "ENOSYS"),
    ("io_uring_enter", "io_uring_enter", [0, 0, 0, 0, 0], "ENOSYS"),
    ("io_uring_register", "io_uring_register", [0, 0, 0, 0], "ENOSYS"),
    ("userfaultfd", "userfaultfd", [1], "EPERM"),
    ("open_by_handle_at", "open_by_handle_at", [AT_FDCWD, 0, 0], "EPERM"),
    ("name_to_handle_at", "name_to_handle_at", [AT_FDCWD, "/", 0, 0, 0], "EPERM"),
    ("fanotify_init", "fanotify_init", [0x200, 0], "EPERM"),
    ("personality without address randomisation", "personality", [ADDR_NO_RANDOMIZE], "EPERM"),
    ("kexec_load", "kexec_load", [0, 0, 0, 0], "EPERM"),
    ("kexec_file_load", "kexec_file_load", [0, 0, 0, 0, 0], "EPERM"),
    ("init_module", "init_module", [0, 0, ""], "EPERM"),
    ("finit_module", "finit_module", [0, "", 0], "EPERM"),
    ("delete_module", "delete_module", ["loop", 0], "EPERM"),
    ("reboot", "reboot", [0, 0, 0, 0], "EPERM"),
    ("swapon", "swapon", ["/workspace/swap", 0], "EPERM"),
    ("acct", "acct", [0], "EPERM"),
    ("quotactl", "quotactl", [0, 0, 0, 0], "EPERM"),
    ("syslog", "syslog", [10, 0, 0], "EPERM"),
    ("clock_settime", "clock_settime", [0, 0], "EPERM"),
    ("settimeofday", "settimeofday", [0, 0], "EPERM"),
    ("iopl", "iopl", [3], "EPERM"),
    ("ioperm", "ioperm", [0x80, 1, 1], "EPERM"),
    ("modify_ldt", "modify_ldt", [0, 0, 0], "EPERM"),
    ("sethostname", "sethostname", ["x", 1], "EPERM"),
    ("openat2", "openat2", [AT_FDCWD, "/", 0, 0], "ENOSYS"),
    ("socket AF_ALG", "socket", [38, SOCK_SEQPACKET, 0], "EPERM"),
    ("socket AF_VSOCK", "socket", [40, SOCK_STREAM, 0], "EPERM"),
    ("socket AF_PACKET", "socket", [17, SOCK_RAW, 0], "EPERM"),
    ("socket AF_XDP", "socket", [44, SOCK_RAW, 0], "EPERM"),
    ("socket AF_KEY", "socket", [15, SOCK_RAW, 2], "EPERM"),
    ("socket AF_CAN", "socket", [29, SOCK_RAW, 1], "EPERM"),
    ("socket AF_TIPC", "socket", [30, SOCK_SEQPACKET, 0], "EPERM"),
    ("socket NETLINK_NETFILTER", "socket", [16, SOCK_RAW, 12], "EPERM"),
    ("socket AF_ALG, in the low half of 64 bits", "socket", [(1 << 32) | 38, SOCK_SEQPACKET, 0], "EPERM"),
    ("raw socket", "socket", [2, SOCK_RAW, 1], "EPERM"),
    ("raw socket of IPv6", "socket", [10, SOCK_RAW, 58], "EPERM"),
    ("TIOCSTI", "ioctl", [1, TIOCSTI, "x"], "EPERM"),
    ("TIOCSTI, in the low half of 64 bits", "ioctl", [1, (1 << 32) | TIOCSTI, "x"], "EPERM"),
    ("TIOCLINUX", "ioctl", [1, TIOCLINUX, "x"], "EPERM"),
    ("TIOCSETD", "ioctl", [1, TIOCSETD, "x"], "EPERM"),
    ("chmod setuid", "chmod", ["/workspace", 0o4755], "EPERM"),
    ("fchmodat setgid", "fchmodat", [AT_FDCWD, "/workspace", 0o2755], "EPERM"),
    ("fchmodat2", "fchmodat2", [AT_FDCWD, "/workspace", 0o4755, 0], "ENOSYS"),
    ("open setuid", "openat", [AT_FDCWD, "/workspace/setuid", O_CREAT, 0o4755], "EPERM"),
    ("mknod of a device", "mknodat", [AT_FDCWD, "/workspace/disk", stat.S_IFBLK | 0o666, DEVICE_OF_A_DISK], "EPERM"),
    ("setresuid root", "setresuid", [0, 0, 0], "EINVAL"),
    ("setresgid root", "setresgid", [0, 0, 0], "EINVAL"),
    ("setgroups", "setgroups", [0, 0], "EPERM"),
    ("setpriority", "setpriority", [0, 0, -5], "EACCES"),
    ("sched_setscheduler", "sched_setscheduler", [0, 1, "\1\0\0\0"], "EPERM"),
    ("kill of a process outside", "kill", [os.getpid(), 0], "ESRCH"),
]

# A number is negative where this machine's table has no such call.
CALLS_HERE = [
    (label, number_of(call), arguments, error) for label, call, arguments, error in CALLS if number_of(call) >= 0
]

MASKED_FILES = [
    "cmdline",
    "config.gz",
    "kallsyms",
    "kcore",
    "key-users",
    "keys",
    "kmsg",
    "kpagecgroup",
    "kpagecount",
    "kpageflags",
    "latency_stats",
    "modules",
    "mtd",
    "pagetypeinfo",
    "sched_debug",
    "slabinfo",
    "sysrq-trigger",
    "timer_list",
    "timer_stats",
    "vmallocinfo",
]
MASKED_FOLDERS = ("acpi", "asound", "driver", "scsi")

DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}

INERT = {"ro", "nosuid", "nodev", "noexec"}
# What is mounted where: the type of its filesystem (None: the host's, whatever that is) and its flags. Beside these
# there are the devices, which are inert but for what they are, and the masks.
MOUNTS = {
    "/": (None, {"ro", "nosuid", "nodev"}),
    "/proc": ("proc", {"rw", "nosuid", "nodev", "noexec"}),
    **{f"/proc/{name}": ("proc", INERT) for name in ("bus", "fs", "irq", "sys")},
    **{f"/proc/{name}": ("tmpfs", INERT) for name in ("cpuinfo", "stat")},
    "/.jhansi": (None, INERT),
    "/dev": ("tmpfs", {"ro", "nosuid", "noexec"}),
    "/dev/pts": ("devpts", {"rw", "nosuid", "noexec"}),
    "/tmp": ("tmpfs", {"rw", "nosuid", "nodev"}),
    "/home/sandbox": ("tmpfs", {"rw", "nosuid", "nodev"}),
    "/dev/shm": ("tmpfs", {"rw", "nosuid", "nodev"}),
    "/workspace": (None, {"rw", "nosuid", "nodev"}),
}
# The only folders of the host's whose programs --rootfs host lends.
LENT = {"/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/alternatives", "/etc/ld.so.cache"}
FLAGS = {"ro", "rw", "nosuid", "nodev", "noexec"}


def own_addresses():
    """The host's addresses, and one that is nobody's (RFC 5737)."""
    found = {"192.0.2.1"}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        try:
            client.connect(("192.0.2.1", 9))
        except OSError:
            return sorted(found)  # a host without a network
        return sorted(found | {client.getsockname()[0]})


@pytest.fixture(scope="module")
def secret(tmp_path_factory):
    """A file of the host that anybody may read."""
    path = tmp_path_factory.mktemp("host") / "a-file-of-the-host"
    path.write_text("a file of the host\n")
    return str(path)


@pytest.fixture(scope="module", params=["recipe", "host"])
def rootfs(request):
    return request.param


@pytest.fixture(scope="module")
def facts(rootfs, jhansi, secret, runtime_environment, tmp_path_factory):
    """What the program in facts.py tells, beside a sandbox of somebody else's."""
    neighbour = jhansi("create").stdout.strip()
    note = tmp_path_factory.mktemp("neighbour") / "a-file-of-the-neighbour"
    note.write_text("private\n")
    assert jhansi("put", neighbour, note).returncode == 0
    others = os.path.join(runtime_environment["JHANSI_HOME"], "workspaces", neighbour, "workspace", note.name)
    assert os.path.exists(others)
    up = "../" * 30
    lost = [secret, others, f"/..{secret}", up + secret, f"/proc/1/root{secret}", f"/proc/1/cwd/{up}{secret}"]
    lost += [f"/.jhansi/workspaces/{neighbour}/workspace/{note.name}", f"../../{neighbour}/workspace/{note.name}"]
    asked = {"calls": [row[:3] for row in CALLS_HERE], "lost": lost, "addresses": own_addresses()}
    asked |= {"masked files": MASKED_FILES, "masked folders": MASKED_FOLDERS}
    asked["passed over"] = ["/proc", "/usr"] if rootfs == "host" else ["/proc"]
    words = ["--rootfs", rootfs, "--env", f"TOKEN={SECRET}", FACTS, json.dumps(asked)]
    answer = jhansi("run", *words, cwd=os.path.dirname(secret))
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


# --- who the job is -------------------------------------------------------------------------------------------


def test_every_namespace_is_another_than_the_hosts(facts):
    assert set(facts["namespaces"]) == set(NAMESPACES)
    for name, inside in facts["namespaces"].items():
        assert inside != os.readlink(f"/proc/self/ns/{name}")


def test_the_job_is_uid_and_gid_1000_and_no_other_id_is_mapped(facts):
    assert facts["ids"] == {"uid": [1000] * 3, "gid": [1000] * 3, "groups": facts["ids"]["groups"]}
    assert set(facts["ids"]["groups"]) <= {1000, 65534}  # an ordinary user's other groups cannot be left, nor named
    assert facts["id maps"] == [["1000", "1000", "1"]] * 2
    assert facts["setgroups"] == "deny"


@pytest.mark.parametrize("capability_set", ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"])
def test_no_set_holds_a_capability(facts, capability_set):
    assert int(facts["status"][capability_set], 16) == 0


def test_no_new_privileges_and_a_seccomp_filter(facts):
    assert (facts["status"]["NoNewPrivs"], facts["status"]["Seccomp"]) == ("1", "2")
    assert int(facts["status"]["Seccomp_filters"]) >= 1


def test_the_job_leads_a_session_without_a_terminal(facts):
    pid, parent, session, group = facts["pids"]
    assert parent == 1
    assert session == group == pid
    assert facts["terminal"] == "ENXIO"


# --- what it sees ---------------------------------------------------------------------------------------------


def test_no_process_is_listed_but_init_and_the_job(facts):
    assert sorted(facts["processes"]) == ["1", str(facts["pids"][0])]


def test_nothing_of_init_can_be_read(facts):
    told = dict(facts["init"])
    assert told.pop("cmdline").strip("\0") == ""
    assert set(told.values()) <= {"EACCES", "EPERM"}, told


def test_the_environment_is_ours_and_what_was_asked_for(facts):
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    fixed = {"PATH": path, "HOME": "/home/sandbox", "LANG": "C.UTF-8"}
    assert facts["environment"] == {**fixed, "TOKEN": SECRET}


def test_the_hosts_name_is_not_seen(facts):
    assert facts["hostname"] == "sandbox"
    assert facts["cgroup"]
    assert {line.rpartition(":")[2] for line in facts["cgroup"]} == {"/"}


def test_no_path_leads_to_a_file_of_the_host_or_of_another_sandbox(facts):
    assert set(facts["lost"].values()) <= {"ENOENT", "EACCES", "ENOTDIR"}, facts["lost"]


def test_the_hidden_folder_of_workspaces_is_empty(facts):
    assert facts["hidden"] == []


def test_every_mount_is_accounted_for(facts, rootfs):
    expected = {*MOUNTS, *(f"/dev/{name}" for name in DEVICES)}
    expected |= {f"/proc/{name}" for name in (*MASKED_FILES, *MASKED_FOLDERS)}
    found = {mount[4] for mount in facts["mounts"]}
    masked = {f"/proc/{name}" for name in MASKED_FOLDERS if os.path.isdir(f"/proc/{name}")}
    assert found >= {*MOUNTS, *(f"/dev/{name}" for name in DEVICES), *masked}
    assert found - expected <= (LENT if rootfs == "host" else set())


def test_every_mount_has_its_flags(facts):
    for mount in facts["mounts"]:
        place, options, kind = mount[4], set(mount[5].split(",")), mount[mount.index("-") + 1]
        if place.removeprefix("/dev/") in DEVICES:
            assert options & FLAGS == INERT - {"nodev"}, mount
            continue
        wanted_kind, wanted = MOUNTS.get(place, (None, {"ro", "nosuid", "nodev"} if place in LENT else INERT))
        assert options & FLAGS == wanted, mount
        assert wanted_kind in {None, kind}, mount


def test_what_the_host_mounts_later_does_not_appear_inside(runtime_environment, rootfs):
    # Here every mount of the host's is shared, as systemd has it.
    host = ["unshare", "--user", "--map-current-user", "--mount", "--propagation", "shared"]
    box = run(["create", "--rootfs", rootfs], runtime_environment).stdout.strip()
    words = [sys.executable, "-m", "jhansi_runtime", "exec", "--command", box, "cat", "/proc/self/mountinfo"]
    answer = subprocess.run([*host, *words], env=runtime_environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    mounts = [line.split(" ") for line in answer.stdout.splitlines()]
    # Optional fields stand between the options and the dash: shared:N, master:N ... for each tie to other mounts.
    assert [mount for mount in mounts if mount[6] != "-"] == []


def test_every_file_is_of_the_root_tree_or_of_the_containers_own_mounts(facts, rootfs, runtime_environment):
    trees = os.path.join(runtime_environment["JHANSI_HOME"], "rootfs")
    with open(os.path.join(trees, {"recipe": "python.json", "host": "python.host.json"}[rootfs])) as file:
        tree = os.path.join(trees, json.load(file)["tree"])
    expected = {"/workspace/facts.py", *(f"/dev/{name}" for name in DEVICES), "/dev/pts/ptmx"}
    expected |= {f"/dev/{name}" for name in ("pts", "shm", "ptmx", "fd", "stdin", "stdout", "stderr")}
    for folder, folders, files in os.walk(tree):
        expected |= {os.path.join(folder, name).removeprefix(tree) for name in (*folders, *files)}
    lent = tuple(f"{place}/" for place in LENT) if rootfs == "host" else ()
    assert [path for path in facts["tree"] if path not in expected and not path.startswith(lent)] == []


def test_every_device_is_one_of_ours_and_no_other(facts):
    devices = {path: rdev for path, (kind, rdev) in facts["tree"].items() if kind in {stat.S_IFCHR, stat.S_IFBLK}}
    ptmx = os.makedev(5, 2)
    assert devices == {f"/dev/{name}": os.makedev(*number) for name, number in DEVICES.items()} | {
        "/dev/pts/ptmx": ptmx
    }
    links = {path for path, (kind, _) in facts["tree"].items() if kind == stat.S_IFLNK and path.startswith("/dev/")}
    assert links == {"/dev/ptmx", "/dev/fd", "/dev/stdin", "/dev/stdout", "/dev/stderr"}


@pytest.mark.parametrize("other", ["a file", "another device"])
def test_a_device_of_the_hosts_that_is_another_than_its_name_says_ends_the_exec(secret, runtime_environment, other):
    other = {"a file": secret, "another device": "/dev/full"}[other]
    # The one with the power to mount; the other an ordinary user again.
    lying = [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        f"mount --bind {other} /dev/zero && exec $*",
        "-",
    ]
    user = ["unshare", "--user", f"--map-user={os.getuid()}", f"--map-group={os.getgid()}"]
    words = [sys.executable, "-m", "jhansi_runtime", "run", "--rootfs=host", FACTS]
    argv = [*lying, *user, *words]
    answer = subprocess.run(argv, env=runtime_environment, capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stdout) == (125, ""), answer.stderr
    assert "isolation failed at the step 'sources'" in answer.stderr
    assert "the host's device is not what its name says: '/dev/zero'" in answer.stderr


def test_no_terminal_of_the_host_is_in_devpts(facts):
    assert facts["terminals"] == ["ptmx"]


def test_the_only_interface_is_lo_and_it_is_up(facts):
    assert facts["interfaces"] == ["lo"]
    assert facts["loopback"] == [True, True]


def test_no_address_outside_can_be_reached(facts):
    assert set(facts["outside"].values()) == {"ENETUNREACH"}


def test_what_proc_tells_of_the_machine_is_empty_or_out_of_reach(facts):
    here = [name for name in MASKED_FILES if os.path.exists(f"/proc/{name}")]
    assert here
    # What only root may read needs no mask: no map in here holds root.
    assert {facts["masked files"][name] for name in here} <= {"", "EACCES", "EPERM"}, facts["masked files"]
    folders = [name for name in MASKED_FOLDERS if os.path.exists(f"/proc/{name}")]
    assert {name: facts["masked folders"][name] for name in folders} == {name: [] for name in folders}


# --- what it can change ---------------------------------------------------------------------------------------


def test_nothing_can_be_written_but_the_workspace_and_the_scratch_folders(facts):
    assert sorted(facts["writable"]) == ["/dev/shm", "/home/sandbox", "/tmp", "/workspace", "/workspace/facts.py"]


def test_no_switch_of_the_kernel_can_be_written(facts):
    assert [path for path in facts["writable in proc"] if not path.startswith("/proc/pressure/")] == []


@pytest.mark.parametrize(("label", "error"), [(label, error) for label, *_, error in CALLS_HERE])
def test_a_call_that_leads_out_is_refused(facts, label, error):
    assert facts["calls"][label] == error


FOREIGN_CALLS = {
    "of i386": """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20 (getpid); int 0x80; ret
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
print(ctypes.CFUNCTYPE(ctypes.c_int)(address)())
""",
    "of x32": """
import ctypes
print(ctypes.CDLL(None).syscall(ctypes.c_long(0x40000000 | 39)))  # getpid
""",
}
# To end the one thread that called would leave a program that goes on.
IN_A_THREAD = """
import os, threading, time
threading.Thread(target=exec, args=(SOURCE, {})).start()
time.sleep(5)
os._exit(0)
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="only x86-64 has these doors")
@pytest.mark.parametrize("source", FOREIGN_CALLS.values(), ids=FOREIGN_CALLS)
def test_a_call_of_another_architecture_ends_the_program(jhansi, tmp_path, source):
    (tmp_path / "main.py").write_text(f"SOURCE = {source!r}{IN_A_THREAD}")
    answer = jhansi("run", "--json", tmp_path / "main.py")
    assert json.loads(answer.stdout)["signal"] == "SIGSYS"


# --- how it starts --------------------------------------------------------------------------------------------


def test_three_descriptors_are_open(facts):
    assert facts["descriptors"] == ["0", "1", "2", "3"]  # 3 is the listing's own


def test_it_starts_in_the_workspace_with_the_usual_umask(facts):
    assert (facts["working directory"], facts["umask"]) == ("/workspace", 0o022)


def test_signals_have_their_default_actions_and_none_is_blocked(jhansi, rootfs):
    box = jhansi("create", "--rootfs", rootfs).stdout.strip()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGCHLD})
    ignored = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGPIPE, signal.SIGUSR1)}
    try:
        # Not a Python program: that ignores two signals by itself.
        answer = jhansi("exec", "--command", box, "cat", "/proc/self/status", restore_signals=False)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, action in ignored.items():
            signal.signal(number, action)
    assert answer.returncode == 0, answer.stderr
    status = dict(line.split(":\t") for line in answer.stdout.splitlines())
    sets = ("SigIgn", "SigBlk", "SigCgt", "SigPnd", "ShdPnd")
    assert {name: int(status[name], 16) for name in sets} == dict.fromkeys(sets, 0)


def test_the_limits_are_those_that_were_asked_for(facts):
    limits = facts["limits"]
    assert limits["core"] == [1, 1]
    assert limits["cpu"] == [30, 31]
    assert limits["fsize"] == [256 << 20] * 2
    assert limits["nofile"][0] == limits["nofile"][1] <= 1024
    assert limits["nice"] == limits["rtprio"] == [0, 0]
    assert limits["memlock"][1] <= 64 << 10


def test_how_much_stack_it_has_is_not_its_callers_to_say(jhansi, rootfs):
    box = jhansi("create", "--rootfs", rootfs).stdout.strip()
    before, ceiling = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (4 << 20, ceiling))
    try:
        answer = jhansi("exec", "--command", box, "sh", "-c", "ulimit -Ss")
    finally:
        resource.setrlimit(resource.RLIMIT_STACK, (before, ceiling))
    expected = 8 << 20 if ceiling == resource.RLIM_INFINITY else min(8 << 20, ceiling)
    assert (answer.stdout, answer.stderr) == (f"{expected // 1024}\n", "")


def test_the_job_cannot_shield_itself_from_the_out_of_memory_killer(facts):
    assert int(facts["oom"]) >= 0
    assert facts["oom lowered"] in {"EACCES", "EPERM"}
