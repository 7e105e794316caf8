"""The thin client and the workers of a server, where they could differ from a process by itself.

That they do not, the tests of the command line show, which run both ways.
"""

import json
import os
import pty
import resource
import select
import signal
import socket
import stat
import subprocess
import sys
import termios
import time
from contextlib import suppress
from itertools import count
from pathlib import Path

import psutil
import pytest
from conftest import CHECKOUT, attended, command, run
from hypothesis import given
from hypothesis import strategies as some

from jhansi_runtime import thin
from jhansi_runtime.errors import InvalidRequestError
from jhansi_runtime.paths import Paths

WITHIN = 30  # seconds that a test waits for what ought to come at once
NUMBERS = count(7_000_000 + os.getpid() * 100)
COUNTING = """
import itertools, os
for number in itertools.count():
    os.write(1, b"%d\\n" % number)
"""


@pytest.fixture(scope="module")
def served(fresh_environment):
    """The server and the environment of its clients. What harms a server takes one of its own."""
    with attended(fresh_environment()) as (server, environment):
        assert run(["create", "--name", "box", "--rootfs", "host"], environment).returncode == 0
        yield server, environment


@pytest.fixture
def own(fresh_environment):
    with attended(fresh_environment()) as (server, environment):
        assert run(["create", "--name", "box", "--rootfs", "host"], environment).returncode == 0
        yield server, environment


@pytest.fixture
def environment(served):
    return served[1]


@pytest.fixture
def jhansi(environment):
    return lambda *words, **options: run(words, environment, **options)


@pytest.fixture
def start():
    """`start(words, environment, **options)` begins a jhansi-run; it is gone when the test ends."""
    started = []

    def start(words, environment, **options):
        defaults = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command(words, environment), env=environment, **(defaults | options))
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


class Sleeping:
    """A job that sleeps, which no other looks like."""

    def __init__(self):
        self._seconds = str(next(NUMBERS))
        self.words = ["exec", "--timeout=1h", "--command", "box", "--", "sleep", self._seconds]

    def is_there(self):
        return any(process.info["cmdline"] == ["sleep", self._seconds] for process in psutil.process_iter(["cmdline"]))


def until(condition):
    deadline = time.monotonic() + WITHIN
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def records(environment):
    """The audit records, read by a process that no server helps."""
    alone = {name: value for name, value in environment.items() if name != "JHANSI_SOCKET"}
    return json.loads(run(["audit", "show", "--json"], alone).stdout)


def attendant_of(server):
    found = [child for child in psutil.Process(server.pid).children() if "attendant" in " ".join(child.cmdline())]
    assert len(found) == 1
    return found[0]


# --- what a worker takes over ---------------------------------------------------------------------------------


def test_a_relative_path_is_that_of_our_working_directory(jhansi, tmp_path):
    (tmp_path / "here.txt").write_text("x")
    assert jhansi("put", "box", "here.txt", cwd=tmp_path).returncode == 0
    assert jhansi("get", "box", "here.txt", "-o", "there.txt", cwd=tmp_path).returncode == 0
    assert (tmp_path / "there.txt").read_text() == "x"


def test_a_working_directory_that_was_removed_is_no_hindrance(environment, tmp_path):
    (tmp_path / "gone").mkdir()
    argv = ["sh", "-c", 'rmdir "$PWD" && exec "$0" "$@"', *command(["ls"], environment)]
    answer = subprocess.run(argv, env=environment, cwd=tmp_path / "gone", capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert "box" in answer.stdout


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_file_that_is_made_for_us_has_our_umask(jhansi, tmp_path, umask):
    (tmp_path / "main.py").write_text("")
    jhansi("put", "box", tmp_path / "main.py")
    assert jhansi("exec", "--result", tmp_path / "result", "box", "main.py", umask=umask).returncode == 0
    assert stat.S_IMODE((tmp_path / "result").stat().st_mode) == 0o666 & ~umask


def test_our_limit_on_the_size_of_a_file_holds(jhansi, tmp_path):
    (tmp_path / "large").write_bytes(bytes(100_000))
    assert jhansi("put", "box", tmp_path / "large").returncode == 0
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))}
    answer = jhansi("get", "box", "large", "-o", tmp_path / "copy", **limit)
    assert answer.returncode == 125
    assert "would be larger than a file may be here" in answer.stderr


