"""/v1/sandboxes: make, list, show, change and remove sandboxes."""

from typing import Annotated

from litestar import Response, delete, get, patch, post
from litestar.params import HeaderParameter, Parameter
from msgspec import UNSET, structs

from jhansi_runtime.api.access import Caller
from jhansi_runtime.api.document import described
from jhansi_runtime.api.routes import Document, exact
from jhansi_runtime.api.service import Service
from jhansi_runtime.errors import InvalidRequestError
from jhansi_runtime.runtime import Runtime
from jhansi_runtime.spec import Sandbox, SandboxBody, SandboxChange, SandboxPage

__all__ = ["ROUTES"]

_MOST_IN_A_PAGE = 1000

Limit = Annotated[int, Parameter(ge=1, le=_MOST_IN_A_PAGE, description="how many at most")]
LabelsWanted = Annotated[
    list[str] | None,
    Parameter(
        schema_extra={"items": {"type": "string", "pattern": "^[^=]+="}},
        description="K=V: those with this label; may be repeated",
    ),
]
IdempotencyKey = Annotated[
    str | None,
    HeaderParameter(
        name="Idempotency-Key",
        max_length=256,
        description="of two creates with the same key the second returns what the first made",
    ),
]


@post(
    "/v1/sandboxes",
    opt={"needs": "write"},
    summary="Make a sandbox",
    **described("createSandbox", 400, 404, 409, 413, 422, 429, 507, headers={201: ["Location"]}),
)
async def create(
    data: SandboxBody, service: Service, caller: Caller, runtime: Runtime, idempotency_key: IdempotencyKey = None
) -> Response[Sandbox]:
    """Make a sandbox with an empty workspace."""

    def make() -> Sandbox:
        with service.creating:  # two at once could both find room for one
            wanted = structs.asdict(data) | {"limits": exact(data.limits)}
            at_most = None if caller.key is None else caller.key.max_sandboxes
            return runtime.create(**wanted, idempotency_key=idempotency_key, at_most=at_most)

    sandbox = await service.in_thread(make)
    return Document(sandbox, headers={"Location": f"/v1/sandboxes/{sandbox.id}"})


@get("/v1/sandboxes", opt={"needs": "read"}, summary="List sandboxes", **described("listSandboxes", 422))
async def list_(
    service: Service,
    runtime: Runtime,
    limit: Limit = 100,
    cursor: str | None = None,
    label: LabelsWanted = None,
) -> SandboxPage:
    """Oldest first, page by page: `next_cursor` is the `cursor` of the next page. Each `label` is K=V."""
    wanted = dict(_label(text) for text in label or [])
    sandboxes = await service.in_thread(runtime.sandboxes, wanted)
    if cursor is not None:
        # The cursor is the last sandbox of the page before, which may have been removed since.
        created_at, _, sandbox_id = cursor.rpartition("/")
        sandboxes = [one for one in sandboxes if (one.created_at, one.id) > (created_at, sandbox_id)]
    page, more = sandboxes[:limit], len(sandboxes) > limit
    return SandboxPage(items=page, next_cursor=f"{page[-1].created_at}/{page[-1].id}" if more else None)


@get(
    "/v1/sandboxes/{sandbox_id:str}",
    opt={"needs": "read"},
    summary="Show a sandbox",
    **described("showSandbox", 404, 422),
)
async def show(sandbox_id: str, service: Service, runtime: Runtime) -> Sandbox:
    """One sandbox, by its id, a unique prefix of that, or its name."""
    return await service.in_thread(runtime.sandbox, sandbox_id)


@patch(
    "/v1/sandboxes/{sandbox_id:str}",
    opt={"needs": "write"},
    summary="Change a sandbox",
    **described("changeSandbox", 400, 404, 409, 413, 422, 507),
)
async def change(sandbox_id: str, data: SandboxChange, service: Service, runtime: Runtime) -> Sandbox:
    """Change what is given: null takes a name, an end or a preload away, labels replace all labels."""
    changes = data if data.limits is UNSET else structs.replace(data, limits=exact(data.limits))
    return await service.in_thread(runtime.change, sandbox_id, changes)


@delete(
    "/v1/sandboxes/{sandbox_id:str}",
    opt={"needs": "write"},
    summary="Remove a sandbox",
    **described("removeSandbox", 404, 409, 422),
)
async def remove(sandbox_id: str, service: Service, runtime: Runtime) -> None:
    """Remove a sandbox and all its files."""
    removed = await service.in_thread(runtime.remove, sandbox_id)
    await service.in_thread(service.runs.forget_sandbox, removed.id)


ROUTES = (create, list_, show, change, remove)


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise InvalidRequestError(f"label: not of the form K=V: {text!r}")
    return key, value
