"""The API over many steps in any order, against a model of it: a dictionary of sandboxes with names, labels and files.

JHANSI_MODEL_EXAMPLES asks for more runs than the suite has time for, which are then others each time, or for fewer.
"""

import io
import json
import os
import tarfile
import time

import pytest
from conftest import run, serving
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
    run_state_machine_as_test,
)

USUAL_EXAMPLES = 15
EXAMPLES = int(os.environ.get("JHANSI_MODEL_EXAMPLES", USUAL_EXAMPLES))
SHORT, LONG = 0.05, 3600.0  # seconds
# Stands for what could not be created. It may depend on the clock whether that is so, and how many sandboxes there are
# to choose from must not: what comes next would be another choice each time that hypothesis goes through the steps.
NOWHERE = "sb_0000000000000000"
LOG, PROGRAM = "log", "look.py"
# Tells what it sees, then appends a line to a file.
SOURCE = f"""
import json, os, sys
seen = {{}}
for folder, _, names in os.walk("."):
    for name in names:
        path = os.path.join(folder, name)
        with open(path, "rb") as file:
            seen[os.path.relpath(path)] = file.read().hex()
with open("{LOG}", "a") as log:
    log.write(sys.argv[1])
print(json.dumps(seen))
"""
PATHS = st.sampled_from(["a", "b", "d", "d/x", "d/y", "d/e/z", "naïve file", LOG])
CONTENTS = st.sampled_from([b"", b"1", b"\x00\xff\n", b"long" * 2_000])
NAMES = st.sampled_from([None, "one", "two"])
LABELS = st.sampled_from([{}, {"team": "red"}, {"team": "blue", "kind": "x"}])
TTLS = st.sampled_from([None, LONG, LONG, SHORT])


class Sandbox:
    """What the model knows of one. When its time was short it may be gone at any moment, until it is collected."""

    def __init__(self, name, labels, ttl):
        self.name, self.labels, self.ttl = name, labels, ttl
        self.files, self.folders = {}, set()

    def has_room_for(self, path):
        return path not in self.folders and not any(above in self.files for above in parents(path))

    def write(self, path, content):
        self.files[path] = content
        self.folders.update(parents(path))

    def remove(self, path):
        below = f"{path}/"
        self.files = {one: content for one, content in self.files.items() if one != path and not one.startswith(below)}
        self.folders = {one for one in self.folders if one != path and not one.startswith(below)}


def parents(path):
    parts = path.split("/")[:-1]
    return {"/".join(parts[: count + 1]) for count in range(len(parts))}


