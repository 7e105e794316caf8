"""What the OpenAPI document says of a route beyond what Litestar reads from its signature.

Each route says so beside its handler, by `described`: its operation id, how it may fail, the headers and media types of
its answers, and the body it takes when that is no record of JSON. Everything here is told, never enforced: the handlers
do what they do, and tests/test_openapi.py compares both.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

import msgspec
from litestar import MediaType
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import (
    OpenAPI,
    OpenAPIFormat,
    OpenAPIHeader,
    OpenAPIMediaType,
    OpenAPIResponse,
    OpenAPIType,
    Operation,
    Parameter,
    Reference,
    RequestBody,
    Schema,
)

from jhansi_runtime import spec
from jhansi_runtime.spec import Problem

__all__ = ["ABOUT", "BYTES", "FORM", "PROBLEM_MEDIA_TYPE", "TEXT", "answer", "described", "nothing", "tell_records"]

ABOUT = """Persistent sandboxes for running untrusted code.

A body of JSON is taken as such whatever content type it is sent with. Every failure is a problem document (RFC 9457).

What this document has no words for: `/v1/sandboxes/{sandbox_id}/terminal` is a WebSocket, with the query parameters
`rows`, `columns` and `command` (may be repeated; a shell if not given). Binary messages are the bytes of a terminal, in
both directions. Text messages are JSON: `{"resize": {"rows": R, "columns": C}}` from the client, and
`{"exit": ExecResult}` as the server's last one.
"""
PROBLEM_MEDIA_TYPE = "application/problem+json"

BYTES = Schema(type=OpenAPIType.STRING, format=OpenAPIFormat.BINARY)
TEXT = Schema(type=OpenAPIType.STRING)
FORM = Schema(
    type=OpenAPIType.OBJECT,
    properties={
        "file": Schema(
            type=OpenAPIType.ARRAY,
            items=BYTES,
            min_items=1,
            description="any number of files, each with a file name, which may hold folders",
        )
    },
    required=["file"],
)

_INTEGER = Schema(type=OpenAPIType.INTEGER, minimum=0)
_HEADERS = {
    "Accept-Ranges": (TEXT, True, "`bytes`: a Range may be asked for"),
    "Content-Length": (_INTEGER, True, "bytes of the file"),
    "Content-Range": (
        Schema(type=OpenAPIType.STRING, pattern="^bytes "),
        True,
        "which bytes these are, and of how many",
    ),
    "ETag": (Schema(type=OpenAPIType.STRING, pattern='^".+"$'), True, "changes with every change of the file"),
    "Location": (Schema(type=OpenAPIType.STRING, format=OpenAPIFormat.URI_REFERENCE), True, "where it is to be found"),
    "Retry-After": (Schema(type=OpenAPIType.INTEGER, minimum=1), True, "seconds after which to try again"),
    "WWW-Authenticate": (TEXT, True, "`Bearer`: how a key is sent"),
}
_HEADERS_OF_PROBLEMS = {401: ["WWW-Authenticate"], 429: ["Retry-After"]}
_PROBLEMS = {
    400: "the request is malformed, or a parameter or body cannot be read",
    401: "a key is needed, or the one that was sent is not valid",
    403: "the key has not the scope that this needs, or the server does not go by this Host or Origin",
    404: "there is no such thing, or it belongs to another key",
    409: "the state of things does not allow it",
    412: "the file is not, or not any more, as If-Match or If-None-Match says",
    413: "the body is larger than is taken",
    422: "the request is not valid: `errors` names each field that is wrong, where it is known",
    429: "too much is under way, or a limit of the key is reached",
    503: "this host cannot isolate; `detail` says what mends it",
    507: "there is no room on the disk",
}
# What the types of a record cannot say.
_RULES: Mapping[str, dict[str, Any]] = {
    "SandboxBody": {},
    "SandboxChange": {},
    "ExecBody": {
        "oneOf": [
            {
                "required": ["filename"],
                "properties": {"filename": {"type": "string"}, "command": {"maxItems": 0}},
            },
            {
                "required": ["command"],
                "properties": {
                    "filename": {"type": "null"},
                    "command": {"minItems": 1, "prefixItems": [{"pattern": "^[^/\\u0000]+$|^/.*[^/]$"}]},
                    "args": {"maxItems": 0},
                },
            },
        ]
    },
}
_OF_ACCESS = (401, 403)


def described(
    operation_id: str,
    *problems: int,
    also: Mapping[int, ResponseSpec] | None = None,
    headers: Mapping[int, list[str]] | None = None,
    media: Mapping[int, Mapping[str, Schema]] | None = None,
    takes: Mapping[str, Schema] | None = None,
    reads: Mapping[str, str] | None = None,
    needs_key: bool = True,
    may_be_empty: bool = False,
) -> dict[str, Any]:
    """Arguments for the decorator of a route.

    problems are the statuses of its problem documents, beyond those of access.py; also is what it may answer beside its
    usual answer; headers and media are, by status, the headers that are always sent and the media types that the
    signature does not tell of; takes are the media types of a body that is not JSON, reads the request headers that the
    signature does not name, with what they are for. may_be_empty says that the body may be left out.
    """
    failures = {
        status: answer(Problem, _PROBLEMS[status], PROBLEM_MEDIA_TYPE)
        for status in sorted({*(_OF_ACCESS if needs_key else ()), *problems})
    }
    all_headers: dict[int, list[str]] = {**_HEADERS_OF_PROBLEMS, **(headers or {})}

    @dataclass
    class Described(Operation):
        def __post_init__(self) -> None:
            self.responses = dict(_answers(self.responses or {}, problems, all_headers, media or {}))
            self.parameters = [*map(_sendable, self.parameters or ()), *_headers_read(reads or {})]
            if not needs_key:
                self.security = []
            if takes is not None:
                self.request_body = RequestBody(_content(takes), required=not may_be_empty)

    return {"operation_id": operation_id, "operation_class": Described, "responses": failures | dict(also or {})}


def answer(body: type | None, description: str, media_type: str = MediaType.JSON) -> ResponseSpec:
    """An answer. Without examples: Litestar would invent them with a library that takes 6 MB."""
    return ResponseSpec(body, generate_examples=False, description=description, media_type=media_type)


def nothing(description: str) -> ResponseSpec:
    """An answer without a body."""
    return answer(None, description)


def tell_records(document: OpenAPI) -> None:
    """Put the records of spec.py in, as msgspec tells of them: with what they forbid, which Litestar leaves out."""
    schemas = document.components.schemas
    records = [getattr(spec, name) for name in schemas]
    _, told = msgspec.json.schema_components(records, ref_template="#/components/schemas/{name}")
    for name, rules in _RULES.items():
        told[name] |= rules
        told[name]["properties"]["limits"] = {"$ref": "#/components/schemas/Limits"}  # those that are to differ
    schemas.clear()
    schemas.update(told)


def _header(name: str) -> OpenAPIHeader:
    schema, required, description = _HEADERS[name]
    return OpenAPIHeader(schema=copy(schema), required=required, description=description)


def _answers(
    responses: Mapping[str, OpenAPIResponse | Reference],
    problems: Sequence[int],
    headers: Mapping[int, list[str]],
    media: Mapping[int, Mapping[str, Schema]],
) -> Iterator[tuple[str, OpenAPIResponse | Reference]]:
    """What Litestar tells of the answers, without the 400 that problems.py makes a 422, and with all that was said."""
    for code, response in responses.items():
        status = int(code)
        if status == HTTPStatus.BAD_REQUEST and status not in problems:
            continue
        assert isinstance(response, OpenAPIResponse)  # noqa: S101 - Litestar makes no references to answers
        content = {kind: body for kind, body in (response.content or {}).items() if not _is_null(body.schema)}
        response.content = {**content, **_content(media.get(status, {}))} or None
        response.headers = {name: _header(name) for name in headers.get(status, ())} or None
        yield code, response


def _content(media: Mapping[str, Schema]) -> dict[str, OpenAPIMediaType]:
    return {kind: OpenAPIMediaType(schema) for kind, schema in media.items()}


def _headers_read(reads: Mapping[str, str]) -> Iterator[Parameter]:
    for name, description in reads.items():
        yield Parameter(name=name, param_in="header", schema=copy(TEXT), description=description)


def _sendable(parameter: Parameter | Reference) -> Parameter | Reference:
    """A parameter without null among its types: one that is left out is not sent, and there is no null in a URL."""
    assert isinstance(parameter, Parameter)  # noqa: S101 - Litestar makes no references to parameters
    schema = parameter.schema
    if isinstance(schema, Schema) and schema.one_of:
        kinds = [one for one in schema.one_of if not _is_null(one)]
        if len(kinds) == 1 and isinstance(kinds[0], Schema):
            limits = {name: value for name, value in vars(schema).items() if value is not None and name != "one_of"}
            parameter.schema = replace(kinds[0], **limits)
    return parameter


def _is_null(schema: Schema | Reference | None) -> bool:
    return isinstance(schema, Schema) and schema.type is OpenAPIType.NULL
