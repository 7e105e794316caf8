"""The routes of the HTTP API from outside: a real server, what it answers, and what it refuses.

Files, execs and keys have their own: test_api_files.py, test_api_execs.py, test_api_keys.py.
"""

import json
import os
import pathlib
import shutil
import subprocess
import threading
import time

import pytest
from conftest import host_lacks, serving
from prometheus_client.parser import text_string_to_metric_families

PROBLEM = "application/problem+json"
UNKNOWN = "sb_0123456789abcdef"
COUNTING = """
import pathlib
runs = pathlib.Path("runs")
runs.write_text(runs.read_text() + "." if runs.exists() else ".")
print("run", len(runs.read_text()))
"""


# --- the founding article ---


def test_the_curl_lines_of_the_founding_article_work_as_they_stand(fresh_environment, tmp_path):
    if shutil.which("curl") is None:
        host_lacks("curl", "the three lines are run by curl itself")
    environment = fresh_environment() | {"PETRI_WORKSPACE_ROOT": str(tmp_path / "elsewhere")}
    (tmp_path / "main.py").write_text(COUNTING)
    with serving(environment, tmp_path / "server") as server:
        made = curl(tmp_path, f"""curl -X POST {server.url}/v1/sandboxes -d '{{"language": "python"}}'""")
        files = f"{server.url}/v1/sandboxes/{made['id']}/files"
        written = curl(tmp_path, f"""curl -X POST {files} -F "file=@main.py" """)
        exec_line = f"""curl -X POST {server.url}/v1/sandboxes/{made["id"]}/exec -d '{{"filename": "main.py"}}'"""
        first, second = curl(tmp_path, exec_line), curl(tmp_path, exec_line)
        names = {file["path"] for file in curl(tmp_path, f"curl {files}")}
    assert made["language"] == "python"
    assert [(file["path"], file["type"], file["size"]) for file in written] == [("main.py", "file", len(COUNTING))]
    assert (first["status"], first["exit_code"], first["stdout"], first["stderr"]) == ("exited", 0, "run 1\n", "")
    assert (second["stdout"], second["sandbox_id"]) == ("run 2\n", made["id"])
    assert names == {"main.py", "runs"}
    assert (tmp_path / "elsewhere" / made["id"] / "workspace" / "main.py").read_text() == COUNTING


