"""How an attack is tried: what a row of a table says, what stands around the sandbox, and one attempt.

The attack mode. A row names a step of the product, how to take it out, and the program that then gets through. Where
other layers stop the same program, `also` takes those out in addition: then the step is seen to hold alone. Steps are
taken out in a process made for one attempt, by replacing functions of the product before it clones the container
(removals.py); nothing in the product helps.

A refusal is an attack that no step of ours can be taken out for, because the kernel refuses it to everybody who is not
root of the machine. It names what the attempt must be told, so that none passes for being wrong itself.

Most of the kernel's refusals are errors: in a program `call("name", ...)` makes a system call by its name, and raises
OSError like everything else in Python.
"""

import ctypes
import faulthandler
import fcntl
import json
import os
import pathlib
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from types import MappingProxyType
from typing import NamedTuple

import pyseccomp
import pytest
from conftest import environment_with, host_lacks

from jhansi_runtime import ExecRequest, Paths, Runtime
from jhansi_runtime.engine import InProcess
from jhansi_runtime.errors import JhansiError
from jhansi_runtime.isolation.landlock import usable_abi

SECRET = "the host's secret"
MIB = 1 << 20
# In an emulated machine (tools/vm) Python alone may take a second of CPU time to start.
LIMITS = MappingProxyType(
    {
        "timeout": 90,
        "cpu_time": 60,
        "file_size": MIB,
        "nofile": 64,
        "tmp": MIB,
        "memory": 256 * MIB,
        "pids": 20,
        "cpus": 1,
    }
)
LIBC = ctypes.CDLL(None, use_errno=True)
WITHIN_SECONDS = 60
_LEAKED = 40


# --- what a table is made of ------------------------------------------------------------------------------------


class Need(NamedTuple):
    """What an attack takes of this machine. `check` is a doctor's check by name, "" where nobody can help it."""

    reason: str
    is_met: Callable[[], bool]
    check: str = ""


class Row(NamedTuple):
    """A step, how to take it out, the program that then prints `escaped`, and other layers in its way.

    alone: the program must be the first process of its job. beside is a program that runs in a sandbox of the same
    user meanwhile, confined in the same way: it calls `ready()`, and ends when that returns. With a command, that runs,
    with the program as its last word.
    """

    step: str
    taken_out: tuple[Callable[[], None], ...]
    attack: str
    also: tuple[Callable[[], None], ...] = ()
    alone: bool = False
    beside: str = ""
    command: tuple[str, ...] = ()
    limits: Mapping[str, float] = LIMITS
    needs: tuple[Need, ...] = ()

    @property
    def shares_a_job(self):
        return not (self.alone or self.beside or self.command or self.limits is not LIMITS)


class Refusal(NamedTuple):
    """What is tried, the program that tries it, and what it is told: an errno, a signal, or a line of its own.

    Where there are several, which it is depends on the kernel.
    """

    attack: str
    program: str
    answers: tuple[str, ...]
    needs: tuple[Need, ...] = ()


LANDLOCKED = Need("its step is Landlock", lambda: usable_abi() > 0, check="landlock")
SCOPED = Need("Landlock knows signals and abstract sockets since Linux 6.12", lambda: usable_abi() >= 6)


def each(table):
    """Parametrize a test with `row`, for every row of the table."""
    return pytest.mark.parametrize("row", table, ids=[row.step for row in table])


def each_alone(table):
    """Likewise, for those that other layers stop as well."""
    return each([row for row in table if row.also])


def each_refusal(table):
    """Parametrize a test with `refusal`."""
    return pytest.mark.parametrize("refusal", table, ids=[refusal.attack for refusal in table])


def require_all(needs):
    for need in needs:
        if not need.is_met():
            if need.check:
                host_lacks(need.check, need.reason)
            pytest.skip(need.reason)


# --- what an attack begins with ---------------------------------------------------------------------------------

