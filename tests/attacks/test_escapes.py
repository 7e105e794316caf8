"""Each step of confinement with the attack that it stops; and the attack succeeds once the step is taken out.

A row of the table names a step, how to take it out, and the program that then escapes. Where another layer stops the
same attack, `also` takes that one out in addition: then the step is seen to hold alone. Steps are taken out here, in
a process of its own, by replacing functions of the product before it clones the container; nothing in the product
helps.

What cannot be shown so. The kernel itself refuses to go on without them, and no container is built: the user and mount
namespaces, `setgroups deny`, no_new_privs (its absence is a test below). Without the pid namespace init's kill of
everything would end its user's processes. Second fences: nosuid and the emptied bounding set, for with one id mapped
there is nobody else to become; the uts and cgroup namespaces, which keep names, and changing those takes a capability.
Elsewhere: nodev and root's groups take a root (tests/root), private mount propagation a host that shares its mounts
(tests/isolation).
"""

import ctypes
import json
import os
import pathlib
import pty
import signal
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import prctl
import psutil
import pyseccomp
import pytest
from conftest import environment_with
from removals import (
    CAPABILITIES,
    DESCRIPTORS_OF_INIT,
    DESCRIPTORS_OF_JOB,
    INNER_NAMESPACE,
    NOT_DUMPABLE,
    SECCOMP,
    SESSION,
    is_mask,
    is_read_only_proc,
    with_much_scratch,
    with_the_hosts_own_stdout,
    without,
    without_in,
    without_namespace,
    without_operations,
    without_read_only,
    without_umount_of,
    without_watchdog,
)

from jhansi_runtime import ExecRequest, Paths, Runtime
from jhansi_runtime.engine import InProcess
from jhansi_runtime.errors import HostError
from jhansi_runtime.isolation import detach, idmap, inside, job, mounts, net, processors, signals, syscalls

SECRET = "the host's secret"
# In an emulated machine (tools/vm) Python alone may take a second of CPU time to start.
LIMITS = {"timeout": 40, "file_size": 1 << 20, "nofile": 64, "tmp": 1 << 20, "cpu_time": 3, "memory": 64 << 20}
LIMITS |= {"pids": 20, "cpus": 1}
LIBC = ctypes.CDLL(None, use_errno=True)


# --- the attacks: each says `escaped` where it got through ----------------------------------------------------

READ = """
print("escaped" if open(PATH).read() == SECRET else "")
"""
START = f"""
import ctypes, os, signal, socket, time
LIBC = ctypes.CDLL(None, use_errno=True)
SECRET = {SECRET!r}
E = os.environ
def done(result):
    print("escaped" if result != -1 else os.strerror(ctypes.get_errno()))
"""
TERMINAL = """
os.write(os.open("/dev/tty", os.O_RDWR), b"owned")
print("escaped")
"""
DESCRIPTOR = """
print("escaped" if os.pread(int(E["DESCRIPTOR"]), 100, 0) == SECRET.encode() else "")
"""
UNSHARE_USER = "done(LIBC.unshare(0x10000000))"


class Row(NamedTuple):
    """A step, how to take it out, the attack that then succeeds, and other layers in its way."""

    step: str
    taken_out: tuple[Callable, ...]
    attack: str
    also: tuple[Callable, ...] = ()


