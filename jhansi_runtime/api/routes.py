"""What every route is given: the service, who calls, the runtime as they see it; and how an answer is written."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any, TypeVar, cast

from litestar import HttpMethod, Request, Response, route
from litestar.exceptions import HTTPException
from litestar.handlers import BaseRouteHandler, HTTPRouteHandler
from litestar.response import Stream
from litestar.routes import HTTPRoute
from litestar.types import Receive, Scope, Send

from jhansi_runtime.api.access import Caller
from jhansi_runtime.api.service import Service
from jhansi_runtime.runtime import Runtime
from jhansi_runtime.spec import to_json

__all__ = [
    "AnyRequest",
    "Close",
    "Document",
    "JsonRequest",
    "Sent",
    "caller_of",
    "cancelled_when_left",
    "exact",
    "options_of",
    "runtime_of",
    "service_of",
]

AnyRequest = Request[Any, Any, Any]
_MALFORMED = 400
_NO_CONTENT = 204

Close = Callable[[], Coroutine[Any, Any, None]]  # may be called again

_Record = TypeVar("_Record")


class JsonRequest(AnyRequest):
    """A request whose body, where it has one, is JSON whatever it claims to be."""

    async def json(self) -> Any:  # noqa: ANN401 - any value
        """The body. HTTPException 400 also for what the decoder has errors of Python's own for."""
        try:
            return await super().json()
        except UnicodeDecodeError:
            raise HTTPException("the body is not JSON: it is not UTF-8", status_code=_MALFORMED) from None
        except RecursionError:
            raise HTTPException("the body is nested too deeply", status_code=_MALFORMED) from None


class Document(Response[_Record]):
    """A record as JSON, by the one encoder that knows what file names may hold."""

    def render(self, content: Any, media_type: str, enc_hook: Any = None) -> bytes:  # noqa: ANN401 - Litestar's signature
        """Bytes are a body already, None is no body; anything else is a record."""
        if content is None or isinstance(content, bytes):
            return content or b""
        if media_type.startswith("application/json"):
            return to_json(content).encode("ascii")
        return super().render(content, media_type, enc_hook)


class Sent(Stream):
    """A body in pieces, and what is to be closed when it has been sent, or the caller has left."""

    def __init__(
        self,
        pieces: AsyncIterator[bytes],
        close: Close,
        service: Service,
        **options: Any,  # noqa: ANN401 - those of Stream
    ) -> None:
        super().__init__(pieces, **options)
        self._close = close
        self._service = service

    def to_asgi_response(self, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - Litestar's signature, passed on
        """What sends the pieces, and closes in the end whatever happens to the connection."""
        response = super().to_asgi_response(*arguments, **options)

        async def respond(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await response(scope, receive, send)
            finally:
                self._service.spawn(self._close())

        return respond


@asynccontextmanager
async def cancelled_when_left(request: AnyRequest) -> AsyncIterator[None]:
    """Within, a caller who closes the connection cancels what is done for them. The body has been read by then."""
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - a request is served by one
    has_left = False

    async def watch() -> None:
        nonlocal has_left
        while (await request.receive())["type"] != "http.disconnect":
            pass
        has_left = True
        task.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not has_left:
            raise
        task.uncancel()
        raise HTTPException("the caller has left", status_code=HTTPStatus.REQUEST_TIMEOUT) from None
    finally:
        watching.cancel()
        await asyncio.wait([watching])


def options_of(routes: Sequence[BaseRouteHandler]) -> HTTPRouteHandler:
    """The answer to OPTIONS for each path of these routes. Litestar's own knows no more than the first of a path."""
    paths = {path for one in routes if isinstance(one, HTTPRouteHandler) for path in one.paths}

    @route(sorted(paths), http_method=HttpMethod.OPTIONS, status_code=_NO_CONTENT, include_in_schema=False)
    async def options(request: AnyRequest) -> Response[None]:
        here = request.scope["path_template"]
        found = [one for one in request.app.routes if isinstance(one, HTTPRoute) and one.path_format == here]
        methods = sorted({method for one in found for method in one.methods})
        return Response(None, status_code=_NO_CONTENT, headers={"Allow": ", ".join(methods)})

    return options


def exact(limits: Mapping[str, float | bool]) -> dict[str, float | bool]:
    """Limits as they were sent: JSON has one kind of number, and the decoder makes a float of each."""
    return {
        name: int(value) if not isinstance(value, bool) and value.is_integer() else value
        for name, value in limits.items()
    }


def service_of(request: AnyRequest) -> Service:
    """The one service of this server."""
    return cast("Service", request.app.state.service)


def caller_of(request: AnyRequest, service: Service) -> Caller:  # noqa: ARG001 - see below
    """Whom the guard has let in."""
    # What Litestar could find at once it finds in tasks, which take longer; so each of these asks for the one before.
    return cast("Caller", request.scope["state"]["caller"])


def runtime_of(service: Service, caller: Caller) -> Runtime:
    """The runtime as the caller sees it."""
    return service.runtime_of(caller)
