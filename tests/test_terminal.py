"""A terminal over a WebSocket, as a person would use one: a real server, real shells, a real editor."""

import json
import os
import re
import signal
import socket as sockets
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import httpx
import psutil
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Subprotocol

WAIT = 60  # seconds, for what takes a fraction of one
MIB = 1024 * 1024
MISSING = "sb_0000000000000000"
# Starts the server as `jhansi-run serve` does, but one that loses patience with a stalled client within a second.
IMPATIENT = """
import sys
from jhansi_runtime.api import terminal
from jhansi_runtime.cli import run
terminal.STALLED_SECONDS = 1
sys.exit(run(sys.argv[1:]))
"""
PROMPT = b"$ "
PASTE_MODE = re.compile(rb"\x1b\[\?2004(?:h|l\r)")  # bash asks for it at each prompt
PROGRAMS = {
    "winch.py": """
import os, signal
signal.signal(signal.SIGWINCH, lambda *_: os.write(1, b"now %d %d\\n" % tuple(reversed(os.get_terminal_size()))))
os.write(1, b"ready\\n")
while True:
    signal.pause()
""",
    "deaf.py": """
import os, signal, time, tty
tty.setraw(0)
os.write(1, b"ready")
signal.signal(signal.SIGUSR1, lambda *_: None)
time.sleep(600)
""",
    "echo.py": """
import os, sys, tty
tty.setraw(0)
os.write(1, b"ready")
left = int(sys.argv[1])
while left:
    content = os.read(0, left)
    left -= len(content)
    while content:
        content = content[os.write(1, content) :]
""",
    "flood.py": "import os\nwhile True: os.write(1, b'x' * 4000)\n",
    # Takes as long as it may to end, and leaves a child that would live on.
    "stubborn.py": """
import os, signal, time
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
    signal.signal(number, signal.SIG_IGN)
os.fork()
os.write(1, b"ready\\n")
time.sleep(600)
""",
    # An editor for a host without one: the whole screen, keys as they are typed, ^S saves, ^X leaves.
    "editor.py": """
import curses, sys
def main(screen):
    curses.raw()
    text = ""
    while True:
        screen.erase()
        screen.addstr(0, 0, text)
        screen.addstr(curses.LINES - 1, 0, "EDITING")
        key = screen.getch()
        if key == 19:
            open(sys.argv[1], "w").write(text)
        elif key == 24:
            return
        elif key in (127, curses.KEY_BACKSPACE):
            text = text[:-1]
        elif key != curses.KEY_RESIZE:
            text += chr(key)
curses.wrapper(main)
""",
}


class Server:
    """A server under test, with a sandbox of the host's own programs."""

    def __init__(self, environment, *words, program=("-m", "jhansi_runtime")):
        argv = [sys.executable, *program, "serve", "--port=0", *words]
        self.environment = environment
        self.process = subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE, text=True)
        self.lines = []
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("{") and json.loads(line)["event"] == "server.ready":
                break
        else:
            raise AssertionError(f"ended with {self.process.wait()}: {''.join(self.lines)}")
        addresses = json.loads(line)["addresses"]
        self.port = int(next(address for address in addresses if address != "unix").rpartition(":")[2])
        # Nobody else empties the pipe, and a full one would stop the server.
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr))
        self._reader.start()

    def close(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(WAIT) == 0, "".join(self.lines)
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join()
            self.process.stderr.close()

    @property
    def http(self):
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=WAIT)

    def box(self):
        with self.http as http:
            sandbox = http.post("/v1/sandboxes", json={"rootfs": "host"}).json()["id"]
            for name, source in PROGRAMS.items():
                http.put(f"/v1/sandboxes/{sandbox}/files/{name}", content=source.encode()).raise_for_status()
        return sandbox

    @contextmanager
    def open(self, sandbox, query="", **options):
        url = f"ws://127.0.0.1:{self.port}/v1/sandboxes/{sandbox}/terminal?{query}"
        with connect(url, **({"compression": None, "close_timeout": WAIT} | options)) as socket:
            yield Terminal(socket)

    def descendants(self):
        return psutil.Process(self.process.pid).children(recursive=True)

    def jobs(self):
        """The processes of jobs. What waits in a launcher has no command line, what waits in the attendant its own."""
        helpers = [_command_line(one) for one in psutil.Process(self.process.pid).children()]
        return [one for one in self.descendants() if any(_command_line(one)) and _command_line(one) not in helpers]

    def descriptors(self):
        return sorted(
            target
            for target in (_link(f"/proc/{self.process.pid}/fd/{name}") for name in _names(self.process.pid))
            if "ptmx" in target or "/pts/" in target
        )

    def ended(self, sandbox):
        """The exec.end records of the sandbox."""
        with self.http as http:
            records = http.get("/v1/audit", params={"sandbox": sandbox}).json()
        return [record for record in records if record["event"] == "exec.end"]


