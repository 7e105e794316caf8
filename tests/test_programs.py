"""The table: what is run, within which limits, and what comes of it.

Each row is run three ways: by the command line with its stdio passed through, by the command line with the output in
the result, and by Runtime.exec in this process. All three have to tell the same.
"""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
from base64 import b64decode
from collections.abc import Callable, Mapping
from hashlib import sha256
from types import MappingProxyType
from typing import NamedTuple

import pytest

from jhansi_runtime import ExecRequest, Runtime
from jhansi_runtime.engine import InProcess
from jhansi_runtime.errors import InvalidRequestError, JhansiError
from jhansi_runtime.paths import Paths

MIB = 1 << 20
LONG = 2000  # bytes; of more than that a failing assertion shows the digest


class End(NamedTuple):
    """How an exec ends: three fields of its ExecResult, and the exit status of `jhansi-run exec`."""

    status: str
    exit_code: int | None
    signal: str | None
    exit_status: int


class Row(NamedTuple):
    """A program, `source` in the file `name` unless it is a `command`, with all that it is given, and its end.

    stdout and stderr are what it writes, byte for byte, or a text that must be in it, or None for whatever it is.
    """

    what: str
    source: str = ""
    end: End = End("exited", 0, None, 0)
    stdout: bytes | str | None = b""
    stderr: bytes | str | None = b""
    name: bytes = b"main.py"
    mode: int = 0o644
    command: tuple[bytes, ...] = ()
    args: tuple[bytes, ...] = ()
    env: Mapping[str, str] = MappingProxyType({})
    stdin: bytes = b""
    limits: Mapping[str, float] = MappingProxyType({})


def exits(code):
    return End("exited", code, None, code)


def dies(number):
    names = {**{name.value: name.name for name in signal.Signals}, signal.SIGRTMIN + 3: "SIGRTMIN+3"}
    return End("signaled", None, names[number], 128 + number)


TIMED_OUT = End("timed_out", None, "SIGKILL", 124)
OUTPUT_LIMIT = End("output_limit", None, "SIGKILL", 137)

# --- what the programs are made of --------------------------------------------------------------------------

SHOW_ARGUMENTS = "import os, sys; print([os.fsencode(word) for word in sys.argv[1:]])"
SHOW_ENVIRONMENT = "import os; print(sorted(os.environb.items()))"
COUNT_STDIN = """
import hashlib, sys
digest = hashlib.sha256()
while chunk := sys.stdin.buffer.read(1 << 20):
    digest.update(chunk)
print(digest.hexdigest())
"""
DIE = """
import os, signal, sys
number = int(sys.argv[1])
if number != signal.SIGKILL:
    signal.signal(number, signal.SIG_DFL)
os.kill(os.getpid(), number)
"""
# Three generations, in one process group and out of it, all of which hold stdout and would outlive the program.
ORPHANS = """
import os, time
for _ in range(3):
    if os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
        time.sleep(600)
        os._exit(0)
os.write(1, b"left\\n")
"""
DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 3)
        os.chdir("/")
        time.sleep(600)
    os._exit(0)
os.wait()
print("daemon started")
"""
GRANDCHILDREN = """
import os, signal, time
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
os.fork(), os.fork()
os.setpgid(0, 0) if os.getppid() != 1 else os.write(1, b"still here\\n")
time.sleep(600)
"""
WRITE_UNREAD = """
import os
for _ in range(500):
    os.write(1, b"y" * 1000)
"""
OPEN_MANY = """
import errno
held = []
try:
    while True:
        held.append(open("/dev/null"))
except OSError as error:
    print(errno.errorcode[error.errno], len(held) + 3 <= 20)
"""
BURN = """
import time
while time.process_time() < 4:
    pass
"""
FILL_TMP = """
import errno, os
written = 0
for folder in ("/tmp", "/dev/shm", os.environ["HOME"]):
    try:
        with open(folder + "/big", "wb", buffering=0) as file:
            while written < 8 << 20:
                written += file.write(bytes(1 << 16))
        print(folder, "took it all")
    except OSError as error:
        print(folder, errno.errorcode[error.errno], written <= 1 << 20)
