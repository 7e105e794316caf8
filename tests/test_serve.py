"""The server process from outside: real processes, sockets and signals, mostly around an application of the test's."""

import fcntl
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import pytest
from conftest import CHECKOUT, environment_with, host_lacks
from websockets.sync.client import connect, unix_connect

TINY = """
import asyncio, json, os, sys, time
from contextlib import asynccontextmanager
from litestar import Litestar, Request, WebSocket, get, websocket
from jhansi_runtime.server import httpd
from jhansi_runtime.cli import fail
from jhansi_runtime.errors import JhansiError
from jhansi_runtime.server.listening import Where, adopt, listen, passed_descriptors
from jhansi_runtime.logs import configure, log
from jhansi_runtime.server.supervision import Supervisor

how = json.loads(sys.argv[1])
httpd.HEAD_TIMEOUT = how.get("head_timeout", httpd.HEAD_TIMEOUT)
httpd.LAST_RESORT = how.get("last_resort", httpd.LAST_RESORT)

@get("/")
async def who(request: Request) -> dict:
    return {"unix": request.scope["state"]["over_unix_socket"]}

def note(scope):
    log("noted", type=scope["type"], unix=scope["state"]["over_unix_socket"] or scope["client"] is None)

@get("/note")
async def noted(request: Request) -> None:
    note(request.scope)

@get("/slow")
async def slow(seconds: float) -> str:
    log("slow")
    await asyncio.sleep(seconds)
    return "done"

@get("/stuck", sync_to_thread=True)
def stuck() -> None:
    log("stuck")
    time.sleep(60)

@get("/defect")
async def defect() -> None:
    raise OSError(2, "No such file", "/a/secret/path")

@websocket("/ws")
async def echo(socket: WebSocket) -> None:
    note(socket.scope)
    await socket.accept()
    await socket.send_json({"unix": socket.scope["state"]["over_unix_socket"]})
    await socket.close()

@asynccontextmanager
async def lifespan(app):
    if how.get("fails"):
        raise ValueError("a secret")
    yield
    log("closed")

configure()
app = Litestar([who, noted, slow, stuck, defect, echo], lifespan=[lifespan], logging_config=None, openapi_config=None)
passed = passed_descriptors(os.environ)
where = Where(how.get("host"), 0, how["path"])
try:
    with adopt(passed, has_keys=False) if passed else listen(where, has_keys=False) as listeners:
        orderly = httpd.serve(
            app, listeners, grace=how.get("grace", 5), supervisor=Supervisor.from_environment(os.environ)
        )
except JhansiError as error:
    sys.exit(fail(str(error)))
sys.exit(0 if orderly else 1)
"""
# Runs a program with a socket, its standard input, passed the way of sd_listen_fds(3).
LAUNCHER = """
import os, sys
os.dup2(0, 3)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
os.execv(sys.argv[1], sys.argv[1:])
"""
# Makes and removes a folder, which works as long as nobody else does so at the same time.
CONTENDER = """
import os, sys, time
from contextlib import suppress
from jhansi_runtime.errors import ConflictError
from jhansi_runtime.server.listening import _lock

path, end = sys.argv[1], time.monotonic() + 2
while time.monotonic() < end:
    with suppress(ConflictError), _lock(path):
        os.mkdir(path)
        os.rmdir(path)
"""
WAIT = 60  # seconds, for what takes a fraction of one


