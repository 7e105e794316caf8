"""A shelf of the pool: slots of one kind, how many of them there are to be, and since when nobody has wanted one."""

import time
from typing import NamedTuple, Self

from jhansi_runtime.engine.slot import Slot
from jhansi_runtime.engine.slots import Wanted
from jhansi_runtime.engine.sources import LONGEST_RETRY_SECONDS, RETRY_SECONDS, Source
from jhansi_runtime.isolation.cgroup import Limits
from jhansi_runtime.isolation.channel import Zygote

__all__ = ["Key", "Made", "Shelf"]

_CAPPED_SECONDS = 300.0  # how long a kind that was too heavy is kept from growing
# Of the cgroup of a slot that waits: an exec brings its own.
_IDLE_LIMITS = Limits(memory=512 << 20, processes=128, cpus=1.0)


class Key(NamedTuple):
    """What slots that are alike have in common: Wanted, but for what an order or a cgroup says later."""

    wanted: Wanted
    zygote: Zygote | None

    @classmethod
    def of(cls, wanted: Wanted) -> Self:
        """The kind that one is of."""
        return cls(wanted._replace(limits=_IDLE_LIMITS, zygote=None), wanted.zygote)


class Made:
    """A slot of the pool: since when it is there, which CPUs it was made for, whose it is."""

    def __init__(self, slot: Slot, generation: int, processors: tuple[int, ...], source: Source | None) -> None:
        self.slot = slot
        self.generation = generation  # of its launcher
        self.processors = processors
        self.source = source
        self.since = time.monotonic()

    def has_died(self, generation: int) -> bool:
        """Say whether its init has ended, or is about to because whoever it descends from has."""
        is_orphan = self.generation != generation or (self.source is not None and self.source.has_died(generation))
        return is_orphan or self.slot.has_died()


class Shelf:
    """Slots of one kind: those that wait, those that are being built, and how many there are to be."""

    def __init__(self, key: Key) -> None:
        self.key = key
        self.idle: list[Made] = []
        self.building: list[Made] = []
        self.target = 0
        self.lowest = 0  # of slots that waited, since somebody last looked
        self.last_taken = time.monotonic()
        self.takes = 0
        self.retry_at = 0.0
        self.failures = 0
        self._cap = (0, 0.0)  # of the target, and until when

    def aim(self, target: int) -> None:
        """Have so many slots of it, but no more than it is capped at."""
        most, until = self._cap
        self.target = min(target, most) if time.monotonic() < until else target

    def cap(self, most: int) -> None:
        """Have no more than so many slots of it for a while."""
        self._cap = most, time.monotonic() + _CAPPED_SECONDS
        self.aim(self.target)

    def failed(self) -> None:
        """Leave it alone for a while: the caller of an exec is told why it cannot be, and not the keeper."""
        self.failures += 1
        self.retry_at = time.monotonic() + min(LONGEST_RETRY_SECONDS, RETRY_SECONDS * 2**self.failures)