START = f"""
import ctypes, errno, fcntl, json, mmap, os, resource, signal, socket, stat, struct, sys, termios, time
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long
SECRET = {SECRET!r}
E = os.environ
def done(result):
    print("escaped" if result != -1 else os.strerror(ctypes.get_errno()))
def call(name, *arguments):
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    result = LIBC.syscall(ctypes.c_long(NUMBERS[name]), *words)
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def ready():
    open("/workspace/ready", "w").close()
    while not os.path.exists("/workspace/end"):
        time.sleep(0.02)
def lines_of(program):
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        signal.alarm(30)
        os.dup2(writable, 1)
        os.dup2(writable, 2)
        try:
            exec(program, dict(globals()))
        except OSError as error:
            print(errno.errorcode[error.errno])
        except BaseException as error:
            print(repr(error))
        sys.stdout.flush()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    try:
        os.killpg(child, signal.SIGKILL)  # what it has left holds the pipe as well
    except ProcessLookupError:
        pass
    os.close(writable)
    with open(readable) as file:
        lines = file.read().splitlines()
    return lines + [signal.Signals(os.WTERMSIG(status)).name] if os.WIFSIGNALED(status) else lines
"""
READ = """
print("escaped" if open(PATH).read() == SECRET else "")
"""


def number_of(call):
    """The number of a system call on this machine, negative where its table has none."""
    return pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, call)


def program_of(attack):
    """The whole of a program: what all begin with, the numbers of the calls that it names, and the attack."""
    numbers = {name: number_of(name) for name in re.findall(r'call\("(\w+)"', attack)}
    return f"{START}\nNUMBERS = {numbers!r}\n{attack}"


# --- what stands around a sandbox -------------------------------------------------------------------------------


class Host(NamedTuple):
    """What stands around a sandbox, each thing within reach of a job that is not confined."""

    runtime: Runtime
    sandbox: str
    neighbour: str
    folder: pathlib.Path
    environment: dict[str, str]

    def workspace(self, sandbox):
        return self.folder / "home" / "workspaces" / sandbox / "workspace"

    @property
    def tree(self):
        """The root tree of `--rootfs host`: folders and files of the runtime's, on which the host's are mounted."""
        (tree,) = (self.folder / "home" / "rootfs").glob("host-*[0-9a-f]")
        return tree


def _be_alone():
    """Wait until no test before has a thread left here, as one that flushes a log: one alone can build containers."""
    deadline = time.monotonic() + WITHIN_SECONDS
    while len(os.listdir("/proc/self/task")) > 1:
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.01)


@contextmanager
def surroundings(folder):
    """A Host in that folder."""
    _be_alone()
    for name in ("private", "here", "shared"):
        (folder / name).mkdir()
    secret = folder / "private" / "secret"
    secret.write_text(SECRET)
    # A home of its own: some of these attacks write to the root tree.
    with (
        Runtime(Paths.from_environment(environment_with(folder / "home")), launcher=InProcess()) as runtime,
        ExitStack() as stack,
    ):
        box, neighbour = (runtime.create(rootfs="host").id for _ in range(2))
        runtime.write(neighbour, "note", SECRET.encode())
        runtime.exec(ExecRequest(sandbox=box, command=["true"]))  # the first one makes the root tree
        environment = {
            "SECRET_FILE": str(secret),
            "SHARED": str(folder / "shared"),
            "NEIGHBOUR": neighbour,
            "HOST": socket.gethostname(),
            "CPUS": str(len(os.sched_getaffinity(0))),
            "PROCESS": str(stack.enter_context(_process_of_the_host())),
            **_sockets_of_the_host(stack, folder / "private"),
        }
        yield Host(runtime, box, neighbour, folder, environment)


