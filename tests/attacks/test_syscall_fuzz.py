"""A job calls every system call there is with whatever comes to hand; then everything around it is looked at.

The fuzzer is an ordinary Python program in a sandbox. It forks a child for every few calls, because hardly any child
lives long: one unmaps its own code, one waits for ever, one ends the process that it is. What a call answered lies in
memory that both share, so that an answer is known whatever becomes of the child.

Six times it runs to its end with all calls but those that send signals. Those come last: they end the fuzzer itself as
soon as one of them says "everybody", so it is begun again and again for the rest of the minute.

The numbers are drawn anew each time; JHANSI_FUZZ_SEED repeats them, and each failure names the seed.
"""

import ctypes
import errno
import json
import os
import platform
import random
import signal
import stat
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

import prctl
import psutil
import pyseccomp
import pytest
from conftest import CHECKOUT, environment_with

from jhansi_runtime import ExecRequest, ExecResult, Paths, Runtime
from jhansi_runtime.engine import LauncherProcess

SEED = int(os.environ.get("JHANSI_FUZZ_SEED") or random.SystemRandom().getrandbits(32))
SECONDS = 60  # in which the fuzzer calls; what surrounds it comes on top
ROUNDS, MOST_ROUNDS = 6, 60
ROUND_SECONDS = 7
KILLED_SECONDS = 4  # for one run of those that end the fuzzer
TRIES_OF_EACH = 3

X32 = 0x40000000
NUMBERS = range(601)
TO_BE_TRIED = range(451)
BEYOND = [1000, 4095, 0x1FFF_FFFF, X32 - 1]
FOREIGN = [*(X32 | number for number in (0, 1, 9, 39, 57, 59, 101, 272, 512, 520, 547)), 0x7FFF_FFFF, 0xFFFF_FFFE]
# uretprobe and uprobe: a kernel that uses them itself lets them pass by every filter (seccomp_uprobe_exception in
# kernel/seccomp.c), and answers a program that does with SIGILL, or ENXIO.
PASSED_BY_THE_KERNEL = {335, 336} if platform.machine() == "x86_64" else set()
SIGNALLING = ["kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal"]
# After these a child is another process, or two in one memory: nothing else is asked of it.
ALONE = ["clone", "clone3", "fork", "vfork", "exit", "exit_group", "execve", "execveat", "rt_sigreturn"]
SLOW = ["sync", "syncfs"]  # once for each child: they wait for all disks of the host
LIMITS = {"cpus": 2, "cpu_time": 3600, "file_size": 1 << 20, "output": 64 << 20, "pids": 64}

