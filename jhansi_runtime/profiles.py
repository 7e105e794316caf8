"""Seccomp profiles by name, compiled once and kept by digest.

A profile is a file in the format of the OCI runtime specification (config-linux.md, "Seccomp"; SeccompProfile in
spec.py says which part of it). The names are those that ship with the package, and those that were added from a file,
which are named by their digest and kept: the audit log tells by digest what was enforced.

Compiling takes libseccomp and 20 ms, installing 0.3: so what was compiled lies in the cache, under a name made of the
profile's digest and this machine's architecture, with a digest of its own in front. What does not match that, or is
not the user's own, is refused and made again.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from jhansi_runtime.digest import sha256
from jhansi_runtime.errors import HostError, InvalidRequestError, NotFoundError
from jhansi_runtime.isolation.seccomp import Argument, Compiled, Rule, compile_profile
from jhansi_runtime.spec import SeccompProfile, from_json

__all__ = ["DEFAULT", "Profile", "ProfileStore", "compiled_for", "read_profile"]

DEFAULT = "default"

_DIGEST_BYTES = 32
_LENGTH_BYTES = 4
_FORMAT = 2  # of a cache file; what a name says of the text that it was compiled from, a digest of both can tell
_MOST_BYTES = 1 << 20
_REFUSE = "SCMP_ACT_ERRNO"
_ADDED = "sha256-"  # how the names begin of those that were added


class Profile(NamedTuple):
    """A compiled profile: its name, "sha256:..." of its text, and what to install."""

    name: str
    digest: str
    compiled: Compiled


class ProfileStore:
    """The profiles that ship in `shipped` (NAME.json), those that were added in `added`, compiled ones in `cache`."""

    def __init__(self, shipped: str, added: str, cache: str) -> None:
        self._shipped = shipped
        self._added = added
        self._cache = cache
        self._opened: dict[str, tuple[tuple[int, int, int], Profile]] = {}

    def open(self, name: str = DEFAULT) -> Profile:
        """Return a profile, ready to install. NotFoundError: there is none of that name; HostError: it is unfit."""
        for folder in (self._shipped, self._added) if os.path.basename(name) == name else ():
            path = os.path.join(folder, f"{name}.json")
            with suppress(FileNotFoundError):
                status = os.stat(path)
                version = status.st_ino, status.st_mtime_ns, status.st_size
                if name not in self._opened or self._opened[name][0] != version:
                    self._opened[name] = version, self._load(name, path)
                return self._opened[name][1]
        raise NotFoundError(
            f"there is no seccomp profile {name!r}", remedy=f"take one of: {', '.join(self.names())}; or name a FILE"
        )

    def names(self) -> list[str]:
        """The names of the profiles that ship with the package."""
        return sorted(name.removesuffix(".json") for name in os.listdir(self._shipped) if name.endswith(".json"))

    def add(self, path: str) -> str:
        """Keep the profile in a file, and return the name that it has from now on.

        InvalidRequestError says what is wrong with it, NotFoundError that it is not there.
        """
        text = _text_of(path)
        digest = sha256(text).hexdigest()
        self._compiled(path, text, digest)
        name = f"{_ADDED}{digest}"
        kept = os.path.join(self._added, f"{name}.json")
        with suppress(FileNotFoundError), open(kept, "rb") as file:
            if file.read() == text:
                return name
        _write_whole(kept, text)
        return name

    def _load(self, name: str, path: str) -> Profile:
        with open(path, "rb") as file:
            text = file.read()
        digest = sha256(text).hexdigest()
        if name.startswith(_ADDED) and name != f"{_ADDED}{digest}":
            raise HostError(
                f"the seccomp profile {name!r} is not what it was", remedy="add it again, with --seccomp FILE"
            )
        try:
            compiled = self._compiled(name, text, digest)
        except InvalidRequestError as error:  # whoever asks for it by its name cannot help that
            raise HostError(f"{path} cannot be used: {error.message}") from error
        return Profile(name, f"sha256:{digest}", compiled)

    def _compiled(self, name: str, text: bytes, digest: str) -> Compiled:
        key = f"seccomp-{digest}.{os.uname().machine}.{_FORMAT}"
        path = os.path.join(self._cache, f"{key}.bpf")
        compiled = _read(path, key)
        if compiled is None:
            compiled = compiled_for(read_profile(text, name), name)
            _write(path, key, compiled)
        return compiled


def read_profile(text: bytes, name: str) -> SeccompProfile:
    """Return the profile in a JSON document. InvalidRequestError says where it is none that can be enforced."""
    return from_json(text, SeccompProfile, where=f"the seccomp profile {name}")


def compiled_for(profile: SeccompProfile, name: str, machine: str | None = None) -> Compiled:
    """Compile a profile for a machine, by default this one.

    InvalidRequestError when a rule cannot be, HostError when libseccomp is not there.
    """
    try:
        return compile_profile(_rules(profile), profile.defaultErrnoRet, machine)
    except ValueError as error:
        raise InvalidRequestError(f"the seccomp profile {name}: {error}", field="seccomp") from None
    except (ImportError, RuntimeError) as error:
        raise HostError(
            f"libseccomp cannot be used: {error}", remedy="run as root: apt-get install libseccomp2"
        ) from error


def _rules(profile: SeccompProfile) -> Iterator[Rule]:
    for entry in profile.syscalls:
        arguments = tuple(
            Argument(argument.index, argument.op.removeprefix("SCMP_CMP_"), argument.value, argument.valueTwo)
            for argument in entry.args
        )
        refused_with = entry.errnoRet if entry.action == _REFUSE else None
        yield Rule(tuple(entry.names), refused_with, arguments)


def _text_of(path: str) -> bytes:
    """Return what is in a file that somebody has named, which may be anything."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InvalidRequestError(f"{path} is not a file", field="seccomp")
            text = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        raise NotFoundError(f"there is no seccomp profile {path}") from None
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be read: {error.strerror}", field="seccomp") from None
    if len(text) > _MOST_BYTES:
        raise InvalidRequestError(f"{path} is larger than a profile can be, {_MOST_BYTES} bytes", field="seccomp")
    return text


# --- the cache ------------------------------------------------------------------------------------------------


def _read(path: str, key: str) -> Compiled | None:
    """Return what a cache file holds; None when there is none, or it is not what this user wrote under this key."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            is_own = status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            content = file.read() if is_own and stat.S_ISREG(status.st_mode) else b""
    except OSError:  # not there, a link, not to be read: then it is written
        return None
    digest, body = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if sha256(key.encode() + body).digest() != digest:
        return None
    sole_program, rest = bool(body[0]), body[1:]
    programs = []
    while rest:
        length = int.from_bytes(rest[:_LENGTH_BYTES], "little")
        programs.append(rest[_LENGTH_BYTES : _LENGTH_BYTES + length])
        rest = rest[_LENGTH_BYTES + length :]
    return Compiled(tuple(programs), sole_program)


def _write(path: str, key: str, compiled: Compiled) -> None:
    parts = [len(program).to_bytes(_LENGTH_BYTES, "little") + program for program in compiled.programs]
    body = bytes([compiled.sole_program]) + b"".join(parts)
    _write_whole(path, sha256(key.encode() + body).digest() + body)


def _write_whole(path: str, content: bytes) -> None:
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    # One name for all who write, so that what a killed one left is written over. Two at once write the same bytes: at
    # worst a reader finds half of them, which do not match their digest, and compiles for itself.
    unfinished = f"{path}.unfinished"
    with open(
        os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "wb"
    ) as file:
        file.write(content)
    with suppress(FileNotFoundError):  # the other has renamed it
        os.replace(unfinished, path)
