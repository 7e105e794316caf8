"""The attacks of all tables once more, on jobs that are forks of a zygote: the same steps lock them in, and nothing of
the zygote's, which sees the workspaces of all sandboxes, is within their reach.
"""

import pytest
import test_descriptors
import test_exhaustion
import test_kernel_surface
import test_namespaces
import test_neighbours
import test_proc
import test_processes
import test_root_tree
import test_sockets
import test_terminals
from attempts import Attempts, attempt, each, each_refusal, surroundings

from jhansi_runtime import ExecRequest, Runtime
from jhansi_runtime.engine import LauncherProcess
from jhansi_runtime.engine.pool import Pool, Sizes

THEMES = (
    *(test_descriptors, test_exhaustion, test_kernel_surface, test_namespaces, test_neighbours, test_proc),
    *(test_processes, test_root_tree, test_sockets, test_terminals),
)
# A row with a command executes it: that job is no interpreter's fork when its program begins.
TABLE = [row for theme in THEMES for row in theme.TABLE if not row.command]
REFUSALS = [refusal for theme in THEMES for refusal in getattr(theme, "REFUSALS", ())]
ATTEMPTS = 200
REACH = """
lines = []
for mount in open("/proc/self/mountinfo"):
    if "/tmp/workspaces" in mount or "/tmp/site" in mount or "/tmp/tree" in mount:
        lines.append("escaped")
for folder in ("/tmp/workspaces", "/tmp/site", "/tmp/tree", "/proc/self/exe/../../../tmp", "/proc/1/root/tmp"):
    try:
        lines += ["escaped" for name in os.listdir(folder) if name]
    except OSError:
        pass
for name in os.listdir("/proc/self/fd"):
    if int(name) > 2:
        try:
            target = os.readlink("/proc/self/fd/" + name)
        except FileNotFoundError:
            continue  # that of the listing
        lines.append("escaped")
for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
    try:
        os.open("/proc/self/exe", flags)
        lines.append("escaped")
    except OSError:
        pass
for file in os.scandir("/proc/self/map_files"):
    try:
        os.open(file.path, os.O_RDWR)
        lines.append("escaped")
    except OSError:
        pass
status = dict(line.rstrip("\\n").split(":\\t", 1) for line in open("/proc/self/status") if ":\\t" in line)
if any(int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")):
    lines.append("escaped")
if (status["NoNewPrivs"], status["Seccomp"]) != ("1", "2"):
    lines.append("escaped")
try:
    os.listdir("/proc/1/fd")
    lines.append("escaped")
except PermissionError:
    pass
print(*(lines or ["nothing"]), sep="\\n")
"""


class InZygotes:
    """A runtime, for a process made for one attempt: files are run in slots of a zygote, and that is seen to be so."""

    def __init__(self, runtime):
        self._runtime = runtime
        self._pool = None

    def __getattr__(self, name):
        return getattr(self._runtime, name)

    def exec(self, request):
        if self._pool is None:
            self._pool = Pool(LauncherProcess(), Sizes(minimum=1, maximum=2))
            self._warm = Runtime(self._runtime.paths, slots=self._pool)
        self._runtime.write(request.sandbox, "warm.py", b"")
        warming = ExecRequest(sandbox=request.sandbox, filename="warm.py", limits=request.limits)
        for _ in range(ATTEMPTS):
            before = self._pool.figures()
            self._warm.exec(warming)
            if self._pool.figures().interpreters > before.interpreters:
                break
        before = self._pool.figures()
        result = self._warm.exec(request)
        assert self._pool.figures().interpreters == before.interpreters + 1
        return result


@pytest.fixture(scope="module")
def attempts(tmp_path_factory):
    with surroundings(tmp_path_factory.mktemp("zygotes")) as host:
        yield Attempts(host._replace(runtime=InZygotes(host.runtime)), TABLE, REFUSALS)


@each(TABLE)
def test_the_attack_fails(row, attempts):
    attempts.assert_it_fails(row)


@each_refusal(REFUSALS)
def test_the_attack_is_refused(refusal, attempts):
    attempts.assert_it_is_refused(refusal)


def test_nothing_of_the_zygotes_is_within_reach(attempts):
    assert attempt(attempts.host, REACH)["lines"] == ["nothing"]
