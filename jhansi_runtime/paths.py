"""Where things live on disk, from the environment. Nothing else reads these variables."""

import os
import sys
from collections.abc import Mapping
from typing import NamedTuple

from jhansi_runtime.errors import InvalidRequestError

__all__ = ["Paths", "api_key", "required", "shipped"]


class Paths(NamedTuple):
    """The folders and files of one installation; all absolute, none need exist yet."""

    home: str
    workspaces: str
    config: str
    socket: str

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> "Paths":
        """Read PETRI_WORKSPACE_ROOT, JHANSI_* and the XDG base directories (CONTRACT: Environment).

        A relative path is an error: it would mean another place in another working directory.
        """
        user_home = environ.get("HOME") or os.path.expanduser("~")
        data = _absolute(environ, "XDG_DATA_HOME") or os.path.join(user_home, ".local/share")
        configuration = _absolute(environ, "XDG_CONFIG_HOME") or os.path.join(user_home, ".config")
        home = _absolute(environ, "JHANSI_HOME") or os.path.join(data, "jhansi")
        runtime = _absolute(environ, "XDG_RUNTIME_DIR") or home
        return cls(
            home=home,
            workspaces=_absolute(environ, "PETRI_WORKSPACE_ROOT") or os.path.join(home, "workspaces"),
            config=_absolute(environ, "JHANSI_CONFIG") or os.path.join(configuration, "jhansi/config.toml"),
            socket=_absolute(environ, "JHANSI_SOCKET") or os.path.join(runtime, "jhansi/jhansi.sock"),
        )

    @property
    def rootfs(self) -> str:
        """Unpacked root trees, each named by its digest, and what names them."""
        return os.path.join(self.home, "rootfs")

    @property
    def audit(self) -> str:
        """The audit log and its lock."""
        return os.path.join(self.home, "audit")

    @property
    def runs(self) -> str:
        """One locked file for each exec under way; a file that nobody locks is a lost exec."""
        return os.path.join(self.home, "runs")

    @property
    def keys(self) -> str:
        """The API keys: their digests, never a secret."""
        return os.path.join(self.home, "keys.json")

    @property
    def detached(self) -> str:
        """The detached runs: for each a folder with its output and its result."""
        return os.path.join(self.home, "detached")

    @property
    def profiles(self) -> str:
        """The seccomp profiles that were added."""
        return os.path.join(self.home, "seccomp")

    @property
    def cache(self) -> str:
        """What can be made again: compiled seccomp profiles."""
        return os.path.join(self.home, "cache")


def api_key(environ: Mapping[str, str] = os.environ) -> str | None:
    """The key that a client sends (JHANSI_API_KEY), None without one. Not a path; but only this module may read it."""
    return environ.get("JHANSI_API_KEY") or None


def required(environ: Mapping[str, str] = os.environ) -> frozenset[str]:
    """What a host must not lack, by the names of the doctor's checks, or `all` (JHANSI_REQUIRE). See api_key."""
    return frozenset(environ.get("JHANSI_REQUIRE", "").replace(",", " ").split())


def shipped(folder: str) -> str:
    """The folder of that name that ships with the package: recipes ("rootfs") and seccomp profiles ("seccomp").

    It lies beside the package in a checkout, and under the environment's share/jhansi once installed.
    """
    beside = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), folder)
    return beside if os.path.isdir(beside) else os.path.join(sys.prefix, "share/jhansi", folder)


def _absolute(environ: Mapping[str, str], name: str) -> str | None:
    value = environ.get(name)
    if not value:
        return None
    if not os.path.isabs(value):
        raise InvalidRequestError(f"{name} is not an absolute path: {value}", remedy=f"set {name} to an absolute path")
    return os.path.normpath(value)
