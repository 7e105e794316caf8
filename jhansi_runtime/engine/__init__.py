"""The engine: containers for execs, built now or taken of a pool. A cold slot is one that waits for nothing."""

from jhansi_runtime.engine.delegation import Delegation
from jhansi_runtime.engine.exec import Ended, execute
from jhansi_runtime.engine.launcher import InProcess, Launcher, LauncherProcess
from jhansi_runtime.engine.slot import Slot
from jhansi_runtime.engine.slots import Cold, Figures, Slots, Wanted
from jhansi_runtime.engine.watches import Bounds, Reason, Watch
from jhansi_runtime.engine.wiring import Streams

__all__ = [
    "Bounds",
    "Cold",
    "Delegation",
    "Ended",
    "Figures",
    "InProcess",
    "Launcher",
    "LauncherProcess",
    "Reason",
    "Slot",
    "Slots",
    "Streams",
    "Wanted",
    "Watch",
    "execute",
]
