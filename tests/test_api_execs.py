"""Execs over the HTTP API: results, events as they come, callers who leave, and detached runs."""

import base64
import json
import re
import socket
import time
from itertools import pairwise

import pytest
from test_api import problem, records, until

STREAM = {"Accept": "text/event-stream"}
SLEEP = "import time; print('begun', flush=True); time.sleep(60)"
# Two lines, the second when the test has seen the first: a file in the workspace says so.
IN_STEP = """
import os, time
print("first", flush=True)
while not os.path.exists("go"):
    time.sleep(0.01)
print("second", flush=True)
"""


# --- with a result ---


def test_a_program_gets_its_arguments_environment_and_input_and_nothing_else(api, make):
    program = """
import json, os, sys
print(json.dumps({"args": sys.argv[1:], "env": dict(os.environ), "stdin": sys.stdin.read()}))
print("to stderr", file=sys.stderr)
"""
    path = make({"folder/main.py": program})
    body = {"filename": "folder/main.py", "args": ["a b", "", "\u00e4"], "env": {"K": "v=\n"}, "stdin": "in\u00fc\n"}
    result = api.post(f"{path}/exec", json=body).json()
    told = json.loads(result["stdout"])
    assert (told["args"], told["env"].pop("K"), told["stdin"]) == (["a b", "", "\u00e4"], "v=\n", "in\u00fc\n")
    assert told["env"].keys() <= {"PATH", "HOME", "LANG", "LC_CTYPE", "PWD", "SHLVL", "_"}
    assert result["stderr"] == "to stderr\n"
    assert (result["stdout_bytes"], result["stderr_bytes"]) == (len(result["stdout"]), 10)
    assert (result["status"], result["exit_code"], result["signal"]) == ("exited", 0, None)
    assert result["wall_time_ms"] > 0
    assert result["run_id"].startswith("run_")


def test_a_program_of_the_rootfs_can_be_run(api, make):
    result = api.post(f"{make()}/exec", json={"command": ["/bin/sh", "-c", "pwd; echo $0 $1", "zero", "one"]}).json()
    assert result["stdout"] == "/workspace\nzero one\n"


def test_bytes_that_are_no_text_come_as_base64(api, make):
    path = make({"main.py": "import sys; sys.stdout.buffer.write(bytes(range(256)))"})
    as_text = api.post(f"{path}/exec", json={"filename": "main.py"}).json()
    as_base64 = api.post(f"{path}/exec", json={"filename": "main.py", "encoding": "base64"}).json()
    assert "\ufffd" in as_text["stdout"]
    assert base64.b64decode(as_base64["stdout"]) == bytes(range(256))
    assert as_base64["stdout_bytes"] == 256


@pytest.mark.parametrize(
    ("program", "limits", "expected"),
    [
        ("raise SystemExit(7)", {}, {"status": "exited", "exit_code": 7}),
        ("1/0", {}, {"status": "exited", "exit_code": 1}),
        ("import os; os.kill(os.getpid(), 9)", {}, {"status": "signaled", "exit_code": None, "signal": "SIGKILL"}),
        ("while True: pass", {"timeout": 0.2}, {"status": "timed_out", "timed_out": True}),
        ("print('x' * 5000)", {"output": 100}, {"status": "output_limit", "stdout": "x" * 100}),
    ],
)
def test_a_program_that_fails_is_a_result_and_no_error(api, make, program, limits, expected):
    answer = api.post(f"{make({'main.py': program})}/exec", json={"filename": "main.py", "limits": limits})
    assert answer.status_code == 200
    assert expected.items() <= answer.json().items()


