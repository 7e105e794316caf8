"""The launcher: a process that holds nothing of its host's, serves several threads, and takes its containers along."""

import os
import signal
import threading
import time

import pytest

from jhansi_runtime import ExecRequest, Paths, Runtime
from jhansi_runtime.errors import HostError


@pytest.fixture
def runtime(runtime_environment):
    with Runtime(Paths.from_environment(runtime_environment)) as opened:
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


def test_it_has_no_environment_no_descriptor_and_one_thread(launcher):
    descriptors = {
        name: os.readlink(f"/proc/{launcher}/fd/{name}").partition(":")[0]
        for name in os.listdir(f"/proc/{launcher}/fd")
    }
    with open(f"/proc/{launcher}/environ") as file:
        assert file.read() == ""
    assert descriptors == {"0": "/dev/null", "1": "/dev/null", "2": "/dev/null", "3": "socket"}
    assert os.listdir(f"/proc/{launcher}/task") == [str(launcher)]
    assert os.getsid(launcher) == launcher


def test_it_ends_with_its_runtime(runtime_environment, sandbox):
    before = children()
    with Runtime(Paths.from_environment(runtime_environment)) as other:
        other.exec(sh(sandbox, "true"))
        assert len(children() - before) == 1

    assert children() == before


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