"""
GROW_A_FILE = """
import signal, sys
if sys.argv[1:]:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
try:
    open("big", "wb", buffering=0).write(bytes(5000))
    open("big", "ab", buffering=0).write(b"more")
except OSError as error:
    print(error.strerror)
"""
WHO = """
import os, socket
print(os.getresuid(), os.getresgid(), os.getcwd(), socket.gethostname(), os.path.expanduser("~"), oct(os.umask(0)))
"""
ENVIRONMENT = {
    b"HOME": b"/home/sandbox",
    b"LANG": b"C.UTF-8",
    b"PATH": b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
}
HOSTILE_NAME = b"a file\nof \xff\xfe bytes, \x1b[31m and --all.py"
ODD_ARGUMENTS = (
    b"--json",
    b"-h",
    b"--",
    b"--stdin=x",
    b"",
    b"two\nlines",
    b"\xff\x80",
    "ü".encode(),
    b"a b",
    b"'\"$(x)",
)
BIG_INPUT = random.Random(2).randbytes(50 * MIB)
MANY_LINES = b"".join(b"line %d\n" % number for number in range(100_000))
EVERY_BYTE = bytes(range(256)) * 16

# Ends a process by default (signal(7)) and is no error of the program's own making here.
DEADLY = sorted(
    set(signal.Signals)
    - {signal.SIGCHLD, signal.SIGCONT, signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
    - {signal.SIGURG, signal.SIGWINCH}
)

TABLE = [
    # How it ends.
    *(
        Row(f"exits {code}", f"raise SystemExit({code})", exits(code))
        for code in (0, 1, 3, 124, 125, 126, 127, 137, 255)
    ),
    Row("an exception", "1 / 0", exits(1), stderr="ZeroDivisionError: division by zero"),
    Row("a syntax error", "this is no Python", exits(1), stderr="SyntaxError"),
    *(Row(f"dies of signal {n}", DIE, dies(n), args=(b"%d" % n,)) for n in (*DEADLY, signal.SIGRTMIN + 3)),
    Row("becomes another program", "import os; os.execv('/bin/sh', ['sh', '-c', 'exit 9'])", exits(9)),
    Row(
        "its threads go with it", "import os, threading; threading.Thread(target=lambda: os._exit(4)).start()", exits(4)
    ),
    # What it leaves running.
    Row("forks orphans and exits", ORPHANS, stdout=b"left\n", limits={"timeout": 20}),
    Row("forks a daemon and exits", DAEMON, stdout=b"daemon started\n", limits={"timeout": 20}),
    Row("orphans, and it fails", f"{ORPHANS}raise SystemExit(5)", exits(5), b"left\n", limits={"timeout": 20}),
    Row("grandchildren at a timeout", GRANDCHILDREN, TIMED_OUT, b"still here\n", limits={"timeout": 1}),
    Row("stops itself", "import os; os.kill(os.getpid(), 19)", TIMED_OUT, limits={"timeout": 0.5}),
    # What it reads and writes.
    Row("stdout and stderr", "import os; os.write(1, b'out'); os.write(2, b'err')", stdout=b"out", stderr=b"err"),
    Row("no end of line", "import os; os.write(1, b'a')", stdout=b"a"),
    Row("every byte there is", f"import sys; sys.stdout.buffer.write({EVERY_BYTE})", stdout=EVERY_BYTE),
    Row("UTF-8 without a locale of ours", "print('Zürich 東京')", stdout="Zürich 東京\n".encode()),
    Row(
        "100,000 lines",
        "for number in range(100_000): print('line', number)",
        stdout=MANY_LINES,
        limits={"output": 2 * MIB},
    ),
    Row("stdin at its end", "import sys; print(sys.stdin.buffer.read())", stdout=b"b''\n"),
    Row(
        "stdin to the last byte",
        "import sys; print(sys.stdin.buffer.read())",
        stdout=b"b'\\x00\\xff'\n",
        stdin=b"\0\xff",
    ),
    Row("50 MB of stdin", COUNT_STDIN, stdout=sha256(BIG_INPUT).hexdigest().encode() + b"\n", stdin=BIG_INPUT),
    Row("never reads its stdin", WRITE_UNREAD, stdout=b"y" * 500_000, stdin=BIG_INPUT[:MIB]),
    Row("closes its stdin", "import os; os.close(0); print('done')", stdout=b"done\n", stdin=BIG_INPUT[:MIB]),
    Row("closes its stdout", "import os, time; os.close(1); os.write(2, b'on')", stderr=b"on"),
    # What it may use.
    Row("output, all of it", "import os; os.write(1, b'0123456789')", stdout=b"0123456789", limits={"output": 10}),
    Row(
        "output, a byte too much",
        "import os, time; os.write(1, b'0123456789+'); time.sleep(600)",
        OUTPUT_LIMIT,
        b"0123456789",
        limits={"output": 10, "timeout": 20},
    ),
    Row(
        "output, both streams together",
        "import os, time; os.write(1, b'01234'); time.sleep(.5); os.write(2, b'56789+'); time.sleep(600)",
        OUTPUT_LIMIT,
        b"01234",
        b"56789",
        limits={"output": 10, "timeout": 20},
    ),
    Row("output, none allowed and none written", "pass", limits={"output": 0}),
    Row(
        "output, none allowed", "import time; print(1, flush=True); time.sleep(600)", OUTPUT_LIMIT, limits={"output": 0}
    ),
    Row("output without end", "while True: print('y' * 999)", OUTPUT_LIMIT, b"y" * 999, limits={"output": 999}),
    Row("wall time", "import time; time.sleep(600)", TIMED_OUT, limits={"timeout": 0.5}),
    Row("CPU time", BURN, End("cpu_time_exceeded", None, "SIGXCPU", 124), limits={"cpu_time": 1}),
    Row(
        "CPU time, and SIGXCPU ignored",
        f"import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN){BURN}",
        End("cpu_time_exceeded", None, "SIGKILL", 124),
        limits={"cpu_time": 1},
    ),
    Row("file size", GROW_A_FILE, dies(signal.SIGXFSZ), args=(b"die",), limits={"file_size": 5000}),
    Row("file size, and SIGXFSZ ignored", GROW_A_FILE, stdout=b"File too large\n", limits={"file_size": 5000}),
    Row("open files", OPEN_MANY, stdout=b"EMFILE True\n", limits={"nofile": 20}),
    Row(
        "temporary files",
        FILL_TMP,
        stdout=b"/tmp ENOSPC True\n/dev/shm ENOSPC True\n/home/sandbox ENOSPC True\n",
        limits={"tmp": MIB},
    ),
    # What it is told.
    Row("arguments of all kinds", SHOW_ARGUMENTS, stdout=f"{list(ODD_ARGUMENTS)}\n".encode(), args=ODD_ARGUMENTS),
    Row("a megabyte of arguments", "import sys; print(len(sys.argv))", stdout=b"10001\n", args=(b"x" * 100,) * 10_000),
    Row(
        "the environment it is given, and none of ours",
        SHOW_ENVIRONMENT,
        stdout=b"%a\n" % sorted({**ENVIRONMENT, b"A": b"=b", b"E": b""}.items()),
        env={"A": "=b", "E": ""},
    ),
    Row(
        "an environment over the usual one",
        "import os; print(os.environ['HOME'], os.environ['LANG'])",
        stdout=b"/tmp C\n",
        env={"HOME": "/tmp", "LANG": "C"},
    ),
    Row(
        "who and where it is",
        WHO,
        stdout=b"(1000, 1000, 1000) (1000, 1000, 1000) /workspace sandbox /home/sandbox 0o22\n",
    ),
    Row("its name as an argument", "import sys; print(sys.argv)", stdout=b"['/workspace/main.py']\n"),
    # What it is.
    Row("an empty file"),
    Row(
        "a hostile name",
        "print(__file__.encode(errors='surrogateescape'))",
        stdout=b"%a\n" % (b"/workspace/" + HOSTILE_NAME),
        name=HOSTILE_NAME,
    ),
    Row("a name like an option", "print('run')", stdout=b"run\n", name=b"--help.py"),
    Row("in a folder", "import sys; print(sys.path[0])", stdout=b"/workspace/a/b\n", name=b"a/b/main.py"),
    Row("a name without an extension", "print('Python')", stdout=b"Python\n", name=b"main"),
    Row(
        "an executable script",
        "#!/bin/sh\necho $0 $1\n",
        stdout=b"/workspace/tool x\n",
        name=b"tool",
        mode=0o755,
        args=(b"x",),
    ),
    Row("a Python file that is executable too", "#!/bin/sh\n\nprint('Python')", stdout=b"Python\n", mode=0o755),
    Row("deletes itself", "import os; os.unlink(__file__); print(os.listdir())", stdout=b"[]\n"),
    Row("a command", stdout=b"a b\n", command=(b"printf", b"%s %s\\n", b"a", b"b")),
    Row("a command by its path", end=exits(6), command=(b"/bin/sh", b"-c", b"exit 6")),
    Row("a command like an option", stdout=b"-n\n", command=(b"/usr/bin/printf", b"%s\\n", b"-n")),
]

# --- the three ways -----------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What one way told of an exec: the ExecResult's fields, what came out, and the exit status (None in-process)."""

    result: dict[str, object]
    stdout: bytes
    stderr: bytes
    exit_status: int | None