class Terminal:
    """A client: what came so far, and what a person does."""

    def __init__(self, socket):
        self.socket = socket
        self.screen = b""
        self.exit = None

    def type(self, keys):
        self.socket.send(keys)

    def resize(self, rows, columns):
        self.socket.send(json.dumps({"resize": {"rows": rows, "columns": columns}}))

    def until(self, pattern):
        """Wait until it is on the screen, and take everything up to it off; returns the match."""
        deadline = time.monotonic() + WAIT
        while not (match := re.search(pattern, self.screen, re.DOTALL)):
            self.take(deadline - time.monotonic())
        self.screen = self.screen[match.end() :]
        return match

    def take(self, seconds=WAIT):
        try:
            frame = self.socket.recv(timeout=max(0, seconds))
        except TimeoutError:
            raise AssertionError(f"nothing more came after {self.screen!r}") from None
        assert self.exit is None, "a frame after the last one"
        if isinstance(frame, str):
            self.exit = json.loads(frame)["exit"]
        else:
            self.screen = PASTE_MODE.sub(b"", self.screen + frame)

    def closed(self):
        """Wait for the end: the close code and reason."""
        try:
            while True:
                self.take()
        except ConnectionClosed:
            return self.socket.close_code, self.socket.close_reason


def _names(pid):
    return os.listdir(f"/proc/{pid}/fd")


def _link(path):
    try:
        return os.readlink(path)
    except FileNotFoundError:  # closed meanwhile
        return ""


def _command_line(process):
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # ended meanwhile
        return []


def eventually(condition):
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def serving(environment, *words, **options):
    server = Server(environment, *words, **options)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def environment(runtime_environment, tmp_path_factory):
    """One with settings for few terminals."""
    config = tmp_path_factory.mktemp("config") / "config.toml"
    config.write_text("[server]\nmax_terminals = 2\n")
    return runtime_environment | {"JHANSI_CONFIG": str(config)}


@pytest.fixture(scope="module")
def server(environment, tmp_path_factory):
    with serving(environment, f"--socket={tmp_path_factory.mktemp('run')}/a.sock") as server:
        yield server


@pytest.fixture(scope="module")
def box(server):
    return server.box()


@pytest.fixture(autouse=True)
def _nothing_is_left(request):
    """After each test: no process of a job, no terminal, and none counted as open."""
    yield
    if "server" in request.fixturenames:
        server = request.getfixturevalue("server")
        eventually(lambda: server.descriptors() == [])
        with server.http as http:
            assert "\njhansi_terminals 0.0\n" in http.get("/metrics").text


# --- a session ------------------------------------------------------------------------------------------------


def test_a_shell_prompts_echoes_runs_and_says_how_it_ended(server, box):
    with server.open(box) as terminal:
        terminal.until(re.escape(PROMPT))
        terminal.type(b"echo $((6 * 7)) $TERM; tty; pwd\r")
        assert terminal.until(rb"echo.*?\r\n(.*?)\r\n(.*?)\r\n(.*?)\r\n").groups() == (
            b"42 xterm-256color",
            b"/dev/pts/0",
            b"/workspace",
        )
        terminal.type(b"exit 3\r")

        assert terminal.closed() == (1000, "")
        assert terminal.exit["status"] == "exited"
        assert terminal.exit["exit_code"] == 3
        assert terminal.exit["sandbox_id"] == box
        assert terminal.exit["limits"]["timeout"] == 86_400

    record = server.ended(box)[-1]
    assert (record["run_id"], record["exit_code"]) == (terminal.exit["run_id"], 3)


def test_a_session_as_a_person_has_it(server, box):
    """The size, a change of it, a program that is interrupted, an editor, and out."""
    with server.open(box, "rows=30&columns=100") as terminal:
        terminal.until(re.escape(PROMPT))
        terminal.type(b"stty size\r")
        terminal.until(rb"\r\n30 100\r\n")
        terminal.resize(40, 120)
        terminal.type(b"stty size\r")
        terminal.until(rb"\r\n40 120\r\n")

        began = time.monotonic()
        terminal.type(b"sleep 100\r")
        terminal.until(rb"sleep 100\r\n")
        time.sleep(0.2)  # a person would not be faster either
        terminal.type(b"\x03")
        terminal.until(rb"\^C.*" + re.escape(PROMPT))
        terminal.type(b"echo status $?\r")
        terminal.until(rb"\r\nstatus 130\r\n")
        assert time.monotonic() - began < 10

        terminal.type(b"exit\r")
        assert terminal.closed() == (1000, "")
        assert terminal.exit["exit_code"] == 0