def test_limits_of_the_sandbox_hold_and_those_of_the_exec_before_them(api, make):
    path = make({"main.py": "print('x' * 50)"}, limits={"output": 10})
    assert api.post(f"{path}/exec", json={"filename": "main.py"}).json()["stdout"] == "x" * 10
    result = api.post(f"{path}/exec", json={"filename": "main.py", "limits": {"output": 20.0}}).json()
    assert (result["stdout"], result["limits"]["output"]) == ("x" * 20, 20)


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"filename": "missing.py"}, 404, None),
        ({"filename": "link-out"}, 422, None),
        ({"filename": "folder"}, 422, None),
        ({"filename": "../main.py"}, 422, None),
        ({"filename": "/etc/passwd"}, 422, None),
        ({"filename": "main.py\0"}, 422, None),
        ({"filename": ""}, 422, None),
        ({}, 422, None),
        ({"filename": "main.py", "command": ["/bin/true"]}, 422, None),
        ({"command": []}, 422, None),
        ({"command": [""]}, 422, "command"),
        ({"command": ["/bin/echo", "a\0b"]}, 422, "command"),
        ({"command": "ls"}, 422, "command"),
        ({"filename": "main.py", "code": "print(1)"}, 422, "code"),
        ({"filename": "main.py", "sandbox": "other"}, 422, "sandbox"),
        ({"filename": "main.py", "args": ["a\0b"]}, 422, "args"),
        ({"filename": "main.py", "args": "x"}, 422, "args"),
        ({"filename": "main.py", "env": {"A=B": "x"}}, 422, "env"),
        ({"filename": "main.py", "env": {"A": "x\0"}}, 422, "env"),
        ({"filename": "main.py", "env": {"": "x"}}, 422, "env"),
        ({"filename": "main.py", "env": {"A": 1}}, 422, "env"),
        ({"filename": "main.py", "stdin": 1}, 422, "stdin"),
        ({"filename": "main.py", "encoding": "utf-16"}, 422, "encoding"),
        ({"filename": "main.py", "limits": {"timeout": 0}}, 422, "limits.timeout"),
        ({"filename": "main.py", "limits": {"processes": 1}}, 422, "limits.processes"),
        ({"filename": "main.py", "rootfs": "/"}, 422, "rootfs"),
    ],
)
@pytest.mark.parametrize("how", [{}, {"detach": True}, STREAM])
def test_what_cannot_be_run_is_refused_before_anything_runs(api, make, body, status, field, how):
    path = make({"main.py": "", "folder/x": ""})
    if body.get("filename") == "link-out":
        api.post(f"{path}/exec", json={"command": ["/bin/ln", "-s", "/bin/sh", "link-out"]})
    before = len(records(api, path))
    headers = how if how is STREAM else {}
    body = body | (how if how is not STREAM else {})
    found = problem(api.post(f"{path}/exec", json=body, headers=headers))
    assert found["status"] == status, found
    if field:
        assert any(one["field"].startswith(field) for one in found["errors"]), found
    assert len(records(api, path)) == before
    assert api.get("/v1/runs", params={"sandbox": path.rpartition("/")[2]}).json() == []


def test_a_file_that_no_interpreter_takes_is_not_executable(api, make):
    path = make({"data.bin": "\0"})
    assert problem(api.post(f"{path}/exec", json={"filename": "data.bin"}))["status"] == 422
    run = api.post(f"{path}/exec", json={"filename": "data.bin", "detach": True}).headers["location"]
    until(lambda: api.get(run).json()["status"] == "failed")
    assert "executable" in api.get(run).json()["result"]["message"]
    told = list(events(api.post(f"{path}/exec", json={"filename": "data.bin"}, headers=STREAM)))
    assert told[-1][1]["status"] == "failed"


# --- as it goes ---


def test_events_come_while_the_program_runs(api, make):
    path = make({"main.py": IN_STEP})
    with api.stream("POST", f"{path}/exec", json={"filename": "main.py"}, headers=STREAM) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        told = events(answer)
        name, start, _ = next(told)
        assert (name, start.keys()) == ("start", {"run_id", "sandbox_id", "started_at"})
        assert next(told)[:2] == ("stdout", {"data": "first\n"})
        # The program waits for this file, so the first line cannot have waited for its end.
        assert api.put(f"{path}/files/go", content=b"").status_code == 201
        assert next(told)[:2] == ("stdout", {"data": "second\n"})
        name, end, _ = next(told)
        assert (name, end["status"], end["exit_code"], end["stdout"]) == ("end", "exited", 0, None)
        assert (end["run_id"], end["stdout_bytes"]) == (start["run_id"], 13)
        assert list(told) == []
    until(lambda: api.get(f"/v1/runs/{start['run_id']}").status_code == 404)  # it was not asked to be kept