class Server:
    """A server under test: its process, its log, and how to reach it."""

    def __init__(self, argv, environment, stdin=subprocess.DEVNULL):
        # A pipe for the log: none of these tests makes more than fits into it.
        self.process = subprocess.Popen(argv, env=environment, stdin=stdin, stderr=subprocess.PIPE, text=True)
        self.lines = []

    def until(self, event):
        """The log's next line of this event."""
        while line := self.process.stderr.readline():
            self.lines.append(line)
            if line.startswith("{") and json.loads(line)["event"] == event:
                return json.loads(line)
        raise AssertionError(f"ended with {self.process.wait()} before {event!r}: {''.join(self.lines)}")

    def ready(self):
        self.addresses = self.until("server.ready")["addresses"]
        return self

    @property
    def url(self):
        return next(address for address in self.addresses if address != "unix")

    @property
    def port(self):
        return int(self.url.rpartition(":")[2])

    def end(self, number=signal.SIGTERM):
        """Exit status and the rest of the log."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self):
        rest = self.process.communicate(timeout=WAIT)[1]
        self.lines.append(rest)
        return self.process.returncode, rest


@pytest.fixture
def start(tmp_path):
    """`start(**how)` starts the tiny application's server; whatever is still there in the end is killed."""
    started = []

    def start(*, environment=None, launcher=(), stdin=subprocess.DEVNULL, **how):
        how = {"path": str(tmp_path / "run" / "a.sock"), "host": "127.0.0.1"} | how
        argv = [*launcher, sys.executable, "-c", TINY, json.dumps(how)]
        server = Server(argv, os.environ | {"PYTHONPATH": CHECKOUT} | (environment or {}), stdin)
        started.append(server)
        return server

    yield start
    for server in started:
        with server.process:
            server.process.kill()


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "run" / "a.sock")


@pytest.fixture
def serve(tmp_path):
    """`serve(*words)` starts `jhansi-run serve`, with an installation of its own."""
    started = []

    def serve(*words, **variables):
        argv = [sys.executable, "-m", "jhansi_runtime", "serve", "--port=0", *words]
        server = Server(argv, environment_with(tmp_path / "home") | variables)
        started.append(server)
        return server

    yield serve
    for server in started:
        with server.process:
            server.process.kill()


def over(path):
    return httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://localhost")


@contextmanager
def raw(port):
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT) as connection:
        yield connection


def until(connection, end):
    """What comes up to this end."""
    received = b""
    while not received.endswith(end):
        chunk = connection.recv(65536)
        assert chunk, received
        received += chunk
    return received


def everything(connection):
    """What comes until the server closes."""
    chunks = []
    while chunk := connection.recv(65536):
        chunks.append(chunk)
    return b"".join(chunks)


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def run(words, environment):
    argv = [sys.executable, "-m", "jhansi_runtime", *words]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, timeout=WAIT)


# --- serving ---


def test_it_answers_over_tcp_and_the_unix_socket_and_the_application_knows_which(start, path):
    server = start().ready()

    with over(path) as client:
        assert client.get("/").json() == {"unix": True}
    answer = httpx.get(server.url)
    assert answer.json() == {"unix": False}
    assert "server" not in answer.headers
    with unix_connect(path, "ws://localhost/ws") as terminal:
        assert json.loads(terminal.recv()) == {"unix": True}
    with connect(f"{server.url}/ws".replace("http", "ws")) as terminal:
        assert json.loads(terminal.recv()) == {"unix": False}


UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


@pytest.mark.parametrize(
    ("kind", "request_"), [("http", b"GET /note HTTP/1.1\r\nHost: a\r\n\r\n"), ("websocket", UPGRADE)]
)
@pytest.mark.parametrize("is_known", [False, True], ids=["before it is accepted", "afterwards"])
def test_a_tcp_client_that_is_gone_is_not_taken_for_one_on_the_unix_socket(start, kind, request_, is_known):
    server = start().ready()
    for _ in range(5):
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT)
        with connection:
            if is_known:
                connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
                until(connection, b"}")
            server.process.send_signal(signal.SIGSTOP)  # it finds the request and the reset at once
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.sendall(request_)
        server.process.send_signal(signal.SIGCONT)
        if not is_known:
            noted = server.until("noted")
            assert noted["type"] == kind
    httpx.get(f"{server.url}/note")
    server.end()

    noted = [json.loads(line) for line in "".join(server.lines).splitlines() if '"noted"' in line]
    assert noted
    assert not [line for line in noted if line["unix"]]


