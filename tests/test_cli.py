"""The command line as a user meets it: real processes, judged by what they print, leave behind and end with.

Programs are the host's own (--rootfs host). The commands that run none are in test_cli_stores. Every test runs both
ways: a process by itself, and the thin client of a server.
"""

import json
import os
import pty
import signal
import subprocess

import msgspec
import pytest
from conftest import WAYS, by_way, command, environment_with, run

from jhansi_runtime.cli.parameters import LIMITS
from jhansi_runtime.quantities import duration_text, size_text
from jhansi_runtime.spec import Limits

HOSTILE = b"a\n\x1b[31m\xff"

# Says when it runs, then tells of each signal it gets; SIGTERM and SIGINT it obeys.
LISTENER = """
import os, signal
def told(number, frame):
    os.write(1, signal.Signals(number).name.encode() + b"\\n")
    if number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, told)
os.write(1, b"ready\\n")
while True:
    signal.pause()
"""


@pytest.fixture(params=WAYS)
def environment(request, tmp_path):
    environment = environment_with(tmp_path / "home")
    environment.pop("PYTHONUNBUFFERED", None)  # would hide output that is never flushed
    with by_way(request.param, environment) as environment:
        yield environment


@pytest.fixture
def jhansi(environment):
    """`jhansi(*words, **options)` runs one jhansi-run over an empty JHANSI_HOME."""
    return lambda *words, **options: run(words, environment, **options)


@pytest.fixture
def box(jhansi):
    """A sandbox of that name, whose programs are the host's."""
    answer = jhansi("create", "--name", "box", "--rootfs", "host")
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


@pytest.fixture
def program(jhansi, box, tmp_path):
    """`program(source)` puts main.py, or a file of another name, into the box."""

    def put(source, name="main.py"):
        (tmp_path / name).write_text(source)
        answer = jhansi("put", box, tmp_path / name)
        assert answer.returncode == 0, answer.stderr

    return put


@pytest.fixture
def start(environment):
    """`start(*words)` begins a jhansi-run that the test talks to; it is gone when the test ends."""
    started = []

    def start(*words, **options):
        argv = command(words, environment)
        defaults = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(argv, **(defaults | options)))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def document(answer):
    """The JSON document that is all of stdout."""
    return json.loads(answer.stdout)


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["no-such-command"],
        ["--no-such-option"],
        ["audit"],
        ["create", "--timeout", "soon"],
        ["create", "--output", "much"],
        ["create", "--nofile", "1.5"],
        ["create", "--label", "novalue"],
        ["create", "--rootfs", "other"],
        ["create", "unexpected"],
        ["create", "--memory", "plenty"],
        ["create", "--cpus", "all"],
        ["create", "--require-cgroup=yes"],
        ["exec", "box"],
        ["exec", "box", "--"],
        ["exec", "box", "--timeout", "5", "main.py"],
        ["exec", "--env", "=x", "box", "main.py"],
        ["run"],
        ["rm"],
        ["completion", "csh"],
    ],
)
def test_a_wrong_command_line_is_our_failure_said_in_one_line_and_a_hint(jhansi, words):
    answer = jhansi(*words)
    error, hint = answer.stderr.splitlines()
    assert answer.returncode == 125
    assert error.startswith("jhansi-run: error: ")
    assert hint.startswith("Try 'jhansi-run")
    assert answer.stdout == ""


@pytest.mark.parametrize(
    "words",
    [
        ["show", "nobody"],
        ["exec", "nobody", "main.py"],
        ["put", "nobody", "/etc/hostname"],
        ["create", "--language", "klingon", "--timeout", "2d"],
        ["audit", "show", "--since", "yesterday"],
    ],
)
def test_an_error_is_one_line_with_status_125(jhansi, words):
    answer = jhansi(*words)
    assert answer.returncode == 125
    assert len(answer.stderr.splitlines()) == 1
    assert answer.stderr.startswith("jhansi-run: error: ")
    assert answer.stdout == ""


@pytest.mark.usefixtures("box")
@pytest.mark.parametrize(
    ("words", "hints"),
    [
        ([HOSTILE], 1),
        (["show", HOSTILE], 0),
        (["put", "box", HOSTILE], 0),
        (["exec", "box", HOSTILE], 0),
        (["exec", "--stdin", HOSTILE, "box", "main.py"], 0),
        (["run", "--rootfs", "host", HOSTILE], 0),
    ],
)
def test_an_error_about_a_hostile_name_keeps_to_its_line_and_sends_no_escapes(jhansi, words, hints):
    error, *hint = jhansi(*words).stderr.splitlines()
    assert error.startswith("jhansi-run: error: ")
    assert error.isprintable()
    assert "a\\n\\x1b[31m" in error
    assert len(hint) == hints


