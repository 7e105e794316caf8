"""Processes: those of the host are neither seen nor touched, and init cannot be stopped, ended, traced or starved.

The host's processes of the same user are everything a job shares with its host: signals, /proc, priorities and ptrace
know users and not namespaces. CVE-2016-9962, CVE-2019-5736: what the runtime had in the container could be traced, and
had descriptors and a program of the host's.
"""

import os
from contextlib import contextmanager

import prctl
import psutil
import pytest
from attempts import (
    SCOPED,
    Attempts,
    Need,
    Refusal,
    Row,
    attempt,
    begun,
    each,
    each_alone,
    each_refusal,
    surroundings,
    wait_until,
)
from removals import (
    CAPABILITIES,
    INNER_NAMESPACE,
    LANDLOCK,
    NOT_DUMPABLE,
    PROCESSES,
    SECCOMP,
    without,
)

from jhansi_runtime.isolation import signals

ADVISED = Need(
    "an older kernel asks a capability of who advises",
    lambda: tuple(map(int, os.uname().release.split(".")[:2])) > (6, 11),
)
HOSTS = 'PID = int(E["PROCESS"])\n'
PEEK = """
child = os.fork()
if child == 0:
    signal.pause()
call("ptrace", 16, child, 0, 0)  # PTRACE_ATTACH
os.waitpid(child, 0)
call("ptrace", 17, child, 0, 0)
os.kill(child, signal.SIGKILL)
print("escaped")
"""
READ_MEMORY = """
start = int(open("/proc/1/maps").read().split("-")[0], 16)
buffer = ctypes.create_string_buffer(4)
ours = struct.pack("QQ", ctypes.addressof(buffer), 4)
call("process_vm_readv", 1, ours, 1, struct.pack("QQ", start, 4), 1, 0)
print("escaped" if buffer.raw == b"\\x7fELF" else "")
"""
WRITE_MEMORY = """
lines = [line.split() for line in open("/proc/1/maps")]
start = next(int(line[0].split("-")[0], 16) for line in lines if line[1].startswith("rw"))
buffer = ctypes.create_string_buffer(1)
ours = struct.pack("QQ", ctypes.addressof(buffer), 1)
theirs = struct.pack("QQ", start, 1)
call("process_vm_readv", 1, ours, 1, theirs, 1, 0)
call("process_vm_writev", 1, ours, 1, theirs, 1, 0)  # what was there
print("escaped")
"""
TAKE_DESCRIPTOR = """
call("pidfd_getfd", os.pidfd_open(1), 0, 0)
print("escaped")
"""
COMPARE = 'call("kcmp", 1, os.getpid(), 2, 0, 0); print("escaped")'
TRACE_INIT = 'call("ptrace", 0x4206, 1, 0, 0); print("escaped")'  # PTRACE_SEIZE
ADVISE = """
page = mmap.mmap(-1, 4096)
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
call("process_madvise", os.pidfd_open(os.getpid()), struct.pack("QQ", address, 4096), 1, 20, 0)  # MADV_COLD
print("escaped")
"""
INIT_IS_OPEN = (NOT_DUMPABLE, INNER_NAMESPACE, CAPABILITIES, LANDLOCK)