def test_the_log_is_json_and_names_no_path_of_the_host(start):
    server = start().ready()
    assert httpx.get(f"{server.url}/defect").status_code == 500
    with raw(server.port) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        everything(connection)
    status, _ = server.end()

    assert status == 0
    lines = [json.loads(line) for line in "".join(server.lines).splitlines()]
    assert {"time", "level", "event"} <= set.intersection(*(set(line) for line in lines))
    assert "secret" not in "".join(server.lines)
    assert CHECKOUT not in "".join(server.lines)


def test_an_application_that_does_not_start_is_an_error_and_its_message_stays_out_of_the_log(start, path):
    status, log = start(fails=True).wait()

    assert status == 125
    assert "did not start" in log
    assert "ValueError" in log
    assert "a secret" not in log
    assert not os.path.exists(path)


# --- what a client may not do ---


def test_a_head_that_does_not_come_is_not_waited_for(start):
    server = start(head_timeout=0.3).ready()
    with raw(server.port) as silent, raw(server.port) as slow, raw(server.port) as idle:
        slow.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n")
        idle.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert until(idle, b"}").startswith(b"HTTP/1.1 200 ")
        idle.sendall(b"\r\n")

        assert everything(silent) == b""
        assert everything(slow).startswith(b"HTTP/1.1 408 ")
        assert everything(idle) == b""


def test_a_request_may_take_longer_than_its_head(start):
    server = start(head_timeout=0.3).ready()

    with raw(server.port) as connection:
        connection.sendall(b"GET /slow?seconds=1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\nGET / HT")
        assert everything(connection).endswith(b"done")


@pytest.mark.parametrize("end", [b"\r\n\r\n", b""], ids=["whole", "without an end"])
def test_a_large_head_is_refused(start, end):
    server = start().ready()
    with raw(server.port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nX: ")
        for _ in range(3):
            time.sleep(0.05)  # it is read in several pieces
            connection.sendall(b"x" * 30_000)
        connection.sendall(end)
        head, _, body = everything(connection).partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 431 ")
    assert b"application/problem+json" in head
    assert json.loads(body)["status"] == 431


def test_a_request_that_is_not_http_gets_a_problem_document(start):
    server = start().ready()
    with raw(server.port) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        head, _, body = everything(connection).partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["title"] == "Bad Request"


# --- the end ---


def test_sigterm_lets_a_request_in_flight_end_and_takes_no_new_one(start, path):
    server = start().ready()
    with raw(server.port) as connection, raw(server.port) as idle:
        connection.sendall(b"GET /slow?seconds=1 HTTP/1.1\r\nHost: a\r\n\r\n")
        server.until("slow")
        server.process.send_signal(signal.SIGTERM)
        server.until("server.stopping")
        assert everything(idle) == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port), timeout=WAIT)

        assert everything(connection).endswith(b"done")
    status, log = server.wait()
    assert status == 0
    assert '"closed"' in log
    assert not os.path.exists(path)


@pytest.mark.parametrize(("grace", "signals"), [(30, 2), (0.2, 1)], ids=["a second signal", "the grace is over"])
def test_what_does_not_end_is_cut_off_and_the_application_still_shuts_down(start, grace, signals):
    server = start(grace=grace).ready()
    with raw(server.port) as connection:
        connection.sendall(b"GET /slow?seconds=60 HTTP/1.1\r\nHost: a\r\n\r\n")
        server.until("slow")
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        server.until("server.stopping")
        if signals == 2:
            server.process.send_signal(signal.SIGTERM)
        status, log = server.wait()

    assert time.monotonic() - began < 5
    assert status == 0
    assert '"closed"' in log


