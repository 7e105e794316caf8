"""What tests share: a runtime with a real root tree, the command line, and what to do where a host lacks something."""

import hashlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from typing import NamedTuple

import httpx
import pytest

CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# For the tests to obey, and not for a runtime in this very process, some of which are to do without what it demands.
DEMANDED = frozenset(os.environ.pop("JHANSI_REQUIRE", "").replace(",", " ").split())
CACHE = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "jhansi-tests")
# A root tree follows from these: when one has changed, the tree that an earlier run left is not the one to test with.
ROOTFS_SOURCES = (
    "rootfs/python.toml",
    "jhansi_runtime/archive.py",
    "jhansi_runtime/debian.py",
    "jhansi_runtime/rootfs.py",
    "jhansi_runtime/tree.py",
)
# The thin client, which is to have a server run the line, but for what belongs to its own process.
THIN = """
import os, sys
sys.path.insert(0, os.environ["PYTHONPATH"])
from jhansi_runtime.thin import run_by_server
status = run_by_server()
if status is None:
    at_home = {"completion", "doctor"} & set(sys.argv[1:2]) or "_JHANSI_RUN_COMPLETE" in os.environ
    assert at_home or any("/dev/fd/" in word for word in sys.argv), "no server has run this"
    from jhansi_runtime.__main__ import main
    main(is_alone=True)
os._exit(status)
"""
# A server without its HTTP API, which is most of the time that it takes to start.
ATTENDED = """
import sys
from jhansi_runtime.paths import Paths
from jhansi_runtime.runtime import Runtime
from jhansi_runtime.server.attending import attending
paths = Paths.from_environment()
with Runtime(paths) as runtime, attending(paths.socket, runtime.lend):
    print("ready", flush=True)
    sys.stdin.read()
"""
WAYS = ("alone", "served")  # the command line without a server, and with one that runs it


@pytest.fixture(scope="session")
def home():
    """A JHANSI_HOME that outlives the test run, for its python root tree: to build one takes half a minute."""
    build_if_stale("python", "rootfs-sources")
    return CACHE


@pytest.fixture(scope="session")
def data_home(home):
    """The same, with a python-data root tree as well: two minutes more, and half a gigabyte."""
    build_if_stale("python-data", "python-data-sources")
    return home


@pytest.fixture(scope="session")
def fresh_environment(home, tmp_path_factory):
    """`fresh_environment()` is the environment of a runtime that nobody has used, but for the root tree."""

    def fresh_environment():
        fresh = tmp_path_factory.mktemp("jhansi-home")
        (fresh / "rootfs").symlink_to(os.path.join(home, "rootfs"))
        return environment_with(fresh)

    return fresh_environment


@pytest.fixture(scope="session")
def runtime_environment(fresh_environment):
    """The environment of a runtime that tests share."""
    return fresh_environment()


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


