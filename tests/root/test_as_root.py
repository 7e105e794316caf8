"""Started by root, a job is an unprivileged id of the host's: root's own files and groups are nothing to it."""

import json
import os
import pathlib
import resource
import socket
import stat
import subprocess
import sys

import psutil
import pytest
from conftest import CHECKOUT, attended, command, environment_with, host_lacks, run

sys.path.insert(0, os.path.join(CHECKOUT, "tests", "isolation"))  # as pytest does for the files in there

import test_outer

pytestmark = pytest.mark.root

HOST_ID = 1_900_000_000
USER = 4242  # that an id owns a folder does not take a user of that id
GROUP = 4243

# Leaves files of its own, says that it is up, and stays until its stdin ends.
STAYING = """
import os, sys
open("/workspace/left", "w").close()
os.mkdir("/workspace/closed", 0)
os.write(1, b"up\\n")
sys.stdin.read()
"""
# Prints who it is, and what became of opening each file that it was told of.
OPENING = """
import json, os, sys
def opened(path):
    try:
        return open(path, "r+").read()
    except OSError as error:
        return type(error).__name__
print(json.dumps([os.getresuid(), os.getresgid(), *map(opened, sys.argv[1:])]))
"""
# Prints what a server's Unix socket answers; nothing where it hangs up.
ASKING = """
import socket, sys
with socket.socket(socket.AF_UNIX) as caller:
    caller.settimeout(30)
    caller.connect(sys.argv[1])
    try:
        caller.sendall(b"GET /v1/health HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n")
        while said := caller.recv(4096):
            sys.stdout.buffer.write(said)
    except ConnectionError:
        pass
"""
AS_1000 = [[1000] * 3] * 2


@pytest.fixture
def environment(tmp_path):
    return environment_with(tmp_path / "home")


@pytest.fixture
def jhansi(environment):
    return lambda *words, **options: run(words, environment, **options)


@pytest.fixture
def folder(tmp_path):
    """A folder of a user's, in one of root's that nobody else may enter; a job is to work in it."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "staying.py").write_text(STAYING)
    (folder / "opening.py").write_text(OPENING)
    os.chown(folder, USER, USER)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700
    return folder


@pytest.fixture
def staying(environment):
    """`staying(*words)` begins a jhansi-run, and returns it with its init and its job once the job is up."""
    started = []

    def staying(*words):
        argv = [sys.executable, "-m", "jhansi_runtime", *words]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        started.append(subprocess.Popen(argv, env=environment, **pipes))
        assert started[-1].stdout.readline() == b"up\n", started[-1].communicate()
        (launcher,) = psutil.Process(started[-1].pid).children()
        (init,) = launcher.children()
        (job,) = init.children()
        return started[-1], init, job

    yield staying
    for process in started:
        process.kill()
        process.communicate()


def status(process):
    with open(f"/proc/{process.pid}/status") as file:
        return {name: value.split() for name, value in (line.split(":\t") for line in file.read().splitlines())}


def owners(path):
    found = os.lstat(path)
    return found.st_uid, found.st_gid


def test_the_job_and_init_are_an_unprivileged_id_without_groups_and_so_are_their_files(
    jhansi, environment, staying, folder
):
    box = jhansi("create", "--rootfs", "host").stdout.strip()
    assert jhansi("put", box, folder / "staying.py").returncode == 0
    process, *inside = staying("exec", box, "staying.py")
    for each in inside:
        told = status(each)
        assert told["Uid"] == told["Gid"] == [str(HOST_ID)] * 4
        assert told["Groups"] == []
    assert process.communicate(b"")[1] == b""
    assert process.returncode == 0

    workspace = os.path.join(environment["JHANSI_HOME"], "workspaces", box, "workspace")
    for path in (workspace, f"{workspace}/left", f"{workspace}/closed", f"{workspace}/staying.py"):
        assert owners(path) == (HOST_ID, HOST_ID)
    assert jhansi("rm", box).returncode == 0
    assert not os.path.exists(workspace)


def test_a_file_that_a_job_left_can_be_read_and_listed_by_root(jhansi, staying, folder, tmp_path):
    box = jhansi("create", "--rootfs", "host").stdout.strip()
    assert jhansi("put", box, folder / "staying.py").returncode == 0
    process, *_ = staying("exec", box, "staying.py")
    process.communicate(b"")
    names = [file["path"] for file in json.loads(jhansi("files", "--json", box).stdout)]
    assert names == ["closed", "left", "staying.py"]
    assert jhansi("get", box, "left", "-o", tmp_path / "left").returncode == 0


def test_a_folder_of_roots_is_refused_with_the_remedy(jhansi, folder):
    os.chown(folder, 0, 0)
    answer = jhansi("run", "--rootfs", "host", "--workspace", folder, folder / "opening.py")
    assert answer.returncode == 125
    assert f"the workspace '{folder}' belongs to root" in answer.stderr
    assert "give the folder to an unprivileged user: chown" in answer.stderr
    assert answer.stdout == ""


def test_in_a_folder_of_a_users_the_job_is_that_user(staying, folder):
    process, *inside = staying("run", "--rootfs", "host", "--workspace", str(folder), str(folder / "staying.py"))
    for each in inside:
        assert status(each)["Uid"] == [str(USER)] * 4
    process.communicate(b"")
    assert process.returncode == 0
    assert owners(folder / "left")[0] == USER
    os.rmdir(folder / "closed")


def test_nothing_of_roots_can_be_opened(jhansi, folder, tmp_path):
    (folder / "private").write_text("root's")
    (folder / "private").chmod(0o600)
    (tmp_path / "outside").write_text("root's")
    paths = ["/workspace/private", "/workspace/../outside", str(tmp_path / "outside"), "/etc/passwd", "/usr/bin/env"]
    answer = jhansi("run", "--rootfs", "host", "--workspace", folder, folder / "opening.py", *paths)
    assert answer.returncode == 0, answer.stderr
    found = ["PermissionError", "FileNotFoundError", "FileNotFoundError"]
    told = json.loads(answer.stdout)
    assert told[:5] == [*AS_1000, *found]
    assert set(told[5:]) <= {"OSError", "PermissionError"}  # a read-only file system, or not allowed


# Prints two limits, and what became of being preferred to others.
FASTER = """
import os, resource
def real_time():
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
def tried(attempt):
    try:
        attempt()
        return "done"
    except OSError as error:
        return type(error).__name__