# argv[1] is JSON: `seed`; `seconds` to go on, and to report after; the `numbers` to call, of which `alone`, `once` and
# `signalling` are some; and how often each of them has had its `tries`.
FUZZER = r"""
import collections, ctypes, errno, json, os, random, resource, signal, socket, struct, sys, time

ASKED = json.loads(sys.argv[1])
NUMBERS = ASKED["numbers"]
ALONE, ONCE, SIGNALLING = (set(ASKED[name]) for name in ("alone", "once", "signalling"))
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long
LIBC.syscall.argtypes = [ctypes.c_long] * 7
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

CHILDREN, CALLS, DESCRIPTORS = 4, 6, 24
PATIENCE = 1.0  # seconds
PAGE = 4096
CATCHABLE = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
TEXTS = [
    ".", "..", "x", "main.py", "/workspace/x", "/tmp/x", "/dev/shm/x", "/home/sandbox/x", "/", "/..", "/proc/self/mem",
    "/proc/self/fd/3", "/proc/self/root", "/proc/self/ns/user", "/proc/self/uid_map", "/proc/self/oom_score_adj",
    "/proc/1/root", "/proc/1/mem", "/proc/1/ns/mnt", "/proc/1/fd/0", "/proc/sys/kernel/hostname",
    "/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/dev/ptmx", "/dev/null", "/dev/tty", "/dev/kmsg",
    "/sys/fs/cgroup", "/etc/passwd", "/usr/bin/true", "/.jhansi", "user", "keyring", "tmpfs", "proc", "overlay",
]

def mapped(pages, private):
    # Between pages that nobody may touch: a call that writes too far stops there.
    flags = 0x20 | (0x02 if private else 0x01)  # MAP_ANONYMOUS, MAP_PRIVATE or MAP_SHARED
    start = LIBC.mmap(None, (pages + 512) * PAGE, 0, flags, -1, 0) + 256 * PAGE
    assert LIBC.mprotect(start, pages * PAGE, 3) == 0
    return start

BUFFER = mapped(6, True)
SMALL, WILD, VECTORS, WORDS, END = (BUFFER + n * PAGE for n in (1, 2, 3, 4, 6))
# For each child: which of NUMBERS it calls, from 1, and 1 more than the errno that came of it. 0 is not yet.
RECORDS = (ctypes.c_int * (CHILDREN * CALLS * 2)).from_address(mapped(1, False))

def fill(rng):
    ctypes.memmove(SMALL, struct.pack("<1024I", *(rng.randrange(17) for _ in range(1024))), PAGE)
    ctypes.memmove(WILD, rng.randbytes(PAGE), PAGE)
    pairs = (word for _ in range(256) for word in (BUFFER + rng.randrange(6 * PAGE), rng.randrange(64)))
    ctypes.memmove(VECTORS, struct.pack("<512Q", *pairs), PAGE)
    addresses = [struct.pack("<HH4s8x", socket.AF_INET, rng.randrange(1 << 16), b"\x7f\0\0\1"),
                 struct.pack("<H", socket.AF_UNIX) + b"\0abstract", struct.pack("<HHII", socket.AF_NETLINK, 0, 0, 0)]
    for place, words in enumerate([*(text.encode() for text in TEXTS), *addresses]):
        ctypes.memmove(WORDS + place * 64, words.ljust(64, b"\0"), 64)

def argument(rng, me):
    match rng.randrange(12):
        case 0 | 1:
            return rng.randrange(40)
        case 2:
            return rng.randrange(DESCRIPTORS)
        case 3 | 4 | 5:
            return BUFFER + 8 * rng.randrange(6 * PAGE // 8)
        case 6 | 7:
            return WORDS + 64 * rng.randrange(len(TEXTS) + 3)
        case 8:
            return rng.choice([-1, -2, -3, -4, -5, -100, 8, 16, 24, 100, PAGE, 1 << 31, 1 << 32, 1 << 63, me, END - 8])
        case 9:
            return sum(1 << rng.randrange(32) for _ in range(rng.randrange(1, 4)))
        case 10:
            return rng.getrandbits(32)
        case _:
            return rng.getrandbits(64)

def arguments(number, rng, me):
    words = [argument(rng, me) for _ in range(6)]
    if number in SIGNALLING and rng.random() < 0.5:  # to everybody, or to anybody
        who, what = rng.choice([-1, 0, 1, 2, 3, me, -me]), rng.randrange(65)
        words[0], words[1], words[2] = who, rng.choice([who, what]), rng.choice([what, words[2]])
    return words

def open_descriptors():
    pipe, pair = os.pipe(), socket.socketpair()
    listener, datagrams = socket.socket(), socket.socket(type=socket.SOCK_DGRAM)
    listener.bind(("127.0.0.1", 0)), listener.listen()
    flags = os.O_RDWR | os.O_CREAT
    files = [os.open("/dev/null", os.O_RDWR), os.open("/dev/zero", os.O_RDWR), *pipe, *(end.detach() for end in pair)]
    files += [listener.detach(), datagrams.detach(), os.eventfd(1), os.memfd_create("x"), os.pidfd_open(os.getpid())]
    for path in ("/tmp/fuzzed", "fuzzed"):
        try:
            files.append(os.open(path, flags, 0o600))
        except OSError:  # an earlier child has made something else of it
            files.append(os.dup(files[0]))
    files += [os.open(path, os.O_RDONLY) for path in (".", "/", "/proc/self", "/dev/shm", "/etc/passwd")]
    high = [os.dup2(file, 100 + place) for place, file in enumerate(files)]
    for place in range(DESCRIPTORS):
        os.dup2(high[place % len(high)], place)
    os.closerange(DESCRIPTORS, 1024)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

def call(slot, places, rng):
    me = os.getpid()
    os.setsid()
    for number in CATCHABLE:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, lambda *_: None)  # a call that waits is interrupted
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
    open_descriptors()
    fill(rng)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    for turn, place in enumerate(places):
        record = (slot * CALLS + turn) * 2
        words = arguments(NUMBERS[place], rng, me)
        RECORDS[record] = place + 1
        result = LIBC.syscall(NUMBERS[place], *words)
        if os.getpid() != me:  # a fork of its own
            os._exit(0)
        RECORDS[record + 1] = 1 + (ctypes.get_errno() if result == -1 else 0)

class Fuzzer:
    def __init__(self):
        self.rng = random.Random(ASKED["seed"])
        self.tries = ASKED["tries"]
        self.running, self.free = {}, list(range(CHILDREN))
        self.answers = collections.defaultdict(collections.Counter)
        self.together = [place for place, number in enumerate(NUMBERS) if number not in ALONE]

    def places(self):
        # What was tried least comes next, several times by itself; or a row of several, each after the ones before.
        if self.rng.random() < 0.25:
            return [self.rng.choice(self.together) for _ in range(CALLS)]
        least = min(self.tries)
        place = self.rng.choice([place for place, count in enumerate(self.tries) if count == least])
        return [place] * (1 if NUMBERS[place] in ONCE else CALLS)

    def start(self):
        places, seed = self.places(), self.rng.getrandbits(64)
        slot = self.free.pop()
        for record in range(slot * CALLS * 2, (slot + 1) * CALLS * 2):
            RECORDS[record] = 0
        try:
            pid = os.fork()
        except BlockingIOError:  # descendants of children have taken all processes there may be
            self.free.append(slot)
            self.sweep()
            return
        if pid == 0:
            try:
                call(slot, places, random.Random(seed))
            finally:
                os._exit(0)
        self.running[pid] = (slot, time.monotonic(), places)

    def reap(self, options):
        try:
            while (ended := os.waitpid(-1, options))[0]:
                if ended[0] in self.running:  # and not an orphan
                    self.ended(self.running.pop(ended[0]), self.name(ended[1]))
        except ChildProcessError:
            pass

    def name(self, status):
        if os.WIFSIGNALED(status):
            return f"signal {os.WTERMSIG(status)}"
        return f"exit {os.WEXITSTATUS(status)}"

    def ended(self, child, end):
        slot, _, places = child
        self.free.append(slot)
        for turn in range(len(places)):
            place, answer = RECORDS[(slot * CALLS + turn) * 2 : (slot * CALLS + turn) * 2 + 2]
            if place:
                self.tries[place - 1] += 1
                self.answers[NUMBERS[place - 1]][answer - 1 if answer else end] += 1

    def sweep(self):
        try:
            os.kill(-1, signal.SIGKILL)  # all but init and this very process
        except ProcessLookupError:
            pass
        self.reap(0)

    def report(self, **more):
        line = json.dumps({"answers": self.answers, **more}).encode() + b"\n"
        self.answers.clear()
        while line:
            line = line[os.write(1, line):]

    def fuzz(self):
        begun = swept = reported = time.monotonic()
        while (now := time.monotonic()) < begun + ASKED["seconds"]:
            for _ in range(len(self.free)):
                self.start()
            signal.sigtimedwait({signal.SIGCHLD}, 0.01)
            self.reap(os.WNOHANG)
            for pid, (_, started, _) in self.running.items():
                if now > started + PATIENCE:
                    os.kill(pid, signal.SIGKILL)  # not reaped yet, so it is still its pid
            if now > swept + PATIENCE:
                self.sweep()
                swept = now
            if now > reported + ASKED["report after"]:
                self.report()
                reported = now
        self.sweep()
        self.report(finished=True)

for number in CATCHABLE - {signal.SIGCHLD}:
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
Fuzzer().fuzz()
"""


