"""The store of sandboxes: for each a folder with its workspace and, beside it, its settings.

    $PETRI_WORKSPACE_ROOT/                 0700
        .lock                              held while names are compared and folders put in place
        sb_0123456789abcdef/               0700; a sandbox in use is a shared flock on this folder
            sandbox.json                   spec.Sandbox, replaced as a whole
            workspace/                     what a container mounts
        run_0123456789abcdef/              the same for `jhansi-run run`: locked as long as its maker lives
        .creating-ID, .removing-ID         not there yet, not there any more

A folder comes into being and goes by one rename, so whoever is killed leaves a whole sandbox or a dot-name, which
the next one to create, remove or sweep finishes. Every lock is a flock(2) on a close-on-exec descriptor: it dies with
its holder.
"""

import fcntl
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Literal

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from jhansi_runtime import beneath
from jhansi_runtime.errors import ConflictError, InvalidRequestError, JhansiError, NotFoundError
from jhansi_runtime.spec import Limits, Sandbox, from_json, instant, to_json
from jhansi_runtime.workspace import Workspace, explained, open_workspace

__all__ = ["Sandboxes"]

LONGEST_TTL = 100 * 366 * 86_400.0  # seconds
MOST_LABELS = 64
LONGEST_LABEL = 256  # characters of a value
MOST_CANDIDATES = 5  # in a message

_ID = re.compile(r"(?:sb|run)_[0-9a-f]{16}")
_LISTED_ID = re.compile(r"sb_[0-9a-f]{16}")
_ID_PREFIX = re.compile(r"(?:sb_)?([0-9a-f]{1,16})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LIKE_AN_ID = re.compile(r"(?:sb|run)_.*|[0-9a-f]{16}")
_LABEL_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,63}")

_CREATING, _REMOVING = ".creating-", ".removing-"
_METADATA = "sandbox.json"
_WORKSPACE = "workspace"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LIST = "jhansi-run ls"


class Sandboxes:
    """The sandboxes in one folder, which is made with the first of them.

    Any number of processes may use it at once. What this object itself keeps are the locks on the one-shot sandboxes
    that it made: as long as the process lives, nobody sweeps those away.
    """

    def __init__(self, root: str, *, owner: int | None = None) -> None:
        self.root = root
        self.owner = owner
        self._one_shots: dict[str, int] = {}

    # --- what there is ---

    def find(self, reference: str) -> Sandbox:
        """The sandbox of that id, unique prefix of an id (with or without `sb_`), or name.

        NotFoundError; InvalidRequestError for a prefix that several ids have; JhansiError when its metadata is
        damaged. A full id costs one open, whatever the number of sandboxes.
        """
        if _ID.fullmatch(reference):
            return self._read(reference)
        named = next((sandbox for sandbox in self._readable() if sandbox.name == reference), None)
        if named:
            return named
        prefix = _ID_PREFIX.fullmatch(reference)
        found = [sandbox_id for sandbox_id in self._ids() if prefix and sandbox_id.startswith(f"sb_{prefix[1]}")]
        if not found:
            raise _not_found(reference)
        if len(found) > 1:
            candidates = ", ".join(found[:MOST_CANDIDATES]) + (" ..." if len(found) > MOST_CANDIDATES else "")
            raise InvalidRequestError(
                f"{reference!r} begins the ids of {len(found)} sandboxes: {candidates}", remedy="give more of the id"
            )
        return self._read(found[0])

    def list(self) -> list[Sandbox]:
        """Every sandbox, oldest first, but the one-shot ones and those that `damaged` tells of."""
        return sorted(self._readable(), key=lambda sandbox: (sandbox.created_at, sandbox.id))

    def damaged(self) -> "list[JhansiError]":
        """For each sandbox whose metadata cannot be read, what is wrong with it."""
        errors = []
        for sandbox_id in self._ids():
            try:
                self._read(sandbox_id)
            except NotFoundError:
                continue  # removed meanwhile
            except JhansiError as error:
                errors.append(error)
        return errors

    def expired(self, now: float | None = None) -> "list[Sandbox]":
        """Those whose time was up at `now`, in seconds since the epoch: at this moment if not given."""
        moment = instant(time.time() if now is None else now)
        return [sandbox for sandbox in self.list() if sandbox.expires_at is not None and sandbox.expires_at <= moment]

    def workspace_path(self, sandbox_id: str) -> str:
        """Where the workspace lies, relative to the root."""
        return f"{sandbox_id}/{_WORKSPACE}"

    @contextmanager
    def hold(self, sandbox_id: str) -> Iterator[Workspace]:
        """Within: the workspace of that id, which nobody can remove meanwhile. Any number may hold it at once."""
        with (
            self._folder(sandbox_id, fcntl.LOCK_SH) as folder,
            open_workspace(_WORKSPACE, owner=self.owner, at=folder) as workspace,
        ):
            yield workspace

    # --- what changes it ---

    def create(
        self,
        *,
        language: str,
        name: str | None = None,
        labels: Mapping[str, str] = {},
        ttl: float | None = None,
        limits: Limits,
        rootfs: Literal["recipe", "host"] = "recipe",
        ephemeral: bool = False,
    ) -> Sandbox:
        """Make a sandbox with an empty workspace. ttl is in seconds from now.

        An ephemeral one is for one shot: it is not listed, is found by its full id alone, and may be swept away by
        anybody once this process has ended. ConflictError when the name is taken.
        """
        now = time.time()
        sandbox = Sandbox(
            id=("run_" if ephemeral else "sb_") + os.urandom(8).hex(),
            language=language,
            created_at=instant(now),
            name=_checked_name(name),
            labels=_checked_labels(labels),
            limits=limits,
            rootfs=rootfs,
            expires_at=_expiry(ttl, now),
        )
        with explained(self.root):
            os.makedirs(self.root, mode=0o700, exist_ok=True)
            with self._root() as root:
                with self._locked(root):
                    self._check_free(name)
                    self._make(root, sandbox, ephemeral=ephemeral)
                self._sweep(root)
        return sandbox

    def change(
        self,
        reference: str,
        *,
        name: str | None | UnsetType = UNSET,
        labels: Mapping[str, str] | UnsetType = UNSET,
        ttl: float | None | UnsetType = UNSET,
        limits: Limits | UnsetType = UNSET,
    ) -> Sandbox:
        """Change what is given and return the result. None takes a name or an end away; labels replace all labels.

        ttl counts from now. ConflictError when the name is taken.
        """
        changes: dict[str, object] = {}
        if not isinstance(name, UnsetType):
            changes["name"] = _checked_name(name)
        if not isinstance(labels, UnsetType):
            changes["labels"] = _checked_labels(labels)
        if not isinstance(ttl, UnsetType):
            changes["expires_at"] = _expiry(ttl, time.time())
        if not isinstance(limits, UnsetType):
            changes["limits"] = limits
        sandbox_id = self.find(reference).id
        with explained(self.root), self._root() as root, self._locked(root):
            with self._folder(sandbox_id, fcntl.LOCK_SH) as folder:
                sandbox = self._read(sandbox_id)
                if changes.get("name") != sandbox.name:
                    self._check_free(changes.get("name"))
                sandbox = replace(sandbox, **changes)
                _write(folder, sandbox)
        return sandbox