TABLE = [
    Row(
        "init runs no handler of the launcher's",
        (without(signals, "reset"),),
        """
os.kill(1, signal.SIGUSR1)
for _ in range(50):
    if socket.gethostname() == "owned":
        print("escaped")
        break
    time.sleep(0.02)
""",
        also=(LANDLOCK,),
    ),
    Row(
        "the job ignores no signal that the launcher ignores",
        (without(signals, "reset"),),
        'print("escaped" if signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN else "")',
    ),
    *(
        Row(what, (LANDLOCK,), attack, needs=(SCOPED,))
        for what, attack in {
            "no signal leaves the job": 'os.kill(1, 0); print("escaped")',
            "no signal leaves the job by pidfd": 'signal.pidfd_send_signal(os.pidfd_open(1), 0); print("escaped")',
            "no signal leaves the job for a thread": 'call("tgkill", 1, 1, 0); print("escaped")',
            "no signal with a value leaves the job": (
                'call("rt_sigqueueinfo", 1, signal.SIGCHLD, struct.pack("iiiQ100x", signal.SIGCHLD, 0, -1, 0))\n'
                'print("escaped")'
            ),
        }.items()
    ),
    # The host's.
    *(
        Row(what, (PROCESSES,), HOSTS + attack, also=also)
        for what, attack, also in (
            ("no signal reaches a process of the host's", 'os.kill(PID, 0); print("escaped")', (LANDLOCK,)),
            ("no process of the host's is held by a pidfd", 'os.pidfd_open(PID); print("escaped")', ()),
            (
                "no process of the host's is slowed down",
                'os.setpriority(os.PRIO_PROCESS, PID, 19); print("escaped")',
                (),
            ),
            (
                "no process of the host's is given other processors",
                'os.sched_setaffinity(PID, os.sched_getaffinity(PID)); print("escaped")',
                (),
            ),
            (
                "no process of the host's is scheduled otherwise",
                'os.sched_setscheduler(PID, os.SCHED_BATCH, os.sched_param(0)); print("escaped")',
                (),
            ),
            (
                "no process of the host's is put last at its disk",
                'call("ioprio_set", 1, PID, 2 << 13 | 7); print("escaped")',
                (),
            ),
            ("a process of the host's is not asked for its session", 'os.getsid(PID); print("escaped")', ()),
        )
    ),
    # init's.
    *(
        Row(what, (SECCOMP,), attack, also=INIT_IS_OPEN)
        for what, attack in {
            "init's memory is not read by process_vm_readv": READ_MEMORY,
            "init's memory is not written by process_vm_writev": WRITE_MEMORY,
            "init's descriptors are not taken": TAKE_DESCRIPTOR,
            "init is not compared with": COMPARE,
            "init is not traced": TRACE_INIT,
        }.items()
    ),
    *(
        Row(what, (NOT_DUMPABLE,), attack, also=(SECCOMP, INNER_NAMESPACE, CAPABILITIES, LANDLOCK))
        for what, attack in {
            "init, not dumpable, keeps its memory": READ_MEMORY,
            "init, not dumpable, keeps its descriptors": TAKE_DESCRIPTOR,
            "init, not dumpable, is not traced": TRACE_INIT,
        }.items()
    ),
    Row("seccomp keeps the job from tracing its own child", (SECCOMP,), PEEK),
    Row("the memory of processes is not advised on", (SECCOMP,), ADVISE, needs=(ADVISED,)),
    Row(
        "seccomp keeps the limits of init out of reach",
        (SECCOMP,),
        "resource.prlimit(1, resource.RLIMIT_FSIZE, (0, 0))\nprint('escaped')",
    ),
]

