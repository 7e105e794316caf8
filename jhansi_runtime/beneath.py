"""Files beneath one directory, reached by its descriptor: opened, walked, made, copied and removed.

Somebody hostile may have shaped what lies there, and may be changing it meanwhile. Three habits make that harmless:
- a path is resolved in one openat2(2) call that cannot leave the directory, or is a single name that is not followed;
- what was found is held by an O_PATH descriptor and looked at before it is opened, so no FIFO or device ever is;
- nothing recurses and few descriptors are held, however deep and wide the tree.

All of it raises OSError; workspace.py says what that means to a user. `owner` is the id that everything made belongs
to, or None for that of this process.
"""

import errno
import os
import stat
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal, NamedTuple

from jhansi_runtime.errors import InvalidRequestError
from jhansi_runtime.isolation.syscalls import RESOLVE_BENEATH, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, openat2

__all__ = [
    "Draft",
    "Entry",
    "Kind",
    "chunks",
    "closing",
    "copy_file",
    "copy_folder",
    "drafting",
    "kind_of",
    "make_directories",
    "make_directory",
    "nearest_directory",
    "obstacle",
    "open_directory",
    "open_path",
    "publish",
    "refuse_long_names",
    "remove",
    "reopen",
    "replacing",
    "unlock",
    "walk",
    "write_all",
]

Kind = Literal["file", "directory", "link", "fifo", "socket", "device"]

CHUNK = 1024 * 1024
_NAME_MAX = 255
DEEPEST = 4095 - 256  # bytes of a folder's path: with one more name it is still a path (PATH_MAX, NAME_MAX)
PASSES = 16  # over a folder that a job fills while it is being removed

_KINDS: dict[int, Kind] = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "link",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_BENEATH = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS
_HANDLE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
# What a path can turn into between the moment its folder was listed and the moment it is opened.
_CHANGED = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE})


class Entry(NamedTuple):
    """One thing below a walked folder. path is relative to that folder; status is its own, never a link's target's.

    handle is an O_PATH descriptor of it, good until the next step of the walk. closed says why a folder could not be
    entered, and is empty where it could.
    """

    path: str
    status: os.stat_result
    handle: int
    closed: str = ""


class Draft(NamedTuple):
    """A file that is being made: open for writing as `fd`, under `name` in a folder, or "" where it needs none yet."""

    fd: int
    folder: int
    name: str


def kind_of(status: os.stat_result) -> Kind:
    """What kind of file it is."""
    return _KINDS[stat.S_IFMT(status.st_mode)]


@contextmanager
def closing(fd: int) -> Iterator[int]:
    """Hold a descriptor and close it at the end."""
    try:
        yield fd
    finally:
        os.close(fd)


# --- opening ----------------------------------------------------------------------------------------------


def open_path(top: int, path: str, *, follow: bool) -> int:
    """O_PATH descriptor of what `path` names beneath `top`; "" is `top` itself.

    follow allows links, as long as they stay beneath. Without it a link on the way is ELOOP, and one at the end is
    what gets opened.
    """
    if follow:
        return openat2(top, path or ".", os.O_PATH, resolve=_BENEATH)
    return openat2(top, path or ".", _HANDLE, resolve=_BENEATH | RESOLVE_NO_SYMLINKS)


def open_directory(top: int, path: str) -> int:
    """O_PATH descriptor of the folder `path` beneath `top`. ELOOP for any link, ENOTDIR for what is no folder."""
    return openat2(top, path or ".", os.O_PATH | os.O_DIRECTORY, resolve=_BENEATH | RESOLVE_NO_SYMLINKS)


def nearest_directory(top: int, path: str) -> int:
    """O_PATH descriptor of the folder `path` beneath `top` or, where that is missing, of the nearest one above it."""
    while True:
        try:
            return open_directory(top, path)
        except FileNotFoundError:
            if not path:
                raise
            path = os.path.dirname(path)


def reopen(handle: int) -> int:
    """Open for reading the regular file that an O_PATH descriptor holds: that one, whatever its name leads to by now.

    O_NONBLOCK, because a job may hold a lease on its file that would keep us waiting for 45 seconds (fcntl(2),
    F_SETLEASE): that is EAGAIN instead.
    """
    return os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def unlock(handle: int) -> None:
    """Give the owner of the folder that an O_PATH descriptor holds full access to it."""
    mode = stat.S_IMODE(os.fstat(handle).st_mode)
    if mode & stat.S_IRWXU != stat.S_IRWXU:
        os.chmod(f"/proc/self/fd/{handle}", mode | stat.S_IRWXU)  # fchmod(2) refuses an O_PATH descriptor


