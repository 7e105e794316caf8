"""Where an exec works: the workspace of a sandbox, or a folder of the caller's that is lent for one run."""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import NamedTuple

from jhansi_runtime.disk import allowed
from jhansi_runtime.errors import InvalidRequestError, ProgramMissingError
from jhansi_runtime.paths import Paths
from jhansi_runtime.room import Room
from jhansi_runtime.spec import Limits
from jhansi_runtime.workspace import Workspace

__all__ = ["Place", "folder_place", "inside", "refuse_own_files", "require_file"]


class Place(NamedTuple):
    """Where an exec works: a sandbox's workspace, or a folder of the caller's (sandbox_id None).

    workspace is the path of the workspace beneath the folder workspaces; host_id owns it when root started us.
    """

    sandbox_id: str | None
    workspaces: str
    workspace: str
    files: Workspace
    host_id: int | None


@contextmanager
def folder_place(folder: str, host_id: int | None, limits: Limits) -> Iterator[Place]:
    """A folder of the caller's as the workspace. Started by root, its owner is whom the sandbox is outside."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidRequestError(f"cannot use {folder!r} as the workspace: {error.strerror}") from error
    try:
        owner = os.fstat(descriptor).st_uid
        if host_id is not None and owner == 0:
            raise InvalidRequestError(
                f"the workspace {folder!r} belongs to root, and root's files are out of any job's reach",
                remedy="give the folder to an unprivileged user: chown",
            )
        absolute = os.path.abspath(folder)
        with closing(Room(descriptor, allowed(limits))) as room:
            workspace = Workspace(descriptor, room=room)
            yield Place(None, absolute, ".", workspace, None if host_id is None else owner)
    finally:
        os.close(descriptor)


def refuse_own_files(folder: str, paths: Paths) -> None:
    """A job could rewrite the audit log, or another sandbox, that lies in its workspace."""
    chosen = os.path.realpath(folder)
    for own in (paths.home, paths.workspaces, paths.config):
        kept = os.path.realpath(own)
        if os.path.commonpath((chosen, kept)) in {chosen, kept}:
            raise InvalidRequestError(
                f"the workspace {folder!r} holds, or lies in, what jhansi-runtime keeps in {own!r}",
                remedy="take a folder apart from it; a sandbox's own files are run with: jhansi-run exec",
            )


def require_file(file: str, workspace: str | None) -> None:
    """ProgramMissingError when there is no such file, here or in the folder that is to be the workspace."""
    if not os.path.lexists(file) and not (workspace and os.path.lexists(os.path.join(workspace, file))):
        raise ProgramMissingError(f"{file!r} is not there")


def inside(folder: str, file: str) -> str:
    """Return the path of `file` in the folder that must hold it; it is given relative to that, or to here."""
    if not os.path.isabs(file) and os.path.lexists(os.path.join(folder, file)):
        return file
    relative = os.path.relpath(os.path.abspath(file), os.path.abspath(folder))
    if relative.split(os.sep)[0] == os.pardir:
        raise InvalidRequestError(
            f"{file!r} is not inside the workspace {folder!r}", remedy="name a file in that folder"
        )
    return relative