REFUSALS = [
    Refusal("init is slowed down", "os.setpriority(os.PRIO_PROCESS, 1, 19)", ("EPERM",)),
    Refusal(
        "init is scheduled when nobody else is",
        "os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0))",
        ("EPERM",),
    ),
    Refusal("init is given one processor", "os.sched_setaffinity(1, {min(os.sched_getaffinity(0))})", ("EPERM",)),
    Refusal("init is put last at its disk", 'call("ioprio_set", 1, 1, 3 << 13)', ("EPERM",)),
    Refusal("init is put in another process group", "os.setpgid(1, os.getpgrp())", ("ESRCH", "EPERM")),
    Refusal("init is waited for", "os.waitpid(1, os.WNOHANG)", ("ECHILD",)),
    Refusal(
        "the parent of init is asked for", "print(open('/proc/1/stat').read().rpartition(')')[2].split()[1])", ("0",)
    ),
    Refusal("a process of the host's gets a signal", 'os.kill(int(E["PROCESS"]), 0)', ("ESRCH",)),
    Refusal("a process of the host's is in /proc", 'os.stat("/proc/" + E["PROCESS"])', ("ENOENT",)),
    Refusal("the group of a process of the host's gets a signal", 'os.killpg(int(E["PROCESS"]), 0)', ("ESRCH",)),
    Refusal(
        "a process of the host's is asked for its locks",
        'call("get_robust_list", int(E["PROCESS"]), bytes(8), bytes(8))',
        ("ESRCH",),
    ),
    Refusal("a process of the host's is traced", 'call("ptrace", 16, int(E["PROCESS"]), 0, 0)', ("EPERM",)),
    Refusal(
        "a process of the host's is limited",
        'resource.prlimit(int(E["PROCESS"]), resource.RLIMIT_CPU)',
        ("EPERM", "PermissionError"),
    ),
    Refusal("another session is joined", "os.setpgid(0, 1)", ("EPERM",)),
    Refusal(
        "a core dump is written",
        """
try:
    resource.setrlimit(resource.RLIMIT_CORE, (1 << 20, 1 << 20))
except (OSError, ValueError):
    pass
print(*(limit <= 1 for limit in resource.getrlimit(resource.RLIMIT_CORE)))
""",
        ("True True",),
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


AGAINST_ALL = """
os.setpriority(os.PRIO_USER, 0, 19)
os.setpriority(os.PRIO_PGRP, 0, 19)
"""
ALL_WITH_IO = """
call("ioprio_set", 3, 1000, 3 << 13)  # IOPRIO_WHO_USER, IOPRIO_CLASS_IDLE
call("ioprio_set", 3, 0, 3 << 13)
"""
SIGNAL_TO_ALL = """
assert os.getppid() == 1  # or it would be the host's processes
try:
    os.kill(-1, signal.SIGKILL)
except OSError:
    pass
"""


@pytest.mark.parametrize(
    "attack", [AGAINST_ALL, ALL_WITH_IO, SIGNAL_TO_ALL], ids=["slower", "last at its disk", "killed"]
)
def test_what_is_done_to_all_of_the_users_processes_is_not_done_to_the_hosts(attempts, attack):
    process = psutil.Process(int(attempts.host.environment["PROCESS"]))
    before = process.nice(), process.ionice()
    attempt(attempts.host, attack)
    assert process.status() == psutil.STATUS_SLEEPING
    assert (process.nice(), process.ionice()) == before


# --- the launcher's end -------------------------------------------------------------------------------------------

BEATING = """
while True:
    with open("/workspace/beats", "ab") as beats:
        beats.write(b".")
    time.sleep(0.01)
"""


@contextmanager
def killed_launcher(host, taken_out):
    """Start a job that beats, stop its init so that only the kernel can act for it, and kill the launcher.

    Yields init, the job, and what counts the beats. Orphans come to this process, which reaps them.
    """
    beats = host.workspace(host.sandbox) / "beats"
    beats.unlink(missing_ok=True)
    prctl.set_child_subreaper(1)
    with begun(host, BEATING, taken_out) as (launcher, _):
        wait_until(beats.exists)
        (init,) = psutil.Process(launcher).children()
        (job,) = init.children()
        init.suspend()
    try:
        yield init, job, lambda: beats.stat().st_size
    finally:
        if init.is_running():
            init.kill()
        init.wait()
        prctl.set_child_subreaper(0)


def test_a_killed_launcher_takes_its_container_along(attempts):
    with killed_launcher(attempts.host, ()) as (init, job, _):
        assert psutil.wait_procs([init, job], timeout=30)[1] == []


def test_a_job_outlives_its_launcher_without_the_signal_of_its_death(attempts):
    with killed_launcher(attempts.host, (without(prctl, "set_pdeathsig"),)) as (_, _, count_beats):
        before = count_beats()
        wait_until(lambda: count_beats() > before)
