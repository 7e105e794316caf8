"""What Landlock leaves a job: all that programs do in the places that are theirs, and nothing in the others."""

import json

import pytest

from jhansi_runtime.isolation.landlock import usable_abi

# Prints, for each thing that it tries by name, "done" or the error.
TRY_ALL = """
import errno, fcntl, json, os, pty, signal, socket, subprocess, sys, termios
told = {}
def tried(name, attempt):
    try:
        attempt()
        told[name] = "done"
    except OSError as error:
        told[name] = errno.errorcode[error.errno]
def written(path, how=os.O_WRONLY):
    os.write(os.open(path, how, 0o600), b"text")
def between_folders(place):
    os.makedirs(f"{place}/one/deep"); os.makedirs(f"{place}/other")
    written(f"{place}/one/deep/file", os.O_CREAT | os.O_WRONLY)
    os.rename(f"{place}/one/deep/file", f"{place}/other/file")
    os.link(f"{place}/other/file", f"{place}/one/link")
    os.rename(f"{place}/one", f"{place}/other/one")
    os.truncate(f"{place}/other/file", 1)
    os.symlink("/etc", f"{place}/symlink")
    os.mkfifo(f"{place}/fifo")
    os.unlink(f"{place}/fifo"); os.unlink(f"{place}/other/one/link"); os.rmdir(f"{place}/other/one/deep")
def unix_socket(place):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{place}/socket"); listener.listen()
    socket.socket(socket.AF_UNIX).connect(f"{place}/socket")
def abstract_socket():
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(b"\\0name"); listener.listen()
    code = "import socket; socket.socket(socket.AF_UNIX).connect(b'\\\\0name')"
    subprocess.run([sys.executable, "-c", code], check=True)
def signal_to_child():
    child = subprocess.Popen(["sleep", "60"])
    child.send_signal(signal.SIGTERM)
    assert child.wait() == -signal.SIGTERM
def signal_to_group():
    child = subprocess.Popen(["sh", "-c", "sleep 60 & wait"], start_new_session=True)
    os.killpg(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
def pseudo_terminal():
    master, slave = pty.openpty()
    os.write(os.open(os.ttyname(slave), os.O_RDWR | os.O_NOCTTY), b"text")
    termios.tcgetattr(slave)
def executed(place):
    path = f"{place}/program"
    with open("/bin/true", "rb") as source, open(path, "wb") as copy:
        copy.write(source.read())
    os.chmod(path, 0o755)
    subprocess.run([path], check=True)
for place in ("/workspace", "/tmp", "/home/sandbox", "/dev/shm"):
    tried(f"files of {place}", lambda: between_folders(place))
    tried(f"a socket in {place}", lambda: unix_socket(place))
    tried(f"a program in {place}", lambda: executed(place))
tried("an abstract socket", abstract_socket)
tried("a signal to a child", signal_to_child)
tried("a signal to a process group", signal_to_group)
tried("a pseudo-terminal", pseudo_terminal)
tried("/dev/null", lambda: written("/dev/null", os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
tried("/dev/full", lambda: written("/dev/full"))
tried("/dev/stderr", lambda: written("/dev/stderr"))
tried("a pipe by its name", lambda: written(f"/proc/self/fd/{os.pipe()[1]}"))
tried("memory by its name", lambda: written(f"/proc/self/fd/{os.memfd_create('memory')}", os.O_RDWR))
tried("reading", lambda: [open(path).read() for path in ("/etc/passwd", "/proc/self/status", "/proc/cpuinfo")])
tried("listing", lambda: [os.listdir(path) for path in ("/", "/usr/bin", "/proc", "/dev")])
tried("/proc/self/comm", lambda: written("/proc/self/comm"))
tried("/proc/self/mem", lambda: os.open("/proc/self/mem", os.O_RDWR))
tried("/proc/self/oom_score_adj", lambda: written("/proc/self/oom_score_adj"))
tried("/etc/passwd", lambda: written("/etc/passwd"))
tried("a file of the root", lambda: written("/file", os.O_CREAT | os.O_WRONLY))
tried("a file of /dev", lambda: written("/dev/file", os.O_CREAT | os.O_WRONLY))
print(json.dumps(told))
"""
PLACES = ("/workspace", "/tmp", "/home/sandbox", "/dev/shm")
ALLOWED = (
    *(f"{what} {place}" for place in PLACES for what in ("files of", "a socket in", "a program in")),
    *("an abstract socket", "a signal to a child", "a signal to a process group", "a pseudo-terminal", "/dev/null"),
    *("/dev/stderr", "a pipe by its name", "memory by its name", "reading", "listing"),
)
REFUSED = dict.fromkeys(("/proc/self/comm", "/proc/self/mem", "/proc/self/oom_score_adj"), "EACCES")
REFUSED |= dict.fromkeys(("/etc/passwd", "a file of the root", "a file of /dev"), "EROFS")


@pytest.mark.parametrize("rootfs", ["recipe", "host"])
def test_a_job_does_as_it_likes_in_its_own_places_and_only_reads_in_the_others(jhansi, require, tmp_path, rootfs):
    require("landlock", "what is asked here is what Landlock answers")
    (tmp_path / "main.py").write_text(TRY_ALL)
    answer = jhansi("run", "--rootfs", rootfs, "--json", tmp_path / "main.py")
    result = json.loads(answer.stdout)
    assert (result["exit_code"], result["landlock"]) == (0, usable_abi()), result
    told = json.loads(result["stdout"])
    assert {name: told.pop(name) for name in ALLOWED} == dict.fromkeys(ALLOWED, "done")
    assert told == REFUSED | {"/dev/full": "ENOSPC"}


def test_a_program_may_restrict_itself_further(jhansi, require, tmp_path):
    require("landlock", "what is asked here is what Landlock answers")
    (tmp_path / "main.py").write_text(
        "import ctypes, struct\n"
        "call = ctypes.CDLL(None, use_errno=True).syscall\n"
        "ruleset = call(444, struct.pack('Q', 2), 8, 0)\n"  # LANDLOCK_ACCESS_FS_WRITE_FILE
        "assert call(446, ruleset, 0) == 0\n"
        "open('/workspace/file', 'w')\n"
    )
    answer = jhansi("run", "--rootfs", "host", tmp_path / "main.py")
    assert answer.stderr.endswith("PermissionError: [Errno 13] Permission denied: '/workspace/file'\n")
