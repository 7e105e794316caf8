"""tools/setup, tools/demo and tools/test: what they leave behind, and what they say when they cannot go on.

What a fresh machine adds, the installation itself, is what CI does before it comes here.
"""

import glob
import os
import pwd
import shutil
import subprocess
import sys
import sysconfig

import pytest
from conftest import CHECKOUT, host_lacks

TOOL = os.path.join(CHECKOUT, "tools", "setup")


def setup(tool=TOOL, **options):
    return subprocess.run([sys.executable, tool], capture_output=True, text=True, check=False, **options)


@pytest.fixture
def prepared():
    """The checkout, where it is the one that this Python was set up for."""
    if sys.prefix != os.path.join(CHECKOUT, ".venv"):
        host_lacks("setup", f"this is not the Python of .venv; start the tests with {CHECKOUT}/tools/test")
    return CHECKOUT


def test_a_second_setup_makes_nothing_anew(prepared):
    stamp = os.path.join(prepared, ".venv", "setup.stamp")
    before = os.stat(stamp).st_mtime_ns

    answer = setup()

    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.startswith("setup: ready")
    assert os.stat(stamp).st_mtime_ns == before


def test_no_start_of_python_runs_an_import_hook(prepared):
    # A .pth line that starts with `import` is code that every start pays for. The package is one plain path.
    lines = []
    for path in glob.glob(f"{glob.escape(sysconfig.get_path('purelib'))}/*.pth"):
        with open(path, encoding="utf-8") as text:
            lines += text.read().splitlines()

    assert lines == [prepared]


def test_the_package_is_compiled_ahead(prepared):
    answer = subprocess.run(
        [sys.executable, "-v", "-c", "import jhansi_runtime.spec"], capture_output=True, text=True, check=True
    )

    cached = f"matches {prepared}/jhansi_runtime/spec.py"
    assert cached in answer.stderr


def test_packages_that_only_root_can_install_are_one_line_to_run(tmp_path):
    # An empty dpkg database: everything is missing. The real dpkg-query reads it, and there is no sudo on PATH.
    if os.geteuid() == 0:
        pytest.skip("root would install them")
    (tmp_path / "dpkg").mkdir()
    (tmp_path / "dpkg" / "status").touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "dpkg-query").symlink_to(shutil.which("dpkg-query"))

    answer = setup(env={"PATH": str(tmp_path / "bin"), "DPKG_ADMINDIR": str(tmp_path / "dpkg")})

    assert answer.returncode == 1
    assert "setup: error: system packages are missing" in answer.stderr
    assert "run as root: apt-get update && apt-get install --yes --no-install-recommends gcc " in answer.stderr


def test_a_checkout_of_somebody_else_is_not_set_up_halfway(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tools = tmp_path / "tools"
    tools.mkdir()
    shutil.copy(TOOL, tools)
    shutil.copy(os.path.join(CHECKOUT, "pyproject.toml"), tmp_path)
    tmp_path.chmod(0o555)

    answer = setup(tools / "setup")

    tmp_path.chmod(0o755)
    assert answer.returncode == 1
    assert f"{tmp_path}/.venv has to be made, and cannot be: Permission denied" in answer.stderr
    assert "run tools/setup as the owner of the checkout" in answer.stderr
    assert sorted(os.listdir(tmp_path)) == ["pyproject.toml", "tools"]


def test_the_demo_shows_a_programs_output_and_its_audit_record_and_leaves_no_sandbox(
    prepared, runtime_environment, jhansi
):
    before = jhansi("ls", "--json").stdout
    demo = os.path.join(prepared, "tools", "demo")

    answer = subprocess.run([demo], env=runtime_environment, capture_output=True, text=True, check=False)

    assert (answer.returncode, answer.stderr) == (0, "")
    assert "as uid 1000 of host 'sandbox'" in answer.stdout
    assert "notes that earlier runs left: none" in answer.stdout
    assert "notes that earlier runs left: ['visit 1']" in answer.stdout
    record = answer.stdout.partition("$ jhansi-run audit show")[2]
    assert "exec.start" in record
    assert "exec.end" in record
    assert jhansi("ls", "--json").stdout == before


@pytest.mark.root
def test_the_demo_does_so_for_root(prepared, runtime_environment, jhansi):
    test_the_demo_shows_a_programs_output_and_its_audit_record_and_leaves_no_sandbox(
        prepared, runtime_environment, jhansi
    )


@pytest.mark.root
def test_the_user_of_the_suite_has_nothing_to_lean_on():
    user = pwd.getpwnam("jhansi-test")

    assert user.pw_uid != 0
    for granted in ("/etc/subuid", "/etc/subgid"):
        with open(granted, encoding="utf-8") as text:
            assert user.pw_name not in {line.partition(":")[0] for line in text}
    assert os.stat(os.path.join(user.pw_dir, "checkout", "tools", "test")).st_uid == user.pw_uid
