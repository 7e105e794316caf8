"""Programs that people run still run, within the confinement of the `default` profile and under the default limits.

Here in the root tree of Python, in test_debian_programs.py in one with more of Debian. Every file that is run says of
itself, after `#>` or `//>`, what it prints, line by line.
"""

import os

import pytest
from conftest import host_lacks
from programs import Command, Row, python, run, shell

from jhansi_runtime import Paths, Runtime

# --- servers, processes, threads --------------------------------------------------------------------------

HTTP_SERVER = r"""
import subprocess, sys, urllib.request
argv = [sys.executable, "-u", "-m", "http.server", "8000", "--bind", "127.0.0.1"]
with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
    print(server.stdout.readline().partition(" (")[0])  #> Serving HTTP on 127.0.0.1 port 8000
    with urllib.request.urlopen("http://localhost:8000/large") as answer:
        print(answer.status, answer.read() == open("large", "rb").read())  #> 200 True
    server.terminate()
print(server.returncode)  #> -15
"""
# What the start methods have in common; their ways to the same end have not much.
MULTIPROCESSING = r"""
import multiprocessing as mp
from multiprocessing.shared_memory import SharedMemory

def square(number):
    return number * number

def work(counter, lock, queue, pipe, name):
    for _ in range(200):
        with lock:
            counter.value += 1
    memory = SharedMemory(name)
    memory.buf[:4] = b"seen"
    memory.close()
    queue.put(pipe.recv())

if __name__ == "__main__":
    mp.set_start_method(METHOD)
    with mp.Pool(3) as pool:
        print(pool.map(square, range(6)), pool.apply_async(square, (9,)).get())  #> [0, 1, 4, 9, 16, 25] 81
    counter, lock, queue, (ours, theirs) = mp.Value("i", 0, lock=False), mp.Lock(), mp.Queue(), mp.Pipe()
    memory = SharedMemory(create=True, size=4096)
    children = [mp.Process(target=work, args=(counter, lock, queue, theirs, memory.name)) for _ in range(2)]
    for child in children:
        child.start()
    ours.send("one")
    ours.send("two")
    print(sorted(queue.get() for _ in children))  #> ['one', 'two']
    for child in children:
        child.join()
    print(counter.value, bytes(memory.buf[:4]), [child.exitcode for child in children])  #> 400 b'seen' [0, 0]
    memory.close()
    memory.unlink()
    with mp.Manager() as manager:
        shared = manager.dict(a=1)
        shared["b"] = 2
        print(dict(shared))  #> {'a': 1, 'b': 2}
"""
EXECUTORS = r"""
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

def work(number):
    return number, os.getpid()

if __name__ == "__main__":
    for kind in (ProcessPoolExecutor, ThreadPoolExecutor):
        with kind(4) as executor:
            answers = list(executor.map(work, range(40)))
        print([number for number, _ in answers] == list(range(40)), os.getpid() in {pid for _, pid in answers})
    #> True False
    #> True True
"""
ASYNCIO = r"""
import asyncio
from asyncio.subprocess import PIPE

async def upper(text):
    child = await asyncio.create_subprocess_exec("tr", "a-z", "A-Z", stdin=PIPE, stdout=PIPE)
    out, _ = await child.communicate(text.encode())
    return out.decode(), child.returncode

async def serve(reader, writer):
    writer.write((await reader.readline())[::-1])
    writer.close()

async def ask(number):
    reader, writer = await asyncio.open_connection("localhost", 8000)
    writer.write(b"%d\n" % number)
    answer = await reader.read()
    writer.close()
    return int(answer[::-1])

async def main():
    print(await asyncio.gather(*(upper(text) for text in ("one", "two"))))  #> [('ONE', 0), ('TWO', 0)]
    child = await asyncio.create_subprocess_shell("echo to stderr >&2; exit 3", stderr=PIPE)
    print(await child.stderr.read(), await child.wait())  #> b'to stderr\n' 3
    child = await asyncio.create_subprocess_exec("sleep", "600")
    child.kill()
    print(await child.wait())  #> -9
    async with await asyncio.start_server(serve, "localhost", 8000):
        print(await asyncio.gather(*map(ask, range(100))) == list(range(100)))  #> True
    print(await asyncio.to_thread(sum, range(10)))  #> 45

asyncio.set_child_watcher(asyncio.WATCHER())
asyncio.run(main())
"""
THREADS = r"""
import ctypes, os, threading
LIBC = ctypes.CDLL(None)
threading.stack_size(256 << 10)
barrier, done = threading.Barrier(51), []

def work(number):
    os.sched_yield()
    LIBC.prctl(15, b"worker-%d" % number, 0, 0, 0)  # PR_SET_NAME
    barrier.wait()
    barrier.wait()
    done.append(number)

threads = [threading.Thread(target=work, args=(number,)) for number in range(50)]
for thread in threads:
    thread.start()
barrier.wait()
tasks = os.listdir("/proc/self/task")
names = {open(f"/proc/self/task/{task}/comm").read().strip() for task in tasks}
print(len(tasks), sorted(names)[:3], len(names))  #> 51 ['python3', 'worker-0', 'worker-1'] 51
barrier.wait()
for thread in threads:
    thread.join()
print(sorted(done) == list(range(50)))  #> True
"""
SUBPROCESS = r"""
import os, resource, signal, subprocess
opened = os.open("main.py", os.O_RDONLY)
readable, writable = os.pipe()

def limit():
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    os.nice(5)

def run(line, **options):
    return subprocess.run(["sh", "-c", line], capture_output=True, text=True, **options).stdout.split()

print(run("ulimit -n; nice", preexec_fn=limit) == ["64", str(os.nice(0) + 5)])  #> True
print(run("ls /proc/self/fd", close_fds=True))  #> ['0', '1', '2', '3']
run(f"echo passed >&{writable}", pass_fds=[writable])
print(os.read(readable, 100))  #> b'passed\n'
print(run("pwd; umask; echo $A", cwd="/tmp", umask=0o77, env={"A": "b"}))  #> ['/tmp', '0077', 'b']
print(run("cut -d' ' -f6 /proc/self/stat", start_new_session=True) != [str(os.getsid(0))])  #> True
child = subprocess.Popen(["sleep", "600"], process_group=0)
os.killpg(child.pid, signal.SIGTERM)
print(child.wait())  #> -15
try:
    subprocess.run(["sleep", "600"], timeout=0.1)
except subprocess.TimeoutExpired:
    print("timed out")  #> timed out
print(os.popen("echo from popen").read().strip(), os.system("exit 3") >> 8)  #> from popen 3
pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 4"], os.environ)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))  #> 4
"""
SIGNALS = r"""
import ctypes, os, select, signal, struct, threading, time
LIBC = ctypes.CDLL(None)
seen = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM, signal.SIGCHLD):
    signal.signal(number, lambda number, _: seen.append(signal.Signals(number).name))
os.kill(os.getpid(), signal.SIGTERM)
signal.raise_signal(signal.SIGUSR1)
signal.setitimer(signal.ITIMER_REAL, 0.01)
while "SIGALRM" not in seen:
    time.sleep(0.01)
child = os.posix_spawn("/bin/sleep", ["sleep", "600"], {})
handle = os.pidfd_open(child)
print(select.select([handle], [], [], 0)[0])  #> []
signal.pidfd_send_signal(handle, signal.SIGTERM)
print(os.waitid(os.P_PIDFD, handle, os.WEXITED).si_status)  #> 15
print(select.select([handle], [], [], 0)[0] == [handle])  #> True
print(seen)  #> ['SIGTERM', 'SIGUSR1', 'SIGALRM', 'SIGCHLD']

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, signal.SIGRTMIN])
signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)
print(signal.sigpending(), signal.sigwait([signal.SIGUSR2]).name)  #> {<Signals.SIGUSR2: 12>} SIGUSR2
LIBC.sigqueue(os.getpid(), int(signal.SIGRTMIN), ctypes.c_void_p(7))
print(signal.sigtimedwait([signal.SIGRTMIN], 10).si_signo == signal.SIGRTMIN)  #> True
print(signal.sigtimedwait([signal.SIGUSR2], 0.01))  #> None

timer = LIBC.timerfd_create(time.CLOCK_MONOTONIC, 0)
LIBC.timerfd_settime(timer, 0, struct.pack("4q", 0, 1_000_000, 0, 1_000_000), None)
time.sleep(0.02)
print(struct.unpack("Q", os.read(timer, 8))[0] > 1)  #> True
made = ctypes.c_void_p()
print(LIBC.timer_create(time.CLOCK_MONOTONIC, struct.pack("qii48x", 0, signal.SIGUSR1, 0), ctypes.byref(made)))  #> 0
LIBC.timer_settime(made, 0, struct.pack("4q", 0, 0, 0, 1_000_000), None)
while seen.count("SIGUSR1") < 2:
    time.sleep(0.01)
counter = os.eventfd(3)
os.eventfd_write(counter, 4)
print(os.eventfd_read(counter))  #> 7
"""
TERMINAL = r"""
import os, pty, subprocess
child, master = pty.fork()
if child == 0:
    os.execvp("sh", ["sh", "-c", "tty; stty rows 40 cols 100; stty size; read line; echo got $line; exit 5"])
os.write(master, b"typed\n")
said = b""
try:
    while True:
        said += os.read(master, 1000)
except OSError:  # EIO: nobody has it open any more
    lines = said.decode().splitlines()
print([line for line in ("/dev/pts/0", "40 100", "typed", "got typed") if line not in lines])  #> []
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))  #> 5
subprocess.run(["script", "-qec", "tty", "typescript"], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
print("/dev/pts/" in open("typescript").read())  #> True
"""