def test_events_hold_all_of_both_streams_in_order_and_no_character_is_cut(api, make):
    program = """
import os, time
for byte in "\u20ac\U0001f600".encode():
    os.write(1, bytes([byte])); time.sleep(0.01)
for number in range(20):
    os.write(1 + number % 2, f"{number}\\n".encode()); time.sleep(0.005)
os.write(1, b"\\xe2\\x82")
"""
    path = make({"main.py": program})
    answer = api.post(f"{path}/exec", json={"filename": "main.py"}, headers=STREAM)
    told = list(events(answer))
    output = {stream: "".join(one[1]["data"] for one in told if one[0] == stream) for stream in ("stdout", "stderr")}
    assert output["stdout"] == "\u20ac\U0001f600" + "".join(f"{number}\n" for number in range(0, 20, 2)) + "\ufffd"
    assert output["stderr"] == "".join(f"{number}\n" for number in range(1, 20, 2))
    numbers = [
        int(line) for name, data, _ in told if name != "end" for line in re.findall(r"\d+", data.get("data", ""))
    ]
    assert sorted(numbers) == list(range(20))
    positions = [position for _, _, position in told if position is not None]
    assert all(before < after for before, after in pairwise(positions))
    assert told[-1][0] == "end"


def test_events_as_base64_hold_the_very_bytes(api, make):
    path = make({"main.py": "import os; os.write(1, bytes(range(256)))"})
    answer = api.post(f"{path}/exec", json={"filename": "main.py", "encoding": "base64"}, headers=STREAM)
    assert b"".join(base64.b64decode(data["data"]) for name, data, _ in events(answer) if name == "stdout") == bytes(
        range(256)
    )


def test_a_program_that_fails_has_an_end_event(api, make):
    path = make({"main.py": "raise SystemExit(3)"})
    told = list(events(api.post(f"{path}/exec", json={"filename": "main.py"}, headers=STREAM)))
    assert [name for name, _, _ in told] == ["start", "end"]
    assert told[-1][1]["exit_code"] == 3


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
def test_a_caller_who_leaves_ends_the_job(server, api, make, kind):
    path = make({"main.py": SLEEP})
    body = json.dumps({"filename": "main.py"})
    head = f"POST {path}/exec HTTP/1.1\r\nHost: localhost\r\nAccept: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as caller:
        caller.sendall((head + body).encode())
        until(lambda: "exec.start" in [record["event"] for record in records(api, path)])
        time.sleep(0.1)  # into the job
    until(lambda: "exec.end" in [record["event"] for record in records(api, path)])
    [end] = [record for record in records(api, path) if record["event"] == "exec.end"]
    assert end["status"] == "cancelled"
    until(lambda: api.get("/v1/runs", params={"sandbox": path.rpartition("/")[2]}).json() == [])
    assert api.delete(path).status_code == 204  # nothing is under way in it


# --- detached ---


def test_a_detached_run_outlives_its_caller_and_keeps_its_output_and_result(server, api, make):
    path = make({"main.py": IN_STEP})
    with server.client() as caller:
        answer = caller.post(f"{path}/exec", json={"filename": "main.py", "detach": True})
    assert answer.status_code == 202
    info, run = answer.json(), answer.headers["location"]
    assert run == f"/v1/runs/{info['run_id']}"
    assert (info["status"], info["ended_at"], info["result"]) == ("running", None, None)
    until(lambda: api.get(f"{run}/output").text == "first\n")
    assert api.get(run).json()["status"] == "running"
    api.put(f"{path}/files/go", content=b"")
    until(lambda: api.get(run).json()["status"] == "exited")
    ended = api.get(run).json()
    assert (ended["result"]["exit_code"], ended["result"]["run_id"]) == (0, info["run_id"])
    assert ended["ended_at"] >= ended["started_at"]
    assert api.get(f"{run}/output").text == "first\nsecond\n"
    assert api.get(f"{run}/output", params={"stream": "stderr"}).text == ""
    assert api.delete(run).status_code == 204
    assert problem(api.get(run))["status"] == problem(api.delete(run))["status"] == 404