@pytest.mark.parametrize("editor", ["vim", "curses"])
def test_a_text_is_written_in_an_editor(server, box, editor):
    with server.open(box, "rows=20&columns=60") as terminal:
        terminal.until(re.escape(PROMPT))
        if editor == "vim":
            terminal.type(b"command -v vim.tiny || command -v vi || echo none\r")
            vim = terminal.until(rb"none\r\n(\S+)\r\n")[1]
            if vim == b"none":
                pytest.skip("this host has no vi")
            terminal.type(b"%s -u NONE -N --noplugin letter.txt\r" % vim)
            terminal.until(rb"letter\.txt")
            terminal.type(b"iDear reader,\rtoo looong\x7f\x7f\x7f\x7f\x7fong.")
            terminal.until(rb"reader,")
            terminal.resize(15, 50)
            terminal.type(b"\x1b")
            time.sleep(0.2)  # or it were the start of a key that sends more
            terminal.type(b":set columns? lines?\r")
            terminal.until(rb"columns=50.*?lines=15")
            terminal.type(b"\r:wq\r")
        else:
            terminal.type(b"python3 editor.py letter.txt\r")
            terminal.until(rb"EDITING")
            terminal.type(b"Dear reader,\r\x7f\ntoo long.?\x7f\n\x13\x18")
        terminal.until(re.escape(PROMPT))
        terminal.type(b"exit\r")
        assert terminal.closed() == (1000, "")

    with server.http as http:
        assert http.get(f"/v1/sandboxes/{box}/files/letter.txt").text == "Dear reader,\ntoo long.\n"


def test_a_resize_reaches_the_job_as_a_signal(server, box):
    with server.open(box, "command=python3&command=winch.py&rows=10&columns=10") as terminal:
        terminal.until(rb"ready\r\n")
        for rows, columns in ((11, 20), (1, 1), (10_000, 10_000)):
            terminal.resize(rows, columns)
            terminal.until(rb"now %d %d\r\n" % (rows, columns))


def test_the_type_of_the_terminal_can_be_said(server, box):
    with server.open(box, "command=sh&command=-c&command=echo%20$TERM%3Bexit%207&term=vt100") as terminal:
        assert terminal.closed() == (1000, "")
        assert (terminal.screen, terminal.exit["exit_code"]) == (b"vt100\r\n", 7)


def test_what_is_typed_before_the_job_is_there_is_echoed_once(server, box):
    with server.open(box, "command=head&command=-n1") as terminal:
        terminal.type(b"hello\r")
        assert terminal.closed() == (1000, "")
        assert terminal.screen == b"hello\r\n" * 2


def test_all_that_was_written_before_the_end_arrives_in_order(server, box):
    with server.open(box, "command=seq&command=300000") as terminal:
        assert terminal.closed() == (1000, "")
        assert terminal.screen == b"".join(b"%d\r\n" % number for number in range(1, 300_001))


def test_every_byte_goes_both_ways(server, box):
    content = bytes(range(256)) * 2000
    with server.open(box, f"command=python3&command=echo.py&command={len(content)}") as terminal:
        terminal.until(rb"ready")
        sender = threading.Thread(target=terminal.type, args=(content,))
        sender.start()
        assert terminal.closed() == (1000, "")
        sender.join()
        assert terminal.screen == content


# --- what ends it otherwise -----------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["", "command=python3&command=stubborn.py"])
@pytest.mark.parametrize("leave", ["close", "vanish"])
def test_a_client_that_leaves_ends_the_job_and_all_it_started(server, program, leave):
    box = server.box()
    with server.open(box, "command=true") as terminal:
        terminal.closed()
    idle = len(server.descendants())
    with server.open(box, program) as terminal:
        terminal.until(rb"ready" if program else re.escape(PROMPT))
        if not program:
            terminal.type(b"sleep 500 &\r")
            terminal.until(re.escape(PROMPT))
        assert server.jobs()
        if leave == "vanish":
            vanish(terminal.socket)
    eventually(lambda: len(server.ended(box)) == 2)

    assert server.ended(box)[1]["status"] in {"cancelled", "signaled", "exited"}
    assert server.jobs() == []
    eventually(lambda: len(server.descendants()) <= idle)


