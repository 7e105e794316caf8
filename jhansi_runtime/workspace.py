"""One workspace: every file that the host touches in it is reached through here, beneath one descriptor.

A workspace belongs to its jobs, so it is hostile, and a job may be running in it at this moment. beneath.py makes
that harmless; this module is what users see of it: paths are text relative to the workspace (surrogate escapes stand
for bytes that are no UTF-8), links that lead out of it are refused, and every failure is a JhansiError.
"""

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, NamedTuple

from jhansi_runtime import beneath
from jhansi_runtime.digest import sha256
from jhansi_runtime.errors import (
    InvalidRequestError,
    JhansiError,
    NotExecutableError,
    PreconditionFailedError,
)
from jhansi_runtime.explanations import PROGRAM_FAILURES, explained
from jhansi_runtime.spec import FileInfo, instant

if TYPE_CHECKING:
    import hashlib

    from jhansi_runtime.archive import ByteReader, Unpacked
    from jhansi_runtime.room import Room

__all__ = ["Opened", "Program", "Upload", "Workspace", "Written", "open_workspace"]

_LARGE = 1024**2
_HEAD = 64 * 1024
LARGEST_PROGRAM = 1024**3  # bytes; it is hashed before every exec
MOST_LISTED = 100_000
MOST_COPIED = 1_000_000
MOST_NAMED = 5  # of what `get` left out, in one message
INSIDE = "/workspace"

_LOCK = "../.writing"  # beside the workspace, so that no job holds it
_CHUNK = 256 * 1024
_CLOCK_REALTIME_COARSE = 5  # of clock_gettime(2): the clock that times of change are taken from, a few ms to a tick
_TICKS = 8
_TICK = 0.002  # seconds


class Program(NamedTuple):
    """The file that an exec runs: its path in the workspace as it was given, what was in it, who may run it.

    head is its first 64 KiB.
    """

    path: str
    sha256: str
    executable: bool
    size: int
    head: bytes


class Written(NamedTuple):
    """A file that was written, its entity tag as of that moment, and whether there was none of that name before."""

    info: FileInfo
    etag: str
    created: bool


class _Wanted(NamedTuple):
    """What must be so for a file to be written, as Workspace.write says."""

    if_match: str | None
    if_none_match: bool


