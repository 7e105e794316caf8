"""The store of sandboxes: names, ids, settings, locks between processes, and what a killed process leaves."""

import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
from contextlib import contextmanager

import pytest

from jhansi_runtime import beneath, sandboxes
from jhansi_runtime.errors import ConflictError, InvalidRequestError, JhansiError, NotFoundError
from jhansi_runtime.sandboxes import Sandboxes
from jhansi_runtime.spec import Limits

RUN_ID = "run_0123456789abcd01234567"
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def store(tmp_path):
    return Sandboxes(str(tmp_path / "workspaces"))


def create(store, **settings):
    return store.create(**{"language": "python", "limits": Limits(), **settings})


def left(store):
    """The sandboxes in the root, and what is there unfinished."""
    return sorted(set(os.listdir(store.root)) - {".lock", ".names", ".unfinished"}) + sorted(
        os.listdir(f"{store.root}/.unfinished")
    )


def names(store):
    """What the index of names says."""
    return sorted(f"{entry.parent.name}/{entry.name}" for entry in pathlib.Path(store.root, ".names").glob("*/*"))


def python(program, *arguments, **options):
    """A Python process of its own, in this checkout, reading and writing text."""
    return subprocess.Popen([sys.executable, "-c", program, *arguments], text=True, stdout=subprocess.PIPE, **options)


# --- creating and finding ---


def test_a_created_sandbox_is_found_with_all_its_settings(store):
    limits = Limits(timeout=3.0)
    made = create(store, name="one", labels={"team/x": "blue"}, ttl=60, limits=limits, rootfs="host")

    assert store.find(made.id) == made
    assert (made.name, made.labels, made.limits, made.rootfs) == ("one", {"team/x": "blue"}, limits, "host")
    assert made.created_at < made.expires_at
    assert store.list() == [made]


def test_the_folders_are_closed_to_everybody_else(store):
    made = create(store)

    for path in (store.root, f"{store.root}/{made.id}"):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
    assert os.path.isdir(os.path.join(store.root, store.workspace_path(made.id)))


def test_sandboxes_are_listed_oldest_first(store):
    made = [create(store) for _ in range(5)]

    assert store.list() == made


def test_nothing_is_listed_where_there_is_no_root(store):
    assert store.list() == []
    assert list(store.damaged()) == []
    with pytest.raises(NotFoundError):
        store.find("anything")


def test_a_sandbox_is_found_by_its_name_and_by_the_beginning_of_its_id(store):
    made = create(store, name="numbers")

    assert store.find("numbers") == made
    assert store.find(made.id[:7]) == made
    assert store.find(made.id[3:9]) == made


def test_a_name_wins_over_the_beginning_of_an_id(store):
    other = create(store)
    named = create(store, name=other.id[3:7])

    assert store.find(other.id[3:7]) == named


def test_the_beginning_of_two_ids_names_both(store):
    made = [create(store) for _ in range(17)]  # of 17 ids, two begin with the same of 16 digits
    digits = [sandbox.id[3] for sandbox in made]
    shared = next(digit for digit in digits if digits.count(digit) > 1)
    candidates = sorted(sandbox.id for sandbox in made if sandbox.id[3] == shared)

    with pytest.raises(InvalidRequestError) as caught:
        store.find(shared)

    assert all(candidate in caught.value.message for candidate in candidates[:5])


@pytest.mark.parametrize(
    "reference", ["", "sb_", "s", "nobody", "../x", "/", ".", "sb_0123456789abcdef", "a\0b", "\udcff"]
)
def test_what_is_no_sandbox_is_not_found(store, reference):
    create(store)

    with pytest.raises(NotFoundError, match="jhansi-run ls"):
        store.find(reference)


def test_a_full_id_is_found_without_reading_the_root(store):
    made = create(store)
    os.chmod(store.root, 0o100)
    try:
        assert store.find(made.id) == made
        with store.hold(made.id):
            pass
    finally:
        os.chmod(store.root, 0o700)


@pytest.mark.parametrize(
    "name", ["", "a b", "-x", ".x", "a/b", "x\n", "é", "x" * 65, "sb_1", "run_x", "0123456789abcdef"]
)
def test_a_name_that_cannot_be_one_is_refused(store, name):
    with pytest.raises(InvalidRequestError):
        create(store, name=name)
    assert store.list() == []


