"""The pool: a slot waits for one exec and serves no other; what has died is given to nobody, and nothing is left."""

import json
import os
import pathlib
import signal
import threading
import time
from contextlib import suppress

import pytest
from conftest import environment_with

from jhansi_runtime import ExecRequest, Paths, Runtime
from jhansi_runtime.engine import LauncherProcess, Streams, sources
from jhansi_runtime.engine import pool as pools
from jhansi_runtime.engine.pool import Pool, Sizes
from jhansi_runtime.engine.slot import Progress, Slot
from jhansi_runtime.engine.weighing import own_bytes, resident_bytes
from jhansi_runtime.engine.zygote import ZygoteProcess
from jhansi_runtime.errors import HostError

WITHIN_SECONDS = 60
PATIENCE = {"timeout": 300, "cpu_time": 300}
TWO_CPUS = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="takes two CPUs")


@pytest.fixture
def pooled(runtime_environment):
    """`pooled(**sizes)` opens a Runtime with a pool, which is its attribute `pool`."""
    opened = []

    def open_runtime(**sizes):
        pool = Pool(LauncherProcess(), Sizes(**sizes))
        runtime = Runtime(Paths.from_environment(runtime_environment), slots=pool)
        runtime.pool = pool
        opened.append(runtime)
        return runtime

    yield open_runtime
    for runtime in opened:
        runtime.close()


@pytest.fixture
def box(runtime_environment):
    with Runtime(Paths.from_environment(runtime_environment), launcher=LauncherProcess()) as runtime:
        made = runtime.create(rootfs="host")
        runtime.write(made.id, "main.py", b"import os; print(os.getpid(), os.listdir('/tmp')); open('/tmp/mine', 'w')")
        runtime.write(made.id, "long.py", b"import time; open('begun', 'w'); time.sleep(60)")
        yield made.id
        runtime.remove(made.id)


def program(box, name="main.py", **limits):
    return ExecRequest(sandbox=box, filename=name, limits={**PATIENCE, **limits})


def eventually(holds):
    deadline = time.monotonic() + WITHIN_SECONDS
    while not (found := holds()):
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)
    return found


def waiting(runtime):
    return [made for shelf in list(runtime.pool._shelves.values()) for made in list(shelf.idle)]


def warmed(runtime, box):
    """A slot of a zygote that waits, after as many execs as that takes."""

    def of_a_zygote():
        return [made for made in waiting(runtime) if made.source is not None]

    for _ in range(2):
        runtime.exec(program(box))
    return eventually(of_a_zygote)[0]


def children():
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return {int(pid) for pid in file.read().split()}


def test_a_first_exec_has_nothing_built_ahead(pooled, box):
    runtime = pooled()
    runtime.exec(program(box))

    assert runtime.pool.figures() == (0, 1, 0, 0, 0, 0, ())
    assert "jhansi-pool" not in {thread.name for thread in threading.enumerate()}


def test_every_exec_has_a_container_of_its_own(pooled, box):
    runtime = pooled(minimum=2)
    warmed(runtime, box)
    told = {runtime.exec(program(box)).stdout for _ in range(20)}

    assert told == {"2 []\n"}
    assert runtime.pool.figures().hits > 0


def test_a_slot_takes_one_order(pooled, box):
    runtime = pooled()
    slot = warmed(runtime, box).slot
    slot._ordered = True  # as an order leaves it

    with pytest.raises(HostError, match="a slot runs one order"):
        runtime.exec(program(box))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_without_its_keeper_it_still_ends_every_slot(pooled, box):
    runtime = pooled()
    warmed(runtime, box)
    runtime.pool._fill = None  # a defect, which the keeper does not survive
    with suppress(HostError):  # it takes its zygotes along, and with them what runs in their slots
        runtime.exec(program(box))
    eventually(lambda: not runtime.pool._keeper.is_alive())
    runtime.exec(program(box))
    before = len(os.listdir("/proc/self/fd"))

    assert {runtime.exec(program(box)).stdout for _ in range(5)} == {"2 []\n"}
    assert len(os.listdir("/proc/self/fd")) == before
    assert runtime.pool._dropped == []


