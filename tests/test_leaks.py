"""Nothing is left behind: counted before and after many execs, and after execs whose runtime was killed.

This process adopts what its children leave (PR_SET_CHILD_SUBREAPER), so that every process that a container could
leave is among its descendants, whatever else runs on the host.
"""

import collections
import json
import os
import random
import signal
import subprocess
import sys
import time

import prctl
import psutil
import pytest
from conftest import environment_with

from jhansi_runtime import ExecRequest, Paths, Runtime
from jhansi_runtime.engine import InProcess

NAMESPACES = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")
AT_ONCE = 50
IN_A_ROW = 1000
KILLS = 20
# How many of each namespace may exist at one time; the kernel takes network namespaces down some time after their end.
NAMESPACES_AT_A_TIME = IN_A_ROW // 4

# A job that surrounds itself with others, one in a session of its own, and writes in all places. Then it says so, and
# ends before them, or stays.
LEAVING = """
import os, time
for place in ("/workspace", "/tmp", "/dev/shm", "/home/sandbox"):
    open(f"{place}/left", "a").close()
if os.fork() == 0:
    os.setsid()
    os.fork()
    time.sleep(60)
os.write(1, b"up\\n")
"""
STAYING = LEAVING + "time.sleep(60)"


@pytest.fixture(autouse=True)
def orphans():
    """Orphans of this process's children become its own."""
    prctl.set_child_subreaper(1)
    yield
    prctl.set_child_subreaper(0)


@pytest.fixture
def environment(tmp_path):
    (tmp_path / "tmp").mkdir()
    return environment_with(tmp_path / "home") | {"TMPDIR": str(tmp_path / "tmp")}


@pytest.fixture
def runtime(environment):
    # Without a launcher: what descends from this process is then what the others have left.
    with Runtime(Paths.from_environment(environment), launcher=InProcess()) as runtime:
        yield runtime


@pytest.fixture
def box(runtime):
    """A sandbox that has had its first exec, after which all is there that execs share (a skeleton, a filter)."""
    sandbox = runtime.create(rootfs="host").id
    assert runtime.exec(ExecRequest(sandbox=sandbox, command=["true"])).exit_code == 0
    return sandbox


def start(words, environment, **options):
    """Begin one jhansi-run."""
    defaults = {"env": environment, "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-m", "jhansi_runtime", *words], **(defaults | options))


def left_behind(environment):
    """All that a container could leave, but for records in the audit log."""
    with open("/proc/self/mountinfo") as file:
        mounts = file.read().splitlines()
    files = []
    for top in (environment["JHANSI_HOME"], environment["TMPDIR"]):
        for folder, folders, names in os.walk(top):
            folders[:] = [name for name in folders if os.path.join(folder, name) != f"{top}/audit"]
            files += [os.path.join(folder, name) for name in (*folders, *names)]
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return {
        "processes": sorted(process.pid for process in processes),
        "descriptors": sorted(os.readlink(f"/proc/self/fd/{name}") for name in open_descriptors()),
        "mounts": mounts,
        "namespaces": sorted({namespace(process.pid, name) for process in processes for name in NAMESPACES}),
        "files": sorted(files),
    }


def namespace(pid, name):
    try:
        return os.readlink(f"/proc/{pid}/ns/{name}")
    except PermissionError:  # of a process that is closed to its user: as long as it is there, so is that
        return f"{name} of {pid}"


