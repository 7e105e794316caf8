"""The command line: decode the arguments, call Runtime, print.

`run` is the way in. It turns every end a command can have into the exit statuses of CONTRACT.md, and every error into
one line on stderr. The commands themselves live by subject in the modules beside this one; `parameters` holds the
options and arguments they share.

Only the module of the command that was asked for is loaded, and it loads the runtime when it needs one: starting up
is most of what a short exec costs.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from io import TextIOWrapper
from typing import Any

import click

from jhansi_runtime.errors import JhansiError
from jhansi_runtime.isolation.spawn import Spawned
from jhansi_runtime.rendering import printable

__all__ = ["COMPLETION_VARIABLE", "PROGRAM", "jhansi_run", "run"]

PROGRAM = "jhansi-run"
COMPLETION_VARIABLE = "_JHANSI_RUN_COMPLETE"
PIPE_CLOSED = 141  # 128 + SIGPIPE

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
        commands: Mapping[str, click.Command] = import_module(f"{__name__}.{MODULE_OF[cmd_name]}").COMMANDS
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


def run(arguments: Sequence[str], spawned: Spawned | None = None) -> int:
    """Run one command line; the exit status. All output is flushed. spawned is a launcher started ahead, if any."""
    try:
        instruction = os.environ.get(COMPLETION_VARIABLE)
        status = _invoke(list(arguments) or ["--help"], spawned) if instruction is None else _complete(instruction)
        sys.stdout.flush()
    except click.exceptions.Exit as end:
        status = end.exit_code
    except click.UsageError as error:
        status = _fail(error.format_message(), _hint(error))
    except JhansiError as error:
        status = _fail(str(error), status=error.exit_code)
    except BrokenPipeError:
        status = PIPE_CLOSED
    except OSError as error:
        status = _fail(_unexpected(error))
    return status


def _complete(instruction: str) -> int:
    """Answer a shell that asks for completions; what goes wrong must not be said in the middle of a typed line."""
    from click.shell_completion import shell_complete  # noqa: PLC0415 - only a shell asks

    with contextlib.suppress(JhansiError, OSError):
        return shell_complete(jhansi_run, {}, PROGRAM, COMPLETION_VARIABLE, instruction)
    return JhansiError.exit_code


def _invoke(arguments: list[str], spawned: Spawned | None) -> int:
    """What click's own `main` does, without its exit statuses."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a locale without the character is no reason to fail
    with jhansi_run.make_context(PROGRAM, arguments, obj=spawned) as context:
        status: Any = jhansi_run.invoke(context)
    return status or 0


def _hint(error: click.UsageError) -> str:
    path = error.ctx.command_path if error.ctx else PROGRAM
    return f"Try '{path} --help'."


def _unexpected(error: OSError) -> str:
    """What a call said that nothing was expected to refuse. One that this host lacks has a remedy."""
    message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
    if error.errno != errno.ENOSYS:
        return message
    from jhansi_runtime.remedies import remedy_for  # noqa: PLC0415 - needed only when something is wrong

    return f"{message}; {remedy_for('system call', errno.ENOSYS)}"


def _fail(message: str, *hints: str, status: int = JhansiError.exit_code) -> int:
    """Print the error line; the exit status. A stderr that is gone takes the line with it, not the status."""
    with contextlib.suppress(OSError):
        print(f"{PROGRAM}: error: {printable(message)}", *hints, sep="\n", file=sys.stderr, flush=True)
    return status