def test_a_slot_that_has_died_is_given_to_nobody(pooled, box):
    runtime = pooled()
    made = warmed(runtime, box)
    runtime.pool._hear = lambda _: None  # nobody looks but who takes it
    made.slot.kill()
    eventually(made.slot.has_died)

    assert runtime.exec(program(box)).stdout == "2 []\n"


def test_a_slot_that_died_unseen_is_replaced(pooled, box):
    runtime = pooled()
    dead = warmed(runtime, box)
    dead.slot.kill()

    assert eventually(lambda: [made for made in waiting(runtime) if made is not dead])


def test_one_that_has_waited_too_long_is_replaced(pooled, box, monkeypatch):
    monkeypatch.setattr(pools, "_TURN_SECONDS", 0.05)
    runtime = pooled(minimum=1, age=0.3)
    old = warmed(runtime, box)

    assert eventually(lambda: [made for made in waiting(runtime) if made.since > old.since + 0.3])


def test_a_kind_that_nobody_wants_any_more_is_let_go(pooled, box, monkeypatch):
    monkeypatch.setattr(pools, "_TURN_SECONDS", 0.05)
    runtime = pooled(minimum=1)
    warmed(runtime, box)
    runtime.pool._sizes = runtime.pool._sizes._replace(rest=0.5)  # not before: a zygote may take longer to be there

    eventually(lambda: runtime.pool.figures()[3:5] == (0, 0))
    assert runtime.exec(program(box)).stdout == "2 []\n"


def test_there_are_no_more_than_the_most_of_all_kinds_together(pooled, box):
    runtime = pooled(minimum=2, maximum=3)
    seen = set()
    for number in range(12):
        for _ in range(2):
            runtime.exec(program(box, tmp=(number % 4 + 1) << 20))
            shelves = list(runtime.pool._shelves.values())
            seen.add(sum(len(shelf.idle) + len(shelf.building) for shelf in shelves))

    assert max(seen) <= 3


def test_what_was_wanted_once_is_not_remembered_for_ever(pooled, box, monkeypatch):
    monkeypatch.setattr(pools, "_MOST_SHELVES", 4)
    runtime = pooled()
    for number in range(10):
        runtime.exec(program(box, tmp=(number + 1) << 20))

    assert len(runtime.pool._shelves) <= 4


@pytest.mark.parametrize(("source", "has_zygote"), [("debian bookworm", True), ("/somebodys.tar", False)])
def test_only_a_rootfs_of_signed_packages_has_a_zygote(home, tmp_path, source, has_zygote):
    built, mine = pathlib.Path(home, "rootfs"), tmp_path / "rootfs"
    mine.mkdir()
    record = json.loads((built / "python.json").read_text())
    (mine / record["tree"]).symlink_to(built / record["tree"])
    record["info"]["source"] = source
    (mine / "python.json").write_text(json.dumps(record))
    pool = Pool(LauncherProcess(), Sizes())
    with Runtime(Paths.from_environment(environment_with(tmp_path)), slots=pool) as runtime:
        box = runtime.create().id
        runtime.write(box, "main.py", b"print(1)")
        assert runtime.exec(program(box)).stdout == "1\n"
        assert [key.zygote is not None for key in pool._shelves] == [has_zygote]


@pytest.fixture
def heeding(pooled, monkeypatch):
    """As `pooled`, with a keeper that weighs all the time."""
    monkeypatch.setattr(pools, "_TURN_SECONDS", 0.05)
    monkeypatch.setattr(pools, "_WEIGH_SECONDS", 0.05)
    return pooled


def test_a_slot_weighs_what_is_its_own_and_a_zygote_all_that_it_has(pooled, box):
    runtime = pooled()
    made = warmed(runtime, box)
    zygote, slot = resident_bytes(made.source.process.pid), own_bytes(made.slot.proc)

    assert 8 << 20 < zygote < 100 << 20
    assert 100_000 < slot < zygote // 2


def test_what_waits_is_weighed(heeding, box):
    runtime = heeding(minimum=2)
    made = warmed(runtime, box)
    eventually(lambda: runtime.pool.figures().idle == 2)
    light = resident_bytes(made.source.process.pid)

    assert eventually(lambda: light < runtime.pool.figures().memory < 2 * light)


