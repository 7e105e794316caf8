"""What a job may use up: each limit, seen to be what ends the program that goes beyond it.

test_limits.py and test_programs.py say what becomes of whom; here each limit is taken out as well. Without it a program
takes the machine from everybody else: by memory, processes, time and files, and by what the kernel has only so much of
for each user or for all: terminals, watches, requests under way.
"""

import os
import resource

import pytest
from attempts import LIMITS, MIB, Attempts, Need, Row, attempt, each, each_alone, surroundings
from removals import with_much_scratch, without, without_watchdog

from jhansi_runtime.isolation import job, processors

FEW_SECONDS = LIMITS | {"cpu_time": 3, "timeout": 60}
MANY_FILES = LIMITS | {"nofile": 1024}


def locks_more_than_a_job():
    return resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] > MIB


TABLE = [
    Row(
        "the scratch folders have one size together",
        (with_much_scratch(),),
        """
for place in ("/tmp", "/dev/shm", "/home/sandbox"):
    with open(f"{place}/fill", "wb") as file:
        file.write(bytes(500_000))
print("escaped")
""",
        alone=True,
    ),
    Row(
        "the scratch folders hold only so many files",
        (with_much_scratch(),),
        """
for number in range(2000):
    os.close(os.open(f"/tmp/{number}", os.O_CREAT))
print("escaped")
""",
        alone=True,
    ),
    Row(
        "the size of a file is limited",
        (without(job, "_limit"),),
        'open("/workspace/large", "wb").write(bytes(2 << 20)); print("escaped")',
    ),
    Row(
        "the size of a file is limited where it was only said to be so large",
        (without(job, "_limit"),),
        'os.truncate(os.open("/workspace/sparse", os.O_CREAT | os.O_WRONLY), 4 << 20); print("escaped")',
    ),
    Row(
        "the size of a file without a name is limited",
        (without(job, "_limit"),),
        'os.truncate(os.memfd_create("large"), 4 << 20); print("escaped")',
    ),
    Row(
        "the number of open files is limited",
        (without(job, "_limit"),),
        'kept = [open("/dev/null") for _ in range(100)]; print("escaped")',
    ),
    Row(
        "memory that is locked is limited",
        (without(job, "_limit"),),
        "done(LIBC.mlock(ctypes.create_string_buffer(1 << 20), 1 << 20))",
        needs=(Need("this user may lock no more than a job may", locks_more_than_a_job),),
    ),
    Row(
        "CPU time of one process is limited",
        (without(job, "_limit"),),
        """
while time.process_time() < 4.5:
    pass
print("escaped")
""",
        also=(without_watchdog(),),
        limits=FEW_SECONDS,
    ),
    Row(
        "CPU time of all processes together is limited",
        (without_watchdog(),),
        """
for _ in range(6):
    if os.fork() == 0:
        while time.process_time() < 1:
            pass
        os._exit(0)
    os.wait()
print("escaped")
""",
        limits=FEW_SECONDS,
    ),
    Row(
        "memory is limited",
        (without_watchdog(),),
        """
kept = bytearray(500 << 20)
time.sleep(1)
print("escaped")
""",
        alone=True,
    ),
    Row(
        "the number of processes is limited",
        (without(job, "_limit"),),
        """
for _ in range(25):
    if os.fork() == 0:
        signal.pause()
print("escaped")
""",
        alone=True,
    ),
    Row(
        "the number of threads is limited",
        (without(job, "_limit"),),
        """
import threading
enough = threading.Event()
try:
    for _ in range(25):
        threading.Thread(target=enough.wait).start()
    print("escaped")
finally:
    enough.set()
""",
        alone=True,
    ),
    Row(
        "the number of processes that vfork makes is limited",
        (without(job, "_limit"),),
        """
import subprocess
kept = [subprocess.Popen(["sleep", "20"]) for _ in range(25)]
print("escaped")
""",
        alone=True,
    ),
    Row(
        "the job is told of no more CPUs than it may use",
        (without(processors, "run_on"),),
        'print("escaped" if len(os.sched_getaffinity(0)) == int(E["CPUS"]) > 1 else "")',
        needs=(Need("this machine has one CPU", lambda: len(os.sched_getaffinity(0)) > 1),),
    ),
]


@pytest.fixture(scope="module")
def attempts(tmp_path_factory):
    with surroundings(tmp_path_factory.mktemp("host")) as host:
        yield Attempts(host, TABLE)


@each(TABLE)
def test_the_attack_fails(attempts, row):
    attempts.assert_it_fails(row)


@each_alone(TABLE)
def test_the_step_alone_stops_the_attack(attempts, row):
    attempts.assert_it_fails(row, row.also)


@each(TABLE)
def test_the_attack_succeeds_without_the_step(attempts, row):
    attempts.assert_it_succeeds(row)


# --- what the kernel has only so much of, for each user or for all --------------------------------------------------

# Of terminals the machine has 4096, of inotify instances each user 128: half of the latter is a lot for one job.
TAKE = """
taken = []
try:
    while len(taken) < MOST:
        taken.append(TAKEN)
    print("escaped")
except OSError as error:
    print(errno.errorcode[error.errno])
"""
INOTIFY = 'call("inotify_init1", 0)'
TERMINAL = 'os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)'


@pytest.mark.parametrize(("taken", "most"), [(TERMINAL, 512), (INOTIFY, 64)], ids=["terminals", "inotify instances"])
def test_a_job_cannot_have_what_all_have_to_share(attempts, taken, most):
    told = attempt(attempts.host, f"MOST = {most}{TAKE}".replace("TAKEN", taken), limits=MANY_FILES)
    assert told["lines"] in (["ENOSPC"], ["EMFILE"], ["EPERM"], ["ENOSYS"])


def test_no_crash_of_a_job_makes_the_host_run_a_program(attempts):
    # Where core_pattern names a program, the kernel runs it as root of the machine, whatever the limit, unless that is
    # 1 (core(5)): so it has to be, and to stay.
    told = attempt(
        attempts.host,
        """
print(resource.getrlimit(resource.RLIMIT_CORE))
try:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except (OSError, ValueError):
    pass
print(resource.getrlimit(resource.RLIMIT_CORE))
""",
    )
    assert told["lines"] == ["(1, 1)", "(1, 1)"]
