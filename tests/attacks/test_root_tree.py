"""The root tree: shared by all sandboxes of a language, so nobody may write to it, by whatever way a file is reached.

CVE-2022-0847 (Dirty Pipe) and CVE-2016-5195 (Dirty COW): a file that can only be read was written, by way of the page
cache; the kernel is what is trusted there, and it is tried. CVE-2015-3629, CVE-2018-15664, CVE-2021-30465: links that
led writers elsewhere.
"""

import pytest
from attempts import LANDLOCKED, Attempts, Refusal, Row, each, each_alone, each_refusal, surroundings
from removals import LANDLOCK, READ_ONLY

WRITABLE = (READ_ONLY,)
# Each leaves the file as it was: the next attack is to find it so.
WRITES = {
    "opened": 'open("/etc/hostname", "r+").close()',
    "opened by the root of the process": 'open("/proc/self/root/etc/hostname", "r+").close()',
    "opened by the root of a thread": 'open("/proc/thread-self/root/etc/hostname", "r+").close()',
    "opened once more by a descriptor": """
os.open(f"/proc/self/fd/{os.open('/etc/hostname', os.O_RDONLY)}", os.O_RDWR)
""",
    "opened once more by a descriptor of its path": """
os.open(f"/proc/self/fd/{os.open('/etc/hostname', os.O_PATH)}", os.O_RDWR)
""",
    "opened by a descriptor of the root": 'os.open("etc/hostname", os.O_RDWR, dir_fd=os.open("/", os.O_RDONLY))',
    "opened by a link of the workspace": """
if not os.path.islink("/workspace/to-hostname"):
    os.symlink("/etc/hostname", "/workspace/to-hostname")
open("/workspace/to-hostname", "r+").close()
""",
    "cut": 'os.truncate("/etc/hostname", os.stat("/etc/hostname").st_size)',
    "mapped": """
with open("/etc/hostname", "r+") as file:
    mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE).close()
""",
    "replaced": 'os.rename("/etc/hostname", "/etc/moved"); os.rename("/etc/moved", "/etc/hostname")',
    "linked": 'os.link("/etc/hostname", "/etc/linked"); os.unlink("/etc/linked")',
}
# Landlock knows no right to do these.
CHANGES = {
    "its mode": 'os.chmod("/etc/hostname", 0o644)',
    "its times": 'os.utime("/etc/hostname")',
    "its owner": 'os.chown("/etc/hostname", 1000, 1000)',
    "its attributes": 'os.setxattr("/etc/hostname", "user.owned", b""); os.removexattr("/etc/hostname", "user.owned")',
    "its flags": """
file = os.open("/etc/hostname", os.O_RDONLY)
flags = bytearray(8)
fcntl.ioctl(file, 0x80086601, flags)  # FS_IOC_GETFLAGS
fcntl.ioctl(file, 0x40086602, flags)  # FS_IOC_SETFLAGS
""",
}
MAKES = {
    "a file": 'open("/etc/owned", "w").close(); os.unlink("/etc/owned")',
    "a folder": 'os.mkdir("/etc/owned"); os.rmdir("/etc/owned")',
    "a link": 'os.symlink("x", "/etc/owned"); os.unlink("/etc/owned")',
    "a FIFO": 'os.mkfifo("/etc/owned"); os.unlink("/etc/owned")',
    "a socket": 'socket.socket(socket.AF_UNIX).bind("/etc/owned"); os.unlink("/etc/owned")',
    "a file without a name": 'os.close(os.open("/etc", os.O_TMPFILE | os.O_RDWR))',
    "a device's name": 'open("/dev/owned", "w").close(); os.unlink("/dev/owned")',
    "a file beside the masks": 'open("/.jhansi/owned", "w").close(); os.unlink("/.jhansi/owned")',
}
MASK = """
mask = "/.jhansi/empty-directory"
os.chmod(mask, 0o755)
os.mkdir(f"{mask}/note"); os.rmdir(f"{mask}/note")
os.chmod(mask, 0o555)
print("escaped")
"""
FILL_MASK = """
mask = "/.jhansi/empty-file"
os.chmod(mask, 0o644)
open(mask, "r+").close()
os.chmod(mask, 0o444)
print("escaped")
"""


TABLE = [
    *(
        Row(f"no file is {how}, to be written", WRITABLE, f'{attack}\nprint("escaped")', also=(LANDLOCK,))
        for how, attack in WRITES.items()
    ),
    *(Row(f"a file keeps {what}", WRITABLE, f'{attack}\nprint("escaped")') for what, attack in CHANGES.items()),
    *(
        Row(f"{what} is not made", WRITABLE, f'{attack}\nprint("escaped")', also=(LANDLOCK,))
        for what, attack in MAKES.items()
    ),
    *(
        Row(
            f"Landlock keeps it: no file is {how}",
            (LANDLOCK,),
            f'{attack}\nprint("escaped")',
            WRITABLE,
            needs=(LANDLOCKED,),
        )
        for how, attack in WRITES.items()
        if how != "cut"  # which Landlock knows since Linux 6.2
    ),
    *(
        Row(
            f"Landlock keeps it: {what} is not made",
            (LANDLOCK,),
            f'{attack}\nprint("escaped")',
            WRITABLE,
            needs=(LANDLOCKED,),
        )
        for what, attack in MAKES.items()
    ),
    # The container's devices are the host's, under other mounts.
    *(
        Row(f"the host's {name} keeps its times", WRITABLE, f'os.utime("{name}")\nprint("escaped")')
        for name in ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")
    ),
    Row("what all sandboxes share as a mask is read-only", WRITABLE, MASK, also=(LANDLOCK,)),
    Row("what all sandboxes share as a mask of files is read-only", WRITABLE, FILL_MASK, also=(LANDLOCK,)),
]

