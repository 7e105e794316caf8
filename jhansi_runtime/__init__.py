"""jhansi-runtime: persistent sandboxes for running untrusted code on bare Linux, without Docker and without root.

A sandbox is a workspace, not a disposable container: its files live in a folder on disk, and each exec builds a
fresh, locked container around that folder, runs one named file in it, and throws the container away.

Reading order: spec (the records), errors, paths; runtime (the verbs); sandboxes, rootfs, audit (the stores);
engine (a slot's life); isolation (the trusted core: its __init__ tells the theory of operation); at last thin and
attendant (a command line that a server runs).

The names below are loaded when first used: a process that only builds containers imports none of them.
"""

TYPE_CHECKING = False

if TYPE_CHECKING:
    from jhansi_runtime.errors import JhansiError
    from jhansi_runtime.paths import Paths
    from jhansi_runtime.runtime import Runtime
    from jhansi_runtime.spec import ExecRequest, ExecResult, FileInfo, Limits, Sandbox

__all__ = ["ExecRequest", "ExecResult", "FileInfo", "JhansiError", "Limits", "Paths", "Runtime", "Sandbox"]

_HOME_OF = {
    "ExecRequest": "spec",
    "ExecResult": "spec",
    "FileInfo": "spec",
    "JhansiError": "errors",
    "Limits": "spec",
    "Paths": "paths",
    "Runtime": "runtime",
    "Sandbox": "spec",
}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415 - see the docstring: nothing is loaded before it is used

    value: object = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
