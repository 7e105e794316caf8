"""The pool: slots that are built ahead and wait, so that an exec takes one instead of having it built.

A *shelf* (shelf.py) holds the slots that are alike: those of one rootfs, workspaces folder and size of /tmp. Who wants
a slot takes one off its shelf, once; a thread of the pool's, the *keeper*, puts another there. Which slots there are to
be is learned from what is wanted: the second exec of a kind makes a shelf that is filled, each that finds its shelf
empty makes it one longer, and what is not taken for a while is not built again. Where the rootfs can have a zygote, its
shelf is filled by one as soon as that is ready; until then, and where none can be, by slots without an interpreter.
What waits is weighed now and then, and where it is too heavy, the kinds that were wanted longest ago become fewer
first.

Nothing here is a security step: a slot of the pool and one that was made this moment have gone through the same code,
and which workspace it is for, no slot knows before it is taken.
"""

import math
import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from jhansi_runtime.engine.delegation import Delegation
from jhansi_runtime.engine.launcher import Launcher, LauncherProcess
from jhansi_runtime.engine.processors import Processors
from jhansi_runtime.engine.shelf import Key, Made, Shelf
from jhansi_runtime.engine.slot import Progress, Slot
from jhansi_runtime.engine.slots import Figures, Wanted
from jhansi_runtime.engine.sources import Source, Sources
from jhansi_runtime.engine.weighing import own_bytes
from jhansi_runtime.errors import HostError
from jhansi_runtime.isolation import cgroup
from jhansi_runtime.isolation.cgroup import Limits
from jhansi_runtime.isolation.channel import Zygote

__all__ = ["Pool", "Sizes"]

_TURN_SECONDS = 5.0  # how often the keeper looks at shelves that nobody has taken from
_READY_WITHIN_SECONDS = 30.0
_WEIGH_SECONDS = 30.0
_MOST_SHELVES = 1000


class Sizes(NamedTuple):
    """How many slots wait at most, of all kinds together, and at least, of each kind that was wanted twice.

    memory is what they and the zygotes may take, in bytes, and zygotes how many of those there may be. A slot that has
    waited for age seconds is replaced, as is a zygote of zygote_age; a kind that nobody has wanted for rest seconds has
    its slots and its zygote ended.
    """

    minimum: int = 0
    maximum: int = 8
    age: float = 300.0
    rest: float = 600.0
    zygote_age: float = 3600.0
    memory: int = 1 << 30
    zygotes: int = 16