@contextmanager
def _process_of_the_host():
    """A process that does nothing, and has the secret on its command line and in its environment."""
    argv = [sys.executable, "-c", "import signal; print(flush=True); signal.pause()", SECRET]
    with subprocess.Popen(argv, env={"SECRET": SECRET}, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process.pid
        assert process.poll() is None, "somebody has ended a process of the host"
        process.kill()


def _sockets_of_the_host(stack, folder):
    """Sockets of the host that listen until the end of the stack, by the variables that name them."""
    tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    udp = stack.enter_context(closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)))
    udp.bind(("127.0.0.1", 0))
    addresses = {"ABSTRACT": f"jhansi-test-{os.getpid()}", "SOCKET": str(folder / "socket")}
    for address in (f"\0{addresses['ABSTRACT']}", addresses["SOCKET"]):
        listener = stack.enter_context(closing(socket.socket(socket.AF_UNIX)))
        listener.bind(address)
        listener.listen()
    ports = {"PORT": tcp, "UDP_PORT": udp}
    return addresses | {name: str(listener.getsockname()[1]) for name, listener in ports.items()}


# --- an attempt -------------------------------------------------------------------------------------------------


class Attempts:
    """What comes of the attacks of a table. Those under the same conditions share a job, each in a process of its own.

    To be kept for a module: what has been tried is not tried again.
    """

    def __init__(self, host: Host, rows: Sequence[Row], refusals: Sequence[Refusal] = ()) -> None:
        self.host = host
        self._rows = rows
        self._refusals = refusals
        self._told: dict[frozenset, dict[str, list[str]]] = {}

    def assert_it_fails(self, row, taken_out=()):
        require_all(row.needs)
        lines = self._lines(row, taken_out)
        assert "escaped" not in lines, lines

    def assert_it_succeeds(self, row):
        require_all(row.needs)
        lines = self._lines(row, (*row.also, *row.taken_out))
        assert "escaped" in lines, lines

    def assert_it_is_refused(self, refusal):
        require_all(refusal.needs)
        answer = "\n".join(self._together(())[refusal.program])
        assert answer in refusal.answers, answer

    def _lines(self, row, taken_out):
        if row.shares_a_job:
            return self._together(taken_out)[row.attack]
        told = attempt(self.host, row.attack, taken_out, beside=row.beside, command=row.command, limits=row.limits)
        assert "lines" in told, told
        return told["lines"]

    def _together(self, taken_out):
        conditions = frozenset(taken_out)
        if conditions not in self._told:
            programs = [row.attack for row in self._rows if row.shares_a_job and conditions in _conditions(row)]
            programs += [] if taken_out else [refusal.program for refusal in self._refusals]
            attack = f"PROGRAMS = {programs!r}\nprint(json.dumps([lines_of(program) for program in PROGRAMS]))"
            told = attempt(self.host, attack, taken_out)
            assert len(told.get("lines", ())) == 1, told
            self._told[conditions] = dict(zip(programs, json.loads(told["lines"][0]), strict=True))
        return self._told[conditions]


def _conditions(row):
    """The steps that are out, each time that a row is tried."""
    return [frozenset(), frozenset(row.also), frozenset((*row.also, *row.taken_out))]


def attempt(
    host: Host,
    attack: str,
    taken_out: Sequence[Callable[[], None]] = (),
    *,
    beside: str = "",
    command: Sequence[str] = (),
    limits: Mapping[str, float] = LIMITS,
) -> dict:
    """Run the attack with steps taken out: `lines` are what it printed, or `error` is what ended it.

    With lines there are `status` and `message` of its result.
    """
    with begun(host, attack, taken_out, beside=beside, command=command, limits=limits) as (_, told):
        return told()


@contextmanager
def begun(host, attack, taken_out=(), *, beside="", command=(), limits=LIMITS):
    """Within: an attempt is under way. Yields the pid of its launcher, and what waits for its end and returns it."""
    host.runtime.write(host.sandbox, "main.py", program_of(attack).encode())
    if beside:
        host.runtime.write(host.neighbour, "main.py", program_of(beside).encode())
    readable, writable = os.pipe()
    launcher, master = pty.fork()  # a session with a controlling terminal
    if launcher == 0:
        words = [*command, program_of(attack)] if command else []
        _be_the_launcher(host, taken_out, writable, bool(beside), words, limits)
    os.close(writable)

    def told():
        with open(readable, closefd=False) as file:
            answer = json.loads(file.read() or '{"error": "the launcher was killed"}')
        assert "traceback" not in answer, answer["traceback"]
        return answer

    try:
        yield launcher, told
    finally:
        os.kill(launcher, signal.SIGKILL)
        os.waitpid(launcher, 0)
        os.close(readable)
        os.close(master)


