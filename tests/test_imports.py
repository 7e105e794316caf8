"""Imports are the start time of the command line: what an exec loads is pinned here, and grows only on purpose."""

import subprocess
import sys

import pytest

THIRD_PARTY = {"msgspec"}
OURS = {
    "jhansi_runtime",
    "jhansi_runtime.appender",
    "jhansi_runtime.audit",
    "jhansi_runtime.beneath",
    "jhansi_runtime.chain",
    "jhansi_runtime.digest",
    "jhansi_runtime.disk",
    "jhansi_runtime.cli",
    "jhansi_runtime.cli.execs",
    "jhansi_runtime.cli.opening",
    "jhansi_runtime.cli.records",
    "jhansi_runtime.engine",
    "jhansi_runtime.engine.delegation",
    "jhansi_runtime.engine.descriptors",
    "jhansi_runtime.engine.exec",
    "jhansi_runtime.engine.launcher",
    "jhansi_runtime.engine.processors",
    "jhansi_runtime.engine.pump",
    "jhansi_runtime.engine.slot",
    "jhansi_runtime.engine.slots",
    "jhansi_runtime.engine.watchdog",
    "jhansi_runtime.engine.watches",
    "jhansi_runtime.engine.wiring",
    "jhansi_runtime.errors",
    "jhansi_runtime.explanations",
    "jhansi_runtime.flusher",
    "jhansi_runtime.execution",
    "jhansi_runtime.isolation",
    "jhansi_runtime.isolation.cgroup",
    "jhansi_runtime.isolation.channel",
    "jhansi_runtime.isolation.idmap",
    "jhansi_runtime.isolation.landlock",
    "jhansi_runtime.isolation.seccomp",
    "jhansi_runtime.isolation.spawn",
    "jhansi_runtime.isolation.steps",
    "jhansi_runtime.isolation.syscalls",
    "jhansi_runtime.names",
    "jhansi_runtime.paths",
    "jhansi_runtime.places",
    "jhansi_runtime.pooling",
    "jhansi_runtime.profiles",
    "jhansi_runtime.quantities",
    "jhansi_runtime.remedies",
    "jhansi_runtime.rendering",
    "jhansi_runtime.room",
    "jhansi_runtime.rootfs",
    "jhansi_runtime.runs",
    "jhansi_runtime.runtime",
    "jhansi_runtime.sandboxes",
    "jhansi_runtime.settings",
    "jhansi_runtime.settling",
    "jhansi_runtime.spec",
    "jhansi_runtime.thin",
    "jhansi_runtime.tree",
    "jhansi_runtime.workspace",
}
# Each is several milliseconds, and is reached for without thinking.
DEAR = {
    "argparse",
    "asyncio",
    "concurrent",
    "dataclasses",
    "email",
    "http",
    "logging",
    "lzma",
    "multiprocessing",
    "pathlib",
    "psutil",
    "pyroute2",
    "pyseccomp",
    "random",
    "secrets",
    "selectors",
    "socket",
    "ssl",
    "subprocess",
    "tarfile",
    "tempfile",
    "tomllib",
    "urllib",
    "zstandard",
}


def loaded_by(argv, environment):
    """The modules that python with these arguments imports, beyond those of an interpreter that does nothing."""
    run = subprocess.run(
        [sys.executable, "-X", "importtime", *argv], env=environment, capture_output=True, text=True, check=True
    )
    lines = [line for line in run.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines[1:]}


@pytest.fixture
def exec_line(jhansi, tmp_path):
    """The words of an exec without options. The seccomp profile is compiled already."""
    (tmp_path / "hello.py").write_text("print('hello')")
    sandbox = jhansi("create", "--rootfs", "host").stdout.strip()
    assert jhansi("put", sandbox, str(tmp_path / "hello.py")).returncode == 0
    assert jhansi("exec", sandbox, "hello.py").stdout == "hello\n"
    return ["exec", sandbox, "hello.py"]


def test_an_exec_loads_this_and_nothing_else(exec_line, runtime_environment):
    loaded = loaded_by(["-m", "jhansi_runtime", *exec_line], runtime_environment)
    loaded -= loaded_by(["-c", "pass"], runtime_environment)
    if "jeepney" in loaded:  # to ask systemd for a cgroup, where there is one to ask
        loaded -= loaded_by(["-c", "import jeepney.io.blocking, jeepney.wrappers"], runtime_environment)
    packages = {name.partition(".")[0] for name in loaded}

    assert {name for name in loaded if name.startswith("jhansi_runtime")} <= OURS
    # importtime lists what was asked for, also where it was not found: see the next test.
    assert packages - set(sys.stdlib_module_names) - {"jhansi_runtime"} <= THIRD_PARTY | {"typing_extensions"}
    assert not packages & DEAR


@pytest.mark.parametrize("option", [[], ["--timeout=9"]])
def test_what_msgspec_would_load_if_it_could_is_not_loaded(exec_line, option, runtime_environment):
    verb, *words = exec_line
    program = (
        "import sys; from jhansi_runtime.cli import run; run(sys.argv[1:]); print('typing_extensions' in sys.modules)"
    )
    argv = [sys.executable, "-c", program, verb, *option, *words]
    answer = subprocess.run(argv, env=runtime_environment, capture_output=True, text=True, check=True)

    assert answer.stdout == "hello\nFalse\n"


def test_a_launcher_loads_the_trusted_core_alone(runtime_environment):
    loaded = loaded_by(["-c", "import jhansi_runtime.isolation.launcher"], runtime_environment)
    packages = {name.partition(".")[0] for name in loaded} - loaded_by(["-c", "pass"], runtime_environment)

    assert packages - set(sys.stdlib_module_names) == {"jhansi_runtime", "prctl", "_prctl"}
    assert {name for name in loaded if name.rpartition(".")[0] == "jhansi_runtime"} == {"jhansi_runtime.isolation"}
    assert not packages & DEAR


def test_importing_the_package_loads_none_of_it(runtime_environment):
    loaded = loaded_by(["-c", "import jhansi_runtime"], runtime_environment)
    assert {name for name in loaded if name.startswith("jhansi_runtime")} == {"jhansi_runtime"}


def test_a_server_loads_nothing_that_invents_examples(runtime_environment):
    program = (
        "from jhansi_runtime import Paths, Runtime\n"
        "from jhansi_runtime.api import create_app\n"
        "from jhansi_runtime.spec import ServerSettings\n"
        "with Runtime(Paths.from_environment()) as runtime:\n"
        "    create_app(runtime, keys=None, settings=ServerSettings())\n"
    )
    assert "faker" not in loaded_by(["-c", program], runtime_environment)
