"""A job that fights its own container: it stops, floods, orphans, hides and dies at the wrong moment.

Whatever it does, its exec ends, says how, leaves no process, and the next exec finds everything as it should be.
test_programs.py has the ordinary ends, test_limits.py the limits, test_leaks.py what is left when we are killed,
test_hostile_workspaces.py what a job leaves in its folder.
"""

import contextlib
import random
import time
from typing import NamedTuple

import psutil
import pytest
from attempts import LIMITS, MIB, attempt, begun, program_of, surroundings
from conftest import environment_with, run

from jhansi_runtime import ExecRequest
from jhansi_runtime.errors import InvalidRequestError

KILLS = 30
MANY = LIMITS | {"pids": 100, "output": 20 * MIB, "cpu_time": 60}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    with surroundings(tmp_path_factory.mktemp("host")) as host:
        yield host


@pytest.fixture(autouse=True)
def _everything_is_as_it_should_be_afterwards(host):
    yield
    told = attempt(host, "print(os.getpid() > 1, os.listdir('/proc/1/task'), sorted(os.listdir('/dev/shm')))")
    assert (told["lines"], told["status"]) == (["True ['1'] []"], "exited")
    assert processes_of(host.sandbox) == []


def processes_of(sandbox):
    """The processes of the host that have the workspace of this sandbox mounted."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError), open(f"/proc/{process.pid}/mountinfo") as mounts:
            if sandbox in mounts.read():
                found.append(process.pid)
    return found


class Fight(NamedTuple):
    """What a job does, and how its exec ends: its status, and lines that it printed."""

    program: str
    status: str = "exited"
    lines: tuple[str, ...] = ("still here",)
    limits: dict = MANY


# Every signal there is, twice, and then those that nobody can catch.
SIGNALS_TO_INIT = """
for number in [*signal.valid_signals(), signal.SIGSTOP, signal.SIGKILL] * 2:
    try:
        os.kill(1, number)
    except (PermissionError, ValueError):
        pass
print("still here")
"""
SIGNALS_BY_EVERY_CALL = """
for number in (signal.SIGSTOP, signal.SIGKILL, signal.SIGSEGV, signal.SIGRTMIN):
    for send in (
        lambda: call("kill", 1, number),
        lambda: call("tkill", 1, number),
        lambda: call("tgkill", 1, 1, number),
        lambda: call("rt_sigqueueinfo", 1, number, struct.pack("iii116x", number, 0, -1)),
        lambda: call("rt_tgsigqueueinfo", 1, 1, number, struct.pack("iii116x", number, 0, -1)),
        lambda: signal.pidfd_send_signal(os.pidfd_open(1), number),
    ):
        try:
            send()
        except PermissionError:
            pass
print("still here")
"""
FLOOD = """
sender = os.fork()
if sender == 0:
    while True:
        try:
            os.kill(1, signal.SIGCHLD)
        except PermissionError:
            os._exit(0)
for _ in range(200):
    if os.fork() == 0:
        os._exit(0)
    os.wait()
print("still here")
"""
# A thousand orphans: each grandchild is init's to reap, which may take longer than it took to make it.
ORPHANS = """
def fork():
    while True:
        try:
            return os.fork()
        except BlockingIOError:
            time.sleep(0.001)
for _ in range(1000):
    child = fork()
    if child == 0:
        if fork() == 0:
            os._exit(0)
        os._exit(0)
    os.waitpid(child, 0)
print("still here")
"""
ZOMBIES = """
try:
    while True:
        if os.fork() == 0:
            os._exit(0)
except BlockingIOError:
    print("still here")
"""
KILL_GROUP = """
child = os.fork()
if child == 0:
    signal.pause()
os.setpgid(child, child)
os.killpg(child, signal.SIGKILL)
print("still here", flush=True)
os.killpg(0, signal.SIGKILL)
"""
KILL_ALL = """
for _ in range(10):
    if os.fork() == 0:
        signal.pause()
assert os.getppid() == 1  # or it would be the host's processes
os.kill(-1, signal.SIGKILL)  # all but oneself, and init
print("still here")
"""
NEW_GROUPS = """
child = os.fork()
if child == 0:
    os.setsid()
    for _ in range(3):
        if os.fork() == 0:
            os.setpgid(0, 0)
            for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
                signal.signal(number, signal.SIG_IGN)
            time.sleep(600)
    os._exit(0)