class Opened:
    """A file open for reading, whatever its name leads to by now. Good within the `with` that gave it.

    etag changes with every change of the file (RFC 9110, section 8.8.3): it is strong, but for a file that is being
    written to at this moment, where it is weak (`W/...`) and matches nothing.
    """

    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self._path = path
        status, is_settled = _settled(fd)
        self.info = _file_info(path, status)
        self.etag = _etag(status) if is_settled else f"W/{_etag(status)}"

    def chunks(self, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Yield the bytes from `start` up to, not including, `end`: to the size it had, without one.

        Exactly as many as that. JhansiError when the file was cut short meanwhile.
        """
        end = self.info.size if end is None else end
        while start < end:
            if self._fd < 0:
                raise JhansiError(f"{self._path!r} is not open any more")
            with explained(self._path):
                chunk = os.pread(self._fd, min(end - start, _CHUNK), start)
            if not chunk:
                raise JhansiError(f"{self._path!r} was cut short while it was read", remedy="read it again")
            start += len(chunk)
            yield chunk

    def close(self) -> None:
        """Close the file: there are no more chunks of it."""
        fd, self._fd = self._fd, -1
        os.close(fd)


class Upload:
    """A file that is on its way into a workspace: nobody sees it before `publish`."""

    def __init__(self, add: Callable[[bytes], None], publish: Callable[[], Written]) -> None:
        self._add = add
        self._publish = publish

    def add(self, chunk: bytes) -> None:
        """Write what comes next."""
        self._add(chunk)

    def publish(self) -> Written:
        """Put the file in its place, whole."""
        return self._publish()


class Workspace:
    """The files beneath one descriptor, `fd`, which whoever made this closes. What is made belongs to `owner`.

    Where there is a `room`, nothing is added that it does not take: DiskLimitError.
    """

    def __init__(self, fd: int, *, owner: int | None = None, room: "Room | None" = None) -> None:
        self.fd = fd
        self.owner = owner
        self.room = room

    def open_program(self, path: str) -> Program:
        """Look at the file that is to be run, through links that stay inside, and hash it.

        ProgramMissingError when nothing is there, NotExecutableError when what is there cannot be a program.
        """
        inside = _relative(path)
        with explained(path, PROGRAM_FAILURES), beneath.closing(self._found(inside)) as handle:
            kind = beneath.kind_of(os.fstat(handle))
            if kind != "file":
                raise NotExecutableError(f"{path!r} is a {kind}, not a program")
            with beneath.closing(beneath.reopen(handle)) as content:
                status = os.fstat(content)
                if status.st_size > LARGEST_PROGRAM:
                    raise NotExecutableError(f"{path!r} has {status.st_size} bytes, more than a program may have")
                digest = sha256() if status.st_size < _LARGE else _fast_sha256()
                head = b""
                for chunk in beneath.chunks(content, status.st_size):
                    digest.update(chunk)
                    head = head or chunk[:_HEAD]
        return Program(inside, digest.hexdigest(), bool(status.st_mode & 0o111), status.st_size, head)

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

    def stat(self, path: str) -> FileInfo:
        """What a path names, through links that stay inside; "" is the workspace."""
        inside = _relative(path, or_top=True)
        with explained(path), beneath.closing(self._found(inside)) as handle:
            return _file_info(inside, os.fstat(handle))

    @contextmanager
    def open(self, path: str) -> Iterator[Opened]:
        """Within: a file of the workspace, or one that links inside it lead to, open for reading."""
        inside = _relative(path)
        with explained(path), beneath.closing(self._found(inside)) as handle:
            kind = beneath.kind_of(os.fstat(handle))
            if kind != "file":
                raise InvalidRequestError(f"{path!r} is a {kind}, not a file to read")
            opened = Opened(beneath.reopen(handle), inside)
        with closing(opened):
            yield opened

    def write(
        self,
        path: str,
        chunks: Iterable[bytes],
        *,
        mode: int | None = None,
        if_match: str | None = None,
        if_none_match: bool = False,
    ) -> Written:
        """Make or replace a file, and the folders above it; whoever looks sees the old content or the new, whole.

        The old file is kept when anything fails, and nothing else is left. mode is its permission bits: without it
        those of the file it replaces, or 0644. A link of that name is replaced; one on the way to it is refused.

        PreconditionFailedError unless the file has one of the entity tags in if_match (the value of that header: "*"
        is any), or, with if_none_match, if there is one of that name. Of several who write with the same tag one
        wins, whatever process they are in; a job that writes at this very moment may still be overwritten.
        """
        with self.receive(path, mode=mode, if_match=if_match, if_none_match=if_none_match) as upload:
            for chunk in chunks:
                upload.add(chunk)
            return upload.publish()

    @contextmanager
    def receive(
        self, path: str, *, mode: int | None = None, if_match: str | None = None, if_none_match: bool = False
    ) -> Iterator[Upload]:
        """Within: a file that is made piece by piece, as `write` does; left before it is published, it is gone."""
        inside, wanted = _relative(path), _Wanted(if_match, if_none_match)
        with explained(path):
            beneath.refuse_long_names(inside)
            self._replaceable(inside, wanted)
            self._set_aside(inside, 0)
            with (
                beneath.closing(beneath.nearest_directory(self.fd, os.path.dirname(inside))) as near,
                beneath.drafting(near, self.owner, 0o600) as draft,
            ):

                def add(chunk: bytes) -> None:
                    self._admit(len(chunk), 0)
                    beneath.write_all(draft.fd, chunk)

                yield Upload(add, lambda: self._publish(draft, inside, mode, wanted))

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all that is in it. A link is removed, not what it leads to."""
        above, name = os.path.split(_relative(path))
        if not name:
            raise InvalidRequestError("the workspace itself cannot be removed", remedy="remove the sandbox instead")
        with explained(path), beneath.closing(beneath.open_directory(self.fd, above)) as parent:
            beneath.remove(parent, name)
            if self.room is not None:
                self.room.freed()

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
                    self._set_aside(inside, os.fstat(handle).st_size)
                    beneath.copy_file(handle, parent, name, self.owner)
                    return [self._info(inside)]
                with closing(beneath.walk(handle, limit=MOST_COPIED)) as walked:
                    entries = self._fitting(inside, walked)
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

    def archive(self) -> Iterator[bytes]:
        """Yield a tar of all that is in the workspace; tarball.pack says what is in it."""
        from jhansi_runtime import tarball  # noqa: PLC0415 - tarfile is several ms, and no exec needs it

        with explained(INSIDE):
            yield from tarball.pack(self.fd)

    def unarchive(self, source: "ByteReader") -> "Unpacked":
        """Unpack a tar (plain, gzip, xz or zstd) into the workspace: files replace files, folders are merged into.

        source gives it by read(n), nothing at its end. Modes and times are the archive's; setuid bits, device nodes
        and FIFOs are left out, and told. HostileArchiveError and InvalidRequestError, with the workspace as it was,
        when the archive is damaged, cut short, wants out of the workspace or holds more than archive.Limits;
        ConflictError, likewise, when it has a file where there is a folder, or a folder where there is none but a
        file.
        """
        from jhansi_runtime import tarball  # noqa: PLC0415 - see archive

        with explained(INSIDE):
            return tarball.unpack(source, self.fd, self.owner, self._writing, self._admit)

    def sweep(self) -> None:
        """Remove what an `unarchive` that was killed has left beside the workspace."""
        from jhansi_runtime import tarball  # noqa: PLC0415 - see archive

        with explained(INSIDE), self._writing():
            tarball.sweep(self.fd)

    def _set_aside(self, inside: str, size: int) -> None:
        if self.room is not None:
            self.room.take_for(inside, size)

    def _fitting(self, inside: str, entries: Iterable[beneath.Entry]) -> Iterator[beneath.Entry]:
        """Yield what is to be copied into a folder as long as there is room for it."""
        self._set_aside(inside, 0)
        for entry in entries:
            if self.room is not None:
                self.room.arrived()
            self._set_aside(_joined(inside, entry.path), entry.status.st_size)
            yield entry

    def _admit(self, size: int, files: int) -> None:
        if self.room is not None:
            self.room.take(size, files)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Within: no other `write` or `unarchive`, in whatever process, puts a file in its place."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with beneath.closing(os.open(_LOCK, flags, 0o600, dir_fd=self.fd)) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _publish(self, draft: beneath.Draft, inside: str, mode: int | None, wanted: _Wanted) -> Written:
        """Give what was written its name, if all is as it is wanted."""
        above, name = os.path.split(inside)
        with self._writing():
            old = self._replaceable(inside, wanted)
            if mode is None:
                mode = old.st_mode | 0o600 if old and stat.S_ISREG(old.st_mode) else 0o644
            os.fchmod(draft.fd, mode & 0o777)
            now = time.time_ns()  # finer than the kernel's own, which two writers may share
            os.utime(draft.fd, ns=(now, now))
            with beneath.closing(beneath.make_directories(self.fd, above, self.owner)) as parent:
                try:
                    beneath.publish(draft, parent, name, replace=not wanted.if_none_match)
                except FileExistsError:
                    raise _not_as_wanted(inside, "is there already") from None
            status = os.fstat(draft.fd)
        return Written(_file_info(inside, status), _etag(status), old is None)

    def _replaceable(self, inside: str, wanted: _Wanted) -> os.stat_result | None:
        """Return the status of what is there, or None. An error when it is a folder, or not as it is wanted."""
        try:
            with beneath.closing(beneath.open_path(self.fd, inside, follow=False)) as handle:
                status = os.fstat(handle)
        except FileNotFoundError:
            if wanted.if_match is not None:
                raise _not_as_wanted(inside, "is not there") from None
            return None
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), inside)
        if wanted.if_none_match:
            raise _not_as_wanted(inside, "is there already")
        if wanted.if_match not in {None, "*"} and self._etag_of(inside) not in _tags(wanted.if_match):
            raise _not_as_wanted(inside, "has changed since")
        return status

    def _etag_of(self, inside: str) -> str:
        """Return the entity tag that `open` would show of a file, or "" where it would show nothing."""
        try:
            with beneath.closing(self._found(inside)) as handle:
                status = os.fstat(handle)
        except OSError:  # a link to nothing, or one that leads out
            return ""
        return _etag(status) if stat.S_ISREG(status.st_mode) else ""

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


