"""What our own stdin, stdout, stderr, terminal and signals are to the program: real ones, at both ends.

Every test runs both ways: a process by itself, and the thin client of a server.
"""

import fcntl
import json
import os
import select
import shlex
import signal
import subprocess
import termios
import time

import pytest
from conftest import WAYS, by_way, command, run

WITHIN = 30  # seconds that a test waits for what ought to come at once

PROGRAMS = {
    "wait.py": "import time; print('ready', flush=True); time.sleep(600)",
    "order.py": "import os\nfor n in range(3000): os.write(1 + n % 2, b'%d\\n' % n)",
    "read.py": "import sys; print(sys.stdin.buffer.read())",
    "both.py": "import os; os.write(1, b'out\\n'); os.write(2, b'err\\n')",
    "yes.py": "while True: print('y' * 99)",
    "answer.py": "for line in open(0): print('you said', line, end='', flush=True)",
    # Ends with 7 when it is told to end, or counts on.
    "handle.py": """
import os, signal, sys
def told(number, frame):
    os.write(1, signal.Signals(number).name.encode() + b"\\n")
    if number not in (signal.SIGUSR1, signal.SIGUSR2):
        sys.exit(7)
for number in (1, 2, 3, 10, 12, 15):
    signal.signal(number, told)
os.write(1, b"ready\\n")
while True:
    signal.pause()
""",
    "stubborn.py": """
import os, signal, time
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
os.fork()
print("ready", flush=True)
time.sleep(600)
""",
    "terminal.py": """
import os, signal, sys
print(*(os.isatty(stream) for stream in range(3)), os.environ.get("TERM"), flush=True, file=sys.stderr)
""",
    "size.py": """
import os, signal
def show(*_):
    os.write(1, b"%d %d\\n" % os.get_terminal_size(1))
signal.signal(signal.SIGWINCH, show)
show()
while True:
    signal.pause()
""",
}


@pytest.fixture(scope="module", params=WAYS)
def runtime_environment(request, fresh_environment):
    with by_way(request.param, fresh_environment()) as environment:
        yield environment


@pytest.fixture(scope="module")
def jhansi(runtime_environment):
    return lambda *words, **options: run(words, runtime_environment, **options)


@pytest.fixture(scope="module")
def box(jhansi, tmp_path_factory):
    """The id of a sandbox that holds all the programs."""
    folder = tmp_path_factory.mktemp("programs")
    for name, source in PROGRAMS.items():
        (folder / name).write_text(source)
    answer = jhansi("create")
    assert answer.returncode == 0, answer.stderr
    box = answer.stdout.strip()
    assert jhansi("put", box, *(folder / name for name in PROGRAMS)).returncode == 0
    return box


@pytest.fixture
def start(runtime_environment, box):
    """`start(program, *options, **streams)` begins a `jhansi-run exec`; it is gone when the test ends."""
    started = []

    def start(program, *options, **streams):
        argv = command(["exec", *options, box, program], runtime_environment)
        defaults = {"env": runtime_environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(argv, **(defaults | streams)))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


@pytest.fixture
def sh(runtime_environment, box, tmp_path):
    """`sh("RUN $BOX wait.py | head")` has bash run that line in a new folder, where RUN is `jhansi-run exec`."""

    def sh(line):
        start = shlex.join(command(["exec", "--timeout=20", "--output=1G"], runtime_environment))
        argv = ["/bin/bash", "-c", line.replace("RUN", start)]
        environment = {**runtime_environment, "BOX": box}
        return subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    return sh


# --- pipes and files ----------------------------------------------------------------------------------------


def test_stdout_and_stderr_stay_apart(sh):
    answer = sh("RUN $BOX both.py")
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "out\n", "err\n")


@pytest.mark.parametrize(
    "line", ["RUN $BOX order.py 2>&1", "RUN $BOX order.py 2>&1 | cat", "RUN $BOX order.py >all 2>&1; cat all"]
)
def test_in_one_pipe_or_file_stdout_and_stderr_keep_their_order(sh, line):
    assert sh(line).stdout.split() == [str(number) for number in range(3000)]


