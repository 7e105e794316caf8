"""Unpack a tar whose author wants out: every name is resolved by descriptor beneath one directory.

The standard library parses headers and nothing more; its extraction follows links. Here a parent directory is
opened with openat2(2) and RESOLVE_BENEATH, so a link that an earlier member planted is followed only while it stays
inside (/bin -> usr/bin does), and the last component is created afresh, never opened through. What an archive may not
have at all is refused with HostileArchiveError: names with `..`, absolute names, hard links that lead out, more of
anything than Limits allows. What is harmless once it is left out is left out, and reported in Unpacked.inert:
device nodes, FIFOs, sockets, setuid and setgid bits. Ownership and extended attributes (file capabilities among
them) are never restored.

Nothing is cleaned up here: the caller unpacks into a directory that nobody has seen yet, and throws it away on error.
"""

import errno
import os
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import IO, NamedTuple, Protocol, Self, cast

from jhansi_runtime.errors import DiskLimitError, HostileArchiveError, InvalidRequestError, JhansiError, NotFoundError
from jhansi_runtime.isolation.syscalls import RESOLVE_BENEATH, RESOLVE_NO_MAGICLINKS, openat2

__all__ = ["ByteReader", "Limits", "Unpacked", "decompressed", "open_archive", "unpack"]

_CHUNK = 1 << 18
# The parser holds long names and PAX records in memory, so what may stand between two contents is bounded.
_HEADER_BYTES = 1 << 20
# What a decompressor may be made to allocate: `xz -9` and `zstd --ultra -22` ask for no more.
_WINDOW_BYTES = 1 << 27
_LATEST_MTIME = 1 << 33  # the year 2242: a filesystem may refuse later instants
_MAGIC_BYTES = 6
_INERT_NAMED = 20
_SHOWN_CHARACTERS = 200

_SET_ID = stat.S_ISUID | stat.S_ISGID
_DIRECTORY_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_Path = tuple[bytes, ...]


class Limits(NamedTuple):
    """How much an archive may hold: members, bytes of all contents, bytes of one name, directories above a member."""

    members: int = 250_000
    contents: int = 8 << 30
    name: int = 4095
    depth: int = 128


class Unpacked(NamedTuple):
    """What was unpacked: members, bytes of their contents, and what was made harmless (the first twenty by name)."""

    members: int
    contents: int
    inert: tuple[str, ...]
    inert_count: int


class ByteReader(Protocol):
    """A stream of bytes, read from front to back."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end."""
        ...