@pytest.mark.parametrize(
    "labels", [{"": "x"}, {"a b": "x"}, {"a": "x\ny"}, {"a": "x" * 257}, {f"k{n}": "" for n in range(65)}]
)
def test_labels_that_cannot_be_any_are_refused(store, labels):
    with pytest.raises(InvalidRequestError):
        create(store, labels=labels)


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf"), 1e12])
def test_a_time_to_live_that_cannot_be_one_is_refused(store, ttl):
    with pytest.raises(InvalidRequestError):
        create(store, ttl=ttl)


def test_a_name_is_taken_once_only(store):
    create(store, name="mine")

    with pytest.raises(ConflictError):
        create(store, name="mine")
    assert len(store.list()) == 1


def test_of_eight_processes_that_want_one_name_one_gets_it(store):
    barrier = FORK.Barrier(8)

    def compete():
        barrier.wait()
        try:
            create(store, name="wanted")
        except ConflictError:
            sys.exit(3)

    processes = [FORK.Process(target=compete) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()

    assert sorted(process.exitcode for process in processes) == [0] + [3] * 7
    assert [sandbox.name for sandbox in store.list()] == ["wanted"]


@pytest.mark.parametrize("verb", ["find", "create", "change"])
def test_a_name_is_known_where_no_index_of_names_was_kept(store, verb):
    made, other = create(store, name="mine"), create(store)
    shutil.rmtree(f"{store.root}/.names")

    if verb == "find":
        assert store.find("mine") == made
        return
    with pytest.raises(ConflictError):
        create(store, name="mine") if verb == "create" else store.change(other.id, name="mine")


def test_a_name_that_an_index_does_not_know_is_known_after_a_sweep(store):
    made = create(store, name="before")
    path = f"{store.root}/{made.id}/sandbox.json"
    with open(path, encoding="ascii") as file:
        edited = file.read().replace("before", "after")
    with open(path, "w", encoding="ascii") as file:
        file.write(edited)

    with pytest.raises(NotFoundError):
        store.find("before")
    store.sweep()
    assert store.find("after").id == made.id
    assert names(store) == [f"after/{made.id}"]


def test_names_that_nobody_has_any_more_are_free_and_leave_nothing(store):
    made = create(store, name="one")
    store.change(made.id, name="two")
    create(store, name="one", owner="somebody")
    create(store, name="one", owner="another")
    store.remove(store.find("one", owner="another").id)
    store.change(made.id, name=None)
    assert [entry.partition("/")[0] for entry in names(store)] == ["one"]
    deleted = create(store, name="deleted")
    shutil.rmtree(f"{store.root}/{deleted.id}")
    create(store, name="deleted")

    assert [sandbox.owner for sandbox in store.list()] == [None, "somebody", None]
    assert store.find("one").owner == "somebody"
    store.sweep()
    assert names(store) == [f"{one.name}/{one.id}" for one in store.list()[:0:-1]]


def test_a_name_is_found_taken_and_given_up_without_reading_the_root(store, monkeypatch):
    made = create(store, name="mine")
    monkeypatch.setattr(Sandboxes, "_ids", None)

    assert store.find("mine") == made
    store.change("mine", name="yours")
    store.remove("yours")
    create(store, name="mine")


# --- changing and expiring ---


def test_only_what_is_given_is_changed(store):
    made = create(store, name="old", labels={"a": "1"}, ttl=60)

    changed = store.change("old", name="new", limits=Limits(timeout=5))

    assert (changed.name, changed.limits.timeout) == ("new", 5)
    assert (changed.labels, changed.expires_at, changed.created_at) == (made.labels, made.expires_at, made.created_at)
    assert store.find("new") == changed
    cleared = store.change("new", name=None, ttl=None, labels={})
    assert (cleared.name, cleared.expires_at, cleared.labels) == (None, None, {})


def test_a_sandbox_keeps_its_own_name_but_gets_nobody_elses(store):
    create(store, name="taken")
    mine = create(store, name="mine")

    assert store.change(mine.id, name="mine", ttl=5).name == "mine"
    with pytest.raises(ConflictError):
        store.change(mine.id, name="taken")


def test_those_whose_time_is_up_are_expired(store):
    create(store)
    short, long = create(store, ttl=10), create(store, ttl=10_000)

    assert store.expired() == []
    assert store.expired(now=_seconds(short.created_at) + 100) == [short]
    assert store.expired(now=_seconds(long.created_at) + 100_000) == [short, long]


def _seconds(instant):
    from datetime import datetime

    return datetime.fromisoformat(instant).timestamp()


# --- damage ---


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b"{}", b'{"id": "sb_ffffffffffffffff", "language": "x", "created_at": ""}']
)
def test_damaged_metadata_is_told_and_hides_no_other_sandbox(store, content):
    bad, good = create(store, name="bad"), create(store)
    with open(f"{store.root}/{bad.id}/sandbox.json", "wb") as file:
        file.write(content)

    with pytest.raises(JhansiError, match="damaged") as caught:
        store.find(bad.id)
    assert not isinstance(caught.value, NotFoundError)
    assert store.list() == [good]
    assert [bad.id in error.message for error in store.damaged()] == [True]