def test_an_environment_of_a_megabyte_gets_there(jhansi, environment):
    large = {f"LARGE{number}": "x" * 100_000 for number in range(10)}
    assert jhansi("ls", env=environment | large).returncode == 0


def test_a_locale_without_the_character_is_no_reason_to_fail(jhansi, environment):
    name = {"env": environment | {"PYTHONIOENCODING": "ascii"}}
    answer = jhansi("create", "--rootfs", "host", "--label", "what=ü", **name)
    assert answer.returncode == 0, answer.stderr
    assert "\\xfc" in jhansi("show", answer.stdout.strip(), **name).stdout


def test_many_at_once_are_each_its_own(start, environment, jhansi, tmp_path):
    (tmp_path / "say.py").write_text("import sys; print(sys.argv[1]); sys.exit(int(sys.argv[1]))")
    began = time.monotonic()
    assert jhansi("put", "box", tmp_path / "say.py").returncode == 0
    # Who has to wait for five seconds runs it by itself: an emulated machine cannot start as many in that time.
    count = max(5, min(50, int(5 / (time.monotonic() - began))))
    processes = [start(["exec", "box", "say.py", str(number)], environment) for number in range(count)]
    for number, process in enumerate(processes):
        assert process.communicate()[0] == f"{number}\n".encode()
        assert process.returncode == number


# --- whose it is not ------------------------------------------------------------------------------------------


def alone(words, environment, **options):
    """A jhansi-run that a server may help, and need not."""
    argv = [sys.executable, "-m", "jhansi_runtime", *words]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize("variable", ["JHANSI_HOME", "PETRI_WORKSPACE_ROOT", "JHANSI_CONFIG"])
def test_a_line_of_another_installation_runs_by_itself(environment, tmp_path, variable):
    other = environment | {variable: str(tmp_path / "other")}
    assert "no server has run this" in run(["ls"], other).stderr
    answer = alone(["create", "--rootfs", "host"], other)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() in alone(["ls"], other).stdout
    assert (answer.stdout.strip() in run(["ls"], environment).stdout) == (variable == "JHANSI_CONFIG")


def test_what_python_itself_was_told_is_not_lost(environment, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('customized')")
    path = f"{environment['PYTHONPATH']}:{tmp_path}"
    assert alone(["--version"], environment | {"PYTHONPATH": path}).stdout.startswith("customized\n")
    assert "no server has run this" in run(["ls"], environment | {"PYTHONWARNINGS": "error"}).stderr


def test_who_is_in_another_namespace_runs_by_itself(environment):
    argv = ["unshare", "--user", "--map-root-user", "--mount", *command(["ls"], environment)]
    answer = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    if "unshare failed" in answer.stderr:
        pytest.skip(answer.stderr)
    assert "no server has run this" in answer.stderr


def test_what_the_environment_demands_is_demanded_of_the_server_too(environment):
    words, demand = ["exec", "--command", "box", "true"], {"JHANSI_REQUIRE": "cgroup"}
    by_itself = alone(words, {**environment, **demand, "JHANSI_SOCKET": "/nonexistent"})
    served = run(words, environment | demand)
    assert (served.returncode, served.stderr) == (by_itself.returncode, by_itself.stderr)


@some.composite
def environments(draw):
    folder = some.sampled_from(["", "/a", "/a/b", "relative"])
    names = ("JHANSI_SOCKET", "XDG_RUNTIME_DIR", "JHANSI_HOME", "XDG_DATA_HOME", "HOME")
    return draw(some.fixed_dictionaries({"HOME": folder}, optional=dict.fromkeys(names[:-1], folder)))


@given(environments())
def test_the_socket_is_where_the_server_has_it(environment):
    found = thin._address({name.encode(): value.encode() for name, value in environment.items()})
    try:
        paths = Paths.from_environment(environment)
    except InvalidRequestError:  # which whoever runs it says
        return
    if environment["HOME"]:  # else it is in the password file, which is not looked into for this
        assert found == (paths.socket.encode() + thin.BESIDE if paths.socket.startswith("/") else None)


def test_another_peer_than_a_client_gets_nothing_and_harms_nobody(environment, jhansi):
    for said in (b"", b"r", b"GET / HTTP/1.1\r\n\r\n"):
        with socket.socket(socket.AF_UNIX) as caller:
            caller.settimeout(WITHIN)
            caller.connect(environment["JHANSI_SOCKET"] + ".cli")
            assert caller.recv(1) == b"h"
            caller.sendall(said)
            caller.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):  # it has not even read all
                assert caller.recv(1) == b""
    assert stat.S_IMODE(os.stat(environment["JHANSI_SOCKET"] + ".cli").st_mode) == 0o600
    assert jhansi("ls").returncode == 0


