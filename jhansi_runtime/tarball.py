"""A workspace as one tar stream, out and in.

Out: PAX headers by the standard library, contents as they are read, so memory does not grow with the workspace. What
a job changes meanwhile cannot break the stream: a file has the bytes that its header promised.

In: the archive is hostile until archive.py has unpacked all of it, in a folder that no job reaches. Only then do its
files get their places, by renames; a job may be running, and must not make a rename leave the workspace.

This must not be imported where an exec begins: tarfile is several milliseconds.
"""

import fcntl
import os
import re
import stat
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

from jhansi_runtime import archive, beneath
from jhansi_runtime.archive import ByteReader, Unpacked
from jhansi_runtime.errors import ConflictError, InvalidRequestError

__all__ = ["pack", "sweep", "unpack"]

MOST_PACKED = 1_000_000  # entries
_CHUNK = 256 * 1024
_BLOCK = 4096  # bytes that a name takes beside a file's content, at most: its last block, or a folder's first
_OWNER_ID = 1000  # who a job is inside: nobody out here learns the ids of this host
_OWNER_NAME = "sandbox"
_TYPES = {"file": tarfile.REGTYPE, "directory": tarfile.DIRTYPE, "link": tarfile.SYMTYPE}
_REFUSED = (PermissionError, BlockingIOError)  # by its permissions, or by a lease that a job holds on it

_STAGING = re.compile(r"\.unpacking-[0-9a-f]{16}")  # its maker holds a flock on it
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_Moves = list[tuple[str, list[str]]]


def pack(folder: int) -> Iterator[bytes]:
    """Yield a tar of all below a folder, in pieces of some 256 KiB.

    Links are links; a file of many names is as many files. FIFOs, sockets, devices, setuid bits and what may not be
    read are left out. A file that is cut short meanwhile is filled up with zeros, one that grows is cut.
    InvalidRequestError when there are more than MOST_PACKED entries.
    """
    return _gathered(_packed(folder))


def unpack(
    source: ByteReader,
    workspace: int,
    owner: int | None,
    writing: Callable[[], AbstractContextManager[None]],
    admit: Callable[[int, int], None],
) -> Unpacked:
    """Unpack a tar, plain or compressed, into a workspace: files replace files, folders are merged into.

    All of it belongs to `owner`. writing is the lock under which files get their places; admit is called before that
    with the bytes and files that are to come, and raises when there is no room for them. The errors are those of
    archive.unpack, and ConflictError or InvalidRequestError when something in the workspace is in the way; after any
    of them the workspace is as it was.
    """
    plain = archive.decompressed(source, "the archive")
    with _staging(workspace, writing) as staging:
        unpacked = archive.unpack(plain, staging, keep_modes=True)
        if owner is not None:
            _give(staging, owner)
        admit(unpacked.contents + _BLOCK * unpacked.members, unpacked.members)
        with writing():
            _merge(staging, workspace)
    return unpacked