def test_without_arguments_the_help_is_shown(jhansi):
    answer = jhansi()
    assert answer.returncode == 0
    assert "exec" in answer.stdout
    assert answer.stderr == ""


def test_every_limit_is_an_option_whose_help_names_its_default(jhansi):
    texts = {"timeout": duration_text, "cpu_time": duration_text, "nofile": str, "pids": str, "disk_files": str}
    texts["cpus"] = "{:g}".format
    help_text = " ".join(jhansi("exec", "--help").stdout.split())
    limits = msgspec.structs.asdict(Limits())
    assert limits.pop("require_cgroup") is False
    assert "--require-cgroup Refuse" in help_text
    assert [name.strip("-").replace("-", "_") for name, _, _ in LIMITS] == list(limits)
    for name, value in limits.items():
        section = help_text.partition(f"--{name.replace('_', '-')} ")[2]
        assert f"[default: {texts.get(name, size_text)(value)}]" in section


# --- exec and run ---------------------------------------------------------------------------------------------


def test_the_exit_status_is_the_programs_own(jhansi, program):
    program("import sys; print('out'); print('err', file=sys.stderr); sys.exit(int(sys.argv[1]))")
    for status in (0, 1, 125, 255):
        answer = jhansi("exec", "box", "main.py", str(status))
        assert (answer.returncode, answer.stdout, answer.stderr) == (status, "out\n", "err\n")


@pytest.mark.parametrize(
    ("source", "limits", "status"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", [], 137),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", [], 143),
        ("import time; time.sleep(60)", ["--timeout", "300ms"], 124),
        ("while True: pass", ["--cpu-time", "1s"], 124),
        ("while True: print('x' * 1000)", ["--output", "64K"], 137),
    ],
)
def test_how_a_program_was_ended_is_the_exit_status_and_a_limit_is_named(jhansi, program, source, limits, status):
    program(source)
    answer = jhansi("exec", *limits, "box", "main.py")
    said = answer.stderr.splitlines()
    assert answer.returncode == status
    assert len(said) == (1 if limits else 0)
    assert all(line.startswith("jhansi-run: ") for line in said)


@pytest.mark.usefixtures("box")
def test_a_file_that_cannot_be_executed_is_126_and_one_that_is_not_there_127(jhansi, tmp_path):
    (tmp_path / "folder").mkdir()
    jhansi("put", "box", tmp_path / "folder")
    for name, status in (("folder", 126), ("missing.py", 127)):
        answer = jhansi("exec", "box", name)
        assert answer.returncode == status
        assert len(answer.stderr.splitlines()) == 1
        assert name in answer.stderr
    # Said before a rootfs is built for it.
    for line in (["exec", "--rootfs", "recipe", "box", "missing.py"], ["run", "missing.py"]):
        answer = jhansi(*line)
        assert (answer.returncode, answer.stdout) == (127, "")
        assert answer.stderr.startswith("jhansi-run: error: 'missing.py' is not ")


def test_after_filename_every_argument_is_the_programs_byte_for_byte(jhansi, program):
    program("import os, sys; sys.stdout.buffer.write(b'|'.join(map(os.fsencode, sys.argv[1:])))")
    words = ["--timeout", "--", "-h", "--help", "", "a b\n", b"\xff\xfe", "--json"]
    answer = jhansi("exec", "box", "main.py", *words, text=False, errors=None)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == b"|".join(map(os.fsencode, words))


def test_a_filename_that_starts_with_a_dash_goes_after_two(jhansi, program, tmp_path):
    program("print('ran')", name="-x.py")
    assert jhansi("exec", "box", "--", "-x.py", "--").stdout == "ran\n"
    assert jhansi("run", "--rootfs", "host", "--", "-x.py", cwd=tmp_path).stdout == "ran\n"


@pytest.mark.parametrize(
    "words", [[], ["a", "b c"], ["--timeout", "1"], ["--", "x"], ["-h"], ["", "-"], ["a\nb", b"\xff"]]
)
def test_a_line_without_options_is_read_as_the_parser_reads_it(runtime_environment, tmp_path, words):
    (tmp_path / "main.py").write_text(
        "import os, sys; print(sys.argv, os.getcwd(), dict(os.environ), sys.stdin.read())"
    )
    sandbox = run(["create"], runtime_environment).stdout.strip()
    run(["put", sandbox, tmp_path / "main.py"], runtime_environment)
    for verb, *line in (["exec", sandbox, "main.py"], ["run", tmp_path / "main.py"]):
        answers = [run([verb, *dashes, *line, *words], runtime_environment, input="in") for dashes in ([], ["--"])]
        assert len({(answer.returncode, answer.stdout, answer.stderr) for answer in answers}) == 1
        assert answers[0].stdout.startswith("['/workspace/main.py'")