def test_missing_metadata_is_damage_too(store):
    made = create(store)
    os.unlink(f"{store.root}/{made.id}/sandbox.json")

    with pytest.raises(JhansiError, match="damaged"):
        store.find(made.id)


# --- holding and removing ---


def test_a_removed_sandbox_leaves_nothing(store):
    made = create(store, name="gone")
    with store.hold(made.id) as workspace:
        workspace.write("a/b/c", [b"x"])

    assert store.remove("gone") == made
    assert left(store) == []
    with pytest.raises(NotFoundError):
        store.find(made.id)
    with pytest.raises(NotFoundError), store.hold(made.id):
        pass


def test_a_held_sandbox_cannot_be_removed_until_all_let_go(store):
    made = create(store)

    with store.hold(made.id), store.hold(made.id), pytest.raises(ConflictError, match="in use"):
        store.remove(made.id)
    assert store.find(made.id) == made
    store.remove(made.id)
    assert left(store) == []


def test_the_hold_of_a_killed_process_is_gone_with_it(store):
    made = create(store)
    holder = python(
        "import sys, time\n"
        "from jhansi_runtime.sandboxes import Sandboxes\n"
        "with Sandboxes(sys.argv[1]).hold(sys.argv[2]):\n"
        "    print('held', flush=True); time.sleep(600)\n",
        store.root,
        made.id,
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConflictError):
            store.remove(made.id)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        store.remove(made.id)

    assert left(store) == []


def test_a_hold_is_not_inherited_by_a_program_that_is_run(store):
    made = create(store)
    with store.hold(made.id):
        child = python("print('up', flush=True); input()", stdin=subprocess.PIPE, close_fds=False)
        assert child.stdout.readline() == "up\n"
    with child:
        store.remove(made.id)
        child.communicate("\n")

    assert left(store) == []


def test_a_hold_leaves_no_descriptor(store):
    made = create(store)
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with store.hold(made.id):
            pass
        with pytest.raises(NotFoundError), store.hold("sb_0000000000000000"):
            pass
        store.find(made.id)
    assert os.listdir("/proc/self/fd") == before


def test_a_workspace_that_its_job_has_shut_can_be_used_again(store):
    made = create(store)
    with store.hold(made.id) as workspace:
        workspace.write("main.py", [b"pass"])
    os.chmod(os.path.join(store.root, store.workspace_path(made.id)), 0)

    with store.hold(made.id) as workspace:
        assert workspace.open_program("main.py").size == 4


# --- one-shot sandboxes ---


def test_a_one_shot_sandbox_has_the_id_of_its_run_and_is_not_listed(store):
    made = create(store, ephemeral=RUN_ID)

    assert made.id == RUN_ID
    assert store.list() == []
    with pytest.raises(NotFoundError):
        store.find(RUN_ID[:12])
    with store.hold(RUN_ID) as workspace:
        workspace.write("main.py", [b"pass"])
    assert store.remove(RUN_ID) == made
    assert left(store) == []


def test_what_is_not_a_run_id_is_not_taken_for_one(store):
    for wrong in ("../../run_0123456789abcdef", "x", "run_", "sb_0123456789abcdef"):
        with pytest.raises(InvalidRequestError):
            create(store, ephemeral=wrong)


def test_a_discarded_sandbox_is_gone_whatever_is_left_of_it(store):
    create(store, ephemeral=RUN_ID)
    store.discard(RUN_ID)
    assert left(store) == []
    store.discard(RUN_ID)

    create(store, ephemeral=RUN_ID)
    os.unlink(f"{store.root}/{RUN_ID}/sandbox.json")
    store.discard(RUN_ID)
    assert left(store) == []


# --- killed at any moment ---