def test_a_client_that_takes_nothing_costs_no_memory_and_holds_up_nobody(server, box):
    memory = psutil.Process(server.process.pid).memory_info
    with server.open(box) as terminal, server.http as http:  # what a terminal loads at all is loaded
        terminal.until(re.escape(PROMPT))
        before = memory().rss
        with server.open(box, "command=python3&command=flood.py", max_queue=1, close_timeout=0.1):
            for _ in range(30):
                began = time.monotonic()
                assert http.get(f"/v1/sandboxes/{box}").status_code == 200
                assert time.monotonic() - began < 2
                time.sleep(0.1)
            terminal.type(b"echo $((1 + 1))\r")
            terminal.until(rb"\r\n2\r\n")
            assert memory().rss - before < 32 * MIB


def test_what_a_job_does_not_read_waits_with_the_client(server, box):
    memory = psutil.Process(server.process.pid).memory_info
    with server.open(box, "command=python3&command=deaf.py") as terminal, server.http as http:
        terminal.until(rb"ready")
        before = memory().rss
        sent = 0

        def type_on():
            nonlocal sent
            with suppress(ConnectionClosed, OSError):
                while True:
                    terminal.type(b"x" * 65536)
                    sent += 65536

        typing = threading.Thread(target=type_on)
        typing.start()
        seen = None
        while seen != sent:  # the kernel's own buffers grow for a while
            seen = sent
            time.sleep(1)
            assert sent < 32 * MIB
        assert http.get(f"/v1/sandboxes/{box}").status_code == 200
        assert memory().rss - before < 32 * MIB
        vanish(terminal.socket)
        typing.join()
    eventually(lambda: server.jobs() == [])


def test_a_client_that_takes_nothing_for_too_long_is_given_up(environment, tmp_path):
    with serving(environment, f"--socket={tmp_path}/a.sock", program=("-c", IMPATIENT)) as server:
        box = server.box()
        with server.open(box, "command=python3&command=flood.py", max_queue=1, close_timeout=0.1):
            eventually(lambda: server.ended(box))
            assert server.ended(box)[0]["status"] in {"signaled", "cancelled"}
            eventually(lambda: server.descriptors() == [])


def test_a_server_that_stops_ends_its_terminals(environment, tmp_path):
    with serving(environment, f"--socket={tmp_path}/a.sock") as server:
        box = server.box()
        with server.open(box) as shell, server.open(box, "command=python3&command=stubborn.py") as stubborn:
            shell.until(re.escape(PROMPT))
            stubborn.until(b"ready")
            children = server.descendants()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(WAIT) == 0
            assert shell.closed()[0] == 1012
    assert not [child for child in children if child.is_running()]
    log = "".join(server.lines)
    assert "defect" not in log
    assert "exception" not in log


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ("ls", 1003),
        ("", 1003),
        ("[" * 100_000, 1008),
        ("{}", 1008),
        ('{"resize": {"rows": 0, "columns": 80}}', 1008),
        ('{"resize": {"rows": 24, "columns": 10001}}', 1008),
        ('{"resize": {"rows": 24}}', 1008),
        ('{"resize": {"rows": 24, "columns": 80}, "kill": true}', 1008),
    ],
)
def test_a_frame_that_is_none_of_the_protocol_ends_it(server, box, frame, code):
    with server.open(box) as terminal:
        terminal.until(re.escape(PROMPT))
        terminal.socket.send(frame)

        closed_with, reason = terminal.closed()
        assert closed_with == code
        assert reason


def test_a_program_that_is_not_there_is_told_of(server, box):
    with server.open(box, "command=/no/such/program") as terminal:
        code, reason = terminal.closed()
        assert code == 4404
        assert "/no/such/program" in reason
        assert len(reason.encode()) <= 123


@pytest.mark.parametrize(
    "query", ["rows=0", "columns=10001", "rows=many", "term=a%20b", "term=vt100%0A", "term=", "colour=red"]
)
def test_a_bad_query_is_refused_by_name(server, box, query):
    problem = refusal(server, box, 422, query)
    assert query.partition("=")[0] in problem["detail"]


def test_what_is_not_there_is_refused_before_the_handshake(server):
    problem = refusal(server, MISSING, 404)
    assert problem["title"] == "Not Found"


def test_a_page_of_another_origin_is_refused(server, box):
    assert "origin" in refusal(server, box, 403, origin="http://evil.example")["detail"]


