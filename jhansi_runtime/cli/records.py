"""Records as JSON for whoever called us: the document of --json, and the file of --result.

After the command that file holds this exec's record, whole, or there is none.
"""

import os
import stat
from typing import TYPE_CHECKING

from jhansi_runtime.errors import InvalidRequestError

if TYPE_CHECKING:
    from jhansi_runtime.spec import ExecResult

__all__ = ["discard_record", "print_json", "write_record"]


def print_json(value: object) -> None:
    """One JSON document, on one line that is there at once."""
    from jhansi_runtime.spec import to_json  # noqa: PLC0415 - loaded by now

    print(to_json(value), flush=True)


def discard_record(path: str) -> None:
    """Remove the record of an earlier exec, which must not be taken for that of one that never ran.

    InvalidRequestError, before anything runs, when no record could be written there.
    """
    if _is_special(path):
        return
    target = os.path.realpath(path)
    if os.path.isdir(target) or not os.access(os.path.dirname(target), os.W_OK | os.X_OK):
        raise InvalidRequestError(
            f"--result cannot be written: {path}", remedy="name a file in a folder that exists and is writable"
        )
    if os.path.exists(target):
        os.unlink(target)


def write_record(path: str, result: "ExecResult") -> None:
    """Write the record so that no reader sees half of it; to a pipe or device, at its end."""
    from jhansi_runtime.spec import to_json  # noqa: PLC0415 - loaded by now

    document = to_json(result) + "\n"
    if _is_special(path):
        with open(path, "a", encoding="ascii") as pipe:
            pipe.write(document)
        return
    target = os.path.realpath(path)
    draft = f"{target}.{os.urandom(4).hex()}"
    with open(draft, "x", encoding="ascii") as file:
        try:
            file.write(document)
            file.flush()
            os.replace(draft, target)
        except OSError:
            os.unlink(draft)
            raise


def _is_special(path: str) -> bool:
    """Whether a rename would wrongly replace it: a device, a FIFO, an open file under its name /dev/fd/3."""
    if path.startswith(("/dev/", "/proc/")):
        return True
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)
