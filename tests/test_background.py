"""A detached exec: what the job writes is in its journal as it comes, and so is its end, however that comes about."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import CHECKOUT

from jhansi_runtime import ExecRequest, Paths, Runtime
from jhansi_runtime.background import run_detached
from jhansi_runtime.detached import DetachedRuns
from jhansi_runtime.runs import new_run_id
from jhansi_runtime.spec import Limits

# A job that writes without end, with its journal on a disk of 512 KiB. What it says is how that ended.
ON_A_SMALL_DISK = """
import os, signal, sys
from jhansi_runtime import ExecRequest, Paths, Runtime
from jhansi_runtime.background import run_detached
from jhansi_runtime.detached import DetachedRuns
from jhansi_runtime.runs import new_run_id
from jhansi_runtime.spec import Limits

with Runtime(Paths.from_environment(os.environ)) as runtime:
    runs = DetachedRuns(sys.argv[1])
    journal = runs.begin(new_run_id(), sys.argv[2], None)
    script = "trap '' PIPE; while :; do echo xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; done"
    command = ["/bin/sh", "-c", script]
    limits = {"output": 2**30, "timeout": 60}
    request = ExecRequest(sandbox=sys.argv[2], command=command, limits=limits)
    control, writable = os.pipe()
    run_detached(
        runtime,
        request,
        journal,
        limits=Limits(),
        control=control,
        cancel=lambda: os.write(writable, bytes([signal.SIGTERM])),
    )
    found = runs.find(journal.info.run_id)
    print(found.status, sum(len(piece) for piece in runs.read(found.run_id, "stdout")), found.result.message)