# --- sockets, pipes, memory -------------------------------------------------------------------------------

UNIX_SOCKETS = r"""
import os, socket, socketserver, struct, threading

class Upper(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(self.rfile.readline().upper())

for address in ("/workspace/socket", "/tmp/socket", "\0abstract"):
    with socketserver.ThreadingUnixStreamServer(address, Upper) as server:
        threading.Thread(target=server.serve_forever).start()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(address)
            client.sendall(b"hello\n")
            credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            print(client.recv(100), struct.unpack("3i", credentials) == (os.getpid(), 1000, 1000))
        server.shutdown()
#> b'HELLO\n' True
#> b'HELLO\n' True
#> b'HELLO\n' True
one, two = socket.socketpair()
with open("main.py") as file:
    socket.send_fds(one, [b"a file"], [file.fileno()])
said, [passed], *_ = socket.recv_fds(two, 100, 5)
print(said, os.read(passed, 7))  #> b'a file' b'\nimport'
"""
NETWORK = r"""
import socket, threading
for name in ("localhost", "sandbox", "127.1.2.3"):
    with socket.create_server((name, 0)) as server:
        threading.Thread(target=lambda: server.accept()[0].sendall(b"x" * 1_000_000)).start()
        with socket.create_connection(server.getsockname()) as client:
            print(name, sum(len(chunk) for chunk in iter(lambda: client.recv(1 << 16), b"")))
#> localhost 1000000
#> sandbox 1000000
#> 127.1.2.3 1000000
print(socket.if_nameindex(), socket.gethostbyname(socket.gethostname()))  #> [(1, 'lo')] 127.0.1.1
print(sorted({info[4][0] for info in socket.getaddrinfo("localhost", 80)}))  #> ['127.0.0.1', '::1']
try:
    socket.create_connection(("192.0.2.1", 80))
except OSError as error:
    print(error.strerror)  #> Network is unreachable
"""
NETWORK_6 = r"""
import socket, threading
with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
    threading.Thread(target=lambda: server.accept()[0].sendall(b"x" * 1_000_000)).start()
    with socket.create_connection(server.getsockname()[:2]) as client:
        print(sum(len(chunk) for chunk in iter(lambda: client.recv(1 << 16), b"")))  #> 1000000
with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as one, socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as two:
    one.bind(("::1", 0))
    two.sendto(b"datagram", one.getsockname())
    print(one.recv(100))  #> b'datagram'
"""
PIPES = r"""
import os, selectors
os.mkfifo("fifo")
if os.fork() == 0:
    with open("fifo", "w") as file:
        file.write("through a FIFO")
    os._exit(0)
print(open("fifo").read())  #> through a FIFO
os.wait()
readable, writable = os.pipe2(os.O_NONBLOCK)
for waiting in (selectors.SelectSelector, selectors.PollSelector, selectors.EpollSelector):
    with waiting() as selector:
        selector.register(readable, selectors.EVENT_READ)
        before = selector.select(0)
        os.write(writable, b"x")
        print(len(before), len(selector.select()), os.read(readable, 9))
#> 0 1 b'x'
#> 0 1 b'x'
#> 0 1 b'x'
with open("main.py", "rb") as source, open("copy", "wb") as target:
    print(os.splice(source.fileno(), writable, 10), os.splice(readable, target.fileno(), 10))  #> 10 10
    print(os.sendfile(target.fileno(), source.fileno(), 10, 10))  #> 10
    source.seek(20)
    print(os.copy_file_range(source.fileno(), target.fileno(), 10))  #> 10
print(open("copy").read() == open("main.py").read(30))  #> True
"""
SHARED_MEMORY = r"""
import mmap, os
for place in ("/workspace/shared", "/dev/shm/shared"):
    with open(place, "wb") as file:
        file.truncate(8192)
    with open(place, "r+b") as file:
        memory = mmap.mmap(file.fileno(), 8192)
    if os.fork() == 0:
        memory[4096:4101] = b"child"
        memory.flush()
        os._exit(0)
    os.wait()
    print(memory[4096:4101], open(place, "rb").read()[4096:4101])
#> b'child' b'child'
#> b'child' b'child'
handle = os.memfd_create("memory")
os.truncate(handle, 4096)
memory = mmap.mmap(handle, 4096)
memory.resize(8192)
memory[5000:5004] = b"grew"
print(os.pread(handle, 4, 5000))  #> b'grew'
"""
# As PostgreSQL uses them. The standard library has no module for these.
SYSTEM_V = r"""
import ctypes, os
LIBC = ctypes.CDLL(None)
LIBC.shmat.restype = ctypes.c_void_p
shared = LIBC.shmget(1234, 4096, 0o1600)  # IPC_CREAT
address = LIBC.shmat(shared, None, 0)
if os.fork() == 0:
    ctypes.memmove(address, b"child", 5)
    os._exit(0)
os.wait()
print(ctypes.string_at(address, 5))  #> b'child'
semaphores = LIBC.semget(1234, 1, 0o1600)
if os.fork() == 0:
    os._exit(LIBC.semop(semaphores, (ctypes.c_short * 3)(0, 1, 0), 1))
print(LIBC.semop(semaphores, (ctypes.c_short * 3)(0, -1, 0), 1), os.wait()[1])  #> 0 0
queue, received = LIBC.msgget(1234, 0o1600), (ctypes.c_long * 2)()
LIBC.msgsnd(queue, (ctypes.c_long * 2)(1, 42), 8, 0)
print(LIBC.msgrcv(queue, received, 8, 0, 0), *received)  #> 8 1 42
queue = LIBC.mq_open(b"/queue", os.O_RDWR | os.O_CREAT, 0o600, None)
text = ctypes.create_string_buffer(8192)
print(LIBC.mq_send(queue, b"posix", 5, 0), LIBC.mq_receive(queue, text, 8192, None), text.value)  #> 0 5 b'posix'
print(LIBC.mq_unlink(b"/queue"))  #> 0
"""
CALLBACK = r"""
import ctypes
compare = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int))
numbers = (ctypes.c_int * 5)(3, 1, 2, 5, 4)
ctypes.CDLL(None).qsort(numbers, 5, 4, compare(lambda one, two: one[0] - two[0]))
print(list(numbers))  #> [1, 2, 3, 4, 5]
"""