def test_a_page_that_reached_us_by_a_name_of_its_own_is_refused(server, box):
    headers = {"Host": "evil.example", "Connection": "Upgrade", "Upgrade": "websocket"}
    headers |= {"Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
    with server.http as http:
        answer = http.get(f"/v1/sandboxes/{box}/terminal", headers=headers)
    assert answer.status_code == 403
    assert "Host" in answer.json()["detail"]


def test_a_page_of_the_servers_own_is_let_in(server, box):
    with server.open(box, "command=true", origin=f"http://127.0.0.1:{server.port}") as terminal:
        assert terminal.closed() == (1000, "")


def test_no_more_terminals_than_the_settings_say(server, box):
    with server.open(box) as one, server.open(box) as other:
        one.until(re.escape(PROMPT))
        other.until(re.escape(PROMPT))
        with server.open(box) as third:
            code, reason = third.closed()
        assert code == 1013
        assert "2 terminals" in reason
        one.type(b"exit\r")
        one.closed()
        with server.open(box, "command=true") as again:
            assert again.closed() == (1000, "")


# --- keys -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keyed(runtime_environment, tmp_path_factory):
    """A server with keys: itself, one key that may do all, one with one exec at a time, one that may not exec."""
    home = tmp_path_factory.mktemp("keyed")
    (home / "rootfs").symlink_to(os.path.join(runtime_environment["JHANSI_HOME"], "rootfs"))
    environment = runtime_environment | {"JHANSI_HOME": str(home)}

    def create(*words):
        argv = [sys.executable, "-m", "jhansi_runtime", "keys", "create", *words]
        answer = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
        return re.search(r"jk_\S+", answer.stdout)[0]

    own = create("--scope=read", "--scope=write", "--scope=exec", "--max-execs=1")
    other = create("--scope=read", "--scope=write", "--scope=exec")
    reader = create("--scope=read")
    with serving(environment, f"--socket={home}/a.sock") as server, server.http as http:
        answer = http.post("/v1/sandboxes", json={"rootfs": "host"}, headers={"Authorization": f"Bearer {own}"})
        assert answer.status_code == 201, answer.text
        yield server, answer.json()["id"], own, other, reader


def bearer(key):
    return {"additional_headers": {"Authorization": f"Bearer {key}"}}


def test_a_key_opens_a_terminal_in_a_sandbox_of_its_own(keyed):
    server, box, own, other, reader = keyed
    with server.open(box, "command=true", **bearer(own)) as terminal:
        assert terminal.closed() == (1000, "")
        assert terminal.socket.subprotocol is None

    assert refusal(server, box, 401)["title"] == "Unauthorized"
    refusal(server, box, 401, **bearer("jk_wrong"))
    refusal(server, box, 403, **bearer(reader))
    theirs, nobodys = refusal(server, box, 404, **bearer(other)), refusal(server, MISSING, 404, **bearer(other))
    assert theirs["detail"].replace(box, MISSING) == nobodys["detail"]


def test_a_key_can_be_sent_as_a_subprotocol_and_is_not_sent_back(keyed):
    server, box, own, _, _ = keyed
    offered = [Subprotocol("jhansi.terminal"), Subprotocol(f"jhansi.key.{own}")]
    with server.open(box, "command=true", subprotocols=offered) as terminal:
        assert terminal.closed() == (1000, "")
        assert terminal.socket.subprotocol == "jhansi.terminal"
        assert own not in str(terminal.socket.response.headers)
    refusal(server, box, 401, subprotocols=[offered[0], Subprotocol("jhansi.key.jk_wrong")])
    assert own not in "".join(server.lines)


def test_a_terminal_is_one_of_the_execs_of_its_key(keyed):
    server, box, own, _, _ = keyed
    with server.open(box, **bearer(own)) as terminal, server.http as http:
        terminal.until(re.escape(PROMPT))
        body = {"command": ["true"]}
        answer = http.post(f"/v1/sandboxes/{box}/exec", json=body, headers=bearer(own)["additional_headers"])
        assert answer.status_code == 429
        with server.open(box, **bearer(own)) as second:
            assert second.closed()[0] == 1013


def refusal(server, box, status, query="", **options):
    """The problem document that came in place of the handshake."""
    with pytest.raises(InvalidStatus) as refused, server.open(box, query, **options):
        pass
    response = refused.value.response
    assert response.status_code == status
    assert response.headers["Content-Type"] == "application/problem+json"
    return json.loads(response.body)


def vanish(socket):
    """Be gone without a word, as a client that was killed."""
    socket.socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, struct.pack("ii", 1, 0))
    socket.socket.shutdown(sockets.SHUT_RDWR)  # the library's thread then closes it