def test_what_is_too_heavy_is_let_go_and_not_built_again(heeding, box):
    runtime = heeding(minimum=2, memory=1 << 20)
    for _ in range(2):
        runtime.exec(program(box))
    (shelf,) = runtime.pool._shelves.values()
    eventually(lambda: shelf._cap[1])
    eventually(lambda: runtime.pool.figures()[3:6] == (0, 0, 0) and not shelf.building)
    before = runtime.pool.figures()
    told = {runtime.exec(program(box)).stdout for _ in range(5)}
    time.sleep(0.3)  # for the keeper to build what it is not to

    assert told == {"2 []\n"}
    assert runtime.pool.figures() == before._replace(misses=before.misses + 5)


def test_what_was_wanted_longest_ago_becomes_fewer_first(heeding, box):
    runtime = heeding(minimum=2)
    for tmp in (1 << 20, 2 << 20):
        for _ in range(2):
            runtime.exec(program(box, tmp=tmp))
    shelves = runtime.pool._shelves

    def all_are_a_zygotes():
        return [[made.source is not None for made in shelf.idle] for shelf in shelves.values()] == [[True, True]] * 2

    eventually(all_are_a_zygotes)
    made = waiting(runtime)[0]
    room = resident_bytes(made.source.process.pid) + 7 * own_bytes(made.slot.proc) // 2  # for three and a half of four
    runtime.pool._sizes = runtime.pool._sizes._replace(memory=room)

    first, second = shelves.values()
    assert eventually(lambda: len(first.idle) < 2)
    assert (len(second.idle), runtime.pool.figures().zygotes) == (2, 1)


def test_a_zygote_that_does_not_get_ready_is_ended_and_left_alone(pooled, box, monkeypatch):
    stopped = []

    class Stopped(ZygoteProcess):
        def __init__(self, zygote, launcher):
            super().__init__(zygote, launcher)
            signal.pidfd_send_signal(self.pidfd, signal.SIGSTOP)
            stopped.append(self)

    monkeypatch.setattr(pools, "_TURN_SECONDS", 0.05)
    monkeypatch.setattr(sources, "ZygoteProcess", Stopped)
    monkeypatch.setattr(sources, "_READY_WITHIN_SECONDS", 0.2)
    runtime = pooled(minimum=1)
    for _ in range(3):
        runtime.exec(program(box))

    assert eventually(lambda: [process for process in stopped if process.has_ended()])
    assert runtime.exec(program(box)).stdout == "2 []\n"
    assert runtime.pool.figures().zygotes == 0


def test_what_was_built_while_the_zygote_came_makes_room_for_its_slots(pooled, box, monkeypatch):
    slow = []

    class Slow(Slot):
        def receive(self):
            message = super().receive()
            is_keeper = threading.current_thread().name == "jhansi-pool"
            if message is Progress.LAUNCHED and is_keeper and not self.has_interpreter:
                signal.pidfd_send_signal(self._pidfd, signal.SIGSTOP)
                slow.append(self)
            return message

    monkeypatch.setattr(pools, "Slot", Slow)
    runtime = pooled(minimum=1)
    for _ in range(2):
        runtime.exec(program(box))
    eventually(lambda: runtime.pool.figures().zygotes and slow)
    for slot in slow:
        signal.pidfd_send_signal(slot._pidfd, signal.SIGCONT)

    assert eventually(lambda: [made for made in waiting(runtime) if made.source is not None])


@pytest.mark.parametrize("whom", ["zygote", "launcher"])
def test_killed_while_slots_wait_it_is_not_missed(pooled, box, whom):
    runtime = pooled()
    before = children()
    made = warmed(runtime, box)
    if whom == "zygote":
        signal.pidfd_send_signal(made.source.process.pidfd, signal.SIGKILL)
        eventually(made.source.process.has_ended)
    else:
        (launcher,) = children() - before
        os.kill(launcher, signal.SIGKILL)
        eventually(lambda: runtime.pool._launcher.generation() != 1)

    assert runtime.exec(program(box)).stdout == "2 []\n"
    assert eventually(lambda: [other for other in waiting(runtime) if other is not made])


def test_a_zygote_that_owes_an_answer_can_be_ended(pooled, box):
    process = warmed(pooled(), box).source.process
    signal.pidfd_send_signal(process.pidfd, signal.SIGSTOP)
    asking = threading.Thread(target=process._connection.reap, args=(process.pid,))
    asking.start()
    eventually(process._connection._mutex.locked)

    ending = threading.Thread(target=process.close, daemon=True)
    ending.start()
    ending.join(10)
    had_ended = not ending.is_alive()
    if not had_ended:
        signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)
    asking.join()

    assert had_ended


