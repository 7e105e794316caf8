"""What an operator asks of the server: health, metrics, languages, the audit log, and the documentation page."""

from collections import deque
from typing import Annotated, Any

from litestar import MediaType, Response, get
from litestar.openapi.spec import OpenAPIType, Schema
from litestar.params import Parameter
from litestar.serialization import decode_json, default_serializer, encode_json

from jhansi_runtime.api.docs import page
from jhansi_runtime.api.document import TEXT, answer, described
from jhansi_runtime.api.routes import AnyRequest, Document
from jhansi_runtime.api.service import Service
from jhansi_runtime.errors import InvalidRequestError
from jhansi_runtime.runtime import Runtime
from jhansi_runtime.spec import Health, Language

__all__ = ["ROUTES"]

_UNAVAILABLE = 503
_MOST_RECORDS = 10_000

Since = Annotated[
    str | None,
    Parameter(schema_extra={"format": "date-time"}, description="those from this instant on: 2026-01-31T12:00:00Z"),
]
Limit = Annotated[int, Parameter(ge=1, le=_MOST_RECORDS, description="how many at most: the newest")]


@get(
    "/v1/health",
    summary="Whether this server answers, and can isolate",
    **described(
        "health",
        403,
        also={_UNAVAILABLE: answer(Health, "live, but not ready")},
        needs_key=False,
    ),
)
async def health(service: Service) -> Response[Health]:
    """Live: it answers. Ready: a program was run in a container within the last minute; 503 when it could not be."""
    found = await service.health()
    return Document(found, status_code=200 if found.ready else _UNAVAILABLE)


@get(
    "/v1/languages",
    opt={"needs": "read"},
    summary="The languages that files can be run in",
    **described("listLanguages"),
)
async def languages(service: Service, runtime: Runtime) -> list[Language]:
    """Every language that has a recipe, and the digest of its root tree if there is one already."""
    return await service.in_thread(runtime.languages)


@get("/v1/audit", opt={"needs": "audit"}, summary="Audit records", **described("listAuditRecords", 422))
async def audit(
    service: Service,
    runtime: Runtime,
    sandbox: str | None = None,
    run: str | None = None,
    since: Since = None,
    limit: Limit = 1000,
) -> list[dict[str, Any]]:
    """The newest records, oldest first: of one sandbox or run, from an instant on."""

    def newest() -> list[dict[str, Any]]:
        try:
            return list(deque(runtime.records(sandbox=sandbox, run_id=run, since=since), maxlen=limit))
        except InvalidRequestError as error:  # of these, only an instant can be that
            raise InvalidRequestError(f"since: {error.message}", remedy=error.remedy) from None
        except OverflowError:
            raise InvalidRequestError("since: an instant before the year 1 or after the year 9999") from None

    return await service.in_thread(newest)


@get(
    "/metrics",
    opt={"needs": "admin"},
    media_type="text/plain; version=0.0.4",
    summary="Metrics for Prometheus",
    **described("metrics"),
)
async def metrics(service: Service) -> bytes:
    """Counters, gauges and histograms in the text format of Prometheus."""
    return await service.in_thread(service.telemetry.exposition)


@get(
    "/openapi.json",
    media_type=MediaType.JSON,
    summary="This document",
    **described("openapi", 403, media={200: {MediaType.JSON: Schema(type=OpenAPIType.OBJECT)}}, needs_key=False),
)
async def openapi(request: AnyRequest) -> bytes:
    """The OpenAPI document of this server."""
    return encode_json(request.app.openapi_schema.to_schema(), default_serializer)


@get(
    "/docs",
    media_type=MediaType.HTML,
    summary="This document as a page",
    **described("documentation", 403, media={200: {"text/html": TEXT}}, needs_key=False),
)
async def documentation(request: AnyRequest) -> bytes:
    """The same as one page for a person, which needs nothing from the internet and no script."""
    return page(decode_json(encode_json(request.app.openapi_schema.to_schema(), default_serializer))).encode()


ROUTES = (health, languages, audit, metrics, openapi, documentation)
