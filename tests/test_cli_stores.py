"""The commands that run no program, as a user meets them: sandboxes, files, audit, doctor, completion."""

import json
import os
import subprocess
import sys

import pytest
from conftest import WAYS, by_way, environment_with, run

HOSTILE = b"a\n\x1b[31m\xff"


@pytest.fixture(params=WAYS)
def environment(request, tmp_path):
    with by_way(request.param, environment_with(tmp_path / "home")) as environment:
        yield environment


@pytest.fixture
def jhansi(environment):
    """`jhansi(*words, **options)` runs one jhansi-run over an empty JHANSI_HOME."""
    return lambda *words, **options: run(words, environment, **options)


@pytest.fixture
def box(jhansi, tmp_path):
    """A sandbox of that name that holds main.py and whose programs are the host's."""
    (tmp_path / "main.py").write_text("print(1)\n")
    identity = jhansi("create", "--name", "box", "--rootfs", "host").stdout.strip()
    assert jhansi("put", identity, tmp_path / "main.py").returncode == 0
    return identity


def document(answer):
    """The JSON document that is all of stdout."""
    return json.loads(answer.stdout)


# --- sandboxes and files --------------------------------------------------------------------------------------


def test_create_prints_the_id_alone_and_the_id_a_prefix_and_the_name_all_reach_it(jhansi, box):
    assert len(box.split()) == 1
    for reference in (box, box[:-1], "box"):
        assert document(jhansi("show", reference, "--json"))["id"] == box


def test_create_keeps_what_it_was_told(jhansi):
    words = ["--label", "team=red=blue", "--label", "empty=", "--ttl", "2h", "--timeout", "1m30s", "--output", "2M"]
    words += ["--no-zygote", "--preload", "json", "--preload", "email.message"]
    created = document(jhansi("create", "--rootfs", "host", "--json", *words))
    assert created == document(jhansi("show", created["id"], "--json"))
    assert created["labels"] == {"team": "red=blue", "empty": ""}
    assert created["limits"]["timeout"] == 90.0
    assert created["limits"]["output"] == 2 * 1024**2
    assert created["rootfs"] == "host"
    assert (created["zygote"], created["preload"]) == (False, ["json", "email.message"])
    shown = dict(line.split(maxsplit=1) for line in jhansi("show", created["id"]).stdout.splitlines())
    assert (shown["zygote"], shown["preload"]) == ("no", "json email.message")
    assert created["expires_at"] > created["created_at"]
    learning = document(jhansi("create", "--rootfs", "host", "--json", "--preload", "auto"))
    assert learning["preload"] == "auto"
    assert ["preload", "auto"] in [line.split() for line in jhansi("show", learning["id"]).stdout.splitlines()]


def test_ls_lists_all_or_those_with_a_label(jhansi, box):
    red = jhansi("create", "--rootfs", "host", "--label", "team=red").stdout.strip()
    assert {entry["id"] for entry in document(jhansi("ls", "--json"))} == {box, red}
    assert [entry["id"] for entry in document(jhansi("ls", "--json", "--label", "team=red"))] == [red]
    listing = jhansi("ls").stdout
    assert listing.startswith("ID ")
    assert {line.split()[0] for line in listing.splitlines()[1:]} == {box, red}


def test_rm_removes_the_others_when_one_is_not_there_and_says_so_in_its_status(jhansi, box):
    other = jhansi("create", "--rootfs", "host").stdout.strip()
    answer = jhansi("rm", box, "nobody", other)
    assert answer.returncode == 125
    assert len(answer.stderr.splitlines()) == 1
    assert "nobody" in answer.stderr
    assert document(jhansi("ls", "--json")) == []


def test_gc_removes_what_is_out_of_time_and_nothing_else(jhansi, box):
    expired = jhansi("create", "--rootfs", "host", "--ttl", "1ms").stdout.strip()
    assert jhansi("gc").stdout == f"{expired}\n"
    assert [entry["id"] for entry in document(jhansi("ls", "--json"))] == [box]


@pytest.mark.usefixtures("box")
def test_files_and_folders_go_in_and_come_out_as_they_were(jhansi, tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "data").write_bytes(bytes(range(256)))
    (tmp_path / "single").write_text("alone")
    (tmp_path / "out").mkdir()
    assert jhansi("put", "box", tmp_path / "in", tmp_path / "single", "--to", "sub").returncode == 0
    assert jhansi("get", "box", "sub/in", "sub/single", "-o", tmp_path / "out").returncode == 0
    assert (tmp_path / "out" / "in" / "deep" / "data").read_bytes() == bytes(range(256))
    assert (tmp_path / "out" / "single").read_text() == "alone"


@pytest.mark.usefixtures("box")
def test_get_writes_to_the_named_file_or_into_the_current_folder(jhansi, tmp_path):
    (tmp_path / "here").mkdir()
    assert jhansi("get", "box", "main.py", "-o", tmp_path / "copy.py").returncode == 0
    assert jhansi("get", "box", "main.py", cwd=tmp_path / "here").returncode == 0
    assert (tmp_path / "copy.py").read_text() == (tmp_path / "here" / "main.py").read_text() == "print(1)\n"


@pytest.mark.usefixtures("box")
def test_a_listing_of_hostile_names_has_one_printable_line_each_and_json_keeps_every_byte(jhansi, tmp_path):
    path = os.path.join(os.fsencode(tmp_path), HOSTILE)
    with open(path, "wb"):
        pass
    assert jhansi("put", "box", path).returncode == 0
    lines = jhansi("files", "box").stdout.splitlines()
    assert len(lines) == 3
    assert lines[1].endswith("  a\\n\\x1b[31m\\xff")
    assert os.fsencode(document(jhansi("files", "box", "--json"))[0]["path"]) == HOSTILE