class Box(NamedTuple):
    """A sandbox, its workspace on the host, and the runtime it belongs to."""

    id: str
    workspace: str
    runtime: Runtime
    environment: dict[str, str]


@pytest.fixture(scope="module")
def runtime(runtime_environment):
    # Without a launcher: a child of this process is then what an exec has left.
    with Runtime(Paths.from_environment(runtime_environment), launcher=InProcess()) as runtime:
        yield runtime


@pytest.fixture
def box(runtime, runtime_environment):
    """An empty sandbox. When the test ends, nothing of what ran in it is left."""
    sandbox = runtime.create()
    workspace = os.path.join(runtime.paths.workspaces, sandbox.id, "workspace")
    yield Box(sandbox.id, workspace, runtime, runtime_environment)
    left = processes_in(sandbox.id)
    runtime.remove(sandbox.id)
    assert left == []


def processes_in(sandbox_id):
    """The command lines of all processes of the host that see the workspace of this sandbox mounted."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        # A process may end meanwhile, or belong to someone else.
        with contextlib.suppress(OSError), open(f"/proc/{pid}/mountinfo", "rb") as mounts:
            if sandbox_id.encode() in mounts.read():
                with open(f"/proc/{pid}/cmdline", "rb") as words:
                    found.append(words.read())
    return found


def write(workspace, name, content, mode=0o644):
    path = os.path.join(os.fsencode(workspace), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(content.encode())
    os.chmod(path, mode)


def command_line(box, row, *options):
    """The words of `jhansi-run exec` for a row."""
    limits = [f"--{name.replace('_', '-')}={value}" for name, value in row.limits.items()]
    environment = [word for pair in row.env.items() for word in ("--env", "=".join(pair))]
    what = ["--command", box.id, "--", *row.command] if row.command else [box.id, "--", row.name]
    return [sys.executable, "-m", "jhansi_runtime", "exec", *options, *limits, *environment, *what, *row.args]


def passed_through(box, row, folder):
    """stdin from a pipe, stdout and stderr to pipes, the record in a file."""
    argv = command_line(box, row, "--result", folder / "record")
    ended = subprocess.run(argv, env=box.environment, input=row.stdin, capture_output=True, check=False)
    said = b"" if row.end.status in {"exited", "signaled"} else b"jhansi-run: ended at the "
    stderr, mark, _ = ended.stderr.partition(said) if said else (ended.stderr, b"", b"")
    assert mark == said, ended.stderr
    return Outcome(json.loads((folder / "record").read_bytes()), ended.stdout, stderr, ended.returncode)


def captured(box, row, folder):
    """stdin from a file, the output in the record, as text."""
    (folder / "stdin").write_bytes(row.stdin)
    argv = command_line(box, row, "--json", "--stdin", folder / "stdin")
    ended = subprocess.run(argv, env=box.environment, capture_output=True, check=False)
    assert ended.stderr == b""
    result = json.loads(ended.stdout)
    return Outcome(result, result["stdout"].encode(), result["stderr"].encode(), ended.returncode)


def in_process(box, row, _folder):
    """stdin from memory, the output in the result, byte for byte."""
    result = box.runtime.exec(request(box, row))
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    fields = {name: getattr(result, name) for name in result.__struct_fields__}
    return Outcome(fields, b64decode(result.stdout), b64decode(result.stderr), None)


def request(box, row):
    return ExecRequest(
        sandbox=box.id,
        filename=None if row.command else os.fsdecode(row.name),
        command=[os.fsdecode(word) for word in row.command],
        args=[os.fsdecode(word) for word in row.args],
        env=dict(row.env),
        stdin=row.stdin,
        limits=dict(row.limits),
        encoding="base64",
    )


def differs(actual, expected):
    """What is wrong with this output, in short; None when nothing is."""
    if expected is None or (isinstance(expected, str) and expected.encode() in actual) or actual == expected:
        return None
    brief = [word if len(word) < LONG else (len(word), sha256(word).hexdigest()) for word in (actual, expected)]
    return f"{brief[0]} is not {brief[1]}"


@pytest.mark.parametrize("way", [passed_through, captured, in_process], ids=lambda way: way.__name__)
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.what)
def test_a_program_comes_to_the_end_that_the_table_says(row, way, box, tmp_path):
    if not row.command:
        write(box.workspace, row.name, row.source, row.mode)
    told = way(box, row, tmp_path)
    shown = [told.stdout, told.stderr]
    expected = [row.stdout, row.stderr]
    if way is captured:  # as text, where a byte that is none is replaced
        expected = [text.decode(errors="replace").encode() if isinstance(text, bytes) else text for text in expected]

    assert [told.result[field] for field in End._fields[:3]] == list(row.end[:3])
    assert [differs(*pair) for pair in zip(shown, expected, strict=True)] == [None, None]
    assert told.exit_status in {row.end.exit_status, None}
    assert told.result["stdout_truncated"] or told.result["stderr_truncated"] == (row.end.status == "output_limit")
    assert told.result["timed_out"] == (row.end == TIMED_OUT)


# --- what cannot be run -------------------------------------------------------------------------------------


class Refused(NamedTuple):
    """What `make` leaves in the workspace, the words that name it to `jhansi-run exec`, and what comes of that."""

    what: str
    words: tuple[bytes, ...]
    exit_status: int
    error: str
    make: Callable[[str], object] = lambda _workspace: None


def make_socket(workspace):
    folder = os.open(workspace, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{folder}/main.py")  # a socket's path has 107 bytes, no more
    os.close(folder)


MAIN = (b"main.py",)
REFUSED = [
    Refused("a missing file", MAIN, 127, "is not in the workspace"),
    Refused("a file behind a file", (b"a/b.py",), 127, "is not in the workspace", lambda w: write(w, b"a", "")),
    Refused("a name longer than any", (b"x" * 300,), 127, "is not in the workspace"),
    Refused("a directory", MAIN, 126, "is a directory", lambda w: os.mkdir(f"{w}/main.py")),
    Refused("a FIFO", MAIN, 126, "is a fifo", lambda w: os.mkfifo(f"{w}/main.py")),
    Refused("a socket", MAIN, 126, "is a socket", make_socket),
    Refused("a link out", MAIN, 126, "leads out", lambda w: os.symlink("../../../outside.py", f"{w}/main.py")),
    Refused("an absolute link", MAIN, 126, "leads out", lambda w: os.symlink("/etc/passwd", f"{w}/main.py")),
    Refused("behind a link out", (b"a/os.py",), 126, "leads out", lambda w: os.symlink("/usr/lib/python3", f"{w}/a")),
    Refused("a link in a circle", MAIN, 126, "in circles", lambda w: os.symlink("main.py", f"{w}/main.py")),
    Refused("a link to nothing", MAIN, 127, "is not in the workspace", lambda w: os.symlink("gone", f"{w}/main.py")),
    Refused("a file that may not be read", MAIN, 126, "permissions", lambda w: write(w, b"main.py", "", 0o000)),
    Refused(
        "neither known nor executable",
        (b"notes.txt",),
        126,
        "is not one of .py .pyc .pyw .pyz, and is not executable; make it executable, with a #! line",
        lambda w: write(w, b"notes.txt", "text"),
    ),
    Refused(
        "no format the kernel knows", (b"tool",), 126, "Exec format error", lambda w: write(w, b"tool", "??", 0o755)
    ),
    Refused("a missing #! program", (b"tool",), 127, "#! line", lambda w: write(w, b"tool", "#!/no/such\n", 0o755)),
    Refused("a path out", (b"../main.py",), 125, "holds `..`"),
    Refused("an absolute path", (b"/etc/passwd",), 125, "give a path relative to the workspace"),
    Refused("an empty name", (b"",), 125, "the path is empty"),
    Refused("a missing command", (b"--command", b"no-such-program"), 127, "is not there"),
    Refused("a missing command by path", (b"--command", b"/workspace/main.py"), 127, "is not there"),
    Refused("a command that is data", (b"--command", b"/etc/passwd"), 126, "cannot be executed: Permission denied"),
    Refused("a command that is a directory", (b"--command", b"/tmp"), 126, "cannot be executed: Permission denied"),
]


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.what)
def test_what_cannot_be_run_is_one_line_that_says_why_and_a_status(row, box):
    row.make(box.workspace)
    *options, word = row.words
    argv = [sys.executable, "-m", "jhansi_runtime", "exec", *options, box.id, word]
    ended = subprocess.run(argv, env=box.environment, capture_output=True, text=True, check=False)

    assert ended.returncode == row.exit_status
    assert row.error in ended.stderr
    assert ended.stderr.startswith("jhansi-run: error: ")
    assert ended.stderr.count("\n") == 1
    assert ended.stdout == ""

    what = {"command": [os.fsdecode(word)]} if options else {"filename": os.fsdecode(word)}
    with pytest.raises(JhansiError) as raised:
        box.runtime.exec(ExecRequest(sandbox=box.id, **what))
    assert raised.value.exit_code == row.exit_status


# A single argument of 128 KiB, and 2 MiB of them and the environment together, are more than execve takes.
@pytest.mark.parametrize("arguments", [["x" * (1 << 17)], ["x" * 1000] * 3000])
def test_more_arguments_than_the_kernel_takes_are_a_clear_error(box, arguments):
    write(box.workspace, b"main.py", "")
    with pytest.raises(InvalidRequestError, match="too long together; pass them on stdin"):
        box.runtime.exec(ExecRequest(sandbox=box.id, filename="main.py", args=arguments))


# --- more than one exec -------------------------------------------------------------------------------------


def test_a_link_that_stays_inside_is_run(box):
    write(box.workspace, b"real/program.py", "import sys; print(__file__, sys.path[0])")
    os.symlink("real/program.py", f"{box.workspace}/main.py")
    result = box.runtime.exec(ExecRequest(sandbox=box.id, filename="main.py"))

    assert result.stdout == "/workspace/main.py /workspace/real\n"


def test_an_exec_finds_what_the_last_one_left_in_the_workspace_and_nothing_else_of_it(box):
    source = "import os; print(*(os.path.exists(f'{f}/left') or open(f'{f}/left', 'w') and 'new' for f in {}))"
    folders = ["/workspace", "/tmp", "/dev/shm", "/home/sandbox"]
    write(box.workspace, b"main.py", source.replace("{}", str(folders)).replace("and 'new'", "and False"))
    program = ExecRequest(sandbox=box.id, filename="main.py")

    assert box.runtime.exec(program).stdout == "False False False False\n"
    assert box.runtime.exec(program).stdout == "True False False False\n"


def test_a_program_that_deleted_itself_is_not_there_for_the_next_exec(jhansi, box):
    write(box.workspace, b"main.py", "import os; os.unlink(__file__)")

    assert [jhansi("exec", box.id, "main.py").returncode for _ in range(2)] == [0, 127]


MEET = """
import os, sys, time
mine, other = sys.argv[1:]
open(mine, "w").close()
while not os.path.exists(other):
    time.sleep(0.01)
