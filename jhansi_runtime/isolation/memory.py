"""What of its memory a zygote's job writes to: learnt in a rehearsal, and copied for each job before its order comes.

A fork shares the memory of its parent, and copies a page when it first writes to it, which takes two microseconds.
Between its order and its end a job does so many hundreds of times: CPython writes to most of what it has as it takes
itself down. So a zygote has one fork run a program without a line, up to its end, and looks which pages are its own by
then; each job copies those while it has nothing else to do.

Nothing but time depends on this. Where the kernel does not let a process look at its child (ptrace(2)), or cannot copy
ahead (madvise(2), since Linux 5.14), nothing is.
"""

import os
import signal
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

import prctl

from jhansi_runtime.isolation.syscalls import (
    PTRACE_EVENT_EXIT,
    madvise_populate_write,
    ptrace_seize_until_exit,
)

__all__ = ["Span", "copy_ahead", "rehearse", "writable"]

Span = tuple[int, int]  # start and end: addresses, of whole pages

_SPAN = struct.Struct("QQ")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_ENTRY = 8  # bytes that /proc/PID/pagemap has for a page, and bits of them: proc_pid_pagemap(5)
_MAPPED_BY_ONE, _OF_A_FILE = 1 << 56, 1 << 61
_LARGEST = 1 << 30  # bytes of a mapping that is looked at
_SHARE = 2  # of what a zygote has in memory, a job copies this part ahead, and no more
_WITHIN_SECONDS = 10
_AT_EXIT = signal.SIGTRAP | PTRACE_EVENT_EXIT << 8  # what waitpid(2) says of a tracee that is about to end


def rehearse() -> tuple[Span, ...] | None:
    """Fork. In the fork return None: it is to do what a job does, up to its end. Here return what it wrote to.

    That is empty where it cannot be told. OSError: there can be no fork.
    """
    told, telling = os.pipe2(os.O_CLOEXEC)
    # In between stands a third process, which looks: what this one wrote meanwhile would seem to be the other's.
    observer = os.fork()
    if observer == 0:
        try:
            _observe(telling)
        except OSError:  # before there was a rehearsal; whoever waits is told nothing
            os._exit(1)
        return None
    os.close(telling)
    with open(told, "rb") as file:
        content = file.read()
    written = tuple(_SPAN.iter_unpack(content[: len(content) // _SPAN.size * _SPAN.size]))  # it may have been killed
    with suppress(ChildProcessError):  # both: what an observer leaves behind is its parent's, PID 1's
        while True:
            os.wait()
    # Nothing is shared with anyone by now; but can it be done?
    return written if copy_ahead(written) else ()


def _observe(telling: int) -> None:
    """Fork, and return in the fork alone; here, write to the descriptor what that wrote to by its end, and end."""
    seized, seizing = os.pipe2(os.O_CLOEXEC)
    mine = tuple(span for span, _ in writable())
    pid = os.fork()
    if pid == 0:
        prctl.set_dumpable(1)  # or its parent may not look
        signal.alarm(_WITHIN_SECONDS)
        os.close(telling)
        os.close(seizing)
        os.read(seized, 1)
        os.close(seized)
        return
    try:
        ptrace_seize_until_exit(pid)
        os.close(seizing)
        if os.waitpid(pid, 0)[1] >> 8 == _AT_EXIT:
            spans = _up_to(_resident() // _SHARE, _own_pages(pid, mine))
            os.write(telling, b"".join(_SPAN.pack(*span) for span in spans))
    finally:  # a tracee ends, at the latest, when its tracer has
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os._exit(0)


def copy_ahead(spans: Sequence[Span]) -> bool:
    """Have pages of this process's own there, with what is in those that it shares. False when that cannot be done."""
    try:
        for start, end in spans:
            madvise_populate_write(start, end - start)
    except OSError:
        return False
    return True


def writable() -> Iterator[tuple[Span, str]]:
    """Yield where this process has memory of its own to write to, and what is mapped there (proc_pid_maps(5))."""
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            span, access, _, _, _, *name = line.split(maxsplit=5)
            if access in {"rw-p", "rwxp"}:
                start, end = (int(number, 16) for number in span.split("-"))
                yield (start, end), name[0].strip() if name else ""


def _own_pages(pid: int, spans: Iterable[Span]) -> Iterator[Span]:
    """Yield what of this memory a process shares with nobody."""
    pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    for start, end in spans:
        if end - start <= _LARGEST:
            entries = os.pread(pagemap, (end - start) // _PAGE * _ENTRY, start // _PAGE * _ENTRY)
            yield from _together(
                start + number * _PAGE
                for number, entry in enumerate(memoryview(entries).cast("Q"))
                if entry & (_MAPPED_BY_ONE | _OF_A_FILE) == _MAPPED_BY_ONE
            )
    os.close(pagemap)


def _together(pages: Iterable[int]) -> Iterator[Span]:
    """Yield spans of the pages, with single ones between them: to copy one takes no longer than a call more."""
    start = end = 0
    for page in pages:
        if page > end + _PAGE:
            if end:
                yield start, end
            start = page
        end = page + _PAGE
    if end:
        yield start, end


def _resident() -> int:
    """Return how many bytes this process has in memory that are no file's (proc_pid_statm(5))."""
    with open("/proc/self/statm", encoding="ascii") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * _PAGE


def _up_to(length: int, spans: Iterable[Span]) -> Iterator[Span]:
    """Yield the first spans, of so many bytes together."""
    for start, end in spans:
        if length <= 0:
            return
        yield start, min(end, start + length)
        length -= end - start
