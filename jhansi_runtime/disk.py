"""How much a workspace holds: measured, and watched while a job fills it.

The workspace is hostile, and a job may be changing it meanwhile. A walk opens folders by a single name that is not
followed, and nothing else; it recurses nowhere, holds few descriptors and builds no path, so no depth is too deep for
it. A folder that a job has shut is open for as long as the walk is in it.
"""

import errno
import os
import stat
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Literal, NamedTuple

from jhansi_runtime import beneath
from jhansi_runtime.errors import DiskLimitError
from jhansi_runtime.quantities import size_text
from jhansi_runtime.spec import Limits

__all__ = ["Usage", "Watch", "allowed", "ended_message", "measure", "refusal"]

PERIOD = 0.1  # seconds between two looks of a watch, at least
REST = 20  # times as long as a look took, nobody looks again: a watch takes a twentieth of a CPU at most
SLICE = 0.005  # seconds that one call of `look` takes, about

BLOCK = 512  # of st_blocks, whatever the file system's own is (stat(2))
_STEP = 32  # entries from one look at the clock to the next
_HELD = 8  # open folders, beside the top
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_HANDLE = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ENTER = stat.S_IRUSR | stat.S_IXUSR
# What a folder can turn into between the moment it was seen and the moment it is opened; or it may not be entered.
_CLOSED = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE, errno.EACCES, errno.EPERM})


class Usage(NamedTuple):
    """What there is below a folder, or what may be: bytes, and entries of every kind.

    A sparse file counts with its whole size, for that it would be wherever it is copied to; a file of several names
    counts its bytes once.
    """

    bytes: int
    files: int

    def fits(self, most: "Usage") -> bool:
        """Whether neither is more than that."""
        return self.bytes <= most.bytes and self.files <= most.files


def allowed(limits: Limits) -> Usage:
    """What a workspace may hold."""
    return Usage(limits.disk, limits.disk_files)


def measure(top: int, most: Usage) -> Usage:
    """What the folder of an O_PATH descriptor holds. As soon as that is more than `most`, no more of it is counted."""
    with closing(_Walk(top, most)) as walk:
        walk.advance(float("inf"))
        return walk.usage


def refusal(usage: Usage, most: Usage) -> DiskLimitError:
    """What to tell one who would change a workspace that holds, or would hold, at least `usage`."""
    return DiskLimitError(
        f"no room in the workspace: {_text(usage)} or more is beyond its limit of {_text(most)}",
        remedy="remove some, with a larger limit for just that: jhansi-run exec --disk SIZE --disk-files NUMBER "
        "--command SB -- rm -r PATH; over HTTP: DELETE .../files/PATH; or raise the limit of the sandbox",
    )


def ended_message(most: Usage) -> str:
    """What the result of an exec says that has reached the limit."""
    return (
        f"ended at the disk limit of {_text(most)}; the files are kept: remove some before the next exec, "
        "or raise it with --disk and --disk-files"
    )


def _text(usage: Usage) -> str:
    return f"{size_text(usage.bytes)} in {usage.files:,} files"


# --- while a job runs -------------------------------------------------------------------------------------


class Watch:
    """Looks, again and again, whether a workspace holds more than it may. To be closed at the end."""

    def __init__(self, top: int, most: Usage) -> None:
        self._top = top
        self._most = most
        self._due = time.monotonic() + PERIOD
        self._walk: _Walk | None = None
        self._spent = 0.0
        self._is_suspect = False

    def due_in(self) -> float:
        """Seconds until `look` has something to do."""
        return max(0.0, self._due - time.monotonic())

    def look(self) -> Literal["disk_limit"] | None:
        """Look on for a few milliseconds, if it is time, and say whether it holds too much.

        What a job moves during a walk may be counted twice, so only a second walk says that it is too much.
        """
        began = time.monotonic()
        if began < self._due:
            return None
        if self._walk is None:
            self._walk, self._spent = _Walk(self._top, self._most), 0.0
        is_done = self._walk.advance(SLICE)
        now = time.monotonic()
        self._spent += now - began
        if not is_done:
            return None
        usage = self._walk.usage
        self.close()
        if not usage.fits(self._most):
            if self._is_suspect:
                return "disk_limit"
            self._is_suspect = True
            return None
        self._is_suspect = False
        self._due = now + max(PERIOD, REST * self._spent)
        return None

    def close(self) -> None:
        """Give up a walk that is under way: the folders it has opened are shut again."""
        walk, self._walk = self._walk, None
        if walk is not None:
            walk.close()


# --- walking ----------------------------------------------------------------------------------------------


