"""The command line: decode the arguments, call Runtime, print.

`run` is the way in. It turns every end a command can have into the exit statuses of CONTRACT.md, and every error into
one line on stderr. commands.py has all commands, for click to decode.

Starting up is most of what a short exec costs, and click a third of that. So the two lines that are typed most, a
file to exec or to run without any option, which leave a parser nothing to decide, go straight to execs.py.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jhansi_runtime.errors import JhansiError

if TYPE_CHECKING:
    from jhansi_runtime.cli.opening import Source

__all__ = ["COMPLETION_VARIABLE", "PROGRAM", "fail", "run"]

PROGRAM = "jhansi-run"
COMPLETION_VARIABLE = "_JHANSI_RUN_COMPLETE"
PIPE_CLOSED = 141  # 128 + SIGPIPE


def run(arguments: Sequence[str], source: "Source | None" = None) -> int:
    """Run one command line; the exit status. All output is flushed. source is where an exec gets its container from."""
    try:
        status = _perform(list(arguments), source)
        sys.stdout.flush()
    except JhansiError as error:
        status = fail(str(error), status=error.exit_code)
    except BrokenPipeError:
        status = PIPE_CLOSED
    except OSError as error:
        status = fail(_unexpected(error))
    return status


def fail(message: str, *hints: str, status: int = JhansiError.exit_code) -> int:
    """Print the error line; the exit status. A stderr that is gone takes the line with it, not the status."""
    from jhansi_runtime.rendering import printable  # noqa: PLC0415 - needed only when something is wrong

    with contextlib.suppress(OSError):
        print(f"{PROGRAM}: error: {printable(message)}", *hints, sep="\n", file=sys.stderr, flush=True)
    return status


def _perform(arguments: list[str], source: "Source | None") -> int:
    instruction = os.environ.get(COMPLETION_VARIABLE)
    if instruction is None:
        match arguments:
            case ["run", file, *words] if _is_plain(file):
                from jhansi_runtime.cli.execs import OneShot, exec_and_report  # noqa: PLC0415 - see above

                return exec_and_report({"sandbox": "", "args": words}, OneShot(file), source=source)
            case ["exec", sandbox, file, *words] if _is_plain(sandbox, file):
                from jhansi_runtime.cli.execs import exec_and_report  # noqa: PLC0415 - see above

                return exec_and_report({"sandbox": sandbox, "filename": file, "args": words}, source=source)
    from jhansi_runtime.cli.commands import complete, invoke  # noqa: PLC0415 - see above

    return invoke(arguments or ["--help"], source) if instruction is None else complete(instruction)


def _is_plain(*words: str) -> bool:
    """Whether none of them could be an option; what follows the last, which names a file, belongs to the program."""
    return not any(word.startswith("-") or not word for word in words)


def _unexpected(error: OSError) -> str:
    """What a call said that nothing was expected to refuse. One that this host lacks has a remedy."""
    message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
    if error.errno != errno.ENOSYS:
        return message
    from jhansi_runtime.remedies import remedy_for  # noqa: PLC0415 - needed only when something is wrong

    return f"{message}; {remedy_for('system call', errno.ENOSYS)}"