"""


@pytest.fixture
def runtime(runtime_environment):
    with Runtime(Paths.from_environment(runtime_environment)) as opened:
        yield opened


@pytest.fixture
def sandbox(runtime):
    made = runtime.create(rootfs="host")
    yield made.id
    runtime.remove(made.id)


@pytest.fixture
def runs(tmp_path):
    return DetachedRuns(str(tmp_path / "detached"))


class Background:
    """Execs in threads of their own; `wait` returns when all have ended."""

    def __init__(self, runtime, runs, sandbox):
        self._runtime = runtime
        self._runs = runs
        self._sandbox = sandbox
        self._threads = []
        self._controls = {}

    def start(self, request, **options):
        journal = self._runs.begin(new_run_id(), self._sandbox, "key_1")
        readable, writable = os.pipe()
        self._controls[journal.info.run_id] = (readable, writable)

        def run():
            run_detached(
                self._runtime,
                request,
                journal,
                limits=Limits(timeout=5),
                control=readable,
                cancel=lambda: self.cancel(journal.info.run_id),
                **options,
            )

        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()
        return journal.info

    def cancel(self, run_id):
        os.write(self._controls[run_id][1], bytes([signal.SIGTERM]))

    def wait(self):
        for thread in self._threads:
            thread.join()
        for control in self._controls.values():
            for descriptor in control:
                os.close(descriptor)
        self._controls.clear()


@pytest.fixture
def background(runtime, runs, sandbox):
    before = threading.active_count()
    background = Background(runtime, runs, sandbox)
    yield background
    for run_id in background._controls:
        background.cancel(run_id)
    background.wait()
    assert threading.active_count() == before


def sh(sandbox, script, **fields):
    return ExecRequest(sandbox=sandbox, command=["/bin/sh", "-c", script], **fields)


def text(runs, run_id, stream="stdout"):
    return b"".join(runs.read(run_id, stream)).decode()


def wait_for(runs, run_id, expected):
    for frame in runs.follow(run_id):
        if expected in frame.data:
            return
    raise AssertionError(f"{expected} was not written")


def test_output_is_followed_while_the_job_runs_and_its_end_is_kept(runtime, sandbox, runs, background):
    script = "echo out; echo err >&2; read line; echo got $line; while ! [ -e go ]; do sleep 0.02; done; exit 3"
    info = background.start(sh(sandbox, script, stdin="input\n"))
    wait_for(runs, info.run_id, b"got input")

    assert (info.status, info.sandbox_id, info.owner) == ("running", sandbox, "key_1")
    assert not runs.is_ended(info.run_id)
    runtime.write(sandbox, "go", b"")
    list(runs.follow(info.run_id))
    ended = runs.find(info.run_id)
    assert (ended.status, ended.result.exit_code, ended.result.run_id) == ("exited", 3, info.run_id)
    assert (ended.result.stdout, ended.result.stdout_bytes) == (None, len("out\ngot input\n"))
    assert (text(runs, info.run_id), text(runs, info.run_id, "stderr")) == ("out\ngot input\n", "err\n")
    assert [record["event"] for record in runtime.audit.records(run_id=info.run_id)] == ["exec.start", "exec.end"]


def test_streams_keep_their_order(sandbox, runs, background):
    script = "for i in 1 2 3 4 5; do echo out $i; sleep 0.02; echo err $i >&2; sleep 0.02; done"
    info = background.start(sh(sandbox, script))
    frames = list(runs.follow(info.run_id))

    assert [frame.data.decode() for frame in frames] == [
        f"{stream} {number}\n" for number in range(1, 6) for stream in ("out", "err")
    ]


def test_a_job_that_writes_byte_by_byte_leaves_a_journal_of_about_that_size(sandbox, runs, background):
    script = "i=0; while [ $i -lt 30000 ]; do printf x; i=$((i+1)); done"
    info = background.start(sh(sandbox, script))
    frames = list(runs.follow(info.run_id))

    assert sum(len(frame.data) for frame in frames) == 30_000
    assert frames[-1].position < 1.5 * 30_000


def test_large_output_arrives_whole(sandbox, runs, background):
    size = 50_000_000
    limits = {"output": size, "timeout": 600, "cpu_time": 600}  # an emulated machine takes a minute
    info = background.start(sh(sandbox, f"head -c {size} /dev/zero | tr '\\0' y", limits=limits))
    ended = [None for frame in runs.follow(info.run_id) if frame.data.strip(b"y")]

    assert ended == []
    assert sum(len(piece) for piece in runs.read(info.run_id, "stdout")) == size
    assert runs.find(info.run_id).status == "exited"


def test_a_cancelled_job_is_asked_first(sandbox, runs, background):
    script = "trap 'echo asked; exit 7' TERM; echo ready; while :; do sleep 0.02; done"
    info = background.start(sh(sandbox, script))
    wait_for(runs, info.run_id, b"ready")
    background.cancel(info.run_id)
    list(runs.follow(info.run_id))

    assert text(runs, info.run_id) == "ready\nasked\n"
    assert runs.find(info.run_id).result.exit_code == 7


def test_a_job_that_is_cancelled_before_it_starts_ends_too(sandbox, runs, background):
    info = background.start(sh(sandbox, "sleep 60"))
    background.cancel(info.run_id)
    began = time.monotonic()
    list(runs.follow(info.run_id))

    assert runs.find(info.run_id).status == "cancelled"
    assert time.monotonic() - began < 10


def test_a_second_cancel_does_not_ask(sandbox, runs, background):
    info = background.start(sh(sandbox, "trap '' TERM; echo ready; while :; do sleep 0.02; done"))
    wait_for(runs, info.run_id, b"ready")
    began = time.monotonic()
    background.cancel(info.run_id)
    time.sleep(0.1)
    background.cancel(info.run_id)
    list(runs.follow(info.run_id))

    assert runs.find(info.run_id).status == "cancelled"
    assert time.monotonic() - began < 1.5  # the grace alone would be 2 seconds


def test_a_program_that_cannot_be_run_is_a_failed_result_in_the_words_of_who_asked(sandbox, runs, background):
    info = background.start(
        ExecRequest(sandbox=sandbox, filename="missing.py"),
        describe=lambda error: f"in other words: {type(error).__name__}",
    )
    background.wait()

    result = runs.find(info.run_id).result
    assert (result.status, result.message) == ("failed", "in other words: ProgramMissingError")
    assert (result.exit_code, result.limits.timeout, result.sandbox_id) == (None, 5, sandbox)


def test_no_descriptor_is_left_open(sandbox, background):
    def run_some():
        for script in ("echo hello", "exit 3", "kill -9 $$"):
            background.start(sh(sandbox, script))
        background.start(ExecRequest(sandbox=sandbox, filename="missing.py"))
        background.wait()

    run_some()  # which starts the launcher
    before = len(os.listdir("/proc/self/fd"))
    run_some()

    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_job_whose_output_no_longer_fits_on_the_disk_is_ended(runtime_environment, sandbox, tmp_path):
    (tmp_path / "disk").mkdir()
    script = 'mount -t tmpfs -o size=512k none "$0" && exec "$@"'
    argv = ["unshare", "--user", "--map-current-user", "--keep-caps", "--mount", "sh", "-c", script, tmp_path / "disk"]
    began = time.monotonic()
    ended = subprocess.run(
        [*argv, sys.executable, "-c", ON_A_SMALL_DISK, tmp_path / "disk" / "runs", sandbox],
        env=runtime_environment | {"PYTHONPATH": CHECKOUT},
        capture_output=True,
        text=True,
        check=False,
    )

    assert ended.returncode == 0, ended.stderr
    status, size, message = ended.stdout.split(" ", 2)
    assert status == "disk_limit"
    assert 200_000 < int(size) < 512 * 1024
    assert "free some space" in message
    assert time.monotonic() - began < 20
