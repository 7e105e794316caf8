"""Sockets: a container's network is a loopback of its own, and there are few families to be had.

CVE-2020-15257: an abstract socket of the host's was in reach, because the network namespace was shared. CVE-2016-8655,
CVE-2017-7308 and CVE-2020-14386 (packet sockets), CVE-2021-22555, CVE-2022-34918 and CVE-2024-1086 (netfilter),
CVE-2021-26708 (vsock), CVE-2019-8912 (AF_ALG), CVE-2021-43267 (TIPC), CVE-2010-3904 (RDS): of families that a job has
no use for, and of what takes power over a network. CVE-2024-29018: names were asked of the host's resolver.
test_kernel_surface.py has every family.
"""

import socket

import pytest
from attempts import SCOPED, Attempts, Need, Refusal, Row, each, each_alone, each_refusal, surroundings
from removals import CAPABILITIES, INNER_NAMESPACE, LANDLOCK, NETWORK, SECCOMP, without_umount_of

ABSTRACT = 'socket.socket(socket.AF_UNIX).connect("\\0" + E["ABSTRACT"]); print("escaped")'
# To say something to the kernel's own network configuration, and hear its answer (rtnetlink(7)).
NETLINK = """
def told(kind, body):
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as kernel:
        kernel.send(struct.pack("IHHII", 16 + len(body), kind, 0x605, 1, 0) + body)  # REQUEST, ACK, EXCL, CREATE
        number = -struct.unpack_from("i", kernel.recv(4096), 16)[0]
    if number:
        raise OSError(number, os.strerror(number))
    print("escaped")
"""
NEW_ADDRESS = NETLINK + 'told(20, struct.pack("BBBBI", 2, 32, 0, 0, 1) + struct.pack("HH4B", 8, 2, 10, 0, 0, 1))'
NEW_ROUTE = (
    NETLINK
    + 'told(24, struct.pack("BBBBBBBBI", 2, 32, 0, 0, 254, 4, 0, 6, 0) + struct.pack("HH4B", 8, 1, 10, 9, 9, 9))'
)
NEW_RULE = NETLINK + 'told(32, struct.pack("BBBBBBBBI", 2, 0, 0, 0, 253, 0, 0, 1, 0))'
LOOPBACK_DOWN = """
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sH22x", b"lo", 0))
print("escaped")
"""


def answers_to_connect(address):
    def is_met():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            try:
                client.connect((address, 9))
            except OSError:
                return False
        return True

    return is_met


ROUTED = Need("this machine has no route to anywhere", answers_to_connect("192.0.2.1"))
CONNECTED = Need("this machine has no network but its loopback", lambda: len(socket.if_nameindex()) > 1)