print(os.getpid(), sorted(name for name in os.listdir("/proc") if name.isdigit()))
"""


def test_two_execs_at_once_share_the_workspace_and_do_not_see_each_other(box):
    write(box.workspace, b"main.py", MEET)
    argv = [sys.executable, "-m", "jhansi_runtime", "exec", box.id, "main.py"]
    both = [
        subprocess.Popen([*argv, *names], env=box.environment, stdout=subprocess.PIPE, text=True)
        for names in (["a", "b"], ["b", "a"])
    ]

    assert [process.communicate()[0] for process in both] == ["2 ['1', '2']\n"] * 2
    assert [process.returncode for process in both] == [0, 0]


# --- run ----------------------------------------------------------------------------------------------------

LOOK_AROUND = "import os; print(os.listdir()); open('left', 'w').write('here')"


@pytest.mark.parametrize("name", [b"hello.py", HOSTILE_NAME], ids=["plain", "hostile"])
def test_run_has_a_workspace_with_the_file_alone_and_it_is_gone_afterwards(jhansi, runtime, tmp_path, name):
    write(tmp_path, name, LOOK_AROUND)
    before = os.listdir(runtime.paths.workspaces)
    answer = jhansi("run", "--json", os.path.join(os.fsencode(tmp_path), name))
    result = json.loads(answer.stdout)

    assert (answer.returncode, result["stdout"], result["sandbox_id"]) == (0, f"{[os.fsdecode(name)]!a}\n", None)
    assert os.listdir(runtime.paths.workspaces) == before
    assert os.listdir(os.fsencode(tmp_path)) == [name]


@pytest.mark.parametrize(
    ("source", "exit_status"),
    [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137), ("import time; time.sleep(600)", 124)],
)
def test_run_leaves_no_workspace_however_it_ends(jhansi, runtime, tmp_path, source, exit_status):
    write(tmp_path, b"main.py", source)
    before = os.listdir(runtime.paths.workspaces)

    assert jhansi("run", "--timeout", "1", tmp_path / "main.py").returncode == exit_status
    assert os.listdir(runtime.paths.workspaces) == before


def test_run_in_a_folder_of_the_host_keeps_what_the_program_leaves(jhansi, tmp_path):
    write(tmp_path, b"a/main.py", LOOK_AROUND)
    answer = jhansi("run", "--workspace", tmp_path, "a/main.py", cwd=tmp_path)

    assert (answer.returncode, answer.stdout) == (0, "['a']\n"), answer.stderr
    assert (tmp_path / "left").read_text() == "here"
    assert (tmp_path / "left").stat().st_uid == os.getuid()


@pytest.mark.parametrize("folder", [".", "..", "audit", "workspaces"])
def test_run_refuses_a_workspace_that_holds_or_lies_in_what_we_keep(jhansi, runtime, folder):
    workspace = os.path.join(runtime.paths.home, folder)
    answer = jhansi("run", "--workspace", workspace, os.path.join(workspace, "main.py"))

    assert answer.returncode == 125
    assert "what jhansi-runtime keeps" in answer.stderr
