"""Terminals: nothing is typed into the host's, and none of the host's can be opened.

CVE-2017-5226: TIOCSTI types into the terminal of whoever started the sandbox. CVE-2019-10063: the filter compared 64
bits of the request, of which the kernel reads 32. CVE-2023-1523: TIOCLINUX pastes into the console. CVE-2025-52565: a
terminal was mounted on /dev/console by a path that the root tree had shaped; here it has no path (terminal.py).
"""

import json
import os

import pytest
from attempts import (
    Attempts,
    Need,
    Refusal,
    Row,
    attempt,
    each,
    each_alone,
    each_refusal,
    surroundings,
)
from removals import SESSION, with_profile, with_the_hosts, with_the_hosts_own, without_rule_of

TIOCSTI, TIOCLINUX, TIOCSETD = 0x5412, 0x541C, 0x5423
LOW_HALF, BOTH_HALVES = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


def types_into_terminals():
    try:
        with open("/proc/sys/dev/tty/legacy_tiocsti") as file:
            return file.read().strip() == "1"
    except FileNotFoundError:
        return True  # before Linux 6.2 every kernel did


TYPING = Need("this kernel lets nobody type into a terminal (dev.tty.legacy_tiocsti)", types_into_terminals)


def a_terminal_of_the_host():
    """A terminal that is no session's yet."""
    master, slave = os.openpty()
    os.set_inheritable(master, True)  # it lives as long as somebody has this end
    return slave


def comparing_64_bits(profile):
    for rule in profile["syscalls"]:
        if rule["names"] == ["ioctl"]:
            for argument in rule.get("args", ()):
                assert argument["value"] == LOW_HALF
                argument["value"] = BOTH_HALVES


# Stdin becomes the job's own terminal, a line is typed, and read.
TYPE = """
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
call("ioctl", 0, REQUEST, b"\\n")
print("escaped" if os.read(0, 1) == b"\\n" else "")
"""
# A terminal of the container's own is enough to see whether the kernel gets to hear of it.
ASK = """
slave = os.openpty()[1]
try:
    call("ioctl", slave, REQUEST, struct.pack("i", 0))
    print("escaped")
except OSError as error:
    print("escaped" if error.errno == errno.ENOTTY else errno.errorcode[error.errno])
"""

TABLE = [
    Row(
        "init and the job leave the launcher's session",
        (SESSION,),
        'os.write(os.open("/dev/tty", os.O_RDWR), b"owned"); print("escaped")',
    ),
    Row(
        "TIOCSTI is refused",
        (without_rule_of("ioctl", TIOCSTI),),
        f"REQUEST = {TIOCSTI}{TYPE}",
        also=(with_the_hosts_own(0, a_terminal_of_the_host),),
        alone=True,  # a session's first process
        needs=(TYPING,),
    ),
    Row(
        "TIOCSTI is refused whatever the upper half of the request",
        (with_profile(comparing_64_bits),),
        f"REQUEST = 1 << 32 | {TIOCSTI}{TYPE}",
        also=(with_the_hosts_own(0, a_terminal_of_the_host),),
        alone=True,
        needs=(TYPING,),
    ),
    *(
        Row(f"{name} is refused", (without_rule_of("ioctl", request),), f"REQUEST = {request}{ASK}")
        for name, request in (("TIOCLINUX", TIOCLINUX), ("TIOCSETD", TIOCSETD))
    ),
    *(
        Row(
            f"{name} is refused whatever the upper half of the request",
            (with_profile(comparing_64_bits),),
            f"REQUEST = 1 << 32 | {request}{ASK}",
        )
        for name, request in (("TIOCLINUX", TIOCLINUX), ("TIOCSETD", TIOCSETD))
    ),
    Row(
        "the terminals in /dev/pts are the container's own",
        (with_the_hosts("dev/pts", "/dev/pts"),),
        'print("escaped" if os.path.exists(E["TERMINAL"]) else "")',
    ),
    Row(
        "no terminal of the host can be opened",
        (with_the_hosts("dev/pts", "/dev/pts"),),
        'os.write(os.open(E["TERMINAL"], os.O_RDWR | os.O_NOCTTY), b"owned"); print("escaped")',
    ),
]

