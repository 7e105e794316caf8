"""Keys over the HTTP API: what each lets its holder do, and that to one key what another has is not there."""

import json
from typing import NamedTuple

import pytest
from conftest import run, serving
from test_api import problem, until
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

SCOPES = ("read", "write", "exec", "audit", "admin")
SLEEP = "import time; time.sleep(60)"
TAR = b"\0" * 1024  # an empty one
FORM = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\nx\r\n--b--\r\n'


class Call(NamedTuple):
    """One operation of the document: how to call it, which scope it needs (None: no key), and its usual answer.

    In the path, body and parameters {sandbox} and {run} stand for ids.
    """

    needs: str | None
    expected: int
    path: str
    json: dict | None = None
    content: bytes | None = None
    headers: dict | None = None
    # Whose answers differ by id in more than the id: none that names a sandbox or run may be without it.
    names_one: bool = True


FORM_TYPE = {"Content-Type": "multipart/form-data; boundary=b"}
SB, RUN = "/v1/sandboxes/{sandbox}", "/v1/runs/{run}"
# Every operation of the OpenAPI document; several calls where one behaves in several ways. One that is added to the
# server without a case here fails test_every_operation_has_a_case.
CALLS = {
    ("post", "/v1/sandboxes"): [Call("write", 201, "/v1/sandboxes", json={"rootfs": "host"}, names_one=False)],
    ("get", "/v1/sandboxes"): [Call("read", 200, "/v1/sandboxes", names_one=False)],
    ("get", "/v1/sandboxes/{sandbox_id}"): [Call("read", 200, SB)],
    ("patch", "/v1/sandboxes/{sandbox_id}"): [Call("write", 200, SB, json={"labels": {"k": "v"}})],
    ("delete", "/v1/sandboxes/{sandbox_id}"): [Call("write", 204, SB)],
    ("get", "/v1/sandboxes/{sandbox_id}/files"): [
        Call("read", 200, f"{SB}/files"),
        Call("read", 404, f"{SB}/files?path=nothing"),
    ],
    ("post", "/v1/sandboxes/{sandbox_id}/files"): [Call("write", 201, f"{SB}/files", content=FORM, headers=FORM_TYPE)],
    ("get", "/v1/sandboxes/{sandbox_id}/files/{path}"): [
        Call("read", 200, f"{SB}/files/main.py"),
        Call("read", 206, f"{SB}/files/main.py", headers={"Range": "bytes=0-1"}),
        Call("read", 404, f"{SB}/files/nothing"),
    ],
    ("head", "/v1/sandboxes/{sandbox_id}/files/{path}"): [Call("read", 200, f"{SB}/files/main.py")],
    ("put", "/v1/sandboxes/{sandbox_id}/files/{path}"): [
        Call("write", 201, f"{SB}/files/new", content=b"x"),
        Call("write", 412, f"{SB}/files/main.py", content=b"x", headers={"If-None-Match": "*"}),
    ],
    ("delete", "/v1/sandboxes/{sandbox_id}/files/{path}"): [Call("write", 204, f"{SB}/files/main.py")],
    ("get", "/v1/sandboxes/{sandbox_id}/archive"): [Call("read", 200, f"{SB}/archive")],
    ("put", "/v1/sandboxes/{sandbox_id}/archive"): [Call("write", 200, f"{SB}/archive", content=TAR)],
    ("post", "/v1/sandboxes/{sandbox_id}/exec"): [
        Call("exec", 200, f"{SB}/exec", json={"filename": "hello.py"}),
        Call("exec", 200, f"{SB}/exec", json={"filename": "hello.py"}, headers={"Accept": "text/event-stream"}),
        Call("exec", 202, f"{SB}/exec", json={"filename": "hello.py", "detach": True}),
        Call("exec", 404, f"{SB}/exec", json={"filename": "nothing.py"}),
    ],
    ("get", "/v1/runs"): [
        Call("read", 200, "/v1/runs", names_one=False),
        Call("read", 200, "/v1/runs?sandbox={sandbox}"),
    ],
    ("get", "/v1/runs/{run_id}"): [Call("read", 200, RUN)],
    ("get", "/v1/runs/{run_id}/output"): [
        Call("read", 200, f"{RUN}/output"),
        Call("read", 200, f"{RUN}/output?follow=true"),
        Call("read", 200, f"{RUN}/output?follow=true", headers={"Accept": "text/event-stream"}),
        Call("read", 422, f"{RUN}/output", headers={"Accept": "text/event-stream", "Last-Event-ID": "1"}),
    ],
    ("delete", "/v1/runs/{run_id}"): [Call("exec", 204, RUN)],
    ("get", "/v1/languages"): [Call("read", 200, "/v1/languages", names_one=False)],
    ("get", "/v1/audit"): [
        Call("audit", 200, "/v1/audit", names_one=False),
        Call("audit", 200, "/v1/audit?sandbox={sandbox}"),
        Call("audit", 200, "/v1/audit?run={run}"),
    ],
    ("get", "/v1/health"): [Call(None, 200, "/v1/health", names_one=False)],
    ("get", "/metrics"): [Call("admin", 200, "/metrics", names_one=False)],
    ("get", "/docs"): [Call(None, 200, "/docs", names_one=False)],
    ("get", "/openapi.json"): [Call(None, 200, "/openapi.json", names_one=False)],
}
EACH = [
    pytest.param(method, call, id=f"{method} {call.path} {call.expected}")
    for (method, _), calls in CALLS.items()
    for call in calls
]


