"""Hosts whose cgroups cannot be had, as an ordinary user and as root meet them: what the doctor says, and that the line
which it says mends it does.

It takes a machine whose init is systemd, and changes it for a while: tools/vm --root is such a one.
"""

import json
import os
import pwd
import re
import shlex
import subprocess
import sys
import time

import pytest
from conftest import CHECKOUT, environment_with, host_lacks

pytestmark = pytest.mark.root

USER = "jhansi-test"  # tools/test has made it, and what it tests with
PROGRAM = "/var/lib/jhansi-test/checkout/.venv/bin/jhansi-run"
DROP_INS = "/etc/systemd/system/user@.service.d"


@pytest.fixture(autouse=True)
def _a_machine_of_systemds():
    with open("/proc/1/comm") as file:
        is_init = file.read().strip() == "systemd"
    if not is_init:
        host_lacks("systemd", "it is not this machine's init")
    if not os.path.exists(PROGRAM):
        host_lacks("setup", f"there is no {PROGRAM}; start the tests with {CHECKOUT}/tools/test")


@pytest.fixture
def user():
    """The ordinary user, with a systemd of its own that runs before the test and after it."""
    user = pwd.getpwnam(USER)
    _start_manager(user.pw_uid)
    yield user
    for line in (
        f"rm -f {DROP_INS}/10-without.conf {DROP_INS}/99-jhansi.conf",
        "systemctl daemon-reload",
        f"loginctl enable-linger {USER}",
        f"systemctl restart user@{user.pw_uid}.service",
    ):
        subprocess.run(["sh", "-c", line], check=True)
    _start_manager(user.pw_uid)


def _start_manager(uid):
    subprocess.run(["loginctl", "enable-linger", str(uid)], check=True)
    wait_for(f"/run/user/{uid}/bus")


def wait_for(path):
    end = time.monotonic() + 120
    while not os.path.exists(path):
        assert time.monotonic() < end, f"{path} never came to be"
        time.sleep(0.1)


def as_user(user, *words):
    """What a program of the user's prints, started outside of any session, as by a daemon."""
    environment = ["env", "-i", f"HOME={user.pw_dir}", f"XDG_RUNTIME_DIR=/run/user/{user.pw_uid}", "PATH=/usr/bin:/bin"]
    identity = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    done = subprocess.run([*identity, *environment, *words], cwd="/", capture_output=True, text=True, check=False)
    return done.stdout, done.stderr


def cgroup_check(output):
    (check,) = [check for check in json.loads(output) if check["name"] == "cgroup"]
    return check


def doctor_of(user, *before):
    output, error = as_user(user, *before, PROGRAM, "doctor", "--json")
    assert error == ""
    return cgroup_check(output)


def refused_exec_of(user):
    """The error of an exec that demands cgroups."""
    words = ["--rootfs=host", "--require-cgroup", "/var/lib/jhansi-test/checkout/tools/reference"]
    output, error = as_user(user, PROGRAM, "run", *words)
    assert output == ""
    return error.rstrip("\n")


def follow(remedy, user):
    """Do what a remedy says, to the letter, as whom it says."""
    who, command = re.fullmatch(r"run( as root)?: (.+?)(?: \([^()]*\))?", remedy).groups()
    if who:
        subprocess.run(["sh", "-c", command], check=True)
    else:
        output, error = as_user(user, "sh", "-c", f"{command} && echo done")
        assert output == "done\n", error
    wait_for(f"/run/user/{user.pw_uid}/bus")


def assert_mended_by_its_remedy(user, detail, remedy):
    check = doctor_of(user)
    assert not check["ok"]
    assert detail in check["detail"]
    assert "are watched instead (enforcement: watchdog)" in check["detail"]
    assert remedy in check["remedy"]
    assert refused_exec_of(user).endswith(check["remedy"])

    follow(check["remedy"], user)

    mended = doctor_of(user)
    assert mended["ok"], mended
    assert mended["detail"].endswith("in a scope of systemd's")


def test_a_user_without_a_systemd_of_its_own_is_told_how_to_get_one(user):
    subprocess.run(["loginctl", "disable-linger", str(user.pw_uid)], check=True)
    subprocess.run(["systemctl", "stop", f"user@{user.pw_uid}.service"], check=True)

    assert_mended_by_its_remedy(user, "there is no bus at /run/user/", f"loginctl enable-linger {user.pw_uid}")