class _Folder:
    """A folder that a walk is in: open, or -1 to be found again from below. shut is the mode to be put back, if any."""

    def __init__(self, fd: int, identity: tuple[int, int], shut: int | None) -> None:
        self.fd = fd
        self.identity = identity
        self.shut = shut
        self.inner: list[str] = []  # the folders in it that are still to be entered

    def find_above(self, below: int) -> bool:
        """Open it again, from a folder that was found in it. Says whether it is still above that."""
        try:
            fd = os.open("..", _DIRECTORY, dir_fd=below)
        except OSError as error:
            if error.errno not in _CLOSED:
                raise
            return False
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != self.identity:
            os.close(fd)
            return False
        self.fd = fd
        return True

    def let_go(self) -> None:
        """Close it for now."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def close(self) -> None:
        """Close it, and shut it if it was shut."""
        if self.fd < 0:
            return
        if self.shut is not None and stat.S_IMODE(os.fstat(self.fd).st_mode) == self.shut | _ENTER:
            os.fchmod(self.fd, self.shut)
        os.close(self.fd)
        self.fd = -1


class _Walk:
    """One count of all below a folder, in steps."""

    def __init__(self, top: int, most: Usage) -> None:
        self.usage = Usage(0, 0)
        self._most = most
        self._named: set[tuple[int, int]] = set()  # files of several names that were counted
        self._path: list[_Folder] = []  # from the top to the folder that is being counted
        self._steps = self._step(top)

    def advance(self, seconds: float) -> bool:
        """Count on for so long, and say whether this is the end."""
        deadline = time.monotonic() + seconds
        return all(time.monotonic() < deadline for _ in self._steps)

    def close(self) -> None:
        """Close all that is open, and shut what was shut."""
        self._steps.close()
        shut = next((depth for depth, folder in enumerate(self._path) if folder.shut is not None), len(self._path))
        while len(self._path) > shut:
            self._leave()
        for folder in self._path:
            folder.close()
        self._path.clear()

    def _step(self, top: int) -> Generator[None, None, None]:
        self._path.append(_entered(top))
        yield from self._count(self._path[-1])
        while self._path and self.usage.fits(self._most):
            yield
            folder = self._path[-1]
            if not folder.inner:
                self._leave()
                continue
            try:
                with beneath.closing(os.open(folder.inner.pop(), _HANDLE, dir_fd=folder.fd)) as handle:
                    below = _entered(handle)
            except OSError as error:
                if error.errno not in _CLOSED:
                    raise
                continue
            if len(self._path) > _HELD:
                self._path[-_HELD].let_go()
            self._path.append(below)
            yield from self._count(below)

    def _count(self, folder: _Folder) -> Iterator[None]:
        """Count what is in one folder."""
        size, files = self.usage
        most_size, most_files = self._most
        with os.scandir(folder.fd) as entries:
            for entry in entries:
                try:
                    status = entry.stat(follow_symlinks=False)
                except (FileNotFoundError, PermissionError):  # gone; or a folder that a job has shut again
                    continue
                files += 1
                if stat.S_ISDIR(status.st_mode):
                    folder.inner.append(entry.name)
                if status.st_nlink == 1 or self._is_new(status):
                    size += max(status.st_size, status.st_blocks * BLOCK)
                if size > most_size or files > most_files:
                    break
                if files % _STEP == 0:
                    self.usage = Usage(size, files)
                    yield
        self.usage = Usage(size, files)

    def _is_new(self, status: os.stat_result) -> bool:
        """Whether this is the first name that was met of a file that has several."""
        if stat.S_ISDIR(status.st_mode):
            return True
        identity = (status.st_dev, status.st_ino)
        if identity in self._named:
            return False
        self._named.add(identity)
        return True

    def _leave(self) -> None:
        """Go back to the folder above.

        Where a job has moved what we are in, that may not be above any more: the walk goes on from the top.
        """
        left = self._path.pop()
        try:
            if self._path and self._path[-1].fd < 0 and not self._path[-1].find_above(left.fd):
                del self._path[1:]
        finally:
            left.close()


def _entered(handle: int) -> _Folder:
    """Open a folder to count what is in it. Where its owner, who is us, has no access, he gets some."""
    status = os.fstat(handle)
    mode, user = stat.S_IMODE(status.st_mode), os.geteuid()
    shut = mode if mode & _ENTER != _ENTER and user == status.st_uid != 0 else None
    place = f"/proc/self/fd/{handle}"  # fchmod(2) refuses an O_PATH descriptor
    if shut is not None:
        os.chmod(place, mode | _ENTER)
    try:
        fd = os.open(".", _DIRECTORY, dir_fd=handle)
    except OSError:
        if shut is not None:
            os.chmod(place, shut)
        raise
    return _Folder(fd, (status.st_dev, status.st_ino), shut)
