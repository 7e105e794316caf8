"""A root tree on disk: what it must hold before a container may be built on it, its manifest, and its removal.

Mountpoints and our own /etc files are made once, here, while nobody uses the tree yet, so that building a container
never creates anything in it. The tree came out of an archive and is as hostile as that: everything is reached by
descriptor, with openat2(2), and no link is followed.

The manifest is one entry for each path, sorted: path, kind, permission bits, and the SHA-256 of a file or the target
of a link. The digest of a tree is the SHA-256 of its manifest.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from jhansi_runtime.errors import HostileArchiveError
from jhansi_runtime.isolation.syscalls import RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, openat2

__all__ = [
    "Manifest",
    "compare",
    "has_program",
    "make_directory",
    "make_file",
    "make_mountpoints",
    "opened",
    "remove",
    "scan",
]

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FIELDS = 4

_MOUNTPOINTS = ("workspace", "tmp", "home/sandbox", "proc", "dev", "etc")
# What masks paths of /proc, and what the workspaces are mounted on until the one is chosen.
_EMPTY_DIRECTORY = ".jhansi/empty-directory"
_EMPTY_FILE = ".jhansi/empty-file"
_WORKSPACES = ".jhansi/workspaces"
_ETC = {
    "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\n"
    b"sandbox:x:1000:1000:sandbox:/home/sandbox:/bin/sh\n"
    b"nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "etc/group": b"root:x:0:\nsandbox:x:1000:\nnogroup:x:65534:\n",
    "etc/hosts": b"127.0.0.1 localhost\n::1 localhost\n127.0.1.1 sandbox\n",
    "etc/hostname": b"sandbox\n",
    "etc/resolv.conf": b"",
}


class Manifest(NamedTuple):
    """All of a tree in one value: `data` as stored and hashed, the regular files and the bytes in them."""

    data: bytes
    files: int
    size: int

    @property
    def digest(self) -> str:
        """ "sha256:" and 64 hexadecimal digits."""  # noqa: D210 - the text begins with a quotation mark
        return f"sha256:{_sha256(self.data)}"


@contextmanager
def opened(path: str) -> Iterator[int]:
    """Descriptor of a directory that is ours, closed at the end. It may be a link, to another disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def make_mountpoints(tree: int) -> None:
    """Make every place that isolation mounts on, and our /etc files, in the tree that the descriptor names.

    HostileArchiveError when one of them is there as something else than a directory, or on the way to one there is
    a link; or when the tree has a /.jhansi already.
    """
    os.fchmod(tree, 0o755)  # whatever the umask
    for path in _MOUNTPOINTS:
        make_directory(tree, path)
    if ".jhansi" in os.listdir(tree):
        raise HostileArchiveError("the rootfs has a /.jhansi of its own")
    make_directory(tree, _EMPTY_DIRECTORY, 0o555)
    make_directory(tree, _WORKSPACES, 0o555)
    make_file(tree, _EMPTY_FILE, b"", 0o444)
    for path, content in _ETC.items():
        make_file(tree, path, content)


def make_directory(tree: int, path: str, mode: int = 0o755) -> None:
    """Make `path` a directory of that mode, and every directory above it, where there is none yet."""
    os.close(_directory(tree, path, mode))


def make_file(tree: int, path: str, content: bytes, mode: int = 0o644) -> None:
    """Make `path` a new file; one that is there goes, and so does a link (never what it points to)."""
    above, name = os.path.split(path)
    directory = _directory(tree, above)
    try:
        try:
            os.unlink(name, dir_fd=directory)
        except FileNotFoundError:
            pass
        except IsADirectoryError:
            raise _unusable(path) from None
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=directory)
        with open(fd, "wb") as file:
            os.fchmod(fd, mode)  # whatever the umask
            file.write(content)
    finally:
        os.close(directory)


