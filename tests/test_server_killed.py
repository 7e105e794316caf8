"""A server that is killed, or told to end, in the midst of all that it does: what the next start finds is whole.

This process adopts what the server leaves (PR_SET_CHILD_SUBREAPER), so all that could outlive it is among its children.
"""

import collections
import http.client
import io
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import contextmanager, suppress

import prctl
import psutil
import pytest
from conftest import run

KILLS = 20
LONGEST_LOAD = 0.6  # seconds from the start of the load to the kill
GRACE = 1  # seconds
WAIT = 60  # seconds, for what takes a fraction of one
SIZE = 300_000  # bytes of a file: several pieces on its way
IN_ARCHIVE = 10  # files

TALKING = ["sh", "-c", "while :; do echo some output; sleep 0.02; done"]
LONG = ["sleep", "600"]
SHORT = ["sh", "-c", "echo done"]
UNSTOPPABLE = ["sh", "-c", "trap '' TERM; echo up; sleep 600"]
FINAL = {"exited", "cancelled", "lost"}


class Server:
    """One `jhansi-run serve` after the other, of one installation."""

    def __init__(self, environment, folder):
        self.environment = environment
        self._folder = folder
        self._log = folder / "log"

    def start(self):
        words = ["serve", "--port=0", f"--socket={self._folder}/api.sock", f"--grace={GRACE}s"]
        argv = [sys.executable, "-m", "jhansi_runtime", *words]
        with self._log.open("wb") as stderr:
            self.process = subprocess.Popen(argv, env=self.environment, stderr=stderr, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + WAIT
        while not (ready := [event for event in self.log() if event["event"] == "server.ready"]):
            assert self.process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self.port = int(next(one for one in ready[0]["addresses"] if one != "unix").rpartition(":")[2])

    def log(self):
        return [json.loads(line) for line in self._log.read_text().splitlines(keepends=True) if line.endswith("\n")]

    @contextmanager
    def connected(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        try:
            yield lambda *words, **options: exchange(connection, *words, **options)
        finally:
            connection.close()

    def ask(self, *words, **options):
        with self.connected() as ask:
            return ask(*words, **options)


def exchange(connection, method, path, body=None, **headers):
    """Send one request; the JSON of its answer, which must not be an error."""
    content = json.dumps(body) if isinstance(body, dict) else body
    connection.request(method, path, content, headers)
    with connection.getresponse() as answer:
        text = answer.read()
    assert answer.status < 300, (method, path, answer.status, text)
    return json.loads(text) if text else None


@pytest.fixture
def server(fresh_environment, tmp_path):
    (tmp_path / "tmp").mkdir()
    prctl.set_child_subreaper(1)
    server = Server(fresh_environment() | {"TMPDIR": str(tmp_path / "tmp")}, tmp_path)
    server.start()
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
        wait_until_alone()
        prctl.set_child_subreaper(0)


@pytest.fixture
def box(server):
    return f"/v1/sandboxes/{server.ask('POST', '/v1/sandboxes', {'rootfs': 'host'})['id']}"


# --- killed -----------------------------------------------------------------------------------------------------


def test_killing_the_server_at_any_moment_leaves_every_workspace_run_and_record_whole(server, box):
    chance = random.Random(3)
    begun = set()  # the detached runs that a caller was told of
    before = time.monotonic()
    server.ask("POST", f"{box}/exec", {"command": SHORT})
    longest_load = LONGEST_LOAD + 4 * (time.monotonic() - before)  # in an emulated machine less comes to nothing
    for _ in range(KILLS):
        with loaded(server, box, begun):
            time.sleep(chance.uniform(0, longest_load))
            server.process.kill()
            server.process.wait()
        wait_until_alone()
        server.start()

        runs = server.ask("GET", "/v1/runs")
        assert begun <= {info["run_id"] for info in runs}
        assert {info["status"] for info in runs} <= FINAL
        assert all((info["result"] is None) == (info["status"] == "lost") for info in runs)
        assert_whole(server, box)
    statuses = ends(server)
    assert collections.Counter(map(len, statuses.values())) == {1: len(statuses)}
    assert {"exited", "lost"} <= {status for (status,) in statuses.values()}
    assert len(begun) > KILLS
    verified = run(["audit", "verify"], server.environment)
    assert verified.returncode == 0, verified.stderr
    assert server.ask("POST", f"{box}/exec", {"command": SHORT})["stdout"] == "done\n"
    server.ask("DELETE", box)  # which nobody holds any more


def assert_whole(server, box):
    """Every file is as somebody has sent it, and what was half done is gone."""
    deadline = time.monotonic() + WAIT
    while (left := unexpected(server)) and time.monotonic() < deadline:  # it is cleared away while others are served
        time.sleep(0.02)
    assert left == []
    workspace = pathlib.Path(server.environment["JHANSI_HOME"], "workspaces", box.rpartition("/")[2], "workspace")
    for file in workspace.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert len(content) == SIZE, file
            assert len(set(content)) == 1, file


def unexpected(server):
    """What no server has any use for that has just been started."""
    home = server.environment["JHANSI_HOME"]
    known = {
        "workspaces": re.compile(
            r"\.lock|\.names|\.unfinished|sb_[0-9a-f]{16}(/workspace(/.*)?|/sandbox\.json|/\.writing|/\.changing)?"
        ),
        "runs": re.compile("(?!)"),
        "detached": re.compile(r"run_[0-9a-f]+(/run\.json|/output|/result\.json|/\.result)?"),
    }
    found = [os.path.join(server.environment["TMPDIR"], name) for name in os.listdir(server.environment["TMPDIR"])]
    for top, expected in known.items():
        for folder, folders, names in os.walk(os.path.join(home, top)):
            paths = (os.path.relpath(os.path.join(folder, name), os.path.join(home, top)) for name in folders + names)
            found += [path for path in paths if not expected.fullmatch(path)]
    return found


# --- told to end ------------------------------------------------------------------------------------------------


def test_told_to_end_the_server_ends_what_is_under_way_and_says_so(server, box):
    detached = [
        server.ask("POST", f"{box}/exec", {"command": command, "detach": True})["run_id"]
        for command in (TALKING, UNSTOPPABLE, ["sleep", "0.5"])
    ]
    answers = []
    with server.connected() as ask:
        streaming = threading.Thread(target=until_cut_off, args=(ask, box))
        waiting = threading.Thread(target=lambda: answers.append(server.ask("POST", f"{box}/exec", {"command": LONG})))
        streaming.start()
        waiting.start()
        deadline = time.monotonic() + WAIT
        while len(ends(server)) < len(detached) + 2:  # all have begun
            assert time.monotonic() < deadline
            time.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(WAIT) == 0
        streaming.join()
        waiting.join()
    wait_until_alone()
    assert [answer["status"] for answer in answers] == ["cancelled"]
    assert server.log()[-1]["orderly"]
    assert not [event for event in server.log() if event["event"] == "defect"]

    server.start()
    found = {run_id: server.ask("GET", f"/v1/runs/{run_id}") for run_id in detached}
    assert [found[run_id]["status"] for run_id in detached] == ["cancelled", "cancelled", "exited"]
    assert all(info["result"]["status"] == info["status"] for info in found.values())
    assert sorted(ends(server).values()) == [["cancelled"]] * 4 + [["exited"]]
    assert unexpected(server) == []


def until_cut_off(ask, box):
    with suppress(http.client.IncompleteRead):
        ask("POST", f"{box}/exec", {"command": TALKING}, Accept="text/event-stream")


# --- load -------------------------------------------------------------------------------------------------------


@contextmanager
def loaded(server, box, begun):
    """Within: callers of every kind come, until the server is gone. Each then ends."""
    callers = [
        threading.Thread(target=call, args=(server, box, kind, begun)) for kind in (upload, unpack, exec_, detach)
    ]
    for caller in callers:
        caller.start()
    try:
        yield
    finally:
        for caller in callers:
            caller.join()


def call(server, box, kind, begun):
    chance = random.Random(kind.__name__)
    with suppress(http.client.HTTPException, OSError), server.connected() as ask:
        while True:
            kind(ask, box, chance, begun)


def upload(ask, box, chance, begun):  # noqa: ARG001 - one of several
    ask("PUT", f"{box}/files/{chance.choice(('one', 'folder/other'))}", letters(chance))
    part = '--edge\r\nContent-Disposition: form-data; name="file"; filename="form/{}"\r\n\r\n{}\r\n'
    form = "".join(part.format(name, letters(chance).decode()) for name in ("one", "other"))
    ask("POST", f"{box}/files", f"{form}--edge--\r\n", **{"Content-Type": "multipart/form-data; boundary=edge"})


def unpack(ask, box, chance, begun):  # noqa: ARG001 - one of several
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            for number in range(IN_ARCHIVE):
                member = tarfile.TarInfo(f"archive/{number}")
                member.size = SIZE
                archive.addfile(member, io.BytesIO(letters(chance)))
        ask("PUT", f"{box}/archive", file.getvalue())


def exec_(ask, box, chance, begun):  # noqa: ARG001 - one of several
    assert ask("POST", f"{box}/exec", {"command": SHORT})["stdout"] == "done\n"


def detach(ask, box, chance, begun):
    for command in (SHORT, TALKING):
        begun.add(ask("POST", f"{box}/exec", {"command": command, "detach": True, "limits": {"timeout": 30}})["run_id"])
    time.sleep(chance.uniform(0, 0.1))


def letters(chance):
    """The content of a file: one letter over and over, so a mixture of two would show."""
    return chance.choice(b"abcdefgh").to_bytes() * SIZE


# --- what there is ------------------------------------------------------------------------------------------------


def ends(server):
    """For each run that was started, the status of each end that it has."""
    shown = run(["audit", "show", "--json"], server.environment)
    records = json.loads(shown.stdout)
    statuses = {record["run_id"]: [] for record in records if record["event"] == "exec.start"}
    for record in records:
        if record["event"] == "exec.end":
            statuses[record["run_id"]].append(record["status"])
    return statuses


def wait_until_alone():
    """Wait until the kernel has taken down whatever the server has left; it needs no help, only a moment."""
    deadline = time.monotonic() + WAIT
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            assert time.monotonic() < deadline, psutil.Process().children(recursive=True)
            time.sleep(0.005)
