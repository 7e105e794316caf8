"""Files that the processes of a container have open, by its /proc: what no walk of a folder finds.

A process that is not dumpable shows its descriptors to nobody but root, and what only a mapping or a socket's queue
still holds is in no list: this finds what most programs do, and not all that a hostile one can.
"""

import errno
import os
from collections.abc import Iterator

__all__ = ["INIT", "bytes_in_memfds", "bytes_in_removed_files", "pids", "read"]

INIT = "1"
_READ = 4096
_GONE = frozenset({errno.ENOENT, errno.ESRCH, errno.ENOTDIR})  # how /proc says that a process has ended


def pids(proc: int) -> list[str]:
    """Return the processes of the container whose /proc that descriptor is, init among them."""
    return [name for name in os.listdir(proc) if name.isdigit()]


def read(proc: int | None, path: str) -> bytes:
    """Return the beginning of a file of that /proc, empty when its process has ended or hides it.

    proc None is for a path that is whole.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
        try:
            return os.read(descriptor, _READ)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in {*_GONE, errno.EACCES, errno.EPERM}:
            raise
        return b""


def bytes_in_memfds(proc: int) -> int:
    """Return the bytes in memfds, mapped or not (memfd_create(2)); each counts once."""
    return _distinct(status for target, status in _open_files(proc) if target.startswith("/memfd:"))


def bytes_in_removed_files(proc: int) -> int:
    """Return the bytes in files of the workspace that have no name any more, or never had one; each counts once."""
    files = _open_files(proc)
    return _distinct(status for target, status in files if target.startswith("/workspace/") and status.st_nlink == 0)


def _distinct(found: Iterator[os.stat_result]) -> int:
    sizes = {(status.st_dev, status.st_ino): status.st_blocks * 512 for status in found}
    return sum(sizes.values())


def _open_files(proc: int) -> Iterator[tuple[str, os.stat_result]]:
    """Yield what each descriptor of the job leads to: its name, as the kernel tells it, and its status."""
    for pid in pids(proc):
        if pid != INIT:
            try:
                folder = os.open(f"{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=proc)
            except OSError as error:
                if error.errno not in {*_GONE, errno.EACCES}:
                    raise
                continue
            try:
                yield from _files_in(folder)
            finally:
                os.close(folder)


def _files_in(folder: int) -> Iterator[tuple[str, os.stat_result]]:
    try:
        for name in os.listdir(folder):
            target = os.readlink(name, dir_fd=folder)
            if target.startswith("/"):  # and not pipe:[1234]
                yield target, os.stat(name, dir_fd=folder)
    except OSError as error:  # it has ended, or closed the descriptor; the next look sees what there is then
        if error.errno not in {*_GONE, errno.EACCES}:
            raise