print(resource.getrlimit(resource.RLIMIT_NICE), tried(lambda: os.setpriority(os.PRIO_PROCESS, 0, -1)))
print(resource.getrlimit(resource.RLIMIT_RTPRIO), tried(real_time))
"""


def test_the_priorities_that_the_caller_may_have_are_not_the_jobs(jhansi, folder):
    (folder / "faster.py").write_text(FASTER)
    before = {kind: resource.getrlimit(kind) for kind in (resource.RLIMIT_NICE, resource.RLIMIT_RTPRIO)}
    try:
        for kind in before:
            resource.setrlimit(kind, (40, 40))
        answer = jhansi("run", "--rootfs", "host", "--workspace", folder, folder / "faster.py")
    except ValueError:
        host_lacks("CAP_SYS_RESOURCE", "root may not raise its own limits here")
    finally:
        for kind, limits in before.items():
            resource.setrlimit(kind, limits)
    assert answer.stdout.splitlines() == ["(0, 0) PermissionError"] * 2, answer.stderr


def test_init_is_closed_on_a_machine_that_dumps_whoever_has_changed_its_ids(staying, folder):
    setting = pathlib.Path("/proc/sys/fs/suid_dumpable")
    before = setting.read_text()
    try:
        setting.write_text("1")
    except OSError:
        host_lacks("root's settings", f"{setting} cannot be written here")
    try:
        process, init, _ = staying("run", "--rootfs", "host", "--workspace", str(folder), str(folder / "staying.py"))
    finally:
        setting.write_text(before)
    # Files of a process are its user's where it is dumpable, and root's where not (proc(5)).
    assert owners(f"/proc/{init.pid}/environ") == (0, 0)
    process.communicate(b"")
    assert process.returncode == 0
    os.rmdir(folder / "closed")


def test_a_launcher_takes_init_along_whose_ids_have_changed(staying, folder):
    process, init, _ = staying("run", "--rootfs", "host", "--workspace", str(folder), str(folder / "staying.py"))
    # The host would end it, too: here it is the host that dies, and with it the launcher.
    test_outer.assert_it_dies_with(psutil.Process(process.pid), init)
    os.rmdir(folder / "closed")


def test_a_zygote_is_an_unprivileged_id_without_groups_and_a_killed_launcher_takes_it_along(environment):
    with test_outer.waiting(environment, "host") as zygote:
        told = status(zygote.process)
        assert told["Uid"] == told["Gid"] == [str(HOST_ID)] * 4
        assert told["Groups"] == []
        test_outer.assert_it_dies_with(zygote.process.parent(), zygote.process)


# --- with a step taken out; tests/attacks does so for those that an ordinary user can show ----------------------

KEEP_GROUPS = """
from jhansi_runtime.isolation import idmap
idmap.os.setgroups = lambda groups: None
"""
ALLOW_DEVICES = """
from jhansi_runtime.isolation import mounts, syscalls
genuine = mounts.mount_setattr
mounts.mount_setattr = lambda mount, flags, **options: genuine(mount, flags & ~syscalls.MOUNT_ATTR_NODEV, **options)
"""


def opening(environment, folder, path, taken_out, **options):
    """What the job got from opening the path, with a step taken out by a line of Python."""
    main = "import jhansi_runtime.engine as engine; engine.LauncherProcess = lambda *_, **__: engine.InProcess()\n"
    main += "from jhansi_runtime.__main__ import main; main()"
    words = ["run", "--rootfs", "host", "--workspace", folder, folder / "opening.py", path]
    argv = [sys.executable, "-c", f"{taken_out}\n{main}", *words]
    answer = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, **options)
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)[2]


@pytest.mark.parametrize(("taken_out", "expected"), [("", "PermissionError"), (KEEP_GROUPS, "the group's")])
def test_roots_groups_are_given_up(environment, folder, taken_out, expected):
    path = folder / "of-the-group"
    path.write_text("the group's")
    os.chown(path, 0, GROUP)
    path.chmod(0o660)
    assert opening(environment, folder, "of-the-group", taken_out, extra_groups=[GROUP]) == expected


@pytest.mark.parametrize(("taken_out", "expected"), [("", "PermissionError"), (ALLOW_DEVICES, "")])
def test_a_device_in_the_workspace_does_not_open(environment, folder, taken_out, expected):
    node = folder / "null"
    os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    node.chmod(0o666)
    try:
        node.read_bytes()
    except PermissionError:
        host_lacks("device nodes", f"the file system of {folder} is mounted without devices")
    assert opening(environment, folder, "null", taken_out) == expected


def test_an_unknown_user_is_not_answered_whatever_the_mode_of_the_socket(environment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    for above in (folder, folder.parent, folder.parent.parent):
        above.chmod(0o755)
    path = folder / "sock"
    argv = [sys.executable, "-m", "jhansi_runtime", "serve", "--no-tcp", "--socket", str(path)]
    with subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE, text=True) as server:
        while "server.ready" not in server.stderr.readline():
            assert server.poll() is None
        path.chmod(0o666)
        answers = [
            subprocess.run(
                [sys.executable, "-c", ASKING, path],
                user=user,
                group=user,
                extra_groups=[],
                capture_output=True,
                check=True,
            ).stdout
            for user in (0, USER)
        ]
        server.terminate()
        server.stderr.read()
    assert answers[0].startswith(b"HTTP/1.1 200 ")
    assert answers[1] == b""


def test_a_server_of_another_users_runs_no_line_of_ours(tmp_path_factory):
    place = tmp_path_factory.mktemp("user")
    place.parent.chmod(0o755)
    place.parent.parent.chmod(0o755)
    os.chown(place, USER, USER)
    with attended(environment_with(place / "home"), USER) as (server, served):
        answer = run(["ls"], served)
        assert "no server has run this" in answer.stderr
        with socket.socket(socket.AF_UNIX) as caller:
            caller.settimeout(30)
            caller.connect(served["JHANSI_SOCKET"] + ".cli")
            assert caller.recv(1) == b""
        ours = subprocess.run(
            command(["ls"], served),
            env=served,
            user=USER,
            group=USER,
            extra_groups=[],
            capture_output=True,
            check=False,
        )
        assert (ours.returncode, ours.stderr) == (0, b"")
        assert server.poll() is None
