"""Who calls, and what they may do: the key, its scopes, and the names by which a browser may reach this server.

A web page that the user of this machine looks at can send requests to loopback, also under a name of its own that
resolves to it (DNS rebinding). So over TCP the Host must be a name of this server, and an Origin, which browsers send,
must be that same host. The Unix socket is out of a page's reach, and its mode lets in nobody but its owner.
"""

from ipaddress import ip_address
from typing import Any, NamedTuple, cast

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from jhansi_runtime.errors import AccessError, UnauthenticatedError
from jhansi_runtime.spec import Key

__all__ = ["OVER_UNIX_SOCKET", "Caller", "admit"]

OVER_UNIX_SOCKET = "over_unix_socket"  # in scope["state"]: whether a request came over one

KEY_PROTOCOL = "jhansi.key."  # a WebSocket's client may offer this and its key as a subprotocol
ALL_SCOPES = frozenset({"read", "write", "exec", "audit", "admin"})
_LOOPBACK_NAMES = frozenset({"localhost", "localhost.localdomain", "ip6-localhost"})

AnyConnection = ASGIConnection[Any, Any, Any, Any]


class Caller(NamedTuple):
    """Who calls: actor as the audit log names them; owner, whose sandboxes alone they see; key, unless local."""

    actor: str | None
    owner: str | None
    scopes: frozenset[str]
    key: Key | None = None


_LOCAL = Caller(None, None, ALL_SCOPES)


async def admit(connection: AnyConnection, handler: BaseRouteHandler) -> None:
    """A guard of every route: AccessError unless the caller may do what the route says that it `needs`."""
    # It awaits nothing: Litestar has a thread call one that is no coroutine, which takes longer than all that it does.
    service = connection.app.state.service
    over_tcp = _is_over_tcp(connection)
    if over_tcp:
        _check_names(connection, service.settings.allowed_hosts)
    needs = handler.opt.get("needs")
    if needs is None:
        return
    caller = _caller(connection, over_tcp=over_tcp)
    if needs not in caller.scopes:
        raise AccessError(f"this key has no scope {needs!r}", remedy="use a key that was created with it")
    connection.scope["state"]["caller"] = caller


def _caller(connection: AnyConnection, *, over_tcp: bool) -> Caller:
    service = connection.app.state.service
    if not over_tcp or not service.needs_key():
        return _LOCAL
    token = _token(connection)
    if not token:
        raise UnauthenticatedError("a key is needed", remedy="send it as: Authorization: Bearer jk_...")
    key = service.keys.verify(token)
    if key is None:
        raise UnauthenticatedError("the key is not valid", remedy="ask for a new one: jhansi-run keys create")
    scopes = frozenset(key.scopes)
    return Caller(key.id, None if "admin" in scopes else key.id, scopes, key)


def _token(connection: AnyConnection) -> str:
    """The key that was sent. A page in a browser can give a WebSocket no header, but subprotocols to choose from."""
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    offered = cast("list[str]", connection.scope.get("subprotocols", []))
    return next((name.removeprefix(KEY_PROTOCOL) for name in offered if name.startswith(KEY_PROTOCOL)), "")


def _is_over_tcp(connection: AnyConnection) -> bool:
    """Whether it came over TCP. Whoever serves the application says so of a Unix socket, and of nothing else."""
    return not connection.scope["state"].get(OVER_UNIX_SOCKET, False)


def _check_names(connection: AnyConnection, allowed: list[str]) -> None:
    host = connection.headers.get("host", "")
    name = _without_port(host)
    if not (name in _LOOPBACK_NAMES or name in allowed or _is_address(name)):
        raise AccessError(
            "this server does not go by the name in the Host header",
            remedy="use its address, or start it with: jhansi-run serve --allow-host NAME",
        )
    origin = connection.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != host:
        raise AccessError("a page of another origin may not call this server")


def _without_port(host: str) -> str:
    name = host.lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0]


def _is_address(name: str) -> bool:
    """Whether it is an address: no resolver answers for one, so no page can rebind it."""
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