def test_a_thread_that_never_ends_does_not_keep_it(start):
    server = start(grace=0.1, last_resort=1).ready()
    with raw(server.port) as connection:
        connection.sendall(b"GET /stuck HTTP/1.1\r\nHost: a\r\n\r\n")
        server.until("stuck")

        status, log = server.end()
    assert status == -signal.SIGALRM
    assert '"closed"' in log


def test_sigint_ends_it_too(start):
    assert start().ready().end(signal.SIGINT)[0] == 0


# --- the Unix socket ---


def test_only_this_user_may_open_the_socket_and_nothing_of_it_is_left(start, path):
    server = start().ready()

    assert mode(path) == 0o600
    assert mode(os.path.dirname(path)) == 0o700
    assert server.end()[0] == 0
    assert os.listdir(os.path.dirname(path)) == []


def test_what_a_killed_server_left_is_replaced(start, path):
    assert start().ready().end(signal.SIGKILL)[0] == -signal.SIGKILL
    assert os.path.exists(path)

    start().ready()
    with over(path) as client:
        assert client.get("/").status_code == 200


def test_a_live_server_is_not_disturbed(start, path):
    start().ready()

    status, log = start().wait()
    assert status == 125
    assert "is running" in log
    with over(path) as client:
        assert client.get("/").status_code == 200


def test_of_several_that_start_at_once_one_serves(start, path):
    assert start(host=None).ready().end(signal.SIGKILL)[0] == -signal.SIGKILL  # they all find its socket
    servers = [start(host=None) for _ in range(4)]
    deadline = time.monotonic() + WAIT
    while sum(server.process.poll() is None for server in servers) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.05)

    (winner,) = [server for server in servers if server.process.poll() is None]
    winner.ready()
    with over(path) as client:
        assert client.get("/").status_code == 200
    assert [server.process.returncode for server in servers if server is not winner] == [125] * 3


