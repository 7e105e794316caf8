"""Two sandboxes of the same user, at once: neither reaches the other, by memory, files, names, sockets or signals.

Outside they are one user, so nothing but namespaces and mounts stands between them; and they share what is mounted in
both. A file of the root tree is one file for all sandboxes of a language: who leases it, locks it or watches it does so
for all of them.
"""

import os

import pytest
from attempts import SCOPED, Attempts, Row, each, each_alone, surroundings
from removals import (
    IPC,
    LANDLOCK,
    NETWORK,
    PROCESSES,
    TREE_HELD,
    allowing,
    with_the_hosts,
    without_rule_of,
    without_umount_of,
    without_watchdog,
)

from jhansi_runtime.isolation import mounts

KEY = 0x6A680000 | os.getpid() & 0xFFFF
IPC_CREAT, IPC_RMID = 0o1000, 0
F_SETLEASE, F_NOTIFY = 1024, 1026

LIBRARY = """
LIBC.shmat.restype = ctypes.c_void_p
LIBC.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
"""
SEGMENT = f"""{LIBRARY}
segment = LIBC.shmget({KEY}, 4096, {IPC_CREAT} | 0o600)
ctypes.memmove(LIBC.shmat(segment, None, 0), SECRET.encode(), len(SECRET))
ready()
LIBC.shmctl(segment, {IPC_RMID}, None)
"""
READ_SEGMENT = f"""{LIBRARY}
address = LIBC.shmat(LIBC.shmget({KEY}, 4096, 0), None, 0)
print("escaped" if address != 2**64 - 1 and ctypes.string_at(address, len(SECRET)) == SECRET.encode() else "")
"""
SEMAPHORE = f"""
semaphore = LIBC.semget({KEY}, 1, {IPC_CREAT} | 0o600)
ready()
LIBC.semctl(semaphore, 0, {IPC_RMID}, None)
"""
QUEUE = f"""
queue = LIBC.msgget({KEY}, {IPC_CREAT} | 0o600)
LIBC.msgsnd(queue, struct.pack("l", 1) + SECRET.encode(), len(SECRET), 0)
ready()
LIBC.msgctl(queue, {IPC_RMID}, None)
"""
READ_QUEUE = f"""
buffer = ctypes.create_string_buffer(100)
LIBC.msgrcv(LIBC.msgget({KEY}, 0), buffer, 80, 0, 0o4000)
print("escaped" if SECRET.encode() in buffer.raw else "")
"""
POSIX_QUEUE = f"""
queue = call("mq_open", b"jhansi-test-{KEY}", os.O_CREAT | os.O_RDWR, 0o600, 0)
call("mq_timedsend", queue, SECRET.encode(), len(SECRET), 0, 0)
ready()
call("mq_unlink", b"jhansi-test-{KEY}")
"""
READ_POSIX_QUEUE = f"""
buffer = ctypes.create_string_buffer(8192)
call("mq_timedreceive", call("mq_open", b"jhansi-test-{KEY}", os.O_RDWR | os.O_NONBLOCK, 0, 0), buffer, 8192, 0, 0)
print("escaped" if buffer.value == SECRET.encode() else "")
"""
LISTENER = """
listener = socket.socket(socket.AF_UNIX)
listener.bind("\\0" + E["ABSTRACT"] + "-beside")
listener.listen()
ready()
"""
CONNECT = """
socket.socket(socket.AF_UNIX).connect("\\0" + E["ABSTRACT"] + "-beside")
print("escaped")
"""


def left_in(place):
    """A program that leaves the secret in a folder, and one that looks for it there."""
    path = f"{place}/left-by-a-job"
    left = f'open("{path}", "w").write(SECRET); ready(); os.unlink("{path}")'
    return left, f'print("escaped" if open("{path}").read() == SECRET else "")'


def placed(target):
    left, look = left_in(f"/{target}")
    # The watchdog would take all that is on the host's disk for the job's memory.
    return Row(
        f"/{target} is the container's own", (with_the_hosts(target, "SHARED"), without_watchdog()), look, beside=left
    )


# The neighbour's child has a name on its command line, by which the other can find it.
FIND = """
def neighbours():
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if b"named-beside" in open(f"/proc/{name}/cmdline", "rb").read() and int(name) != os.getpid():
                yield int(name)
        except OSError:
            pass
"""
SLEEPING = """
child = os.fork()
if child == 0:
    os.execvp("python3", ["python3", "-c", "import time; time.sleep(90)", "named-beside"])
ready()
os.kill(child, signal.SIGKILL)
"""

