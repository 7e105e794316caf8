"""What /proc tells of the machine and of init, and the switches in it.

CVE-2025-31133 and CVE-2025-52881: masks that were no masks, and writes that links led to /proc/sys and to
/proc/sysrq-trigger; test_hostile_rootfs.py has the links. CVE-2016-9962 and CVE-2019-5736: /proc told of init. Every
escape by core_pattern, modprobe or uevent_helper: the kernel runs, as root of the machine, a program that anybody could
name. Where user namespaces are a source of bugs, max_user_namespaces keeps their number down.
"""

import os

import pytest
from attempts import LANDLOCKED, Attempts, Need, Refusal, Row, each, each_alone, each_refusal, surroundings
from removals import (
    CAPABILITIES,
    INNER_NAMESPACE,
    LANDLOCK,
    NOT_DUMPABLE,
    PROCESSES,
    SECCOMP,
    is_read_only_proc,
    without,
    without_mask_of,
    without_operations,
)

from jhansi_runtime.isolation import inside, mounts, processors

MASKED_FILES = [name for name in mounts._PROC_MASKED_FILES if os.path.exists(f"/proc/{name}")]
MASKED_FOLDERS = [name for name in mounts._PROC_MASKED_DIRECTORIES if os.path.exists(f"/proc/{name}")]
# Each of these, too, keeps the switches from being written.
NO_POWER = (INNER_NAMESPACE, CAPABILITIES, LANDLOCK)


def speaks(path):
    """A kernel may have the file and nothing to say in it, or say it to root alone."""

    def is_met():
        try:
            with open(path, "rb") as file:
                return bool(file.read(1))
        except OSError:
            return False

    return Need(f"{path} of this kernel is empty, or root's", is_met)


def lists(path):
    return Need(f"{path} of this kernel is empty", lambda: bool(os.listdir(path)))


def counts_its_cpus():
    return len(os.sched_getaffinity(0)) > 1 and len(processors._cpuinfo()) > 1


def there(path):
    return Need(f"this kernel has no {path}", lambda: os.path.exists(path))


def written(path, text):
    return f'os.write(os.open("{path}", os.O_WRONLY), {text!r}.encode()); print("escaped")'


TABLE = [
    *(
        Row(
            f"/proc/{name} is masked",
            (without_mask_of(f"proc/{name}"),),
            f'print("escaped" if open("/proc/{name}", "rb").read(1) else "")',
            needs=(speaks(f"/proc/{name}"),),
        )
        for name in MASKED_FILES
    ),
    *(
        Row(
            f"/proc/{name} is masked",
            (without_mask_of(f"proc/{name}"),),
            f'print("escaped" if os.listdir("/proc/{name}") else "")',
            needs=(lists(f"/proc/{name}"),),
        )
        for name in MASKED_FOLDERS
    ),
    Row(
        "a mask cannot be taken off",
        (INNER_NAMESPACE,),
        """
assert LIBC.umount2(b"/proc/key-users", 2) == 0
print("escaped" if open("/proc/key-users").read(1) else "")
""",
        also=(CAPABILITIES, SECCOMP, LANDLOCK),
        needs=(speaks("/proc/key-users"),),
    ),
    Row(
        "the launcher's arguments are erased",
        (without(inside, "erase"),),
        'print("escaped" if open("/proc/1/cmdline").read().strip("\\0") else "")',
    ),
    Row(
        "/proc is the container's own",
        (PROCESSES,),
        'print("escaped" if os.path.exists("/proc/" + E["PROCESS"]) else "")',
    ),
    Row(
        "the command lines of the host's processes are not in sight",
        (PROCESSES,),
        'print("escaped" if SECRET in open("/proc/" + E["PROCESS"] + "/cmdline").read() else "")',
    ),
    Row(
        "/proc/cpuinfo tells of no more CPUs than there are to use",
        (without_operations(lambda operation: operation.target == "proc/cpuinfo"),),
        """
shown = open("/proc/cpuinfo").read().count("processor\\t:")
print("escaped" if shown == int(E["CPUS"]) > 1 else "")
""",
        needs=(Need("this machine has one CPU, or does not number them", counts_its_cpus),),
    ),
    Row(
        "/proc/stat tells nothing of the host's load",
        (without_operations(lambda operation: operation.target == "proc/stat"),),
        'print("escaped" if int(open("/proc/stat").read().split()[1]) else "")',
    ),
    # The switches. Those of the container's own namespaces are the only ones that an ordinary user's init may write.
    *(
        Row(
            f"{path} is read-only",
            (without_operations(is_read_only_proc),),
            written(path, text),
            also=NO_POWER,
            needs=(there(path),),
        )
        for path, text in (
            ("/proc/sys/net/ipv4/ip_forward", "1"),
            ("/proc/sys/net/ipv4/ping_group_range", "1000 1000"),
            ("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0"),
            ("/proc/sys/net/ipv6/conf/all/forwarding", "1"),
            ("/proc/sys/net/ipv4/conf/all/route_localnet", "1"),
            ("/proc/sys/user/max_net_namespaces", "100"),
            ("/proc/sys/user/max_inotify_watches", "100"),
        )
    ),
    Row(
        "the limit of user namespaces cannot be raised",
        (without_operations(is_read_only_proc),),
        written("/proc/sys/user/max_user_namespaces", "100"),
        also=NO_POWER,
    ),
    Row(
        "Landlock keeps the switches",
        (LANDLOCK,),
        written("/proc/sys/user/max_user_namespaces", "100"),
        also=(INNER_NAMESPACE, CAPABILITIES, without_operations(is_read_only_proc)),
        needs=(LANDLOCKED,),
    ),
    Row(
        "the job cannot have the out-of-memory killer take init",
        (NOT_DUMPABLE,),
        written("/proc/1/oom_score_adj", "1000"),
        also=(LANDLOCK,),
    ),
    Row(
        "Landlock keeps the job from having the out-of-memory killer take init",
        (LANDLOCK,),
        written("/proc/1/oom_score_adj", "1000"),
        also=(NOT_DUMPABLE,),
        needs=(LANDLOCKED,),
    ),
    Row(
        "what init leaves in a core dump is not the job's to say",
        (NOT_DUMPABLE,),
        written("/proc/1/coredump_filter", "0xff"),
        also=(LANDLOCK,),
    ),
]