os.waitpid(child, 0)
print("still here")
"""
STOPPED_CHILDREN = """
for _ in range(10):
    if os.fork() == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
print("still here")
"""
HOLDING = """
child = os.fork()
if child == 0:
    os.setsid()
    while True:
        time.sleep(1)
os.dup2(1, 20); os.dup2(2, 21)
print("still here")
"""
HOLDING_BY_MESSAGE = """
ours, theirs = socket.socketpair()
socket.send_fds(ours, [b"x"], [1, 2])  # in flight, nobody's descriptor
print("still here")
"""
SUBREAPER = """
call("prctl", 36, 1, 0, 0, 0)  # orphans are to be ours
for _ in range(20):
    if os.fork() == 0:
        if os.fork() == 0:
            time.sleep(600)
        os._exit(0)
print("still here")
"""
CLONES = """
if call("clone", 0x8000 | signal.SIGCHLD, 0, 0, 0, 0) == 0:  # CLONE_PARENT: init gets a child that it did not make
    time.sleep(600)
print("still here")
"""
DIES_AS_ANOTHER_THREAD = """
import threading
def become():
    os.execv("/bin/echo", ["echo", "still here"])
threading.Thread(target=become).start()
time.sleep(60)
"""
LEADER_ENDS = """
import threading
def go_on():
    time.sleep(0.3)
    print("still here", flush=True)
    os._exit(0)
threading.Thread(target=go_on).start()
call("exit", 0)  # of the first thread alone
"""
VFORKS = """
import subprocess
for _ in range(100):
    subprocess.run(["/bin/true"], close_fds=False)
print("still here")
"""
THREADS = """
import threading
enough, count = threading.Event(), 0
try:
    while True:
        threading.Thread(target=enough.wait, daemon=True).start()
except RuntimeError:
    pass
enough.set()
print("still here")
"""
ONE_LINE = """
block = b"x" * 65536
for _ in range(10 * 16):
    sys.stdout.buffer.write(block)
sys.stdout.flush()
print("still here", file=sys.stderr)
"""
CLOSED = """
print("still here", flush=True)
os.close(0); os.close(1); os.close(2)
time.sleep(0.2)
"""
NOT_READ = """
fcntl.fcntl(1, fcntl.F_SETFL, os.O_NONBLOCK)
fcntl.fcntl(1, 1031, 4096)  # F_SETPIPE_SZ
print("still here")
"""
TIMERS = """
for number in range(500):
    LIBC.timer_create(1, None, ctypes.byref(ctypes.c_void_p()))
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
signal.signal(signal.SIGALRM, lambda *_: None)
end = time.monotonic() + 1
while time.monotonic() < end:
    pass
signal.setitimer(signal.ITIMER_REAL, 0)
print("still here")
"""
QUEUED = """
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN])
try:
    while True:
        call("rt_sigqueueinfo", os.getpid(), signal.SIGRTMIN, struct.pack("iii116x", signal.SIGRTMIN, 0, -1))
except BlockingIOError:
    print("still here")