TABLE = [
    Row(
        "the launcher's arguments are erased",
        (without(inside, "erase"),),
        'print("escaped" if open("/proc/1/cmdline").read().strip("\\0") else "")',
    ),
    Row("init and the job leave the launcher's session", (SESSION,), TERMINAL),
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
    ),
    Row(
        "the job ignores no signal that the launcher ignores",
        (without(signals, "reset"),),
        'print("escaped" if signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN else "")',
    ),
    Row(
        "init's standard streams are not the launcher's",
        (without_in(detach, "os", "dup2"),),
        'PATH = "/proc/1/fd/0"' + READ,
        also=(NOT_DUMPABLE, INNER_NAMESPACE, CAPABILITIES),
    ),
    Row("init closes the launcher's descriptors", (DESCRIPTORS_OF_INIT,), DESCRIPTOR, also=(DESCRIPTORS_OF_JOB,)),
    Row("the job closes every descriptor", (DESCRIPTORS_OF_JOB,), DESCRIPTOR, also=(DESCRIPTORS_OF_INIT,)),
    Row(
        "init is not dumpable",
        (NOT_DUMPABLE,),
        'print("escaped" if "PATH=" in open("/proc/1/environ").read() else "")',
        also=(INNER_NAMESPACE, CAPABILITIES),
    ),
    Row(
        "no user namespace but the job's can be made",
        (without(idmap, "allow_one_more_namespace"),),
        UNSHARE_USER,
        also=(SECCOMP,),
    ),
    Row(
        "the network namespace",
        (without_namespace(syscalls.CLONE_NEWNET), without(net, "loopback_up")),
        'socket.create_connection(("127.0.0.1", int(E["PORT"]))); print("escaped")',
    ),
    Row(
        "the ipc namespace",
        (without_namespace(syscalls.CLONE_NEWIPC),),
        'done(LIBC.msgget(int(E["QUEUE"]), 0))',
    ),
    Row(
        "the hostname",
        (without_in(inside, "_socket", "sethostname"),),
        'print("escaped" if socket.gethostname() == E["HOST"] else "")',
    ),
    Row(
        "the root tree is read-only",
        (without_read_only(),),
        'open("/etc/owned", "w").close(); os.unlink("/etc/owned"); print("escaped")',
    ),
    Row(
        "what all sandboxes share as a mask is read-only",
        (without_read_only(),),
        """
mask = "/.jhansi/empty-directory"
os.chmod(mask, 0o755)
os.mkdir(f"{mask}/note"); os.rmdir(f"{mask}/note")
os.chmod(mask, 0o555)
print("escaped")
""",
    ),
    Row(
        "what /proc tells of the machine is masked",
        (without_operations(is_mask),),
        'print("escaped" if any(open(f"/proc/{name}").read(1) for name in ("kallsyms", "key-users")) else "")',
    ),
    Row(
        "/proc/sys is read-only",
        (without_operations(is_read_only_proc),),
        'open("/proc/sys/net/ipv4/ip_forward", "w").write("1"); print("escaped")',
        also=(INNER_NAMESPACE, CAPABILITIES),
    ),
    Row(
        "the scratch folders have one size together",
        (with_much_scratch(),),
        """
for place in ("/tmp", "/dev/shm", "/home/sandbox"):
    with open(f"{place}/fill", "wb") as file:
        file.write(bytes(500_000))
print("escaped")
""",
    ),
    Row("the old root is detached", (without_umount_of(b"."),), 'PATH = "/.." + E["SECRET_FILE"]' + READ),
    Row(
        "the other workspaces are detached",
        (without_umount_of(b"/" + mounts.HIDDEN_WORKSPACES.encode()),),
        'PATH = "/.jhansi/workspaces/" + E["NEIGHBOUR"] + "/workspace/note"' + READ,
    ),
    Row(
        "the working directory is the workspace",
        (without(job, "_enter_workspace"),),
        'PATH = "../private/secret"' + READ,
    ),
    Row(
        "the job gets pipes, not the host's files",
        (with_the_hosts_own_stdout(),),
        """
import sys
text = os.read(os.open("/proc/self/fd/1", os.O_RDONLY | os.O_NONBLOCK), 100)
print("escaped" if text == SECRET.encode() else "", file=sys.stderr)
""",
    ),
    Row(
        "the size of a file is limited",
        (without(job, "_limit"),),
        'open("/workspace/large", "wb").write(bytes(2 << 20)); print("escaped")',
    ),
    Row(
        "the number of open files is limited",
        (without(job, "_limit"),),
        'kept = [open("/dev/null") for _ in range(100)]; print("escaped")',
    ),
    Row(
        "CPU time of one process is limited",
        (without(job, "_limit"),),
        """
while time.process_time() < 4.5:
    pass
print("escaped")
""",
        also=(without_watchdog(),),
    ),
    Row(
        "CPU time of all processes together is limited",
        (without_watchdog(),),
        """
for _ in range(6):
    if os.fork() == 0:
        while time.process_time() < 1:
            pass
        os._exit(0)
    os.wait()
print("escaped")
""",
    ),
    Row(
        "memory is limited",
        (without_watchdog(),),
        """
kept = bytearray(100 << 20)
time.sleep(1)
print("escaped")
""",
    ),
    Row(
        "the number of processes is limited",
        (without(job, "_limit"),),
        """
for _ in range(25):
    if os.fork() == 0:
        signal.pause()
print("escaped")
""",
    ),
    Row(
        "the job is told of no more CPUs than it may use",
        (without(processors, "run_on"),),
        'print("escaped" if len(os.sched_getaffinity(0)) == int(E["CPUS"]) else "")',
    ),
    Row(
        "the job's own user namespace",
        (INNER_NAMESPACE,),
        """
# MS_REMOUNT | MS_BIND | MS_NOSUID | MS_NODEV, without MS_RDONLY
assert LIBC.mount(b"none", b"/", None, ctypes.c_ulong(0x20 | 0x1000 | 0x2 | 0x4), None) == 0
open("/etc/owned", "w").close(); os.unlink("/etc/owned"); print("escaped")
""",
        also=(CAPABILITIES, SECCOMP),
    ),
    Row(
        "the job has no capability in its own user namespace",
        (CAPABILITIES,),
        "done(LIBC.unshare(0x20000))",
        also=(SECCOMP,),
    ),
    Row(
        "seccomp keeps user namespaces from being made",
        (SECCOMP,),
        UNSHARE_USER,
        also=(without(idmap, "allow_one_more_namespace"),),
    ),
    Row(
        "seccomp keeps the host's keyring out of reach",
        (SECCOMP,),
        """
text, keyctl = ctypes.create_string_buffer(100), int(E["KEYCTL"])
key = LIBC.syscall(keyctl, 10, -3, b"user", b"jhansi-test", 0)  # KEYCTL_SEARCH of the session's keyring
size = LIBC.syscall(keyctl, 11, key, text, 100)  # KEYCTL_READ
print("escaped" if text.raw[:max(0, size)] == SECRET.encode() else "")
""",
    ),
    Row(
        "seccomp keeps setuid files from being left in the workspace",
        (SECCOMP,),
        'os.chmod("/workspace/main.py", 0o4755); print("escaped")',
    ),
    Row(
        "seccomp keeps the limits of init out of reach",
        (SECCOMP,),
        """
import resource
resource.prlimit(1, resource.RLIMIT_FSIZE, (0, 0))
print("escaped")
""",
    ),
    Row(
        "seccomp keeps address randomisation on",
        (SECCOMP,),
        "done(LIBC.personality(0x40000))",
    ),
]


