"""What tools/bench runs, and every way this host has to run it: bare, in other people's containers, in ours.

A program is one thing to run that prints a known line; a way runs it once and returns what it printed. The stage is
what stands ready meanwhile: a JHANSI_HOME of its own inside the caller's, with the caller's root trees, in which
nothing but tools/bench has a sandbox; on it two runtimes and two servers, one of each with a pool.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from jhansi_runtime import ExecRequest, Paths, Runtime
from jhansi_runtime.engine import LauncherProcess
from jhansi_runtime.engine.delegation import none
from jhansi_runtime.engine.pool import Pool, Sizes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONSOLE_SCRIPT = os.path.join(CHECKOUT, ".venv", "bin", "jhansi-run")
BARE_PYTHON = "/usr/bin/python3"
SAID = "hello\n"
IN_THE_POOL = 8
SERVER_STARTS_WITHIN = 30.0  # seconds
WARM_WITHIN = 20.0  # seconds

# As in our containers: namespaces of every kind, and a root tree that cannot be written. No filter, limits or log.
BWRAP = "bwrap --unshare-all --die-with-parent --new-session --ro-bind /usr /usr --proc /proc --dev /dev --tmpfs /tmp"
NSJAIL = "nsjail -Mo -Q -R /usr -T /tmp -R /dev/null -R /dev/urandom --disable_rlimits"
BESIDE_USR = ("/bin", "/sbin", "/lib", "/lib64")


class Program(NamedTuple):
    """Something that prints SAID. start is what its path is put behind; bare says whether this host runs it as well.

    what is of an ExecRequest, but for the sandbox; where is of a sandbox.
    """

    file: str
    content: bytes
    start: tuple[str, ...]
    what: Mapping[str, Any]
    where: Mapping[str, Any]
    bare: bool = True


class Way(NamedTuple):
    """One way to run a program: `run` does it once and returns what the program printed."""

    name: str
    run: Callable[[], str]


class Server(NamedTuple):
    """A server: its process, its TCP port, and the environment in which jhansi-run finds it."""

    process: subprocess.Popen[bytes]
    port: int
    environment: Mapping[str, str]


class Stage(NamedTuple):
    """See above. folder is on the disk of JHANSI_HOME, and may be read by whoever is in a sandbox."""

    folder: str
    paths: Paths
    cold: Runtime
    warm: Runtime
    pool: Pool
    cold_server: Server
    warm_server: Server


class Missing(Exception):  # noqa: N818 - it is no error that a host lacks something
    """Says what this host has not got."""


def program(name: str, folder: str) -> Program:
    """Return one of the programs by its name. Missing says why it cannot be run here."""
    if name == "hello":
        return Program("hello.py", b'print("hello")\n', (BARE_PYTHON,), {"filename": "hello.py"}, {})
    if name == "data":
        source = b'import numpy, pandas\nassert pandas.Series(numpy.arange(3)).sum() == 3\nprint("hello")\n'
        argv = [BARE_PYTHON, "-c", "import numpy, pandas"]
        has_both = subprocess.run(argv, env=clean(), stderr=subprocess.DEVNULL, check=False).returncode == 0
        where = {"language": "python-data"}
        return Program("data.py", source, (BARE_PYTHON,), {"filename": "data.py"}, where, bare=has_both)
    if name == "node":
        node = shutil.which("node")
        if node is None or not os.path.realpath(node).startswith("/usr/"):
            raise Missing("there is no node under /usr")
        what = {"command": [node, "/workspace/hello.js"]}
        return Program("hello.js", b'console.log("hello")\n', (node,), what, {"rootfs": "host"})
    compiler = shutil.which("cc")
    if compiler is None:
        raise Missing("there is no C compiler, cc")
    source = b'#include <stdio.h>\nint main(void) { return puts("hello") < 0; }\n'
    made = os.path.join(folder, "compiled")
    subprocess.run([compiler, "-O2", "-x", "c", "-o", made, "-"], input=source, check=True)
    with open(made, "rb") as file:
        content = file.read()
    return Program("hello", content, (), {"filename": "hello"}, {"rootfs": "host"})


@contextmanager
def stage() -> Iterator[Stage]:
    """Within: the stage. The root tree of python is built first, in the caller's JHANSI_HOME, when there is none."""
    real = Paths.from_environment()
    with Runtime(real, progress=print) as runtime:
        if "python" not in {info.language for info in runtime.rootfs_infos()}:
            runtime.rootfs_build("python")
    with ExitStack() as stack:
        # Not in /tmp, which may be a tmpfs: there a flush to the disk costs nothing.
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=real.home))
        os.chmod(folder, 0o755)  # noqa: S103 - as root, the program in the sandbox is somebody else
        sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="jhansi-bench-"))  # whose paths must be short
        home = os.path.join(folder, "home")
        os.mkdir(home)
        os.symlink(real.rootfs, os.path.join(home, "rootfs"))
        without, with_pool = (os.path.join(folder, f"{name}.toml") for name in ("without", "pool"))
        write(without, b"[pool]\nmaximum = 0\n")  # a server would have one otherwise
        write(with_pool, b"[pool]\nmaximum = %d\n" % IN_THE_POOL)
        paths = Paths(home, os.path.join(home, "workspaces"), without, os.path.join(sockets, "none"))
        pool = Pool(LauncherProcess(), Sizes(maximum=IN_THE_POOL))
        yield Stage(
            folder=folder,
            paths=paths,
            cold=stack.enter_context(Runtime(paths)),
            warm=stack.enter_context(Runtime(paths, slots=pool)),
            pool=pool,
            cold_server=stack.enter_context(server(paths._replace(socket=os.path.join(sockets, "cold")))),
            warm_server=stack.enter_context(
                server(paths._replace(socket=os.path.join(sockets, "warm"), config=with_pool))
            ),
        )