# --- files ------------------------------------------------------------------------------------------------

FOLDERS = r"""
import ctypes, errno, os, shutil
os.makedirs("a/deep/er")
os.mkdir("b")
for name in ("a/one", "a/deep/two", "a/deep/er/three", "top"):
    open(name, "w").write(name)

os.rename("a/one", "b/one")
os.rename("top", "a/deep/top")
os.replace("a/deep/top", "b/one")
os.rename("a/deep", "b/moved")
print(open("b/one").read(), open("b/moved/er/three").read(), os.listdir("a"))  #> top a/deep/er/three []
os.link("b/one", "a/linked")
os.link("b/moved/two", "two")
print(os.stat("a/linked").st_nlink, os.path.samefile("two", "b/moved/two"))  #> 2 True
os.mkdir("c")
print(ctypes.CDLL(None).renameat2(-100, b"b/moved/er", -100, b"c", 2), os.listdir("c"))  #> 0 ['three']
os.symlink("../b/one", "a/link")
os.symlink("nowhere", "a/dangling")
os.symlink("/workspace/b", "folder")
print(open("a/link").read(), os.readlink("a/dangling"), os.path.realpath("folder/one"))  #> top nowhere /workspace/b/one

for place in ("/tmp", "/home/sandbox", "/dev/shm"):
    os.makedirs(f"{place}/x/y")
    open(f"{place}/x/file", "w").write(place)
    os.rename(f"{place}/x/file", f"{place}/x/y/file")
    os.link(f"{place}/x/y/file", f"{place}/file")
    try:
        os.rename(f"{place}/file", "file")
    except OSError as error:  # another file system
        print(errno.errorcode[error.errno], shutil.move(f"{place}/x", "b/"), open("b/x/y/file").read())
    shutil.rmtree("b/x")
#> EXDEV b/x /tmp
#> EXDEV b/x /home/sandbox
#> EXDEV b/x /dev/shm
shutil.rmtree("b")
print(sorted(os.listdir()))  #> ['a', 'c', 'folder', 'main.py', 'two']
"""
LOCKS = r"""
import fcntl, os

def other(lock, *arguments):
    child = os.fork()
    if child == 0:
        try:
            lock(open("locked", "r+"), fcntl.LOCK_EX | fcntl.LOCK_NB, *arguments)
        except BlockingIOError:
            os._exit(11)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

file = open("locked", "w+")
for lock in (fcntl.flock, fcntl.lockf):
    lock(file, fcntl.LOCK_EX)
    refused = other(lock)
    lock(file, fcntl.LOCK_UN)
    print(lock.__name__, refused, other(lock))
#> flock 11 0
#> lockf 11 0
fcntl.lockf(file, fcntl.LOCK_EX, 10, 0)
print(other(fcntl.lockf, 10, 0), other(fcntl.lockf, 10, 10))  #> 11 0
"""
FOLLOWED = r"""
import ctypes, os, subprocess
LIBC = ctypes.CDLL(None, use_errno=True)
print(LIBC.inotify_init1(0), os.strerror(ctypes.get_errno()))  #> -1 Function not implemented
with open("log", "w") as log:
    log.write("one\n")
tail = subprocess.Popen(["tail", "-n", "+1", "-f", "log"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
print(tail.stdout.readline(), end="")  #> one
with open("log", "a") as log:
    log.write("two\n")
print(tail.stdout.readline(), end="")  #> two
tail.kill()
"""
SQLITE = r"""
import os, sqlite3
one, two = (sqlite3.connect("notes.db", timeout=0, isolation_level=None) for _ in range(2))
print(one.execute("PRAGMA journal_mode = WAL").fetchone())  #> ('wal',)
one.execute("CREATE TABLE notes (text)")
one.execute("BEGIN IMMEDIATE")
one.executemany("INSERT INTO notes VALUES (?)", ((f"note {number}",) for number in range(1000)))
print(two.execute("SELECT count(*) FROM notes").fetchone())  #> (0,)
try:
    two.execute("BEGIN IMMEDIATE")
except sqlite3.OperationalError as error:
    print(error)  #> database is locked
one.execute("COMMIT")
print(two.execute("SELECT count(*) FROM notes").fetchone())  #> (1000,)
print(sorted(os.listdir())[2:], flush=True)  #> ['notes.db', 'notes.db-shm', 'notes.db-wal']
os._exit(0)  # what is in the log is not in the database yet
"""
SQLITE_AGAIN = r"""
import sqlite3
with sqlite3.connect("notes.db") as connection:
    print(connection.execute("SELECT count(*), max(rowid) FROM notes").fetchone())  #> (1000, 1000)
    print(connection.execute("PRAGMA integrity_check").fetchone())  #> ('ok',)
    print(connection.execute("PRAGMA journal_mode").fetchone())  #> ('wal',)
"""
SCRATCH = r"""
import os, stat, subprocess, tempfile
for place in ("/tmp", "/home/sandbox", "/dev/shm", "/workspace"):
    with tempfile.NamedTemporaryFile("w", dir=place, delete=False) as file:
        file.write("#!/bin/sh\necho run in $(dirname $0)\n")
    os.chmod(file.name, 0o700)
    print(subprocess.run([file.name], capture_output=True, text=True).stdout, end="")
#> run in /tmp
#> run in /home/sandbox
#> run in /dev/shm
#> run in /workspace
with tempfile.TemporaryFile() as unnamed, tempfile.TemporaryDirectory() as folder:
    os.posix_fallocate(unnamed.fileno(), 0, 1 << 20)
    status = os.fstat(unnamed.fileno())
    print(status.st_nlink, status.st_size, stat.filemode(os.stat(folder).st_mode))  #> 0 1048576 drwx------
"""
# There are no other owners: where a call names one, the kernel has no word for it.
OWNERS = r"""
import errno, getpass, os, pwd, subprocess
print(getpass.getuser(), pwd.getpwuid(os.getuid()).pw_dir, os.stat("main.py").st_uid)  #> sandbox /home/sandbox 1000
os.chown("main.py", os.getuid(), os.getgid())
os.chmod("main.py", 0o600)
os.setuid(os.getuid())

def refused(call, *arguments):
    try:
        return call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]

for other in (0, 1, 1001, 65534):
    told = [refused(os.chown, "main.py", other, -1), refused(os.chown, "main.py", -1, other)]
    print(*told, refused(os.setuid, other), refused(os.setgid, other), refused(os.setgroups, [other]))
#> EINVAL EINVAL EINVAL EINVAL EPERM
#> EINVAL EINVAL EINVAL EINVAL EPERM
#> EINVAL EINVAL EINVAL EINVAL EPERM
#> EINVAL EINVAL EINVAL EINVAL EPERM
for line in ("chown root main.py", "su -c true", "unshare --user true"):
    print(subprocess.run(line.split(), capture_output=True, stdin=subprocess.DEVNULL).returncode)
#> 1
#> 1
#> 1
"""
PACKAGE = {
    "tool/__init__.py": "",
    "tool/__main__.py": "from tool.part import main\nmain()\n",
    "tool/part.py": "import sys\ndef main():\n    print(*sys.argv[1:], sys.prefix)\n",
}
COMPILED = "__init__.cpython-311.pyc\n__main__.cpython-311.pyc\npart.cpython-311.pyc\n"

