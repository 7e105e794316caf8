"""The engine: containers for execs. A cold exec builds its slot now; it is a slot that waits for nothing."""

from jhansi_runtime.engine.exec import Ended, execute
from jhansi_runtime.engine.launcher import InProcess, Launcher, LauncherProcess
from jhansi_runtime.engine.slot import Slot
from jhansi_runtime.engine.wiring import Streams

__all__ = ["Ended", "InProcess", "Launcher", "LauncherProcess", "Slot", "Streams", "execute"]