@contextmanager
def box(at: Stage, of: Program) -> Iterator[str]:
    """Within: a sandbox that holds the program; its id. Missing: its language is not here."""
    if of.where.get("language", "python") not in {info.language for info in at.cold.rootfs_infos()}:
        language = of.where["language"]
        raise Missing(f"the root tree of {language} is not here; make it with: jhansi-run rootfs build {language}")
    sandbox = at.cold.create(**of.where).id
    try:
        path = os.path.join(at.folder, of.file)
        write(path, of.content)
        os.chmod(path, 0o755)  # noqa: S103 - it is to be executed
        at.cold.put(sandbox, path)
        yield sandbox
    finally:
        at.cold.remove(sandbox)


def ways_to_run(of: Program, at: Stage, sandbox: str) -> Iterator[Way]:
    """Yield every way, the one that the others are compared with first."""
    wanted = ExecRequest(sandbox=sandbox, **of.what)
    if of.bare:
        yield Way("bare", command([*of.start, os.path.join(at.folder, of.file)], clean()))
        yield from foreign(of, at.folder)
    yield Way("Runtime cold", in_process(at.cold, wanted))
    yield Way("Runtime warm", in_process(at.warm, wanted))
    yield Way("POST cold", post(at.cold_server, sandbox, of.what))
    yield Way("POST warm", post(at.warm_server, sandbox, of.what))
    yield Way("jhansi-run cold", command(exec_line(of, sandbox), alone(at)))
    yield Way("jhansi-run warm", command(exec_line(of, sandbox), at.warm_server.environment))


def foreign(of: Program, folder: str) -> Iterator[Way]:
    """Yield the containers of other people that this host has and that work; why one does not is printed."""
    inside = [*of.start, f"/workspace/{of.file}"]
    for way in (
        Way("bwrap", command([*bwrap(folder), *inside], clean())),
        Way("nsjail", command([*NSJAIL.split(), *nsjail_binds(folder), "--", *inside], clean())),
        *(Way(name, command([name, *bundle(name, inside, folder)], clean())) for name in ("runc", "crun")),
    ):
        if shutil.which(way.name) is None:
            continue
        try:
            said = way.run()
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or str(error)
        if said == SAID:
            yield way
        else:
            _tell_once(f"bench: left out: {way.name} does not work here: {said.strip().splitlines()[-1:]}")