# --- what stands around it ------------------------------------------------------------------------------------

# What a fresh container is like, and who may be what in it.
LOOK = """
import json, os, resource, socket
def text(path):
    with open(path) as file:
        return file.read()
wanted = ("CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "SigBlk", "SigIgn", "SigCgt", "Threads")
print(json.dumps({
    "ids": [os.getresuid(), os.getresgid(), os.getgroups(), os.getpid(), os.getppid(), os.getsid(0)],
    "names": [*os.uname(), os.getcwd(), sorted(os.environ.items())],
    "status": [line for line in text("/proc/self/status").splitlines() if line.startswith(wanted)],
    "limits": [resource.getrlimit(number) for number in range(16)],
    "runs on": [len(os.sched_getaffinity(0)), os.sched_getscheduler(0), os.nice(0)],
    "processes": [name for name in os.listdir("/proc") if name.isdigit()],
    "places": [[place, sorted(os.listdir(place))] for place in ("/", "/dev", "/tmp", "/dev/shm", "/home/sandbox")],
    "interfaces": socket.if_nameindex(),
    "texts": [text(f"/proc/sysvipc/{kind}") for kind in ("msg", "sem", "shm")] + [text("/etc/passwd")],
}))
"""
LIBC = ctypes.CDLL(None, use_errno=True)
SECRET = b"the host's secret"
OF_SESSION, OF_USER, OF_USERS_SESSION = -3, -4, -5  # keyrings: keyctl(2)
# These tell what happens on a machine from one moment to the next, not what it is set to.
COUNTERS = {
    *("fs/aio-nr", "fs/dentry-state", "fs/file-nr", "fs/inode-nr", "fs/inode-state", "kernel/ns_last_pid"),
    *("kernel/perf_event_max_sample_rate", "kernel/pty/nr", "kernel/random/entropy_avail", "kernel/random/uuid"),
    "net/netfilter/nf_conntrack_count",
}
WAITING_SIGNALS = ("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt")
BINFMT = "/proc/sys/fs/binfmt_misc"  # to look into it may mount it


