"""The client: its requests, retries and errors against a server that says what a test wants; then the real one."""

import contextlib
import gc
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import anyio
import pytest

from jhansi_runtime import errors
from jhansi_runtime.client import AsyncClient, Client, Output, Started
from jhansi_runtime.client.attempts import LONGEST_RETRY_AFTER
from jhansi_runtime.client.events import EventParser
from jhansi_runtime.client.transfer import CHUNK, Tree

SANDBOX = {"id": "sb_1", "language": "python", "created_at": "2026-01-01T00:00:00.000000Z"}
RESULT = {
    "run_id": "run_1",
    "sandbox_id": "sb_1",
    "status": "exited",
    "exit_code": 0,
    "signal": None,
    "stdout": None,
    "stderr": None,
    "stdout_bytes": 0,
    "stderr_bytes": 0,
    "stdout_truncated": False,
    "stderr_truncated": False,
    "wall_time_ms": 1.0,
    "cpu_time_ms": 1.0,
    "memory_peak_bytes": 1,
    "timed_out": False,
    "oom_killed": False,
    "message": "exited with status 0",
    "enforcement": "watchdog",
    "rootfs": "host",
    "limits": {},
    "started_at": "2026-01-01T00:00:00.000000Z",
}
START = {"run_id": "run_1", "sandbox_id": "sb_1", "started_at": "2026-01-01T00:00:00.000000Z"}


# --- a server that answers as it is told ---


class Answer:
    """What is sent for one request. `cut` closes the connection after the body, which is shorter than announced."""

    def __init__(self, status=200, content=b"", *, cut=False, **headers):
        self.status = status
        self.content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.cut = cut


NO_ANSWER = None  # the connection is closed once the request was read