@cache
def _tell_once(line: str) -> None:
    print(line, file=sys.stderr)


@contextmanager
def variants(at: Stage, sandbox: str) -> Iterator[list[Way]]:
    """Within: what single parts of an exec cost, each against Runtime cold or jhansi-run cold."""
    wanted, hello = ExecRequest(sandbox=sandbox, filename="hello.py"), os.path.join(at.folder, "hello.py")
    with (
        Runtime(at.paths, launcher=LauncherProcess(ahead=False)) as unbegun,
        Runtime(at.paths, launcher=LauncherProcess(delegate=lambda _: none("not asked for"))) as watched,
    ):
        ways = [
            Way("Runtime cold", in_process(at.cold, wanted)),
            Way("- none begun ahead", in_process(unbegun, wanted)),
        ]
        launcher = LauncherProcess()
        if launcher.delegation().base is not None:
            ways.append(Way("- watchdog, no cgroup", in_process(watched, wanted)))
        launcher.close()
        launcher.wait()
        ways += [
            Way("jhansi-run exec", command([*jhansi_run(), "exec", sandbox, "hello.py"], alone(at))),
            Way("jhansi-run run", command([*jhansi_run(), "run", hello], alone(at))),
            Way("- with an option", command([*jhansi_run(), "run", "--timeout", "30s", hello], alone(at))),
        ]
        yield ways


def warmed(pool: Pool, run: Callable[[], object]) -> bool:
    """Run it until a slot with its interpreter has waited for it; False when that takes too long."""
    deadline = time.monotonic() + WARM_WITHIN
    while time.monotonic() < deadline:
        before = pool.figures()
        run()
        if pool.figures().hits > before.hits and pool.figures().interpreters > before.interpreters:
            return True
        time.sleep(0.1)
    return False


# --- what a way is made of -------------------------------------------------------------------------------------------


def in_process(runtime: Runtime, wanted: ExecRequest) -> Callable[[], str]:
    """Return a way that is a call in this process."""
    return lambda: runtime.exec(wanted).stdout or ""


def post(to: Server, sandbox: str, what: Mapping[str, Any]) -> Callable[[], str]:
    """Return a way that is a request, on a connection of its own that stays open.

    The client is http.client, for the server is to be measured: httpx takes half a millisecond more.
    """
    connection = http.client.HTTPConnection("127.0.0.1", to.port)
    body = json.dumps(dict(what))

    def ask() -> str:
        connection.request("POST", f"/v1/sandboxes/{sandbox}/exec", body)
        with connection.getresponse() as response:
            return str(json.loads(response.read()).get("stdout"))

    def run() -> str:
        try:
            return ask()
        except ConnectionError:  # a round took so long that the server has closed it as idle
            connection.close()
            return ask()

    return run


def command(argv: Sequence[str], environment: Mapping[str, str]) -> Callable[[], str]:
    """Return a way that is a process of its own."""

    def run() -> str:
        return subprocess.run(argv, env=environment, capture_output=True, text=True, check=True).stdout

    return run


