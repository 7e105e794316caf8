"""Run as a job: print, as one JSON document, all that can be seen and done from inside a container.

argv[1] is JSON: `calls` are [label, number, [arguments]] of system calls to try, `lost` paths of the host to look for,
`addresses` those to reach, `masked files` and `masked folders` names in /proc, `passed over` folders not to walk.
Nothing here asserts; test_inside.py does.
"""

import ctypes
import json
import os
import resource
import signal
import socket
import stat
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long
NAMESPACES = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")


def text(path):
    """The content of a file, or the name of the error that its reader gets."""
    try:
        with open(path, errors="surrogateescape") as file:
            return file.read()
    except OSError as error:
        return name_of(error)


def answer(call):
    """What the call returned, or the name of its error."""
    try:
        return call()
    except OSError as error:
        return name_of(error)


def name_of(error):
    import errno

    return errno.errorcode[error.errno]


def system_call(number, arguments):
    """The name of the error, or the number that the kernel answered."""
    words = [word.encode() if isinstance(word, str) else ctypes.c_long(word) for word in arguments]
    result = LIBC.syscall(ctypes.c_long(number), *words)
    return name_of(OSError(ctypes.get_errno(), "")) if result == -1 else result


def every_call(calls):
    """Each in a process of its own: one that is not refused may change what the next one finds."""
    answers = {}
    for name, number, arguments in calls:
        readable, writable = os.pipe()
        if os.fork() == 0:
            result = system_call(number, arguments)
            os.write(writable, json.dumps(result).encode())
            os._exit(0)
        os.close(writable)
        with open(readable) as file:
            answers[name] = json.loads(file.read())
        os.wait()
    return answers


def walk(passed_over):
    for folder, folders, files in os.walk("/"):
        folders[:] = [name for name in folders if os.path.join(folder, name) not in passed_over]
        yield folder, folders, files


def tree(passed_over):
    """Every path in sight with its type and device number."""
    found = {}
    for folder, folders, files in walk(passed_over):
        for name in (*folders, *files):
            status = os.lstat(os.path.join(folder, name))
            found[os.path.join(folder, name)] = [stat.S_IFMT(status.st_mode), status.st_rdev]
    return found


def writable(passed_over):
    """Every folder in which something can be made, and every plain file that opens for writing."""
    found = []
    for folder, _, files in walk(passed_over):
        try:
            os.mkdir(os.path.join(folder, "new"))
            os.rmdir(os.path.join(folder, "new"))
            found.append(folder)
        except OSError:
            pass
        for name in files:
            path = os.path.join(folder, name)
            if not stat.S_ISREG(os.lstat(path).st_mode):
                continue
            try:
                os.close(os.open(path, os.O_WRONLY | os.O_NOFOLLOW))
                found.append(path)
            except OSError:
                pass
    return found


def writable_in_proc():
    """Each file of /proc, but processes' own, that opens for writing."""
    found = []
    for folder, folders, files in os.walk("/proc"):
        if folder == "/proc":
            folders[:] = [name for name in folders if not name.isdigit() and name not in {"self", "thread-self"}]
        for name in files:
            path = os.path.join(folder, name)
            try:
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
                found.append(path)
            except OSError:
                pass
    return found


def interfaces():
    with open("/proc/net/dev") as file:
        return [line.split(":")[0].strip() for line in file.readlines()[2:]]


def echoed(family, address):
    """Whether a byte comes through a connection with oneself."""
    with socket.socket(family) as listener:
        listener.bind((address, 0))
        listener.listen()
        with socket.create_connection(listener.getsockname()[:2], timeout=5) as client:
            client.sendall(b"x")
            with listener.accept()[0] as server:
                return server.recv(1) == b"x"


def connected(address):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect((address, 9))
        return client.getsockname()[0]


def processes():
    return {pid: text(f"/proc/{pid}/cmdline") for pid in os.listdir("/proc") if pid.isdigit()}


def of_init():
    """What /proc tells of PID 1: of links where they lead, of files what is in them, of folders what they hold."""
    told = {name: text(f"/proc/1/{name}") for name in ("environ", "mem", "maps", "auxv", "syscall", "io", "stack")}
    told |= {name: answer(lambda name=name: os.readlink(f"/proc/1/{name}")) for name in ("exe", "root", "cwd")}
    told |= {name: answer(lambda name=name: os.listdir(f"/proc/1/{name}")) for name in ("fd", "fdinfo", "map_files")}
    return told | {"cmdline": text("/proc/1/cmdline")}


def main():
    asked = json.loads(sys.argv[1])
    descriptors = os.listdir("/proc/self/fd")  # first, before anything here has opened one; the last is the list's own
    ids = {"uid": os.getresuid(), "gid": os.getresgid(), "groups": os.getgroups()}
    facts = {
        "descriptors": descriptors,
        "ids": ids,
        "status": dict(line.split(":\t", 1) for line in text("/proc/self/status").splitlines() if ":\t" in line),
        "namespaces": {name: os.readlink(f"/proc/self/ns/{name}") for name in NAMESPACES},
        "id maps": [text("/proc/self/uid_map").split(), text("/proc/self/gid_map").split()],
        "setgroups": text("/proc/self/setgroups").strip(),
        "pids": [os.getpid(), os.getppid(), os.getsid(0), os.getpgid(0)],
        "processes": processes(),
        "init": of_init(),
        "environment": dict(os.environ),
        "working directory": os.getcwd(),
        "umask": os.umask(0o077),
        "hostname": socket.gethostname(),
        "domain": text("/proc/sys/kernel/domainname").strip(),
        "cgroup": text("/proc/self/cgroup").split(),
        "limits": {
            name.removeprefix("RLIMIT_").lower(): resource.getrlimit(getattr(resource, name))
            for name in dir(resource)
            if name.startswith("RLIMIT_")
        },
        "oom": text("/proc/self/oom_score_adj").strip(),
        "oom lowered": answer(lambda: os.write(os.open("/proc/self/oom_score_adj", os.O_WRONLY), b"-1000")),
        "mounts": [line.split(" ") for line in text("/proc/self/mountinfo").splitlines()],
        "tree": tree(asked["passed over"]),
        "masked files": {name: text(f"/proc/{name}") for name in asked["masked files"]},
        "masked folders": {
            name: answer(lambda name=name: os.listdir(f"/proc/{name}")) for name in asked["masked folders"]
        },
        "hidden": os.listdir("/.jhansi/workspaces"),
        "terminals": os.listdir("/dev/pts"),
        "lost": {path: text(path) for path in asked["lost"]},
        "writable": writable(asked["passed over"]),
        "writable in proc": writable_in_proc(),
        "interfaces": interfaces(),
        "loopback": [echoed(socket.AF_INET, "127.0.0.1"), echoed(socket.AF_INET6, "::1")],
        "outside": {address: answer(lambda address=address: connected(address)) for address in asked["addresses"]},
        "calls": every_call(asked["calls"]),
        "terminal": answer(lambda: os.open("/dev/tty", os.O_RDWR)),
        "signals": sorted(number for number in signal.valid_signals() if signal.getsignal(number) == signal.SIG_IGN),
    }
    print(json.dumps(facts))


main()
