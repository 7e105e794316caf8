"""Every command of the command line, as click sees it.

The commands themselves live by subject in the modules beside this one; `parameters` holds the options and arguments
they share. Only the module of the command that was asked for is loaded.
"""

import contextlib
import sys
from collections.abc import Mapping
from importlib import import_module
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any

import click

from jhansi_runtime.cli import COMPLETION_VARIABLE, PROGRAM, fail
from jhansi_runtime.errors import JhansiError

if TYPE_CHECKING:
    from jhansi_runtime.cli.opening import Source

__all__ = ["complete", "invoke", "jhansi_run"]

MODULE_OF = {
    "create": "sandboxes",
    "ls": "sandboxes",
    "show": "sandboxes",
    "rm": "sandboxes",
    "gc": "sandboxes",
    "put": "files",
    "get": "files",
    "files": "files",
    "exec": "programs",
    "run": "programs",
    "shell": "programs",
    "rootfs": "rootfs",
    "audit": "audit",
    "keys": "keys",
    "serve": "server",
    "doctor": "host",
    "completion": "host",
}


class CommandsBySubject(click.Group):
    """A group that loads the module of a command when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - the signature is click's
        """Every command, in the order a newcomer meets them."""
        return list(MODULE_OF)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - likewise
        """The command of that name, or None."""
        if cmd_name not in MODULE_OF:
            return None
        module = import_module(f"jhansi_runtime.cli.{MODULE_OF[cmd_name]}")
        commands: Mapping[str, click.Command] = module.COMMANDS
        return commands[cmd_name]


@click.group(
    cls=CommandsBySubject,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="SB is a sandbox's id, a unique prefix of one, or its name. Exit status of exec and run: the program's own; "
    "128+n when signal n ended it; 124 out of time; 125 jhansi-run itself failed; 126 the file cannot be executed; "
    "127 it is not there.",
)
@click.version_option(package_name="jhansi-runtime")
def jhansi_run() -> None:
    """Run untrusted code in persistent sandboxes on this host."""


def invoke(arguments: list[str], source: "Source | None") -> int:
    """What click's own `main` does, without its exit statuses."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a locale without the character is no reason to fail
    try:
        with jhansi_run.make_context(PROGRAM, arguments, obj=source) as context:
            status: Any = jhansi_run.invoke(context)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.UsageError as error:
        return fail(error.format_message(), _hint(error))
    return status or 0


def complete(instruction: str) -> int:
    """Answer a shell that asks for completions; what goes wrong must not be said in the middle of a typed line."""
    from click.shell_completion import shell_complete  # noqa: PLC0415 - only a shell asks

    with contextlib.suppress(JhansiError, OSError):
        return shell_complete(jhansi_run, {}, PROGRAM, COMPLETION_VARIABLE, instruction)
    return JhansiError.exit_code


def _hint(error: click.UsageError) -> str:
    path = error.ctx.command_path if error.ctx else PROGRAM
    return f"Try '{path} --help'."