def clean() -> dict[str, str]:
    """Return the environment without what is meant for our own Python and our own installation."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "JHANSI_", "PETRI_"))}


def alone(at: Stage) -> dict[str, str]:
    """Return the environment in which jhansi-run finds the stage, and no server."""
    return environment_of(at.paths)


def environment_of(paths: Paths) -> dict[str, str]:
    """Return the environment of an installation, from which Paths.from_environment makes the same."""
    named = {
        "JHANSI_HOME": paths.home,
        "PETRI_WORKSPACE_ROOT": paths.workspaces,
        "JHANSI_CONFIG": paths.config,
        "JHANSI_SOCKET": paths.socket,
    }
    return clean() | named | ({} if os.path.exists(CONSOLE_SCRIPT) else {"PYTHONPATH": CHECKOUT})


def jhansi_run() -> list[str]:
    """Return the words that start the command line."""
    return [CONSOLE_SCRIPT] if os.path.exists(CONSOLE_SCRIPT) else [sys.executable, "-m", "jhansi_runtime"]


def exec_line(of: Program, sandbox: str) -> list[str]:
    """Return the command line of an exec."""
    if "command" in of.what:
        return [*jhansi_run(), "exec", "--command", sandbox, "--", *of.what["command"]]
    return [*jhansi_run(), "exec", sandbox, of.what["filename"]]


@contextmanager
def server(paths: Paths) -> Iterator[Server]:
    """Within: a server of that installation, on a port of its own. RuntimeError when it does not start."""
    log = f"{paths.socket}.log"
    environment = environment_of(paths)
    argv = [*jhansi_run(), "serve", "--port=0"]  # in just the environment of its clients, or they are none of its own
    with open(log, "wb") as stderr:
        process = subprocess.Popen(argv, env=environment, stderr=stderr)
    try:
        yield Server(process, port_of(process, log), environment)
    finally:
        process.terminate()
        process.wait()


def port_of(process: subprocess.Popen[bytes], log: str) -> int:
    """Return the port of a server, which its log names when it is ready."""
    deadline = time.monotonic() + SERVER_STARTS_WITHIN
    while process.poll() is None and time.monotonic() < deadline:
        with open(log, encoding="utf-8") as lines:
            events = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]
        for event in events:
            if event["event"] == "server.ready":
                address = next(address for address in event["addresses"] if address != "unix")
                return int(address.rpartition(":")[2])
        time.sleep(0.01)
    with open(log, encoding="utf-8") as lines:
        raise RuntimeError(f"the server does not start: {lines.read()}")


def bwrap(folder: str) -> list[str]:
    """Return the command line that runs a program of the host's in bubblewrap, with the folder as its workspace."""
    beside = [word for path in BESIDE_USR if os.path.exists(path) for word in ("--ro-bind", path, path)]
    return [*BWRAP.split(), *beside, "--bind", folder, "/workspace", "--chdir", "/workspace"]


def nsjail_binds(folder: str) -> list[str]:
    """Return the same for nsjail, beside NSJAIL."""
    beside = [word for path in BESIDE_USR if os.path.exists(path) for word in ("-R", path)]
    return [*beside, "-B", f"{folder}:/workspace", "--cwd", "/workspace"]


def bundle(name: str, inside: Sequence[str], folder: str) -> list[str]:
    """Make the bundle of an OCI runtime that runs a program of the host's, and return the words that run it.

    It is what `runc spec --rootless` gives, without the network that the host has, on the host's own programs.
    """
    path = os.path.join(folder, f"{name}.bundle")
    os.makedirs(os.path.join(path, "rootfs"), exist_ok=True)
    kinds = ("pid", "ipc", "uts", "mount", "network", *(("user",) if os.getuid() else ()))
    linux: dict[str, Any] = {"namespaces": [{"type": kind} for kind in kinds]}
    if os.getuid():
        linux["uidMappings"] = [{"containerID": 0, "hostID": os.getuid(), "size": 1}]
        linux["gidMappings"] = [{"containerID": 0, "hostID": os.getgid(), "size": 1}]
    readable = [bind(place, place, "ro") for place in ("/usr", *BESIDE_USR) if os.path.exists(place)]
    document = {
        "ociVersion": "1.0.0",
        "process": {
            "args": list(inside),
            "cwd": "/workspace",
            "env": ["PATH=/usr/bin:/bin"],
            "user": {"uid": 0, "gid": 0},
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            *readable,
            bind("/workspace", folder, "rw"),
        ],
        "linux": linux,
    }
    write(os.path.join(path, "config.json"), json.dumps(document).encode())
    state = os.path.join(folder, f"{name}.state")
    return ["--root", state, "run", "--bundle", path, f"bench-{os.getpid()}"]


def bind(destination: str, source: str, how: str) -> dict[str, object]:
    """Return a mount of an OCI configuration."""
    return {"destination": destination, "type": "bind", "source": source, "options": ["rbind", "nosuid", how]}


def write(path: str, content: bytes) -> None:
    """Write a file."""
    with open(path, "wb") as file:
        file.write(content)