class Holder(NamedTuple):
    """A key, a client that sends it, and what its holder has: a sandbox, and a run that has ended."""

    key: str
    token: str
    client: object
    sandbox: str
    run: str


@pytest.fixture(scope="module")
def guarded(fresh_environment, tmp_path_factory):
    """A server that needs keys, and who makes them."""
    environment = fresh_environment()
    token = create_key(environment, "admin", scopes=SCOPES)[1]
    with serving(environment, tmp_path_factory.mktemp("guarded")) as server, server.client(token) as admin:
        yield server, admin


@pytest.fixture(scope="module")
def keys(guarded):
    """A key of each scope alone."""
    return {scope: create_key(guarded[0].environment, f"only-{scope}", scopes=[scope])[1] for scope in SCOPES}


@pytest.fixture(scope="module")
def two(guarded):
    """Two holders of keys of every scope but admin."""
    server, _ = guarded
    with holder(server, "one") as one, holder(server, "two") as two:
        yield one, two


class holder:  # noqa: N801 - it is used as a function is
    def __init__(self, server, name):
        key, token = create_key(server.environment, name, scopes=SCOPES[:4])
        self.client = server.client(token)
        furnish(self.client, name="same-name")
        sandbox, run_id = furnish(self.client)
        self.held = Holder(key, token, self.client, sandbox, run_id)

    def __enter__(self):
        return self.held

    def __exit__(self, *_):
        self.client.close()


def create_key(environment, name, *, scopes, **options):
    """A key's id and token, made as a person would, while a server may be running."""
    words = [word for scope in scopes for word in ("--scope", scope)]
    words += [word for option, value in options.items() for word in (f"--{option.replace('_', '-')}", str(value))]
    made = run(["keys", "create", "--json", "--name", name, *words], environment)
    assert made.returncode == 0, made.stderr
    document = json.loads(made.stdout)
    return document["key"]["id"], document["token"]


def furnish(client, **body):
    """A new sandbox with files, and a run in it that has ended; their ids."""
    made = client.post("/v1/sandboxes", json={"rootfs": "host"} | body)
    assert made.status_code == 201, made.text
    path = made.headers["location"]
    for name in ("main.py", "hello.py"):
        assert client.put(f"{path}/files/{name}", content=b"print('hello')").status_code == 201
    run = client.post(f"{path}/exec", json={"filename": "hello.py", "detach": True}).headers["location"]
    until(lambda: client.get(run).json()["status"] == "exited")
    return path.rpartition("/")[2], run.rpartition("/")[2]