"""

FIGHTS = {
    "sends init every signal": Fight(SIGNALS_TO_INIT),
    "sends init signals by every call there is": Fight(SIGNALS_BY_EVERY_CALL),
    "floods init with signals": Fight(FLOOD),
    "leaves a thousand orphans": Fight(ORPHANS, limits=MANY | {"timeout": 600, "cpu_time": 600}),
    "fills the table of processes with dead ones": Fight(ZOMBIES),
    "kills its own process group": Fight(KILL_GROUP, "signaled"),
    "kills everybody": Fight(KILL_ALL),
    "hides in other sessions and ignores every signal": Fight(NEW_GROUPS),
    "leaves children that are stopped": Fight(STOPPED_CHILDREN),
    "leaves a child that holds its streams": Fight(HOLDING),
    "leaves its streams in a message that nobody reads": Fight(HOLDING_BY_MESSAGE),
    "takes orphans from init": Fight(SUBREAPER),
    "gives init a child of its own": Fight(CLONES),
    "becomes another program in another thread": Fight(DIES_AS_ANOTHER_THREAD),
    "goes on when its first thread has ended": Fight(LEADER_ENDS),
    "starts programs one after another": Fight(VFORKS),
    "starts threads until it is refused one": Fight(THREADS),
    "writes ten megabytes without an end of line": Fight(ONE_LINE, lines=("x" * 10 * MIB, "still here")),
    "closes all its streams": Fight(CLOSED),
    "changes its pipes": Fight(NOT_READ),
    "has timers go off all the time": Fight(TIMERS),
    "queues signals until it is refused one": Fight(QUEUED),
    "stops itself": Fight("os.kill(os.getpid(), signal.SIGSTOP)", "timed_out", (), MANY | {"timeout": 1}),
    "stops its own process group": Fight("os.killpg(0, signal.SIGSTOP)", "timed_out", (), MANY | {"timeout": 1}),
    "dies at once": Fight("os.kill(os.getpid(), signal.SIGKILL)", "signaled", ()),
    "aborts with its memory in a mess": Fight("ctypes.memset(0, 0, 1)", "signaled", ()),
}


@pytest.mark.parametrize("fight", FIGHTS.values(), ids=FIGHTS)
def test_an_exec_ends_whatever_its_job_does(host, fight):
    told = attempt(host, fight.program, limits=fight.limits)
    assert (told.get("status"), tuple(told.get("lines", ()))) == (fight.status, fight.lines), str(told)[:2000]


# --- the wrong moment -----------------------------------------------------------------------------------------------


def test_a_container_that_is_killed_at_any_moment_of_its_start_is_never_taken_for_a_program_that_ran(host):
    chance = random.Random(4)
    ends = set()
    for _ in range(KILLS):
        with begun(host, 'print("still here")') as (launcher, told):
            time.sleep(chance.uniform(0, 0.1))
            inside = psutil.Process(launcher).children(recursive=True)
            with contextlib.suppress(psutil.NoSuchProcess):
                chance.choice(inside or [psutil.Process(launcher)]).kill()
            end = told()
        if end.get("status") == "exited":
            assert end["lines"] == ["still here"], end
        else:
            assert "error" in end or end["status"] == "signaled", end
        ends.add(end.get("status", "error"))
    assert ends - {"exited"}, "none was killed in time"


def test_an_environment_that_the_kernel_does_not_take_is_an_error_that_says_so(host):
    for size, many in ((2 * MIB, 1), (64 << 10, 40)):
        environment = {f"A{number}": "x" * size for number in range(many)}
        with pytest.raises(InvalidRequestError, match="too long together"):
            host.runtime.exec(ExecRequest(sandbox=host.sandbox, command=["true"], env=environment))


# --- what it leaves -------------------------------------------------------------------------------------------------

HOSTILE_NAMES = ("\x1b]0;owned\x07", "\x1b[2J", "two\nlines", "\u202egnp.exe", "tab\tand\rreturn", "\x9b31m", "x" * 255)
LEAVE_NAMES = f"""
for name in {HOSTILE_NAMES!r}:
    open(name, "w").close()
open(b"\\xff\\xfe not UTF-8", "w").close()
os.mkfifo("fifo"); os.symlink("\x1b[31m", "link"); os.mkdir("closed", 0)
print("still here")
"""


@pytest.mark.parametrize(
    "words", [["files", "BOX"], ["audit", "show", "--sandbox", "BOX"], ["ls"], ["show", "BOX"]], ids=" ".join
)
def test_names_that_a_job_chose_send_nothing_to_the_terminal(host, words):
    environment = environment_with(host.folder / "home")
    box = host.runtime.create(rootfs="host").id
    host.runtime.write(box, "main.py", program_of(LEAVE_NAMES).encode())
    result = host.runtime.exec(ExecRequest(sandbox=box, filename="main.py", args=["\x1b[2J", "two\nlines"]))
    assert result.stdout == "still here\n", result
    answer = run([word.replace("BOX", box) for word in words], environment)
    host.runtime.remove(box)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert all(line.isprintable() for line in answer.stdout.split("\n")), answer.stdout
    if words[0] == "files":
        assert len(answer.stdout.splitlines()) == len(HOSTILE_NAMES) + 6  # the header, main.py and four more


def test_a_workspace_that_a_job_has_shut_serves_the_next_one(host):
    assert attempt(host, 'os.chmod("/workspace", 0); print("shut")')["lines"] == ["shut"]
    assert (
        attempt(host, 'print(oct(os.stat("/workspace").st_mode), os.listdir("/workspace") != [])')["status"] == "exited"
    )