def test_output_is_followed_to_the_end(api, make):
    path = make({"main.py": IN_STEP})
    run = api.post(f"{path}/exec", json={"filename": "main.py", "detach": True}).headers["location"]
    with api.stream("GET", f"{run}/output", params={"follow": "true"}) as answer:
        pieces = answer.iter_bytes()
        assert next(pieces) == b"first\n"
        api.put(f"{path}/files/go", content=b"")
        assert b"".join(pieces) == b"second\n"
    assert api.get(run).json()["status"] == "exited"


def test_who_was_cut_off_gets_exactly_the_rest(api, make):
    program = "import os, time\nfor n in range(10):\n    os.write(1 + n % 2, b'%d,' % n); time.sleep(0.01)"
    path = make({"main.py": program})
    run = api.post(f"{path}/exec", json={"filename": "main.py", "detach": True}).headers["location"]
    whole = list(events(api.get(f"{run}/output", params={"follow": "true"}, headers=STREAM)))
    assert whole[0][0] == "start"
    assert whole[-1][0] == "end"
    for index, (_, _, position) in enumerate(whole):
        if position is not None:
            headers = STREAM | {"Last-Event-ID": str(position)}
            for follow in ("true", "false"):
                again = api.get(f"{run}/output", params={"follow": follow}, headers=headers)
                assert list(events(again)) == whole[index + 1 :]
    for offset in range(12):
        assert api.get(f"{run}/output", params={"offset": offset}).text == "0,2,4,6,8,"[offset:]
        assert api.get(f"{run}/output", params={"offset": offset, "stream": "stderr"}).text == "1,3,5,7,9,"[offset:]


@pytest.mark.parametrize("position", ["1", "999999", "-1", "first", "9" * 30])
def test_a_position_that_is_no_event_is_refused(api, make, position):
    path = make({"main.py": "print('x' * 100)"})
    run = api.post(f"{path}/exec", json={"filename": "main.py", "detach": True}).headers["location"]
    until(lambda: api.get(run).json()["status"] == "exited")
    assert problem(api.get(f"{run}/output", headers=STREAM | {"Last-Event-ID": position}))["status"] == 422


def test_a_detached_run_is_cancelled_then_forgotten(api, make):
    path = make({"main.py": SLEEP})
    run = api.post(f"{path}/exec", json={"filename": "main.py", "detach": True}).headers["location"]
    until(lambda: api.get(f"{run}/output").text == "begun\n")
    assert api.delete(run).status_code == 202
    until(lambda: api.get(run).json()["status"] != "running")
    assert api.get(run).json()["result"]["status"] == "cancelled"
    assert api.get(f"{run}/output").text == "begun\n"
    assert api.delete(run).status_code == 204
    assert api.get(run).status_code == 404


def test_runs_are_listed_newest_first_by_sandbox(api, make):
    path, other = make({"main.py": ""}, name="lister"), make({"main.py": ""})
    body = {"filename": "main.py", "detach": True}
    begun = [api.post(f"{path}/exec", json=body).json()["run_id"] for _ in range(3)]
    elsewhere = api.post(f"{other}/exec", json=body).json()["run_id"]
    ids = [one["run_id"] for one in api.get("/v1/runs", params={"sandbox": "lister"}).json()]
    assert ids == begun[::-1]
    every = [one["run_id"] for one in api.get("/v1/runs").json()]
    assert every[:4] == [elsewhere, *begun[::-1]]
    until(lambda: {one["status"] for one in api.get("/v1/runs").json()} == {"exited"})


def events(answer):
    """The events of an answer, as they come: name, data, and position if there is one."""
    name = data = position = None
    for line in answer.iter_lines():
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            data = json.loads(value)
        elif field == "id":
            position = int(value)
        elif not line and name is not None:
            yield name, data, position
            name = data = position = None
