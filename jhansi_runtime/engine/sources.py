"""The zygotes of a pool, each a source of slots: started, heard, retired; ended when nobody uses a slot of it any more.

One that has failed is left alone for a while, twice as long after each further failure. Meanwhile, and until one is
ready, whoever wants a slot of it does without; so does who wants one more than there may be.
"""

import threading
import time
from collections.abc import Collection
from typing import NamedTuple

from jhansi_runtime.engine.launcher import LauncherProcess
from jhansi_runtime.engine.weighing import resident_bytes
from jhansi_runtime.engine.zygote import ZygoteProcess
from jhansi_runtime.errors import HostError
from jhansi_runtime.isolation.channel import Zygote

__all__ = ["LONGEST_RETRY_SECONDS", "RETRY_SECONDS", "Heard", "Source", "Sources"]

RETRY_SECONDS = 1.0  # after a failure; twice as long after each further one, up to
LONGEST_RETRY_SECONDS = 300.0
_READY_WITHIN_SECONDS = 120.0


class Source:
    """A zygote on its way, there, or failed; and how many slots of its there are."""

    def __init__(self) -> None:
        self.process: ZygoteProcess | None = None
        self.generation = 0  # of its launcher
        self.is_ready = False
        self.skipped: tuple[str, ...] = ()  # what it was to import ahead, and could not
        self.began = time.monotonic()
        self.slots = 0
        self.is_leaving = False

    def has_died(self, generation: int) -> bool:
        """Say whether the zygote has ended, or is about to because the launcher of its generation has."""
        return self.generation != generation or (self.process is not None and self.process.has_ended())


class Heard(NamedTuple):
    """What has become of zygotes: those that are ready now, and the sources that no more slots are taken of."""

    ready: list[Zygote]
    retired: list[Source]


class Sources:
    """The zygotes of the containers that launcher makes, `most` at once. Several threads may ask, take and leave.

    All else is for one alone: the keeper of the pool.
    """

    def __init__(self, launcher: LauncherProcess, most: int) -> None:
        self._launcher = launcher
        self._most = most
        self._lock = threading.Lock()
        self._sources: dict[Zygote, Source] = {}
        self._leaving: list[Source] = []
        self._retries: dict[Zygote, tuple[float, float]] = {}

    def has_ready(self, zygote: Zygote | None) -> bool:
        """Say whether slots can be taken of that one."""
        with self._lock:
            return zygote in self._sources and self._sources[zygote].is_ready

    def ready(self) -> int:
        """Return how many can have slots taken of them."""
        with self._lock:
            return sum(source.is_ready for source in self._sources.values())

    def skipped(self) -> set[str]:
        """Return the modules that those could not import."""
        with self._lock:
            return {name for source in self._sources.values() for name in source.skipped}

    def take(self, zygote: Zygote | None) -> Source | None:
        """Return the zygote's source if it is ready, counted as having one slot more, which `leave` counts off."""
        with self._lock:
            source = None if zygote is None else self._sources.get(zygote)
            if source is None or not source.is_ready or source.has_died(self._launcher.generation()):
                return None
            source.slots += 1
            return source

    def leave(self, source: Source) -> bool:
        """A slot of it has ended. Say whether it was the last, and the zygote is to be ended, too."""
        with self._lock:
            source.slots -= 1
            return source.is_leaving and source.slots == 0

    def descriptors(self) -> list[int]:
        """Return what is readable when `hear` would hear of something."""
        with self._lock:
            processes = [(source.process, source.is_ready) for source in self._sources.values()]
        return [process.pidfd if is_ready else process.channel for process, is_ready in processes if process]

    def retries(self) -> list[float]:
        """Return when those that have failed may be started again."""
        with self._lock:
            return [at for at, _ in self._retries.values()]

    def start(self, zygote: Zygote) -> None:
        """Have the zygote started, unless it is, or has failed a short while ago."""
        with self._lock:
            retry_at, _ = self._retries.get(zygote, (0.0, 0.0))
            if zygote in self._sources or time.monotonic() < retry_at:
                return
            if len(self._sources) + len(self._leaving) >= self._most:
                return
            source = self._sources[zygote] = Source()
        try:
            source.process = ZygoteProcess(zygote, self._launcher)
            source.generation = self._launcher.generation()
        except (HostError, OSError):
            self._failed(zygote, source)

    def hear(self, descriptors: Collection[int]) -> Heard:
        """See to those of these descriptors that have something to say."""
        with self._lock:
            sources = list(self._sources.items())
        heard = Heard([], [])
        for zygote, source in sources:
            process = source.process
            if process is None:
                continue
            if source.is_ready:
                if process.pidfd in descriptors:
                    self._failed(zygote, source)
                    heard.retired.append(source)
            elif process.channel in descriptors:
                try:
                    skipped = process.await_ready()
                except HostError:
                    self._failed(zygote, source)
                    heard.retired.append(source)
                else:
                    with self._lock:
                        source.is_ready, source.skipped = True, skipped
                        self._retries.pop(zygote, None)
                    heard.ready.append(zygote)
            elif time.monotonic() - source.began > _READY_WITHIN_SECONDS:
                self._failed(zygote, source)
                heard.retired.append(source)
        return heard

    def weigh(self) -> dict[Zygote, int]:
        """Return what each has in memory, in bytes."""
        with self._lock:
            processes = [(zygote, source.process) for zygote, source in self._sources.items()]
        return {zygote: resident_bytes(process.pid) for zygote, process in processes if process}

    def review(self, wanted: Collection[Zygote | None], age: float) -> list[Source]:
        """Retire those that are not wanted, and those that are older than age in seconds; return them."""
        now = time.monotonic()
        with self._lock:
            old = [
                (zygote, source)
                for zygote, source in self._sources.items()
                if zygote not in wanted or (source.is_ready and now - source.began > age)
            ]
            for zygote, source in old:
                self._retire(zygote, source)
        return [source for _, source in old]

    def end_unused(self) -> None:
        """End those that were retired and have no slots any more."""
        with self._lock:
            ended = [source for source in self._leaving if source.slots == 0]
            self._leaving = [source for source in self._leaving if source.slots]
        for source in ended:
            _end(source)

    def end(self) -> None:
        """End all."""
        with self._lock:
            sources = [*self._sources.values(), *self._leaving]
            self._sources.clear()
            self._leaving.clear()
        for source in sources:
            _end(source)

    def _failed(self, zygote: Zygote, source: Source) -> None:
        with self._lock:
            _, waited = self._retries.get(zygote, (0.0, RETRY_SECONDS))
            wait = min(LONGEST_RETRY_SECONDS, waited * 2)
            self._retries[zygote] = (time.monotonic() + wait, wait)
            self._retire(zygote, source)

    def _retire(self, zygote: Zygote, source: Source) -> None:
        """Take no more slots of it. Whoever calls holds the lock."""
        del self._sources[zygote]
        source.is_leaving = True
        self._leaving.append(source)


def _end(source: Source) -> None:
    if source.process is not None:
        source.process.close()
        source.process.wait()