@contextmanager
def open_archive(path: str) -> Iterator[ByteReader]:
    """Open a tar, plain or compressed with gzip, xz or zstd, as its first bytes tell, and yield the plain tar.

    NotFoundError when it cannot be opened, InvalidRequestError when it is something else.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - the `with` below closes it; only the opening is guarded
    except OSError as error:
        raise NotFoundError(f"cannot read the archive {path}: {error.strerror}") from None
    with file:
        yield decompressed(file, path)


def decompressed(source: ByteReader, name: str) -> ByteReader:
    """Return the plain tar in a stream, compressed or not as its first bytes tell. It need not be able to seek.

    InvalidRequestError, which calls it `name`, when it is compressed in a way that is not known here.
    """
    whole = _WholeReads(source)
    magic = whole.peek(_MAGIC_BYTES)
    file = cast("IO[bytes]", whole)  # each of these asks read() alone of it, which typeshed does not know
    if magic.startswith(b"\x1f\x8b"):
        return _gzip_reader(file)
    if magic == b"\xfd7zXZ\0":
        return _xz_reader(file)
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        return _zstd_reader(file)
    if magic.startswith((b"BZh", b"PK\x03\x04")):
        raise InvalidRequestError(f"not a .tar, .tar.gz, .tar.xz or .tar.zst: {name}", remedy="repack it as one")
    return whole


def unpack(
    source: ByteReader,
    tree: int,
    *,
    limits: Limits | None = None,
    world_readable: bool = False,
    keep_modes: bool = False,
) -> Unpacked:
    """Unpack a plain tar, read to its very end, beneath the directory that the descriptor `tree` names.

    The owner may read and write everything, and nobody else may write; world_readable lets every user read all of it
    (chmod a+rX). With keep_modes the permissions are the archive's instead, but for a directory, which its owner may
    always enter and fill. Errors name the member: HostileArchiveError as in the module's first lines,
    InvalidRequestError for an archive that is damaged or cut short, DiskLimitError when the disk is full.
    """
    limits = limits or Limits()
    members = contents = 0
    with _Tree(tree, limits, world_readable=world_readable, keep_modes=keep_modes) as place:
        for archive, member in _members(source, limits):
            members += 1
            contents += member.size if member.isreg() else 0
            if members > limits.members:
                raise HostileArchiveError(f"the archive has more than {limits.members} members")
            if contents > limits.contents:
                raise HostileArchiveError(f"the archive unpacks to more than {limits.contents} bytes")
            try:
                place.add(archive, member)
            except OSError as error:
                raise _explained(error, member.name) from None
        return Unpacked(members, contents, tuple(place.inert), place.inert_count)


# --- decompression ----------------------------------------------------------------------------------------


class _WholeReads:
    """A stream whose read() gives fewer bytes than asked for at its end alone, as gzip.GzipFile relies on."""

    def __init__(self, source: ByteReader) -> None:
        self._source = source
        self._ahead = b""

    def peek(self, size: int) -> bytes:
        """Return what the next read() of that size will."""
        self._ahead = self.read(size)
        return self._ahead

    def read(self, size: int, /) -> bytes:
        """`size` bytes; fewer only at the end."""
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        parts, missing = [data], size - len(data)
        while missing and (part := self._source.read(missing)):
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)


class _Checked:
    """A decompressing reader whose own exceptions for damaged input become InvalidRequestError."""

    def __init__(self, reader: ByteReader, *damage: type[Exception]) -> None:
        self._reader = reader
        self._damage = damage

    def read(self, size: int, /) -> bytes:
        try:
            return self._reader.read(size)
        except self._damage as error:
            raise _damaged(error) from None


def _gzip_reader(file: IO[bytes]) -> ByteReader:
    import gzip  # noqa: PLC0415 - only for archives that need it
    import zlib  # noqa: PLC0415 - likewise

    return _Checked(gzip.GzipFile(fileobj=file), gzip.BadGzipFile, EOFError, zlib.error)


def _zstd_reader(file: IO[bytes]) -> ByteReader:
    import sys  # noqa: PLC0415 - to choose, as mypy understands it

    if sys.version_info >= (3, 14):
        from compression import zstd  # noqa: PLC0415 - only for archives that need it

        options = {zstd.DecompressionParameter.window_log_max: _WINDOW_BYTES.bit_length() - 1}
        return _Checked(zstd.ZstdFile(file, options=options), zstd.ZstdError, EOFError)
    import zstandard  # noqa: PLC0415 - only for archives that need it

    decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES)
    return _Checked(decompressor.stream_reader(file, read_across_frames=True), zstandard.ZstdError)


def _xz_reader(file: IO[bytes]) -> ByteReader:
    import lzma  # noqa: PLC0415 - only for archives that need it

    class XzReader:
        """lzma.LZMAFile with a bound on memory: a header can ask for a dictionary of four gigabytes."""

        def __init__(self) -> None:
            self._decompressor = self._fresh()

        @staticmethod
        def _fresh() -> lzma.LZMADecompressor:
            return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_WINDOW_BYTES)

        def read(self, size: int, /) -> bytes:
            while True:
                compressed = file.read(_CHUNK) if self._decompressor.needs_input else b""
                if self._decompressor.eof:
                    # Streams may follow one another, with zeros to fill up between them.
                    compressed = (self._decompressor.unused_data + file.read(_CHUNK)).lstrip(b"\0")
                    if not compressed:
                        return b""
                    self._decompressor = self._fresh()
                elif self._decompressor.needs_input and not compressed:
                    raise EOFError("unexpected end of data")
                if data := self._decompressor.decompress(compressed, size):
                    return data

    return _Checked(XzReader(), lzma.LZMAError, EOFError)


# --- parsing ----------------------------------------------------------------------------------------------


class _MeteredStream:
    """What the parser reads, no further than it has a reason to: `allowed` bytes from the start."""

    def __init__(self, source: ByteReader) -> None:
        self._source = source
        self._count = 0
        self.allowed = 0

    def read(self, size: int, /) -> bytes:
        data = self._source.read(min(size, _CHUNK))
        self._count += len(data)
        if self._count > self.allowed:
            raise HostileArchiveError(f"the archive has a header of more than {_HEADER_BYTES} bytes")
        return data

    def allow_up_to(self, offset: int) -> None:
        """Allow all before the member that begins at `offset`, its headers, and what is read ahead."""
        self.allowed = offset + _HEADER_BYTES + _CHUNK


class _Member(tarfile.TarInfo):
    """TarFile.next() takes any damaged header but the first for the end of the archive; here only zeros end it."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined] # typeshed knows only its base class
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tarfile_.offset}") from None


