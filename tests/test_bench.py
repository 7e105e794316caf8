"""tools/bench: what it makes of figures, and one short run of it."""

import importlib
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import CHECKOUT

TOOLS = os.path.join(CHECKOUT, "tools")
ROW = {"p50_ms": 10.04, "p95_ms": 12.5, "p99_ms": 20.0, "ratio": 1.0, "cpu_ms": 9.0}
DOCUMENT = {
    "host": {
        "kernel": "6.1",
        "machine": "x86_64",
        "processors": 2,
        "python": "3.11.2",
        "bare_python": "3.11.2",
        "uid": 1000,
    },
    "sections": {
        "hello": {"rounds": 2, "first": "bare", "ways": {"bare": ROW, "Runtime warm": ROW | {"ratio": 0.253}}},
        "data": {"left_out": "the root tree of python-data is not here"},
        "callers": {"seconds": 1.0, "first": "bare", "execs_per_second": {"bare": {"1": 97.4, "32": 180.0}}},
        "existing": {"rounds": 2, "verbs": {"list all": {"10": ROW, "10000": ROW}}},
        "memory": {
            "slots": 16,
            "as_root": False,
            "languages": {
                "python": {
                    "is_pss": True,
                    "preloaded": False,
                    "launcher_bytes": 9e6,
                    "zygote_bytes": 8e6,
                    "slot_bytes": 1.5e6,
                    "zygote_slot_bytes": 2e6,
                    "slot_of_the_machine_bytes": 3e6,
                    "zygote_slot_of_the_machine_bytes": 4e6,
                }
            },
        },
    },
}


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("bench_report")


def rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_tables_say_what_was_measured(report):
    text = report.text(DOCUMENT)

    assert ["Runtime warm", "10.0 ms", "12.5 ms", "20.0 ms", "0.25", "9.0 ms"] in rows(text)
    assert ["bare", "97", "180"] in rows(text)
    assert ["list all", "10.0 ms (1.00)", "10.0 ms (1.00)"] in rows(text)
    assert ["slot that waits", "1.50"] in rows(text)
    assert "left out: the root tree of python-data is not here" in text
    assert "as an ordinary user: 2 CPUs (x86_64), Linux 6.1" in text


def test_the_readme_has_a_place_for_the_figures_and_keeps_the_rest(report, monkeypatch, tmp_path):
    with open(report.README, encoding="utf-8") as file:
        original = file.read()
    copy = tmp_path / "README.md"
    copy.write_text(original, encoding="utf-8")
    monkeypatch.setattr(report, "README", str(copy))
    monkeypatch.setattr(report, "draw", lambda *_: None)

    for _ in range(2):  # the second time over what the first has made
        report.write_readme(DOCUMENT)

    made = copy.read_text(encoding="utf-8")
    place = re.compile(f"{re.escape(report.BEGIN)}(.*){re.escape(report.END)}", re.DOTALL)
    assert place.sub("", made) == place.sub("", original)
    assert "| Runtime warm | 10.0 ms | 12.5 ms | 20.0 ms | 0.25 | 9.0 ms |" in place.search(made)[1]


def test_the_picture_is_the_same_each_time(report, tmp_path):
    pytest.importorskip("matplotlib", reason="the picture takes the extra `bench`")
    pictures = [tmp_path / name for name in ("one.svg", "two.svg")]
    for picture in pictures:
        report.draw(DOCUMENT, str(picture))

    one, two = (picture.read_text(encoding="utf-8") for picture in pictures)
    assert one == two
    assert all(f">{said}<" in one for said in ("bare", "Runtime warm", "10.0 ms"))


def run(environment, *options):
    argv = [sys.executable, os.path.join(TOOLS, "bench"), "--as-root", *options]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)


def test_a_run_compares_every_way_with_the_bare_program(runtime_environment, tmp_path):
    made = tmp_path / "figures.json"
    answer = run(runtime_environment, "-n", "2", "--only", "hello", "--json", str(made))
    assert answer.returncode == 0, answer.stderr

    section = json.loads(made.read_text())["sections"]["hello"]
    ours = {f"{way} {how}" for way in ("Runtime", "POST", "jhansi-run") for how in ("cold", "warm")}
    assert {"bare", *ours} <= section["ways"].keys()
    assert section["ways"]["bare"]["ratio"] == 1.0
    assert all(row["p50_ms"] > 0 and row["cpu_ms"] >= 0 for row in section["ways"].values())
    assert '| `print("hello")`' in answer.stdout


def test_many_execs_through_a_server_leave_it_as_it_was(runtime_environment, tmp_path):
    made = tmp_path / "figures.json"
    answer = run(runtime_environment, "--long", "12", "--json", str(made))
    assert answer.returncode == 0, answer.stderr

    section = json.loads(made.read_text())["sections"]["long"]
    assert section["held"]["first"]["descriptors"] > 3
    assert (section["execs"], section["block"]) == (12, 6)
    assert not [name for name in os.listdir(runtime_environment["JHANSI_HOME"]) if name.startswith("bench-")]
