"""The container's network: a namespace with nothing in it but `lo`, which is brought up."""

import _socket
import fcntl
import struct

__all__ = ["loopback_up"]

# From netdevice(7).
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 0x1
# struct ifreq: a name, the flags, and the rest of a union.
_REQUEST = struct.Struct("16sH22x")


def loopback_up() -> None:
    """Set IFF_UP on lo; the kernel then gives it 127.0.0.1 and ::1 by itself."""
    socket = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
    try:
        _, flags = _REQUEST.unpack(fcntl.ioctl(socket.fileno(), _SIOCGIFFLAGS, _REQUEST.pack(b"lo", 0)))
        fcntl.ioctl(socket.fileno(), _SIOCSIFFLAGS, _REQUEST.pack(b"lo", flags | _IFF_UP))
    finally:
        socket.close()