@pytest.fixture(scope="module")
def server(fresh_environment, tmp_path_factory):
    """A server without keys that the tests of a module share: each makes sandboxes of its own.

    Not for longer than that: other tests count what is left of what they have started.
    """
    with serving(fresh_environment(), tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def api(server):
    """A client of the shared server, over TCP."""
    with server.client() as api:
        yield api


@pytest.fixture(scope="module")
def strict(fresh_environment, tmp_path_factory):
    """A server of small limits: one exec at once and none waiting, bodies of 2 KiB, uploads of 4 KiB."""
    settings = "max_execs = 1\nmax_queue = 0\nmax_body = 2048\nmax_upload = 4096\n"
    with serving(fresh_environment(), tmp_path_factory.mktemp("strict"), settings=settings) as server:
        yield server


@pytest.fixture
def make(api):
    """`make(files, **body)` makes a sandbox on the host's own root tree with these files, and returns its path."""
    made = []

    def make(files=None, **body):
        answer = api.post("/v1/sandboxes", json={"rootfs": "host"} | body)
        assert answer.status_code == 201, answer.text
        made.append(f"/v1/sandboxes/{answer.json()['id']}")
        for path, content in (files or {}).items():
            assert api.put(f"{made[-1]}/files/{path}", content=content).status_code == 201
        return made[-1]

    yield make
    for path in made:
        api.delete(path)


def host_lacks(name, reason):
    """End this test: skipped, or failed where JHANSI_REQUIRE demands what it needs."""
    end = pytest.fail if {"all", name} & DEMANDED else pytest.skip
    end(f"{name}: {reason}")


def environment_with(home):
    """This process's environment with a JHANSI_HOME, and nothing else that says where things are."""
    ours = {name for name in os.environ if name.startswith("JHANSI_")} | {"PETRI_WORKSPACE_ROOT", "XDG_RUNTIME_DIR"}
    kept = {name: value for name, value in os.environ.items() if name not in ours - {"JHANSI_DEBIAN_MIRROR"}}
    # Also where the interpreter is not the checkout's own, whatever the working directory.
    return kept | {"JHANSI_HOME": str(home), "PYTHONPATH": CHECKOUT}


def build_if_stale(language, stamp_name):
    """Have a root tree of a language in CACHE that follows from the sources as they are; the stamp tells of which."""
    environment = environment_with(CACHE)
    stamp = pathlib.Path(CACHE, stamp_name)
    sources = (f"rootfs/{language}.toml", *ROOTFS_SOURCES[1:])
    digest = hashlib.sha256(b"".join(pathlib.Path(CHECKOUT, source).read_bytes() for source in sources)).hexdigest()
    is_current = stamp.exists() and stamp.read_text() == digest
    if not is_current or run(["rootfs", "verify", language], environment).returncode != 0:
        built = run(["rootfs", "build", language], environment)
        assert built.returncode == 0, built.stderr
        stamp.write_text(digest)


@contextmanager
def by_way(way, environment):
    """The environment in which command() has lines run that way, until the end of the block. See WAYS."""
    if way == "alone":
        yield environment
        return
    with attended(environment) as (server, served):
        yield served
        server.stdin.close()
        assert server.wait(30) == 0


@contextmanager
def attended(environment, user=None):
    """A server of command lines, and the environment of its clients. The end of its stdin ends it in order.

    user is the id that it runs as, where that is not our own.
    """
    with tempfile.TemporaryDirectory() as folder:  # a socket's path has 107 bytes, and tmp_path may have more
        # With a pool: the first exec borrows a slot that is made for it, the third one that has waited.
        pathlib.Path(folder, "config.toml").write_text("[pool]\nmaximum = 2\n")
        environment = environment | {"JHANSI_SOCKET": f"{folder}/sock", "JHANSI_CONFIG": f"{folder}/config.toml"}
        argv = [sys.executable, "-c", ATTENDED]
        options = {"env": environment, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        if user is not None:
            os.chown(folder, user, user)
            options |= {"user": user, "group": user, "extra_groups": []}
        server = subprocess.Popen(argv, **options)
        try:
            assert server.stdout.readline() == b"ready\n"
            with socket.socket(socket.AF_UNIX) as caller:
                caller.settimeout(30)
                caller.connect(f"{folder}/sock.cli")
                assert caller.recv(1) == (b"h" if user is None else b"")  # there are workers by now
            yield server, environment
        finally:
            server.kill()
            server.wait()
            server.stdin.close()
            server.stdout.close()


def command(words, environment):
    """The argv of one jhansi-run: one that a server is to run where the environment names its socket."""
    program = ("-c", THIN) if "JHANSI_SOCKET" in environment else ("-m", "jhansi_runtime")
    return [sys.executable, *program, *words]


def run(words, environment, **options):
    argv = command(words, environment)
    defaults = {"env": environment, "capture_output": True, "text": True, "errors": "surrogateescape"}
    return subprocess.run(argv, check=False, **(defaults | options))


class Server(NamedTuple):
    """A server under test: its process, where it answers, and its environment. `log` is what it has logged so far."""

    process: subprocess.Popen
    url: str
    socket: str
    environment: dict[str, str]
    log_path: pathlib.Path

    def client(self, token=None, *, over_socket=False):
        """A client over TCP or the Unix socket, which sends the token as its key; to be closed by the caller."""
        transport = httpx.HTTPTransport(verify=False, uds=self.socket if over_socket else None)
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return httpx.Client(base_url=self.url, transport=transport, headers=headers, timeout=60, trust_env=False)

    @property
    def port(self):
        return int(self.url.rpartition(":")[2])

    @property
    def log(self):
        return [json.loads(line) for line in self.log_path.read_text().splitlines()]


@contextmanager
def serving(environment, folder, *words, settings=""):
    """A server of this environment, on a free port and a socket in the folder, until the end of the block.

    settings is the [server] table of its settings file. SIGTERM must end it in order, with no defect in its log.
    """
    folder.mkdir(exist_ok=True)
    config, log, path = folder / "config.toml", folder / "log", str(folder / "api.sock")
    config.write_text(f"[server]\n{settings}")
    argv = [sys.executable, "-m", "jhansi_runtime", "serve", "--port=0", f"--socket={path}", *words]
    environment = environment | {"JHANSI_CONFIG": str(config)}
    with log.open("wb") as stderr:
        process = subprocess.Popen(argv, env=environment, stderr=stderr, stdin=subprocess.DEVNULL)
    try:
        url = _address(process, log)
        yield Server(process, url, path, environment, log)
        process.terminate()
        assert process.wait(30) == 0, log.read_text()
        assert '"defect"' not in log.read_text(), log.read_text()
    finally:
        process.kill()
        process.wait()


def _address(process, log):
    """The TCP address of a server, once it is ready."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for line in log.read_text().splitlines(keepends=True):
            if '"server.ready"' in line and line.endswith("\n"):
                return next(address for address in json.loads(line)["addresses"] if address != "unix")
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    raise AssertionError(f"not ready within 30 s: {log.read_text()}")