# --- audit, doctor, completion ----------------------------------------------------------------------------------


def test_audit_show_tells_what_happened_and_picks_by_sandbox_run_and_time(jhansi, box):
    jhansi("create", "--rootfs", "host")
    run_id = document(jhansi("exec", "--json", "box", "main.py", "secret\x1b[31m"))["run_id"]
    lines = jhansi("audit", "show").stdout.splitlines()
    assert lines[0].split() == ["TIME", "EVENT", "SANDBOX", "RUN", "WHAT"]
    assert all(line.isprintable() for line in lines)
    of_box = document(jhansi("audit", "show", "--sandbox", "box", "--json"))
    assert {record["sandbox_id"] for record in of_box} == {box}
    assert {record["event"] for record in of_box} >= {"sandbox.create", "files.write", "exec.start", "exec.end"}
    of_run = document(jhansi("audit", "show", "--run", run_id, "--json"))
    assert [record["event"] for record in of_run] == ["exec.start", "exec.end"]
    assert document(jhansi("audit", "show", "--since", "2999-01-01", "--json")) == []
    assert len(document(jhansi("audit", "show", "--since", "1h", "--json"))) == len(lines) - 1


def test_audit_show_still_finds_a_sandbox_that_is_gone(jhansi, box):
    jhansi("rm", "box")
    events = [record["event"] for record in document(jhansi("audit", "show", "--sandbox", box, "--json"))]
    assert (events[0], events[-1]) == ("sandbox.create", "sandbox.delete")


@pytest.mark.usefixtures("box")
def test_audit_verify_is_0_until_a_byte_is_changed_and_then_1_with_the_sentence(jhansi, tmp_path):
    log = tmp_path / "home" / "audit" / "audit.jsonl"
    answer = jhansi("audit", "verify")
    assert (answer.returncode, len(answer.stdout.splitlines())) == (0, 1)
    log.write_bytes(log.read_bytes().replace(b"box", b"fox"))
    answer = jhansi("audit", "verify")
    assert answer.returncode == 1
    assert answer.stdout.startswith("record 1 ")
    found = document(jhansi("audit", "verify", "--json"))
    assert (found["ok"], found["seq"]) == (False, 1)


@pytest.mark.usefixtures("box")
def test_audit_export_is_the_log_byte_for_byte_and_its_anchor_is_accepted(jhansi, tmp_path):
    log = (tmp_path / "home" / "audit" / "audit.jsonl").read_bytes()
    assert jhansi("audit", "export", text=False, errors=None).stdout == log
    anchor = jhansi("audit", "export", "-o", tmp_path / "copy", "--anchor").stdout.strip()
    assert (tmp_path / "copy").read_bytes() == log
    assert jhansi("audit", "export", "--anchor").stdout.strip() == anchor
    assert jhansi("audit", "verify", "--anchor", anchor).returncode == 0
    assert jhansi("audit", "verify", "--anchor", f"1:{'0' * 64}").returncode == 1


def test_doctor_is_0_exactly_when_every_check_is_ok(jhansi):
    answer = jhansi("doctor", "--json")
    checks = document(answer)
    assert answer.returncode == (0 if all(check["ok"] for check in checks) else 1)
    assert all(check["ok"] or check["remedy"] for check in checks)
    table = jhansi("doctor").stdout.splitlines()
    assert len(table) == len(checks) + 1


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["ex"], "exec"),
        (["exec", "--time"], "--timeout"),
        (["exec", "b"], "box"),
        (["exec", "--timeout", "3", "box", "ma"], "main.py"),
        (["rm", "box", "b"], "box"),
        (["create", "--language", "py"], "python"),
        (["rootfs", "bui"], "build"),
        (["rootfs", "build", "p"], "python"),
        (["audit", "show", "--sandbox", "b"], "box"),
    ],
)
@pytest.mark.usefixtures("box")
def test_a_shell_is_told_how_a_word_may_go_on(jhansi, environment, typed, offered):
    words = ["jhansi-run", *typed]
    asked = {"_JHANSI_RUN_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(typed))}
    answer = jhansi(env=environment | asked)
    assert f"plain,{offered}" in answer.stdout.splitlines()
    assert answer.stderr == ""


def test_bash_completes_with_the_script_that_completion_prints(jhansi, environment, tmp_path):
    (tmp_path / "jhansi-run").write_text(f'#!/bin/sh\nexec {sys.executable} -m jhansi_runtime "$@"\n')
    (tmp_path / "jhansi-run").chmod(0o755)
    script = f"""{jhansi("completion", "bash").stdout}
        COMP_WORDS=(jhansi-run docto) COMP_CWORD=1
        _jhansi_run_completion jhansi-run docto jhansi-run
        echo "${{COMPREPLY[@]}}"
    """
    path = f"{tmp_path}:{environment['PATH']}"
    answer = subprocess.run(
        ["bash", "-c", script], env=environment | {"PATH": path}, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "doctor"


def test_ls_tells_of_a_sandbox_it_cannot_read_and_lists_the_others(jhansi, environment):
    whole, broken = (jhansi("create").stdout.strip() for _ in range(2))
    record = os.path.join(environment["JHANSI_HOME"], "workspaces", broken, "sandbox.json")
    with open(record, "w") as file:
        file.write("{")

    listed = jhansi("ls")

    assert whole in listed.stdout
    assert broken not in listed.stdout
    assert broken in listed.stderr
