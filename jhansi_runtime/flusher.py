"""Flushing to the disk beside the work: a thread that is there only while something waits to be flushed.

Who has written something calls `want` and goes on. The first to do so starts the thread. It lets a little time pass, in
which others may write too, flushes for all of them, and ends unless more was wanted meanwhile. So a process that is
idle has no such thread, one that is busy flushes a few dozen times a second and not for each record, and a command that
is over before the thread wakes has paid for its start: 0.05 ms.

Nobody waits for the thread, so it cannot raise: what a flush has raised, `tell` raises.
"""

from _thread import LockType, allocate_lock, start_new_thread  # all of threading that is needed, without its import
from collections.abc import Callable

from jhansi_runtime.errors import AuditError

__all__ = ["Flusher"]


class Flusher:
    """Calls flush, which may raise AuditError, within `after` seconds of each `want`. May be used by several threads.

    It does not survive a fork: a child makes one of its own.
    """

    def __init__(self, flush: Callable[[], None], after: float) -> None:
        self._flush = flush
        self._after = after
        self._mutex = allocate_lock()
        self._is_wanted = False
        self._hurry = self._ended = _taken_lock()
        self._is_there = False
        self._error: AuditError | None = None

    def want(self) -> None:
        """Have all flushed that was written until now. It is done in this very call where no thread can be started."""
        with self._mutex:
            self._is_wanted = True
            if self._is_there:
                return
            self._hurry, self._ended = _taken_lock(), _taken_lock()
            try:
                start_new_thread(self._run, (self._hurry, self._ended))
            except RuntimeError:  # there may be no more, or the interpreter is ending
                pass
            else:
                self._is_there = True
                return
        self._flush()

    def stop(self) -> None:
        """End the thread, if it is there, and wait for that. What it has not flushed is left to the caller."""
        with self._mutex:
            ended = self._ended if self._is_there else None
            if ended is not None:
                self._hurry.release()
        if ended is not None:
            ended.acquire()

    def tell(self) -> None:
        """Raise what a flush has raised since this was last called."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, hurry: LockType, ended: LockType) -> None:
        is_wanted = True
        try:
            while is_wanted and not hurry.acquire(timeout=self._after):
                self._is_wanted = False  # what is written from here on may come too late for this flush
                try:
                    self._flush()
                except AuditError as error:
                    self._error = error
                with self._mutex:
                    is_wanted = self._is_there = self._is_wanted
        finally:
            with self._mutex:
                if self._ended is ended:  # and not another thread's already
                    self._is_there = False
            ended.release()


def _taken_lock() -> LockType:
    """Return a lock that is held, for somebody to wait on until it is released."""
    lock = allocate_lock()
    lock.acquire()
    return lock