def test_output_is_added_to_a_file_that_was_opened_for_that(sh):
    assert sh("echo first >log; RUN $BOX both.py >>log 2>>log; cat log").stdout.splitlines() == ["first", "out", "err"]


def test_stdin_is_read_to_its_end(sh):
    assert sh("printf 'a\\0b' | RUN $BOX read.py").stdout == "b'a\\x00b'\n"
    assert sh("RUN $BOX read.py </dev/null").stdout == "b''\n"
    assert sh("RUN $BOX read.py <&-").stdout == "b''\n"


def test_a_dialogue_needs_no_end_of_input(start):
    process = start("answer.py", stdin=subprocess.PIPE)
    for word in (b"one\n", b"two\n"):
        process.stdin.write(word)
        process.stdin.flush()
        assert process.stdout.readline() == b"you said " + word
    process.stdin.close()
    assert process.wait(WITHIN) == 0


def test_an_endless_input_does_not_keep_a_program_that_has_ended(sh):
    assert sh("yes | RUN $BOX both.py").stdout == "out\n"


def test_a_closed_stdout_takes_nothing_else_with_it(sh):
    answer = sh("RUN $BOX both.py >&-")
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "err\n")
    answer = sh("RUN $BOX both.py 2>&-")
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "out\n", "")


def test_a_reader_that_leaves_ends_the_program(sh):
    answer = sh('RUN $BOX yes.py | head -1; echo "${PIPESTATUS[0]}"')
    assert answer.stdout.split() == ["y" * 99, "1"]  # Python's own status for a print that nobody reads
    assert "BrokenPipeError" in answer.stderr
    assert sh('RUN --command $BOX yes | head -1; echo "${PIPESTATUS[0]}"').stdout.split() == ["y", "141"]


def test_a_full_disk_under_our_stdout_ends_the_program_and_is_said(sh):
    answer = sh("RUN $BOX yes.py >/dev/full")
    assert answer.returncode == 125
    assert answer.stderr.startswith("jhansi-run: error: ")
    assert "No space left on device" in answer.stderr
    assert answer.stderr.count("\n") == 1


# --- signals ------------------------------------------------------------------------------------------------


def record_of(path):
    return json.loads(path.read_bytes())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_that_ends_us_reaches_the_program_first(start, tmp_path, number):
    process = start("handle.py", "--result", tmp_path / "result")
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == f"{number.name}\n".encode()
    assert process.wait(WITHIN) == 7
    assert record_of(tmp_path / "result")["status"] == "exited"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_for_the_program_is_passed_on_and_ends_nothing(start, number):
    process = start("handle.py")
    assert process.stdout.readline() == b"ready\n"
    for _ in range(3):
        process.send_signal(number)
        assert process.stdout.readline() == f"{number.name}\n".encode()
    process.terminate()
    assert process.wait(WITHIN) == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_program_without_a_handler_is_cancelled_with_the_signals_status(start, tmp_path, number):
    process = start("wait.py", "--result", tmp_path / "result")
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    # Python's own handler for SIGINT is a traceback and then the same end.
    assert process.wait(WITHIN) == 128 + number
    assert record_of(tmp_path / "result")["status"] == "cancelled"


@pytest.mark.parametrize("times", [1, 2], ids=["told once", "told twice"])
def test_a_program_that_ignores_every_signal_is_ended_all_the_same(start, tmp_path, times):
    process = start("stubborn.py", "--timeout=600", "--result", tmp_path / "result")
    assert [process.stdout.readline() for _ in range(2)] == [b"ready\n"] * 2
    for _ in range(times):
        process.terminate()
        time.sleep(0.1)  # two of a kind that are pending at once are one (signal(7))
    assert process.wait(WITHIN) == 143
    record = record_of(tmp_path / "result")
    assert (record["status"], record["exit_code"], record["signal"]) == ("cancelled", None, "SIGKILL")


# --- terminals ----------------------------------------------------------------------------------------------


