"""The attacks of tests/attacks on jobs of a runtime that root has started: such a job is an unprivileged id outside.

What is root's is out of its reach by its id as well, so most steps can be taken out without harm: those attacks are
here that get through without their step all the same, and all of them with everything in place.
"""

import os
import pathlib
import shutil
import stat
import sys
import tempfile

import pytest
from conftest import CHECKOUT, host_lacks

sys.path.insert(0, os.path.join(CHECKOUT, "tests", "attacks"))  # as pytest does for the files in there

import test_descriptors
import test_hostile_rootfs
import test_namespaces
import test_neighbours
import test_proc
import test_processes
import test_root_tree
import test_sockets
import test_terminals
import test_zygote_slots
from attempts import SECRET, Attempts, attempt, each, each_refusal, surroundings
from removals import CAPABILITIES, IPC, NETWORK, NOT_DUMPABLE, without_attribute

from jhansi_runtime.isolation.syscalls import MOUNT_ATTR_NODEV

pytestmark = pytest.mark.root

THEMES = (
    *(test_descriptors, test_namespaces, test_neighbours, test_proc, test_processes, test_root_tree, test_sockets),
    test_terminals,
)
TABLE = [row for theme in THEMES for row in theme.TABLE]
REFUSALS = [refusal for theme in THEMES for refusal in getattr(theme, "REFUSALS", ())]
# A network, what processes share and capabilities are nobody's by id; init, when root has started it, is always shut.
SUCCEEDING = [row for row in TABLE if row.taken_out[0] in {NETWORK, IPC, CAPABILITIES} and NOT_DUMPABLE not in row.also]


@pytest.fixture(scope="module")
def attempts():
    # Anybody may enter it: what is in there is to be kept by more than the modes of folders.
    with tempfile.TemporaryDirectory(prefix="jhansi-attacks-", dir="/var/tmp") as folder:
        os.chmod(folder, 0o755)
        with surroundings(pathlib.Path(folder)) as host:
            test_hostile_rootfs.set_traps(host)
            yield Attempts(host, TABLE, REFUSALS)


@each(TABLE)
def test_the_attack_fails(attempts, row):
    attempts.assert_it_fails(row)


@each(SUCCEEDING)
def test_the_attack_succeeds_without_the_step(attempts, row):
    attempts.assert_it_succeeds(row)


@each_refusal(REFUSALS)
def test_the_attack_is_refused(attempts, refusal):
    attempts.assert_it_is_refused(refusal)


def test_nothing_of_a_zygotes_is_within_reach(attempts):
    host = attempts.host._replace(runtime=test_zygote_slots.InZygotes(attempts.host.runtime))
    assert attempt(host, test_zygote_slots.REACH)["lines"] == ["nothing"]


# --- the root tree, which is root's then ----------------------------------------------------------------------------


@pytest.mark.parametrize("link", test_hostile_rootfs.LEADING_OUT.values(), ids=test_hostile_rootfs.LEADING_OUT)
def test_a_link_in_the_root_tree_leads_nowhere(attempts, link):
    told = test_hostile_rootfs.led_out(attempts.host, link, link.taken_out)
    assert "isolation failed at the step" in told.get("error", ""), told


# Runs the program, which reads the terminal that it has not got, and tells as whom it does.
AS_WHOM = """
import subprocess
readable, writable = os.pipe()
child = subprocess.Popen(["/trap"], stdin=readable)
while True:
    lines = open(f"/proc/{child.pid}/status").read().splitlines()
    if lines[0].split()[1] == "trap":
        print(*next(line for line in lines if line.startswith("Uid:")).split()[1:])
        break
child.kill()
"""


def test_a_set_user_id_program_of_roots_is_run_as_the_job(attempts):
    def a_program_of_roots(path):
        shutil.copy("/bin/cat", path)
        path.chmod(0o6755)

    with test_hostile_rootfs.replaced(attempts.host, "trap", a_program_of_roots):
        assert attempt(attempts.host, AS_WHOM)["lines"] == ["1000 1000 1000 1000"]


OPEN_DEVICE = 'os.open("/trap", os.O_RDWR); print("escaped")'


def test_a_device_in_the_root_tree_is_none(attempts):
    def the_null_device(path):
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        path.chmod(0o666)
        try:
            path.read_bytes()
        except PermissionError:
            host_lacks("device nodes", f"the file system of {path} is mounted without devices")

    with test_hostile_rootfs.replaced(attempts.host, "trap", the_null_device):
        assert "escaped" not in attempt(attempts.host, OPEN_DEVICE)["lines"]
        told = attempt(attempts.host, OPEN_DEVICE, (without_attribute(MOUNT_ATTR_NODEV), test_descriptors.LANDLOCK))
        assert told["lines"] == ["escaped"]


def test_no_file_of_the_host_has_been_changed(attempts):
    with open(attempts.host.environment["SECRET_FILE"]) as file:
        assert file.read() == SECRET
