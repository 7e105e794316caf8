"""The room that is left in a workspace for whoever changes it; and what it holds, remembered from one to the next.

A large workspace is not walked before every change: beside it lies a record of what it holds at most, and two rules
make it true. Whoever begins to change the workspace takes a shared lock and removes the record before anything else.
A record is made, empty, only by one who holds that lock alone, and is filled in later through the descriptor: if
somebody has begun since, what is written goes to a file that has no name any more. So whoever is killed, at whatever
point, leaves a true record or none.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

from jhansi_runtime import beneath
from jhansi_runtime.disk import BLOCK, Usage, Watch, measure, refusal

__all__ = ["Change", "Room", "changing"]

MANY = 1000  # files: with fewer, walking them is cheaper than remembering

_LOCK, _RECORD = ".changing", ".holds"
_OWN = os.O_NOFOLLOW | os.O_CLOEXEC
_LONGEST = 256  # bytes of a record
_ENTRY = 4096  # bytes that a name takes beside a file's content, at most: its last block, or a folder's first
_NOTHING = Usage(0, 0)


class Room:
    """What a workspace may still take while somebody changes it. top is its descriptor, most what it may hold.

    What is known of it without a walk is believed as long as that lets a change happen: a refusal is always by a walk.
    """

    def __init__(self, top: int, most: Usage, change: "Change | None" = None) -> None:
        self.most = most
        self._top = top
        self._change = change or Change()
        self._used = self._change.before
        self._is_counted = False  # by a walk, and nothing has come in since
        self._is_large = False
        self._coming = _NOTHING

    def require(self) -> None:
        """DiskLimitError when the workspace holds more than it may."""
        self._check(self._coming)

    def take(self, size: int, files: int) -> None:
        """Set aside so many bytes and entries for what comes next: DiskLimitError when there is not that much room.

        They may be negative, for what will go.
        """
        coming = _sum(self._coming, Usage(size, files))
        if size > 0 or files > 0:
            self._check(coming)
        self._coming = coming

    def take_for(self, path: str, size: int) -> None:
        """Set aside what a file of that size, or a folder, takes at a path, with the missing folders above it.

        What it is to replace will go.
        """
        missing, replaced = 0, 0
        while path:
            try:
                with beneath.closing(beneath.open_path(self._top, path, follow=False)) as handle:
                    status = os.fstat(handle)
            except FileNotFoundError:
                missing += 1
                path = os.path.dirname(path)
                continue
            if missing == 0 and not stat.S_ISDIR(status.st_mode) and status.st_nlink == 1:
                replaced = max(status.st_size, status.st_blocks * BLOCK)
            break
        self.take(size + _ENTRY * max(missing, 1) - replaced, missing)

    def arrived(self) -> None:
        """What room was set aside for is there, and a walk would find it."""
        if self._coming != _NOTHING:
            self._used = None if self._used is None else _sum(self._used, self._coming)
            self._coming, self._is_counted = _NOTHING, False

    def freed(self) -> None:
        """Something has gone: before a refusal it is counted again."""
        self._is_counted = False

    def watch(self) -> Watch:
        """What looks at the workspace while a job runs in it: until `settle`, nobody knows what it holds."""
        self._is_large = self._used is not None and self._used.files > MANY
        self._used = None
        return Watch(self._top, self.most)

    def settle(self) -> Usage:
        """Count what a job has left, after its end. More than `most` is not counted to its end."""
        if self._is_large:
            self._change.mark()
        self._used, self._is_counted = measure(self._top, self.most), True
        return self._used

    def close(self) -> None:
        """Remember what is known for whoever comes next, where a walk would take long."""
        self.arrived()
        if self._used is not None and self._used.files > MANY and self._used.fits(self.most):
            self._change.remember(self._used)

    def _check(self, coming: Usage) -> None:
        wanted = _sum(self._known(), coming)
        if not wanted.fits(self.most) and not self._is_counted:
            self._used = None
            wanted = _sum(self._known(), coming)
        if not wanted.fits(self.most):
            raise refusal(wanted, self.most)

    def _known(self) -> Usage:
        if self._used is None:
            was_marked = self._change.is_marked()
            self._used, self._is_counted = measure(self._top, self.most), True
            is_worth_it = self._used.files > MANY and self._used.fits(self.most)
            if is_worth_it and not was_marked and self._change.mark():
                self._used = measure(self._top, self.most)  # what others have changed before the mark counts too
        return self._used


def _sum(one: Usage, other: Usage) -> Usage:
    return Usage(one.bytes + other.bytes, one.files + other.files)


class Change:
    """The record of a workspace while somebody changes it, from before the first change until after the last.

    before is what the workspace held at most when this began, None if nobody knows. beside is the folder of the
    record, and lock the descriptor of its lock; without them nothing is remembered.
    """

    def __init__(self, beside: int | None = None, lock: int = -1) -> None:
        self._beside = beside
        self._lock = lock
        self._draft = -1
        self.before: Usage | None = None
        if beside is not None:
            fcntl.flock(lock, fcntl.LOCK_SH)
            if _is_there(beside):  # and if it is not, nobody makes one as long as we hold the lock
                self.before = _read(self._make(beside))

    def is_marked(self) -> bool:
        """Whether there is an empty record that nobody else has removed: nobody else has begun since it was made."""
        return self._draft >= 0 and os.fstat(self._draft).st_nlink == 1

    def mark(self) -> bool:
        """Make such a record, unless there is one or somebody else is changing the workspace. Says whether there is."""
        if self._beside is not None and not self.is_marked():
            self._make(self._beside)
        return self.is_marked()

    def remember(self, usage: Usage) -> None:
        """Fill the record in: what the workspace holds at most, by a count since `mark` and what we did since."""
        if self.is_marked():
            with _unless_full():
                os.pwrite(self._draft, f"{_boot()} {usage.bytes} {usage.files}\n".encode("ascii"), 0)
            os.close(self._draft)
            self._draft = -1

    def close(self) -> None:
        """Leave no empty record behind."""
        if self._beside is not None and self.is_marked():
            _taken(self._beside)
        if self._draft >= 0:
            os.close(self._draft)
            self._draft = -1

    def _make(self, beside: int) -> bytes:
        """Replace what is there by an empty record, if nobody else holds the lock. Returns what was in it."""
        record = b""
        if self._draft >= 0:
            os.close(self._draft)
            self._draft = -1
        with suppress(BlockingIOError), _unless_full():
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            record = _taken(beside)
            self._draft = os.open(_RECORD, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OWN, 0o600, dir_fd=beside)
        # flock(2): the first lock is gone before the second is there, be it granted or not. Whoever came between may
        # have left a record, which would not be true once we go on.
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        return record if self.is_marked() else _taken(beside)


@contextmanager
def changing(beside: int) -> Iterator[Change]:
    """Within: the workspace that lies in that folder is being changed."""
    with (
        beneath.closing(os.open(_LOCK, os.O_RDWR | os.O_CREAT | _OWN, 0o600, dir_fd=beside)) as lock,
        closing(Change(beside, lock)) as change,
    ):
        yield change


@contextmanager
def _unless_full() -> Iterator[None]:
    """Do without a record where the host's disk is full: what is begun may be to make room."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise


def _is_there(beside: int) -> bool:
    try:
        os.stat(_RECORD, dir_fd=beside, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _taken(beside: int) -> bytes:
    """Remove the record, if there is one, and return what was in it."""
    try:
        fd = os.open(_RECORD, os.O_RDONLY | _OWN, dir_fd=beside)
    except FileNotFoundError:
        return b""
    with beneath.closing(fd):
        with suppress(FileNotFoundError):  # of two who begin at once, one has been faster
            os.unlink(_RECORD, dir_fd=beside)
        return os.read(fd, _LONGEST)


def _read(record: bytes) -> Usage | None:
    """What a record says, unless it was not filled in, or the host has been down since and may have lost a removal."""
    if not record.endswith(b"\n"):
        return None
    boot, size, files = record.decode("ascii").split()
    return Usage(int(size), int(files)) if boot == _boot() else None


def _boot() -> str:
    with beneath.closing(os.open("/proc/sys/kernel/random/boot_id", os.O_RDONLY | os.O_CLOEXEC)) as fd:
        return os.read(fd, _LONGEST).decode("ascii").strip()