def _members(source: ByteReader, limits: Limits) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    stream = _MeteredStream(source)
    stream.allow_up_to(0)
    encoding = {"encoding": "utf-8", "errors": "surrogateescape"}
    with _parsing():
        # It has nothing to close; and of what it reads from, "r|" asks read() alone, which typeshed does not know.
        archive = tarfile.open(fileobj=stream, mode="r|", bufsize=_CHUNK, tarinfo=_Member, **encoding)  # type: ignore[call-overload] # noqa: SIM115
    start = 0  # not archive.offset: opening it has parsed the first member already
    while True:
        with _parsing():
            member = archive.next()
        if member is None:
            break
        archive.members.clear()  # TarFile keeps every member it has seen
        # What a member takes in the archive may differ from its size, as for a sparse file. The parser skips that
        # step by step, also past the end of the input: for an exabyte it takes years.
        stored = archive.offset - start - _HEADER_BYTES
        if member.size < 0 or max(member.size, stored) > limits.contents:
            raise HostileArchiveError(f"the archive has a member of an impossible size: {_shown(member.name)}")
        start = archive.offset
        stream.allow_up_to(start)
        yield archive, member
    # To the end, so that a decompressor sees its checksum and a program that writes the tar is not cut off.
    stream.allow_up_to(archive.offset + limits.contents)
    while stream.read(_CHUNK):
        pass


@contextmanager
def _parsing() -> Iterator[None]:
    """Turn what tarfile is known to raise over damaged input into InvalidRequestError; a fuzzer found each of them."""
    try:
        yield
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        raise _damaged(error) from None


def _damaged(error: Exception) -> InvalidRequestError:
    return InvalidRequestError(f"the archive is damaged, cut short or no tar: {error}")


# --- writing ----------------------------------------------------------------------------------------------