def call(client, method, call, sandbox, run):
    headers = {"Accept": "application/json"} | (call.headers or {})
    url = call.path.format(sandbox=sandbox, run=run)
    return client.request(method, url, json=call.json, content=call.content, headers=headers)


# --- every route ---


def test_every_operation_has_a_case(guarded):
    document = guarded[1].get("/openapi.json").json()
    methods = ("get", "put", "post", "delete", "patch", "head", "options")
    there = {(method, path) for path, item in document["paths"].items() for method in item if method in methods}
    assert there == CALLS.keys()


NAMING = [case for case in EACH if case.values[1].names_one]  # tests of listings have the others


@pytest.mark.parametrize(("method", "this"), NAMING)
def test_what_another_has_is_answered_like_what_is_not_there(two, method, this):
    one, other = two
    before = everything(other)
    unknown = {"sandbox": "sb_" + "0" * 16, "run": "run_" + "0" * len(other.run.removeprefix("run_"))}
    mine = call(one.client, method, this, other.sandbox, other.run)
    nobodys = call(one.client, method, this, **unknown)
    assert mine.status_code == nobodys.status_code
    assert mine.content.replace(other.sandbox.encode(), b"ID").replace(other.run.encode(), b"ID") == (
        nobodys.content.replace(unknown["sandbox"].encode(), b"ID").replace(unknown["run"].encode(), b"ID")
    )
    assert told(mine) == told(nobodys)
    if this.needs == "audit":
        assert mine.json() == []
    else:
        assert mine.status_code == 404
        for secret in (other.key, "hello", "main.py") if method != "head" else ():
            assert secret.encode() not in mine.content.replace(b"'hello.py'", b"").replace(b"'main.py'", b"")
    assert everything(other) == before


def test_a_terminal_of_another_is_refused_like_one_of_nobody(guarded, two):
    one, other = two
    answers = []
    for sandbox in (other.sandbox, "sb_" + "0" * 16):
        url = f"ws://127.0.0.1:{guarded[0].port}/v1/sandboxes/{sandbox}/terminal"
        with pytest.raises(InvalidStatus) as refused:
            connect(url, additional_headers={"Authorization": f"Bearer {one.token}"}, proxy=None)
        answers.append(
            (refused.value.response.status_code, refused.value.response.body.replace(sandbox.encode(), b"ID"))
        )
    assert answers[0] == answers[1]
    assert answers[0][0] == 404


@pytest.mark.parametrize("how", ["prefix", "digits", "name"])
def test_another_cannot_be_guessed_by_the_beginning_of_its_id_or_by_its_name(two, how):
    one, other = two
    own = {"prefix": other.sandbox[:9], "digits": other.sandbox[3:], "name": "others-own"}[how]
    if how == "name":
        furnish(other.client, name="others-own")
    nobody = {"prefix": "sb_ffff00", "digits": "f" * 16, "name": "nobodys-own"}[how]
    seen, unseen = one.client.get(f"/v1/sandboxes/{own}"), one.client.get(f"/v1/sandboxes/{nobody}")
    assert seen.status_code == unseen.status_code == 404
    assert seen.text.replace(own, "X") == unseen.text.replace(nobody, "X")
    assert other.client.get(f"/v1/sandboxes/{own}").status_code == 200


