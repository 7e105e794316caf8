"""What a job does while it runs: server-sent events, and the records they carry.

The parser follows the HTML standard ("Interpreting an event stream"). It is fed bytes as they come and holds no more
than the event under way. Nothing here reads from a connection.
"""

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeVar, cast

import httpx
from msgspec import Struct

from jhansi_runtime.client.calls import Call
from jhansi_runtime.client.problems import from_document
from jhansi_runtime.errors import HostError, InvalidRequestError, JhansiError
from jhansi_runtime.spec import ExecResult, from_json

__all__ = ["Event", "EventParser", "JobEvents", "Output", "ServerSentEvent", "Started"]

_R = TypeVar("_R")

_LINE_END = re.compile(rb"\r\n|\n|\r")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_INTERNAL_ERROR = 500


class Started(Struct, frozen=True, kw_only=True):
    """The job has begun."""

    run_id: str
    sandbox_id: str | None
    started_at: str


class Output(NamedTuple):
    """Something that the job wrote. data is text, or base64 text where the request asked for that, as in ExecResult."""

    stream: Literal["stdout", "stderr"]
    data: str


Event = Started | Output


class ServerSentEvent(NamedTuple):
    """One event as it was sent; id is that of the last event which had one."""

    event: str
    data: str
    id: str


class EventParser:
    """Bytes of any cut in, events out."""

    def __init__(self) -> None:
        self._line: list[bytes] = []  # the pieces of a line whose end has not come
        self._is_first = True
        self._ended_with_return = False
        self._event = ""
        self._data: list[str] = []
        self._id = ""

    def feed(self, chunk: bytes) -> Iterator[ServerSentEvent]:
        """The events that these bytes complete."""
        if not chunk:
            return
        if self._ended_with_return and chunk.startswith(b"\n"):  # the second half of a line's end
            chunk = chunk[1:]
            self._ended_with_return = False
        self._ended_with_return = chunk.endswith(b"\r") if chunk else False
        *ended, rest = _LINE_END.split(chunk)
        for line in ended:
            self._line.append(line)
            whole, self._line = b"".join(self._line), []
            if self._is_first:
                whole, self._is_first = whole.removeprefix(_BYTE_ORDER_MARK), False
            yield from self._take(whole)
        if rest:
            self._line.append(rest)

    def _take(self, line: bytes) -> Iterator[ServerSentEvent]:
        if not line:
            if self._data:
                yield ServerSentEvent(self._event or "message", "\n".join(self._data), self._id)
            self._event, self._data = "", []
            return
        name, _, value = line.decode("utf-8", "replace").partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._id = value


class _Written(Struct, frozen=True):
    data: str


class JobEvents:
    """The events of one job, over as many connections as it takes.

    result is None until the job has ended; last_id is what a next connection resumes after.
    """

    def __init__(self) -> None:
        self.result: ExecResult | None = None
        self.last_id = ""
        self._parser = EventParser()

    def resumed(self, call: Call[_R]) -> Call[_R]:
        """The call for the next connection: it begins after the last whole event of the one before."""
        self._parser = EventParser()
        return call._replace(headers={**call.headers, "Last-Event-ID": self.last_id}) if self.last_id else call

    def missing_end(self) -> httpx.RequestError | None:
        """What is wrong when the server says no more."""
        return None if self.result else httpx.RemoteProtocolError("the events ended before the job did")

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """The events in these bytes. One that tells of an error raises it; one of an unknown kind is passed by."""
        for sent in self._parser.feed(chunk):
            self.last_id = sent.id or self.last_id
            if sent.event == "start":
                yield _decoded(sent.data, Started)
            elif sent.event in {"stdout", "stderr"}:
                stream = cast('Literal["stdout", "stderr"]', sent.event)
                yield Output(stream, _decoded(sent.data, _Written).data)
            elif sent.event == "end":
                self.result = _decoded(sent.data, ExecResult)
            elif sent.event == "lost":
                raise HostError("the run was lost: the server that ran it was killed", remedy="run it again")
            elif sent.event == "error":
                document = _decoded(sent.data, dict)
                status = document.get("status")
                raise from_document(document, status if isinstance(status, int) else _INTERNAL_ERROR)


def _decoded(data: str, kind: type[_R]) -> _R:
    try:
        return from_json(data, kind, where="an event of the server's")
    except InvalidRequestError as error:
        raise JhansiError(error.message, remedy="server and client may be of different versions") from error
