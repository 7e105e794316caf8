"""audit show, verify, export: what the log holds, and whether it still holds it."""

import os
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click

from jhansi_runtime.cli.opening import open_runtime
from jhansi_runtime.cli.parameters import AS_JSON, complete_sandbox
from jhansi_runtime.cli.records import print_json
from jhansi_runtime.errors import InvalidRequestError, NotFoundError
from jhansi_runtime.quantities import parse_duration
from jhansi_runtime.rendering import printable

if TYPE_CHECKING:
    from jhansi_runtime.runtime import Runtime

__all__ = ["COMMANDS"]

NOT_SOUND = 1

# Columns are as wide as what we write in them, not as what is there: with --follow nobody knows what will come.
LINE = "{time:<27}  {event:<14}  {sandbox:<19}  {run:<26}  {what}"
TOLD = (
    *("argv", "status", "exit_code", "signal", "name", "language", "files", "source", "key_id", "scopes", "addresses"),
    *("cut_bytes", "lost_records"),
)


@click.group("audit", no_args_is_help=False)
def audit_group() -> None:
    """Read, check and copy the audit log."""


@audit_group.command("show")
@click.option(
    "--sandbox", metavar="SB", help="Only of this sandbox, also when it is gone.", shell_complete=complete_sandbox
)
@click.option("--run", "run_id", metavar="ID", help="Only of this run.")
@click.option("--since", metavar="T", help="Only from this time on: 2026-01-31T12:00:00Z, or 2h ago.")
@click.option("--follow", is_flag=True, help="Go on with what comes, until interrupted.")
@click.option("--json", "as_json", is_flag=True, help="One JSON array; with --follow one record a line.")
def show_command(sandbox: str | None, run_id: str | None, since: str | None, follow: bool, as_json: bool) -> None:
    """Show audit records: when, what happened, in which sandbox and run."""
    with open_runtime() as runtime:
        records = runtime.audit.records(
            sandbox_id=_identity(runtime, sandbox) if sandbox else None,
            run_id=run_id,
            since=_instant(since) if since else None,
            follow=follow,
        )
        if follow:
            _print_each(records, as_json)
        elif as_json:
            print_json(list(records))
        else:
            _print_each(list(records), as_json)


@audit_group.command("verify")
@click.option("--anchor", metavar="SEQ:HASH", help="What `audit export --anchor` printed once.")
@AS_JSON
def verify_command(anchor: str | None, as_json: bool) -> int:
    """Check that the log is whole.

    The first record that is altered, missing, reordered or cut off is named, and the exit status is 1.
    """
    with open_runtime() as runtime:
        found = runtime.audit.verify(anchor)
    if as_json:
        print_json(found._asdict())
    elif found.problem is not None:
        print(printable(found.problem))
    else:
        print(f"{found.records} records, every one as it was written; the last is {found.head}")
    return 0 if found.ok else NOT_SOUND


@audit_group.command("export")
@click.option("-o", "--output", metavar="FILE", help="Write the log to this file instead of stdout.")
@click.option(
    "--anchor", "with_anchor", is_flag=True, help="Print the last record's number and hash, to keep elsewhere."
)
def export_command(output: str | None, with_anchor: bool) -> None:
    """Copy the log, byte for byte; with --anchor alone, print just what identifies it."""
    with open_runtime() as runtime:
        anchor = runtime.audit.anchor() if with_anchor else None
        if output is not None or anchor is None:
            with open(output or os.dup(1), "wb") as file:
                runtime.audit.export(file)
    if anchor is not None:
        print(anchor)


COMMANDS = {"audit": audit_group}


def _identity(runtime: "Runtime", reference: str) -> str:
    """The id the log knows a sandbox by; one that was removed goes by its whole id."""
    try:
        return runtime.sandbox(reference).id
    except NotFoundError:
        return reference


def _instant(text: str) -> str:
    """A duration as the instant that long ago; anything else is the log's to read."""
    try:
        seconds = parse_duration(text)
    except InvalidRequestError:
        return text
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - seconds))


def _print_each(records: Iterable[Mapping[str, Any]], as_json: bool) -> None:
    if not as_json:
        print(LINE.format(time="TIME", event="EVENT", sandbox="SANDBOX", run="RUN", what="WHAT"), flush=True)
    for record in records:
        if as_json:
            print_json(record)
        else:
            print(_line(record), flush=True)


def _line(record: Mapping[str, Any]) -> str:
    """What a person asks of a record first; all of it is in --json."""
    what = " ".join(f"{name}={record[name]}" for name in TOLD if record.get(name) not in (None, "", [], {}))
    sandbox, run = record["sandbox_id"] or "-", record["run_id"] or "-"
    return printable(LINE.format(time=record["time"], event=record["event"], sandbox=sandbox, run=run, what=what))