def test_a_zygote_killed_ends_its_execs_which_are_recorded(pooled, box):
    runtime = pooled()
    made = warmed(runtime, box)
    failed = []

    def run():
        with pytest.raises(HostError) as raised:
            runtime.exec(program(box, "long.py"))
        failed.append(raised.value)

    caller = threading.Thread(target=run)
    caller.start()
    eventually(lambda: any(file.path == "begun" for file in runtime.files(box)))
    signal.pidfd_send_signal(made.source.process.pidfd, signal.SIGKILL)
    caller.join()
    ended = [record for record in runtime.audit.records(sandbox_id=box) if record["event"] == "exec.end"]

    assert failed
    assert ended[-1]["status"] == "failed"
    assert runtime.exec(program(box)).stdout == "2 []\n"


def test_callers_at_once_each_have_their_own(pooled, box):
    runtime = pooled(maximum=4)
    warmed(runtime, box)
    told = []
    callers = [threading.Thread(target=lambda: told.append(runtime.exec(program(box)).stdout)) for _ in range(12)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()

    assert told == ["2 []\n"] * 12


@TWO_CPUS
def test_a_slot_is_built_where_no_job_runs_and_its_job_may_run_on_its_own_cpus(pooled, box):
    runtime = pooled(minimum=2)
    warmed(runtime, box)
    eventually(lambda: len(waiting(runtime)) == 2)
    runtime.write(box, "held.py", b"import os, sys; print(os.sched_getaffinity(0), flush=True); sys.stdin.read()")
    before = {id(made) for made in waiting(runtime)}
    reader, writer = os.pipe()
    with open(reader) as held, open(writer, "w") as release, open(os.memfd_create("said"), "w+") as said:
        streams = Streams(stdin=held.fileno(), stdout=said.fileno())
        caller = threading.Thread(target=runtime.exec, args=(program(box, "held.py"),), kwargs={"streams": streams})
        caller.start()
        (built,) = eventually(lambda: [made for made in waiting(runtime) if id(made) not in before])
        (busy,) = (number for number, jobs in runtime.pool._processors._running.items() if jobs)
        where_built, where_it_waits = affinity(built.source.process.pidfd), affinity(built.slot._pidfd)
        release.close()
        caller.join()
        said.seek(0)

        assert said.read() == f"{{{busy}}}\n"
    assert (where_built, where_it_waits) == (os.sched_getaffinity(0) - {busy}, os.sched_getaffinity(0))


def affinity(pidfd):
    with open(f"/proc/self/fdinfo/{pidfd}") as file:
        return os.sched_getaffinity(next(int(line.split()[1]) for line in file if line.startswith("Pid:")))


@TWO_CPUS
def test_the_slot_of_an_idle_cpu_is_taken_first(pooled, box):
    runtime = pooled(minimum=2)
    warmed(runtime, box)
    runtime.write(box, "where.py", b"import os; print(os.sched_getaffinity(0))")

    def each_anew():  # one that is still on its way out may have put both on the same CPU
        time.sleep(0.2)
        return runtime.exec(program(box))

    for busy in sorted(os.sched_getaffinity(0))[:2]:
        eventually(lambda: len({made.slot.container.processors for made in waiting(runtime)}) == 2 or not each_anew())
        runtime.pool._processors.begin((busy,))
        assert str(busy) not in runtime.exec(program(box, "where.py")).stdout
        runtime.pool._processors.end((busy,))


def test_closed_it_leaves_nothing(runtime_environment, box):
    before = children(), sorted(os.listdir("/proc/self/fd")), threading.active_count()
    pool = Pool(LauncherProcess(), Sizes(minimum=3))
    with Runtime(Paths.from_environment(runtime_environment), slots=pool) as runtime:
        runtime.pool = pool
        made = warmed(runtime, box)
        with open(f"/proc/self/fdinfo/{made.source.process.pidfd}") as file:
            pid = next(int(line.split()[1]) for line in file if line.startswith("Pid:"))

    assert (children(), sorted(os.listdir("/proc/self/fd")), threading.active_count()) == before
    assert not os.path.exists(f"/proc/{pid}")
