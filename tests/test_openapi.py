"""The OpenAPI document against the server that serves it: schemathesis sends good and bad requests of every operation.

JHANSI_SCHEMA_EXAMPLES asks for more examples of each operation than the few that the suite has time for,
JHANSI_SCHEMA_SEED for others than always the same.
"""

import io
import json
import os
import re
import tarfile
from collections import Counter

import pytest
import schemathesis
from conftest import run, serving
from schemathesis.engine import Status, events, from_schema
from schemathesis.openapi.checks import EnsureResourceAvailability
from schemathesis.transport.serialization import Binary

EXAMPLES = int(os.environ.get("JHANSI_SCHEMA_EXAMPLES", "25"))
SEED = int(os.environ.get("JHANSI_SCHEMA_SEED", "1"))
PROGRAM = "main.py"
NOBODY = "sb_0123456789abcdef"
LONGEST_EXEC = 1  # seconds
AN_HOUR = 3600
SCOPES = ("read", "write", "exec", "audit", "admin")
CHECKS = {
    # No document can tell whether a file is as If-Match says (412), or how long it is (416).
    "positive_data_acceptance": {"expected-statuses": ["2xx", "3xx", "404", "409", "412", "416", "429"]},
}
FILE = "/v1/sandboxes/{sandbox_id}/files/{path}"
OPERATIONS = {
    "/v1/sandboxes": {"get": "listSandboxes", "post": "createSandbox"},
    "/v1/sandboxes/{sandbox_id}": {"get": "showSandbox", "patch": "changeSandbox", "delete": "removeSandbox"},
    "/v1/sandboxes/{sandbox_id}/files": {"get": "listFiles", "post": "uploadFiles"},
    FILE: {
        "get": "downloadFile",
        "head": "lookAtFile",
        "put": "writeFile",
        "delete": "removeFile",
    },
    "/v1/sandboxes/{sandbox_id}/archive": {"get": "downloadArchive", "put": "unpackArchive"},
    "/v1/sandboxes/{sandbox_id}/exec": {"post": "exec"},
    "/v1/runs": {"get": "listRuns"},
    "/v1/runs/{run_id}": {"get": "showRun", "delete": "cancelRun"},
    "/v1/runs/{run_id}/output": {"get": "readOutput"},
    "/v1/languages": {"get": "listLanguages"},
    "/v1/audit": {"get": "listAuditRecords"},
    "/v1/health": {"get": "health"},
    "/metrics": {"get": "metrics"},
    "/openapi.json": {"get": "openapi"},
    "/docs": {"get": "documentation"},
}


@pytest.fixture(scope="module")
def guarded(fresh_environment, tmp_path_factory):
    """A server with one key that may do everything, and that key."""
    environment = fresh_environment()
    made = run(["keys", "create", *(f"--scope={scope}" for scope in SCOPES)], environment)
    assert made.returncode == 0, made.stderr
    with serving(environment, tmp_path_factory.mktemp("server")) as server:
        yield server, made.stdout.split()[-1]


@pytest.fixture
def try_all(guarded):
    """`try_all(**settings)` has schemathesis try the operations, and returns the answers; no check may fail."""
    server, token = guarded

    def try_all(**settings):
        config = schemathesis.Config.from_dict(
            {
                "seed": SEED,
                "headers": {"Authorization": f"Bearer {token}"},
                "base-url": server.url,
                "request-timeout": 30,
                "continue-on-failure": True,
                "generation": {
                    "max-examples": EXAMPLES,
                    "database": "none",
                    "deterministic": SEED == 1,
                    "no-shrink": True,
                },
                "checks": CHECKS,
            }
            | settings
        )
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", config=config)
        failures, answers = [], Counter()
        for event in from_schema(schema).execute():
            if isinstance(event, events.NonFatalError):
                failures.append(event.info.format())
            elif isinstance(event, events.FatalError):
                raise event.exception
            elif isinstance(event, events.ScenarioFinished):
                failures += failures_of(event)
                answers.update(answers_of(event))
        print(*sorted(answers.items(), key=str), sep="\n")
        print(*failures, sep="\n")
        assert not failures, "\n".join(failures)
        return answers

    schemathesis.hook("before_call")(bounded)
    schemathesis.hook("filter_failure")(is_of_the_document)
    schemathesis.serializer("application/x-tar")(tar_of)
    yield try_all
    for hook in (bounded, is_of_the_document):
        schemathesis.hooks.unregister(hook)


@pytest.fixture(scope="module")
def document(guarded):
    server, _ = guarded
    with server.client() as client:
        return client.get("/openapi.json").json()


def test_the_document_is_valid_and_whole(document):
    assert document["openapi"].startswith("3.1.")
    schemathesis.openapi.from_dict(document).validate()
    told = {
        path: {method: operation["operationId"] for method, operation in operations.items()}
        for path, operations in document["paths"].items()
    }
    assert told == OPERATIONS
    for operations in document["paths"].values():
        for operation in operations.values():
            assert operation["summary"]
            assert operation["description"]


def test_the_document_leads_nowhere_else(document):
    assert "://" not in json.dumps(document)
    assert [server["url"] for server in document["servers"]] == ["/"]


