"""doctor and completion: what concerns this host and this shell, not a sandbox."""

import click

from jhansi_runtime.cli.parameters import AS_JSON
from jhansi_runtime.cli.records import print_json
from jhansi_runtime.rendering import table

__all__ = ["COMMANDS"]

UNFIT = 1
SHELLS = ("bash", "zsh", "fish")


@click.command("doctor")
@AS_JSON
def doctor_command(as_json: bool) -> int:
    """Try what this host can enforce.

    For what it cannot, the line that mends it is named, and the exit status is 1.
    """
    from jhansi_runtime.doctor import checks  # noqa: PLC0415 - it loads every part of the isolation

    found = checks()
    if as_json:
        print_json(found)
    else:
        rows = (
            (check.name, "ok" if check.ok else "PROBLEM", check.detail, "" if check.ok else check.remedy or "")
            for check in found
        )
        print(table(("CHECK", "STATE", "DETAIL", "REMEDY"), rows))
    return 0 if all(check.ok for check in found) else UNFIT


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
def completion_command(shell: str) -> None:
    r"""Print the completion script of a shell.

    It completes commands, options, sandboxes, languages and the paths of workspaces.

    \b
    bash:  eval "$(jhansi-run completion bash)"      in ~/.bashrc
    zsh:   eval "$(jhansi-run completion zsh)"       in ~/.zshrc
    fish:  jhansi-run completion fish | source       in ~/.config/fish/config.fish
    """
    from click.shell_completion import get_completion_class  # noqa: PLC0415 - only this needs it

    from jhansi_runtime.cli import COMPLETION_VARIABLE, PROGRAM  # noqa: PLC0415 - likewise
    from jhansi_runtime.cli.commands import jhansi_run  # noqa: PLC0415 - which imports this module

    completion = get_completion_class(shell)
    if completion is None:
        raise click.UsageError(f"click has no completion for {shell}")
    print(completion(jhansi_run, {}, PROGRAM, COMPLETION_VARIABLE).source())


COMMANDS = {"doctor": doctor_command, "completion": completion_command}