@pytest.mark.usefixtures("box")
@pytest.mark.parametrize(
    "line", [["exec", "box"], ["exec", "", "main.py"], ["exec", "box", "-x"], ["run"], ["run", "-x"]]
)
def test_a_line_that_names_no_file_is_an_error(jhansi, line):
    answer = jhansi(*line)
    assert (answer.returncode, answer.stdout) == (125, "")
    assert answer.stderr.startswith("jhansi-run: error: ")


@pytest.mark.usefixtures("box")
def test_a_command_is_a_program_of_the_rootfs(jhansi):
    assert jhansi("exec", "--command", "box", "--", "echo", "-n", "--", "hello").stdout == "-- hello"
    assert jhansi("exec", "--command", "box", "no-such-program").returncode == 127


def test_the_job_gets_the_variables_that_were_named_and_none_of_ours(jhansi, program, environment):
    program("import json, os; print(json.dumps(dict(os.environ)))")
    answer = jhansi("exec", "--env", "A=b=c", "--env", "EMPTY=", "box", "main.py", env=environment | {"SECRET": "x"})
    variables = document(answer)
    assert variables["A"] == "b=c"
    assert variables["EMPTY"] == ""
    assert "SECRET" not in variables


def test_stdin_is_ours_or_the_named_file_or_an_error_before_anything_runs(jhansi, program, tmp_path):
    program("import sys; print(sys.stdin.read().upper(), end='')")
    (tmp_path / "input").write_text("from a file")
    assert jhansi("exec", "box", "main.py", input="from a pipe").stdout == "FROM A PIPE"
    assert jhansi("exec", "--stdin", tmp_path / "input", "box", "main.py").stdout == "FROM A FILE"
    answer = jhansi("exec", "--stdin", tmp_path / "nowhere", "box", "main.py")
    assert answer.returncode == 125
    assert "nowhere: No such file or directory" in answer.stderr


def test_json_is_one_document_on_stdout_with_what_the_program_wrote_inside(jhansi, program):
    program("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")
    answer = jhansi("exec", "--json", "box", "main.py")
    result = document(answer)
    assert answer.returncode == 3
    assert answer.stderr == ""
    assert (result["status"], result["exit_code"], result["stdout"], result["stderr"]) == (
        "exited",
        3,
        "out\n",
        "err\n",
    )


def test_result_holds_the_record_and_stdio_passes_through(jhansi, program, tmp_path):
    program("print('out'); raise SystemExit(125)")
    answer = jhansi("exec", "--result", tmp_path / "result", "box", "main.py")
    result = json.loads((tmp_path / "result").read_text())
    assert (answer.returncode, answer.stdout, answer.stderr) == (125, "out\n", "")
    assert (result["status"], result["exit_code"], result["stdout_bytes"]) == ("exited", 125, 4)
    assert sorted(entry for entry in os.listdir(tmp_path) if "result" in entry) == ["result"]


@pytest.mark.usefixtures("box")
def test_no_record_of_an_earlier_exec_is_left_when_nothing_ran(jhansi, tmp_path):
    (tmp_path / "result").write_text("stale")
    assert jhansi("exec", "--result", tmp_path / "result", "box", "missing.py").returncode == 127
    assert not (tmp_path / "result").exists()


def test_a_result_that_could_not_be_written_ends_it_before_anything_runs(jhansi, program, tmp_path):
    program("open('trace', 'w')")
    answer = jhansi("exec", "--result", tmp_path / "no" / "folder", "box", "main.py")
    assert answer.returncode == 125
    assert len(answer.stderr.splitlines()) == 1
    assert jhansi("get", "box", "trace", "-o", tmp_path / "trace").returncode == 125


def test_a_result_goes_to_an_open_descriptor_by_its_name(jhansi, program, tmp_path):
    program("print('out')")
    with open(tmp_path / "log", "w+", encoding="ascii") as log:
        log.write("before\n")
        log.flush()
        answer = jhansi("exec", "--result", f"/dev/fd/{log.fileno()}", "box", "main.py", pass_fds=[log.fileno()])
        log.seek(0)
        before, result = log.readlines()
    assert (before, json.loads(result)["status"], answer.stdout) == ("before\n", "exited", "out\n")


def test_run_needs_no_sandbox_and_leaves_none(jhansi, tmp_path):
    (tmp_path / "other").write_text("")
    (tmp_path / "hello.py").write_text("import os, sys; print(sys.argv[1:], sorted(os.listdir()))")
    answer = jhansi("run", "--rootfs", "host", tmp_path / "hello.py", "--flag")
    assert (answer.returncode, answer.stdout) == (0, "['--flag'] ['hello.py']\n"), answer.stderr
    assert document(jhansi("ls", "--json")) == []