# --- death ----------------------------------------------------------------------------------------------------


def test_a_server_that_is_killed_takes_the_job_with_it_and_its_end_is_recorded(own, start):
    server, environment = own
    job = Sleeping()
    process = start(job.words, environment)
    until(job.is_there)
    server.kill()
    output, error = process.communicate(timeout=WITHIN)
    assert (process.returncode, output) == (125, b"")
    assert error.startswith(b"jhansi-run: error: ")
    until(lambda: not job.is_there())
    last = records(environment)[-1]
    assert last["event"] == "exec.end"
    assert last["status"] in {"lost", "failed"}  # the worker may have lived to see the job's end, and to write of it


def test_a_server_that_is_told_to_end_ends_the_job_with_the_record_written(own, start):
    server, environment = own
    job = Sleeping()
    process = start(job.words, environment)
    until(job.is_there)
    server.stdin.close()
    assert server.wait(WITHIN) == 0
    assert process.wait(WITHIN) == 128 + signal.SIGTERM
    assert not job.is_there()
    last = records(environment)[-1]
    assert (last["event"], last["status"]) == ("exec.end", "cancelled")
    assert not os.path.exists(environment["JHANSI_SOCKET"] + ".cli")


def test_an_attendant_that_is_killed_is_followed_by_the_next(own, start):
    server, environment = own
    first = attendant_of(server)
    job = Sleeping()
    process = start(job.words, environment)
    until(job.is_there)
    first.kill()
    assert process.wait(WITHIN) == 125
    until(lambda: not job.is_there())
    # A client waits five seconds for it, which an emulated machine may take longer.
    until(lambda: "box" in run(["ls"], environment).stdout)
    assert run(["exec", "--command", "box", "true"], environment).returncode == 0
    assert attendant_of(server).pid != first.pid


def test_where_one_attendant_after_the_other_dies_a_server_is_none_for_the_command_line(own):
    server, environment = own

    def is_alone():
        for child in psutil.Process(server.pid).children():
            if "attendant" in " ".join(child.cmdline()):
                child.kill()
        return not can_connect(environment["JHANSI_SOCKET"] + ".cli")

    until(is_alone)
    assert "box" in alone(["ls"], environment).stdout
    assert server.poll() is None
    server.stdin.close()
    assert server.wait(WITHIN) == 0


def can_connect(path):
    with socket.socket(socket.AF_UNIX) as caller:
        return caller.connect_ex(path) == 0


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_a_client_that_is_killed_takes_the_job_with_it(start, environment, stopped):
    job = Sleeping()
    # In a group whose parent is in the same session: the kernel stops no other (setpgid(2), orphaned groups).
    process = start(job.words, environment, process_group=0)
    until(job.is_there)
    if stopped:
        process.send_signal(signal.SIGTSTP)
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
    process.kill()
    until(lambda: not job.is_there())
    until(lambda: records(environment)[-1]["event"] == "exec.end")


def test_a_client_that_ignores_being_told_to_end_takes_the_job_with_it_all_the_same(start, environment):
    job = Sleeping()
    process = start(job.words, environment, preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN))
    until(job.is_there)
    process.terminate()
    process.kill()
    until(lambda: not job.is_there())


