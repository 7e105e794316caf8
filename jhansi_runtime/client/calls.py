"""A call: one request to the server and how to read its answer, described without sending anything.

Both clients send the same calls; only how they wait differs. A call says by itself whether it may be sent a second
time, so that no client has to know what a verb means.
"""

import os
from collections.abc import Callable, Generator, Mapping
from typing import Generic, NamedTuple, Protocol, TypeVar
from urllib.parse import quote

import httpx

from jhansi_runtime.errors import InvalidRequestError, JhansiError
from jhansi_runtime.spec import from_json, to_json

__all__ = ["JSON", "Call", "Source", "as_json", "bytes_of", "nothing", "part", "path_in_workspace", "record"]

_T = TypeVar("_T")
_R = TypeVar("_R")

JSON: Mapping[str, str] = {"Content-Type": "application/json"}


class Source(Protocol):
    """The body of a request that is too large to be held: its chunks, anew for each attempt."""

    can_repeat: bool

    def chunks(self) -> Generator[bytes, None, None]:
        """From the first byte; a second time only where can_repeat."""


class Call(NamedTuple, Generic[_T]):
    """One request, and `decode`, which reads the answer to it once that is known to be no error.

    path is percent-encoded. can_repeat: to carry it out twice is as good as once, so it may be sent again when nobody
    knows whether it arrived. is_patient: the answer may take as long as the job takes, however quiet the line.
    """

    method: str
    path: str
    decode: Callable[[httpx.Response], _T]
    query: tuple[tuple[str, str], ...] = ()
    headers: Mapping[str, str] = {}
    body: bytes | Source = b""
    can_repeat: bool = False
    is_patient: bool = False


def part(value: str) -> str:
    """One segment of a path, percent-encoded. "." and ".." would name another resource than the one meant."""
    if value in {"", ".", ".."}:
        raise InvalidRequestError(f"not an id: {value!r}")
    return quote(value, safe="", errors="surrogateescape")


def path_in_workspace(path: str) -> str:
    """Path of a workspace, percent-encoded byte by byte; a segment that would lead elsewhere is an error here.

    A client or proxy removes dot segments from an address: "a/.." would address the workspace itself.
    """
    segments = path.removesuffix("/").split("/")
    if {"", ".", ".."} & set(segments):
        raise InvalidRequestError(
            f"not the path of a file in a workspace: {path!r}",
            remedy="give it relative to the workspace, without . or ..",
        )
    return quote(os.fsencode("/".join(segments)))


def as_json(value: object) -> bytes:
    """The body of a request that carries a record."""
    return to_json(value).encode("ascii")


def record(kind: type[_R]) -> Callable[[httpx.Response], _R]:
    """Read an answer that is one JSON document of that kind."""

    def decode(response: httpx.Response) -> _R:
        try:
            return from_json(response.content, kind, where="the server's answer")
        except InvalidRequestError as error:
            raise JhansiError(error.message, remedy="server and client may be of different versions") from error

    return decode


def nothing(_response: httpx.Response) -> None:
    """Read an answer that says no more than that it was done."""


def bytes_of(response: httpx.Response) -> bytes:
    """Read an answer that is the content itself."""
    return response.content