# An ordinary user's init cannot write these either: they are root's, and no map in the container holds root.
ROOTS = (
    "/proc/sys/kernel/core_pattern",
    "/proc/sys/kernel/core_pipe_limit",
    "/proc/sys/kernel/modprobe",
    "/proc/sys/kernel/hotplug",
    "/proc/sys/kernel/poweroff_cmd",
    "/proc/sys/kernel/panic",
    "/proc/sys/kernel/sysrq",
    "/proc/sys/kernel/unprivileged_bpf_disabled",
    "/proc/sys/kernel/yama/ptrace_scope",
    "/proc/sys/kernel/randomize_va_space",
    "/proc/sys/kernel/kptr_restrict",
    "/proc/sys/kernel/dmesg_restrict",
    "/proc/sys/kernel/hostname",
    "/proc/sys/kernel/msgmax",
    "/proc/sys/kernel/shmmax",
    "/proc/sys/fs/mqueue/msg_max",
    "/proc/sys/fs/suid_dumpable",
    "/proc/sys/fs/protected_symlinks",
    "/proc/sys/fs/binfmt_misc/register",  # not there: it is another file system, on the host's /proc
    "/proc/sys/vm/mmap_min_addr",
    "/proc/sys/vm/drop_caches",
    "/proc/sys/vm/overcommit_memory",
    "/proc/sysrq-trigger",
    "/proc/irq/default_smp_affinity",
    "/proc/acpi/wakeup",  # not there: its folder is masked
    "/proc/mtrr",
)
ROOTS_TO_READ = (
    "/proc/kcore",
    "/proc/kmsg",
    "/proc/kpageflags",
    "/proc/kpagecount",
    "/proc/slabinfo",
    "/proc/vmallocinfo",
    "/proc/pagetypeinfo",
    "/proc/timer_list",
    "/proc/self/stack",
)
OWN_MAPS = {"uid_map": "0 0 1", "gid_map": "0 0 1", "projid_map": "0 0 1", "setgroups": "allow"}


REFUSALS = [
    *(
        Refusal(f"{path} is written", f'os.open("{path}", os.O_WRONLY)', ("EACCES", "ENOENT"), needs=(there(path),))
        for path in ROOTS
    ),
    *(
        Refusal(f"{path} is read", f'open("{path}", "rb").read(1)', ("EACCES", "EPERM"), needs=(there(path),))
        for path in ROOTS_TO_READ
    ),
    *(
        Refusal(
            f"/proc/self/{name} is written once more",
            f'os.write(os.open("/proc/self/{name}", os.O_WRONLY), b"{text}")',
            ("EACCES", "EPERM"),
        )
        for name, text in OWN_MAPS.items()
    ),
    Refusal(
        "physical addresses are read from /proc/self/pagemap",
        """
page = mmap.mmap(-1, 4096); page[0] = 1
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
entry = int.from_bytes(os.pread(os.open("/proc/self/pagemap", os.O_RDONLY), 8, address // 4096 * 8), "little")
print("present" if entry >> 63 else "", entry & (1 << 55) - 1)  # the frame's number is shown to root alone
""",
        ("present 0",),
    ),
    Refusal(
        "the own chance of being ended for memory is lowered",
        'os.write(os.open("/proc/self/oom_score_adj", os.O_WRONLY), b"-1000")',
        ("EACCES",),
    ),
    Refusal(
        "the next process's number is chosen",
        'os.open("/proc/sys/kernel/ns_last_pid", os.O_WRONLY)',
        ("EROFS", "ENOENT"),
    ),
    Refusal(
        "the registers of a PCI device are written",
        """
bus = next(name for name in os.listdir("/proc/bus/pci") if name != "devices")
os.open(f"/proc/bus/pci/{bus}/" + os.listdir(f"/proc/bus/pci/{bus}")[0], os.O_WRONLY)
""",
        ("EACCES",),
        needs=(there("/proc/bus/pci/devices"),),
    ),
    Refusal("/sys is there", 'os.listdir("/sys")', ("ENOENT",)),
    Refusal("a control group is in sight", 'os.listdir("/sys/fs/cgroup")', ("ENOENT",)),
    Refusal("debugfs is in sight", 'os.listdir("/sys/kernel/debug")', ("ENOENT",)),
    Refusal("uevent_helper is written", 'os.open("/sys/kernel/uevent_helper", os.O_WRONLY)', ("ENOENT",)),
    Refusal(
        "a label is written by a link to /proc/sys (CVE-2025-52881)",
        """
os.symlink("/proc/sys/kernel/core_pattern", "/tmp/link")
os.open("/tmp/link", os.O_WRONLY)
""",
        ("EACCES",),
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
