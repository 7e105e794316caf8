"""The options and arguments that commands share."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from jhansi_runtime.cli.opening import open_runtime
from jhansi_runtime.errors import InvalidRequestError
from jhansi_runtime.quantities import parse_duration, parse_size

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = [
    "AS_JSON",
    "LANGUAGE",
    "ROOTFS",
    "SANDBOX",
    "complete_language",
    "complete_path",
    "complete_sandbox",
    "duration",
    "given",
    "limit_options",
    "pair",
    "size",
]

_Command = TypeVar("_Command", bound=Callable[..., object])


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were on the command line."""
    return {name: value for name, value in options.items() if value is not None}


def size(text: str) -> int:
    """A parameter type: bytes."""
    with _usage_errors():
        return parse_size(text)


def duration(text: str) -> float:
    """A parameter type: seconds."""
    with _usage_errors():
        return parse_duration(text)


def pair(text: str) -> tuple[str, str]:
    """A parameter type: NAME=VALUE, where the name is not empty and the value may be."""
    name, equals, content = text.partition("=")
    if not name or not equals:
        raise click.BadParameter(f"not of the form NAME=VALUE: {text}")
    return name, content


@contextmanager
def _usage_errors() -> Iterator[None]:
    try:
        yield
    except InvalidRequestError as error:
        raise click.BadParameter(str(error)) from None


def complete_sandbox(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list["CompletionItem"]:
    """Ids and names of sandboxes, for a shell."""
    from click.shell_completion import CompletionItem  # noqa: PLC0415 - only a shell asks

    with open_runtime() as runtime:
        sandboxes = runtime.sandboxes()
    return [
        CompletionItem(reference, help=sandbox.language)
        for sandbox in sandboxes
        for reference in (sandbox.name, sandbox.id)
        if reference is not None and reference.startswith(incomplete)
    ]


def complete_language(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Languages that have a recipe, for a shell."""
    import os  # noqa: PLC0415 - only a shell asks

    from jhansi_runtime.paths import shipped  # noqa: PLC0415 - likewise

    recipes = sorted(name.removesuffix(".toml") for name in os.listdir(shipped("rootfs")) if name.endswith(".toml"))
    return [language for language in recipes if language.startswith(incomplete)]


def complete_path(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list["CompletionItem"]:
    """Paths in the workspace of the sandbox named before, for a shell: one folder at a time."""
    from click.shell_completion import CompletionItem  # noqa: PLC0415 - only a shell asks

    folder = incomplete.rpartition("/")[0]
    with open_runtime() as runtime:
        entries = runtime.files(context.params["sandbox"], folder)
    # Completions are lines of text: a name that is not one line of it has to be typed.
    return [
        CompletionItem(entry.path, help=entry.type)
        for entry in entries
        if entry.path.startswith(incomplete) and entry.path.isprintable()
    ]


SANDBOX = click.argument("sandbox", metavar="SB", shell_complete=complete_sandbox)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout and nothing else there.")
LANGUAGE = click.option(
    "--language", default="python", show_default=True, metavar="LANG", shell_complete=complete_language
)
ROOTFS = click.option(
    "--rootfs",
    type=click.Choice(["recipe", "host"]),
    help="The root tree: built from the language's recipe, or this host's own programs, read-only.",
)
SECCOMP = click.option(
    "--seccomp",
    metavar="NAME|FILE",
    help="The system calls it may make: `default`, `strict` (computing alone), or those of an OCI profile in a file.",
)

LIMITS = (
    ("--memory", size, "Memory of all its processes, and what it has in --tmp [default: 512M]."),
    ("--cpus", click.FLOAT, "How many CPUs' worth of time it gets, and how many it sees [default: 1]."),
    ("--pids", click.INT, "Processes and threads at once [default: 128]."),
    ("--timeout", duration, "Wall time [default: 30s]."),
    ("--cpu-time", duration, "CPU time of all its processes together [default: 30s]."),
    ("--output", size, "Stdout and stderr together [default: 1M]."),
    ("--file-size", size, "The largest file that may be written [default: 256M]."),
    ("--tmp", size, "What /tmp, /dev/shm and the home directory hold together [default: 64M]."),
    ("--nofile", click.INT, "Open files of each process [default: 1024]."),
    ("--disk", size, "What the workspace may hold [default: 1G]."),
    ("--disk-files", click.INT, "Files and folders that the workspace may hold [default: 250000]."),
)


def limit_options(command: _Command) -> _Command:
    """The limits of an exec as options; each reaches the command under its name in spec.Limits, or as None."""
    command = click.option(
        "--require-cgroup",
        is_flag=True,
        default=None,
        help="Refuse to run where control groups cannot enforce the limits.",
    )(command)
    for name, kind, explanation in reversed(LIMITS):
        command = click.option(name, type=kind, help=explanation)(command)
    return command