def test_the_document_of_a_server_without_keys_demands_none(api, document):
    open_to_all = api.get("/openapi.json").json()

    assert {} in open_to_all["security"]
    assert document["security"] == [{"key": []}]
    assert document["paths"]["/v1/health"]["get"]["security"] == []
    assert document["paths"].keys() == open_to_all["paths"].keys()


def test_every_problem_has_the_same_schema(document):
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for status, answer in operation["responses"].items():
                if status[0] in "45" and (path, status) not in {("/v1/health", "503"), (FILE, "416")}:
                    schema = answer["content"]["application/problem+json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/Problem"}, (method, path, status)


def test_a_method_that_a_path_does_not_know_is_told_which_ones_it_does(api, document):
    for path, operations in document["paths"].items():
        answer = api.request("TRACE", path.format(sandbox_id="x", path="x", run_id="x"))
        assert answer.status_code == 405, path
        assert answer.json()["status"] == 405
        allowed = {method.strip().lower() for method in answer.headers["Allow"].split(",")}
        assert allowed - {"options"} == set(operations), path


@pytest.fixture
def client(guarded):
    server, token = guarded
    with server.client(token) as client:
        yield client


def test_what_the_server_does_is_what_its_document_says(try_all):
    answers = try_all()
    tried = {tuple(label.lower().split()) for label, _ in answers}
    # schemathesis does not try the document that it was given.
    assert tried >= {(method, path) for path, methods in OPERATIONS.items() for method in methods} - {
        ("get", "/openapi.json")
    }


def test_so_it_is_for_a_sandbox_that_is_there_with_a_file_to_run_and_a_run(try_all, client):
    sandbox = client.post("/v1/sandboxes", json={"rootfs": "host"}).json()["id"]
    assert client.put(f"/v1/sandboxes/{sandbox}/files/{PROGRAM}", content="print(input())").status_code == 201
    body = {"filename": PROGRAM, "stdin": "hello", "detach": True}
    run_id = client.post(f"/v1/sandboxes/{sandbox}/exec", json=body).json()["run_id"]
    answers = try_all(
        parameters={"path.sandbox_id": sandbox, "path.path": PROGRAM, "path.run_id": run_id},
        operations=[{"include-method": "DELETE", "enabled": False}],
    )
    for label in {label for label, _ in answers if "{" in label}:
        assert any(answers[label, status] for status in (200, 201, 202)), label


def failures_of(event):
    """Lines for a person: which operation, which check, what was answered, and how to ask again."""
    for case_id, checks in event.recorder.checks.items():
        for check in checks:
            if check.status is Status.FAILURE:
                answer = event.recorder.interactions[case_id].response
                said = f"{answer.status_code} {answer.content[:300]!r}" if answer else "no answer"
                meaning = " ".join(str(check.failure_info.failure).split())
                yield f"{event.phase.value} {event.recorder.label}: {check.name}: {said}\n    {meaning}"
                yield f"    {check.failure_info.code_sample[:1000]}"


def answers_of(event):
    for case_id, interaction in event.recorder.interactions.items():
        yield (
            event.recorder.cases[case_id].value.operation.label,
            interaction.response and interaction.response.status_code,
        )


def bounded(_context, case, _kwargs):
    """What keeps a test of random requests from waiting, and from what it cannot foresee."""
    if case.operation.label.endswith("/exec") and isinstance(case.body, dict):
        limits = case.body.setdefault("limits", {})
        if isinstance(limits, dict) and isinstance(limits.get("timeout", AN_HOUR), float | int):
            limits["timeout"] = min(limits.get("timeout", LONGEST_EXEC), LONGEST_EXEC)
        if case.meta is not None and case.meta.generation.mode.is_positive and case.body.get("filename"):
            case.body["filename"] = PROGRAM
    if isinstance(case.headers.get("Idempotency-Key"), str):  # no two creates that differ have the same
        case.headers["Idempotency-Key"] += case.id
    # Nor does a sandbox go because its time is up.
    if isinstance(case.body, dict) and isinstance(case.body.get("ttl"), float | int) and case.body["ttl"] > 0:
        case.body["ttl"] = max(case.body["ttl"], AN_HOUR)
    # A sandbox is removed by its whole id: the beginning of one might be that of any.
    is_removal = case.operation.label == "DELETE /v1/sandboxes/{sandbox_id}"
    if is_removal and not re.fullmatch("sb_[0-9a-f]{16}", str(case.path_parameters["sandbox_id"])):
        case.path_parameters["sandbox_id"] = NOBODY


def is_of_the_document(_context, failure, _case, response):
    """Not of the state of a workspace or the host, which no document tells, nor of what Python takes for printable."""
    if isinstance(failure, EnsureResourceAvailability):
        # The program that an exec names may be missing, not the sandbox; nor was it `bounded` that asked for another.
        return b"there is no sandbox" in response.content and NOBODY.encode() not in response.content
    untold = (
        b"lies behind something that is not a folder",
        b"is a directory, not a file",
        b"too long or not printable",
        b"give more of the id",
        b"no room in the workspace",
        b"cannot be enforced by cgroups",
    )
    is_head = response.request.method == "HEAD"  # which does not say why
    return not (is_head and response.status_code == 422) and not any(reason in response.content for reason in untold)


def tar_of(_context, value):
    """An archive that holds what schemathesis would have sent: bytes at random are none."""
    content = value.data if isinstance(value, Binary) else str(value).encode()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        member = tarfile.TarInfo("unpacked")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return archive.getvalue()
