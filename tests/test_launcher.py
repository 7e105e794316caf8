"""The launcher: a process that holds nothing of its host's, serves several threads, and takes its containers along."""

import os
import pathlib
import re
import signal
import threading
import time

import pytest

from jhansi_runtime import ExecRequest, Paths, Runtime
from jhansi_runtime.engine import InProcess, LauncherProcess
from jhansi_runtime.engine.launcher import Connection
from jhansi_runtime.errors import HostError
from jhansi_runtime.isolation import spawn
from jhansi_runtime.isolation.channel import Channel, pair


@pytest.fixture
def runtime(runtime_environment):
    with Runtime(Paths.from_environment(runtime_environment), launcher=LauncherProcess()) as opened:
        yield opened


@pytest.fixture
def sandbox(runtime):
    made = runtime.create(rootfs="host")
    yield made.id
    runtime.remove(made.id)


def sh(sandbox, script, **fields):
    return ExecRequest(sandbox=sandbox, command=["/bin/sh", "-c", script], **fields)


def children():
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return {int(pid) for pid in file.read().split()}


@pytest.fixture
def open_to_us(monkeypatch):
    """Launchers and containers do not close themselves to their user, so that one can look into them."""
    before, after = spawn._PROGRAM.split("from ", 1)
    monkeypatch.setattr(spawn, "_PROGRAM", f"{before}import prctl; prctl.set_dumpable = lambda _: None\nfrom {after}")


