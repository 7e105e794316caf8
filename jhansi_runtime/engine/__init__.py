"""The engine: containers for execs. A cold exec builds its slot now; it is a slot that waits for nothing."""

from jhansi_runtime.engine.delegation import Delegation
from jhansi_runtime.engine.exec import Ended, execute
from jhansi_runtime.engine.launcher import InProcess, Launcher, LauncherProcess
from jhansi_runtime.engine.processors import Processors
from jhansi_runtime.engine.slot import Slot
from jhansi_runtime.engine.watches import Bounds, Reason, Watch
from jhansi_runtime.engine.wiring import Streams

__all__ = [
    "Bounds",
    "Delegation",
    "Ended",
    "InProcess",
    "Launcher",
    "LauncherProcess",
    "Processors",
    "Reason",
    "Slot",
    "Streams",
    "Watch",
    "execute",
]