# --- an attempt -----------------------------------------------------------------------------------------------


class Host(NamedTuple):
    """What stands around a sandbox, each thing within reach of a job that is not confined."""

    runtime: Runtime
    sandbox: str
    folder: pathlib.Path
    environment: dict[str, str]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    (folder / "private").mkdir()
    (folder / "here").mkdir()
    (folder / "private" / "secret").write_text(SECRET)
    # A home of its own: some of these attacks write to the root tree.
    with Runtime(Paths.from_environment(environment_with(folder / "home")), launcher=InProcess()) as runtime:
        box, neighbour = (runtime.create(rootfs="host").id for _ in range(2))
        runtime.write(neighbour, "note", SECRET.encode())
        runtime.exec(ExecRequest(sandbox=box, command=["true"]))  # the first one makes the root tree
        queue = LIBC.msgget(0x6A680000 | os.getpid() & 0xFFFF, 0o1600)  # IPC_CREAT
        with socket.create_server(("127.0.0.1", 0)) as listener:
            environment = {
                "SECRET_FILE": str(folder / "private" / "secret"),
                "NEIGHBOUR": neighbour,
                "PORT": str(listener.getsockname()[1]),
                "QUEUE": str(0x6A680000 | os.getpid() & 0xFFFF),
                "HOST": socket.gethostname(),
                "KEYCTL": str(number_of("keyctl")),
                "CPUS": str(len(os.sched_getaffinity(0))),
            }
            yield Host(runtime, box, folder, environment)
        LIBC.msgctl(queue, 0, None)  # IPC_RMID


def number_of(call):
    return pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, call)


def attempt(host, attack, taken_out):
    """Run the attack with steps taken out. What the job printed, line by line; or the error that ended it."""
    host.runtime.write(host.sandbox, "main.py", (START + attack).encode())
    readable, writable = os.pipe()
    child, master = pty.fork()  # a session with a controlling terminal
    if child == 0:
        _attempt(host, taken_out, writable)
    os.close(writable)
    with open(readable) as file:
        answer = json.loads(file.read())
    os.waitpid(child, 0)
    os.close(master)
    assert "traceback" not in answer, answer["traceback"]
    return answer


def _attempt(host, taken_out, writable):
    """Be the launcher, in a process of its own. Never returns."""
    try:
        _put_things_within_reach(host)
        for take_out in taken_out:
            take_out()
        descriptor = str(os.dup(0))
        os.set_inheritable(int(descriptor), True)
        environment = {**host.environment, "DESCRIPTOR": descriptor}
        request = ExecRequest(sandbox=host.sandbox, filename="main.py", env=environment, limits=LIMITS)
        try:
            result = host.runtime.exec(request)
            answer = {"lines": result.stdout.splitlines() + result.stderr.splitlines()}
        except HostError as error:
            answer = {"error": str(error)}
    except BaseException:  # noqa: BLE001 - the parent shows it
        answer = {"traceback": traceback.format_exc()}
    os.write(writable, json.dumps(answer).encode())
    os._exit(0)