# --- shell ------------------------------------------------------------------------------------------------

PIPELINES = r"""
seq 1000 | sed 's/$/ line/' | gzip | gunzip | awk '{ sum += $1 } END { print sum, NR }'  #> 500500 1000
mkdir -p tree/a tree/b && echo one >tree/a/x.txt && echo two >tree/b/y.txt && ln -s a/x.txt tree/link
tar -czf tree.tar.gz tree && tar -xzf tree.tar.gz --one-top-level=copy && diff -r tree copy/tree
tar -tzf tree.tar.gz | wc -l  #> 6
find copy -name '*.txt' -print0 | xargs -0 -n1 -P4 cat | sort -r | paste -sd,  #> two,one
find copy -type f -exec perl -pi -e 's/o/0/g' {} + && cat copy/tree/?/*.txt | paste -sd,  #> 0ne,tw0
yes | head -100000 | uniq -c | tr -d ' '  #> 100000y
timeout 0.1 sleep 600 || echo $?  #> 124
(sleep 600 & echo $! >pid; wait) & until [ -s pid ]; do sleep 0.01; done; kill $(cat pid); wait; echo waited  #> waited
trap 'echo caught' USR1; kill -USR1 $$  #> caught
nohup setsid -w nice -n 3 echo kinder  #> kinder
dd if=/dev/zero of=big bs=64k count=16 status=none && split -b 512k big part. && cat part.aa part.ab | cmp - big
mktemp -d >/dev/null && cp -a tree tree2 && mv tree2 /tmp/ && mv /tmp/tree2 moved && rm -r moved
touch -d 2020-01-01 big && stat -c '%a %u %s %y' big | cut -c1-26  #> 644 1000 1048576 2020-01-0
"""
ABOUT = r"""
nproc  #> 1
getconf _NPROCESSORS_ONLN  #> 1
grep -c ^processor /proc/cpuinfo  #> 1
locale charmap  #> UTF-8
printf 'b\nÄ\na\nZ\n' | sort | paste -sd' '  #> Z a b Ä
echo "$(id -un) $(hostname) $HOME $PWD"  #> sandbox sandbox /home/sandbox /workspace
head -c 3 /dev/urandom | wc -c  #> 3
(: >/dev/tty) 2>/dev/null || echo no terminal  #> no terminal
"""

