"""What tests share: a runtime with a real root tree, the command line, and what to do where a host lacks something."""

import hashlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CACHE = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "jhansi-tests")
# A root tree follows from these: when one has changed, the tree that an earlier run left is not the one to test with.
ROOTFS_SOURCES = (
    "rootfs/python.toml",
    "jhansi_runtime/archive.py",
    "jhansi_runtime/debian.py",
    "jhansi_runtime/rootfs.py",
    "jhansi_runtime/tree.py",
)


@pytest.fixture(scope="session")
def home():
    """A JHANSI_HOME that outlives the test run, for its python root tree: to build one takes half a minute."""
    environment = environment_with(CACHE)
    stamp = pathlib.Path(CACHE, "rootfs-sources")
    sources = b"".join(pathlib.Path(CHECKOUT, source).read_bytes() for source in ROOTFS_SOURCES)
    digest = hashlib.sha256(sources).hexdigest()
    is_current = stamp.exists() and stamp.read_text() == digest
    if not is_current or run(["rootfs", "verify", "python"], environment).returncode != 0:
        built = run(["rootfs", "build", "python"], environment)
        assert built.returncode == 0, built.stderr
        stamp.write_text(digest)
    return CACHE


@pytest.fixture(scope="session")
def runtime_environment(home, tmp_path_factory):
    """The environment of a runtime that nobody has used, but for the root tree."""
    fresh = tmp_path_factory.mktemp("jhansi-home")
    (fresh / "rootfs").symlink_to(os.path.join(home, "rootfs"))
    return environment_with(fresh)


@pytest.fixture(scope="session")
def jhansi(runtime_environment):
    """`jhansi(*words, **options)` runs one jhansi-run and returns its CompletedProcess.

    Output is text, with bytes that are not UTF-8 as surrogates; options are those of subprocess.run.
    """
    return lambda *words, **options: run(words, runtime_environment, **options)


@pytest.fixture(scope="session")
def require(jhansi):
    """`require(name, reason)` goes on only where this host passes the doctor's check of that name."""
    checks = json.loads(jhansi("doctor", "--json").stdout)

    def require(name, reason):
        # A host on which the doctor could not even try it lacks it for the reason that stopped the doctor.
        named = [check for check in checks if check["name"] == name] or [check for check in checks if not check["ok"]]
        assert named, f"the doctor has no check of the name {name!r}"
        if not named[0]["ok"]:
            host_lacks(name, f"{reason}: {named[0]['detail']}; {named[0]['remedy']}")

    return require


def host_lacks(name, reason):
    """End this test: skipped, or failed where JHANSI_REQUIRE demands what it needs."""
    demanded = os.environ.get("JHANSI_REQUIRE", "").replace(",", " ").split()
    end = pytest.fail if {"all", name} & set(demanded) else pytest.skip
    end(f"{name}: {reason}")


def environment_with(home):
    """This process's environment with a JHANSI_HOME, and nothing else that says where things are."""
    ours = {name for name in os.environ if name.startswith("JHANSI_")} | {"PETRI_WORKSPACE_ROOT", "XDG_RUNTIME_DIR"}
    kept = {name: value for name, value in os.environ.items() if name not in ours - {"JHANSI_DEBIAN_MIRROR"}}
    # Also where the interpreter is not the checkout's own, whatever the working directory.
    return kept | {"JHANSI_HOME": str(home), "PYTHONPATH": CHECKOUT}


def run(words, environment, **options):
    argv = [sys.executable, "-m", "jhansi_runtime", *words]
    defaults = {"env": environment, "capture_output": True, "text": True, "errors": "surrogateescape"}
    return subprocess.run(argv, check=False, **(defaults | options))
