"""Real projects: source archives as PyPI has them, whose own tests come to the same in a sandbox as on the host.

The archive is put into the sandbox as it is, with pytest unpacked beside it; a runner, started by its filename,
unpacks and tests it there. sortedcontainers ships no tests but the examples in its documentation, which its
authors run with pytest as well; parso ships 1351 tests of three packages.
"""

import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from conftest import CACHE

HOST_PYTHON = "/usr/bin/python3"
NO_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

# What pip is to fetch: exactly this, since it runs the setup.py in it to learn whether the name is right.
ARCHIVES = {
    "sortedcontainers-2.4.0": "25caa5a06cc30b6b83d11423433f65d1f9d76c4c6a0c90e3379eaa43b9bfdb88",
    "parso-0.8.4": "eb3a7b58240fb99099a345571deecc0f9540ea5f4dd2fe14c2a99d6b281ab92d",
}
PYTEST_OPTIONS = {
    "sortedcontainers-2.4.0": ["--doctest-modules", "--doctest-glob=*.rst"],
    "parso-0.8.4": [],
}
# Under Debian's Python 3.11. The example shows pages of `help`, the path of the module among them: it fails anywhere.
FAILING = {"sortedcontainers-2.4.0": ["README.rst::README.rst"], "parso-0.8.4": []}
AT_LEAST = {"sortedcontainers-2.4.0": 60, "parso-0.8.4": 1300}
PYTEST_PARTS = ("pytest", "pluggy", "iniconfig", "packaging", "pygments")

RUNNER = """
import json, os, sys, tarfile
here = os.path.dirname(os.path.abspath(__file__))
project, *options = sys.argv[1:]
folder = os.path.join(here, project)
if not os.path.exists(folder):
    with tarfile.open(folder + ".tar.gz") as archive:
        archive.extractall(here)
os.chdir(folder)
sys.path[:0] = [folder, os.path.join(here, "vendor")]
import pytest

class Outcomes:
    def __init__(self):
        self.of = {}
    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.of[report.nodeid] = report.outcome

outcomes = Outcomes()
pytest.main(["-q", *options], plugins=[outcomes])
with open(os.path.join(here, "outcomes.json"), "w") as file:
    json.dump({"python": sys.version, "outcomes": outcomes.of}, file)
"""


@pytest.fixture(scope="module", params=ARCHIVES)
def project(request):
    return request.param


@pytest.fixture(scope="module")
def fill(project):
    """`fill(folder)` puts there what a run needs: the archive, pytest, the runner."""

    def fill(folder):
        shutil.copy(fetched(project), folder)
        copy_pytest(folder / "vendor")
        (folder / "run_tests.py").write_text(RUNNER)

    return fill


@pytest.fixture(scope="module")
def on_host(project, fill, tmp_path_factory):
    """What the project's tests come to here, with the interpreter the system has."""
    folder = tmp_path_factory.mktemp("host")
    fill(folder)
    argv = [HOST_PYTHON, folder / "run_tests.py", project, *PYTEST_OPTIONS[project]]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8"} | NO_PLUGINS
    subprocess.run(argv, env=environment, check=True, capture_output=True)
    return json.loads((folder / "outcomes.json").read_bytes())


@pytest.mark.parametrize("rootfs", ["recipe", "host"])
def test_its_own_tests_come_to_the_same_in_a_sandbox_and_the_next_exec_finds_their_cache(
    project, fill, on_host, rootfs, jhansi, tmp_path
):
    fill(tmp_path)
    box = jhansi("create", "--rootfs", rootfs).stdout.strip()
    assert jhansi("put", box, *tmp_path.iterdir()).returncode == 0
    variables = [f"--env={name}={value}" for name, value in NO_PLUGINS.items()]
    limits = ["--timeout=1800", "--cpu-time=1800", "--memory=2G"]  # sortedcontainers' examples take 1.2G

    first = jhansi("exec", *limits, *variables, box, "run_tests.py", project, *PYTEST_OPTIONS[project])
    assert first.returncode == 0, first.stdout + first.stderr
    inside = outcomes_in(box, jhansi, tmp_path)
    assert len(inside["outcomes"]) >= AT_LEAST[project]
    failed = [name for name, outcome in inside["outcomes"].items() if outcome == "failed"]
    # Under another Python other tests may fail; that of the host is the same in a sandbox with --rootfs host.
    if rootfs == "host" or minor_version(inside) == minor_version(on_host):
        assert inside["outcomes"] == on_host["outcomes"]
    if rootfs == "recipe":
        assert failed == FAILING[project]

    cached = jhansi("exec", "--command", box, "cat", f"{project}/.pytest_cache/v/cache/nodeids")
    assert set(json.loads(cached.stdout)) == set(inside["outcomes"])
    failed_last = ["--last-failed", "--last-failed-no-failures=none", *PYTEST_OPTIONS[project]]
    assert jhansi("exec", *limits, *variables, box, "run_tests.py", project, *failed_last).returncode == 0
    assert outcomes_in(box, jhansi, tmp_path)["outcomes"] == dict.fromkeys(failed, "failed")


def outcomes_in(box, jhansi, folder):
    answer = jhansi("get", box, "outcomes.json", "-o", folder / "outcomes.json")
    assert answer.returncode == 0, answer.stderr
    return json.loads((folder / "outcomes.json").read_bytes())


def minor_version(told):
    return told["python"].split(".")[:2]


def fetched(project):
    """The path of the archive, fetched with pip unless an earlier test run has."""
    folder = pathlib.Path(CACHE, "archives")
    archive = folder / f"{project}.tar.gz"
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        name, _, version = project.rpartition("-")
        wanted = folder / f"{project}.txt"
        wanted.write_text(f"{name}=={version} --hash=sha256:{ARCHIVES[project]}\n")
        argv = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", name, "--require-hashes"]
        answer = subprocess.run(
            [*argv, "--requirement", wanted, "--dest", folder], capture_output=True, text=True, check=False
        )
        assert answer.returncode == 0, answer.stderr
    return archive


def copy_pytest(folder):
    """The very pytest that runs this test, without what it can do without."""
    for part in PYTEST_PARTS:
        for file in importlib.metadata.files(part):
            if file.suffix == ".py" and ".." not in file.parts:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file.locate(), folder / file)