def _be_the_launcher(host, taken_out, writable, is_beside, command, limits):
    """Make one attempt, in a process made for it, and write what came of it. Never returns."""
    try:
        # pytest's handlers of fatal signals are not Python's, and write to a descriptor that is another one in init.
        faulthandler.disable()
        environment = _put_things_within_reach(host)
        for take_out in taken_out:
            take_out()
        with _beside(host, environment, limits) if is_beside else ExitStack():
            told = _executed(host, host.sandbox, environment, command, limits)
    except BaseException:  # noqa: BLE001 - the parent shows it
        told = {"traceback": traceback.format_exc()}
    os.write(writable, json.dumps(told).encode())
    os._exit(0)


def _executed(host, sandbox, environment, command, limits):
    what = {"command": list(command)} if command else {"filename": "main.py"}
    request = ExecRequest(sandbox=sandbox, env=environment, limits=dict(limits), **what)
    try:
        result = host.runtime.exec(request)
    except JhansiError as error:
        return {"error": str(error)}
    lines = result.stdout.splitlines() + result.stderr.splitlines()
    return {"lines": lines, "status": result.status, "message": result.message}


@contextmanager
def _beside(host, environment, limits):
    """Within: the neighbour's program runs, and has said that it is ready."""
    workspace = host.workspace(host.neighbour)
    for name in ("ready", "end"):
        (workspace / name).unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            told = _executed(host, host.neighbour, environment, (), limits)
            if told.get("status") != "exited" or told["lines"]:
                (host.folder / "neighbour").write_text(str(told))
        finally:
            os._exit(0)
    try:
        wait_until(lambda: (workspace / "ready").exists() or (host.folder / "neighbour").exists())
        yield
    finally:
        (workspace / "end").touch()
        os.waitpid(child, 0)
        if (host.folder / "neighbour").exists():
            trouble = (host.folder / "neighbour").read_text()
            (host.folder / "neighbour").unlink()
            raise AssertionError(f"the program beside had trouble: {trouble}")


def _put_things_within_reach(host):
    """Return the environment of the attack."""
    os.environ.update(host.environment)
    os.chdir(host.folder / "here")
    terminal = os.ttyname(0)
    os.dup2(os.open(host.environment["SECRET_FILE"], os.O_RDONLY), 0)
    # So high that no descriptor of init's own is taken for one of them; inheritable, as fcntl makes them.
    folder = os.open(host.folder / "private", os.O_RDONLY)
    leaked = {"DESCRIPTOR": 0, "FOLDER_DESCRIPTOR": folder}
    leaked = {name: fcntl.fcntl(descriptor, fcntl.F_DUPFD, _LEAKED) for name, descriptor in leaked.items()}
    leaked["LOW_DESCRIPTOR"] = fcntl.fcntl(0, fcntl.F_DUPFD, 3)  # and one below all of init's
    signal.signal(signal.SIGUSR1, lambda *_: socket.sethostname("owned"))
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    LIBC.syscall(number_of("keyctl"), 1, None)  # KEYCTL_JOIN_SESSION_KEYRING: a new one
    secret = SECRET.encode()
    LIBC.syscall(number_of("add_key"), b"user", b"jhansi-test", secret, len(secret), -3)
    return {**host.environment, "TERMINAL": terminal, **{name: str(number) for name, number in leaked.items()}}


def wait_until(condition):
    end = time.monotonic() + WITHIN_SECONDS
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.005)