def test_run_in_a_folder_of_the_host_keeps_what_the_program_leaves(jhansi, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "main.py").write_text("open('left', 'w').write('here')")
    assert jhansi("run", "--rootfs", "host", "--workspace", tmp_path / "work", "main.py").returncode == 0
    assert (tmp_path / "work" / "left").read_text() == "here"


# --- signals and terminals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_us_ends_the_job_then_us_with_the_record_written(start, program, jhansi, number):
    program(LISTENER)
    # Who runs the tests may ignore a signal, as nohup does, and so would jhansi-run.
    process = start("exec", "box", "main.py", preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate()[0] == f"{number.name}\n"
    assert process.returncode == 128 + number
    assert document(jhansi("audit", "show", "--json"))[-1]["event"] == "exec.end"
    assert jhansi("audit", "verify").returncode == 0


def test_a_user_signal_is_passed_on_and_ends_nothing(start, program):
    program(LISTENER)
    process = start("exec", "box", "main.py")
    assert process.stdout.readline() == "ready\n"
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        process.send_signal(number)
        assert process.stdout.readline() == f"{number.name}\n"
    assert process.poll() is None


def test_a_signal_we_were_started_to_ignore_stays_ignored(start, program):
    program(LISTENER)
    process = start("exec", "box", "main.py", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGUSR1)
    first = process.stdout.readline()
    process.terminate()
    assert first + process.communicate()[0] == "SIGUSR1\nSIGTERM\n"


def on_terminal(start, *words, typed=b"", **others):
    """Run a jhansi-run whose stdio, but for the others, is one terminal; its exit status and what was shown."""
    ours, theirs = pty.openpty()
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs} | others
    process = start(*words, start_new_session=True, **streams)
    os.close(theirs)
    os.write(ours, typed)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # EIO: nobody has the other end any more
            break
    os.close(ours)
    return process.wait(), shown.decode()


def test_each_stream_that_is_a_terminal_here_is_one_for_the_program_and_no_other(start, program, jhansi, environment):
    program("import os, sys; print([os.isatty(n) for n in range(3)], os.environ.get('TERM'), flush=True)")
    words, here = ("exec", "box", "main.py"), {"env": environment | {"TERM": "vt52"}}
    assert jhansi(*words, input="", **here).stdout == "[False, False, False] None\n"
    assert on_terminal(start, *words, **here) == (0, "[True, True, True] vt52\r\n")
    without_stdin = on_terminal(start, *words, stdin=subprocess.DEVNULL, **here)
    assert (without_stdin[0], without_stdin[1].strip()) == (0, "[False, True, True] vt52")


def test_a_shell_is_interactive_in_the_workspace_and_ends_with_its_status(start, program):
    program("print('from ' + 'a file')")
    status, shown = on_terminal(start, "shell", "box", typed=b"pwd; python3 main.py; exit 7\n")
    assert status == 7
    assert "/workspace" in shown
    assert "from a file" in shown


@pytest.mark.usefixtures("box")
def test_a_shell_reads_commands_from_a_pipe(jhansi):
    answer = jhansi("shell", "box", input="echo $((6 * 7)); exit 3\n")
    assert (answer.returncode, answer.stdout) == (3, "42\n")


@pytest.mark.usefixtures("box")
def test_ctrl_c_ends_a_command_of_ours_quietly(start):
    process = start("audit", "show", "--follow")
    assert process.stdout.readline().startswith("TIME")
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == ""
    assert process.returncode == 130


def test_ctrl_c_ends_the_build_that_a_first_exec_began(start, jhansi, tmp_path):
    (tmp_path / "main.py").write_text("")
    jhansi("create", "--name", "first")
    jhansi("put", "first", tmp_path / "main.py")
    process = start("exec", "first", "main.py")
    assert process.stderr.readline().startswith("jhansi-run: building")
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130
    assert document(jhansi("rootfs", "ls", "--json")) == []


@pytest.mark.usefixtures("box")
def test_a_reader_that_left_ends_a_listing_quietly(jhansi):
    reader, writer = os.pipe()
    os.close(reader)
    answer = jhansi("ls", capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (answer.returncode, answer.stderr) == (141, "")


@pytest.mark.usefixtures("box")
def test_a_full_disk_under_our_output_is_an_error(jhansi):
    with open("/dev/full", "w", encoding="ascii") as full:
        answer = jhansi("ls", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert answer.returncode == 125
    assert answer.stderr == "jhansi-run: error: No space left on device\n"


def test_started_with_stdio_closed_it_writes_into_no_file_of_its_own(jhansi, environment):
    argv = command(["create", "--rootfs", "host"], environment)
    closed = ["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', *argv]
    assert subprocess.run(closed, env=environment, check=False).returncode == 0
    assert jhansi("audit", "verify").returncode == 0
    assert len(document(jhansi("ls", "--json"))) == 1
