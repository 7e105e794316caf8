"""What README.md shows is run as it stands there: the flow over HTTP with curl, and with the client."""

import json
import pathlib
import re
import subprocess
import sys

import pytest
from conftest import CHECKOUT

OVER_HTTP = re.search(
    r"## Over HTTP\n(.*?)\n## ", pathlib.Path(CHECKOUT, "README.md").read_text(encoding="utf-8"), re.DOTALL
)[1]


def block(language, containing):
    (found,) = (code for code in re.findall(rf"```{language}\n(.*?)```", OVER_HTTP, re.DOTALL) if containing in code)
    return found


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "main.py").write_text("print(6 * 7)\n")
    return tmp_path


def test_the_flow_with_curl(server, folder):
    script = block("sh", "curl").replace("http://127.0.0.1:8700", server.url).replace("curl ", "curl -sS --fail ")
    answer = subprocess.run(
        ["bash", "-e", "-c", script.replace("\n", "; echo\n")], cwd=folder, capture_output=True, text=True, check=True
    )
    created, uploaded, result, *told = [line for line in answer.stdout.splitlines() if line]

    assert json.loads(created)["name"] == "web"
    assert [file["path"] for file in json.loads(uploaded)] == ["main.py"]
    assert json.loads(result)["stdout"] == "42\n"
    assert [line for line in told if line.startswith("event: ")] == ["event: start", "event: stdout", "event: end"]


def test_the_flow_with_the_client(server, folder):
    environment = server.environment | {"JHANSI_SOCKET": server.socket}
    argv = [sys.executable, "-c", block("python", "Client")]
    answer = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, check=False)

    assert (answer.stdout, answer.stderr) == ("42\n\n", "")
