"""keys create, ls, revoke: who may use the HTTP API."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from jhansi_runtime.cli.opening import open_runtime
from jhansi_runtime.cli.parameters import AS_JSON, duration
from jhansi_runtime.cli.records import print_json
from jhansi_runtime.errors import AuditError, JhansiError
from jhansi_runtime.rendering import printable, table

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from jhansi_runtime.audit import AuditLog
    from jhansi_runtime.keys import KeyStore
    from jhansi_runtime.spec import Key

__all__ = ["COMMANDS"]

SCOPES = ("read", "write", "exec", "audit", "admin")
USUAL_SCOPES = ("read", "write", "exec")


def complete_key(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list["CompletionItem"]:
    """Ids and names of keys, for a shell."""
    from click.shell_completion import CompletionItem  # noqa: PLC0415 - only a shell asks

    with _open_store() as (store, _):
        keys = store.list()
    return [
        CompletionItem(reference, help=" ".join(key.scopes))
        for key in keys
        for reference in (key.name, key.id)
        if reference is not None and reference.startswith(incomplete)
    ]


@click.group("keys", no_args_is_help=False)
def keys_group() -> None:
    """Create, list and revoke the keys of the HTTP API."""


@keys_group.command("create")
@click.option("--name", help="A name to call it by, which no other key has.")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(SCOPES),
    multiple=True,
    default=USUAL_SCOPES,
    show_default=True,
    help="What it may do. May be repeated.",
)
@click.option("--ttl", type=duration, help="Let it end after this time [default: never].")
@click.option("--max-execs", type=click.INT, help="Execs at once [default: as many as the server runs].")
@click.option("--max-sandboxes", type=click.INT, help="Sandboxes at once [default: any number].")
@AS_JSON
def create_command(
    name: str | None,
    scopes: tuple[str, ...],
    ttl: float | None,
    max_execs: int | None,
    max_sandboxes: int | None,
    as_json: bool,
) -> None:
    """Make a key and print its token, which is shown this once."""
    with _open_store() as (store, audit):
        key, token = store.create(name=name, scopes=scopes, ttl=ttl, max_execs=max_execs, max_sandboxes=max_sandboxes)
        try:
            _record(audit, "key.create", key)
        except AuditError:
            store.revoke(key.id)  # nobody has seen its token
            raise
    if as_json:
        print_json({"key": key, "token": token})
        return
    print(token, flush=True)
    print(f"jhansi-run: this is the token of {key.id}: keep it, it is not shown again", file=sys.stderr)


@keys_group.command("ls")
@AS_JSON
def ls_command(as_json: bool) -> None:
    """List keys; their tokens nobody can see."""
    with _open_store() as (store, _):
        keys = store.list()
    if as_json:
        print_json(keys)
    else:
        header = ("ID", "NAME", "SCOPES", "CREATED", "EXPIRES", "MAX-EXECS", "MAX-SANDBOXES")
        print(table(header, map(_row, keys)))


@keys_group.command("revoke")
@click.argument("references", metavar="KEY...", nargs=-1, required=True, shell_complete=complete_key)
@AS_JSON
def revoke_command(references: tuple[str, ...], as_json: bool) -> int:
    """Make keys invalid, at once and for good.

    KEY is a key's id, a unique prefix of one, or its name. One that cannot be revoked does not keep the others.
    """
    revoked = []
    status = 0
    with _open_store() as (store, audit):
        for reference in references:
            try:
                key = store.revoke(reference)
                revoked.append(key)
                _record(audit, "key.revoke", key)  # afterwards: a log that cannot be written must not keep a key alive
            except JhansiError as error:
                print(f"jhansi-run: error: {printable(str(error))}", file=sys.stderr)
                status = error.exit_code
    if as_json:
        print_json(revoked)
    return status


COMMANDS = {"keys": keys_group}


@contextmanager
def _open_store() -> Iterator[tuple["KeyStore", "AuditLog"]]:
    with open_runtime() as runtime:
        from jhansi_runtime.keys import KeyStore  # noqa: PLC0415 - see opening: after it has loaded msgspec

        yield KeyStore(runtime.paths.keys), runtime.audit


def _record(audit: "AuditLog", event: str, key: "Key") -> None:
    audit.append(event, actor=f"uid:{os.getuid()}", key_id=key.id, scopes=key.scopes)


def _row(key: "Key") -> tuple[str, ...]:
    return (
        key.id,
        key.name or "-",
        " ".join(key.scopes),
        key.created_at,
        key.expires_at or "-",
        str(key.max_execs or "-"),
        str(key.max_sandboxes or "-"),
    )