TABLE = [
    Row("memory is shared with nobody", (IPC,), READ_SEGMENT, beside=SEGMENT),
    Row("semaphores are shared with nobody", (IPC,), f"done(LIBC.semget({KEY}, 1, 0))", beside=SEMAPHORE),
    Row("messages are sent to nobody", (IPC,), READ_QUEUE, beside=QUEUE),
    Row("POSIX message queues are the container's own", (IPC,), READ_POSIX_QUEUE, also=(LANDLOCK,), beside=POSIX_QUEUE),
    Row(
        "what there is to share is not listed",
        (IPC,),
        f'print("escaped" if str({KEY}) in open("/proc/sysvipc/shm").read().split() else "")',
        beside=SEGMENT,
    ),
    placed("dev/shm"),
    placed("tmp"),
    placed("home/sandbox"),
    Row("abstract sockets are the container's own", (NETWORK,), CONNECT, also=(LANDLOCK,), beside=LISTENER),
    Row(
        "Landlock keeps abstract sockets apart", (LANDLOCK,), CONNECT, also=(NETWORK,), beside=LISTENER, needs=(SCOPED,)
    ),
    Row(
        "the neighbour's services are not connected to",
        (NETWORK,),
        'socket.create_connection(("127.0.0.1", int(E["PORT"]) ^ 1)); print("escaped")',
        beside='listener = socket.create_server(("127.0.0.1", int(E["PORT"]) ^ 1)); ready()',
    ),
    Row(
        "the neighbour's processes are not listed",
        (PROCESSES,),
        FIND + 'print("escaped" if list(neighbours()) else "")',
        beside=SLEEPING,
    ),
    Row(
        "no signal reaches the neighbour's processes",
        (PROCESSES,),
        FIND + 'os.kill(next(neighbours()), 0); print("escaped")',
        also=(LANDLOCK,),
        beside=SLEEPING,
    ),
    Row(
        "Landlock keeps signals from the neighbour's processes",
        (LANDLOCK,),
        FIND + 'os.kill(next(neighbours()), 0); print("escaped")',
        also=(PROCESSES,),
        beside=SLEEPING,
        needs=(SCOPED,),
    ),
    Row(
        "the neighbour's files are not read",
        (without_umount_of(b"/" + mounts.HIDDEN_WORKSPACES.encode()),),
        'PATH = "/.jhansi/workspaces/" + E["NEIGHBOUR"] + "/workspace/note"\n'
        'print("escaped" if open(PATH).read() == SECRET else "")',
        beside="ready()",
    ),
    Row(
        "the neighbour's files are not locked",
        (without_umount_of(b"/" + mounts.HIDDEN_WORKSPACES.encode()),),
        'PATH = "/.jhansi/workspaces/" + E["NEIGHBOUR"] + "/workspace/note"\n'
        'fcntl.flock(open(PATH), fcntl.LOCK_EX | fcntl.LOCK_NB); print("escaped")',
        beside="ready()",
    ),
    # The kernel makes whoever opens a leased file wait for its holder: 45 seconds by default, for each file.
    *(
        Row(
            f"no file of the root tree is leased, for others to wait at, with {name}",
            (without_rule_of("fcntl", number),),
            f"""
signal.signal(signal.SIGIO, signal.SIG_IGN)
file = os.open("/etc/hostname", os.O_RDONLY)
call("fcntl", file, {number}, {argument})
print("escaped" if call("fcntl", file, 1025, 0) == {argument} else "")  # F_GETLEASE
""",
        )
        for name, number, argument in (
            ("F_SETLEASE, F_WRLCK", F_SETLEASE, 1),
            ("F_SETLEASE, F_RDLCK", F_SETLEASE, 0),
            ("F_SETLEASE in the low half of 64 bits", 1 << 32 | F_SETLEASE, 1),
        )
    ),
    Row(
        "what others open in the root tree is not told by F_NOTIFY",
        (without_rule_of("fcntl", F_NOTIFY),),
        f"""
call("fcntl", os.open("/etc", os.O_RDONLY), {F_NOTIFY}, 1)  # DN_ACCESS
print("escaped")
""",
    ),
    Row(
        "what others open in the root tree is not told by inotify",
        (allowing("inotify_init1", "inotify_add_watch"),),
        """
watch = call("inotify_init1", os.O_NONBLOCK)
call("inotify_add_watch", watch, b"/usr/bin", 0x20)  # IN_OPEN
open("/workspace/watching", "w").close()
for _ in range(500):
    try:
        if b"env" in os.read(watch, 65536):
            print("escaped")
            break
    except BlockingIOError:
        time.sleep(0.02)
""",
        beside="""
import subprocess
open("/workspace/ready", "w").close()
while not os.path.exists("/workspace/end"):
    subprocess.run(["/usr/bin/env", "true"])
""",
    ),
    Row(
        "no job has the root tree to itself, which would keep the others from starting",
        (TREE_HELD,),
        'fcntl.flock(os.open("/", os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB); print("escaped")',
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
