"""create, ls, show, rm, gc: sandboxes as a whole."""

import sys
from typing import TYPE_CHECKING

import click

from jhansi_runtime.cli.opening import open_runtime, profile_name
from jhansi_runtime.cli.parameters import (
    AS_JSON,
    LANGUAGE,
    ROOTFS,
    SANDBOX,
    SECCOMP,
    complete_sandbox,
    duration,
    given,
    limit_options,
    pair,
)
from jhansi_runtime.cli.records import print_json
from jhansi_runtime.errors import JhansiError
from jhansi_runtime.quantities import duration_text, size_text
from jhansi_runtime.rendering import printable, table

if TYPE_CHECKING:
    from jhansi_runtime.spec import Limits, RootfsChoice, Sandbox

__all__ = ["COMMANDS"]


@click.command("create")
@LANGUAGE
@click.option("--name", help="A name to call it by, which no other sandbox has.")
@click.option("--label", "labels", type=pair, multiple=True, metavar="K=V", help="A label. May be repeated.")
@click.option("--ttl", type=duration, help="Let `gc` remove it after this time.")
@ROOTFS
@SECCOMP
@click.option(
    "--no-zygote", is_flag=True, help="Start an interpreter for each exec, also where a server has some that wait."
)
@click.option(
    "--preload",
    multiple=True,
    metavar="MODULE",
    help="Have this imported in those that wait, or `auto`: what each file imports. May be repeated.",
)
@limit_options
@AS_JSON
def create_command(
    *,
    language: str,
    name: str | None,
    labels: tuple[tuple[str, str], ...],
    ttl: float | None,
    rootfs: "RootfsChoice | None",
    seccomp: str | None,
    no_zygote: bool,
    preload: tuple[str, ...],
    as_json: bool,
    **limits: float | None,
) -> None:
    """Make a sandbox and print its id. Limits given here are the defaults of its execs."""
    with open_runtime() as runtime:
        sandbox = runtime.create(
            language,
            name=name,
            labels=dict(labels),
            ttl=ttl,
            limits=given(limits),
            rootfs=rootfs or "recipe",
            seccomp=profile_name(runtime, seccomp) or "default",
            zygote=not no_zygote,
            preload="auto" if preload == ("auto",) else preload or None,
        )
    if as_json:
        print_json(sandbox)
    else:
        print(sandbox.id)


@click.command("ls")
@click.option("--label", "labels", type=pair, multiple=True, metavar="K=V", help="Only those with this label.")
@AS_JSON
def ls_command(labels: tuple[tuple[str, str], ...], as_json: bool) -> None:
    """List sandboxes."""
    with open_runtime() as runtime:
        sandboxes = runtime.sandboxes(dict(labels))
        damaged = runtime.damaged()
    for damage in damaged:
        print(f"jhansi-run: {printable(str(damage))}", file=sys.stderr)
    if as_json:
        print_json(sandboxes)
    else:
        print(table(("ID", "NAME", "LANGUAGE", "CREATED", "EXPIRES", "LABELS"), map(_row, sandboxes)))


@click.command("show")
@SANDBOX
@AS_JSON
def show_command(sandbox: str, as_json: bool) -> None:
    """Show a sandbox and its limits."""
    with open_runtime() as runtime:
        record = runtime.sandbox(sandbox)
    if as_json:
        print_json(record)
        return
    facts = {
        "id": record.id,
        "name": record.name or "-",
        "language": record.language,
        "rootfs": record.rootfs,
        "seccomp": record.seccomp,
        "zygote": "yes" if record.zygote else "no",
        "preload": _preload(record),
        "created": record.created_at,
        "expires": record.expires_at or "-",
        "labels": _labels(record),
        **_limits(record.limits),
    }
    width = max(map(len, facts))
    print("\n".join(f"{name:<{width}}  {printable(value)}" for name, value in facts.items()))


@click.command("rm")
@click.argument("references", metavar="SB...", nargs=-1, required=True, shell_complete=complete_sandbox)
@AS_JSON
def rm_command(references: tuple[str, ...], as_json: bool) -> int:
    """Remove sandboxes and everything in them. One that cannot be removed does not keep the others."""
    removed = []
    status = 0
    with open_runtime() as runtime:
        for reference in references:
            try:
                removed.append(runtime.remove(reference))
            except JhansiError as error:
                print(f"jhansi-run: error: {printable(str(error))}", file=sys.stderr)
                status = error.exit_code
    if as_json:
        print_json(removed)
    return status


@click.command("gc")
@AS_JSON
def gc_command(as_json: bool) -> None:
    """Remove the sandboxes whose time is up, and print their ids."""
    with open_runtime() as runtime:
        removed = runtime.collect_garbage()
    if as_json:
        print_json(removed)
    else:
        print("".join(f"{sandbox.id}\n" for sandbox in removed), end="")


COMMANDS = {
    "create": create_command,
    "ls": ls_command,
    "show": show_command,
    "rm": rm_command,
    "gc": gc_command,
}


def _row(sandbox: "Sandbox") -> tuple[str, ...]:
    return (
        sandbox.id,
        sandbox.name or "-",
        sandbox.language,
        sandbox.created_at,
        sandbox.expires_at or "-",
        _labels(sandbox),
    )


def _preload(record: "Sandbox") -> str:
    if record.preload is None:
        return "-"
    return record.preload if isinstance(record.preload, str) else " ".join(record.preload)


def _labels(sandbox: "Sandbox") -> str:
    return " ".join(f"{name}={value}" for name, value in sandbox.labels.items()) or "-"


def _limits(limits: "Limits") -> dict[str, str]:
    return {
        "timeout": duration_text(limits.timeout),
        "cpu-time": duration_text(limits.cpu_time),
        "output": size_text(limits.output),
        "file-size": size_text(limits.file_size),
        "tmp": size_text(limits.tmp),
        "nofile": str(limits.nofile),
    }
