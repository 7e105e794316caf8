"""What went wrong, as the exceptions of errors.py: problem documents (RFC 9457), and connections that fail.

The server turned an exception into a status; here the status becomes that exception again. No key and no body of a
request is ever part of a message.
"""

import time
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import msgspec

from jhansi_runtime.errors import (
    AccessError,
    BusyError,
    ConflictError,
    DiskLimitError,
    HostError,
    InvalidRequestError,
    JhansiError,
    NotFoundError,
    UnauthenticatedError,
)

__all__ = ["connection_error", "from_document", "from_response", "retry_after"]

_OF_STATUS: dict[int, type[JhansiError]] = {
    400: InvalidRequestError,
    401: UnauthenticatedError,
    403: AccessError,
    404: NotFoundError,
    409: ConflictError,
    412: ConflictError,
    413: InvalidRequestError,
    415: InvalidRequestError,
    416: InvalidRequestError,
    422: InvalidRequestError,
    503: HostError,
    507: DiskLimitError,
}
_TOO_MANY = 429
_SOON = 1.0  # seconds, where nothing says when
_MOST_SHOWN = 500


def from_response(response: httpx.Response) -> JhansiError:
    """The exception for an answer of status 400 or more, whose content has been read, whoever sent it."""
    try:
        document = msgspec.json.decode(response.content)
    except msgspec.DecodeError:
        document = None
    if not isinstance(document, dict):
        document = {"detail": f"the server answered {response.status_code} {response.reason_phrase}".rstrip()}
    return from_document(document, response.status_code, retry_after(response))


def from_document(document: dict[str, Any], status: int, seconds: float | None = None) -> JhansiError:
    """The exception that a problem document tells of; seconds are those after which it may be tried again."""
    message = str(document.get("detail") or document.get("title") or f"the server answered {status}")[:_MOST_SHOWN]
    named = document.get("errors")
    fields = [error for error in named if isinstance(error, dict)] if isinstance(named, list) else []
    told = [f"{error.get('field')}: {error.get('message')}" for error in fields]
    message = "; ".join([message, *(text for text in told if text not in message)])
    if status == _TOO_MANY:
        return BusyError(message, retry_after=_SOON if seconds is None else seconds)
    return _OF_STATUS.get(status, JhansiError)(message)


def retry_after(response: httpx.Response) -> float | None:
    """The seconds that a Retry-After header asks for (RFC 9110, 10.2.3: a number, or a date), None without one."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def connection_error(error: httpx.RequestError, address: str) -> HostError:
    """The exception for an answer that never came, or came in part."""
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return HostError(f"no answer from {address}", remedy="is the server running? start it with: jhansi-run serve")
    if isinstance(error, httpx.TimeoutException):
        return HostError(f"{address} did not answer in time", remedy="give the client a longer timeout")
    return HostError(f"the connection to {address} broke: {error or type(error).__name__}")
