"""Seccomp profiles by name, compiled once and kept by digest.

Compiling takes libseccomp and 20 ms, installing 0.3: so the programs of a profile lie in the cache, under a name made
of the profile's digest and this machine's architecture, with their own digest in front. What does not match it is made
again.
"""

import os
from contextlib import suppress
from typing import NamedTuple

from jhansi_runtime.digest import sha256
from jhansi_runtime.errors import HostError, NotFoundError
from jhansi_runtime.isolation.seccomp import compile_profile

__all__ = ["Profile", "ProfileStore"]

_DIGEST_BYTES = 32
_LENGTH_BYTES = 4


class Profile(NamedTuple):
    """A compiled profile: its name, "sha256:..." of its text, the BPF programs to install."""

    name: str
    digest: str
    programs: tuple[bytes, ...]


class ProfileStore:
    """The profiles in `sources` (NAME.json) and their compiled form in `cache`."""

    def __init__(self, sources: str, cache: str) -> None:
        self._sources = sources
        self._cache = cache
        self._opened: dict[str, tuple[tuple[int, int, int], Profile]] = {}

    def open(self, name: str = "default") -> Profile:
        """Return a profile, ready to install. NotFoundError: there is none of that name; HostError: it is unfit."""
        path = os.path.join(self._sources, f"{name}.json")
        try:
            status = os.stat(path)
            version = status.st_ino, status.st_mtime_ns, status.st_size
            if name not in self._opened or self._opened[name][0] != version:
                self._opened[name] = version, self._load(name, path)
        except FileNotFoundError:
            raise NotFoundError(f"there is no seccomp profile {name!r} in {self._sources}") from None
        return self._opened[name][1]

    def _load(self, name: str, source: str) -> Profile:
        with open(source, "rb") as file:
            text = file.read()
        digest = sha256(text).hexdigest()
        path = os.path.join(self._cache, f"seccomp-{digest}.{os.uname().machine}.bpf")
        programs = _read(path)
        if programs is None:
            programs = _compile(name, text)
            _write(path, programs)
        return Profile(name, f"sha256:{digest}", programs)


def _compile(name: str, text: bytes) -> tuple[bytes, ...]:
    import json  # noqa: PLC0415 - only when a profile is compiled

    try:
        return compile_profile(json.loads(text))
    except (ImportError, RuntimeError) as error:
        raise HostError(f"libseccomp cannot be used: {error}", remedy="apt-get install libseccomp2") from error
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise HostError(f"the seccomp profile {name!r} cannot be compiled: {error!r}") from error


def _read(path: str) -> tuple[bytes, ...] | None:
    """Return the programs in a cache file; None when there is no such file, or it is not what was written."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        return None
    digest, body = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if sha256(body).digest() != digest:
        return None
    programs = []
    while body:
        length = int.from_bytes(body[:_LENGTH_BYTES], "little")
        programs.append(body[_LENGTH_BYTES : _LENGTH_BYTES + length])
        body = body[_LENGTH_BYTES + length :]
    return tuple(programs)


def _write(path: str, programs: tuple[bytes, ...]) -> None:
    body = b"".join(len(program).to_bytes(_LENGTH_BYTES, "little") + program for program in programs)
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    # One name for all who write, so that what a killed one left is written over. Two at once write the same bytes: at
    # worst a reader finds half of them, which do not match their digest, and compiles for itself.
    unfinished = f"{path}.unfinished"
    with open(unfinished, "wb") as file:
        file.write(sha256(body).digest() + body)
    with suppress(FileNotFoundError):  # the other has renamed it
        os.replace(unfinished, path)