class Host(NamedTuple):
    """What stands around the sandbox that is fuzzed."""

    runtime: Runtime
    launcher: LauncherProcess
    sandbox: str
    folder: str
    bystander: psutil.Process
    ipc: Mapping[str, int]
    key: int


class Fuzzed(NamedTuple):
    """What was seen: of the host before and after, of a fresh container, of each run of the fuzzer and of its calls.

    answers are by number, then what came of a call: an errno, or how the child ended that has no answer.
    """

    before: Mapping[str, object]
    after: Mapping[str, object]
    clock_set_by: float
    looks: tuple[ExecResult, ExecResult]
    runs: list[ExecResult]
    killed: list[ExecResult]
    answers: Mapping[int, Counter]
    audit_is_sound: bool
    audited_ends: list[str]
    left: list[psutil.Process]


def text(path):
    with open(path, errors="surrogateescape") as file:
        return file.read()


def processes(_):
    """Those that descend from this one, and how many there are in containers: the launcher has one begun, ahead."""
    own, contained = [], 0
    for process in psutil.Process().children(recursive=True):
        with suppress(FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):  # it has ended meanwhile
            (line,) = [line for line in text(f"/proc/{process.pid}/status").splitlines() if line.startswith("NSpid:")]
            if len(line.split()) == 2:
                own.append((process.pid, process.create_time()))
            else:
                contained += 1
    return sorted(own), contained


def bystander(host):
    process = host.bystander
    facts = process.as_dict(["status", "nice", "ionice", "cpu_affinity", "num_fds", "num_threads", "uids", "cwd"])
    status = [line for line in text(f"/proc/{process.pid}/status").splitlines() if line.startswith(WAITING_SIGNALS)]
    return facts, status, [text(f"/proc/{process.pid}/{name}") for name in ("limits", "oom_score_adj", "cgroup")]


def this_process(_):
    names = os.listdir("/proc/self/ns")
    return {
        "limits": text("/proc/self/limits"),
        "namespaces": {name: os.readlink(f"/proc/self/ns/{name}") for name in names},
        "runs on": (os.sched_getaffinity(0), os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)),
        "belongs to": (os.getsid(0), os.getpgid(0), os.getppid(), os.getcwd(), text("/proc/self/cgroup")),
        "signals": (signal.pthread_sigmask(signal.SIG_BLOCK, []), signal.sigpending()),
    }


def descriptors(_):
    names = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sorted(os.readlink(name) for name in names if os.path.exists(name))  # not the one that lists them


