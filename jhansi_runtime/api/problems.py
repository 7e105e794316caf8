"""Errors as problem documents (RFC 9457): every failure of a request leaves the server through here.

A problem says what is wrong and what to do, and never more than the caller may know: no path of the host, no key, no
value of an environment variable. What nobody expected is a 500 without a word about it; the log has the traceback.
"""

import math
import re
from http import HTTPStatus
from typing import Any

from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException
from msgspec import UNSET

from jhansi_runtime.api.document import PROBLEM_MEDIA_TYPE
from jhansi_runtime.errors import BusyError, InvalidRequestError, JhansiError, UnauthenticatedError
from jhansi_runtime.spec import FieldProblem, Problem, to_json

__all__ = ["EXCEPTION_HANDLERS", "problem"]

_UNPROCESSABLE = 422
_HAS_LEFT = "client disconnected prematurely"  # how Litestar tells of a caller who leaves in the midst of a body
_UNKNOWN_FIELD = re.compile(r"unknown field `(.*)`")
_WITHIN = re.compile(r"(?:at `\$\.|unknown field `)([^`]+)`")  # which field of a record, as msgspec tells it

AnyRequest = Request[Any, Any, Any]


def problem(status: int, detail: str, errors: list[FieldProblem] | None = None) -> Problem:
    """A problem document: errors name each field that is wrong, and how."""
    return Problem(title=HTTPStatus(status).phrase, status=status, detail=detail, errors=errors or UNSET)


def _response(document: Problem, headers: dict[str, str] | None = None) -> Response[bytes]:
    content = to_json(document).encode("ascii")
    return Response(content, status_code=document.status, media_type=PROBLEM_MEDIA_TYPE, headers=headers)


def _of_ours(request: AnyRequest, error: JhansiError) -> Response[bytes]:
    """What the product itself refuses, with the remedy that the command line would name."""
    service = request.app.state.service
    service.telemetry.note_error(error)
    headers = {}
    if isinstance(error, BusyError):
        headers["Retry-After"] = str(math.ceil(error.retry_after))
    if isinstance(error, UnauthenticatedError):
        headers["WWW-Authenticate"] = "Bearer"
    errors = _fields(error) if isinstance(error, InvalidRequestError) else []
    return _response(problem(error.http_status, service.discreet(error), errors), headers)


def _fields(error: InvalidRequestError) -> list[FieldProblem]:
    """The field that is wrong: as the error says, or as its message does that begins with one."""
    if error.field is not None:
        return [FieldProblem(field=error.field, message=error.message)]
    field, _, reason = error.message.partition(": ")
    if not reason or " " in field:
        return []
    within = _WITHIN.search(reason)
    return [FieldProblem(field=f"{field}.{within[1]}" if within else field, message=reason)]


def _of_the_framework(request: AnyRequest, error: HTTPException) -> Response[bytes]:
    """What never came as far as a handler: no such route or method, a body that is no JSON or not as it should be."""
    fields = error.extra if isinstance(error, ValidationException) and isinstance(error.extra, list) else []
    if fields:
        errors = [_field(str(field.get("key", "")), str(field.get("message", ""))) for field in fields]
        detail = "; ".join(f"{one.field}: {one.message}" for one in errors)
        return _response(problem(_UNPROCESSABLE, detail, errors))
    if error.detail == _HAS_LEFT:  # nobody reads the answer
        return _response(problem(HTTPStatus.BAD_REQUEST, "the body is not whole"))
    if error.status_code == HTTPStatus.INTERNAL_SERVER_ERROR:
        return _unexpected(request, error)
    return _response(problem(error.status_code, error.detail), dict(error.headers or {}))


def _field(key: str, message: str) -> FieldProblem:
    """One field that is wrong. Of one that is not known msgspec tells in the message; the key is that of the body."""
    unknown = _UNKNOWN_FIELD.search(message)
    return FieldProblem(field=unknown[1] if unknown else key, message=message)


def _unexpected(request: AnyRequest, error: Exception) -> Response[bytes]:
    request.app.state.service.telemetry.note_defect(error)
    return _response(problem(HTTPStatus.INTERNAL_SERVER_ERROR, "a defect of jhansi-runtime; the server's log has more"))


EXCEPTION_HANDLERS: Any = {JhansiError: _of_ours, HTTPException: _of_the_framework, Exception: _unexpected}