TABLE = [
    *(
        Row(what, (NETWORK,), attack, needs=needs)
        for what, attack, needs in (
            (
                "no service of the host's can be connected to",
                'socket.create_connection(("127.0.0.1", int(E["PORT"]))); print("escaped")',
                (),
            ),
            (
                "no service of the host's can be sent to",
                """
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
    client.connect(("127.0.0.1", int(E["UDP_PORT"])))
    for _ in range(3):  # the second one is told when nobody was there for the first
        client.send(b"x")
        time.sleep(0.05)
print("escaped")
""",
                (),
            ),
            (
                "what the host listens for is not told",
                """
ports = [line.split()[1].split(":")[1] for line in open("/proc/net/tcp").readlines()[1:]]
print("escaped" if "%04X" % int(E["PORT"]) in ports else "")
""",
                (),
            ),
            (
                "the names of the host's sockets are not told",
                'print("escaped" if E["ABSTRACT"] in open("/proc/net/unix").read() else "")',
                (),
            ),
            (
                "the host's interfaces are not told",
                'print("escaped" if len(socket.if_nameindex()) > 1 else "")',
                (CONNECTED,),
            ),
            (
                "there is a route to nowhere",
                'socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("192.0.2.1", 53)); print("escaped")',
                (ROUTED,),
            ),
        )
    ),
    Row("no abstract socket of the host's can be connected to", (NETWORK,), ABSTRACT, also=(LANDLOCK,)),
    Row("Landlock keeps abstract sockets of the host's", (LANDLOCK,), ABSTRACT, also=(NETWORK,), needs=(SCOPED,)),
    Row(
        "a socket of the host's is out of sight with its folder",
        (without_umount_of(b"."),),
        'socket.socket(socket.AF_UNIX).connect("/.." + E["SOCKET"]); print("escaped")',
    ),
    *(
        Row(what, (INNER_NAMESPACE,), attack, also=(CAPABILITIES,))
        for what, attack in {
            "no raw socket is made": 'socket.socket(socket.AF_INET, socket.SOCK_RAW, 1); print("escaped")',
            "no raw socket of IPv6 is made": 'socket.socket(socket.AF_INET6, socket.SOCK_RAW, 58); print("escaped")',
            "no address is added": NEW_ADDRESS,
            "no route is added": NEW_ROUTE,
            "no rule of routing is added": NEW_RULE,
            "the loopback is not taken down": LOOPBACK_DOWN,
            "no packet is marked": 'socket.socket().setsockopt(socket.SOL_SOCKET, 36, 1); print("escaped")',
            "no packet is taken that is for others": 'socket.socket().setsockopt(0, 19, 1); print("escaped")',
            "no service takes a port of the system's": 'socket.create_server(("127.0.0.1", 80)); print("escaped")',
        }.items()
    ),
    Row(
        "the job has no capability over its network",
        (CAPABILITIES,),
        'socket.socket(socket.AF_INET, socket.SOCK_RAW, 1); print("escaped")',
        also=(INNER_NAMESPACE,),
    ),
    Row(
        "no packet socket is made",
        (SECCOMP,),
        'socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0); print("escaped")',
        also=(INNER_NAMESPACE, CAPABILITIES),
    ),
    *(
        Row(
            f"the filter refuses {name}",
            (SECCOMP,),
            f"""
try:
    socket.socket({family}, {kind}, {protocol})
    print("escaped")
except OSError as error:  # the kernel itself has been asked
    print("escaped" if error.errno in (errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT) else errno.errorcode[error.errno])
""",
        )
        for name, family, kind, protocol in (
            ("AF_ALG", 38, socket.SOCK_SEQPACKET, 0),
            ("AF_VSOCK", 40, socket.SOCK_STREAM, 0),
            ("netfilter's netlink", 16, socket.SOCK_RAW, 12),
            ("the netlink of events of devices", 16, socket.SOCK_RAW, 15),
            ("the netlink of the audit subsystem", 16, socket.SOCK_RAW, 9),
            ("the netlink that lists sockets", 16, socket.SOCK_RAW, 4),
            ("generic netlink", 16, socket.SOCK_RAW, 16),
        )
    ),
    Row(
        "a family is refused whatever the upper half of its number",
        (SECCOMP,),
        f'os.close(call("socket", 1 << 32 | 38, {int(socket.SOCK_SEQPACKET)}, 0)); print("escaped")',
        needs=(Need("this kernel has no AF_ALG", lambda: is_made(38, socket.SOCK_SEQPACKET)),),
    ),
]


def is_made(family, kind):
    try:
        socket.socket(family, kind).close()
    except OSError:
        return False
    return True


def connecting(family, address):
    return f"socket.socket({family}, socket.SOCK_DGRAM).connect({address!r})"


REFUSALS = [
    Refusal("an address outside is reached", connecting("socket.AF_INET", ("192.0.2.1", 9)), ("ENETUNREACH",)),
    Refusal("a name server is reached", connecting("socket.AF_INET", ("192.0.2.53", 53)), ("ENETUNREACH",)),
    Refusal("a cloud's metadata is reached", connecting("socket.AF_INET", ("169.254.169.254", 80)), ("ENETUNREACH",)),
    Refusal("everybody around is sent to", connecting("socket.AF_INET", ("224.0.0.251", 5353)), ("ENETUNREACH",)),
    Refusal(
        "an address outside is reached by IPv6", connecting("socket.AF_INET6", ("2001:db8::1", 9)), ("ENETUNREACH",)
    ),
    Refusal(
        "an address outside is connected to",
        'socket.create_connection(("192.0.2.1", 443), timeout=5)',
        ("ENETUNREACH",),
    ),
    Refusal("a ping is sent", "socket.socket(socket.AF_INET, socket.SOCK_DGRAM, 1)", ("EACCES",)),
    Refusal(
        "a table of packet filters is written",
        "socket.socket(socket.AF_INET).setsockopt(0, 64, bytes(100))",
        ("EPERM", "ENOPROTOOPT"),
    ),
    Refusal(
        "a buffer grows beyond the system's limit",
        "socket.socket().setsockopt(socket.SOL_SOCKET, 33, 1 << 20)",  # SO_RCVBUFFORCE
        ("EPERM",),
    ),
    Refusal("a packet is given priority", "socket.socket().setsockopt(socket.SOL_SOCKET, 12, 7)", ("EPERM",)),
    Refusal("Docker is spoken to", 'socket.socket(socket.AF_UNIX).connect("/run/docker.sock")', ("ENOENT",)),
    Refusal("D-Bus is spoken to", 'socket.socket(socket.AF_UNIX).connect("/run/dbus/system_bus_socket")', ("ENOENT",)),
    Refusal("the system's log is written", 'socket.socket(socket.AF_UNIX, 2).connect("/dev/log")', ("ENOENT",)),
    Refusal("another network is entered", 'os.listdir("/run/netns")', ("ENOENT",)),
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
