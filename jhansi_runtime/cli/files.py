"""put, get, files: what goes into a workspace, comes out of it, and is in it."""

import os
import stat
import time
from collections.abc import Iterator, Sequence

import click

from jhansi_runtime.cli.opening import open_runtime
from jhansi_runtime.cli.parameters import AS_JSON, SANDBOX, complete_path
from jhansi_runtime.cli.records import print_json
from jhansi_runtime.rendering import StatusLine, table

__all__ = ["COMMANDS"]

PATIENCE = 1.0  # seconds without a word


@click.command("put")
@SANDBOX
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path())
@click.option("--to", default="", metavar="DIR", help="Into this folder of the workspace.")
@AS_JSON
def put_command(sandbox: str, paths: tuple[str, ...], to: str, as_json: bool) -> None:
    """Copy files and folders into a workspace.

    Each keeps its own name.
    """
    status = StatusLine()
    written = []
    with open_runtime(status) as runtime:
        for path in _reported(paths, "putting", status):
            written += runtime.put(sandbox, path, to)
    if as_json:
        print_json(written)


@click.command("get")
@SANDBOX
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, shell_complete=complete_path)
@click.option(
    "-o", "--output", metavar="OUT", default=".", type=click.Path(), help="Write it here; into it, if it is a folder."
)
@AS_JSON
def get_command(sandbox: str, paths: tuple[str, ...], output: str, as_json: bool) -> None:
    """Copy files and folders out of a workspace.

    They go into the current folder unless --output names another place.
    """
    if len(paths) > 1 and not os.path.isdir(output):
        raise click.UsageError(f"--output is not a folder, and there are {len(paths)} paths to write: {output}")
    status = StatusLine()
    with open_runtime(status) as runtime:
        copied = [
            {"path": path, "bytes": runtime.get(sandbox, path, output)} for path in _reported(paths, "getting", status)
        ]
    if as_json:
        print_json(copied)


@click.command("files")
@SANDBOX
@click.argument("directory", metavar="[DIR]", default="", shell_complete=complete_path)
@click.option("-r", "--recursive", is_flag=True, help="And what is in its folders.")
@AS_JSON
def files_command(sandbox: str, directory: str, recursive: bool, as_json: bool) -> None:
    """List what is in a workspace, or in a folder of it."""
    with open_runtime() as runtime:
        entries = runtime.files(sandbox, directory, recursive=recursive)
    if as_json:
        print_json(entries)
        return
    rows = (
        (entry.type, stat.filemode(entry.mode)[1:], str(entry.size), entry.mtime, entry.path)  # [1:]: type has a column
        for entry in entries
    )
    print(table(("TYPE", "MODE", "SIZE", "MODIFIED", "NAME"), rows))


COMMANDS = {"put": put_command, "get": get_command, "files": files_command}


def _reported(paths: Sequence[str], verb: str, status: StatusLine) -> Iterator[str]:
    """Each path; once a second the status line says how far we are."""
    spoken = time.monotonic()
    for number, path in enumerate(paths):
        if time.monotonic() - spoken > PATIENCE:
            spoken = time.monotonic()
            status.show(f"{verb} {path}: {number} of {len(paths)}, {number * 100 // len(paths)}%")
        yield path