def sweep(workspace: int) -> None:
    """Remove the staging folders of the killed. The caller holds the lock for writing, under which they are made."""
    with _beside(workspace) as beside:
        for name in os.listdir(beside):
            if _STAGING.fullmatch(name):
                with beneath.closing(os.open(name, _DIRECTORY, dir_fd=beside)) as staging, suppress(BlockingIOError):
                    fcntl.flock(staging, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    beneath.remove(beside, name)


# --- out --------------------------------------------------------------------------------------------------


def _packed(folder: int) -> Iterator[bytes]:
    for entry in beneath.walk(folder, limit=MOST_PACKED):
        match beneath.kind_of(entry.status):
            case "file":
                yield from _packed_file(entry)
            case "directory":
                yield _header(entry.path, entry.status)
            case "link":
                yield _header(entry.path, entry.status, target=os.readlink("", dir_fd=entry.handle))
            case _:
                pass
    yield bytes(2 * tarfile.BLOCKSIZE)


def _packed_file(entry: beneath.Entry) -> Iterator[bytes]:
    try:
        content = beneath.reopen(entry.handle)
    except _REFUSED:
        return
    with beneath.closing(content):
        status = os.fstat(content)
        yield _header(entry.path, status)
        missing = status.st_size
        while missing and (chunk := os.read(content, min(missing, _CHUNK))):
            missing -= len(chunk)
            yield chunk
    missing += -status.st_size % tarfile.BLOCKSIZE
    while missing:
        zeros = bytes(min(missing, _CHUNK))
        missing -= len(zeros)
        yield zeros


def _header(path: str, status: os.stat_result, *, target: str = "") -> bytes:
    kind = beneath.kind_of(status)
    member = tarfile.TarInfo(_tar_name(path))
    member.type = _TYPES[kind]
    member.mode = status.st_mode & 0o777
    member.mtime = int(status.st_mtime)
    member.size = status.st_size if kind == "file" else 0
    member.linkname = _tar_name(target)
    member.uid = member.gid = _OWNER_ID
    member.uname = member.gname = _OWNER_NAME
    return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _tar_name(path: str) -> str:
    """Return the same bytes as tarfile takes them, whatever this host's encoding is."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def _gathered(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Join small pieces: each that is yielded is a turn of a server's loop."""
    waiting: list[bytes] = []
    size = 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size >= _CHUNK:
            yield b"".join(waiting)
            waiting.clear()
            size = 0
    if waiting:
        yield b"".join(waiting)


# --- in ---------------------------------------------------------------------------------------------------


@contextmanager
def _staging(workspace: int, writing: Callable[[], AbstractContextManager[None]]) -> Iterator[int]:
    """Within: an empty folder on the disk of the workspace that no job reaches; gone at the end."""
    name = f".unpacking-{os.urandom(8).hex()}"
    with _beside(workspace) as beside:
        with writing():
            sweep(workspace)
            os.mkdir(name, 0o700, dir_fd=beside)
            staging = os.open(name, _DIRECTORY, dir_fd=beside)
            fcntl.flock(staging, fcntl.LOCK_SH)
        try:
            yield staging
        finally:
            beneath.remove(beside, name)
            os.close(staging)


def _beside(workspace: int) -> AbstractContextManager[int]:
    """Within: the folder that a workspace lies in. A job sees nothing of it, and cannot move its workspace."""
    return beneath.closing(os.open("..", _DIRECTORY, dir_fd=workspace))


def _give(folder: int, owner: int) -> None:
    """Make all below a folder that nobody else reaches belong to somebody."""
    for entry in beneath.walk(folder, limit=MOST_PACKED):
        above, name = os.path.split(entry.path)
        with beneath.closing(beneath.open_directory(folder, above)) as parent:
            os.chown(name, owner, owner, dir_fd=parent, follow_symlinks=False)


def _merge(staging: int, workspace: int) -> None:
    """Move all to the workspace by renames, each into a folder that both have: a file is the old or the new one."""
    for path, names in _moves(staging, workspace):
        with (
            beneath.closing(beneath.open_directory(staging, path)) as source,
            beneath.closing(beneath.open_directory(workspace, path)) as target,
        ):
            for name in names:
                os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)


def _moves(staging: int, workspace: int) -> _Moves:
    """The renames that it takes: for each folder that both have, the names to move there."""
    moves: _Moves = []
    pending = [""]
    while pending:
        path = pending.pop()
        with (
            beneath.closing(beneath.open_directory(staging, path)) as source,
            beneath.closing(beneath.open_directory(workspace, path)) as target,
        ):
            moved = []
            for entry in beneath.walk(source, limit=MOST_PACKED, recursive=False):
                whole = os.path.join(path, entry.path)
                if _is_merged(entry, target, whole):
                    pending.append(whole)
                else:
                    moved.append(entry.path)
            if moved and not os.access(f"/proc/self/fd/{target}", os.W_OK | os.X_OK):
                raise InvalidRequestError(f"the folder {path!r} may not be written to; nothing was unpacked")
        moves.append((path, moved))
    return moves


def _is_merged(entry: beneath.Entry, target: int, path: str) -> bool:
    """Whether a folder of that name is there to merge this one into. ConflictError when the two cannot be one."""
    is_folder = stat.S_ISDIR(entry.status.st_mode)
    try:
        there = os.stat(entry.path, dir_fd=target, follow_symlinks=False)
    except FileNotFoundError:
        return False
    if is_folder == stat.S_ISDIR(there.st_mode):
        return is_folder
    kind = beneath.kind_of(there)
    raise ConflictError(
        f"{path!r} is a {kind} in the workspace and a {beneath.kind_of(entry.status)} in the archive; "
        "nothing was unpacked",
        remedy="remove the one in the workspace first",
    )