def _settled(fd: int) -> tuple[os.stat_result, bool]:
    """Return the status of an open file, and whether every later change must make it another.

    Two changes within one tick of the kernel's clock leave the same times, so the tick of the last one is waited for.
    It never ends for a file that is written to all the time.
    """
    for _ in range(_TICKS):
        now = time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)
        status = os.fstat(fd)
        if status.st_ctime_ns < now:
            return status, True
        time.sleep(_TICK)
    return status, False


def _etag(status: os.stat_result) -> str:
    return f'"{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}-{status.st_ctime_ns:x}"'


def _tags(header: str | None) -> list[str]:
    """The entity tags in the value of an If-Match header; none of ours holds a comma."""
    return [tag.strip() for tag in (header or "").split(",")]


def _not_as_wanted(path: str, state: str) -> PreconditionFailedError:
    return PreconditionFailedError(
        f"{path!r} {state}; nothing was written", remedy="look at what is there, then decide"
    )


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

    def fit(walked: Iterable[beneath.Entry]) -> Iterator[beneath.Entry]:
        for entry in walked:
            reason = beneath.obstacle(entry)
            if reason:
                report(f"{entry.path!r} {reason}")
            else:
                yield entry

    with closing(beneath.walk(folder, limit=MOST_COPIED)) as walked:
        copied = sum(size for _, size in beneath.copy_folder(folder, fit(walked), parent, name, None))
    if missing:
        more = f"; and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
        raise InvalidRequestError(f"all was copied but this: {'; '.join(missing[:MOST_NAMED])}{more}")
    return copied
