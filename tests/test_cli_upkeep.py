"""The command line's audit, doctor and completion: real processes, judged by what they print and end with."""

import json
import subprocess
import sys

import pytest
from conftest import environment_with, run


@pytest.fixture
def environment(tmp_path):
    return environment_with(tmp_path / "home")


@pytest.fixture
def jhansi(environment):
    """`jhansi(*words, **options)` runs one jhansi-run over an empty JHANSI_HOME."""
    return lambda *words, **options: run(words, environment, **options)


@pytest.fixture
def box(jhansi, tmp_path):
    """A sandbox of that name that holds main.py and whose programs are the host's."""
    (tmp_path / "main.py").write_text("")
    identity = jhansi("create", "--name", "box", "--rootfs", "host").stdout.strip()
    assert jhansi("put", identity, tmp_path / "main.py").returncode == 0
    return identity


def document(answer):
    """The JSON document that is all of stdout."""
    return json.loads(answer.stdout)


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
