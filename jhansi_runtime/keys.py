"""The API keys of one installation: who may use the HTTP API, for what, and how much of it.

One file, $JHANSI_HOME/keys.json, mode 0600: for each key what spec.Key says, and the SHA-256 of its secret. A token is
`jk_`, the sixteen digits of the key's id, `_` and the secret; it is returned once, by `create`, and is nowhere on disk.
A plain SHA-256 is fit for that because a secret is 256 random bits: there is nothing to guess that a slow or salted
hash would make dearer to guess.

The file is replaced as a whole by one rename, under a flock(2) on the file `keys.json.lock` beside it, so any number of
processes may use it and whoever is killed leaves the old file or the new one. Readers take no lock: they look whether
the file is still the one they have read, so that a revocation counts in every process at once. A file that is damaged,
or open to others, is an error and never taken for one without keys; only a file that is not there is that.

No error names a token, a secret or a digest.
"""

import errno
import fcntl
import hmac
import os
import re
import stat
import time
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from typing import NamedTuple, NoReturn, get_args

from msgspec import Struct

from jhansi_runtime.errors import ConflictError, DiskLimitError, InvalidRequestError, JhansiError, NotFoundError
from jhansi_runtime.spec import Key, Scope, from_builtins, from_json, instant, to_json

__all__ = ["KeyStore"]

LONGEST_TTL = 100 * 366 * 86_400.0  # seconds
LONGEST_NAME = 64  # characters
MOST_CANDIDATES = 5  # in a message
SECRET_BYTES = 32