@pytest.fixture
def inheritable():
    """This process has a file open that every program is given that it starts."""
    descriptor = os.open("/etc/passwd", os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    yield
    os.close(descriptor)


@pytest.fixture
def launcher(runtime, sandbox):
    """The pid of the launcher, which the first exec has started."""
    before = children()
    runtime.exec(sh(sandbox, "true"))
    (pid,) = children() - before
    return pid


def test_execs_of_several_threads_run_side_by_side(runtime, sandbox):
    results = {}

    def run(number):
        results[number] = runtime.exec(sh(sandbox, f"echo {number}; exit {number}"))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert {number: (result.exit_code, result.stdout) for number, result in results.items()} == {
        number: (number, f"{number}\n") for number in range(8)
    }


def test_a_thread_that_ends_takes_no_container_along(runtime, sandbox):
    starter = threading.Thread(target=runtime.exec, args=(sh(sandbox, "true"),))
    starter.start()
    starter.join()

    assert runtime.exec(sh(sandbox, "sleep 0.2; echo alive")).stdout == "alive\n"


@pytest.mark.usefixtures("open_to_us", "inheritable")
def test_it_has_no_environment_no_descriptor_and_one_thread(launcher):
    begun_by(launcher)
    descriptors = sorted(
        os.readlink(f"/proc/{launcher}/fd/{name}").partition(":[")[0] for name in os.listdir(f"/proc/{launcher}/fd")
    )
    with open(f"/proc/{launcher}/environ") as file:
        assert file.read() == ""
    # Where there are cgroups, its own part of the tree and what it has made in there.
    descriptors = [target for target in descriptors if not re.search(r"/jhansi-[0-9a-f]{16}(/|$)", target)]
    # Two sockets: to its host, and to the init it has begun, whose pidfd it holds.
    assert descriptors == ["/dev/null", "/dev/null", "/dev/null", "anon_inode", "socket", "socket"]
    assert os.listdir(f"/proc/{launcher}/task") == [str(launcher)]
    assert os.getsid(launcher) == launcher


def test_it_and_what_it_has_begun_are_closed_to_every_process_of_its_user(launcher):
    begun = begun_by(launcher)
    for pid in (launcher, begun, *descendants(begun)):
        # init is open until the launcher has written its id map, its job until it has written its own
        deadline = time.monotonic() + 20
        while os.access(f"/proc/{pid}/fd", os.R_OK) and time.monotonic() < deadline:
            time.sleep(0.01)
        for name in ("environ", "maps", "mem"):
            with pytest.raises(PermissionError):
                pathlib.Path(f"/proc/{pid}/{name}").read_bytes()
        with pytest.raises(PermissionError):
            os.listdir(f"/proc/{pid}/fd")


def test_it_ends_with_its_runtime_and_what_it_has_begun_with_it(runtime_environment, sandbox):
    before = children()
    with Runtime(Paths.from_environment(runtime_environment)) as other:
        other.exec(sh(sandbox, "true"))
        (launcher,) = children() - before
        begun = begun_by(launcher)
        family = {begun, *descendants(begun)}

    assert children() == before
    assert not any(map(is_running, family))


def test_the_next_exec_takes_the_container_that_was_begun_ahead(runtime, sandbox, launcher):
    begun = begun_by(launcher)
    (job,) = descendants(begun)
    under_way = threading.Thread(target=runtime.exec, args=(sh(sandbox, "while [ ! -e seen ]; do sleep 0.1; done"),))
    under_way.start()
    deadline = time.monotonic() + 20
    while pathlib.Path(f"/proc/{job}/comm").read_text() != "sh\n" and time.monotonic() < deadline:
        time.sleep(0.01)
    is_the_program = pathlib.Path(f"/proc/{job}/comm").read_text() == "sh\n"
    runtime.write(sandbox, "seen", b"")
    under_way.join()

    assert is_the_program
    assert begun_by(launcher) != begun


def test_a_container_begun_ahead_that_has_died_is_not_given_to_anyone(runtime, sandbox, launcher):
    begun = begun_by(launcher)
    os.kill(begun, signal.SIGKILL)
    while is_running(begun):
        time.sleep(0.01)

    assert runtime.exec(sh(sandbox, "echo alive")).stdout == "alive\n"
    assert begun_by(launcher) not in {begun, None}


def test_a_caller_of_a_single_exec_has_no_other_begun(runtime_environment, sandbox):
    before = children()
    launcher = LauncherProcess(ahead=False)
    with Runtime(Paths.from_environment(runtime_environment), launcher=launcher) as other:
        other.exec(sh(sandbox, "true"))
        (pid,) = children() - before
        time.sleep(0.3)
        assert descendants(pid) == []


def test_killed_it_takes_its_containers_along_and_the_next_exec_has_a_new_one(runtime, sandbox, launcher):
    killer = threading.Timer(0.3, os.kill, (launcher, signal.SIGKILL))
    killer.start()
    with pytest.raises(HostError):
        runtime.exec(sh(sandbox, "echo $$; exec sleep 60"))
    killer.join()
    ended = [record for record in runtime.audit.records(sandbox_id=sandbox) if record["event"] == "exec.end"]

    assert ended[-1]["status"] == "failed"
    assert runtime.exec(sh(sandbox, "echo again")).stdout == "again\n"


def test_a_runtime_killed_ends_its_launcher_and_every_job(runtime_environment, sandbox):
    pid = os.fork()
    if pid == 0:
        with Runtime(Paths.from_environment(runtime_environment)) as doomed:
            doomed.exec(sh(sandbox, "sleep 60; true"))
        os._exit(0)
    deadline = time.monotonic() + 20
    while not jobs_of(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    family = {pid, *jobs_of(pid)}
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while any(map(is_running, family)) and time.monotonic() < deadline:
        time.sleep(0.01)

    assert len(family) >= 3  # itself, its launcher, init
    assert not any(map(is_running, family))
    with Runtime(Paths.from_environment(runtime_environment)):
        pass  # the next start settles what it left


def test_a_process_with_threads_builds_no_container_itself(runtime_environment, sandbox):
    end = threading.Event()
    another = threading.Thread(target=end.wait)
    another.start()
    try:
        with (
            Runtime(Paths.from_environment(runtime_environment), launcher=InProcess()) as other,
            pytest.raises(HostError, match=r"this process has \d threads, and a container is cloned from one alone"),
        ):
            other.exec(sh(sandbox, "true"))
    finally:
        end.set()
        another.join()


def begun_by(launcher):
    """The pid of the init that a launcher has begun ahead, once its job waits in it."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        begun = descendants(launcher)
        if len(begun) == 1 and descendants(begun[0]):
            return begun[0]
        time.sleep(0.01)
    return None


def jobs_of(pid):
    """What descends from a process, if it has come as far as an init: a child of its launcher."""
    launchers = descendants(pid)
    inits = [init for launcher in launchers for init in descendants(launcher)]
    return {*launchers, *inits} if inits else set()


def descendants(pid):
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]
    except FileNotFoundError:
        return []


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_asked_whether_it_has_ended_while_another_thread_leaves_it():
    ours, theirs = pair()
    leaving = []

    class Left(Channel):
        def fileno(self):
            leaving.append(threading.Thread(target=connection.close))
            leaving[0].start()
            leaving[0].join(0.2)
            return super().fileno()

    connection = Connection(Left(ours._socket))

    assert not connection.has_ended()
    leaving[0].join()
    theirs.close()
    assert connection.has_ended()