def test_listings_hold_what_is_ones_own_and_no_more(guarded, two):
    _, admin = guarded
    one, other = two
    for mine, theirs in ((one, other), (other, one)):
        assert {item["owner"] for item in mine.client.get("/v1/sandboxes").json()["items"]} == {mine.key}
        assert {item["owner"] for item in mine.client.get("/v1/runs").json()} == {mine.key}
        told = mine.client.get("/v1/audit", params={"limit": 10_000}).text
        assert mine.sandbox in told
        assert mine.run in told
        for secret in (theirs.key, theirs.sandbox, theirs.run):
            assert secret not in told
        assert {record["actor"] for record in json.loads(told)} == {mine.key}
    everybody = admin.get("/v1/sandboxes", params={"limit": 1000}).json()["items"]
    assert {one.key, other.key} <= {item["owner"] for item in everybody}
    assert {one.run, other.run} <= {item["run_id"] for item in admin.get("/v1/runs").json()}
    for held in two:
        assert admin.get(f"/v1/sandboxes/{held.sandbox}/files/main.py").status_code == 200
        assert admin.get(f"/v1/runs/{held.run}/output").text == "hello\n"
        assert admin.get("/v1/audit", params={"sandbox": held.sandbox}).json()


def test_two_keys_may_use_the_same_name_and_the_same_idempotency_key(two):
    one, other = two
    names = [held.client.get("/v1/sandboxes/same-name").json() for held in two]
    assert [name["owner"] for name in names] == [one.key, other.key]
    assert problem(one.client.post("/v1/sandboxes", json={"name": "same-name"}))["status"] == 409
    headers = {"Idempotency-Key": "the same"}
    made = [held.client.post("/v1/sandboxes", json={"rootfs": "host"}, headers=headers) for held in two]
    assert [answer.status_code for answer in made] == [201, 201]
    assert made[0].json()["id"] != made[1].json()["id"]


# --- scopes and keys ---


@pytest.mark.parametrize(("method", "this"), EACH)
def test_a_scope_opens_its_routes_and_no_other(guarded, keys, method, this):
    server, _ = guarded
    own = "furnished-for-admin"
    for scope, token in keys.items():
        with server.client(token) as client:
            # The admin key alone sees what it has not made; to each other one everything here is not there.
            answer = call(client, method, this, own, "run_" + "0" * 16)
            allowed = this.needs in {None, scope}
            assert (answer.status_code != 403) == allowed, (scope, answer.status_code, answer.text)
            if not allowed and method != "head":
                found = problem(answer)
                assert this.needs in found["detail"]


@pytest.mark.parametrize(("method", "this"), EACH)
def test_a_key_with_the_scope_gets_the_answer_over_tcp_and_anybody_over_the_unix_socket(guarded, method, this):
    server, admin = guarded
    with server.client(over_socket=True) as local:
        for client in (admin, local):
            sandbox, run_id = furnish(client)
            answer = call(client, method, this, sandbox, run_id)
            assert answer.status_code == this.expected, answer.text
            client.delete(f"/v1/sandboxes/{sandbox}")


@pytest.mark.parametrize(("method", "this"), EACH)
@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer jk_0123456789abcdef_" + "A" * 43, "Basic YTpi", "bearer x y", "{wrong}"],
)
def test_without_a_valid_key_it_is_a_401(guarded, two, method, this, header):
    server, _ = guarded
    wrong = f"Bearer {two[0].token[:-2]}" + ("AA" if not two[0].token.endswith("AA") else "BB")
    with server.client() as client:
        if header is not None:
            client.headers["Authorization"] = wrong if header == "{wrong}" else header
        answer = call(client, method, this, two[0].sandbox, two[0].run)
    if this.needs is None:
        assert answer.status_code == this.expected
        return
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")
    if method != "head":
        assert two[0].sandbox not in problem(answer)["detail"]


def test_a_revoked_or_expired_key_is_no_key(guarded):
    server, _ = guarded
    key, token = create_key(server.environment, "short", scopes=["read"])
    _, brief = create_key(server.environment, "brief", scopes=["read"], ttl="2s")
    with server.client(token) as client, server.client(brief) as briefly:
        assert client.get("/v1/sandboxes").status_code == 200
        assert briefly.get("/v1/sandboxes").status_code == 200
        assert run(["keys", "revoke", key], server.environment).returncode == 0
        assert problem(client.get("/v1/sandboxes"))["status"] == 401  # at once
        until(lambda: briefly.get("/v1/sandboxes").status_code == 401)