def _put_things_within_reach(host):
    os.environ.update(host.environment)
    os.chdir(host.folder / "here")
    os.dup2(os.open(host.environment["SECRET_FILE"], os.O_RDONLY), 0)
    signal.signal(signal.SIGUSR1, lambda *_: socket.sethostname("owned"))
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    LIBC.syscall(number_of("keyctl"), 1, None)  # KEYCTL_JOIN_SESSION_KEYRING: a new one
    secret = SECRET.encode()
    LIBC.syscall(number_of("add_key"), b"user", b"jhansi-test", secret, len(secret), -3)


each_row = pytest.mark.parametrize("row", TABLE, ids=[row.step for row in TABLE])


@each_row
def test_the_attack_fails(host, row):
    assert "escaped" not in attempt(host, row.attack, ())["lines"]


@pytest.mark.parametrize("row", [row for row in TABLE if row.also], ids=[row.step for row in TABLE if row.also])
def test_the_step_alone_stops_the_attack(host, row):
    assert "escaped" not in attempt(host, row.attack, row.also)["lines"]


@each_row
def test_the_attack_succeeds_without_the_step(host, row):
    answer = attempt(host, row.attack, (*row.also, *row.taken_out))
    assert "escaped" in answer.get("lines", []), answer


# --- what does not fit the table ------------------------------------------------------------------------------


def test_without_no_new_privs_nothing_runs(host):
    answer = attempt(host, 'print("escaped")', (without(prctl, "set_no_new_privs"),))
    assert "isolation failed at the step 'seccomp'" in answer["error"]


def test_the_limit_of_user_namespaces_is_the_kernels_own_and_not_the_filters(host):
    assert attempt(host, UNSHARE_USER, (SECCOMP,))["lines"] == ["No space left on device"]


@pytest.fixture
def hostile_mask(host):
    """The file that masks others in /proc is a link to a file of the host: the root tree is hostile, too."""
    (mask,) = (host.folder / "home" / "rootfs").glob(f"host-*/{mounts.EMPTY_FILE}")
    mask.parent.chmod(0o755)
    mask.rename(mask.with_name("genuine"))
    mask.symlink_to(host.environment["SECRET_FILE"])
    yield
    mask.with_name("genuine").rename(mask)


READ_MASKED = 'PATH = "/proc/kallsyms"' + READ


@pytest.mark.usefixtures("hostile_mask")
def test_a_link_in_a_hostile_root_tree_leads_nowhere(host):
    assert "isolation failed at the step 'mounts'" in attempt(host, READ_MASKED, ())["error"]


@pytest.mark.usefixtures("hostile_mask")
def test_a_link_in_a_hostile_root_tree_leads_to_the_host_once_links_are_followed(host):
    assert attempt(host, READ_MASKED, (without(mounts, "_NO_LINKS", 0),))["lines"] == ["escaped"]


BEATING = """
while True:
    with open("/workspace/beats", "ab") as beats:
        beats.write(b".")
    time.sleep(0.01)
"""


def wait_until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.005)


@contextmanager
def killed_launcher(host, taken_out):
    """Start a job that beats, stop its init so that only the kernel can act for it, and kill the launcher.

    Yields init, the job, and what counts the beats. Orphans come to this process, which reaps them.
    """
    host.runtime.write(host.sandbox, "main.py", (START + BEATING).encode())
    beats = host.folder / "home" / "workspaces" / host.sandbox / "workspace" / "beats"
    beats.unlink(missing_ok=True)
    prctl.set_child_subreaper(1)
    child, master = pty.fork()
    if child == 0:
        _attempt(host, taken_out, 1)
    wait_until(beats.exists)
    (init,) = psutil.Process(child).children()
    (job_process,) = init.children()
    init.suspend()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        yield init, job_process, lambda: beats.stat().st_size
    finally:
        os.close(master)
        if init.is_running():
            init.kill()
        init.wait()
        prctl.set_child_subreaper(0)


def test_a_killed_launcher_takes_its_container_along(host):
    with killed_launcher(host, ()) as (init, job_process, _):
        assert psutil.wait_procs([init, job_process], timeout=30)[1] == []


def test_a_job_outlives_its_launcher_without_the_signal_of_its_death(host):
    with killed_launcher(host, (without(prctl, "set_pdeathsig"),)) as (_, _, count_beats):
        before = count_beats()
        wait_until(lambda: count_beats() > before)
