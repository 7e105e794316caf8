"""rootfs ls, build, import, verify, rm: the root trees of the languages."""

from typing import TYPE_CHECKING

import click

from jhansi_runtime.cli.opening import open_runtime
from jhansi_runtime.cli.parameters import AS_JSON, complete_language
from jhansi_runtime.cli.records import print_json
from jhansi_runtime.quantities import size_text
from jhansi_runtime.rendering import table

if TYPE_CHECKING:
    from jhansi_runtime.spec import RootfsInfo

__all__ = ["COMMANDS"]

DAMAGED = 1

_LANGUAGE = click.argument("language", metavar="LANG", shell_complete=complete_language)


@click.group("rootfs", no_args_is_help=False)
def rootfs_group() -> None:
    """Build, import, check and remove the root trees of languages."""


@rootfs_group.command("ls")
@AS_JSON
def ls_command(as_json: bool) -> None:
    """List the root trees that are here."""
    with open_runtime() as runtime:
        trees = runtime.rootfs_infos()
    if as_json:
        print_json(trees)
        return
    rows = (
        (tree.language, tree.digest, size_text(tree.size), str(tree.files), tree.created_at, tree.source)
        for tree in trees
    )
    print(table(("LANGUAGE", "DIGEST", "SIZE", "FILES", "CREATED", "SOURCE"), rows))


@rootfs_group.command("build")
@_LANGUAGE
@AS_JSON
def build_command(language: str, as_json: bool) -> None:
    """Build the root tree of a language from its recipe, and print its digest."""
    with open_runtime() as runtime:
        tree = runtime.rootfs_build(language)
    _print_tree(tree, as_json)


@rootfs_group.command("import")
@_LANGUAGE
@click.argument("source", metavar="SOURCE", type=click.Path())
@AS_JSON
def import_command(language: str, source: str, as_json: bool) -> None:
    """Take the root tree of a language from a tar archive, and print its digest."""
    with open_runtime() as runtime:
        tree = runtime.rootfs_import(language, source)
    _print_tree(tree, as_json)


@rootfs_group.command("verify")
@click.argument("language", metavar="[LANG]", required=False, shell_complete=complete_language)
@AS_JSON
def verify_command(language: str | None, as_json: bool) -> int:
    """Compare root trees with their digests.

    What differs is named, and the exit status is 1.
    """
    with open_runtime() as runtime:
        problems = list(runtime.rootfs_verify(language))
    if as_json:
        print_json([problem._asdict() for problem in problems])
    elif problems:
        print(table(("LANGUAGE", "PATH", "PROBLEM"), problems))
    else:
        print("every file is what the digest says")
    return DAMAGED if problems else 0


@rootfs_group.command("rm")
@_LANGUAGE
def rm_command(language: str) -> None:
    """Remove the root tree of a language; the next exec builds it anew."""
    with open_runtime() as runtime:
        runtime.rootfs_remove(language)


COMMANDS = {"rootfs": rootfs_group}


def _print_tree(tree: "RootfsInfo", as_json: bool) -> None:
    if as_json:
        print_json(tree)
    else:
        print(tree.digest)
