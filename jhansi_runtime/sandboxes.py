"""The store of sandboxes: for each a folder that holds its workspace and, beside it, its settings.

    $PETRI_WORKSPACE_ROOT/          0700
        .lock                       held while names are compared and settings change
        .names/                     who is called what (names.py)
        ID/                         0700; whoever uses the sandbox has a shared flock on this folder
            sandbox.json            spec.Sandbox, replaced as a whole
            .changing .holds        who changes the workspace, and what it holds (room.py)
            workspace/              what a container mounts
        .unfinished/                creating-ID and removing-ID: not there yet, not there any more

An ID is `sb_` and 16 hexadecimal digits; that of a one-shot sandbox is the id of its run. A folder comes and goes by
one rename: whoever is killed leaves a whole sandbox or something unfinished, which the next to create or sweep clears
away. Every lock is a flock(2) on a close-on-exec descriptor, so it dies with its holder.
"""

import fcntl
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Literal

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from jhansi_runtime import beneath
from jhansi_runtime.disk import allowed
from jhansi_runtime.errors import ConflictError, InvalidRequestError, JhansiError, NotFoundError
from jhansi_runtime.explanations import explained
from jhansi_runtime.names import Names, listed
from jhansi_runtime.room import Room, changing
from jhansi_runtime.spec import Limits, Modules, RootfsChoice, Sandbox, from_builtins, from_json, instant, to_json
from jhansi_runtime.workspace import Workspace, open_workspace

__all__ = ["Sandboxes"]

LONGEST_TTL = 100 * 366 * 86_400.0  # seconds
MOST_LABELS = 64
LONGEST_LABEL = 256  # characters of a value
MOST_CANDIDATES = 5  # in a message

_ID = re.compile(r"sb_[0-9a-f]{16}|run_[0-9a-f]{16,32}")
_LISTED_ID = re.compile(r"sb_[0-9a-f]{16}")
_ONE_SHOT_ID = re.compile(r"run_[0-9a-f]{16,32}")
_ID_PREFIX = re.compile(r"(?:sb_)?([0-9a-f]{1,16})")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_LIKE_AN_ID = re.compile(r"(?:sb|run)_.*|[0-9a-f]{16}")
_LABEL_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,63}")

_LOCK = ".lock"
_UNFINISHED = ".unfinished"
_CREATING, _REMOVING = "creating-", "removing-"
_METADATA = "sandbox.json"
_WORKSPACE = "workspace"
_UNPACKING = ".unpacking-"  # beside it, while an archive is unpacked (tarball.py)
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_LABELS: Mapping[str, str] = {}

_Listing = list[Sandbox]  # within the class, `list` is its method
_Ids = list[str]