_ID = re.compile(r"key_[0-9a-f]{16}")
_ID_PREFIX = re.compile(r"(?:key_)?([0-9a-f]{1,16})")
_TOKEN = re.compile(r"jk_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
_LIKE_AN_ID_OR_TOKEN = re.compile(r"(?:key|jk)_.*|[0-9a-f]{16}", re.DOTALL)
_INSTANT = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z")  # as `instant` writes it
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NO_DIGEST = "0" * 64  # what the secret of an unknown key is compared with

_Listing = list[Key]  # within the class, `list` is its method


class _Entry(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key as the file has it. An unknown field is an error: it might be a restriction, from a later version."""

    key: Key
    secret_sha256: str


class _Document(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    keys: list[_Entry]


_Entries = list[_Entry]  # likewise


class _Version(NamedTuple):
    """What tells one state of the file from any other. _replace sees to it that no two share a time of change."""

    inode: int
    changed_ns: int
    size: int
    mode: int


class _Contents(NamedTuple):
    """The file as it was read; version is None when there was none."""

    version: _Version | None
    entries: Mapping[str, _Entry]


class KeyStore:
    """The keys in one file, which is made with the first of them. Any number of processes and threads may use it.

    Every method raises JhansiError when the file is damaged, can be read or written by others, or cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        # Replaced as a whole, so threads need no lock: one that puts back an older version is found out by the next.
        self._contents = _Contents(None, {})

    def create(
        self,
        *,
        name: str | None = None,
        scopes: Iterable[str] = ("read", "write", "exec"),
        ttl: float | None = None,
        max_execs: int | None = None,
        max_sandboxes: int | None = None,
    ) -> tuple[Key, str]:
        """Make a key; return it and its token, which nobody can see again. ttl is in seconds from now.

        InvalidRequestError names a value that is out of range, ConflictError a name that is taken.
        """
        now = time.time()
        fields = {
            "id": f"key_{os.urandom(8).hex()}",
            "scopes": _checked_scopes(scopes),
            "created_at": instant(now),
            "name": _checked_name(name),
            "expires_at": _expiry(ttl, now),
            "max_execs": max_execs,
            "max_sandboxes": max_sandboxes,
        }
        key = from_builtins(fields, Key, where="key")
        secret = urlsafe_b64encode(os.urandom(SECRET_BYTES)).rstrip(b"=").decode("ascii")
        with self._locked():
            before = self._current()
            if name is not None and any(entry.key.name == name for entry in before.entries.values()):
                raise ConflictError(f"there is a key named {name!r} already", remedy="take another name, or revoke it")
            self._replace(before, [*before.entries.values(), _Entry(key=key, secret_sha256=_digest(secret))])
        return key, f"jk_{key.id.removeprefix('key_')}_{secret}"

    def list(self) -> _Listing:
        """Every key, oldest first, also those whose time is up."""
        keys = (entry.key for entry in self._current().entries.values())
        return sorted(keys, key=lambda key: (key.created_at, key.id))

    def is_empty(self) -> bool:
        """Whether there is no key at all."""
        return not self._current().entries

    def revoke(self, reference: str) -> Key:
        """Remove the key of that id, of that name, or of the only id that begins so (with or without `key_`).

        From then on no process accepts it. NotFoundError; InvalidRequestError for the beginning of several ids.
        """
        with self._locked():
            before = self._current()
            revoked = _find(reference, before.entries)
            self._replace(before, [entry for entry in before.entries.values() if entry is not revoked])
        return revoked.key

    def verify(self, token: str) -> Key | None:
        """Return the key that this is the token of; None for any other text, and when its time is up.

        How long it takes says nothing about a secret, nor whether there is a key of that id.
        """
        match = _TOKEN.fullmatch(token)
        if match is None:
            return None
        digits, secret = match.groups()
        entry = self._current().entries.get(f"key_{digits}")
        # The text is hashed, not what it decodes to: its last digit has two bits to spare, which would be ignored.
        is_right = hmac.compare_digest(_digest(secret), entry.secret_sha256 if entry else _NO_DIGEST)
        if entry is None or not is_right:
            return None
        is_over = entry.key.expires_at is not None and entry.key.expires_at <= instant(time.time())
        return None if is_over else entry.key

    # --- the file ---

    def _current(self) -> _Contents:
        """What the file holds at this moment; it is read only when it has changed."""
        known = self._contents
        try:
            version = _version(os.stat(self.path, follow_symlinks=False))
        except FileNotFoundError:
            version = None
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if version != known.version:
            known = self._contents = _read(self.path)
        return known

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Within: nobody else writes."""
        try:
            # Not 0700: started by root, the unprivileged id of sandboxes has to pass this folder to its workspaces.
            os.makedirs(os.path.dirname(self.path), mode=0o755, exist_ok=True)
            lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            _refuse_write(self.path, error)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _replace(self, before: _Contents, entries: _Entries) -> None:
        """Write the file anew. It is on the disk when this returns: no power cut brings a revoked key back."""
        changed_ns = max(time.time_ns(), before.version.changed_ns + 1 if before.version else 0)
        document = to_json(_Document(keys=entries), indent=2) + "\n"
        try:
            _replace_file(self.path, document.encode("ascii"), changed_ns)
        except OSError as error:
            _refuse_write(self.path, error)


def _read(path: str) -> _Contents:
    try:
        with open(path, "rb", opener=_open_itself) as file:
            status = os.fstat(file.fileno())
            _check_private(path, status)
            content = file.read()
    except FileNotFoundError:
        return _Contents(None, {})
    except OSError as error:
        raise _unreadable(path, error) from error
    return _Contents(_version(status), _parsed(path, content))


def _open_itself(path: str, flags: int) -> int:
    """Follow no link, and do not wait for the writer of a FIFO."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _version(status: os.stat_result) -> _Version:
    return _Version(status.st_ino, status.st_mtime_ns, status.st_size, status.st_mode)


def _replace_file(path: str, content: bytes, changed_ns: int) -> None:
    # One name for all who write, so that what a killed one left is written over; the lock keeps them apart.
    unfinished = f"{path}.unfinished"
    with suppress(FileNotFoundError):
        os.unlink(unfinished)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(unfinished, flags, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            # The kernel's own times are milliseconds apart, and an inode's number is given again: without a time of
            # its own, a file could be taken for the one that was read two changes ago.
            os.utime(file.fileno(), ns=(changed_ns, changed_ns))
            os.fsync(file.fileno())
        os.rename(unfinished, path)
    except OSError:
        with suppress(FileNotFoundError):
            os.unlink(unfinished)
        raise
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# --- what is valid ----------------------------------------------------------------------------------------


def _check_private(path: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise JhansiError(f"the key file {path} is not a file", remedy="remove what lies there, and make new keys")
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise JhansiError(
            f"the key file {path} is open to other users: its mode is {stat.S_IMODE(status.st_mode):04o}",
            remedy=f"run `chmod 600 {path}`, then look for keys that are not yours with `jhansi-run keys ls`",
        )


def _parsed(path: str, content: bytes) -> Mapping[str, _Entry]:
    """The entries by id. Whatever could make a key mean more than it was given is damage."""
    try:
        entries = from_json(content, _Document, where=path).keys
    except InvalidRequestError as error:
        raise _damaged(error.message) from None
    by_id = {entry.key.id: entry for entry in entries}
    names = [entry.key.name for entry in entries if entry.key.name is not None]
    if len(by_id) != len(entries) or len(set(names)) != len(names):
        raise _damaged(f"{path}: two keys share an id or a name")
    for number, entry in enumerate(entries, 1):
        if not _ID.fullmatch(entry.key.id) or not _DIGEST.fullmatch(entry.secret_sha256):
            raise _damaged(f"{path}: key {number} has no valid id or digest")
        if entry.key.expires_at is not None and not _INSTANT.fullmatch(entry.key.expires_at):
            raise _damaged(f"{path}: the time at which key {number} ends is not an instant")
    return by_id


def _find(reference: str, entries: Mapping[str, _Entry]) -> _Entry:
    if reference in entries:
        return entries[reference]
    for entry in entries.values():
        if entry.key.name == reference:
            return entry
    prefix = _ID_PREFIX.fullmatch(reference)
    found = sorted(identity for identity in entries if identity.startswith(f"key_{prefix[1]}")) if prefix else []
    if not found:
        # A token in place of an id is not repeated: errors end up in logs.
        named = "of that id or name" if reference.startswith("jk_") else repr(reference)
        raise NotFoundError(f"there is no key {named}", remedy="jhansi-run keys ls lists those there are")
    if len(found) > 1:
        candidates = ", ".join(found[:MOST_CANDIDATES]) + (", ..." if len(found) > MOST_CANDIDATES else "")
        raise InvalidRequestError(
            f"{reference!r} begins the ids of {len(found)} keys: {candidates}", remedy="give more of the id"
        )
    return entries[found[0]]


def _checked_scopes(scopes: Iterable[str]) -> list[str]:
    """Each scope once, in the order of spec.Scope."""
    asked, known = set(scopes), get_args(Scope)
    unknown = sorted(asked.difference(known))
    if unknown or not asked:
        problem = f"there is no scope {unknown[0]!r}" if unknown else "a key without a scope could do nothing"
        raise InvalidRequestError(problem, remedy=f"take some of: {', '.join(known)}")
    return [scope for scope in known if scope in asked]


def _checked_name(name: str | None) -> str | None:
    if name is None:
        return None
    if _LIKE_AN_ID_OR_TOKEN.fullmatch(name):
        raise InvalidRequestError("the name of a key cannot look like an id or a token", remedy="take another name")
    if not 0 < len(name) <= LONGEST_NAME or not name.isprintable() or name != name.strip() or name.startswith("-"):
        raise InvalidRequestError(
            f"{name!r} cannot be the name of a key",
            remedy=f"take 1 to {LONGEST_NAME} printable characters, no space at either end and no `-` first",
        )
    return name


def _expiry(ttl: float | None, now: float) -> str | None:
    if ttl is None:
        return None
    if not 0 < ttl <= LONGEST_TTL:
        raise InvalidRequestError(f"a time to live of {ttl} seconds", remedy="take one above 0 and below 100 years")
    return instant(now + ttl)


def _digest(secret: str) -> str:
    return sha256(secret.encode("ascii")).hexdigest()


# --- errors -----------------------------------------------------------------------------------------------


def _damaged(problem: str) -> JhansiError:
    return JhansiError(
        f"the key file is damaged: {problem}", remedy="put back a copy of it, or remove it and make new keys"
    )


def _unreadable(path: str, error: OSError) -> JhansiError:
    return JhansiError(
        f"the key file {path} cannot be read: {error.strerror}",
        remedy="it has to be a file of this user's; check it and the folder it lies in",
    )


def _refuse_write(path: str, error: OSError) -> NoReturn:
    message = f"the key file {path} cannot be written: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise DiskLimitError(message, remedy=f"free some space on the disk that holds {path}") from error
    raise JhansiError(message, remedy="check the folder it lies in, or set JHANSI_HOME to another") from error
