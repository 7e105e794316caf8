"""Memory that is copied ahead: what a rehearsal tells, and whether a zygote's job then has it."""

import json
import subprocess
import sys

import pytest

REFUSE = """
import errno, pyseccomp
refusing = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
refusing.add_rule(pyseccomp.ERRNO(errno.EPERM), {call!r})
refusing.load()
"""
# A page that the fork writes to, one that only its parent does, one that is there, and one that is not.
REHEARSAL = """
import ctypes, json, mmap, os, sys, time
from jhansi_runtime.isolation import memory

memory._resident, memory._WITHIN_SECONDS = lambda: {resident}, 1
PAGE = mmap.PAGESIZE
pages = mmap.mmap(-1, 64 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for number in range(60):
    pages[number * PAGE] = 1
start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
written = memory.rehearse()
if written is None:
    for number in (8, 20, 22):
        pages[number * PAGE] = 2
    {fork}
    os._exit(0)
try:
    os.wait()
    left = True
except ChildProcessError:
    left = False
told = [n for n in range(64) if any(a <= start + n * PAGE < b for a, b in written)]
print(json.dumps([told, left, pages[8 * PAGE]]))
"""
AHEAD = """
import ctypes, json, mmap, os, sys
from jhansi_runtime.isolation import memory

PAGE = mmap.PAGESIZE
pages = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
pages[:] = b"x" * 4 * PAGE
start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
span = start + PAGE, start + 3 * PAGE
if os.fork() == 0:
    before = [span[0] <= a < span[1] for a, _ in memory._own_pages(os.getpid(), [span])]
    done = memory.copy_ahead([span])
    print(json.dumps([before, done, [*memory._own_pages(os.getpid(), [span])] == [span], pages[:] == b"x" * 4 * PAGE]))
    sys.exit()
os.wait()
"""


def rehearsed(fork="", resident=1 << 30, before=""):
    return told_by(before + REHEARSAL.format(fork=fork, resident=resident))


def told_by(program):
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return json.loads(run.stdout)


def test_a_rehearsal_tells_what_the_fork_wrote_to_and_the_single_pages_between():
    assert rehearsed() == [[8, 20, 21, 22], False, 1]


@pytest.mark.parametrize(
    "fork",
    ["time.sleep(600)", "signal.alarm(0), os.kill(os.getpid(), signal.SIGSTOP)", "os.abort()"],
    ids=["does not end", "stops", "is killed"],
)
def test_a_rehearsal_that_does_not_come_to_its_end_leaves_nothing_behind(fork):
    before = "import resource, signal; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))"
    _, left, kept = rehearsed(fork, before=before)

    assert (left, kept) == (False, 1)


# Of an observer that was killed there is no more than a part of what it had to tell.
@pytest.mark.parametrize("told", ['b""', 'b"x" * 7', "memory._SPAN.pack(0, 0)[:9]"])
def test_an_observer_that_is_killed_tells_nothing(told):
    before = "import os; from jhansi_runtime.isolation import memory\n"
    before += f"memory._observe = lambda telling: (os.write(telling, {told}), os.kill(os.getpid(), 9))\n"

    assert rehearsed(before=before) == [[], False, 1]


def test_an_observer_that_can_fork_nobody_tells_nothing():
    before = "from jhansi_runtime.isolation import memory\ndef none(): raise OSError\nmemory.writable = none\n"

    assert rehearsed(before=before) == [[], False, 1]


@pytest.mark.parametrize("call", ["ptrace", "madvise"])
def test_where_the_kernel_refuses_nothing_is_copied_ahead(call):
    assert rehearsed(before=REFUSE.format(call=call)) == [[], False, 1]


def test_no_more_than_a_share_of_what_there_is_is_told():
    assert rehearsed(resident=0) == [[], False, 1]


def test_what_is_copied_ahead_is_ones_own_and_as_it_was():
    assert told_by(AHEAD) == [[], True, True, True]


JOB = b"""
own = 0
with open("/proc/self/maps") as maps, open("/proc/self/pagemap", "rb", 0) as pagemap:
    for line in maps:
        span, access, *_ = line.split()
        if access == "rw-p":
            start, end = (int(number, 16) // 4096 for number in span.split("-"))
            pagemap.seek(start * 8)
            entries = memoryview(pagemap.read((end - start) * 8)).cast("Q")
            own += sum(1 for entry in entries if entry >> 56 & 1)
print(own)
"""
HOST = """
import os, time
from jhansi_runtime import ExecRequest, Paths, Runtime
from jhansi_runtime.engine import LauncherProcess
from jhansi_runtime.engine.pool import Pool, Sizes

pool = Pool(LauncherProcess(), Sizes(minimum=2, maximum=2))
with Runtime(Paths.from_environment(), slots=pool) as runtime:
    sandbox = runtime.create(rootfs="host").id
    runtime.write(sandbox, "main.py", {job!r})
    deadline = time.monotonic() + 60
    while pool.figures().interpreters < 3 and time.monotonic() < deadline:
        time.sleep(0.5)
        result = runtime.exec(ExecRequest(sandbox=sandbox, filename="main.py"))
    runtime.remove(sandbox)
    assert pool.figures().interpreters == 3
print(result.stdout or result)
"""


def test_a_job_that_has_waited_has_its_pages_ahead(runtime_environment):
    host = HOST.format(job=JOB)
    programs = {True: host, False: REFUSE.format(call="ptrace") + host}
    own = {
        looks: int(
            subprocess.run(
                [sys.executable, "-c", program],
                env=runtime_environment,
                capture_output=True,
                text=True,
                check=True,
                timeout=120,
            ).stdout
        )
        for looks, program in programs.items()
    }

    assert own[True] > own[False] + 100