class Pool:
    """Slots ahead (engine.Slots). launcher makes those that no zygote makes.

    The keeper is started when something is wanted for the second time, and ended by close().
    """

    def __init__(self, launcher: LauncherProcess, sizes: Sizes) -> None:
        self._launcher = launcher
        self._sizes = sizes
        self._processors = Processors()
        self._lock = threading.Lock()
        self._shelves: dict[Key, Shelf] = {}
        self._sources = Sources(launcher, sizes.zygotes)
        self._dropped: list[Made] = []
        self._hits = self._misses = self._interpreters = self._memory = 0
        self._weigh_at = 0.0
        self._keeper: threading.Thread | None = None
        self._wake: tuple[int, int] | None = None
        self._is_closed = False

    def delegation(self) -> Delegation:
        """See Slots."""
        return self._launcher.delegation()

    def figures(self) -> Figures:
        """See Slots."""
        zygotes, skipped = self._sources.ready(), tuple(sorted(self._sources.skipped()))
        with self._lock:
            idle = sum(len(shelf.idle) for shelf in self._shelves.values())
            return Figures(self._hits, self._misses, self._interpreters, idle, zygotes, self._memory, skipped)

    @contextmanager
    def taken(self, wanted: Wanted) -> Iterator[Slot]:
        """See Slots."""
        made = self._take(wanted) or self._make(wanted)
        with self._lock:
            self._interpreters += made.slot.has_interpreter
        try:
            group = made.slot.group
            if group is not None and made.slot.is_ready and made.slot.container.cgroup != wanted.limits:
                _limit(group, wanted.limits)
            yield made.slot
        finally:
            self._give_back(made)

    def close(self) -> None:
        """See Slots."""
        with self._lock:
            self._is_closed = True
            self._nudge()
        if self._keeper is not None:
            self._keeper.join()
        self._launcher.close()

    def wait(self) -> None:
        """See Slots."""
        self._launcher.wait()

    # --- taking -----------------------------------------------------------------------------------------------------

    def _take(self, wanted: Wanted) -> Made | None:
        """Take a slot that waits; note that it was wanted, whether there is one or not."""
        key = Key.of(wanted)
        with self._lock:
            shelf = self._shelves.get(key) or self._new_shelf(key)
            shelf.takes += 1
            shelf.last_taken = time.monotonic()
            made = None
            while shelf.idle and made is None:
                # Of those whose CPU is the least busy the latest, whose memory is the likeliest to be in its cache.
                made = min(reversed(shelf.idle), key=lambda one: self._processors.load(one.processors))
                shelf.idle.remove(made)
                if made.has_died(self._launcher.generation()):
                    self._drop(made)
                    made = None
            if made is None:
                self._misses += 1
                if shelf.takes > 1:
                    shelf.aim(min(self._sizes.maximum, max(shelf.target + 1, self._sizes.minimum)))
            else:
                self._hits += 1
                self._processors.begin(made.processors)
            shelf.lowest = min(shelf.lowest, len(shelf.idle))
            if shelf.target:
                self._start_keeper()
                self._nudge()
        return made

    def _give_back(self, made: Made) -> None:
        """End a slot that was taken. Whoever took it need not wait until the kernel is done with one that has ended."""
        self._processors.end(made.processors)
        with self._lock:
            if made.slot.has_ended and self._wake is not None:
                self._drop(made)
                self._nudge()
                return
        self._end(made)

    def _new_shelf(self, key: Key) -> Shelf:
        """Begin a shelf. Of those that hold nothing only so many are remembered: whoever asks may ask for any size."""
        if len(self._shelves) >= _MOST_SHELVES:
            empty = [shelf for shelf in self._shelves.values() if not (shelf.target or shelf.idle or shelf.building)]
            for shelf in sorted(empty, key=lambda shelf: shelf.last_taken)[: _MOST_SHELVES // 2]:
                del self._shelves[shelf.key]
        shelf = self._shelves[key] = Shelf(key)
        return shelf

    def _make(self, wanted: Wanted) -> Made:
        """Have a slot built now, which the caller's order need not wait for."""
        made = None
        if wanted.zygote is not None:
            with suppress(HostError):  # it has died this moment; the keeper will see
                made = self._launched(wanted, wanted.zygote)
        made = made or self._launched(wanted, None)
        self._processors.begin(made.processors)
        return made

    def _launched(self, wanted: Wanted, zygote: Zygote | None, *, ahead: bool = False) -> Made:
        """Have a slot built by the zygote if that is ready, else by the launcher. ahead: nobody waits for it."""
        processors = self._processors.take(wanted.cpus, ahead=ahead)
        # A job that its building got in the way of would wait for some milliseconds.
        built_on = self._processors.free() if ahead else ()
        source = self._sources.take(zygote)
        launcher: Launcher = self._launcher if source is None or source.process is None else source.process
        try:
            in_cgroup = self.delegation().base is not None
            container = wanted.container(processors, in_cgroup=in_cgroup, built_on=built_on)
            slot = Slot(container, launcher, has_interpreter=source is not None, begins_next=False)
        except (HostError, OSError):
            self._processors.give_back(processors)
            if source is not None:
                self._leave(source)
            raise
        return Made(slot, self._launcher.generation(), processors, source)

    def _end(self, made: Made) -> None:
        made.slot.close()
        self._processors.give_back(made.processors)
        if made.source is not None:
            self._leave(made.source)

    def _leave(self, source: Source) -> None:
        if self._sources.leave(source):
            with self._lock:
                self._nudge()

    # --- the keeper -------------------------------------------------------------------------------------------------

    def _start_keeper(self) -> None:
        if self._keeper is None and not self._is_closed:
            self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            self._keeper = threading.Thread(target=self._keep, name="jhansi-pool", daemon=True)
            self._keeper.start()

    def _nudge(self) -> None:
        """Have the keeper look, if there is one. Whoever calls holds the lock."""
        if self._wake is not None:
            try:
                os.write(self._wake[1], b".")
            except BlockingIOError:  # it has been nudged often enough
                return

    def _keep(self) -> None:
        """Be the keeper: have what is to be there built, and what is not to be there ended, until the pool closes."""
        assert self._wake is not None  # noqa: S101 - see _start_keeper
        looked = time.monotonic()
        try:
            while not self._is_closed:
                ready = self._poll(self._wake[0])
                if time.monotonic() - looked > _TURN_SECONDS:
                    looked = time.monotonic()
                    self._review()
                self._hear(ready)
                self._fill()
                self._end_dropped()
        finally:
            self._clear()

    def _poll(self, wake: int) -> set[int]:
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        with self._lock:
            for shelf in self._shelves.values():
                for made in shelf.building:
                    poll.register(made.slot.channel, select.POLLIN)
                for made in shelf.idle:
                    poll.register(made.slot.channel, select.POLLIN)  # what waits says nothing, but that it has ended
            retries = [shelf.retry_at for shelf in self._shelves.values()] + self._sources.retries()
        for descriptor in self._sources.descriptors():
            poll.register(descriptor, select.POLLIN)
        now = time.monotonic()
        seconds = min([_TURN_SECONDS, *(at - now for at in retries if at > now)])
        ready = {descriptor for descriptor, _ in poll.poll(math.ceil(seconds * 1000))}
        if wake in ready:
            os.read(wake, 4096)
        return ready

    def _hear(self, ready: set[int]) -> None:
        """See to what has something to say: slots that are built, or have died; zygotes likewise."""
        with self._lock:
            building = [(shelf, made) for shelf in self._shelves.values() for made in shelf.building]
            for shelf in self._shelves.values():
                for made in [made for made in shelf.idle if made.slot.channel in ready]:
                    shelf.idle.remove(made)
                    self._drop(made)
        for shelf, made in building:
            if made.slot.channel in ready:
                self._progress(shelf, made)
            elif time.monotonic() - made.since > _READY_WITHIN_SECONDS:
                self._give_up(shelf, made)
        heard = self._sources.hear(ready)
        self._let_go(lambda shelf, made: made.source is None and shelf.key.zygote in heard.ready)  # it stood in
        self._let_go(lambda _, made: made.source in heard.retired)

    def _progress(self, shelf: Shelf, made: Made) -> None:
        try:
            message = made.slot.receive()
        except OSError:  # there are no descriptors left to receive its own in
            message = None
        if message is Progress.LAUNCHED:
            return
        if message is not Progress.READY:
            self._give_up(shelf, made)
            return
        with self._lock:
            shelf.building.remove(made)
            shelf.failures = 0
            made.since = time.monotonic()
            if made.source is None and self._sources.has_ready(shelf.key.zygote):
                self._drop(made)  # it was to stand in for the zygote's, which has come meanwhile
            else:
                shelf.idle.append(made)

    def _give_up(self, shelf: Shelf, made: Made) -> None:
        with self._lock:
            shelf.building.remove(made)
            shelf.failed()
        self._end(made)

    def _fill(self) -> None:
        """Have zygotes started and slots built where some are missing."""
        with self._lock:
            shelves = [shelf for shelf in self._shelves.values() if shelf.target]
        for shelf in sorted(shelves, key=lambda shelf: -shelf.last_taken):
            zygote = shelf.key.zygote
            if zygote is not None:
                self._sources.start(zygote)
            while self._is_short(shelf):
                if not self._build(shelf):
                    break

    def _is_short(self, shelf: Shelf) -> bool:
        if time.monotonic() < shelf.retry_at or self._is_closed:
            return False
        with self._lock:
            there = sum(len(other.idle) + len(other.building) for other in self._shelves.values())
            is_short = len(shelf.idle) + len(shelf.building) < shelf.target
            if is_short and there >= self._sizes.maximum:
                return self._make_room(shelf)
            return is_short

    def _make_room(self, shelf: Shelf) -> bool:
        """End a slot of the kind that was wanted longest ago, if that is another kind."""
        others = [other for other in self._shelves.values() if other.idle and other.last_taken < shelf.last_taken]
        if not others:
            return False
        oldest = min(others, key=lambda other: other.last_taken)
        oldest.target = max(0, oldest.target - 1)
        self._drop(oldest.idle.pop(0))
        return True

    def _build(self, shelf: Shelf) -> bool:
        """Have one slot built. False where it cannot be at the moment."""
        try:
            made = self._launched(shelf.key.wanted, shelf.key.zygote, ahead=True)
        except (HostError, OSError):
            with self._lock:
                shelf.failed()
            return False
        with self._lock:
            shelf.building.append(made)
        return True

    def _review(self) -> None:
        """Let go of what is old, and of what nobody wants any more."""
        now = time.monotonic()
        if now >= self._weigh_at:
            self._weigh_at = now + _WEIGH_SECONDS
            self._weigh()
        with self._lock:
            for key, shelf in list(self._shelves.items()):
                is_resting = now - shelf.last_taken > self._sizes.rest
                if is_resting:
                    shelf.target = 0
                elif shelf.target:
                    shelf.aim(max(self._sizes.minimum, 1, shelf.target - shelf.lowest))
                shelf.lowest = len(shelf.idle)
                while len(shelf.idle) > shelf.target or (shelf.idle and now - shelf.idle[0].since > self._sizes.age):
                    self._drop(shelf.idle.pop(0))
                if is_resting and not shelf.building:
                    del self._shelves[key]
            zygotes = {shelf.key.zygote for shelf in self._shelves.values() if shelf.target}
        retired = self._sources.review(zygotes, self._sizes.zygote_age)
        self._let_go(lambda _, made: made.source in retired)

    def _let_go(self, is_meant: Callable[[Shelf, Made], bool]) -> None:
        """Let go of the slots that wait and are meant."""
        with self._lock:
            for shelf in self._shelves.values():
                for made in [made for made in shelf.idle if is_meant(shelf, made)]:
                    shelf.idle.remove(made)
                    self._drop(made)

    def _weigh(self) -> None:
        """See what memory takes all that waits, and have less of it where that is too much."""
        zygotes = self._sources.weigh()
        with self._lock:
            shelves = list(self._shelves.values())
        slots = {shelf: self._weigh_one(shelf) for shelf in shelves}
        with self._lock:
            self._memory = sum(zygotes.values()) + sum(len(shelf.idle) * size for shelf, size in slots.items())
            excess = self._memory - self._sizes.memory
            for shelf in sorted(self._shelves.values(), key=lambda shelf: shelf.last_taken):
                if excess > 0 and shelf.target:
                    excess -= self._lighten(shelf, excess, slots.get(shelf, 0), zygotes)

    def _weigh_one(self, shelf: Shelf) -> int:
        """Return what a slot of the shelf takes, in bytes; 0 where none waits."""
        try:
            with self._lock:
                if not shelf.idle:
                    return 0
                proc = os.dup(shelf.idle[-1].slot.proc)  # for it may be taken, and closed
        except OSError:  # there are no descriptors left to look with
            return 0
        try:
            return own_bytes(proc)
        finally:
            os.close(proc)

    def _lighten(self, shelf: Shelf, excess: int, size: int, zygotes: dict[Zygote, int]) -> int:
        """Let go of slots of that size; of all, if they are not enough, and then of the zygote, if it is no other's.

        Return the bytes that frees. Whoever calls holds the lock.
        """
        count = min(len(shelf.idle), math.ceil(excess / size)) if size else 0
        freed = count * size
        for _ in range(count):
            self._drop(shelf.idle.pop(0))
        if freed >= excess:
            shelf.cap(len(shelf.idle))
            return freed
        shelf.cap(0)
        zygote = shelf.key.zygote
        wanted = {other.key.zygote for other in self._shelves.values() if other.target}
        return freed + (zygotes.get(zygote, 0) if zygote is not None and zygote not in wanted else 0)

    def _drop(self, made: Made) -> None:
        """Let go of a slot that nobody has; the keeper ends it. Whoever calls holds the lock, which that would not."""
        self._dropped.append(made)

    def _end_dropped(self) -> None:
        with self._lock:
            dropped, self._dropped = self._dropped, []
        for made in dropped:
            self._end(made)
        self._sources.end_unused()

    def _clear(self) -> None:
        """End all there is."""
        with self._lock:
            for shelf in self._shelves.values():
                for made in (*shelf.idle, *shelf.building):
                    self._drop(made)
            self._shelves.clear()
            wake, self._wake = self._wake, None  # from here on whoever has a slot ends it
        self._end_dropped()
        self._sources.end()
        for descriptor in wake or ():
            os.close(descriptor)


def _limit(group: int, limits: Limits) -> None:
    """Have the cgroup of a slot that has waited enforce the limits of its exec."""
    try:
        cgroup.limit(group, limits)
    except OSError as error:
        raise HostError(f"the limits cannot be set: {error}", remedy="run: jhansi-run doctor") from error