class _Tree:
    """The directory being filled. Holds one open descriptor: that of the last member's parent."""

    def __init__(self, root: int, limits: Limits, *, world_readable: bool, keep_modes: bool) -> None:
        self.inert: list[str] = []
        self.inert_count = 0
        self._root = root
        self._limits = limits
        self._world_readable = world_readable
        self._keep_modes = keep_modes
        self._parent_path: _Path | None = None
        self._parent_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._forget_parent()

    def add(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Create what the member describes, in place of what an earlier one of that name left, unless a directory."""
        path = self._checked(member.name)
        if not path:
            if not member.isdir():
                raise HostileArchiveError(f"the archive has a member without a name: {_shown(member.name)}")
            return
        parent, name = self._parent(path[:-1]), path[-1]
        if (member.isdir() or member.isreg()) and member.mode & _SET_ID:
            self._leave_out("setuid or setgid bit", member)
        if member.isdir():
            self._make_directory(parent, name, member.mode)
        elif member.isreg():
            self._write_file(parent, name, archive, member)
        elif member.issym():
            self._make_link(parent, name, member)
        elif member.islnk():
            self._make_hard_link(parent, name, member)
        else:
            self._leave_out("device node" if member.isdev() and not member.isfifo() else "special file", member)

    def _make_directory(self, parent: int, name: bytes, mode: int) -> None:
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:
            if not stat.S_ISDIR(os.lstat(name, dir_fd=parent).st_mode):
                os.unlink(name, dir_fd=parent)
                os.mkdir(name, 0o700, dir_fd=parent)
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            os.fchmod(fd, self._permissions(mode | 0o700))
        finally:
            os.close(fd)

    def _write_file(self, parent: int, name: bytes, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        try:
            fd = os.open(name, _CREATE_FLAGS, 0o600, dir_fd=parent)
        except FileExistsError:
            os.unlink(name, dir_fd=parent)
            fd = os.open(name, _CREATE_FLAGS, 0o600, dir_fd=parent)
        with open(fd, "wb") as file:
            content = archive.extractfile(member)
            while content:
                with _parsing():
                    data = content.read(_CHUNK)
                if not data:
                    break
                file.write(data)
            file.flush()
            os.fchmod(fd, self._permissions(member.mode))
            # Python trusts a .pyc only while its source has the mtime that it was compiled from.
            mtime = member.mtime if 0 <= member.mtime <= _LATEST_MTIME else 0  # 0 also for NaN
            os.utime(fd, (mtime, mtime))

    def _make_link(self, parent: int, name: bytes, member: tarfile.TarInfo) -> None:
        target = _encoded(member.linkname)
        if not 0 < len(target) <= self._limits.name:
            raise HostileArchiveError(f"the archive has a link to nowhere: {_shown(member.name)}")
        try:
            os.symlink(target, name, dir_fd=parent)
        except FileExistsError:
            os.unlink(name, dir_fd=parent)
            os.symlink(target, name, dir_fd=parent)

    def _make_hard_link(self, parent: int, name: bytes, member: tarfile.TarInfo) -> None:
        target = self._checked(member.linkname)
        if not target:
            raise HostileArchiveError(f"the archive has a hard link to a directory: {_shown(member.name)}")
        directory = self._open_directory(target[:-1])
        try:
            if stat.S_ISDIR(os.lstat(target[-1], dir_fd=directory).st_mode):
                raise HostileArchiveError(f"the archive has a hard link to a directory: {_shown(member.name)}")
            try:
                os.link(target[-1], name, src_dir_fd=directory, dst_dir_fd=parent, follow_symlinks=False)
            except FileExistsError:
                os.unlink(name, dir_fd=parent)
                os.link(target[-1], name, src_dir_fd=directory, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(directory)

    def _checked(self, name: str) -> _Path:
        encoded = _encoded(name)
        parts = tuple(part for part in encoded.split(b"/") if part not in (b"", b"."))
        if encoded.startswith(b"/"):
            raise HostileArchiveError(f"the archive names an absolute path: {_shown(name)}")
        if b".." in parts:
            raise HostileArchiveError(f"the archive names a path that leads out of the tree: {_shown(name)}")
        if len(encoded) > self._limits.name:
            raise HostileArchiveError(f"the archive has a name of more than {self._limits.name} bytes: {_shown(name)}")
        if len(parts) > self._limits.depth:
            raise HostileArchiveError(f"the archive nests deeper than {self._limits.depth}: {_shown(name)}")
        return parts

    def _parent(self, path: _Path) -> int:
        if path != self._parent_path:
            self._forget_parent()
            self._parent_fd = self._open_or_make(path)
            self._parent_path = path
        return self._parent_fd

    def _open_or_make(self, path: _Path) -> int:
        try:
            return self._open_directory(path)
        except FileNotFoundError:
            if not path:
                raise
        above = self._open_or_make(path[:-1])
        try:
            # Were it there after all it is a link to nothing, and FileExistsError the right answer.
            os.mkdir(path[-1], 0o700, dir_fd=above)
            self._make_directory(above, path[-1], 0o755)
        finally:
            os.close(above)
        return self._open_directory(path)

    def _open_directory(self, path: _Path) -> int:
        resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS
        return openat2(self._root, b"/".join(path) or b".", _DIRECTORY_FLAGS, resolve=resolve)

    def _forget_parent(self) -> None:
        self._parent_path = None
        if self._parent_fd >= 0:
            os.close(self._parent_fd)
            self._parent_fd = -1

    def _permissions(self, mode: int) -> int:
        if self._keep_modes:
            return mode & 0o777
        mode = mode & 0o755 | 0o600
        if self._world_readable:
            mode |= 0o044 | (0o111 if mode & 0o111 else 0)
        return mode

    def _leave_out(self, what: str, member: tarfile.TarInfo) -> None:
        self.inert_count += 1
        if len(self.inert) < _INERT_NAMED:
            self.inert.append(f"{what}: {_shown(member.name)}")


_REASONS = {
    errno.EXDEV: "is reached through a link that leads out of the tree",
    errno.ELOOP: "is reached through links that never end",
    errno.ENOTDIR: "lies below something that is no directory",
    errno.EISDIR: "is there already, as a directory",
    errno.EEXIST: "is reached through a link to nothing",
    errno.ENOENT: "is a hard link to nothing",
    errno.ENAMETOOLONG: "has a name that is too long",
}


def _explained(error: OSError, name: str) -> JhansiError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskLimitError(f"no room to unpack {_shown(name)}: {error.strerror}", remedy="free some disk space")
    if error.errno in _REASONS:
        return HostileArchiveError(f"a member of the archive {_REASONS[error.errno]}: {_shown(name)}")
    return JhansiError(f"cannot unpack {_shown(name)}: {error.strerror}")


def _encoded(name: str) -> bytes:
    encoded = name.encode("utf-8", "surrogateescape")
    if b"\0" in encoded:
        raise HostileArchiveError(f"the archive has a name with a NUL byte: {_shown(name)}")
    return encoded


def _shown(name: str) -> str:
    """A hostile name as a message may show it: quoted, in ASCII, not endless."""
    return ascii(name if len(name) <= _SHOWN_CHARACTERS else f"{name[:_SHOWN_CHARACTERS]}...")
