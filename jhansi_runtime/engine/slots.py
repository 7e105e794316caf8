"""Where an exec gets its slot from: made when it is wanted (Cold), or taken of those that wait (pool.py)."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol

from jhansi_runtime.engine.delegation import Delegation
from jhansi_runtime.engine.launcher import Launcher
from jhansi_runtime.engine.processors import Processors
from jhansi_runtime.engine.slot import Slot
from jhansi_runtime.isolation.cgroup import Limits
from jhansi_runtime.isolation.channel import Container, Zygote

__all__ = ["Cold", "Figures", "Slots", "Wanted"]


class Figures(NamedTuple):
    """What a pool has done: slots taken that had waited, slots made on demand, how many of both had an interpreter.

    And what there is now: slots that wait; zygotes that are ready; the bytes of memory that both took when they were
    last weighed; the modules that a zygote was to import ahead and could not.
    """

    hits: int
    misses: int
    interpreters: int
    idle: int
    zygotes: int
    memory: int
    skipped: tuple[str, ...]


class Wanted(NamedTuple):
    """What an exec needs a container for; the fields are Container's, but for these.

    identity tells the tree from another that has its name later: device and inode. cpus is the exec's CPU share. limits
    are what its cgroup is to enforce, where there is one. zygote says which zygote's slot will do as well: one with an
    interpreter that can run the exec's file.
    """

    tree: str
    identity: tuple[int, int]
    binds: tuple[tuple[str, str], ...]
    workspaces: str
    tmp_bytes: int
    host_id: int | None
    landlock: int
    cpus: float
    limits: Limits
    zygote: Zygote | None

    def container(self, processors: tuple[int, ...], *, in_cgroup: bool, built_on: tuple[int, ...] = ()) -> Container:
        """Return the container to be built for it."""
        return Container(
            tree=self.tree,
            binds=self.binds,
            workspaces=self.workspaces,
            tmp_bytes=self.tmp_bytes,
            host_id=self.host_id,
            processors=processors,
            built_on=built_on,
            landlock=self.landlock,
            cgroup=self.limits if in_cgroup else None,
        )


class Slots(Protocol):
    """Whoever has slots. May be used by several threads."""

    def delegation(self) -> Delegation:
        """Return where the cgroups of containers are made, or why none are."""

    def taken(self, wanted: Wanted) -> AbstractContextManager[Slot]:
        """Within: a slot of the caller's own, which is closed at the end. HostError: there is none to be had."""

    def figures(self) -> Figures | None:
        """Return what a pool has done, and what waits in it; None where slots are made when they are wanted."""

    def close(self) -> None:
        """End every container that waits, and whoever makes them; wait() returns when all have ended."""

    def wait(self) -> None:
        """See close."""


class Cold:
    """Slots that are made when they are wanted."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._processors = Processors()

    def delegation(self) -> Delegation:
        """See Slots."""
        return self._launcher.delegation()

    @contextmanager
    def taken(self, wanted: Wanted) -> Iterator[Slot]:
        """See Slots."""
        processors = self._processors.take(wanted.cpus)
        self._processors.begin(processors)
        try:
            container = wanted.container(processors, in_cgroup=self.delegation().base is not None)
            with Slot(container, self._launcher) as slot:
                yield slot
        finally:
            self._processors.end(processors)
            self._processors.give_back(processors)

    def figures(self) -> None:
        """See Slots."""

    def close(self) -> None:
        """See Slots."""
        self._launcher.close()

    def wait(self) -> None:
        """See Slots."""
        self._launcher.wait()