def test_one_that_has_not_begun_to_listen_yet_is_found(start, path):
    os.mkdir(os.path.dirname(path))
    with open(f"{path}.lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as it would hold it
        status, log = start().wait()

    assert status == 125
    assert "is running" in log


def test_the_lock_goes_to_one_at_a_time_although_its_file_comes_and_goes(path):
    os.mkdir(os.path.dirname(path))
    argv = [sys.executable, "-c", CONTENDER, path]
    contenders = [subprocess.Popen(argv, env=os.environ | {"PYTHONPATH": CHECKOUT}) for _ in range(3)]

    assert [contender.wait(WAIT) for contender in contenders] == [0, 0, 0]
    assert os.listdir(os.path.dirname(path)) == []


def test_a_server_that_holds_no_lock_is_found_too(start, path):
    os.mkdir(os.path.dirname(path))
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen(1)
        status, log = start().wait()

    assert status == 125
    assert "is running" in log
    assert os.path.exists(path)


def test_a_file_in_the_place_of_the_socket_is_left_alone(start, path):
    os.mkdir(os.path.dirname(path))
    with open(path, "w", encoding="ascii") as file:
        file.write("mine")

    assert start().wait()[0] == 125
    with open(path, encoding="ascii") as file:
        assert file.read() == "mine"


def test_a_socket_that_another_has_put_there_since_is_left_alone(start, path):
    server = start().ready()
    os.unlink(path)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        assert server.end()[0] == 0
        assert os.path.exists(path)


def test_a_folder_in_which_others_may_replace_the_socket_is_refused(start, path):
    os.mkdir(os.path.dirname(path))
    os.chmod(os.path.dirname(path), 0o777)

    status, log = start().wait()
    assert status == 125
    assert "chmod go-w" in log


def test_a_path_that_is_too_long_for_a_socket_is_an_error(start, tmp_path):
    status, log = start(path=str(tmp_path / ("x" * 120))).wait()

    assert status == 125
    assert "shorter --socket" in log


# --- a supervisor ---


@contextmanager
def listening(family, address, mode=0o600):
    with socket.socket(family) as listener:
        listener.bind(address)
        if family == socket.AF_UNIX and isinstance(address, str):
            os.chmod(address, mode)
        listener.listen()
        yield listener


def start_with(start, passed):
    return start(launcher=[sys.executable, "-c", LAUNCHER], stdin=passed.fileno())


def test_sockets_that_were_passed_are_used_and_stay(start, tmp_path, path):
    place = str(tmp_path / "passed.sock")
    with listening(socket.AF_UNIX, place) as passed:
        server = start_with(start, passed).ready()
        with over(place) as client:
            assert client.get("/").json() == {"unix": True}
        assert server.addresses == ["unix"]
        assert server.end()[0] == 0
        assert os.path.exists(place)
    assert not os.path.exists(path)

    with listening(socket.AF_INET, ("127.0.0.1", 0)) as passed:
        server = start_with(start, passed).ready()
        assert httpx.get(f"http://127.0.0.1:{passed.getsockname()[1]}").json() == {"unix": False}


def test_sockets_that_anybody_may_connect_to_are_not_served_without_keys(start, tmp_path):
    refused = (
        (socket.AF_UNIX, str(tmp_path / "passed.sock"), "SocketMode=0600"),
        (socket.AF_UNIX, b"\0jhansi-test-%d" % os.getpid(), "SocketMode=0600"),
        (socket.AF_INET, ("0.0.0.0", 0), "keys create"),
    )
    for family, address, remedy in refused:
        with listening(family, address, mode=0o666) as passed:
            status, log = start_with(start, passed).wait()
        assert status == 125
        assert remedy in log


def test_what_was_passed_to_another_process_is_not_ours(start):
    server = start(environment={"LISTEN_PID": "1", "LISTEN_FDS": "1"}).ready()
    assert httpx.get(server.url).status_code == 200


@pytest.mark.parametrize("is_abstract", [False, True], ids=["path", "abstract"])
def test_the_supervisor_is_told(start, tmp_path, is_abstract):
    name = f"@jhansi-test-{os.getpid()}" if is_abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(name.replace("@", "\0", 1) if is_abstract else name)
        supervisor.settimeout(WAIT)
        server = start(environment={"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "200000"}).ready()
        told = [supervisor.recv(1000) for _ in range(6)]
        server.end()
        while select.select([supervisor], [], [], 0)[0]:
            told.append(supervisor.recv(1000))

    assert told.count(b"READY=1") == 1
    assert told.count(b"WATCHDOG=1") >= 5
    assert told.count(b"STOPPING=1") == 1
    assert told.index(b"READY=1") < told.index(b"STOPPING=1")


# --- jhansi-run serve ---


def test_the_command_serves_the_api_and_its_start_and_end_are_in_the_audit_log(serve, tmp_path):
    place = str(tmp_path / "run" / "a.sock")
    server = serve(f"--socket={place}").ready()
    assert httpx.get(f"{server.url}/openapi.json").status_code == 200
    with over(place) as client:
        assert client.get("/openapi.json").status_code == 200
    assert server.end()[0] == 0

    shown = run(["audit", "show", "--json"], environment_with(tmp_path / "home"))
    assert [record["event"] for record in json.loads(shown.stdout)] == ["server.start", "server.stop"]
    assert {tuple(record["addresses"]) for record in json.loads(shown.stdout)} == {("loopback", "unix")}
    assert os.listdir(tmp_path / "run") == []


def test_an_address_that_is_not_loopback_needs_keys(serve, tmp_path):
    status, log = serve("--host=0.0.0.0").wait()
    assert status == 125
    assert "jhansi-run keys create" in log

    created = run(["keys", "create", "--scope", "read"], environment_with(tmp_path / "home"))
    assert created.returncode == 0, created.stderr
    place = str(tmp_path / "run" / "a.sock")
    server = serve("--host=0.0.0.0", f"--socket={place}").ready()
    assert httpx.get(f"http://127.0.0.1:{server.port}/v1/sandboxes").status_code == 401
    with over(place) as client:
        assert client.get("/v1/sandboxes").status_code == 200


def test_without_tcp_there_is_the_socket_alone(serve):
    assert serve("--no-tcp").ready().addresses == ["unix"]


def test_a_port_that_is_taken_is_an_error_that_says_so(serve):
    with listening(socket.AF_INET, ("127.0.0.1", 0)) as other:
        status, log = serve(f"--port={other.getsockname()[1]}").wait()

    assert status == 125
    assert "--port" in log


def test_without_the_packages_of_the_server_the_error_says_what_to_install(tmp_path):
    program = "import sys; sys.modules['uvicorn'] = None; from jhansi_runtime.cli import run; sys.exit(run(['serve']))"
    answer = subprocess.run(
        [sys.executable, "-c", program], env=environment_with(tmp_path), capture_output=True, text=True, check=False
    )

    assert answer.returncode == 125
    assert "pip install 'jhansi-runtime[server]'" in answer.stderr


# --- the unit ---


@pytest.fixture
def install(tmp_path):
    def install(*words, **variables):
        environment = environment_with(tmp_path / "home") | {"XDG_CONFIG_HOME": str(tmp_path / "config")} | variables
        return run(["serve", "--install-unit", *words], environment)

    return install


@pytest.fixture
def units(tmp_path):
    return tmp_path / "config" / "systemd" / "user"


def test_the_unit_starts_this_program_with_these_options_and_variables(install, units, tmp_path):
    place = str(tmp_path / "a b%.sock")
    words = (f"--socket={place}", "--port=8123", "--grace=20s", "--allow-host=box.example")
    answer = install(*words, PETRI_WORKSPACE_ROOT='/with "quotes" 100%', JHANSI_API_KEY="jk_secret")

    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == (
        "systemctl --user daemon-reload\nsystemctl --user enable --now jhansi.socket jhansi.service\n"
    )
    service, sockets = (units / "jhansi.service").read_text(), (units / "jhansi.socket").read_text()
    escaped = place.replace("%", "%%")
    assert (
        f'ExecStart="{sys.executable}" "-m" "jhansi_runtime" "serve" "--host=127.0.0.1" "--port=8123" '
        f'"--socket={escaped}" "--grace=20s" "--allow-host=box.example"\n'
    ) in service
    assert 'Environment="PETRI_WORKSPACE_ROOT=/with \\"quotes\\" 100%%"\n' in service
    assert f'Environment="JHANSI_HOME={tmp_path}/home"\n' in service
    assert "jk_secret" not in service
    for line in ("Type=notify", "Delegate=yes", "KillMode=mixed", "Restart=on-failure", "TimeoutStopSec=50"):
        assert f"\n{line}\n" in service
    assert f"\nListenStream=127.0.0.1:8123\nListenStream={escaped}\nSocketMode=0600\n" in sockets


def test_a_unit_is_written_again_and_one_that_was_edited_is_left_alone(install, units):
    assert install("--port=8123").returncode == 0
    assert install("--port=8124").returncode == 0
    edited = (units / "jhansi.service").read_text().replace("Delegate=yes", "Delegate=no")
    (units / "jhansi.service").write_text(edited)
    answer = install("--port=8125")

    assert answer.returncode == 125
    assert "systemctl --user edit jhansi.service" in answer.stderr
    assert (units / "jhansi.service").read_text() == edited
    assert "8124" in (units / "jhansi.socket").read_text()
    assert sorted(os.listdir(units)) == ["jhansi.service", "jhansi.socket"]


def test_systemd_understands_the_units(install, units, tmp_path):
    assert install().returncode == 0
    argv = ["systemd-analyze", "--user", "--man=no", "verify", *map(str, units.iterdir())]
    try:
        answer = subprocess.run(
            argv, env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        host_lacks("systemd", "systemd-analyze is not installed")

    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")