class Terminal:
    """A terminal with a program at it: `slave` is for the program, the rest for whoever sits before the screen."""

    def __init__(self):
        self.master, self.slave = os.openpty()
        termios.tcsetwinsize(self.slave, (33, 99))

    def adopt(self):
        """In a new process: make it the one whose keys and size send this process signals."""
        os.setsid()
        fcntl.ioctl(self.slave, termios.TIOCSCTTY, 0)

    def type(self, keys):
        os.write(self.master, keys)

    def read_until(self, mark):
        shown = b""
        while mark not in shown:
            readable, _, _ = select.select([self.master], [], [], WITHIN)
            assert readable, f"no {mark!r} in {shown!r}"
            shown += os.read(self.master, 4096)
        return shown


@pytest.fixture
def terminal(monkeypatch, runtime_environment):
    monkeypatch.setitem(runtime_environment, "TERM", "vt220")
    terminal = Terminal()
    yield terminal
    os.close(terminal.master)
    os.close(terminal.slave)


def at(terminal, **others):
    """Streams for `start`: all at the terminal but those that are named."""
    every = dict.fromkeys(("stdin", "stdout", "stderr"), terminal.slave)
    return every | others | {"preexec_fn": terminal.adopt}


@pytest.mark.parametrize("stdin", [True, False], ids=["stdin", "no stdin"])
@pytest.mark.parametrize("stdout", [True, False], ids=["stdout", "no stdout"])
@pytest.mark.parametrize("stderr", [True, False], ids=["stderr", "no stderr"])
def test_each_stream_is_a_terminal_for_the_program_when_it_is_one_here(start, terminal, stdin, stdout, stderr):
    elsewhere = {
        name: subprocess.PIPE
        for name, is_terminal in (("stdin", stdin), ("stdout", stdout), ("stderr", stderr))
        if not is_terminal
    }
    process = start("terminal.py", **at(terminal, **elsewhere))
    told = terminal.read_until(b"\n") if stderr else process.stderr.readline()
    term = "vt220" if stdin or stdout or stderr else None
    assert told.split() == f"{stdin} {stdout} {stderr} {term}".encode().split()
    assert process.wait(WITHIN) == 0


def test_the_size_is_that_of_our_terminal_and_follows_it(start, terminal):
    process = start("size.py", **at(terminal))
    assert terminal.read_until(b"\n").split() == [b"99", b"33"]
    termios.tcsetwinsize(terminal.master, (20, 44))
    assert terminal.read_until(b"\n").split() == [b"44", b"20"]
    terminal.type(b"\x03")
    assert process.wait(WITHIN) == 130


def test_ctrl_c_is_typed_to_the_program_and_ends_it(start, terminal, tmp_path):
    process = start("wait.py", "--result", tmp_path / "result", **at(terminal))
    terminal.read_until(b"ready")
    terminal.type(b"\x03")
    assert process.wait(WITHIN) == 130
    assert record_of(tmp_path / "result")["signal"] == "SIGINT"


def test_ctrl_c_ends_a_program_whose_output_goes_elsewhere(start, terminal):
    process = start("wait.py", **at(terminal, stdout=subprocess.PIPE))
    assert process.stdout.readline() == b"ready\n"
    terminal.type(b"\x03")
    assert process.wait(WITHIN) == 130


def test_typed_lines_are_echoed_and_answered_and_ctrl_d_ends_the_input(start, terminal):
    process = start("answer.py", **at(terminal))
    terminal.type(b"hello\n")
    assert terminal.read_until(b"you said hello\r\n").startswith(b"hello\r\n")
    terminal.type(b"\x04")
    assert process.wait(WITHIN) == 0


def test_typed_lines_reach_a_program_whose_output_goes_elsewhere(start, terminal):
    process = start("answer.py", **at(terminal, stdout=subprocess.PIPE))
    terminal.type(b"hello\n")
    assert process.stdout.readline() == b"you said hello\n"
    terminal.type(b"\x04")
    assert process.wait(WITHIN) == 0


@pytest.mark.parametrize("keys", [b"\x03", b""], ids=["by ^C", "by the clock"])
def test_our_terminal_is_afterwards_as_it_was(start, terminal, keys):
    before = termios.tcgetattr(terminal.slave)
    process = start("wait.py", "--timeout", "600" if keys else "1", **at(terminal))
    terminal.read_until(b"ready")
    assert termios.tcgetattr(terminal.slave) != before
    terminal.type(keys)
    assert process.wait(WITHIN) in {130, 124}
    assert termios.tcgetattr(terminal.slave) == before
