"""exec, run, shell: their options and arguments. What they do is in execs.py."""

from typing import TYPE_CHECKING, Any

import click

from jhansi_runtime.cli.execs import OneShot, exec_and_report
from jhansi_runtime.cli.parameters import (
    AS_JSON,
    LANGUAGE,
    ROOTFS,
    SANDBOX,
    SECCOMP,
    complete_path,
    given,
    limit_options,
    pair,
)

if TYPE_CHECKING:
    from jhansi_runtime.cli.opening import Source

__all__ = ["COMMANDS"]

_ENVIRONMENT = click.option(
    "--env", "pairs", type=pair, multiple=True, metavar="K=V", help="A variable of the job. May be repeated."
)
_STDIN = click.option("--stdin", "stdin_path", metavar="FILE", help="Read stdin from this file of the host.")
_RESULT = click.option(
    "--result", "result_path", metavar="FILE", help="Write the result, as JSON, to this file of the host."
)
_ENDS_OPTIONS = {"allow_interspersed_args": False}  # what follows the first word that is no option is the program's


@click.command("exec", context_settings=_ENDS_OPTIONS)
@click.option("--command", "is_command", is_flag=True, help="Run a program of the rootfs, not a file of the workspace.")
@limit_options
@ROOTFS
@SECCOMP
@_ENVIRONMENT
@_STDIN
@AS_JSON
@_RESULT
@SANDBOX
@click.argument(
    "words",
    metavar="FILENAME [ARGS]...",
    nargs=-1,
    required=True,
    type=click.UNPROCESSED,
    shell_complete=complete_path,
)
@click.pass_obj
def exec_command(
    source: "Source | None",
    /,
    *,
    sandbox: str,
    words: tuple[str, ...],
    is_command: bool,
    rootfs: str | None,
    seccomp: str | None,
    pairs: tuple[tuple[str, str], ...],
    stdin_path: str | None,
    as_json: bool,
    result_path: str | None,
    **limits: float | bool | None,
) -> int:
    """Run a file of the workspace in a fresh container.

    Options go before SB; everything after FILENAME belongs to the program. Before a FILENAME that starts with a dash
    write `--`. Limits that are not given are those the sandbox was created with.
    """
    program, *arguments = _program_words(words)
    what: dict[str, Any] = {"filename": program, "args": arguments}
    if is_command:
        what = {"command": [program, *arguments]}
    request = {"sandbox": sandbox, **what, "env": dict(pairs), "rootfs": rootfs, "seccomp": seccomp}
    request["limits"] = given(limits)
    return exec_and_report(request, source=source, stdin_path=stdin_path, as_json=as_json, result_path=result_path)


@click.command("run", context_settings=_ENDS_OPTIONS)
@click.option("--workspace", metavar="DIR", help="Run in this folder of the host, which holds FILE, and keep it.")
@LANGUAGE
@limit_options
@ROOTFS
@SECCOMP
@_ENVIRONMENT
@_STDIN
@AS_JSON
@_RESULT
@click.argument("words", metavar="FILE [ARGS]...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_obj
def run_command(
    source: "Source | None",
    /,
    *,
    words: tuple[str, ...],
    workspace: str | None,
    language: str,
    rootfs: str | None,
    seccomp: str | None,
    pairs: tuple[tuple[str, str], ...],
    stdin_path: str | None,
    as_json: bool,
    result_path: str | None,
    **limits: float | bool | None,
) -> int:
    """Run one file of the host in a sandbox that is gone afterwards.

    Everything after FILE belongs to the program. Without --workspace the sandbox holds FILE alone.
    """
    file, *arguments = words
    request = {"sandbox": "", "args": arguments, "env": dict(pairs), "rootfs": rootfs, "seccomp": seccomp}
    request["limits"] = given(limits)
    one_shot = OneShot(file, language, workspace)
    return exec_and_report(
        request, one_shot, source=source, stdin_path=stdin_path, as_json=as_json, result_path=result_path
    )


@click.command("shell")
@limit_options
@ROOTFS
@SECCOMP
@_ENVIRONMENT
@SANDBOX
@click.pass_obj
def shell_command(
    source: "Source | None",
    /,
    *,
    sandbox: str,
    rootfs: str | None,
    seccomp: str | None,
    pairs: tuple[tuple[str, str], ...],
    **limits: float | bool | None,
) -> int:
    """Open a terminal in a fresh container.

    It may last a day, in wall and in CPU time, and print a gigabyte, unless limits are given that say otherwise.
    """
    from jhansi_runtime.spec import SESSION, SESSION_LIMITS  # noqa: PLC0415 - see open_runtime

    request = {"sandbox": sandbox, "command": SESSION, "env": dict(pairs), "rootfs": rootfs, "seccomp": seccomp}
    return exec_and_report(request | {"limits": SESSION_LIMITS | given(limits)}, source=source)


COMMANDS = {"exec": exec_command, "run": run_command, "shell": shell_command}


def _program_words(words: tuple[str, ...]) -> tuple[str, ...]:
    """The words without the `--` that may precede them. A dash there without it is an option put too late."""
    if words[0] == "--":
        words = words[1:]
        if not words:
            raise click.UsageError("Missing argument 'FILENAME'.")
    elif words[0].startswith("-"):
        raise click.UsageError(f"{words[0]} follows SB: options go before SB, and a file of that name after '--'.")
    return words
