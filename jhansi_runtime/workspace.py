"""One workspace: every file that the host touches in it is reached through here, beneath one descriptor.

A workspace belongs to its jobs, so it is hostile, and a job may be running in it at this moment. beneath.py makes
that harmless; this module is what users see of it: paths are text relative to the workspace (surrogate escapes stand
for bytes that are no UTF-8), links that lead out of it are refused, and every failure is a JhansiError.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from jhansi_runtime import beneath
from jhansi_runtime.digest import sha256
from jhansi_runtime.errors import (
    ConflictError,
    DiskLimitError,
    InvalidRequestError,
    JhansiError,
    NotExecutableError,
    NotFoundError,
    ProgramMissingError,
)
from jhansi_runtime.spec import FileInfo, instant

if TYPE_CHECKING:
    import hashlib

__all__ = ["Program", "Workspace", "explained", "open_workspace"]

_LARGE = 1024**2
LARGEST_PROGRAM = 1024**3  # bytes; it is hashed before every exec
MOST_LISTED = 100_000
MOST_COPIED = 1_000_000
MOST_NAMED = 5  # of what `get` left out, in one message
INSIDE = "/workspace"


class Program(NamedTuple):
    """The file that an exec runs: its path in the workspace as it was given, what was in it, who may run it."""

    path: str
    sha256: str
    executable: bool
    size: int


class Workspace:
    """The files beneath one descriptor, `fd`, which whoever made this closes. What is made belongs to `owner`."""

    def __init__(self, fd: int, *, owner: int | None = None) -> None:
        self.fd = fd
        self.owner = owner

    def open_program(self, path: str) -> Program:
        """Look at the file that is to be run, through links that stay inside, and hash it.

        ProgramMissingError when nothing is there, NotExecutableError when what is there cannot be a program.
        """
        inside = _relative(path)
        with explained(path, _PROGRAM_FAILURES), beneath.closing(self._found(inside)) as handle:
            kind = beneath.kind_of(os.fstat(handle))
            if kind != "file":
                raise NotExecutableError(f"{path!r} is a {kind}, not a program")
            with beneath.closing(beneath.reopen(handle)) as content:
                status = os.fstat(content)
                if status.st_size > LARGEST_PROGRAM:
                    raise NotExecutableError(f"{path!r} has {status.st_size} bytes, more than a program may have")
                digest = sha256() if status.st_size < _LARGE else _fast_sha256()
                for chunk in beneath.chunks(content, status.st_size):
                    digest.update(chunk)
        return Program(inside, digest.hexdigest(), bool(status.st_mode & 0o111), status.st_size)

    def files(self, directory: str = "", *, recursive: bool = False, limit: int = MOST_LISTED) -> Iterator[FileInfo]:
        """What is in a folder, in the order of names, each folder before what is in it; links are not followed.

        A folder that may not be read is listed but not entered, like one whose files lie too deep to have a path.
        InvalidRequestError when there are more than `limit` entries.
        """
        inside = _relative(directory, or_top=True)
        with explained(directory), beneath.closing(self._found(inside)) as folder:
            for entry in beneath.walk(folder, limit=limit, recursive=recursive):
                yield _file_info(_joined(inside, entry.path), entry.status)

    def read(self, path: str) -> Iterator[bytes]:
        """Yield the content of a file, as long as it was when the first of it was asked for."""
        inside = _relative(path)
        with explained(path), beneath.closing(self._found(inside)) as handle:
            kind = beneath.kind_of(os.fstat(handle))
            if kind != "file":
                raise InvalidRequestError(f"{path!r} is a {kind}, not a file to read")
            with beneath.closing(beneath.reopen(handle)) as content:
                yield from beneath.chunks(content, os.fstat(content).st_size)

    def write(self, path: str, chunks: Iterable[bytes], *, mode: int = 0o644) -> FileInfo:
        """Make or replace a file, and the folders above it; whoever looks sees the old content or the new, whole.

        The old file is kept when anything fails. mode is its permission bits. A link of that name is replaced; one
        on the way to it is refused.
        """
        inside = _relative(path)
        above, name = os.path.split(inside)
        with (
            explained(path),
            beneath.closing(beneath.make_directories(self.fd, above, self.owner)) as parent,
            beneath.replacing(parent, name, self.owner, mode) as fd,
        ):
            for chunk in chunks:
                beneath.write_all(fd, chunk)
            return _file_info(inside, os.fstat(fd))

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all that is in it. A link is removed, not what it leads to."""
        above, name = os.path.split(_relative(path))
        if not name:
            raise InvalidRequestError("the workspace itself cannot be removed", remedy="remove the sandbox instead")
        with explained(path), beneath.closing(beneath.open_directory(self.fd, above)) as parent:
            beneath.remove(parent, name)

    def put(self, source: str, to: str = "") -> list[FileInfo]:
        """Copy a file or folder of the host into the folder `to` of the workspace, under its own name.

        Permission bits and times of change are kept; a folder that is there is merged into. InvalidRequestError,
        before anything is copied, when in a folder there is a link that leads out of it or anything but files,
        folders and links. `source` itself may be a link.
        """
        folder = _relative(to, or_top=True)
        name = os.path.basename(os.path.abspath(source))
        if not name or "\0" in source:
            raise InvalidRequestError(
                f"{source!r} has no name to copy it under", remedy="name a file or a folder in it"
            )
        with explained(source):
            handle = os.open(source, os.O_PATH | os.O_CLOEXEC)
        with beneath.closing(handle):
            kind = _copied_kind(handle, source)
            if kind == "directory":
                self._check_source(handle, source)
            inside = _joined(folder, name)
            with explained(inside), beneath.closing(beneath.make_directories(self.fd, folder, self.owner)) as parent:
                if kind == "file":
                    beneath.copy_file(handle, parent, name, self.owner)
                    return [self._info(inside)]
                entries = beneath.walk(handle, limit=MOST_COPIED)
                paths = [path for path, _ in beneath.copy_folder(handle, entries, parent, name, self.owner)]
                return [self._info(_joined(inside, path)) for path in paths]

    def get(self, path: str, output: str, *, left_out: Callable[[str], None] | None = None) -> int:
        """Copy a file or folder out to `output` on the host, or into it where that is a folder. Returns bytes.

        Permission bits (never setuid) and times of change are kept; a file that is there is replaced at once, a
        folder merged into. In a folder, links that lead out of it and anything but files, folders and links are left
        out: `left_out` is called with a line for each; without it InvalidRequestError, after all else is copied.
        """
        inside = _relative(path, or_top=True)
        if "\0" in output:
            raise InvalidRequestError("a path cannot hold a NUL byte")
        if os.path.isdir(output):
            output = os.path.join(output, os.path.basename(inside) or "workspace")
        above, name = os.path.split(os.path.abspath(output))
        with explained(path):
            handle = self._found(inside)
        with beneath.closing(handle):
            kind = _copied_kind(handle, path)
            with explained(output):
                parent = os.open(above, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            with beneath.closing(parent), explained(output):
                if kind == "file":
                    return beneath.copy_file(handle, parent, name, None)
                return _copy_out(handle, parent, name, left_out)

    def _found(self, inside: str) -> int:
        """O_PATH descriptor of what a relative path names, through links that stay inside."""
        return beneath.open_path(self.fd, inside, follow=True)

    def _info(self, inside: str) -> FileInfo:
        with beneath.closing(beneath.open_path(self.fd, inside, follow=False)) as handle:
            return _file_info(inside, os.fstat(handle))

    def _check_source(self, folder: int, source: str) -> None:
        """InvalidRequestError when a folder of the host cannot be copied whole into this workspace."""
        own = os.fstat(self.fd)
        for entry in beneath.walk(folder, limit=MOST_COPIED):
            reason = beneath.obstacle(entry)
            if os.path.samestat(entry.status, own):
                reason = "is the workspace itself"
            if reason:
                raise InvalidRequestError(
                    f"{os.path.join(source, entry.path)!r} {reason}; nothing was copied",
                    remedy="take it out of the folder, or put the rest file by file",
                )


@contextmanager
def open_workspace(path: str, *, owner: int | None = None, at: int | None = None) -> Iterator[Workspace]:
    """Within: the workspace in a folder of the host, relative to the directory descriptor `at` if given.

    A job may have taken its workspace's permissions away; they are given back, for it is the host's to lend.
    """
    with explained(path):
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
    with beneath.closing(fd):
        beneath.unlock(fd)
        yield Workspace(fd, owner=owner)


# --- paths and records ------------------------------------------------------------------------------------


def _fast_sha256() -> "hashlib._Hash":
    import hashlib  # noqa: PLC0415 - 3 ms to load, and ten times as fast: worth it for a large program, which is rare

    return hashlib.sha256()


def _relative(path: str, *, or_top: bool = False) -> str:
    """Return the path relative to the workspace, without doubled slashes and dots; "" is the workspace."""
    if "\0" in path:
        raise InvalidRequestError(f"a path cannot hold a NUL byte: {path!r}")
    if path == INSIDE or path.startswith(INSIDE + "/"):
        path = path.removeprefix(INSIDE).lstrip("/") or "."
    if not path and not or_top:
        raise InvalidRequestError("the path is empty", remedy="name a file of the workspace")
    if path.startswith("/"):
        raise InvalidRequestError(f"{path!r} is not in the workspace", remedy="give a path relative to the workspace")
    parts = [part for part in path.split("/") if part not in {"", "."}]
    if ".." in parts:
        raise InvalidRequestError(f"{path!r} holds `..`", remedy="give a path relative to the workspace, without `..`")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise InvalidRequestError(f"{path!r} is not a file name in this host's encoding") from None
    return "/".join(parts)


def _joined(above: str, below: str) -> str:
    return f"{above}/{below}" if above and below else above or below


def _file_info(path: str, status: os.stat_result) -> FileInfo:
    return FileInfo(
        path=path,
        type=beneath.kind_of(status),
        size=status.st_size,
        mode=stat.S_IMODE(status.st_mode),
        mtime=instant(status.st_mtime),
    )


def _copied_kind(handle: int, path: str) -> beneath.Kind:
    """Whether it is a file or a directory that is to be copied; InvalidRequestError when it cannot be."""
    status = os.fstat(handle)
    reason = beneath.obstacle(beneath.Entry(path, status, handle))
    if reason:
        raise InvalidRequestError(f"{path!r} {reason}", remedy="name a file or folder that may be read")
    return beneath.kind_of(status)


def _copy_out(folder: int, parent: int, name: str, left_out: Callable[[str], None] | None) -> int:
    missing: list[str] = []
    report = left_out or missing.append

    def fit() -> Iterator[beneath.Entry]:
        for entry in beneath.walk(folder, limit=MOST_COPIED):
            reason = beneath.obstacle(entry)
            if reason:
                report(f"{entry.path!r} {reason}")
            else:
                yield entry

    copied = sum(size for _, size in beneath.copy_folder(folder, fit(), parent, name, None))
    if missing:
        more = f"; and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
        raise InvalidRequestError(f"all was copied but this: {'; '.join(missing[:MOST_NAMED])}{more}")
    return copied


# --- what an errno means to a user ------------------------------------------------------------------------

_Failures = Mapping[int, tuple[type[JhansiError], str]]

_LEADS_OUT = "is, or lies behind, a link that leads out of the workspace (or an absolute one)"
_GOES_ROUND = "is, or lies behind, a link that goes round in circles, or one where none may be"
_FULL = "cannot be written: the disk, or a quota on it, is full; what was there is as it was"

_FAILURES: _Failures = {
    errno.ENOENT: (NotFoundError, "is not there"),
    errno.ENOTDIR: (InvalidRequestError, "lies behind something that is not a folder, or is itself not one"),
    errno.EISDIR: (ConflictError, "is a folder already"),
    errno.EEXIST: (ConflictError, "is there already"),
    errno.ENOTEMPTY: (ConflictError, "is being written to by a running program"),
    errno.EAGAIN: (ConflictError, "is held by a running program"),
    errno.EXDEV: (InvalidRequestError, _LEADS_OUT),
    errno.ELOOP: (InvalidRequestError, _GOES_ROUND),
    errno.EACCES: (InvalidRequestError, "may not be touched: the permissions of it or of a folder above forbid that"),
    errno.EPERM: (InvalidRequestError, "may not be touched: it belongs to someone else, or is immutable"),
    errno.ENAMETOOLONG: (InvalidRequestError, "is longer than a path may be"),
    errno.ENOSPC: (DiskLimitError, _FULL),
    errno.EDQUOT: (DiskLimitError, _FULL),
    errno.EFBIG: (DiskLimitError, "would be larger than a file may be here; what was there is as it was"),
    errno.EROFS: (JhansiError, "lies on a file system that is read-only"),
    errno.EIO: (JhansiError, "cannot be read or written: the disk reports an error"),
}
_PROGRAM_FAILURES: _Failures = {
    **_FAILURES,
    errno.ENOENT: (ProgramMissingError, "is not in the workspace"),
    errno.ENOTDIR: (ProgramMissingError, "is not in the workspace"),
    errno.ENAMETOOLONG: (ProgramMissingError, "is not in the workspace: no path is that long"),
    errno.EXDEV: (NotExecutableError, _LEADS_OUT),
    errno.ELOOP: (NotExecutableError, _GOES_ROUND),
    errno.EACCES: (NotExecutableError, "may not be read: the permissions of it or of a folder above forbid that"),
    errno.EAGAIN: (NotExecutableError, "is held by a running program"),
}


@contextmanager
def explained(path: str, failures: _Failures = _FAILURES) -> Iterator[None]:
    """Turn an OSError into what it means for this path; one that means nothing to a user stays what it is."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.errno not in failures:
            raise
        kind, meaning = failures[error.errno]
        raise kind(f"{path!r} {meaning}") from error