class Sandboxes:
    """The sandboxes in one folder, which is made with the first of them. Any number of processes may use it at once.

    owner is the unprivileged id, user and group, that workspaces belong to when root runs us.
    """

    def __init__(self, root: str, *, owner: int | None = None) -> None:
        self.root = root
        self.owner = owner
        self._names = Names(root)

    def create(
        self,
        *,
        language: str,
        name: str | None = None,
        labels: Mapping[str, str] = _NO_LABELS,
        ttl: float | None = None,
        limits: Limits,
        rootfs: RootfsChoice = "recipe",
        seccomp: str = "default",
        zygote: bool = True,
        preload: Sequence[str] | None = None,
        owner: str | None = None,
        sandbox_id: str | None = None,
        ephemeral: str | None = None,
    ) -> Sandbox:
        """Make a sandbox with an empty workspace. ttl is in seconds from now.

        owner is the API key that it belongs to, if any; each has names of its own. sandbox_id is the id to take if not
        one at random; ephemeral the run id that a one-shot sandbox takes as its own, which is not listed, and which its
        full id alone finds. ConflictError when the name or the id is taken.
        """
        now = time.time()
        sandbox = Sandbox(
            id=_new_id(sandbox_id, ephemeral),
            language=language,
            created_at=instant(now),
            name=_checked_name(name),
            labels=_checked_labels(labels),
            limits=limits,
            rootfs=rootfs,
            seccomp=seccomp,
            expires_at=_expiry(ttl, now),
            owner=owner,
            zygote=zygote,
            preload=_checked_preload(preload),
        )
        with explained(self.root):
            os.makedirs(self.root, mode=0o700, exist_ok=True)
            self._let_owner_through(self.root)
            with self._opened_root() as root:
                with _locked(root):
                    self._take_name(name, sandbox)
                    self._make(root, sandbox, durable=ephemeral is None)
                with suppress(OSError):  # what cannot be cleared away is for `sweep` to tell
                    _sweep(root)
        return sandbox

    def find(self, reference: str, *, owner: str | None = None) -> Sandbox:
        """The sandbox of that id, of that name, or of the only id that begins so (with or without `sb_`).

        With an owner, those of others are not there. NotFoundError; InvalidRequestError for a name or the beginning of
        an id that several have; JhansiError when its metadata is damaged. A full id and a name cost the same, however
        many sandboxes there are.
        """
        if _ID.fullmatch(reference):
            sandbox = self._read(reference)
            if owner is not None and sandbox.owner != owner:
                raise _not_found(reference)
            return sandbox
        named, begun = self._named(reference, owner), []
        if not named and (prefix := _ID_PREFIX.fullmatch(reference)):
            ids = [sandbox_id for sandbox_id in self._ids() if sandbox_id.startswith(f"sb_{prefix[1]}")]
            begun = [sandbox for sandbox in self._readable(ids) if owner is None or sandbox.owner == owner]
        found = sorted(named or begun, key=lambda sandbox: sandbox.id)
        if not found:
            raise _not_found(reference)
        if len(found) > 1:
            ids = [sandbox.id for sandbox in found]
            candidates = ", ".join(ids[:MOST_CANDIDATES]) + (", ..." if len(ids) > MOST_CANDIDATES else "")
            relation = "is the name" if named else "begins the ids"
            raise InvalidRequestError(
                f"{reference!r} {relation} of {len(ids)} sandboxes: {candidates}", remedy="give more of the id"
            )
        return found[0]

    def list(self, *, owner: str | None = None) -> _Listing:
        """Every sandbox, or that of one owner, oldest first, except one-shot ones and those that `damaged` tells of."""
        visible = (sandbox for sandbox in self._readable(self._ids()) if owner is None or sandbox.owner == owner)
        return sorted(visible, key=lambda sandbox: (sandbox.created_at, sandbox.id))

    def damaged(self) -> Iterator[JhansiError]:
        """For each sandbox that cannot be listed, what is wrong with it and what to do."""
        for sandbox_id in self._ids():
            try:
                self._read(sandbox_id)
            except NotFoundError:
                continue  # removed meanwhile
            except JhansiError as error:
                yield error

    def expired(self, now: float | None = None) -> _Listing:
        """Those whose time was up at `now`, in seconds since the epoch; at this moment if not given."""
        moment = instant(time.time() if now is None else now)
        return [sandbox for sandbox in self.list() if sandbox.expires_at is not None and sandbox.expires_at <= moment]

    def workspace_path(self, sandbox_id: str) -> str:
        """Where the workspace lies, relative to the root."""
        return f"{sandbox_id}/{_WORKSPACE}"

    @contextmanager
    def hold(self, sandbox_id: str) -> Iterator[Workspace]:
        """Within: the workspace of that id, to be read, which cannot be removed meanwhile.

        Any number may hold it at once, here and in `hold_to_change`.
        """
        with (
            self._locked_folder(sandbox_id, fcntl.LOCK_SH) as folder,
            open_workspace(_WORKSPACE, owner=self.owner, at=folder) as workspace,
        ):
            yield workspace

    @contextmanager
    def hold_to_change(self, sandbox_id: str, limits: Limits) -> Iterator[Workspace]:
        """Within: the workspace of that id, to be changed, with the room that is left in it by these limits."""
        with (
            self._locked_folder(sandbox_id, fcntl.LOCK_SH) as folder,
            open_workspace(_WORKSPACE, owner=self.owner, at=folder) as workspace,
            changing(folder) as change,
            closing(Room(workspace.fd, allowed(limits), change)) as room,
        ):
            workspace.room = room
            yield workspace

    def change(
        self,
        reference: str,
        *,
        name: str | UnsetType | None = UNSET,
        labels: Mapping[str, str] | UnsetType = UNSET,
        ttl: float | UnsetType | None = UNSET,
        limits: Limits | UnsetType = UNSET,
        seccomp: str | UnsetType = UNSET,
        zygote: bool | UnsetType = UNSET,
        preload: Sequence[str] | UnsetType | None = UNSET,
    ) -> Sandbox:
        """Change what is given, return the result. None takes a name, end or preload away; labels replace all labels.

        ttl is in seconds from now. ConflictError when the name is taken.
        """
        changes: dict[str, object] = {}
        if name is not UNSET:
            changes["name"] = _checked_name(name)
        if labels is not UNSET:
            changes["labels"] = _checked_labels(labels)
        if ttl is not UNSET:
            changes["expires_at"] = _expiry(ttl, time.time())
        if limits is not UNSET:
            changes["limits"] = limits
        if seccomp is not UNSET:
            changes["seccomp"] = seccomp
        if zygote is not UNSET:
            changes["zygote"] = zygote
        if preload is not UNSET:
            changes["preload"] = _checked_preload(preload)
        sandbox_id = self.find(reference).id
        with explained(self.root), self._opened_root() as root, _locked(root):
            before = self._read(sandbox_id)
            after = replace(before, **changes)
            if after.name != before.name:
                self._take_name(after.name, before)
            with self._locked_folder(sandbox_id, fcntl.LOCK_SH) as folder:
                _write(folder, after, durable=True)
            if before.name is not None and after.name != before.name:
                self._names.drop(before.name, sandbox_id)
        return after

    def remove(self, reference: str) -> Sandbox:
        """Remove a sandbox and all that is in its workspace. ConflictError while an exec is under way in it."""
        sandbox = self.find(reference)
        self._remove(sandbox.id)
        if sandbox.name is not None:
            with explained(self.root), self._opened_root() as root, _locked(root):
                self._names.drop(sandbox.name, sandbox.id)
        return sandbox

    def discard(self, run_id: str) -> None:
        """Remove what there is of a one-shot sandbox, whole or not; nothing when there is none.

        For what a killed process left.
        """
        with suppress(NotFoundError):
            self._remove(run_id)
        with explained(self.root), suppress(FileNotFoundError), self._opened_root() as root:
            _sweep(root)

    def sweep(self) -> None:
        """Clear away what killed processes left half made or half removed, and see that everybody's name is known."""
        with explained(self.root), suppress(FileNotFoundError), self._opened_root() as root:
            _sweep(root)
            if not self._names.agree_with(self._all_names()):  # looked at again under the lock: others may be at it
                with _locked(root):
                    self._names.mend(self._all_names())

    def unfinished(self) -> _Ids:
        """The ids of those in which something is being unpacked, or was when somebody was killed."""
        return [
            sandbox_id
            for sandbox_id in self._ids()
            if any(name.startswith(_UNPACKING) for name in listed(f"{self.root}/{sandbox_id}"))
        ]

    # --- within ---

    def _ids(self) -> Iterator[str]:
        with suppress(FileNotFoundError), os.scandir(self.root) as entries:
            yield from (entry.name for entry in entries if _LISTED_ID.fullmatch(entry.name))

    def _readable(self, ids: Iterable[str]) -> Iterator[Sandbox]:
        for sandbox_id in ids:
            with suppress(JhansiError):  # `damaged` tells of them
                yield self._read(sandbox_id)

    def _named(self, name: str, owner: str | None) -> _Listing:
        """Those of that name; with an owner, of its."""
        if not _NAME.fullmatch(name):
            return []
        if not self._names.are_kept():
            with explained(self.root), suppress(FileNotFoundError), self._opened_root() as root, _locked(root):
                self._names.mend(self._all_names())
        return [
            sandbox
            for sandbox in self._readable(self._names.ids(name))
            if sandbox.name == name and (owner is None or sandbox.owner == owner)
        ]

    def _all_names(self) -> set[tuple[str, str]]:
        return {(one.name, one.id) for one in self._readable(self._ids()) if one.name is not None}

    def _read(self, sandbox_id: str) -> Sandbox:
        path = f"{self.root}/{sandbox_id}/{_METADATA}"
        try:
            with open(path, "rb", buffering=0) as file:
                sandbox = from_json(file.read(), Sandbox, where=path)
        except OSError as error:
            if not os.path.lexists(f"{self.root}/{sandbox_id}"):
                raise _not_found(sandbox_id) from None
            raise _damaged(sandbox_id, f"{path}: {error.strerror}") from None
        except InvalidRequestError as error:
            raise _damaged(sandbox_id, error.message) from None
        if sandbox.id != sandbox_id:
            raise _damaged(sandbox_id, f"{path} is that of {sandbox.id!r}")
        return sandbox

    def _take_name(self, name: str | None, sandbox: Sandbox) -> None:
        """Have a name for a sandbox, whose owner may have no other of that name. The lock is held."""
        if name is None:
            return
        if not self._names.are_kept():
            self._names.mend(self._all_names())
        if any(one.owner == sandbox.owner for one in self._readable(self._names.ids(name)) if one.name == name):
            raise ConflictError(f"there is a sandbox named {name!r} already", remedy="take another name, or remove it")
        self._names.add(name, sandbox.id)

    @contextmanager
    def _opened_root(self) -> Iterator[int]:
        with beneath.closing(os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as root:
            yield root

    @contextmanager
    def _locked_folder(self, sandbox_id: str, operation: int) -> Iterator[int]:
        """Within: the folder of a sandbox, locked, and in its place."""
        if not _ID.fullmatch(sandbox_id):
            raise _not_found(sandbox_id)
        path = f"{self.root}/{sandbox_id}"
        try:
            opened = os.open(path, _DIRECTORY)
        except FileNotFoundError:
            raise _not_found(sandbox_id) from None
        with beneath.closing(opened) as folder:
            try:
                fcntl.flock(folder, operation | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _in_use(sandbox_id, operation) from None
            try:
                here = os.stat(path, follow_symlinks=False)
            except FileNotFoundError:  # whoever had the lock has removed it
                raise _not_found(sandbox_id) from None
            if not os.path.samestat(here, os.fstat(folder)):
                raise _not_found(sandbox_id)
            yield folder

    def _let_owner_through(self, folder: int | str) -> None:
        """Let the owner of a workspace, as whom init looks it up, pass a folder of root's; nobody may list it."""
        mode = os.stat(folder).st_mode
        if self.owner is not None and not mode & stat.S_IXOTH:
            os.chmod(folder, stat.S_IMODE(mode) | stat.S_IXOTH)

    def _make(self, root: int, sandbox: Sandbox, *, durable: bool) -> None:
        creating = _CREATING + sandbox.id
        with _unfinished(root) as unfinished:
            try:
                os.mkdir(creating, 0o700, dir_fd=unfinished)
                with beneath.closing(os.open(creating, _DIRECTORY, dir_fd=unfinished)) as folder:
                    self._let_owner_through(folder)
                    os.close(beneath.make_directory(folder, _WORKSPACE, self.owner))
                    _write(folder, sandbox, durable=durable)
                os.rename(creating, sandbox.id, src_dir_fd=unfinished, dst_dir_fd=root)
            finally:
                with suppress(FileNotFoundError):
                    beneath.remove(unfinished, creating)

    def _remove(self, sandbox_id: str) -> None:
        with (
            self._locked_folder(sandbox_id, fcntl.LOCK_EX),
            explained(sandbox_id),
            self._opened_root() as root,
            _unfinished(root) as unfinished,
        ):
            os.rename(sandbox_id, _REMOVING + sandbox_id, src_dir_fd=root, dst_dir_fd=unfinished)
            beneath.remove(unfinished, _REMOVING + sandbox_id)


# --- the folder on disk -----------------------------------------------------------------------------------


@contextmanager
def _locked(root: int) -> Iterator[None]:
    with beneath.closing(os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=root)) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _unfinished(root: int) -> Iterator[int]:
    with suppress(FileExistsError):
        os.mkdir(_UNFINISHED, 0o700, dir_fd=root)
    with beneath.closing(os.open(_UNFINISHED, _DIRECTORY, dir_fd=root)) as folder:
        yield folder


def _write(folder: int, sandbox: Sandbox, *, durable: bool) -> None:
    with beneath.replacing(folder, _METADATA, None, 0o600) as fd:
        beneath.write_all(fd, to_json(sandbox, indent=2).encode("ascii"))
        if durable:
            os.fsync(fd)


def _sweep(root: int) -> None:
    """Clear away what is half made or half removed and has no living maker or remover."""
    with _unfinished(root) as folder:
        with _locked(root):  # under this lock everything is made, so what is half made now stays so
            for name in os.listdir(folder):
                if name.startswith(_CREATING):
                    removing = _REMOVING + name.removeprefix(_CREATING)
                    os.rename(name, removing, src_dir_fd=folder, dst_dir_fd=folder)
        for name in os.listdir(folder):
            if not name.startswith(_REMOVING):
                continue
            with (
                suppress(FileNotFoundError, BlockingIOError),  # its remover was done meanwhile, or is still at it
                beneath.closing(os.open(name, _DIRECTORY, dir_fd=folder)) as half,
            ):
                fcntl.flock(half, fcntl.LOCK_EX | fcntl.LOCK_NB)
                beneath.remove(folder, name)


# --- what is valid ----------------------------------------------------------------------------------------


def _new_id(wanted: str | None, one_shot: str | None) -> str:
    if one_shot is None:
        return wanted or f"sb_{os.urandom(8).hex()}"
    if not _ONE_SHOT_ID.fullmatch(one_shot):
        raise InvalidRequestError(f"{one_shot!r} is not a run id")
    return one_shot


def _checked_name(name: str | None) -> str | None:
    if name is None or (_NAME.fullmatch(name) and not _LIKE_AN_ID.fullmatch(name)):
        return name
    raise InvalidRequestError(
        f"{name!r} cannot be the name of a sandbox",
        remedy="take 1 to 64 letters, digits, `.`, `_`, `-`, the first no `.` or `-`, and nothing like an id",
        field="name",
    )


def _checked_labels(labels: Mapping[str, str]) -> dict[str, str]:
    if len(labels) > MOST_LABELS:
        raise InvalidRequestError(
            f"there are {len(labels)} labels", remedy=f"take {MOST_LABELS} at most", field="labels"
        )
    for key, value in labels.items():
        if not _LABEL_KEY.fullmatch(key):
            raise InvalidRequestError(
                f"{key!r} cannot be the key of a label",
                remedy="take 1 to 64 letters, digits, `.`, `_`, `-`, `/`, the first a letter, digit or `_`",
                field="labels",
            )
        if len(value) > LONGEST_LABEL or not value.isprintable():
            raise InvalidRequestError(
                f"the value of the label {key!r} is too long or not printable",
                remedy=f"take at most {LONGEST_LABEL} printable characters",
                field="labels",
            )
    return dict(labels)


def _checked_preload(preload: Sequence[str] | None) -> list[str] | Literal["auto"] | None:
    if preload is None:
        return None
    if preload == "auto":
        return "auto"
    return from_builtins(preload if isinstance(preload, str) else [*preload], Modules, where="preload")


def _expiry(ttl: float | None, now: float) -> str | None:
    if ttl is None:
        return None
    if not 0 < ttl <= LONGEST_TTL:
        raise InvalidRequestError(
            f"a time to live of {ttl} seconds", remedy="take one above 0 and below 100 years", field="ttl"
        )
    return instant(now + ttl)


def _not_found(reference: str) -> NotFoundError:
    return NotFoundError(f"there is no sandbox {reference!r}", remedy="jhansi-run ls lists those there are")


def _damaged(sandbox_id: str, problem: str) -> JhansiError:
    return JhansiError(
        f"the metadata of {sandbox_id} is damaged: {problem}", remedy="mend that file, or delete the folder it lies in"
    )


def _in_use(sandbox_id: str, operation: int) -> JhansiError:
    if operation == fcntl.LOCK_SH:  # only a remover has it to itself
        return _not_found(sandbox_id)
    return ConflictError(
        f"the sandbox {sandbox_id} is in use by a running exec, or being removed", remedy="wait until that ends"
    )