def sysctls(_):
    """Every one that this user may read."""
    found = {}
    for folder, folders, names in os.walk("/proc/sys"):
        folders[:] = [name for name in folders if os.path.join(folder, name) != BINFMT]
        for name in names:
            path = os.path.join(folder, name)
            if os.path.relpath(path, "/proc/sys") not in COUNTERS and not folder.endswith("/fs/quota"):
                with suppress(OSError):
                    found[path] = text(path)
    return found


def files(host):
    """All beneath the folder of this test, but for the workspace that is fuzzed and the audit log."""
    found = {}
    passed_over = {os.path.join(host.folder, "home", "workspaces", host.sandbox, "workspace")}
    passed_over.add(os.path.join(host.folder, "home", "audit"))
    for folder, folders, names in os.walk(host.folder):
        folders[:] = [name for name in folders if os.path.join(folder, name) not in passed_over]
        for name in (*folders, *names):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            content = text(path) if stat.S_ISREG(status.st_mode) and os.access(path, os.R_OK) else None
            found[path] = (stat.filemode(status.st_mode), status.st_uid, status.st_nlink, content)
    return found


def network(_):
    states = {name: (state.isup, state.mtu) for name, state in psutil.net_if_stats().items()}
    return states, psutil.net_if_addrs(), text("/proc/net/route")


def ipc(host):
    """All there is to tell of a queue, a semaphore and a segment."""
    rows = []
    for kind, identity in host.ipc.items():
        lines = [line.split() for line in text(f"/proc/sysvipc/{kind}").splitlines()[1:]]
        rows += [(kind, *line) for line in lines if line[1] == str(identity)]
    return rows


def keys(host):
    """What is in the keyrings of the session and of the user; of one key what it is, and its secret."""
    keyctl, content = number_of("keyctl"), ctypes.create_string_buffer(4096)
    # KEYCTL_READ of three keyrings, KEYCTL_DESCRIBE, KEYCTL_READ
    looks = [*((11, ring) for ring in (OF_SESSION, OF_USER, OF_USERS_SESSION)), (6, host.key), (11, host.key)]
    sizes = [(LIBC.syscall(keyctl, *look, content, len(content)), content.raw) for look in looks]
    return [found[:size] if size >= 0 else None for size, found in sizes]


def cgroups(host):
    """Where the cgroups of containers are made, if that is anywhere, and what is there."""
    base = host.launcher.delegation().base
    return base, base and sorted(entry.name for entry in os.scandir(base) if entry.is_dir())


FACTS = {
    "processes": processes,
    "another process": bystander,
    "this process": this_process,
    "descriptors": descriptors,
    "mounts": lambda _: text("/proc/self/mountinfo").splitlines(),
    "names": lambda _: os.uname(),
    "sysctls": sysctls,
    "files": files,
    "network": network,
    "System V objects": ipc,
    "keys": keys,
    "cgroups": cgroups,
}


def look_around(host, wanted=None):
    """Look until all is as wanted, or as at the last look: what a container leaves is taken down a moment later."""
    last, end = wanted, time.monotonic() + 30
    while (found := {name: look(host) for name, look in FACTS.items()}) != last and time.monotonic() < end:
        last = wanted or found
        time.sleep(0.2)
    return found


# --- the minute -----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _seed_is_told():
    print(f"JHANSI_FUZZ_SEED={SEED}")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    (folder / "private").mkdir()
    (folder / "private" / "secret").write_bytes(SECRET)
    objects = {"msg": LIBC.msgget(0, 0o600), "sem": LIBC.semget(0, 1, 0o600), "shm": LIBC.shmget(0, 4096, 0o600)}
    assert LIBC.msgsnd(objects["msg"], (1).to_bytes(8, "little") + SECRET, len(SECRET), 0) == 0
    name = f"jhansi-fuzz-{os.getpid()}".encode()
    key = LIBC.syscall(number_of("add_key"), b"user", name, SECRET, len(SECRET), OF_SESSION)
    argv = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
    prctl.set_child_subreaper(1)
    paths = Paths.from_environment(environment_with(folder / "home"))
    launcher = LauncherProcess()
    with (
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other,
        Runtime(paths, launcher=launcher) as runtime,
    ):
        other.stdout.readline()
        box, neighbour = (runtime.create(rootfs="host").id for _ in range(2))
        runtime.write(neighbour, "note", SECRET)
        yield Host(runtime, launcher, box, str(folder), psutil.Process(other.pid), objects, key)
        other.stdin.close()
    prctl.set_child_subreaper(0)
    LIBC.syscall(number_of("keyctl"), 9, key, OF_SESSION)  # KEYCTL_UNLINK
    LIBC.msgctl(objects["msg"], 0, None)  # IPC_RMID
    LIBC.semctl(objects["sem"], 0, 0)
    LIBC.shmctl(objects["shm"], 0, None)