IN_PYTHON = [
    python("a web server", HTTP_SERVER, large="x" * 100_000),
    *(
        python(f"multiprocessing by {method}", MULTIPROCESSING.replace("METHOD", repr(method)))
        for method in ("fork", "spawn", "forkserver")
    ),
    python("executors", EXECUTORS),
    *(
        python(f"asyncio with {watcher}", ASYNCIO.replace("WATCHER", watcher))
        for watcher in ("ThreadedChildWatcher", "PidfdChildWatcher")
    ),
    python("50 threads with names", THREADS),
    python("subprocesses", SUBPROCESS),
    python("signals and timers", SIGNALS),
    python("terminals", TERMINAL),
    python("Unix sockets", UNIX_SOCKETS),
    python("the loopback, and nothing else", NETWORK),
    python("FIFOs, pipes, copies by the kernel", PIPES),
    python("shared memory", SHARED_MEMORY),
    python("System V shared memory, semaphores, messages", SYSTEM_V),
    python("a callback from C", CALLBACK),
    python("renames and links across folders", FOLDERS),
    python("file locks", LOCKS),
    python("a file is followed, without inotify", FOLLOWED),
    Row(
        "SQLite with a write-ahead log",
        {"main.py": SQLITE, "again.py": SQLITE_AGAIN},
        ("main.py", "again.py", "again.py"),
    ),
    python("temporary files, and programs in them", SCRATCH),
    python("other owners", OWNERS),
    Row(
        "a package, as a module, zipped, and in an environment",
        PACKAGE,
        (
            Command("python3 -m tool", "/usr\n"),
            Command("ls tool/__pycache__", COMPILED),
            Command("python3 -m zipapp . -o /tmp/tool.pyz -m tool.part:main"),
            Command("python3 -m venv --without-pip env"),
            Command("env/bin/python -m tool a b", "a b /workspace/env\n"),
        ),
    ),
    shell("pipelines", PIPELINES),
    shell("what it is told of the machine", ABOUT),
]

NAMING_ANOTHER = r"""
import ctypes, os, threading
LIBC = ctypes.CDLL(None)
LIBC.pthread_setname_np.argtypes = [ctypes.c_ulong, ctypes.c_char_p]
end = threading.Event()
thread = threading.Thread(target=end.wait)
thread.start()
print(os.strerror(LIBC.pthread_setname_np(thread.ident, b"another")))  #> Permission denied
end.set()
"""


# --- the tests --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_python(runtime_environment):
    with Runtime(Paths.from_environment(runtime_environment)) as runtime:
        yield runtime


@pytest.mark.parametrize("row", IN_PYTHON, ids=lambda row: row.what)
def test_a_program_runs_as_it_does_anywhere(row, in_python):
    run(row, in_python)


def test_a_program_has_ipv6_on_the_loopback(in_python):
    if not os.path.exists("/proc/net/if_inet6"):
        host_lacks("ipv6", "a container's network is made of what the kernel has")
    run(python("IPv6", NETWORK_6), in_python)


def test_what_landlock_takes_from_programs_is_an_error_that_they_are_told(in_python, require):
    require("landlock", "without it this succeeds")
    run(python("names another thread than its own", NAMING_ANOTHER), in_python)