def test_a_user_whose_bus_is_off_is_told_how_to_start_it(user):
    as_user(user, "systemctl", "--user", "mask", "--now", "dbus.socket", "dbus.service")

    assert_mended_by_its_remedy(user, "Connection refused", "systemctl --user unmask dbus.socket")


@pytest.mark.parametrize("delegated", ["", "pids", "memory pids"])
def test_a_user_whose_systemd_was_delegated_too_little_is_told_the_drop_in(user, delegated):
    os.makedirs(DROP_INS, exist_ok=True)
    with open(f"{DROP_INS}/10-without.conf", "w") as file:
        file.write(f"[Service]\nDelegate=\nDelegate={delegated}\n")
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    subprocess.run(["systemctl", "restart", f"user@{user.pw_uid}.service"], check=True)
    wait_for(f"/run/user/{user.pw_uid}/bus")

    assert_mended_by_its_remedy(user, "was delegated without cpu", "Delegate=cpu memory pids")


def test_a_service_that_was_delegated_its_cgroup_uses_that(user):
    words = ["--quiet", "--pipe", "--wait", "-p", "Delegate=yes", "-p", f"User={USER}", PROGRAM, "doctor", "--json"]
    done = subprocess.run(["systemd-run", *words], cwd="/", capture_output=True, text=True, check=False)

    check = cgroup_check(done.stdout)
    assert check["ok"], (check, done.stderr)
    assert check["detail"].endswith("in the one that this process was delegated")
    assert user.pw_name == USER


def test_a_tree_that_is_mounted_read_only_is_told_apart(user):
    line = f"mount -o remount,bind,ro /sys/fs/cgroup && exec setpriv --reuid={user.pw_uid} --regid={user.pw_gid} "
    line += f"--clear-groups env -i HOME={user.pw_dir} {PROGRAM} doctor --json"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", line], cwd="/", capture_output=True, text=True, check=False
    )

    check = cgroup_check(done.stdout)
    assert not check["ok"]
    assert check["detail"].startswith("the cgroup v2 tree at /sys/fs/cgroup is mounted read-only")
    assert "docker: --cgroupns=private" in check["remedy"]


def root_doctor(environment, *before):
    argv = [*before, sys.executable, "-m", "jhansi_runtime", "doctor", "--json"]
    return cgroup_check(subprocess.run(argv, env=environment, capture_output=True, text=True, check=False).stdout)


def test_root_gets_a_scope_of_systemds(tmp_path):
    check = root_doctor(environment_with(tmp_path))
    assert check["ok"], check
    assert check["detail"].endswith("in a scope of systemd's")


def test_root_of_a_machine_without_systemd_uses_the_root_of_the_tree(tmp_path):
    check = root_doctor(environment_with(tmp_path), "unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    assert check["ok"], check
    assert check["detail"].endswith("in the root of the tree, which is root's")
    assert [name for name in os.listdir("/sys/fs/cgroup") if re.fullmatch(r"jhansi-[0-9a-f]{16}", name)] == []


def test_a_container_uses_the_root_of_its_own_tree(tmp_path):
    group = "/sys/fs/cgroup/container-of-a-test"
    os.mkdir(group)
    inside = "umount --lazy /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec "
    inside += shlex.join([sys.executable, "-m", "jhansi_runtime", "doctor", "--json"])
    line = f"echo $$ >{group}/cgroup.procs && exec unshare --cgroup --mount sh -c {shlex.quote(inside)}"
    try:
        done = subprocess.run(
            ["sh", "-c", line], env=environment_with(tmp_path), capture_output=True, text=True, check=False
        )
        check = cgroup_check(done.stdout)
        assert check["ok"], (check, done.stderr)
        assert check["detail"].endswith("in the one that this process was delegated")
    finally:
        for folder, _, _ in os.walk(group, topdown=False):
            os.rmdir(folder)


def test_a_job_of_roots_meets_its_limits_by_cgroup(tmp_path):
    (tmp_path / "main.py").write_text("kept = bytearray(1 << 30)")
    words = ["run", "--json", "--rootfs=host", "--require-cgroup", "--memory=128M", str(tmp_path / "main.py")]
    argv = shlex.join([sys.executable, "-m", "jhansi_runtime", *words])
    done = subprocess.run(
        ["sh", "-c", argv], env=environment_with(tmp_path / "home"), capture_output=True, text=True, check=False
    )
    result = json.loads(done.stdout)
    assert (result["status"], result["enforcement"], result["accounting"]) == ("oom_killed", "cgroup", "exact")