OTHER_FILE = 'open("mine", "w").close(); '
REFUSALS = [
    Refusal(
        "a file is linked into the workspace", 'os.link("/etc/hostname", "/workspace/linked")', ("EXDEV", "EACCES")
    ),
    Refusal(
        "a file is linked into the workspace by a descriptor",
        """
descriptor = os.open("/etc/hostname", os.O_RDONLY)
os.link(f"/proc/self/fd/{descriptor}", "/workspace/linked", follow_symlinks=True)
""",
        ("EXDEV", "EACCES"),
    ),
    Refusal(
        "a file is linked into the workspace by a descriptor alone",
        'call("linkat", os.open("/etc/hostname", os.O_RDONLY), b"", -100, b"/workspace/linked", 0x1000)',
        ("ENOENT", "EXDEV", "EACCES"),
    ),
    Refusal(
        "a file is moved into the workspace", 'os.rename("/etc/hostname", "/workspace/moved")', ("EXDEV", "EACCES")
    ),
    Refusal(
        "a file of the workspace is moved out", OTHER_FILE + 'os.rename("mine", "/etc/moved")', ("EXDEV", "EACCES")
    ),
    Refusal(
        "a file of the workspace is linked out",
        OTHER_FILE + 'os.link("mine", "/etc/linked")',
        ("EROFS", "EXDEV", "EACCES"),
    ),
    Refusal(
        "two files change places",
        OTHER_FILE + 'call("renameat2", -100, b"mine", -100, b"/etc/hostname", 2)',
        ("EXDEV", "EACCES"),
    ),
    Refusal("the workspace is moved", 'os.rename("/workspace", "/tmp/workspace")', ("EXDEV", "EBUSY", "EACCES")),
    Refusal("a device is removed", 'os.unlink("/dev/null")', ("EROFS", "EACCES", "EBUSY")),
    Refusal("a device is made open to nobody", 'os.chmod("/dev/null", 0)', ("EPERM", "EROFS")),
    Refusal("a file is opened by a handle", 'call("open_by_handle_at", -100, bytes(16), 0)', ("EPERM",)),
    Refusal(
        "a page that can only be read is written by splice (CVE-2022-0847)",
        """
before = open("/etc/hostname", "rb").read()
readable, writable = os.pipe()
size = fcntl.fcntl(writable, 1032)  # F_GETPIPE_SZ: every slot is used once, and keeps its flags if the bug is there
os.write(writable, bytes(size)); os.read(readable, size)
file = os.open("/etc/hostname", os.O_RDONLY)
os.splice(file, writable, 1, offset_src=0)
os.write(writable, b"owned")
print("unchanged" if open("/etc/hostname", "rb").read() == before else "changed")
""",
        ("unchanged",),
    ),
    Refusal(
        "a page that can only be read is written by vmsplice and tee",
        """
before = open("/etc/hostname", "rb").read()
(first, into_first), (second, into_second) = os.pipe(), os.pipe()
os.splice(os.open("/etc/hostname", os.O_RDONLY), into_first, 4, offset_src=0)
call("tee", first, into_second, 4, 0)
os.write(into_second, b"owned")
print("unchanged" if open("/etc/hostname", "rb").read() == before else "changed")
""",
        ("unchanged",),
    ),
    Refusal(
        "a private mapping is written through (CVE-2016-5195)",
        """
before = open("/etc/hostname", "rb").read()
page = mmap.mmap(os.open("/etc/hostname", os.O_RDONLY), len(before), mmap.MAP_PRIVATE, mmap.PROT_READ)
address = ctypes.addressof(ctypes.c_char.from_buffer_copy(before))
memory = os.open("/proc/self/mem", os.O_RDWR)
os.pwrite(memory, b"owned", address)
print("unchanged" if open("/etc/hostname", "rb").read() == before else "changed")
""",
        ("unchanged", "EACCES"),
    ),
    Refusal(
        "a shared mapping is made writable afterwards",
        """
page = mmap.mmap(os.open("/etc/hostname", os.O_RDONLY), 0, mmap.MAP_SHARED, mmap.PROT_READ)
LIBC.mmap.restype = ctypes.c_void_p
address = LIBC.mmap(None, 4096, 1, 1, os.open("/etc/hostname", os.O_RDONLY), ctypes.c_long(0))
if LIBC.mprotect(ctypes.c_void_p(address), 4096, 3) == -1:
    raise OSError(ctypes.get_errno(), "")
""",
        ("EACCES",),
    ),
]


@pytest.fixture(scope="module")
def attempts(tmp_path_factory):
    with surroundings(tmp_path_factory.mktemp("host")) as host:
        yield Attempts(host, TABLE, REFUSALS)


@each(TABLE)
def test_the_attack_fails(attempts, row):
    attempts.assert_it_fails(row)


@each_alone(TABLE)
def test_the_step_alone_stops_the_attack(attempts, row):
    attempts.assert_it_fails(row, row.also)


@each(TABLE)
def test_the_attack_succeeds_without_the_step(attempts, row):
    attempts.assert_it_succeeds(row)


@each_refusal(REFUSALS)
def test_the_attack_is_refused(attempts, refusal):
    attempts.assert_it_is_refused(refusal)