@pytest.fixture(scope="module")
def fuzzed(host):
    first = run_program(host, LOOK)
    before, clock = look_around(host), clock_set_to()
    fuzzer = Fuzzer(host)
    until = time.monotonic() + SECONDS
    signalling = [number_of(name) for name in SIGNALLING]
    quiet = [number for number in (*NUMBERS, *BEYOND, *FOREIGN) if number not in signalling]
    # On a slow machine it takes as long as it takes.
    while len(fuzzer.runs) < ROUNDS or (fuzzer.lacks(quiet) and len(fuzzer.runs) < MOST_ROUNDS):
        fuzzer.run(quiet, ROUND_SECONDS)
    runs, fuzzer.runs = fuzzer.runs, []
    while time.monotonic() < until or (fuzzer.lacks(signalling) and len(fuzzer.runs) < MOST_ROUNDS):
        numbers = [*signalling, *fuzzer.rng.sample(quiet, 30)]
        fuzzer.run(numbers, KILLED_SECONDS, report_after=0.05, timeout=KILLED_SECONDS * 2)
    second = run_program(host, LOOK)
    after = look_around(host, before)
    clock_set_by = clock_set_to() - clock
    verified, records = host.runtime.audit.verify().ok, list(host.runtime.audit.records())
    host.runtime.close()
    left = [process for process in psutil.Process().children(recursive=True) if process != host.bystander]
    ended = [record["run_id"] for record in records if record["event"] == "exec.end"]
    looks, calls = (first, second), fuzzer.answers
    return Fuzzed(before, after, clock_set_by, looks, runs, fuzzer.runs, calls, verified, ended, left)


def number_of(call):
    return pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, call)