def test_what_a_revoked_key_had_its_namesake_has_not(guarded):
    server, _ = guarded
    key, token = create_key(server.environment, "namesake", scopes=SCOPES[:4])
    with server.client(token) as client:
        sandbox, _ = furnish(client)
    run(["keys", "revoke", key], server.environment)
    _, token = create_key(server.environment, "namesake", scopes=SCOPES[:4])
    with server.client(token) as client:
        assert client.get(f"/v1/sandboxes/{sandbox}").status_code == 404
        assert client.get("/v1/sandboxes").json()["items"] == []


def test_the_limits_of_a_key_are_answered_with_429(guarded):
    server, _ = guarded
    _, token = create_key(server.environment, "limited", scopes=SCOPES[:3], max_execs=1, max_sandboxes=2)
    with server.client(token) as client, server.client(token) as other:
        first, second = (client.post("/v1/sandboxes", json={"rootfs": "host"}).headers["location"] for _ in "ab")
        refused = client.post("/v1/sandboxes", json={"rootfs": "host"})
        assert problem(refused)["status"] == 429
        assert int(refused.headers["retry-after"]) >= 1
        client.delete(second)
        assert client.post("/v1/sandboxes", json={"rootfs": "host"}).status_code == 201

        client.put(f"{first}/files/main.py", content=SLEEP)
        detached = client.post(f"{first}/exec", json={"filename": "main.py", "detach": True}).headers["location"]
        for kind in ("application/json", "text/event-stream"):
            refused = other.post(f"{first}/exec", json={"command": ["/bin/true"]}, headers={"Accept": kind})
            assert problem(refused)["status"] == 429
            assert int(refused.headers["retry-after"]) >= 1
        client.delete(detached)
        until(lambda: other.post(f"{first}/exec", json={"command": ["/bin/true"]}).status_code == 200)


def test_the_first_key_that_is_made_while_a_server_runs_makes_it_ask_for_one_at_once(fresh_environment, tmp_path):
    environment = fresh_environment()
    with (
        serving(environment, tmp_path / "server") as server,
        server.client() as anybody,
        server.client(over_socket=True) as local,
    ):
        sandbox, _ = furnish(anybody)
        key, token = create_key(environment, "first", scopes=["read"])
        assert problem(anybody.get("/v1/sandboxes"))["status"] == 401
        assert local.get(f"/v1/sandboxes/{sandbox}").status_code == 200
        with server.client(token) as client:
            assert client.get("/v1/sandboxes").json()["items"] == []
        run(["keys", "revoke", key], environment)
        assert problem(anybody.get("/v1/sandboxes"))["status"] == 401  # to revoke the last opens nothing


def test_the_key_is_the_actor_of_what_it_did(guarded, two):
    _, admin = guarded
    made = [
        one for one in admin.get("/v1/audit", params={"sandbox": two[0].sandbox}).json() if one["actor"] == two[0].key
    ]
    assert {"sandbox.create", "files.write", "exec.start", "exec.end"} <= {record["event"] for record in made}


def test_no_token_is_in_the_log(guarded, two):
    server, _ = guarded
    text = server.log_path.read_text()
    for held in two:
        assert held.token not in text
        assert held.token.rpartition("_")[2] not in text


# --- within ---


def told(answer):
    """The headers of an answer that could say something."""
    return {name: value for name, value in answer.headers.items() if name not in {"date", "content-length"}}


def everything(held):
    """What the holder has, as it is seen."""
    path, run_path = f"/v1/sandboxes/{held.sandbox}", f"/v1/runs/{held.run}"
    urls = (
        path,
        f"{path}/files",
        f"{path}/files/main.py",
        run_path,
        f"{run_path}/output",
        f"/v1/audit?sandbox={held.sandbox}",
    )
    return [(answer.status_code, answer.content) for answer in map(held.client.get, urls)]
