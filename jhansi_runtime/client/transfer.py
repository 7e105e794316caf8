"""Files of this machine on their way to the server and back, a piece at a time.

A source can be read again from its start when a request has to be sent again. What is received under a name appears
there whole or not at all.
"""

import os
import secrets
import tarfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import BinaryIO

from jhansi_runtime.client.calls import Source
from jhansi_runtime.errors import InvalidRequestError, NotFoundError

__all__ = ["Content", "Local", "Target", "Tree", "content_of", "target"]

CHUNK = 1 << 18

Local = str | os.PathLike[str]
Content = bytes | BinaryIO
Target = Local | BinaryIO


def content_of(content: Content) -> bytes | Source:
    """The body for bytes, or for a file that is open: from where it stands now to its end."""
    return content if isinstance(content, bytes) else _OpenFile(content)


class _OpenFile:
    def __init__(self, file: BinaryIO) -> None:
        self.can_repeat = file.seekable()
        self._file = file
        self._start = file.tell() if self.can_repeat else 0

    def chunks(self) -> Generator[bytes, None, None]:
        if self.can_repeat:
            self._file.seek(self._start)
        while chunk := self._file.read(CHUNK):
            yield chunk


class NamedFile:
    """A file of this machine by its name."""

    can_repeat = True

    def __init__(self, path: Local) -> None:
        self.path = os.fspath(path)

    def chunks(self) -> Generator[bytes, None, None]:
        """The content, as it is when it is read."""
        with _readable(self.path) as file:
            while chunk := file.read(CHUNK):
                yield chunk


class Tree:
    """A file or a folder of this machine as a tar stream, under its own name in the folder `to`.

    Permission bits, times and links as such are kept, owners are not.
    """

    can_repeat = True

    def __init__(self, source: Local, to: str = "") -> None:
        self._source = os.path.abspath(os.fspath(source))
        name = os.path.basename(self._source)
        if not name:
            raise InvalidRequestError(f"{source!r} has no name to put it under", remedy="name a file or a folder in it")
        if not os.path.exists(self._source):
            raise NotFoundError(f"no such file or folder here: {os.fspath(source)}")
        self._name = f"{to.strip('/')}/{name}".lstrip("/")

    def chunks(self) -> Generator[bytes, None, None]:
        """The headers and contents in order of path, and the two empty blocks of an end."""
        top = os.path.realpath(self._source)  # what was named may be a link; what lies in it is sent as it is
        yield from self._member(top, self._name)
        if os.path.isdir(top):
            yield from self._contents(top)
        yield bytes(2 * tarfile.BLOCKSIZE)

    def _contents(self, top: str) -> Iterator[bytes]:
        for folder, folders, files in os.walk(top, onerror=_refuse):
            folders.sort()
            below = os.path.relpath(folder, top)
            inside = self._name if below == os.curdir else f"{self._name}/{below}"
            for name in sorted([*folders, *files]):
                yield from self._member(os.path.join(folder, name), f"{inside}/{name}")

    def _member(self, path: str, name: str) -> Iterator[bytes]:
        status = os.lstat(path)
        info = tarfile.TarInfo(name)
        info.mode, info.mtime = status.st_mode & 0o777, status.st_mtime
        if os.path.islink(path):
            info.type, info.linkname = tarfile.SYMTYPE, os.readlink(path)
        elif os.path.isdir(path):
            info.type = tarfile.DIRTYPE
        elif os.path.isfile(path):
            with _readable(path) as file:
                info.size = os.fstat(file.fileno()).st_size
                yield _header(info)
                yield from _exactly(file, info.size, path)
            return
        else:
            raise InvalidRequestError(f"neither a file, a folder nor a link: {path}", remedy="leave it out")
        yield _header(info)


@contextmanager
def target(output: Target) -> Iterator[BinaryIO]:
    """A file to write what is received to: the one given, or a new one that takes the name `output` at the end."""
    if not isinstance(output, str | os.PathLike):
        yield output
        return
    path = os.path.abspath(os.fspath(output))
    if os.path.isdir(path):
        raise InvalidRequestError(f"{path} is a folder", remedy="name the file to write")
    unfinished = os.path.join(os.path.dirname(path), f".jhansi-{secrets.token_hex(8)}")
    try:
        file = open(unfinished, "xb")  # noqa: SIM115 - closed below, where the failures mean something else
    except OSError as error:
        raise InvalidRequestError(f"cannot write {path}: {error.strerror}") from error
    try:
        with file:
            yield file
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def _readable(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise NotFoundError(f"no such file here: {path}") from None
    except OSError as error:
        raise InvalidRequestError(f"cannot read {path}: {error.strerror}") from error


def _refuse(error: OSError) -> None:
    raise InvalidRequestError(f"cannot read {error.filename}: {error.strerror}")


def _header(info: tarfile.TarInfo) -> bytes:
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _exactly(file: BinaryIO, size: int, path: str) -> Iterator[bytes]:
    """The bytes that the header before them promised, filled up to whole blocks."""
    left = size
    while left:
        chunk = file.read(min(CHUNK, left))
        if not chunk:
            raise InvalidRequestError(f"{path} became shorter while it was read", remedy="try again")
        left -= len(chunk)
        yield chunk
    if padding := -size % tarfile.BLOCKSIZE:
        yield bytes(padding)