def open_descriptors():
    """Those of this process, without the one that lists them."""
    return [name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")]


def reap():
    """Take the status of every orphan that has ended; whether one is still there."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return True


def wait_until_alone():
    """Wait until the kernel has taken down whatever a killed process left; it needs no help, only a moment."""
    end = time.monotonic() + 30
    while reap():
        assert time.monotonic() < end, psutil.Process().children(recursive=True)
        time.sleep(0.005)


def ends(runtime):
    """For each run that was started, the status of each end that it has."""
    statuses = {}
    for record in runtime.audit.records():
        if record["event"] == "exec.start":
            statuses[record["run_id"]] = []
        elif record["event"] == "exec.end":
            statuses[record["run_id"]].append(record["status"])
    return statuses


# --- many -----------------------------------------------------------------------------------------------------

# Runs `true` again and again, in a user namespace that may hold only so many namespaces of each kind at a time: the
# kernel's own count, which knows of those that nobody can list any more. Says which descriptors it had, and has.
MANY = """
import os, sys
from jhansi_runtime import ExecRequest, Paths, Runtime
from jhansi_runtime.isolation.syscalls import CLONE_NEWUSER, unshare

def write(path, text):
    with open(path, "w") as file:
        file.write(text)

box, count, limit = sys.argv[1], int(sys.argv[2]), sys.argv[3]
uid, gid = os.getuid(), os.getgid()
unshare(CLONE_NEWUSER)
write("/proc/self/setgroups", "deny")
write("/proc/self/uid_map", f"{uid} {uid} 1")
write("/proc/self/gid_map", f"{gid} {gid} 1")
for kind in ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup"):
    write(f"/proc/sys/user/max_{kind}_namespaces", limit)
with Runtime() as runtime:
    before = None
    for _ in range(count):
        result = runtime.exec(ExecRequest(sandbox=box, command=["true"]))
        assert result.exit_code == 0, result
        before = before or os.listdir("/proc/self/fd")
    print(before == os.listdir("/proc/self/fd"))
"""


def test_a_thousand_execs_one_after_another_leave_nothing(runtime, box, environment):
    before = left_behind(environment)
    argv = [sys.executable, "-c", MANY, box, str(IN_A_ROW), str(NAMESPACES_AT_A_TIME)]
    answer = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert (answer.stdout, answer.stderr) == ("True\n", "")
    wait_until_alone()
    assert left_behind(environment) == before
    assert collections.Counter(map(tuple, ends(runtime).values())) == {("exited",): IN_A_ROW + 1}


def test_fifty_execs_at_once_leave_nothing(runtime, box, environment, tmp_path):
    (tmp_path / "main.py").write_text(LEAVING)
    runtime.put(box, str(tmp_path / "main.py"))
    runtime.write(box, "left", b"")
    before = left_behind(environment)
    one_shot = ["run", "--rootfs", "host", str(tmp_path / "main.py")]
    started = [start(one_shot if number % 2 else ["exec", box, "main.py"], environment) for number in range(AT_ONCE)]
    answers = [(*process.communicate(), process.returncode) for process in started]
    assert set(answers) == {(b"up\n", b"", 0)}
    wait_until_alone()
    assert left_behind(environment) == before
    assert collections.Counter(map(tuple, ends(runtime).values())) == {("exited",): AT_ONCE + 1}
    assert runtime.audit.verify().ok


TURNS = """
import sys
from jhansi_runtime import ExecRequest, Runtime

with Runtime() as runtime:
    for turn in range(30):
        runtime.write(sys.argv[1], sys.argv[2], str(turn).encode())
        result = runtime.exec(ExecRequest(sandbox=sys.argv[1], command=["cat", sys.argv[2]]))
        assert result.stdout == str(turn), result
"""


def test_two_processes_may_use_one_home_at_once(runtime, box, environment):
    words = [sys.executable, "-c", TURNS, box]
    both = [subprocess.Popen([*words, name], env=environment, stderr=subprocess.PIPE) for name in ("one", "other")]
    assert [(process.communicate()[1], process.returncode) for process in both] == [(b"", 0)] * 2
    assert collections.Counter(map(tuple, ends(runtime).values())) == {("exited",): 61}
    assert runtime.audit.verify().ok


# --- killed ---------------------------------------------------------------------------------------------------


def seconds_until_up(box, environment):
    """How long it takes here from the start of a jhansi-run until its job says that it is up."""
    begun = time.monotonic()
    with start(["exec", box, "main.py"], environment) as process:
        assert process.stdout.readline() == b"up\n"
        taken = time.monotonic() - begun
        process.terminate()
    return taken


def test_killing_the_runtime_at_any_moment_leaves_nothing_and_each_lost_run_is_named_once(
    runtime, box, environment, tmp_path
):
    (tmp_path / "main.py").write_text(STAYING)
    runtime.put(box, str(tmp_path / "main.py"))
    runtime.write(box, "left", b"")
    longest = 1.5 * seconds_until_up(box, environment)
    wait_until_alone()
    before = left_behind(environment)
    chance = random.Random(2)
    for number in range(KILLS):
        words = ["run", "--rootfs", "host", str(tmp_path / "main.py")] if number % 2 else ["exec", box, "main.py"]
        with start(words, environment) as process:
            time.sleep(chance.uniform(0, longest))
            process.kill()
        wait_until_alone()
    with Runtime(runtime.paths, launcher=InProcess()):  # the next start
        pass

    assert left_behind(environment) == before
    first, measured, *killed = ends(runtime).values()
    assert (first, measured) == (["exited"], ["cancelled"])
    assert killed  # some were killed after they had begun
    assert set(map(tuple, killed)) == {("lost",)}
    assert runtime.audit.verify().ok


# Compiles the seccomp filter of a new home, which the first sandbox takes, and is killed just before that has its name.
KILLED_WHILE_COMPILING = """
import os, signal
from jhansi_runtime import Runtime, profiles

profiles.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with Runtime() as runtime:
    runtime.create(rootfs="host")
"""


def test_a_runtime_that_is_killed_while_it_compiles_a_filter_leaves_no_half_of_it(runtime, environment):
    argv = [sys.executable, "-c", KILLED_WHILE_COMPILING]
    assert subprocess.run(argv, env=environment, check=False).returncode == -signal.SIGKILL
    assert len(os.listdir(runtime.paths.cache)) == 1
    box = runtime.create(rootfs="host").id
    assert runtime.exec(ExecRequest(sandbox=box, command=["true"])).exit_code == 0
    (compiled,) = os.listdir(runtime.paths.cache)
    assert compiled.endswith(".bpf")


@pytest.fixture
def crowd(runtime, box, environment, tmp_path):
    """A jhansi-run under way, whose job is up: its process, its init's and its job's."""
    (tmp_path / "main.py").write_text(STAYING)
    runtime.put(box, str(tmp_path / "main.py"))
    with start(["exec", "--result", str(tmp_path / "result"), box, "main.py"], environment) as process:
        assert process.stdout.readline() == b"up\n"
        (launcher,) = psutil.Process(process.pid).children()
        (init,) = launcher.children()
        (job,) = init.children()
        yield process, init, job
        process.kill()


def test_a_job_that_is_killed_from_outside_was_ended_by_that_signal(runtime, crowd, tmp_path):
    process, _, job = crowd
    job.kill()
    assert process.communicate()[1] == b""
    assert process.returncode == 128 + signal.SIGKILL
    result = json.loads((tmp_path / "result").read_text())
    assert (result["status"], result["signal"]) == ("signaled", "SIGKILL")
    assert [found for found in ends(runtime).values() if found != ["exited"]] == [["signaled"]]
    wait_until_alone()


def test_an_init_that_is_killed_from_outside_is_our_failure_and_recorded(runtime, crowd):
    process, init, _ = crowd
    init.kill()
    assert process.communicate()[1] == b"jhansi-run: error: init ended without saying how the job did\n"
    assert process.returncode == 125
    assert [found for found in ends(runtime).values() if found != ["exited"]] == [["failed"]]
    wait_until_alone()