def test_a_signal_that_ends_a_command_ends_us_by_that_signal(start, environment):
    process = start(["audit", "show", "--follow"], environment)
    first = process.stdout.readline()
    assert first.startswith(b"TIME"), process.stderr.read()
    process.terminate()
    assert process.wait(WITHIN) == -signal.SIGTERM


# --- terminals ------------------------------------------------------------------------------------------------


def test_stopped_by_its_terminal_it_writes_nothing_until_it_goes_on(start, environment, jhansi, tmp_path):
    (tmp_path / "counting.py").write_text(COUNTING)
    assert jhansi("put", "box", tmp_path / "counting.py").returncode == 0
    ours, theirs = pty.openpty()
    # In a group whose parent is in the same session: the kernel stops no other (setpgid(2), orphaned groups).
    process = start(["exec", "--output=1G", "box", "counting.py"], environment, stdout=theirs, process_group=0)
    os.close(theirs)

    def shown():
        readable, _, _ = select.select([ours], [], [], 0.5)
        try:
            return os.read(ours, 65536) if readable else b""
        except OSError:  # EIO: nobody has the other end any more
            return b""

    until(shown)
    process.send_signal(signal.SIGTSTP)
    until(lambda: shown() is not None and psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
    until(lambda: not shown())
    process.send_signal(signal.SIGCONT)
    until(shown)
    process.terminate()
    while process.poll() is None:
        shown()
    os.close(ours)
    assert process.returncode == 128 + signal.SIGTERM


def test_in_the_background_of_its_terminal_it_runs_by_itself(environment):
    # As a shell does: the new process is in a group of its own, and the terminal's foreground is another.
    program = "import os, sys; os.setpgid(0, 0); os.execv(sys.argv[1], sys.argv[1:])"
    argv = [sys.executable, "-c", program, *command(["ls"], environment)]
    session = "import os, subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
    pid, ours = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-c", session, *argv], environment)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # EIO: nobody has the other end any more
            break
    os.close(ours)
    os.waitpid(pid, 0)
    assert b"no server has run this" in shown


def test_a_server_that_is_killed_leaves_the_terminal_as_it_was(own):
    server, environment = own
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    argv = command(["shell", "box"], environment)
    process = subprocess.Popen(argv, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    until(lambda: termios.tcgetattr(theirs) != before)
    server.kill()
    assert process.wait(WITHIN) == 125
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)


# --- the script -----------------------------------------------------------------------------------------------


SCRIPT = Path(CHECKOUT, "jhansi_runtime", "jhansi-run")


@pytest.mark.skipif("_socket" not in sys.builtin_module_names, reason="this python has not built _socket in")
def test_the_script_loads_built_in_modules_alone_where_a_server_runs_the_line(environment, tmp_path):
    (tmp_path / "empty.py").touch()
    loaded = []
    for words in ([tmp_path / "empty.py"], [SCRIPT, "ls"]):
        argv = [sys.executable, "-X", "importtime", "-SP", *words]
        answer = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
        loaded.append({line.rpartition("|")[2].strip() for line in answer.stderr.splitlines()})
    assert "box" in answer.stdout
    assert loaded[1] - loaded[0] <= {*sys.builtin_module_names}


def test_the_script_finds_its_python_beside_itself_also_behind_a_link(environment, tmp_path):
    folder = tmp_path / "with a space"
    folder.mkdir()
    (folder / "jhansi-run").write_bytes(SCRIPT.read_bytes())
    (folder / "jhansi-run").chmod(0o755)
    (folder / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "python").chmod(0o755)
    (tmp_path / "link").symlink_to(folder / "jhansi-run")
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "jhansi-run").symlink_to(folder / "jhansi-run")
    searched = environment | {"PATH": f"{tmp_path / 'path'}:{os.environ['PATH']}"}
    for argv in ([folder / "jhansi-run"], [tmp_path / "link"], ["/usr/bin/env", "jhansi-run"]):
        for where in (searched, {name: value for name, value in searched.items() if name != "JHANSI_SOCKET"}):
            answer = subprocess.run([*argv, "ls"], env=where, capture_output=True, text=True, check=False)
            assert (answer.returncode, answer.stderr) == (0, "")
            assert "box" in answer.stdout
