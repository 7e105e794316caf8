"""HTTP /v1: decode a request, call Runtime, encode what it returns (CONTRACT: HTTP /v1).

Theory of operation. One event loop serves every connection; everything that waits for a disk or a job is done by a
thread (service.py). A route says which scope it `needs`, and a guard of all routes (access.py) finds out who calls and
whether they may; from then on the route works with a Runtime that sees the caller's sandboxes alone, so no route can
forget to ask. Bodies and answers are the records of spec.py, and the OpenAPI document is made from them. Errors leave
as problem documents (problems.py).

An exec takes its turn (admission.py). One whose output is streamed, or that is detached, writes it to a journal on the
disk (detached.py) from which readers follow at their own pace: a slow or stalled one holds up neither the job nor
anybody else, and costs no memory.

By subject: sandboxes, files, execs, runs, terminal, operations.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from litestar import Litestar
from litestar.di import Provide
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme

from jhansi_runtime.api import execs, files, operations, runs, sandboxes, terminal
from jhansi_runtime.api.access import admit
from jhansi_runtime.api.document import ABOUT, tell_records
from jhansi_runtime.api.problems import EXCEPTION_HANDLERS
from jhansi_runtime.api.routes import Document, JsonRequest, caller_of, options_of, runtime_of, service_of
from jhansi_runtime.api.service import Service
from jhansi_runtime.keys import KeyStore
from jhansi_runtime.runtime import Runtime
from jhansi_runtime.spec import ServerSettings

__all__ = ["create_app"]


def create_app(runtime: Runtime, *, keys: KeyStore | None, settings: ServerSettings) -> Litestar:
    """The application of one server. Without keys everyone who reaches it may do everything.

    The runtime is the caller's to close, after the application has shut down.
    """

    @asynccontextmanager
    async def lifespan(app: Litestar) -> AsyncIterator[None]:
        service = Service(runtime, keys, settings)
        app.state.service = service
        housekeeping = asyncio.create_task(service.keep_house())
        try:
            yield
        finally:
            housekeeping.cancel()
            with suppress(asyncio.CancelledError):
                await housekeeping
            await service.close()

    routes = [
        *sandboxes.ROUTES,
        *files.ROUTES,
        *execs.ROUTES,
        *runs.ROUTES,
        *terminal.ROUTES,
        *operations.ROUTES,
    ]
    app = Litestar(
        route_handlers=[options_of(routes), *routes],
        guards=[admit],
        dependencies={
            "service": Provide(service_of, sync_to_thread=False),
            "caller": Provide(caller_of, sync_to_thread=False),
            "runtime": Provide(runtime_of, sync_to_thread=False),
        },
        exception_handlers=EXCEPTION_HANDLERS,
        request_class=JsonRequest,
        response_class=Document,
        lifespan=[lifespan],
        request_max_body_size=settings.max_body,
        logging_config=None,
        openapi_config=OpenAPIConfig(
            title="jhansi-runtime",
            version="1",
            description=ABOUT,
            path="/v1/openapi",  # Litestar's own page; operations.py has the ones that are promised
            render_plugins=[JsonRenderPlugin(path="/openapi.json")],
            components=Components(security_schemes={"key": SecurityScheme(type="http", scheme="bearer")}),
            security=[{"key": []}] if keys is not None and not keys.is_empty() else [{"key": []}, {}],
            use_handler_docstrings=True,
        ),
    )
    tell_records(app.openapi_schema)
    return app
