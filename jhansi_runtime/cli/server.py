"""serve: the HTTP API of this installation, until a signal ends it."""

import os
import sys
from typing import TYPE_CHECKING

import click

from jhansi_runtime.cli import PROGRAM
from jhansi_runtime.cli.parameters import duration
from jhansi_runtime.errors import HostError
from jhansi_runtime.quantities import duration_text

if TYPE_CHECKING:
    from jhansi_runtime.server.serve import Options

__all__ = ["COMMANDS"]

DISORDERLY = 1
PORT = 8700


@click.command("serve")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="The TCP address.")
@click.option("--port", default=PORT, show_default=True, type=click.IntRange(0, 65_535), help="0 takes any free one.")
@click.option(
    "--socket", metavar="PATH", help="The Unix socket, which only this user may open [default: $JHANSI_SOCKET]."
)
@click.option("--no-tcp", is_flag=True, help="Serve the Unix socket alone.")
@click.option("--grace", type=duration, help="How long requests may go on after SIGTERM [default: 10s].")
@click.option(
    "--allow-host", "allowed_hosts", multiple=True, metavar="NAME", help="Answer to this name too. May be repeated."
)
@click.option("--install-unit", is_flag=True, help="Write a systemd user unit of this very command, and serve nothing.")
def serve_command(
    *,
    host: str,
    port: int,
    socket: str | None,
    no_tcp: bool,
    grace: float | None,
    allowed_hosts: tuple[str, ...],
    install_unit: bool,
) -> int:
    """Serve the HTTP API over TCP and a Unix socket.

    An address other than loopback needs API keys (keys create). Sockets that systemd passes are taken instead. The
    first SIGTERM or Ctrl-C lets requests in flight end, the second ends them. The log is on stderr, one JSON object a
    line.
    """
    try:
        from jhansi_runtime.server.serve import Options, run  # noqa: PLC0415 - it loads the whole server
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("jhansi_runtime"):
            raise
        raise HostError(
            f"the server needs packages that are not installed, such as {error.name}",
            remedy="run: pip install 'jhansi-runtime[server]'",
        ) from None

    options = Options(None if no_tcp else host, port, socket, grace, allowed_hosts)
    if install_unit:
        _install_unit(options)
        return 0
    return 0 if run(options, os.environ) else DISORDERLY


COMMANDS = {"serve": serve_command}


def _install_unit(options: "Options") -> None:
    from jhansi_runtime.paths import Paths  # noqa: PLC0415 - likewise
    from jhansi_runtime.server.listening import Where  # noqa: PLC0415 - see serve_command
    from jhansi_runtime.server.unit import ACTIVATION, install  # noqa: PLC0415 - likewise

    where = Where(options.host, options.port, os.path.abspath(options.socket or Paths.from_environment().socket))
    words = ["--no-tcp"] if where.host is None else [f"--host={where.host}", f"--port={where.port}"]
    words.append(f"--socket={where.path}")
    if options.grace is not None:
        words.append(f"--grace={duration_text(options.grace)}")
    words += [f"--allow-host={name}" for name in options.allowed_hosts]
    install([*_program(), "serve", *words], where, options.grace, os.environ)
    print("\n".join(ACTIVATION))


def _program() -> list[str]:
    """This very jhansi-run, by its absolute path; when it was started as a module, the interpreter and the module."""
    path = os.path.abspath(sys.argv[0])
    return [path] if os.path.basename(path) == PROGRAM else [sys.executable, "-m", "jhansi_runtime"]
