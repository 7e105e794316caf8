"""The runtime that the commands call, opened late: --help, completion and a usage error need none.

And what of a command line takes a runtime to understand.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

from jhansi_runtime.isolation.spawn import Spawned
from jhansi_runtime.rendering import StatusLine

if TYPE_CHECKING:
    from jhansi_runtime.engine import Slots
    from jhansi_runtime.runtime import Runtime

__all__ = ["Source", "open_runtime", "profile_name"]

# Where the container of an exec comes from: a launcher that was started ahead, or somebody's slots.
Source: TypeAlias = "Spawned | Slots"


@contextmanager
def open_runtime(status: StatusLine | None = None, *, source: "Source | None" = None) -> Iterator["Runtime"]:
    """The runtime of this environment; what it is busy with is shown on the status line."""
    _load_msgspec()
    from jhansi_runtime.engine import Cold, LauncherProcess  # noqa: PLC0415 - after it
    from jhansi_runtime.runtime import Runtime  # noqa: PLC0415 - likewise

    status = status or StatusLine()
    if source is None or isinstance(source, Spawned):
        slots: Slots = Cold(LauncherProcess(source, ahead=False))
    else:
        slots = source
    try:
        with Runtime(progress=status.show, slots=slots) as runtime:
            yield runtime
    finally:
        status.clear()


def profile_name(runtime: "Runtime", reference: str | None) -> str | None:
    """The name of the seccomp profile that --seccomp NAME|FILE says; None where it was not given."""
    if reference is None or not ("/" in reference or reference.endswith(".json")):
        return reference
    return runtime.profile_add(reference)


def _load_msgspec() -> None:
    """Load msgspec as it is where typing_extensions is not installed: it uses it if it can, for 5 ms of every start."""
    if "typing_extensions" in sys.modules:
        return
    sys.modules["typing_extensions"] = None  # type: ignore[assignment] # to the import system: there is none
    try:
        import msgspec  # noqa: F401, PLC0415 - see open_runtime
    finally:
        del sys.modules["typing_extensions"]