def chunks(fd: int, size: int) -> Iterator[bytes]:
    """Yield the content of an open file, up to the size it had: one that grows while it is read comes to an end."""
    while chunk := os.read(fd, min(size, CHUNK)):
        size -= len(chunk)
        yield chunk


def write_all(fd: int, data: bytes) -> None:
    """Write all of it: write(2) may take less, as it does just before the disk is full."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


# --- walking ----------------------------------------------------------------------------------------------


def walk(folder: int, *, limit: int, recursive: bool = True) -> Generator[Entry, None, None]:
    """Everything below the folder, each folder before what is in it, in the order of names.

    Unless recursive, only what is in the folder itself.
    What vanishes meanwhile is left out. InvalidRequestError once there are more than `limit` entries.
    Whoever lets something else go through it closes it, for that may fail half way: until then an entry is held open.
    """
    pending, seen = _names(folder, "", limit), 0
    while pending:
        path = pending.pop()
        seen += 1
        try:
            handle = open_path(folder, path, follow=False)
        except OSError as error:
            if error.errno not in _CHANGED:
                raise
            continue
        with closing(handle):
            status, closed = os.fstat(handle), ""
            if recursive and stat.S_ISDIR(status.st_mode):
                try:
                    pending += _names(handle, path + "/", limit - seen - len(pending))
                except FileNotFoundError:
                    continue
                except PermissionError:
                    closed = "it may not be read"
                except _TooDeepError:
                    closed = "what is in it lies too deep to have a path"
            yield Entry(path, status, handle, closed)


def obstacle(entry: Entry) -> str:
    """Why an entry of a walk cannot be copied, or nothing.

    A link can be when it is relative and leads to a place in the folder that is walked: `..` may only come first,
    where no other link can change what it means.
    """
    kind = kind_of(entry.status)
    if kind == "link":
        target = os.readlink("", dir_fd=entry.handle)
        parts = target.split("/")
        climbed = next((number for number, part in enumerate(parts) if part != ".."), len(parts))
        if target.startswith("/") or ".." in parts[climbed:] or climbed > entry.path.count("/"):
            return f"is a link that leads out of the folder, to {target!r}"
        return ""
    if kind not in {"file", "directory"}:
        return f"is a {kind}"
    if entry.closed:
        return f"is a directory that cannot be entered: {entry.closed}"
    return "" if os.access(f"/proc/self/fd/{entry.handle}", os.R_OK) else f"is a {kind} that may not be read"


class _TooDeepError(Exception):
    """What lies in a folder has paths that no system call takes."""


def _names(folder: int, prefix: str, room: int) -> list[str]:
    """Paths of what is in a folder, last name first, so that a walk can take them from the end."""
    with closing(os.open(".", _DIRECTORY, dir_fd=folder)) as listed, os.scandir(listed) as entries:
        names: list[str] = []
        for entry in entries:
            if len(names) == room:
                raise InvalidRequestError("there are too many files below this folder", remedy="name a folder within")
            names.append(entry.name)
    if names and len(os.fsencode(prefix)) > DEEPEST:
        raise _TooDeepError
    names.sort(reverse=True)
    return [prefix + name for name in names]


# --- making -----------------------------------------------------------------------------------------------


def refuse_long_names(path: str) -> None:
    """Raise ENAMETOOLONG for a path with a name that no file can have, before anything is made on the way."""
    if any(len(os.fsencode(name)) > _NAME_MAX for name in path.split("/")):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), path)


def make_directories(top: int, path: str, owner: int | None) -> int:
    """Return an O_PATH descriptor of the folder `path` beneath `top`, made with all above it where missing."""
    with suppress(FileNotFoundError):
        return open_directory(top, path)
    folder = open_directory(top, "")
    for name in path.split("/"):
        with closing(folder):
            folder = make_directory(folder, name, owner)
    return folder


def make_directory(parent: int, name: str, owner: int | None) -> int:
    """Return an O_PATH descriptor of the folder `name`, made where missing."""
    with suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=parent)
        with closing(os.open(name, _DIRECTORY, dir_fd=parent)) as made:
            _settle(made, owner, 0o755)
    return os.open(name, _HANDLE | os.O_DIRECTORY, dir_fd=parent)


@contextmanager
def replacing(parent: int, name: str, owner: int | None, mode: int) -> Iterator[int]:
    """A new file to write to, which takes the place of `name` when the block ends, and is gone if it fails.

    Nobody ever sees half of it under that name.
    """
    with drafting(parent, owner, mode) as draft:
        yield draft.fd
        publish(draft, parent, name)


@contextmanager
def drafting(folder: int, owner: int | None, mode: int) -> Iterator[Draft]:
    """Within: a new file to write to, on the disk of `folder`, which is gone at the end unless it was published.

    It has no name (open(2), O_TMPFILE), so nobody else reaches it, and it goes with a process that is killed. On a
    file system that knows no such files it is `.jhansi-` and sixteen digits in the folder.
    """
    flags, name = os.O_WRONLY | os.O_CLOEXEC, ""
    try:
        fd = os.open(".", flags | os.O_TMPFILE, 0o600, dir_fd=folder)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        name = _temporary_name()
        fd = os.open(name, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=folder)
    with closing(fd):
        try:
            _settle(fd, owner, mode)
            yield Draft(fd, folder, name)
        finally:
            if name:
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder)


def publish(draft: Draft, parent: int, name: str, *, replace: bool = True) -> None:
    """Give a draft its name in a folder of the same disk, whole and at once.

    FileExistsError when something has that name already and it is not to be replaced.
    """
    if draft.name and replace:
        os.rename(draft.name, name, src_dir_fd=draft.folder, dst_dir_fd=parent)
        return
    if draft.name:
        os.link(draft.name, name, src_dir_fd=draft.folder, dst_dir_fd=parent, follow_symlinks=False)
        return
    nameless = f"/proc/self/fd/{draft.fd}"
    try:
        os.link(nameless, name, dst_dir_fd=parent)
    except FileExistsError:
        if not replace:
            raise
        # linkat(2) replaces nothing, and rename(2) takes nothing without a name.
        temporary = _temporary_name()
        os.link(nameless, temporary, dst_dir_fd=parent)
        try:
            os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=parent)


def _temporary_name() -> str:
    return f".jhansi-{os.urandom(8).hex()}"


def _make_link(parent: int, name: str, target: str, owner: int | None) -> None:
    temporary = _temporary_name()
    os.symlink(target, temporary, dir_fd=parent)
    try:
        if owner is not None:
            os.chown(temporary, owner, owner, dir_fd=parent, follow_symlinks=False)
        os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=parent)


def _settle(fd: int, owner: int | None, mode: int) -> None:
    """Give a new file to its owner, with exactly these permission bits: whatever the umask, and never setuid."""
    if owner is not None:
        os.fchown(fd, owner, owner)
    os.fchmod(fd, mode & 0o777)


# --- copying ----------------------------------------------------------------------------------------------


def copy_file(source: int, parent: int, name: str, owner: int | None) -> int:
    """Copy the regular file of an O_PATH descriptor, its permissions and its time of change. Returns its bytes."""
    with closing(reopen(source)) as content:
        status = os.fstat(content)
        with replacing(parent, name, owner, status.st_mode) as fd:
            size = _copy_content(content, fd, status.st_size)
            os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))
    return size


def copy_folder(
    source: int, entries: Iterable[Entry], parent: int, name: str, owner: int | None
) -> Iterator[tuple[str, int]]:
    """Copy a folder, and the entries of a walk through it, to `name` in another; yields each path and its bytes.

    "" is the folder itself, and comes first. No entry may have an obstacle. Folders get their permissions and times at
    the end: one that may not be written to could not be filled.
    """
    with closing(make_directory(parent, name, owner)) as target:
        unlock(target)
        yield "", 0
        folders = [("", os.fstat(source))]
        for entry in entries:
            yield entry.path, _copy_entry(entry, target, owner)
            if stat.S_ISDIR(entry.status.st_mode):
                folders.append((entry.path, entry.status))
        for path, status in reversed(folders):
            with closing(open_directory(target, path)) as handle:
                place = f"/proc/self/fd/{handle}"
                os.chmod(place, status.st_mode & 0o777)
                os.utime(place, ns=(status.st_atime_ns, status.st_mtime_ns))


def _copy_entry(entry: Entry, target: int, owner: int | None) -> int:
    """Copy one entry to the same path beneath `target`; the folder that holds it is there. Returns bytes of content."""
    above, name = os.path.split(entry.path)
    with closing(open_directory(target, above)) as parent:
        match kind_of(entry.status):
            case "directory":
                with closing(make_directory(parent, name, owner)) as folder:
                    unlock(folder)
                return 0
            case "link":
                _make_link(parent, name, os.readlink("", dir_fd=entry.handle), owner)
                return 0
            case _:
                return copy_file(entry.handle, parent, name, owner)


def _copy_content(source: int, target: int, size: int) -> int:
    """Copy up to `size` bytes within the kernel and leave the holes of a sparse file holes. Returns the bytes."""
    if size == 0:  # or a file of /proc, whose size is not known before it is read
        for chunk in iter(lambda: os.read(source, CHUNK), b""):
            write_all(target, chunk)
            size += len(chunk)
        return size
    position = 0
    while position < size:
        try:
            position = os.lseek(source, position, os.SEEK_DATA)
            end = min(os.lseek(source, position, os.SEEK_HOLE), size)
        except OSError as error:
            if error.errno != errno.ENXIO:  # ENXIO: nothing but a hole until the end
                raise
            break
        os.lseek(target, position, os.SEEK_SET)
        while position < end:
            copied = os.sendfile(target, source, position, end - position)
            if copied == 0:  # it was cut short meanwhile
                return position
            position += copied
    os.ftruncate(target, size)
    return size


# --- removing ---------------------------------------------------------------------------------------------


def remove(parent: int, name: str) -> None:
    """Remove an entry of the directory `parent` with all below it, whatever its shape and modes.

    Folders in the way are moved up into the one that is being removed and emptied there one by one, so neither
    depth nor number costs descriptors or memory. OSError ENOTEMPTY when a job fills it faster than that.
    """
    try:
        os.unlink(name, dir_fd=parent)
    except IsADirectoryError:
        _unlock(parent, name)
        mark = f".removing-{os.urandom(8).hex()}-"
        with closing(os.open(name, _DIRECTORY, dir_fd=parent)) as top:
            moved = _empty(top, top, mark, 0)
            done = 0
            while done < moved:
                folder = f"{mark}{done}"
                with closing(os.open(folder, _DIRECTORY, dir_fd=top)) as emptied:
                    moved = _empty(emptied, top, mark, moved)
                _remove_emptied(top, folder)
                done += 1
        _remove_emptied(parent, name)


def _empty(folder: int, top: int, mark: str, moved: int) -> int:
    """Remove what is in a folder; move folders that hold something to `top` as mark0, mark1 ... Returns their count."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                with suppress(FileNotFoundError):
                    os.unlink(entry.name, dir_fd=folder)
            elif not entry.name.startswith(mark) and not _remove_empty(folder, entry.name):
                _unlock(folder, entry.name)  # rename(2): moving a folder elsewhere takes the right to write to it
                try:
                    os.rename(entry.name, f"{mark}{moved}", src_dir_fd=folder, dst_dir_fd=top)
                except OSError as error:
                    if error.errno != errno.EXDEV:
                        raise
                    remove(folder, entry.name)  # overlayfs moves no folder of a lower layer, which no job has made
                else:
                    moved += 1
    return moved


def _remove_empty(parent: int, name: str) -> bool:
    """Remove a folder if nothing is in it, and say whether it is gone."""
    try:
        os.rmdir(name, dir_fd=parent)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        return False
    return True


def _remove_emptied(parent: int, name: str) -> None:
    """Remove a folder that was emptied, and the little that came into it since."""
    for _ in range(PASSES):
        if _remove_empty(parent, name):
            return
        with closing(os.open(name, _DIRECTORY, dir_fd=parent)) as folder, os.scandir(folder) as entries:
            for entry in entries:
                remove(folder, entry.name)
    raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), name)


def _unlock(parent: int, name: str) -> None:
    with closing(os.open(name, _HANDLE | os.O_DIRECTORY, dir_fd=parent)) as handle:
        unlock(handle)