def has_program(tree: int, path: str) -> bool:
    """Whether the absolute `path`, resolved as inside the tree, is an executable file."""
    try:
        fd = openat2(tree, path, os.O_PATH, resolve=RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    except OSError:
        return False
    try:
        mode = os.fstat(fd).st_mode
        return stat.S_ISREG(mode) and bool(mode & 0o111)
    finally:
        os.close(fd)


def scan(tree: int) -> Manifest:
    """Read the whole tree. What cannot be read is an entry too, of a kind that no sound tree has."""
    root = _Entry((b"", b"directory", _mode(os.fstat(tree)), b""))
    entries = sorted([root, *_entries(tree, b"")])
    data = b"".join(b"\0".join(entry.fields) + b"\0" for entry in entries)
    files = [entry for entry in entries if entry.fields[1] == b"file"]
    return Manifest(data, len(files), sum(entry.size for entry in files))


def compare(sound: bytes, found: bytes) -> list[tuple[str, str]]:
    """Paths whose entries differ between two manifests' data, in order, each with what is wrong about it."""
    before, after = _parsed(sound), _parsed(found)
    problems = []
    for path in sorted(before.keys() | after.keys()):
        if path not in after:
            problem = "missing"
        elif path not in before:
            problem = "added"
        elif before[path] == after[path]:
            continue
        else:
            names = ("kind", "mode", "content")
            problem = (
                ", ".join(n for n, b, a in zip(names, before[path], after[path], strict=True) if b != a) + " changed"
            )
        problems.append((os.fsdecode(path), problem))
    return problems


def remove(parent: int, name: str | bytes) -> None:
    """Remove an entry of the directory `parent` with all below it, whatever the modes. FileNotFoundError if absent."""
    try:
        os.unlink(name, dir_fd=parent)
    except IsADirectoryError:
        os.chmod(name, 0o700, dir_fd=parent)
        fd = os.open(name, _DIRECTORY_FLAGS, dir_fd=parent)
        try:
            for below in os.listdir(fd):
                remove(fd, below)
        finally:
            os.close(fd)
        os.rmdir(name, dir_fd=parent)


# --- making -----------------------------------------------------------------------------------------------


def _directory(tree: int, path: str, mode: int = 0o755) -> int:
    """Descriptor of the directory `path` of the tree, made where it is not there."""
    try:
        return openat2(tree, path or ".", _DIRECTORY_FLAGS, resolve=RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise _unusable(path) from None
        raise
    above, name = os.path.split(path)
    parent = _directory(tree, above)
    try:
        os.mkdir(name, mode, dir_fd=parent)
        fd = os.open(name, _DIRECTORY_FLAGS, dir_fd=parent)
    finally:
        os.close(parent)
    os.fchmod(fd, mode)  # whatever the umask
    return fd


def _unusable(path: str) -> HostileArchiveError:
    return HostileArchiveError(f"in the rootfs, /{path} is a link, or no place to mount on or write to")


# --- the manifest -----------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    fields: tuple[bytes, bytes, bytes, bytes]  # path, kind, mode, detail
    size: int = 0


def _entries(directory: int, above: bytes) -> Iterator[_Entry]:
    for text in os.listdir(directory):
        name = os.fsencode(text)
        path = above + name
        status = os.lstat(name, dir_fd=directory)
        mode = _mode(status)
        try:
            if stat.S_ISDIR(status.st_mode):
                fd = os.open(name, _DIRECTORY_FLAGS, dir_fd=directory)
                try:
                    yield from _entries(fd, path + b"/")
                finally:
                    os.close(fd)
                yield _Entry((path, b"directory", mode, b""))
            elif stat.S_ISREG(status.st_mode):
                yield _Entry((path, b"file", mode, _sha256_of_file(directory, name)), status.st_size)
            elif stat.S_ISLNK(status.st_mode):
                yield _Entry((path, b"link", mode, os.readlink(name, dir_fd=directory)))
            else:
                yield _Entry((path, b"special", mode, b""))
        except PermissionError:
            yield _Entry((path, b"unreadable", mode, b""))


def _mode(status: os.stat_result) -> bytes:
    return b"%04o" % stat.S_IMODE(status.st_mode)


def _parsed(data: bytes) -> dict[bytes, tuple[bytes, bytes, bytes]]:
    fields = data.split(b"\0")
    return {
        fields[start]: (fields[start + 1], fields[start + 2], fields[start + 3])
        for start in range(0, len(fields) - _FIELDS, _FIELDS)
    }


def _sha256(data: bytes) -> str:
    import hashlib  # noqa: PLC0415 - OpenSSL is not loaded to open a rootfs, only to check one

    return hashlib.sha256(data).hexdigest()


def _sha256_of_file(directory: int, name: bytes) -> bytes:
    import hashlib  # noqa: PLC0415 - likewise

    with open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory), "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest().encode()
