"""What can go wrong, as one tree of exceptions.

Only a failure of ours raises: a program that fails is an ExecResult. Each class says which exit status the
command line gives it and which HTTP status the API does; each instance may carry the remedy, the line that
mends it.

JhansiError                 125  500
 +- InvalidRequestError     125  422   the request itself is wrong
 |   +- HostileArchiveError 125  422   a tar that reaches outside the tree it unpacks to
 +- NotFoundError           125  404   no such sandbox, file in a workspace, run, rootfs
 |   +- ProgramMissingError 127  404   the file to run is not there
 +- NotExecutableError      126  422   the file to run is a directory, a FIFO, a link that leads out ...
 +- ConflictError           125  409   a name that is taken, a sandbox that is in use
 |   +- PreconditionFailedError 125  412   a file that is not, or not any more, as the writer thinks
 +- AccessError             125  403   the caller may not do this
 |   +- UnauthenticatedError 125  401   nobody knows who the caller is: no key, or one that does not count
 +- BusyError               125  429   too much at once; to be tried again
 +- TooLargeError           125  413   more than is taken at once
 +- HostError               125  503   this host cannot isolate, or a step of isolation failed
 +- RootfsError             125  503   a rootfs cannot be built, imported or trusted
 +- DiskLimitError          125  507   no room for what was asked
 +- AuditError              125  500   the log cannot be written, or does not verify
"""

from typing import ClassVar

__all__ = [
    "AccessError",
    "AuditError",
    "BusyError",
    "ConflictError",
    "DiskLimitError",
    "HostError",
    "HostileArchiveError",
    "InvalidRequestError",
    "JhansiError",
    "NotExecutableError",
    "NotFoundError",
    "PreconditionFailedError",
    "ProgramMissingError",
    "RootfsError",
    "StepFailedError",
    "TooLargeError",
    "UnauthenticatedError",
]


class JhansiError(Exception):
    """The root of the tree.

    message is one line for a person; remedy, where one is known, is the line that mends it.
    """

    exit_code: ClassVar[int] = 125
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


class InvalidRequestError(JhansiError):
    """The request is malformed, or names a value outside its range. field is the one that is wrong, where it is one."""

    http_status = 422

    def __init__(self, message: str, *, remedy: str | None = None, field: str | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.field = field


class HostileArchiveError(InvalidRequestError):
    """An archive holds a member that would reach outside the tree it is unpacked to."""


class NotFoundError(JhansiError):
    """No sandbox, file, rootfs or record of that name."""

    http_status = 404


class ProgramMissingError(NotFoundError):
    """The file to run is not in the workspace, or the program is not in the rootfs."""

    exit_code = 127


class NotExecutableError(JhansiError):
    """The file to run is there, and cannot be run."""

    exit_code = 126
    http_status = 422


class ConflictError(JhansiError):
    """The state of things does not allow it: a name taken, a sandbox in use."""

    http_status = 409


class AccessError(JhansiError):
    """The caller is known, and may not do this."""

    http_status = 403


class UnauthenticatedError(AccessError):
    """A key is needed, and there is none, or it is not valid."""

    http_status = 401


class BusyError(JhansiError):
    """More is under way than may be at once. Nothing was done; retry_after is in seconds."""

    http_status = 429

    def __init__(self, message: str, *, retry_after: float, remedy: str | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.retry_after = retry_after


class PreconditionFailedError(ConflictError):
    """A file is not in the state in which alone it was to be replaced (RFC 9110, section 13.1)."""

    http_status = 412


class TooLargeError(JhansiError):
    """What was sent is larger than is taken."""

    http_status = 413


class HostError(JhansiError):
    """This host cannot isolate, or a step of the isolation failed: nothing was run."""

    http_status = 503


class StepFailedError(HostError):
    """A step of isolation failed. step is its name, reason what the kernel said."""

    def __init__(self, step: str, reason: str, *, remedy: str | None = None) -> None:
        super().__init__(f"isolation failed at the step '{step}': {reason}", remedy=remedy)
        self.step = step
        self.reason = reason


class RootfsError(JhansiError):
    """A rootfs cannot be built or imported, or is not what its digest says."""

    http_status = 503


class DiskLimitError(JhansiError):
    """There is no room for what was asked."""

    http_status = 507


class AuditError(JhansiError):
    """The audit log cannot be written, or its chain does not verify."""
