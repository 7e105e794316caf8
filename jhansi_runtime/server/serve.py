"""The server of one installation: its settings, keys, runtime and application, on the sockets that were asked for.

This composes; httpd.py serves, listening.py opens the sockets, supervision.py tells a supervisor how things stand.
"""

import gc
import os
import resource
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

from msgspec import structs

from jhansi_runtime import pooling
from jhansi_runtime.api import create_app
from jhansi_runtime.keys import KeyStore
from jhansi_runtime.logs import configure, log
from jhansi_runtime.paths import Paths
from jhansi_runtime.runtime import Runtime
from jhansi_runtime.server.attending import attending
from jhansi_runtime.server.httpd import serve
from jhansi_runtime.server.listening import Listener, Where, adopt, is_wildcard, listen, passed_descriptors
from jhansi_runtime.server.supervision import Supervisor
from jhansi_runtime.settings import load
from jhansi_runtime.spec import ServerSettings

__all__ = ["Options", "run"]


class Options(NamedTuple):
    """What the command line says of a server. grace (seconds) None: what the settings say; host None: no TCP."""

    host: str | None
    port: int
    socket: str | None = None
    grace: float | None = None
    allowed_hosts: Sequence[str] = ()


def run(options: Options, environ: Mapping[str, str]) -> bool:
    """Run the server of this installation until a signal ends it; whether its end was an orderly one.

    JhansiError says why it does not start.
    """
    configure()
    gc.enable()  # the command line does without, and ends before that matters
    _allow_many_descriptors()
    paths = Paths.from_environment(environ)
    said = load(paths.config)
    settings = _settings(said.server, options)
    supervisor = Supervisor.from_environment(environ)
    keys = KeyStore(paths.keys)
    has_keys = not keys.is_empty()
    with (
        _listeners(options, paths, environ, has_keys=has_keys) as listeners,
        Runtime(
            paths, progress=_log_progress, slots=pooling.slots(said.pool, unless_said=pooling.FOR_A_SERVER)
        ) as runtime,
        attending(_unix_path(listeners, paths), runtime.lend) as command_lines,
    ):
        app = create_app(runtime, keys=keys, settings=settings)
        actor, kinds = f"uid:{os.getuid()}", sorted({listener.kind for listener in listeners})
        runtime.audit.append("server.start", actor=actor, addresses=kinds)
        try:
            return serve(app, listeners, grace=settings.grace, supervisor=supervisor)
        finally:
            if command_lines is not None:
                command_lines.end()  # while there are slots yet
            runtime.audit.append("server.stop", actor=actor, addresses=kinds)


def _allow_many_descriptors() -> None:
    """Take as many as are allowed: each caller needs some, and the limit of 1024 is there for users of select(2)."""
    _, allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, allowed))


def _settings(settings: ServerSettings, options: Options) -> ServerSettings:
    """The settings with what the command line adds; a server answers to the name it is bound to."""
    names = [*settings.allowed_hosts, *options.allowed_hosts]
    if options.host is not None and not is_wildcard(options.host):
        names.append(options.host)
    grace = settings.grace if options.grace is None else options.grace
    return structs.replace(settings, allowed_hosts=list(dict.fromkeys(names)), grace=grace)


def _listeners(
    options: Options, paths: Paths, environ: Mapping[str, str], *, has_keys: bool
) -> AbstractContextManager[list[Listener]]:
    passed = passed_descriptors(environ)
    if passed:
        return adopt(passed, has_keys=has_keys)
    return listen(Where(options.host, options.port, options.socket or paths.socket), has_keys=has_keys)


def _unix_path(listeners: Sequence[Listener], paths: Paths) -> str:
    """Where clients look for our Unix socket: where it is, else where the environment says."""
    found = [str(listener.socket.getsockname()) for listener in listeners if listener.kind == "unix"]
    return found[0] if found else paths.socket


def _log_progress(line: str) -> None:
    del line  # it is for a terminal, and may name a path
    log("runtime.busy")