REFUSALS = [
    Refusal("the controlling terminal is opened", 'os.open("/dev/tty", os.O_RDWR)', ("ENXIO",)),
    Refusal("the console is opened", 'os.open("/dev/console", os.O_RDWR)', ("ENOENT",)),
    Refusal("a virtual console is opened", 'os.open("/dev/tty1", os.O_RDWR)', ("ENOENT",)),
    Refusal("a serial line is opened", 'os.open("/dev/ttyS0", os.O_RDWR)', ("ENOENT",)),
    Refusal("the first terminal of the host is opened", 'os.open("/dev/pts/0", os.O_RDWR)', ("ENOENT",)),
    Refusal("the console's output is taken over", "fcntl.ioctl(os.openpty()[1], termios.TIOCCONS)", ("EPERM",)),
    Refusal("every terminal is hung up", 'call("vhangup")', ("EPERM",)),
    Refusal(
        "a terminal is made in /dev/pts",
        'os.mknod("/dev/pts/9", stat.S_IFCHR | 0o666, os.makedev(136, 0))',
        ("EPERM", "EACCES"),
    ),
]

# With stdin from the host's terminal and stdout elsewhere, the job's stdin is that very terminal. What a job tries with
# it, and what it is told.
WITH_THE_TERMINAL = {
    "is typed into": (f'call("ioctl", 0, {TIOCSTI}, b"x")', "EPERM"),
    "is typed into, with a bit in the upper half": (f'call("ioctl", 0, 1 << 32 | {TIOCSTI}, b"x")', "EPERM"),
    "is pasted into": (f'call("ioctl", 0, {TIOCLINUX}, b"x")', "EPERM"),
    "is given another line discipline": (f'call("ioctl", 0, {TIOCSETD}, struct.pack("i", 0))', "EPERM"),
    "is made the job's own": ("fcntl.ioctl(0, termios.TIOCSCTTY, 0)", "EPERM"),
    "is made the job's own by force": ("fcntl.ioctl(0, termios.TIOCSCTTY, 1)", "EPERM"),
    "is given another process group": ("os.tcsetpgrp(0, os.getpgrp())", "ENOTTY"),
    "is the controlling one": ('os.open("/dev/tty", os.O_RDWR)', "ENXIO"),
    "is hung up": ("fcntl.ioctl(0, 0x5437)", "EPERM"),  # TIOCVHANGUP
    "has the console's output": ("fcntl.ioctl(0, termios.TIOCCONS)", "EPERM"),
    "is locked": ("fcntl.ioctl(0, 0x5457, bytes(60))", "EPERM"),  # TIOCSLCKTRMIOS
}
EACH = """
answers = {}
for what, program in PROGRAMS.items():
    try:
        exec(program)
        answers[what] = "done"
    except OSError as error:
        answers[what] = errno.errorcode[error.errno]
print(json.dumps(answers))
"""


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


@pytest.fixture(scope="module")
def told_of_the_terminal(attempts):
    programs = {what: program for what, (program, _) in WITH_THE_TERMINAL.items()}
    hosts_own = with_the_hosts_own(0, lambda: os.open("/dev/tty", os.O_RDWR))
    told = attempt(attempts.host, f"PROGRAMS = {programs!r}{EACH}", (hosts_own,))
    return json.loads(told["lines"][0])


@pytest.mark.parametrize(("what", "answer"), [(what, told) for what, (_, told) in WITH_THE_TERMINAL.items()])
def test_the_hosts_terminal_as_stdin_cannot_be_used_for_more_than_reading_and_writing(
    told_of_the_terminal, what, answer
):
    assert told_of_the_terminal[what] == answer