class Scripted(ThreadingHTTPServer):
    """Answers the requests in order, the last answer for ever, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []
        super().__init__(("127.0.0.1", 0), _Exchange)

    @property
    def base_url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def lines(self):
        return [f"{method} {path}" for method, path, _, _ in self.asked]


class _Exchange(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self):
        server = self.server
        server.asked.append((self.command, self.path, dict(self.headers), self._body()))
        answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
        if answer is NO_ANSWER:
            self.close_connection = True
            return
        self.send_response(answer.status)
        self.send_header("Content-Length", str(len(answer.content) + answer.cut))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.content)
        self.close_connection = answer.cut

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def __getattr__(self, name):
        if name.startswith("do_"):  # a method for each method of HTTP
            return self._answer
        raise AttributeError(name)

    def log_message(self, *_):
        """Say nothing: the tests look at what was asked."""


@contextlib.contextmanager
def answering(*answers, **options):
    """A server with these answers, and a client of it."""
    server = Scripted(*answers)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        with Client(server.base_url, **options) as client:
            yield server, client
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def a_sandbox(*answers, **options):
    with answering(Answer(200, SANDBOX), *answers, **options) as (server, client):
        sandbox = client.sandbox("sb_1")
        server.asked.clear()
        yield server, sandbox


def problem(status, detail, **more):
    return Answer(status, {"type": "about:blank", "title": "x", "status": status, "detail": detail, **more})


# --- requests ---


def test_a_call_carries_the_key_and_an_error_does_not(monkeypatch):
    monkeypatch.setenv("JHANSI_API_KEY", "jk_secret")
    with answering(problem(401, "no such key")) as (server, client):
        with pytest.raises(errors.AccessError) as caught:
            client.languages()
        assert "jk_secret" not in f"{caught.value!r} {client!r}"
    assert server.asked[0][2]["Authorization"] == "Bearer jk_secret"


def test_a_key_that_cannot_be_sent_is_refused_without_being_shown():
    with pytest.raises(errors.InvalidRequestError) as caught:
        Client("http://127.0.0.1:1", key="jk_secret\n")
    assert "jk_secret" not in str(caught.value)


@pytest.mark.parametrize("path", ["", ".", "..", "/", "a/..", "a/../../sb_2", "../files/x", "a//b"])
def test_a_path_never_addresses_anything_but_a_file(path):
    with a_sandbox(Answer(204)) as (server, sandbox):
        with pytest.raises(errors.InvalidRequestError):
            sandbox.remove_file(path)
        assert server.asked == []


@pytest.mark.parametrize("reference", ["", ".", ".."])
def test_a_reference_never_addresses_anything_but_a_sandbox(reference):
    with answering(Answer(200, SANDBOX)) as (server, client):
        with pytest.raises(errors.InvalidRequestError):
            client.sandbox(reference)
        assert server.asked == []


def test_names_of_any_bytes_are_sent_byte_by_byte():
    with a_sandbox(Answer(204)) as (server, sandbox):
        sandbox.remove_file("a b/ü?#%2F;\udcff")
    assert server.lines() == ["DELETE /v1/sandboxes/sb_1/files/a%20b/%C3%BC%3F%23%252F%3B%FF"]


def test_pages_are_asked_for_one_after_the_other():
    pages = [
        Answer(200, {"items": [SANDBOX], "next_cursor": "c/1"}),
        Answer(200, {"items": [SANDBOX | {"id": "sb_2"}], "next_cursor": None}),
    ]
    with answering(*pages) as (server, client):
        assert [sandbox.id for sandbox in client.sandboxes({"team": "a b"})] == ["sb_1", "sb_2"]
    assert server.lines() == [
        "GET /v1/sandboxes?label=team%3Da+b",
        "GET /v1/sandboxes?label=team%3Da+b&cursor=c%2F1",
    ]


def test_changes_name_what_is_given_alone():
    with a_sandbox(Answer(200, SANDBOX | {"name": "b"})) as (server, sandbox):
        sandbox.change(name="b", ttl=None)
        assert sandbox.info.name == "b"
    assert json.loads(server.asked[0][3]) == {"name": "b", "ttl": None}


def test_an_answer_that_is_no_record_is_told_of():
    with answering(Answer(200, b"<html>")) as (_, client), pytest.raises(errors.JhansiError, match="versions"):
        client.languages()


# --- errors ---


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.InvalidRequestError),
        (401, errors.UnauthenticatedError),
        (403, errors.AccessError),
        (404, errors.NotFoundError),
        (409, errors.ConflictError),
        (412, errors.ConflictError),
        (413, errors.InvalidRequestError),
        (422, errors.InvalidRequestError),
        (500, errors.JhansiError),
        (503, errors.HostError),
        (507, errors.DiskLimitError),
    ],
)
def test_a_problem_is_the_exception_that_it_was_on_the_server(status, kind):
    with a_sandbox(problem(status, "because")) as (server, sandbox):
        with pytest.raises(errors.JhansiError, match="because") as caught:
            sandbox.exec("main.py")
        assert type(caught.value) is kind
        assert len(server.asked) == 1


def test_an_invalid_request_names_its_fields():
    answer = problem(422, "invalid", errors=[{"field": "ttl", "message": "less than 0"}])
    with answering(answer) as (_, client), pytest.raises(errors.InvalidRequestError, match="invalid; ttl: less than 0"):
        client.create_sandbox()


def test_an_error_of_something_between_is_told_of_by_its_status():
    with answering(Answer(502, b"<html>secret</html>")) as (_, client), pytest.raises(errors.JhansiError) as caught:
        client.languages()
    assert str(caught.value) == "the server answered 502 Bad Gateway"


# httpcore leaves a Unix socket that could not be connected to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("where", [{"socket": "/nonexistent/jhansi.sock"}, {"base_url": "http://127.0.0.1:1"}])
def test_where_no_server_is_the_error_says_how_to_start_one(where):
    with Client(**where, retries=1) as client, pytest.raises(errors.HostError, match="jhansi-run serve"):
        client.languages()
    gc.collect()


def test_a_server_that_says_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(_Exchange, "_body", lambda _: time.sleep(0.5) or b"")
    patient = answering(Answer(200, []), timeout=0.1, retries=0)
    with patient as (_, client), pytest.raises(errors.HostError, match="longer timeout"):
        client.languages()


# --- attempts ---


def test_what_may_be_repeated_is():
    with answering(NO_ANSWER, Answer(200, b'[{"la', cut=True), Answer(200, [])) as (server, client):
        assert client.languages() == []
    assert len(server.asked) == 3


def test_an_exec_that_may_have_been_run_is_not_sent_again():
    with a_sandbox(NO_ANSWER) as (server, sandbox):
        with pytest.raises(errors.HostError, match="broke"):
            sandbox.exec("main.py")
        time.sleep(0.2)
        assert len(server.asked) == 1


def test_an_exec_that_was_refused_is_sent_again_after_the_time_asked_for():
    with a_sandbox(Answer(429, b"", Retry_After="1"), Answer(200, RESULT)) as (server, sandbox):
        began = time.monotonic()
        assert sandbox.exec("main.py").exit_code == 0
        assert time.monotonic() - began >= 1
    assert server.asked[0][3] == server.asked[1][3] != b""


def test_attempts_end():
    with a_sandbox(Answer(429, b"", Retry_After="0"), retries=2) as (server, sandbox):
        with pytest.raises(errors.BusyError) as caught:
            sandbox.exec("main.py")
        assert caught.value.retry_after == 0
        assert len(server.asked) == 3


def test_a_server_that_asks_for_too_much_patience_is_reported_at_once():
    with a_sandbox(Answer(429, b"", Retry_After=str(int(LONGEST_RETRY_AFTER) + 1))) as (server, sandbox):
        with pytest.raises(errors.BusyError) as caught:
            sandbox.exec("main.py")
        assert caught.value.retry_after == LONGEST_RETRY_AFTER + 1
        assert len(server.asked) == 1


@pytest.mark.parametrize(("verb", "asked"), [("exec", 1), ("read", 2)])
def test_unavailable_with_a_time_is_tried_again_where_twice_is_as_good_as_once(verb, asked):
    with a_sandbox(Answer(503, b"", Retry_After="0"), Answer(200, RESULT)) as (server, sandbox):
        with contextlib.suppress(errors.HostError):
            getattr(sandbox, verb)("main.py")
        assert len(server.asked) == asked


def test_a_create_is_repeated_with_the_same_key():
    with answering(NO_ANSWER, Answer(201, SANDBOX)) as (server, client):
        client.create_sandbox()
        client.create_sandbox()
        client.create_sandbox(idempotency_key="mine")
    keys = [headers["Idempotency-Key"] for _, _, headers, _ in server.asked]
    assert keys[0] == keys[1] != keys[2]
    assert keys[3] == "mine"


def test_a_removal_whose_answer_was_lost_has_been_done():
    with a_sandbox(NO_ANSWER, problem(404, "no such sandbox")) as (server, sandbox):
        sandbox.delete()
        assert len(server.asked) == 2
        with pytest.raises(errors.NotFoundError):
            sandbox.delete()


def test_a_sandbox_in_use_is_removed_as_soon_as_it_is_not():
    with a_sandbox(problem(409, "in use"), problem(409, "in use"), Answer(204)) as (server, sandbox):
        with sandbox:
            pass
        assert server.lines() == ["DELETE /v1/sandboxes/sb_1"] * 3


def test_a_conditional_write_is_sent_once():
    with a_sandbox(NO_ANSWER) as (server, sandbox):
        with pytest.raises(errors.HostError):
            sandbox.write("a", b"x", if_none_match="*")
        assert len(server.asked) == 1
        assert server.asked[0][2]["If-None-Match"] == "*"


def test_a_file_is_sent_again_from_where_it_stood():
    file = io.BytesIO(b"left out" + b"x" * 3 * CHUNK)
    file.seek(len(b"left out"))
    info = {"path": "a", "type": "file", "size": 1, "mode": 420, "mtime": "2026-01-01T00:00:00.000000Z"}
    with a_sandbox(NO_ANSWER, Answer(200, info)) as (server, sandbox):
        sandbox.write("a", file)
    assert [body == b"x" * 3 * CHUNK for _, _, _, body in server.asked] == [True, True]


def test_what_cannot_be_read_twice_is_not_sent_twice():
    reading, writing = os.pipe()
    os.write(writing, b"once")
    os.close(writing)
    with a_sandbox(NO_ANSWER) as (server, sandbox), os.fdopen(reading, "rb") as pipe:
        with pytest.raises(errors.HostError):
            sandbox.write("a", pipe)
        assert [body for _, _, _, body in server.asked] == [b"once"]


# --- events ---

STREAM = (
    b"\xef\xbb\xbfevent: stdout\r\n: a comment\r\nid: 7\r\ndata: one\r\ndata:  two\r\n\r\n"
    b"data\n\nevent: unused\n\nid\ndata: x\rdata:\xc3\xa9\r\rretry: 5\nevent: cut off\ndata: never sent\n"
)
EVENTS = [("stdout", "one\n two", "7"), ("message", "", "7"), ("message", "x\né", "")]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_parsed_however_they_are_cut(size):
    parser = EventParser()
    chunks = [STREAM[place : place + size] for place in range(0, len(STREAM), size)]

    assert [tuple(event) for chunk in chunks for event in parser.feed(chunk)] == EVENTS


def event(name, value, number=None):
    return (f"id: {number}\n" if number else "").encode() + f"event: {name}\ndata: {json.dumps(value)}\n\n".encode()


def test_a_stream_of_a_job_ends_with_its_result():
    told = event("start", START) + event("stdout", {"data": "a"}, 1) + event("new kind", 1) + event("end", RESULT)
    with a_sandbox(Answer(200, told)) as (server, sandbox), sandbox.stream("main.py", "x", stdin="y") as stream:
        assert list(stream) == [Started(**START), Output("stdout", "a")]
        assert stream.result.exit_code == 0
        assert server.asked[0][2]["Accept"] == "text/event-stream"
        assert json.loads(server.asked[0][3])["args"] == ["x"]


def test_a_stream_of_a_job_that_breaks_is_an_error_and_not_run_again():
    told = event("start", START) + event("stdout", {"data": "a"}, 1)
    with a_sandbox(Answer(200, told)) as (server, sandbox), sandbox.stream("main.py") as stream:
        with pytest.raises(errors.HostError, match="ended before the job"):
            list(stream)
        assert stream.result is None
        assert len(server.asked) == 1


def test_an_error_in_a_stream_is_raised():
    told = event("start", START) + event("error", {"status": 507, "detail": "full"})
    with a_sandbox(Answer(200, told)) as (_, sandbox), pytest.raises(errors.DiskLimitError, match="full"):
        list(sandbox.stream("main.py"))


def test_the_output_of_a_run_goes_on_where_it_broke():
    run = {
        "run_id": "run_1",
        "sandbox_id": "sb_1",
        "owner": None,
        "status": "running",
        "started_at": START["started_at"],
    }
    told = event("start", START) + event("stdout", {"data": "a"}, 5) + b"event: stdout\ndata: {"
    rest = Answer(200, event("stdout", {"data": "b"}, 9) + event("end", RESULT))
    with answering(Answer(200, run), Answer(200, told, cut=True), NO_ANSWER, rest) as (server, client):
        stream = client.run("run_1").output()
        assert [told.data for told in stream if isinstance(told, Output)] == ["a", "b"]
        assert stream.result.exit_code == 0
    assert [headers.get("Last-Event-ID") for _, _, headers, _ in server.asked] == [None, None, "5", "5"]


# --- files ---


def test_a_download_that_breaks_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")
    with a_sandbox(Answer(200, b"new", cut=True)) as (_, sandbox), pytest.raises(errors.HostError):
        sandbox.download("a", tmp_path / "a")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}


def test_a_tree_is_a_tar_that_tar_reads(tmp_path):
    source = tmp_path / "project"
    (source / "empty").mkdir(parents=True)
    (source / "run.sh").write_bytes(b"x" * (CHUNK + 1))
    (source / "run.sh").chmod(0o755)
    os.close(os.open(os.fsencode(source / "empty") + b"/\xff", os.O_CREAT))
    (source / "link").symlink_to("run.sh")
    with tarfile.open(fileobj=io.BytesIO(b"".join(Tree(source, "to").chunks())), errors="surrogateescape") as tar:
        members = {member.name: (member.type, member.mode, member.size) for member in tar}
        assert tar.extractfile("to/project/run.sh").read() == b"x" * (CHUNK + 1)
    assert members.pop("to/project/link")[0] == tarfile.SYMTYPE
    assert members.pop("to/project/run.sh") == (tarfile.REGTYPE, 0o755, CHUNK + 1)
    assert members.keys() == {"to/project", "to/project/empty", "to/project/empty/\udcff"}


def test_a_tree_of_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(errors.InvalidRequestError, match="pipe"):
        list(Tree(tmp_path).chunks())


# --- the real server ---


@pytest.fixture(scope="module")
def served(runtime_environment, tmp_path_factory):
    """A server on a free loopback port and a Unix socket: (base_url, socket)."""
    socket = str(tmp_path_factory.mktemp("served") / "s.sock")
    argv = [sys.executable, "-m", "jhansi_runtime", "serve", "--port", "0", "--socket", socket]
    with subprocess.Popen(argv, env=runtime_environment, stderr=subprocess.PIPE, text=True) as server:
        line = server.stderr.readline()
        assert "server.ready" in line, line + server.stderr.read()
        ready = json.loads(line)
        drained = threading.Thread(target=server.stderr.read)
        drained.start()
        try:
            yield ready["addresses"][0], socket
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(20) == 0
            drained.join()


@pytest.fixture(params=["tcp", "socket"])
def client(served, request):
    options = {"base_url": served[0]} if request.param == "tcp" else {"socket": served[1]}
    with Client(**options) as client:
        yield client


@pytest.fixture
def sandbox(served):
    with Client(socket=served[1]) as client, client.create_sandbox(rootfs="host") as sandbox:
        yield sandbox


def test_the_flow_of_the_readme(client, tmp_path):
    (tmp_path / "main.py").write_text("import sys; print('hello', *sys.argv[1:])")
    with client.create_sandbox("python", rootfs="host", labels={"team": "a"}) as sandbox:
        assert sandbox.put(tmp_path / "main.py").members == 1
        result = sandbox.exec("main.py", "world")
        assert (result.status, result.exit_code, result.stdout) == ("exited", 0, "hello world\n")
        assert sandbox.id in [found.id for found in client.sandboxes({"team": "a"})]
    with pytest.raises(errors.NotFoundError):
        client.sandbox(sandbox.id)


def test_settings_languages_health_and_audit(client):
    with client.create_sandbox(name="changing", rootfs="host", ttl=60) as sandbox:
        assert sandbox.change(name=None, ttl=None, labels={"a": "b"}).labels == {"a": "b"}
        assert sandbox.refresh().expires_at is None
        assert [record["event"] for record in client.audit(sandbox=sandbox.id)] == ["sandbox.create", "sandbox.update"]
    assert "python" in [language.language for language in client.languages()]
    assert client.health().ready


def test_files_in_and_out(sandbox, tmp_path):
    name = "dir/a b?#%ü"
    big = os.urandom(3 << 20)
    assert sandbox.write(name, io.BytesIO(big)).size == len(big)
    assert sandbox.read(name) == big
    sandbox.download(name, tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == big
    assert [info.path for info in sandbox.files(recursive=True)] == ["dir", name]
    sandbox.remove_file(name)
    with pytest.raises(errors.NotFoundError):
        sandbox.read(name)


def test_a_write_on_condition(sandbox):
    sandbox.write("a", b"1", if_none_match="*")
    with pytest.raises(errors.ConflictError):
        sandbox.write("a", b"2", if_none_match="*")
    first = sandbox.etag("a")
    sandbox.write("a", b"2", if_match=first)
    with pytest.raises(errors.ConflictError):
        sandbox.write("a", b"3", if_match=first)
    assert sandbox.read("a") == b"2"


def test_a_folder_goes_in_with_its_modes_and_comes_out_as_a_tar(sandbox, tmp_path):
    source = tmp_path / "project"
    (source / "sub").mkdir(parents=True)
    (source / "sub/tool").write_text("#!/bin/sh\necho ran\n")
    (source / "sub/tool").chmod(0o755)
    sandbox.put(source, to="in")
    assert sandbox.exec("in/project/sub/tool").stdout == "ran\n"
    archive = tmp_path / "out.tar"
    sandbox.archive(archive)
    sandbox.remove_file("in")
    with open(archive, "rb") as file:
        sandbox.unarchive(file)
    assert sandbox.exec("in/project/sub/tool").stdout == "ran\n"


def test_output_comes_while_the_job_runs_and_leaving_ends_it(sandbox):
    sandbox.write("main.py", b"import time; print('first', flush=True); time.sleep(60)")
    with sandbox.stream("main.py") as stream:
        started, first = next(stream), next(stream)
        assert isinstance(started, Started)
        assert first == Output("stdout", "first\n")
    assert wait_until_unused(sandbox), "the job went on without its listener"


def wait_until_unused(sandbox):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(errors.ConflictError):  # in use until the job has ended
            sandbox.delete()
            return True
        time.sleep(0.1)
    return False


def test_a_job_s_input_arguments_and_failure(sandbox):
    program = b"import os, sys; sys.stderr.write(sys.stdin.read() + sys.argv[1] + os.environ['A']); sys.exit(3)"
    sandbox.write("main.py", program)
    result = sandbox.exec("main.py", "é", stdin=b"in", env={"A": "z"})
    assert (result.exit_code, result.stderr) == (3, "inéz")
    with pytest.raises(errors.NotFoundError):
        sandbox.exec("none.py")
    assert sandbox.exec(command=["echo", "x"]).stdout == "x\n"


def test_a_detached_run(sandbox):
    sandbox.write("main.py", b"import sys, time; print(1, flush=True); time.sleep(0.3); print(2, file=sys.stderr)")
    run = sandbox.start("main.py")
    with pytest.raises(TimeoutError):
        run.wait(0.05)
    with run.output() as stream:
        told = [event for event in stream if isinstance(event, Output)]
    assert told == [Output("stdout", "1\n"), Output("stderr", "2\n")]
    assert stream.result.exit_code == run.wait().exit_code == 0
    assert run.written("stderr") == b"2\n"
    assert run.written(offset=1) == b"\n"


def test_a_detached_run_is_cancelled(sandbox):
    run = sandbox.start(command=["sleep", "60"])
    assert run.cancel()
    assert run.wait(10).status == "cancelled"
    assert not run.cancel()


def test_the_client_that_awaits(served, tmp_path):
    (tmp_path / "main.py").write_text("print('hello')")

    async def flow():
        async with AsyncClient(served[0]) as client:
            async with await client.create_sandbox(rootfs="host", name="awaited") as sandbox:
                await sandbox.put(tmp_path / "main.py")
                await sandbox.write("copy.py", io.BytesIO(b"print('copy')"))
                assert (await sandbox.exec("copy.py")).stdout == "copy\n"
                async with sandbox.stream("main.py") as stream:
                    told = [event async for event in stream]
                assert told[1:] == [Output("stdout", "hello\n")]
                assert stream.result.exit_code == 0
                await sandbox.download("main.py", tmp_path / "again")
                run = await sandbox.start("main.py")
                assert (await run.wait()).exit_code == 0
                assert [event async for event in run.output()][1:] == told[1:]
                assert "awaited" in [one.info.name async for one in client.sandboxes()]
            with pytest.raises(errors.NotFoundError):
                await client.sandbox("awaited")

    anyio.run(flow)
    assert (tmp_path / "again").read_text() == "print('hello')"


def test_many_tasks_share_one_client(served):
    async def flow():
        async with AsyncClient(socket=served[1]) as client, anyio.create_task_group() as tasks:
            for _ in range(50):
                tasks.start_soon(client.languages)

    anyio.run(flow)