def curl(folder, line):
    """What curl prints for a line that is typed in a shell, read as JSON."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "no_proxy": "*"}
    ran = subprocess.run(["sh", "-c", line], cwd=folder, env=environment, capture_output=True, check=True, timeout=60)
    return json.loads(ran.stdout)


# --- sandboxes ---


def test_create_answers_with_the_sandbox_and_where_it_is(api):
    body = {
        "name": "first",
        "labels": {"team": "blue"},
        "ttl": 3600,
        "limits": {"timeout": 5, "output": 1000},
        "rootfs": "host",
        "zygote": False,
        "preload": ["json", "email.message"],
    }
    answer = api.post("/v1/sandboxes", json=body)
    made = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/v1/sandboxes/{made['id']}"
    assert answer.headers["content-type"] == "application/json"
    assert (made["name"], made["labels"], made["rootfs"], made["owner"]) == ("first", {"team": "blue"}, "host", None)
    assert (made["limits"]["timeout"], made["limits"]["output"], made["limits"]["nofile"]) == (5, 1000, 1024)
    assert (made["zygote"], made["preload"]) == (False, ["json", "email.message"])
    assert made["expires_at"] > made["created_at"]
    assert api.get(answer.headers["location"]).json() == made
    assert api.get("/v1/sandboxes/first").json() == made
    assert api.get(f"/v1/sandboxes/{made['id'][:12]}").json() == made
    assert api.delete("/v1/sandboxes/first").status_code == 204


@pytest.mark.parametrize(
    "kind", ["application/x-www-form-urlencoded", "text/plain", "application/json; charset=utf-8", "nonsense", None]
)
def test_json_is_taken_whatever_it_claims_to_be(api, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    answer = api.post("/v1/sandboxes", content=b'{"labels": {"k": "%41=&+"}}', headers=headers)
    assert answer.status_code == 201, answer.text
    assert answer.json()["labels"] == {"k": "%41=&+"}
    api.delete(answer.headers["location"])


def test_a_listing_comes_in_pages_that_together_hold_each_once(api, make):
    made = [make(labels={"page": "yes", "number": str(number)}).rpartition("/")[2] for number in range(5)]
    seen, cursor = [], None
    while True:
        params = {"label": "page=yes", "limit": 2} | ({"cursor": cursor} if cursor else {})
        page = api.get("/v1/sandboxes", params=params).json()
        seen.append([one["id"] for one in page["items"]])
        cursor = page["next_cursor"]
        if cursor is None:
            break
        api.delete(f"/v1/sandboxes/{seen[-1][-1]}")  # the page after it begins where it would have
    assert seen == [made[:2], made[2:4], made[4:]]


def test_a_listing_is_of_those_that_have_all_labels(api, make):
    make(labels={"colour": "red", "size": "xl"})
    both = make(labels={"colour": "red", "size": "xs=s"}).rpartition("/")[2]
    found = api.get("/v1/sandboxes", params={"label": ["colour=red", "size=xs=s"]}).json()["items"]
    assert [one["id"] for one in found] == [both]
    assert api.get("/v1/sandboxes", params={"label": "colour=green"}).json() == {"items": [], "next_cursor": None}


def test_patch_changes_what_is_given_and_nothing_else(api, make):
    path = make(name="before", labels={"a": "1"}, ttl=60, limits={"timeout": 7})
    before = api.get(path).json()
    changed = api.patch(path, json={"labels": {"b": "2"}, "limits": {"output": 5}}).json()
    assert changed == before | {"labels": {"b": "2"}, "limits": before["limits"] | {"output": 5}}
    changed = api.patch(path, json={"name": None, "ttl": None}).json()
    assert (changed["name"], changed["expires_at"]) == (None, None)
    assert api.patch(path, json={"name": "after", "ttl": 60}).json()["name"] == "after"
    changed = api.patch(path, json={"zygote": False, "preload": ["json"]}).json()
    assert (changed["zygote"], changed["preload"], changed["name"]) == (False, ["json"], "after")
    assert api.patch(path, json={"preload": "auto"}).json() == changed | {"preload": "auto"}
    assert api.patch(path, json={"preload": None}).json() == changed | {"preload": None}
    assert api.get("/v1/sandboxes/after").json()["expires_at"] is not None
    assert api.get("/v1/sandboxes/before").status_code == 404


def test_a_removed_sandbox_is_gone_with_its_files_and_runs(api, make):
    path = make({"main.py": "print(1)"})
    run = api.post(f"{path}/exec", json={"filename": "main.py", "detach": True}).headers["location"]
    until(lambda: api.get(run).json()["status"] == "exited")
    answer = api.delete(path)
    assert (answer.status_code, answer.content) == (204, b"")
    for gone in (path, f"{path}/files", f"{path}/files/main.py", f"{path}/archive", run, f"{run}/output"):
        assert api.get(gone).status_code == 404, gone
    assert api.delete(path).status_code == 404


def test_a_create_that_is_sent_again_makes_nothing(api):
    headers = {"Idempotency-Key": "test_api one"}
    body = {"rootfs": "host", "labels": {"once": "yes"}}
    first, again = (api.post("/v1/sandboxes", json=body, headers=headers) for _ in range(2))
    other = api.post("/v1/sandboxes", json=body | {"labels": {}}, headers=headers)
    assert first.status_code == again.status_code == 201
    assert first.json() == again.json()
    assert first.headers["location"] == again.headers["location"]
    assert other.status_code == 422, other.text
    assert len(api.get("/v1/sandboxes", params={"label": "once=yes"}).json()["items"]) == 1
    api.delete(first.headers["location"])


def test_of_creates_at_once_with_one_idempotency_key_one_makes_the_sandbox(server, api):
    answers = []

    def create():
        with server.client() as client:
            body = {"rootfs": "host", "labels": {"at": "once"}}
            answers.append(client.post("/v1/sandboxes", json=body, headers={"Idempotency-Key": "test_api two"}))

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} == {201}, [answer.text for answer in answers]
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(api.get("/v1/sandboxes", params={"label": "at=once"}).json()["items"]) == 1
    api.delete(answers[0].headers["location"])


def test_sandboxes_files_runs_and_idempotency_outlive_the_server(fresh_environment, tmp_path):
    environment = fresh_environment()
    headers = {"Idempotency-Key": "test_api three"}
    body = {"rootfs": "host", "name": "kept"}
    with serving(environment, tmp_path / "one") as server, server.client() as client:
        made = client.post("/v1/sandboxes", json=body, headers=headers).json()
        client.put("/v1/sandboxes/kept/files/main.py", content="print('kept')")
        run = client.post("/v1/sandboxes/kept/exec", json={"filename": "main.py", "detach": True}).headers["location"]
        until(lambda: client.get(run).json()["status"] == "exited")
    with serving(environment, tmp_path / "two") as server, server.client() as client:
        assert client.post("/v1/sandboxes", json=body, headers=headers).json() == made
        assert client.get("/v1/sandboxes/kept/files/main.py").text == "print('kept')"
        assert client.get(f"{run}/output").text == "kept\n"


# --- what is refused ---


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"{", 400),
        (b'{"language": "python"', 400),
        (b"language=python", 400),
        (b'{"name": "\xff"}', 400),
        (b"[" * 100_000, 400),
        (b'{"labels":' * 100_000, 400),
        (b'{"name": "\\ud800"}', 400),
        (b"[]", 422),
        (b'"python"', 422),
        (b"null", 422),
    ],
)
def test_a_body_that_is_no_record_is_refused(api, body, status):
    assert problem(api.post("/v1/sandboxes", content=body))["status"] == status
    assert api.get("/v1/sandboxes", params={"limit": 1}).status_code == 200


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"language": 3}, "language"),
        ({"name": "../x"}, "name"),
        ({"name": "sb_0123456789abcdef"}, "name"),
        ({"name": ""}, "name"),
        ({"labels": {"k": 1}}, "labels"),
        ({"labels": {"": "1"}}, "labels"),
        ({"labels": {"k": "a\nb"}}, "labels"),
        ({"labels": {str(number): "" for number in range(65)}}, "labels"),
        ({"ttl": -1}, "ttl"),
        ({"ttl": "1h"}, "ttl"),
        ({"limits": {"timeout": 0}}, "limits.timeout"),
        ({"limits": {"memory": "1G"}}, "limits"),
        ({"limits": {"colour": 1}}, "limits.colour"),
        ({"limits": {"output": 1.5}}, "limits.output"),
        ({"rootfs": "/"}, "rootfs"),
        ({"zygote": "no"}, "zygote"),
        ({"preload": "json"}, "preload"),
        ({"preload": ["json", "os; x"]}, "preload"),
        ({"owner": "key_0123456789abcdef"}, "owner"),
        ({"id": "sb_0123456789abcdef"}, "id"),
    ],
)
def test_a_field_of_a_sandbox_that_is_wrong_is_named(api, make, body, field):
    path = make()
    before = api.get(path).json()
    answers = [api.post("/v1/sandboxes", json={"labels": {"bad": "yes"}} | body)]
    if not body.keys() & {"language", "rootfs"}:
        answers.append(api.patch(path, json=body))
    for answer in answers:
        found = problem(answer)
        assert found["status"] == 422, found
        assert any(field in one["field"] for one in found["errors"]), found
    assert api.get(path).json() == before
    assert api.get("/v1/sandboxes", params={"label": "bad=yes"}).json()["items"] == []


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/sandboxes?limit=0", "limit"),
        ("/v1/sandboxes?limit=1001", "limit"),
        ("/v1/sandboxes?limit=many", "limit"),
        ("/v1/sandboxes?label=k", "label"),
        ("/v1/audit?limit=0", "limit"),
        ("/v1/audit?since=yesterday", "since"),
        ("/v1/audit?since=2026-99-99T00:00:00Z", "since"),
        ("/v1/audit?since=0001-01-01T00:00:00%2B23:59", "since"),
        ("{sandbox}/files?recursive=perhaps", "recursive"),
        ("{run}/output?stream=stdlog", "stream"),
        ("{run}/output?offset=-1", "offset"),
        ("{run}/output?follow=perhaps", "follow"),
    ],
)
def test_a_parameter_that_is_wrong_is_named(api, make, path, field):
    sandbox = make({"main.py": ""})
    run = api.post(f"{sandbox}/exec", json={"filename": "main.py", "detach": True}).headers["location"]
    found = problem(api.get(path.format(sandbox=sandbox, run=run)))
    assert found["status"] == 422, found
    assert [one["field"] for one in found["errors"]] == [field]
    until(lambda: api.get(run).json()["status"] == "exited")


@pytest.mark.parametrize("cursor", ["nonsense", "/", "2026", "\u00e4", "x" * 3000])
def test_any_text_for_a_cursor_gets_an_answer(api, cursor):
    assert api.get("/v1/sandboxes", params={"cursor": cursor}).status_code in {200, 422}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", f"/v1/sandboxes/{UNKNOWN}"),
        ("PATCH", f"/v1/sandboxes/{UNKNOWN}"),
        ("DELETE", f"/v1/sandboxes/{UNKNOWN}"),
        ("GET", f"/v1/sandboxes/{UNKNOWN}/files"),
        ("GET", f"/v1/sandboxes/{UNKNOWN}/archive"),
        ("GET", "/v1/sandboxes/nobody"),
        ("GET", "/v1/sandboxes/..%2f..%2fetc"),
        ("GET", "/v1/runs/run_0123456789abcdef"),
        ("GET", "/v1/runs/nobody"),
        ("GET", "/v1/runs/..%2f"),
        ("DELETE", "/v1/runs/run_0123456789abcdef"),
        ("GET", f"/v1/runs?sandbox={UNKNOWN}"),
        ("GET", "/"),
        ("GET", "/v1"),
        ("GET", "/v2/sandboxes"),
        ("GET", "/etc/passwd"),
    ],
)
def test_what_is_not_there_is_a_404(api, method, path):
    body = {} if method == "PATCH" else None
    assert problem(api.request(method, path, json=body))["status"] == 404


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/sandboxes", {"GET", "POST"}),
        ("POST", f"/v1/sandboxes/{UNKNOWN}", {"GET", "PATCH", "DELETE"}),
        ("GET", f"/v1/sandboxes/{UNKNOWN}/exec", {"POST"}),
        ("DELETE", "/v1/health", {"GET"}),
        ("POST", "/v1/runs/x/output", {"GET"}),
    ],
)
def test_a_method_that_a_path_does_not_have_is_a_405_that_says_which_it_has(api, method, path, allowed):
    answer = api.request(method, path)
    assert problem(answer)["status"] == 405
    assert allowed <= {one.strip() for one in answer.headers["allow"].split(",")}


@pytest.mark.parametrize("language", ["cobol", "", "../python", "python\0"])
def test_a_language_without_a_recipe_is_refused_with_those_there_are(api, language):
    found = problem(api.post("/v1/sandboxes", json={"language": language}))
    assert found["status"] == 404
    assert "python" in found["detail"].rpartition("take one of")[2]


def test_a_name_that_is_taken_is_a_conflict(api, make):
    make(name="taken")
    other = make()
    for answer in (api.post("/v1/sandboxes", json={"name": "taken"}), api.patch(other, json={"name": "taken"})):
        assert problem(answer)["status"] == 409


def test_a_sandbox_that_is_in_use_is_not_removed(api, make):
    path = make({"main.py": "import time; time.sleep(60)"})
    run = api.post(f"{path}/exec", json={"filename": "main.py", "detach": True}).headers["location"]
    until(lambda: any(record["event"] == "exec.start" for record in records(api, path)))
    assert problem(api.delete(path))["status"] == 409
    assert api.get(f"{path}/files/main.py").status_code == 200
    assert api.delete(run).status_code == 202
    until(lambda: api.get(run).json()["status"] == "cancelled")


def test_a_body_that_is_too_large_is_refused_whether_or_not_it_says_so(strict):
    body = json.dumps({"labels": {"k": "v" * 3000}}).encode()
    with strict.client() as client:
        for content in (body, iter([body[:1000], body[1000:]])):
            answer = client.post("/v1/sandboxes", content=content)
            assert problem(answer)["status"] == 413
        assert client.get("/v1/sandboxes", params={"label": f"k={'v' * 3000}"}).json()["items"] == []


def test_beyond_what_runs_at_once_the_answer_is_429_with_a_time_to_come_again(strict):
    with strict.client() as client, strict.client() as other:
        path = client.post("/v1/sandboxes", json={"rootfs": "host"}).headers["location"]
        client.put(f"{path}/files/main.py", content="import time; time.sleep(60)")
        body = {"filename": "main.py", "detach": True}
        run = client.post(f"{path}/exec", json=body).headers["location"]
        for kind in ("application/json", "text/event-stream"):
            answer = other.post(f"{path}/exec", json={"command": ["/bin/true"]}, headers={"Accept": kind})
            assert problem(answer)["status"] == 429
            assert int(answer.headers["retry-after"]) >= 1
        client.delete(run)
        until(lambda: client.get(run).json()["status"] == "cancelled")
        until(lambda: other.post(f"{path}/exec", json={"command": ["/bin/true"]}).status_code == 200)
        starts = [record for record in records(client, path) if record["event"] == "exec.start"]
        assert len(starts) == 2  # those that were refused never began


# --- who may call ---


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8700", "127.0.0.1.evil.example", "localhost.evil", ""])
@pytest.mark.parametrize("path", ["/v1/sandboxes", "/v1/health", "/metrics", "/docs", "/openapi.json"])
def test_a_name_that_is_not_the_servers_is_refused_over_tcp(api, host, path):
    assert problem(api.get(path, headers={"Host": host}))["status"] == 403


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "LocalHost", "127.0.0.1", "[::1]:8700"])
def test_the_servers_own_names_are_taken(api, host):
    assert api.get("/v1/sandboxes", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:3000", "", "http://127.0.0.1"])
def test_a_page_of_another_origin_is_refused(api, origin):
    answer = api.post("/v1/sandboxes", json={"labels": {"from": "page"}}, headers={"Origin": origin})
    assert problem(answer)["status"] == 403
    assert api.get("/v1/sandboxes", params={"label": "from=page"}).json()["items"] == []


def test_a_page_of_the_server_itself_is_let_in_and_so_is_a_name_that_it_was_given(server, fresh_environment, tmp_path):
    with server.client() as client:
        assert client.get("/v1/sandboxes", headers={"Origin": server.url}).status_code == 200
    with (
        serving(fresh_environment(), tmp_path / "named", "--allow-host=box.example") as named,
        named.client() as client,
    ):
        assert client.get("/v1/sandboxes", headers={"Host": "box.example:80"}).status_code == 200
        assert client.get("/v1/sandboxes", headers={"Host": "other.example"}).status_code == 403


def test_over_the_unix_socket_any_name_is_as_good(server):
    with server.client(over_socket=True) as client:
        headers = {"Host": "whatever", "Origin": "http://whatever.example"}
        assert client.get("/v1/sandboxes", headers=headers).status_code == 200


# --- operations ---


def test_health_says_that_a_program_was_run(api):
    answer = api.get("/v1/health")
    assert answer.status_code == 200
    assert (answer.json()["live"], answer.json()["ready"]) == (True, True)


def test_languages_have_extensions_and_a_root_tree(api):
    [python] = [one for one in api.get("/v1/languages").json() if one["language"] == "python"]
    assert ".py" in python["extensions"]
    assert python["rootfs"].startswith("sha256:")


def test_metrics_count_what_was_done(api, make):
    path = make({"main.py": "print('x' * 99)"})
    before = samples(api)
    api.post(f"{path}/exec", json={"filename": "main.py"})
    api.post(f"{path}/exec", json={"filename": "main.py"}, headers={"Accept": "text/event-stream"})
    api.get(f"{path}/files/main.py")
    api.get("/v1/sandboxes/nobody")
    until(lambda: grown(api, before, "jhansi_execs_total", status="exited") == 2)
    assert grown(api, before, "jhansi_bytes_total", kind="stdout") == 200
    assert grown(api, before, "jhansi_bytes_total", kind="download") == len("print('x' * 99)")
    assert grown(api, before, "jhansi_errors_total", kind="NotFoundError") == 1
    for phase in ("queue", "container", "total"):
        assert grown(api, before, "jhansi_exec_seconds_count", phase=phase) == 2
    assert grown(api, before, "jhansi_exec_seconds_sum", phase="container") > 0
    assert samples(api)[("jhansi_execs_running", ())] == 0


def test_a_server_is_without_a_pool_where_its_settings_say_so(fresh_environment, tmp_path):
    settings = "[pool]\nmaximum = 0\n"
    with serving(fresh_environment(), tmp_path / "server", settings=settings) as server, server.client() as unpooled:
        assert not [name for name, _ in samples(unpooled) if name.startswith("jhansi_pool")]


def test_metrics_tell_of_the_pool(fresh_environment, tmp_path):
    with serving(fresh_environment(), tmp_path / "server") as server, server.client() as pooled:
        path = pooled.post("/v1/sandboxes", json={"rootfs": "host"}).headers["location"]
        pooled.put(f"{path}/files/main.py", content="")

        def exec_once():
            assert pooled.post(f"{path}/exec", json={"filename": "main.py"}).json()["exit_code"] == 0
            return samples(pooled)

        first = exec_once()
        until(lambda: exec_once()["jhansi_pool_interpreters_total", ()] > 0)
        until(lambda: samples(pooled)["jhansi_pool_idle", ()] > 0)
        last = samples(pooled)
    assert first["jhansi_pool_slots_total", (("from", "demand"),)] == 1
    assert (first["jhansi_pool_slots_total", (("from", "pool"),)], first["jhansi_pool_bytes", ()]) == (0, 0)
    assert last["jhansi_pool_slots_total", (("from", "pool"),)] > 0
    assert (last["jhansi_pool_zygotes", ()], last["jhansi_pool_skipped", ()]) == (1, 0)


def samples(api):
    answer = api.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(answer.text)
    return {(one.name, tuple(one.labels.items())): one.value for family in families for one in family.samples}


def grown(api, before, name, **labels):
    key = (name, tuple(labels.items()))
    return samples(api).get(key, 0) - before.get(key, 0)


def test_the_audit_log_can_be_asked_by_sandbox_run_and_time(api, make):
    path, other = make({"main.py": "print('hello')"}), make({"main.py": ""})
    run_id = api.post(f"{path}/exec", json={"filename": "main.py"}).json()["run_id"]
    of_sandbox = records(api, path)
    assert [one["event"] for one in of_sandbox] == ["sandbox.create", "files.write", "exec.start", "exec.end"]
    assert {one["sandbox_id"] for one in of_sandbox} == {path.rpartition("/")[2]}
    assert api.get("/v1/audit", params={"run": run_id}).json() == of_sandbox[2:]
    since = api.get("/v1/audit", params={"since": of_sandbox[2]["time"]}).json()
    assert since == of_sandbox[2:]
    newest = api.get("/v1/audit", params={"limit": 2}).json()
    assert newest == of_sandbox[2:]
    assert records(api, other)


@pytest.mark.parametrize("path", ["/docs", "/openapi.json"])
def test_documentation_needs_nothing_from_elsewhere(api, path):
    answer = api.get(path)
    assert answer.status_code == 200
    assert "://" not in answer.text.replace("https://json-schema.org", "")
    assert "<script" not in answer.text


def test_the_document_tells_of_every_route_and_the_page_shows_it(api):
    document = api.get("/openapi.json").json()
    page = api.get("/docs").text
    assert document["openapi"].startswith("3.1")
    assert {"/v1/sandboxes", "/v1/runs/{run_id}", "/v1/sandboxes/{sandbox_id}/exec", "/metrics"} <= set(
        document["paths"]
    )
    for path in document["paths"]:
        assert path in page


def test_the_log_is_json_and_tells_no_path_key_or_value(fresh_environment, tmp_path):
    environment = fresh_environment()
    secret, file = "value-0f8a1c", "file-51e2bb.py"
    with serving(environment, tmp_path / "server") as server, server.client(token="jk_wrong-77aa") as client:
        path = client.post("/v1/sandboxes", json={"rootfs": "host", "labels": {"k": secret}}).headers["location"]
        client.put(f"{path}/files/{file}", content=f"print({secret!r})")
        body = {"filename": file, "args": [secret], "env": {"SECRET": secret}, "stdin": secret}
        run_id = client.post(f"{path}/exec", json=body).json()["run_id"]
        client.post(f"{path}/exec", json=body | {"filename": f"{secret}.py"})
        client.post(f"{path}/exec", json=body | {"limits": {secret: 1}})
        client.post("/v1/sandboxes", content=secret)
        client.get(f"/v1/{secret}", params={"k": secret})
        text = server.log_path.read_text()
        assert run_id in {line.get("run_id") for line in server.log}
    for told in (secret, file, "jk_wrong", environment["JHANSI_HOME"], str(tmp_path)):
        assert told not in text
    assert all({"time", "level", "event"} <= line.keys() for line in server.log)


def test_no_error_tells_where_things_lie(server, api, make):
    path = make({"main.py": "", "folder/file": ""})
    answers = [
        api.get(f"{path}/files/folder"),
        api.get(f"{path}/files/main.py/x"),
        api.put(f"{path}/files/folder", content=b""),
        api.put(f"{path}/files/main.py/x", content=b""),
        api.post(f"{path}/exec", json={"filename": "folder"}),
        api.post(f"{path}/exec", json={"filename": "../../../etc/passwd"}),
        api.post(f"{path}/exec", json={"command": ["/not/there"]}),
        api.put(f"{path}/archive", content=b"no tar"),
        api.delete(f"{path}/files/nothing"),
    ]
    for answer in answers:
        assert problem(answer)["status"] < 500
        assert server.environment["JHANSI_HOME"] not in answer.text


def test_what_is_said_of_a_damaged_sandbox_tells_no_path_either(server, api, make):
    path = make()
    workspaces = pathlib.Path(server.environment["JHANSI_HOME"], "workspaces")
    metadata = workspaces / path.rpartition("/")[2] / "sandbox.json"
    whole = metadata.read_text()
    metadata.write_text(whole[:20])
    answer = api.get(path)
    metadata.write_text(whole)
    assert problem(answer)["status"] == 500
    assert "damaged" in answer.text
    assert str(workspaces) not in answer.text
    assert api.get(path).status_code == 200


def test_head_is_answered_where_get_is(api, make):
    path = make({"main.py": "12345"})
    answer = api.head(f"{path}/files/main.py")
    assert (answer.status_code, answer.headers["content-length"], answer.content) == (200, "5", b"")


# --- within ---


def problem(answer):
    """The problem document of an answer that is one."""
    assert answer.headers["content-type"] == PROBLEM, (answer.status_code, answer.text)
    found = answer.json()
    assert found["status"] == answer.status_code
    assert found["type"] == "about:blank"
    assert found["title"]
    assert found["detail"]
    return found


def records(api, path):
    return api.get("/v1/audit", params={"sandbox": path.rpartition("/")[2]}).json()


def until(true):
    """Wait until it is so."""
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline, "not so after 20 s"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("path", "methods"),
    [("/v1/sandboxes", {"GET", "POST"}), ("{sandbox}", {"GET", "PATCH", "DELETE"}), ("{sandbox}/exec", {"POST"})],
)
def test_options_names_every_method_of_a_path(api, make, path, methods):
    answer = api.options(path.format(sandbox=make()))

    assert (answer.status_code, answer.content) == (204, b"")
    assert set(answer.headers["allow"].split(", ")) - {"OPTIONS"} == methods