_KILLED = """
import os, signal, sys
from jhansi_runtime.sandboxes import Sandboxes
from jhansi_runtime.spec import Limits
store, victim, countdown = Sandboxes(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def count(name, arguments):
    # An audit event comes before the call it names: so this dies in front of each change to the disk in turn.
    global countdown
    if name.startswith(("os.", "open", "fcntl.")):
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
if victim:
    store.remove(victim)
else:
    store.create(language="python", limits=Limits(), name="fresh")
"""


def _died(store, victim, moment):
    with python(_KILLED, store.root, victim, str(moment)) as process:
        process.communicate()
    assert process.returncode in {0, -signal.SIGKILL}
    return process.returncode != 0


def test_a_create_that_is_killed_at_any_moment_leaves_all_or_nothing(store):
    other = create(store)
    moment, outcomes = 1, set()
    while _died(store, "", moment):
        fresh = [sandbox for sandbox in store.list() if sandbox != other]
        outcomes.add(len(fresh))
        assert list(store.damaged()) == []
        for sandbox in fresh:
            assert store.find("fresh") == sandbox
            with store.hold(sandbox.id) as workspace:
                assert list(workspace.files()) == []
            store.remove(sandbox.id)
        store.sweep()
        assert left(store) == [other.id]
        assert names(store) == []
        moment += 1

    assert outcomes == {0, 1}
    assert moment > 10


def test_a_remove_that_is_killed_at_any_moment_leaves_all_or_nothing(store):
    moment, outcomes = 1, set()
    while True:
        made = create(store)
        with store.hold(made.id) as workspace:
            for path in ("a/b/c", "a/d", "e"):
                workspace.write(path, [b"x"])
        if not _died(store, made.id, moment):
            break
        outcomes.add(len(store.list()))
        for sandbox in store.list():
            with store.hold(sandbox.id) as workspace:
                assert len(list(workspace.files(recursive=True))) == 5
            store.remove(sandbox.id)
        store.sweep()
        assert left(store) == []
        moment += 1

    assert outcomes == {0, 1}
    assert moment > 10


def test_what_a_living_process_is_removing_is_left_to_it(store):
    made = create(store)
    removing = f"{store.root}/.unfinished/removing-{made.id}"
    os.rename(f"{store.root}/{made.id}", removing)
    holder = python(
        "import fcntl, os, sys\n"
        "fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)\n"
        "print('locked', flush=True); input()\n",
        removing,
        stdin=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout.readline() == "locked\n"
        store.sweep()
        assert left(store) == [f"removing-{made.id}"]
        holder.communicate("\n")
    store.sweep()
    assert left(store) == []


def test_a_sweep_leaves_what_another_has_begun_to_make_meanwhile(store, monkeypatch):
    create(store)
    genuine = sandboxes._locked

    @contextmanager
    def locked(root):
        with genuine(root):
            yield
        os.mkdir(f"{store.root}/.unfinished/creating-sb_0123456789abcdef")

    monkeypatch.setattr(sandboxes, "_locked", locked)
    with beneath.closing(os.open(store.root, os.O_RDONLY)) as root:
        sandboxes._sweep(root)

    assert os.listdir(f"{store.root}/.unfinished") == ["creating-sb_0123456789abcdef"]


def test_metadata_on_disk_is_one_json_document(store):
    made = create(store, labels={"a": "ü"})

    with open(f"{store.root}/{made.id}/sandbox.json", encoding="ascii") as file:
        assert json.load(file)["labels"] == {"a": "ü"}


# --- started by root ---


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_root_gives_the_workspace_and_all_that_is_put_there_to_the_owner(tmp_path):
    owner = 1_900_000_000
    store = Sandboxes(str(tmp_path / "workspaces"), owner=owner)
    made = create(store)
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "file").write_text("x")
    (folder / "link").symlink_to("sub/file")
    with store.hold(made.id) as workspace:
        workspace.write("deep/er/file", [b"x"])
        workspace.put(str(folder), "into")

    top = os.path.join(store.root, store.workspace_path(made.id))
    paths = [top] + [os.path.join(above, name) for above, folders, files in os.walk(top) for name in folders + files]
    assert len(paths) == 9
    assert {(os.lstat(path).st_uid, os.lstat(path).st_gid) for path in paths} == {(owner, owner)}
    assert os.stat(f"{store.root}/{made.id}").st_uid == 0
    store.remove(made.id)
    assert left(store) == []
