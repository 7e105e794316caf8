"""`jhansi-run` (the script beside this) and `python -m jhansi_runtime`: a server or this process runs the line."""

import gc
import os
import sys
from contextlib import suppress
from types import TracebackType
from typing import NoReturn

from jhansi_runtime.errors import JhansiError
from jhansi_runtime.isolation.spawn import spawn

INTERRUPTED = 130  # 128 + SIGINT
# These get one started first of all: it comes up beside us, while we load what we need.
NEED_A_LAUNCHER = frozenset({"exec", "run", "shell"})


def main(*, is_alone: bool = False) -> NoReturn:
    """Run the command line of this process and end the process with its status.

    is_alone: it is known already that no server runs it.
    """
    # A collection during the imports walks thousands of new objects and finds nothing, a dozen times; and a command
    # is too short to make garbage worth finding later.
    gc.disable()
    sys.excepthook = _end_unfinished
    if not is_alone:
        from jhansi_runtime.thin import run_by_server  # noqa: PLC0415 - the console script has loaded it elsewhere

        status = run_by_server()
        if status is not None:
            os._exit(status)
    _complete_stdio()
    spawned = None
    if sys.argv[1:2] and sys.argv[1] in NEED_A_LAUNCHER:
        with suppress(OSError):  # the runtime tries again, and tells why it cannot
            spawned = spawn(ahead=True)
    from jhansi_runtime.cli import run  # noqa: PLC0415 - with the collector off

    status = run(sys.argv[1:], spawned)
    # Everything is flushed and closed; taking the interpreter apart module by module would add 8 ms to each command.
    os._exit(status)


def _complete_stdio() -> None:
    """Put /dev/null where stdin, stdout or stderr was closed, lest a file that is opened later become our stdout."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # noqa: PLR2004 - stderr, the last of the three
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    # Python has None for a stream that was closed, and print(file=None) means stdout.
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115 - for the whole run


def unfinished(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> int:
    """Ctrl-C ends us quietly. Anything else is a defect: the traceback, and a status that is no program's own 1."""
    if kind is KeyboardInterrupt:
        return INTERRUPTED
    sys.__excepthook__(kind, error, traceback)
    print(f"jhansi-run: error: a defect of jhansi-runtime ({kind.__name__}), please report it", file=sys.stderr)
    return JhansiError.exit_code


def _end_unfinished(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> NoReturn:
    os._exit(unfinished(kind, error, traceback))


if __name__ == "__main__":
    main()