def clock_set_to():
    """What the clock said when the machine was started."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def run_program(host, source, *args, **limits):
    host.runtime.write(host.sandbox, "program.py", source.encode())
    request = ExecRequest(sandbox=host.sandbox, filename="program.py", args=list(args), limits=limits)
    return host.runtime.exec(request)


class Fuzzer:
    """Runs the fuzzer, each time with what was tried least as yet, and sums up what came of the calls."""

    def __init__(self, host):
        self.host = host
        self.rng = random.Random(SEED)
        self.runs = []
        self.answers = defaultdict(Counter)

    def run(self, numbers, seconds, *, report_after=1.0, timeout=600):
        asked = {
            "seed": self.rng.getrandbits(64),
            "seconds": seconds,
            "report after": report_after,
            "numbers": numbers,
            "alone": [number_of(name) for name in ALONE],
            "once": [*map(number_of, SLOW), *FOREIGN],
            "signalling": [number_of(name) for name in SIGNALLING],
            "tries": [self.answers[number].total() for number in numbers],
        }
        self.runs.append(run_program(self.host, FUZZER, json.dumps(asked), **LIMITS, timeout=timeout))
        for report in reports(self.runs[-1]):
            for number, answers in report["answers"].items():
                self.answers[int(number)].update(answers)

    def lacks(self, numbers):
        """Whether any of these is still to be tried."""
        return any(self.answers[number].total() < TRIES_OF_EACH for number in numbers if number in TO_BE_TRIED)


def reports(result):
    """What the fuzzer said while it lived: the last line may be half of one."""
    return [json.loads(line) for line in result.stdout.splitlines(keepends=True) if line.endswith("\n")]


# --- what came of it ------------------------------------------------------------------------------------------

LIMITED = {"timed_out", "cpu_time_exceeded", "oom_killed", "output_limit", "disk_limit"}


def test_every_run_of_the_fuzzer_came_to_its_end_or_to_that_of_a_limit(fuzzed):
    ends = Counter((run.status, run.exit_code, run.stderr) for run in fuzzed.runs)
    assert ends[("exited", 0, "")] > ROUNDS / 2
    assert {status for status, _, _ in ends if status != "exited"} <= LIMITED
    assert [run for run in fuzzed.runs if run.status == "exited" and "finished" not in reports(run)[-1]] == []


def test_a_fuzzer_that_may_signal_itself_ended_as_a_program_ends(fuzzed):
    ends = {(run.status, run.exit_code) for run in fuzzed.killed if run.status not in LIMITED}
    assert ends <= {("exited", 0), ("signaled", None)}


def test_every_call_was_tried_and_most_of_the_allowed_ones_went_further_than_the_filter(fuzzed):
    tries = {number: fuzzed.answers[number].total() for number in TO_BE_TRIED}
    assert {number: count for number, count in tries.items() if count < TRIES_OF_EACH} == {}
    went_further = [number for number in TO_BE_TRIED if set(fuzzed.answers[number]) - {"1"}]
    assert len(went_further) > 200


def test_what_the_profile_refuses_whatever_its_arguments_answered_nothing_else(fuzzed):
    expected = refused_numbers()
    answered = {number: {int(answer) for answer in fuzzed.answers[number] if answer.isdigit()} for number in expected}
    assert len(expected) > 100
    assert answered == {number: {error} for number, error in expected.items()}


def test_a_call_of_another_architecture_ended_its_process(fuzzed):
    seen = {number: set(fuzzed.answers[number]) for number in FOREIGN}
    expected = "signal 31" if platform.machine() == "x86_64" else str(errno.EPERM)
    assert [number for number in FOREIGN if expected not in seen[number]] == []
    # SIGKILL is the fuzzer's own, when a second was over before the kernel's was seen.
    assert {number: answers for number, answers in seen.items() if answers - {expected, "signal 9"}} == {}


def test_a_trampoline_of_the_kernels_own_is_of_no_use_to_a_program(fuzzed):
    refusals = {str(errno.EPERM), str(errno.ENXIO), str(errno.ENOSYS), "signal 4", "signal 9"}
    assert {answer for number in PASSED_BY_THE_KERNEL for answer in fuzzed.answers[number]} <= refusals


def refused_numbers():
    """Those of TO_BE_TRIED that no rule of the default profile allows, each with the errno that it says."""
    with open(os.path.join(CHECKOUT, "seccomp", "default.json"), encoding="utf-8") as file:
        profile = json.load(file)
    refused = dict.fromkeys(TO_BE_TRIED, profile["defaultErrnoRet"])
    rules = [(number_of(name), rule) for rule in profile["syscalls"] for name in rule["names"]]
    for number, rule in rules:
        if rule["action"] == "SCMP_ACT_ERRNO" and "args" not in rule and number in refused:
            refused[number] = rule.get("errnoRet", profile["defaultErrnoRet"])
    for number, rule in rules:
        if rule["action"] == "SCMP_ACT_ALLOW":
            refused.pop(number, None)
    return {number: error for number, error in refused.items() if number not in PASSED_BY_THE_KERNEL}


@pytest.mark.parametrize("fact", FACTS)
def test_the_host_is_as_it_was(fuzzed, fact):
    assert fuzzed.after[fact] == fuzzed.before[fact]


def test_the_clock_was_not_set(fuzzed):
    assert abs(fuzzed.clock_set_by) < 5  # seconds; what keeps a clock right moves it by much less


def test_the_next_exec_of_the_sandbox_finds_a_container_like_the_first(fuzzed):
    first, second = fuzzed.looks
    assert (second.status, second.exit_code, second.stderr) == ("exited", 0, "")
    assert json.loads(second.stdout) == json.loads(first.stdout)


def test_the_audit_log_verifies_and_has_one_end_of_each_run(fuzzed):
    assert fuzzed.audit_is_sound
    run_ids = [run.run_id for run in (fuzzed.looks[0], *fuzzed.runs, *fuzzed.killed, fuzzed.looks[1])]
    assert fuzzed.audited_ends == run_ids


def test_nothing_is_left_once_the_runtime_is_closed(fuzzed):
    assert fuzzed.left == []
