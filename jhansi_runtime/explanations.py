"""What an errno means to a user when it comes of a path in a workspace: which failure it is, and a sentence for it."""

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from jhansi_runtime.errors import (
    ConflictError,
    DiskLimitError,
    InvalidRequestError,
    JhansiError,
    NotExecutableError,
    NotFoundError,
    ProgramMissingError,
)

__all__ = ["FAILURES", "PROGRAM_FAILURES", "explained"]

_Failures = Mapping[int, tuple[type[JhansiError], str]]

_LEADS_OUT = "is, or lies behind, a link that leads out of the workspace (or an absolute one)"
_GOES_ROUND = "is, or lies behind, a link that goes round in circles, or one where none may be"
_FULL = "cannot be written: the disk, or a quota on it, is full; what was there is as it was"

FAILURES: _Failures = {
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
PROGRAM_FAILURES: _Failures = {
    **FAILURES,
    errno.ENOENT: (ProgramMissingError, "is not in the workspace"),
    errno.ENOTDIR: (ProgramMissingError, "is not in the workspace"),
    errno.ENAMETOOLONG: (ProgramMissingError, "is not in the workspace: no path is that long"),
    errno.EXDEV: (NotExecutableError, _LEADS_OUT),
    errno.ELOOP: (NotExecutableError, _GOES_ROUND),
    errno.EACCES: (NotExecutableError, "may not be read: the permissions of it or of a folder above forbid that"),
    errno.EAGAIN: (NotExecutableError, "is held by a running program"),
}


@contextmanager
def explained(path: str, failures: _Failures = FAILURES) -> Iterator[None]:
    """Turn an OSError into what it means for this path; one that means nothing to a user stays what it is."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.errno not in failures:
            raise
        kind, meaning = failures[error.errno]
        raise kind(f"{path!r} {meaning}") from error