class Machine(RuleBasedStateMachine):
    ids = Bundle("ids")

    def __init__(self, client, collect):
        super().__init__()
        self.client, self.collect = client, collect
        self.model = {}

    def teardown(self):
        for sandbox_id in self.model:
            assert self.client.delete(f"/v1/sandboxes/{sandbox_id}").status_code in {204, 404}

    def ask(self, method, sandbox_id, path="", **options):
        """The answer; None when the sandbox is not there any more, as it should be."""
        answer = self.client.request(method, f"/v1/sandboxes/{sandbox_id}{path}", **options)
        assert answer.status_code < 500, answer.text
        sandbox = self.model.get(sandbox_id)
        is_gone = answer.status_code == 404 and "there is no sandbox" in answer.text
        if sandbox is not None and is_gone:
            assert sandbox.ttl == SHORT
            del self.model[sandbox_id]
        assert is_gone or sandbox is not None, answer.text
        return None if is_gone else answer

    def is_taken(self, name, *, but=None):
        return name is not None and any(one.name == name for key, one in self.model.items() if key != but)

    # --- sandboxes ---

    @rule(target=ids, name=NAMES, labels=LABELS, ttl=TTLS)
    def create(self, name, labels, ttl):
        body = {"rootfs": "host", "name": name, "labels": labels, "ttl": ttl}
        answer = self.client.post("/v1/sandboxes", json=body)
        if answer.status_code == 409:
            assert self.is_taken(name)
            return NOWHERE
        assert answer.status_code == 201, answer.text
        assert not self.is_taken(name) or self.forgets_short()
        sandbox_id = answer.json()["id"]
        assert answer.headers["Location"] == f"/v1/sandboxes/{sandbox_id}"
        self.model[sandbox_id] = Sandbox(name, labels, ttl)
        return sandbox_id

    @rule(sandbox_id=ids, change=st.fixed_dictionaries({}, optional={"name": NAMES, "labels": LABELS, "ttl": TTLS}))
    def change(self, sandbox_id, change):
        answer = self.ask("PATCH", sandbox_id, json=change)
        if answer is None:
            return
        if answer.status_code == 409:
            assert self.is_taken(change["name"], but=sandbox_id)
            return
        assert answer.status_code == 200, answer.text
        for field, value in change.items():
            setattr(self.model[sandbox_id], field, value)

    @rule(sandbox_id=consumes(ids))
    def remove_sandbox(self, sandbox_id):
        answer = self.ask("DELETE", sandbox_id)
        if answer is not None:
            assert answer.status_code == 204
            del self.model[sandbox_id]

    @rule()
    def let_time_pass(self):
        time.sleep(2 * SHORT)
        assert self.collect().returncode == 0
        self.forgets_short()

    def forgets_short(self):
        """Forget those whose time is up. True, if there were any."""
        before = len(self.model)
        self.model = {key: one for key, one in self.model.items() if one.ttl != SHORT}
        return len(self.model) < before

    # --- files ---

    @rule(sandbox_id=ids, path=PATHS, content=CONTENTS, is_new=st.booleans())
    def put(self, sandbox_id, path, content, is_new):
        headers = {"If-None-Match": "*"} if is_new else {}
        answer = self.ask("PUT", sandbox_id, f"/files/{path}", content=content, headers=headers)
        if answer is None:
            return
        sandbox = self.model[sandbox_id]
        if not sandbox.has_room_for(path):
            assert answer.status_code in {409, 422}
            return
        was_there = path in sandbox.files
        assert answer.status_code == (412 if is_new and was_there else 200 if was_there else 201), answer.text
        if not (is_new and was_there):
            assert answer.json()["size"] == len(content)
            sandbox.write(path, content)

    @rule(sandbox_id=ids, content=CONTENTS)
    def put_over_what_was_read(self, sandbox_id, content):
        answer = self.ask("GET", sandbox_id, "/files/a")
        if answer is None or answer.status_code == 404:
            return
        fresh = self.ask("PUT", sandbox_id, "/files/a", content=content, headers={"If-Match": answer.headers["ETag"]})
        if fresh is None:
            return
        assert fresh.status_code == 200
        self.model[sandbox_id].write("a", content)
        stale = self.ask("PUT", sandbox_id, "/files/a", content=b"no", headers={"If-Match": answer.headers["ETag"]})
        assert stale is None or stale.status_code == 412

    @rule(sandbox_id=ids, files=st.dictionaries(st.sampled_from(["x", "y", "e/z"]), CONTENTS, min_size=1))
    def upload(self, sandbox_id, files):
        parts = [("file", (f"{path}", content)) for path, content in files.items()]
        answer = self.ask("POST", sandbox_id, "/files", params={"path": "d"}, files=parts)
        if answer is None:
            return
        sandbox = self.model[sandbox_id]
        if "d" in sandbox.files:
            assert answer.status_code in {409, 422}
            return
        assert answer.status_code == 201, answer.text
        for path, content in files.items():
            sandbox.write(f"d/{path}", content)

    @rule(sandbox_id=ids, path=PATHS)
    def remove_file(self, sandbox_id, path):
        answer = self.ask("DELETE", sandbox_id, f"/files/{path}")
        if answer is None:
            return
        sandbox = self.model[sandbox_id]
        if path in sandbox.files or path in sandbox.folders:
            assert answer.status_code == 204, answer.text
            sandbox.remove(path)
        else:
            assert answer.status_code in {404, 422}

    @rule(source=ids, copy=ids)
    def copy_all(self, source, copy):
        packed = self.ask("GET", source, "/archive")
        answer = self.ask("PUT", copy, "/archive", content=b"" if packed is None else packed.content)
        if packed is None:
            assert answer is None or answer.status_code == 422
            return
        if answer is None:
            return
        copied = self.archived(packed.content)
        if source in self.model:
            assert copied == (self.model[source].files, self.model[source].folders)
        sandbox, (files, folders) = self.model[copy], copied
        if any(not sandbox.has_room_for(path) for path in files) or any(folder in sandbox.files for folder in folders):
            assert answer.status_code == 409, answer.text
            return
        assert answer.status_code == 200, answer.text
        for path, content in files.items():
            sandbox.write(path, content)
        sandbox.folders |= folders

    def archived(self, content):
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            members = [(os.path.normpath(member.name), member) for member in tar]
            files = {path: tar.extractfile(member).read() for path, member in members if member.isfile()}
            return files, {path for path, member in members if member.isdir()} - {"."}

    # --- execs ---

    @rule(sandbox_id=ids, line=st.sampled_from(["one\n", "two\n"]))
    def execute(self, sandbox_id, line):
        if self.ask("PUT", sandbox_id, f"/files/{PROGRAM}", content=SOURCE) is None:
            return
        answer = self.ask("POST", sandbox_id, "/exec", json={"filename": PROGRAM, "args": [line]})
        if answer is None:
            return
        result = answer.json()
        assert (result["status"], result["exit_code"]) == ("exited", 0), result
        sandbox = self.model[sandbox_id]
        sandbox.write(PROGRAM, SOURCE.encode())
        assert json.loads(result["stdout"]) == {path: content.hex() for path, content in sandbox.files.items()}
        sandbox.write(LOG, sandbox.files.get(LOG, b"") + line.encode())

    # --- what must hold after every step ---

    @invariant()
    def the_listings_agree(self):
        listed = self.pages({})
        assert set(listed) >= {key for key, one in self.model.items() if one.ttl != SHORT}
        assert set(listed) <= set(self.model)
        for key, shown in listed.items():
            expected = self.model[key]
            assert (shown["name"], shown["labels"]) == (expected.name, expected.labels)
            assert (shown["expires_at"] is None) == (expected.ttl is None)
            if expected.name is not None and expected.ttl != SHORT:
                assert self.client.get(f"/v1/sandboxes/{expected.name}").json() == shown
        red = {key for key, one in listed.items() if one["labels"].get("team") == "red"}
        assert {key for key, one in self.model.items() if one.labels.get("team") == "red"} >= red
        assert set(self.pages({"label": "team=red"})) <= red

    def pages(self, wanted):
        """All sandboxes, two at a time, each of them once."""
        listed, cursor = [], {}
        while True:
            page = self.client.get("/v1/sandboxes", params={"limit": 2} | wanted | cursor).json()
            listed += page["items"]
            if page["next_cursor"] is None:
                assert len({one["id"] for one in listed}) == len(listed)
                return {one["id"]: one for one in listed}
            cursor = {"cursor": page["next_cursor"]}

    @invariant()
    def the_files_agree(self):
        for key in list(self.model):
            answer = self.ask("GET", key, "/files", params={"recursive": True})
            if answer is None:
                continue
            entries = {one["path"]: one for one in answer.json()}
            expected = self.model[key]
            assert {path for path, one in entries.items() if one["type"] == "directory"} == expected.folders
            sizes = {path: one["size"] for path, one in entries.items() if one["type"] == "file"}
            assert sizes == {path: len(content) for path, content in expected.files.items()}
            for path, content in expected.files.items():
                got = self.ask("GET", key, f"/files/{path}")
                assert got is None or got.content == content


@pytest.fixture
def server_of_its_own(fresh_environment, tmp_path):
    with serving(fresh_environment(), tmp_path / "server") as server:
        yield server


def test_any_steps_in_any_order_do_what_the_model_says(server_of_its_own):
    with server_of_its_own.client() as client:
        run_state_machine_as_test(
            lambda: Machine(client, lambda: run(["gc"], server_of_its_own.environment)),
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=30,
                derandomize=EXAMPLES <= USUAL_EXAMPLES,
                database=None,
                deadline=None,
                suppress_health_check=[HealthCheck.too_slow],
            ),
        )
