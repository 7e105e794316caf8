"""Have a CPython that has been started for one file run another: what a zygote's interpreter does in each of its jobs.

The interpreter keeps the name of the file in its PyConfig, as text of the C library's wchar_t; run_filename is what it
will open, argv[0] what sys.path[0] is made from. Where they lie in its state differs from version to version, so they
are looked for, by the name that this interpreter was started with; a version that keeps them elsewhere is found out
when the zygote starts, not when a job does. What /proc tells of a command line is the kernel's to know (prctl(2),
PR_SET_MM_MAP).
"""

import ctypes
import errno
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jhansi_runtime.isolation.memory import writable
from jhansi_runtime.isolation.syscalls import set_memory_map

__all__ = ["Interpreter", "find", "run_next"]

_STATE_BYTES = 1 << 20  # more than any PyInterpreterState has, which the PyConfig is a part of
_WIDE = "utf-32-le" if sys.byteorder == "little" else "utf-32-be"
_WORD = ctypes.sizeof(ctypes.c_void_p)
_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))
# As a Python starts with, and as what detach() has done away with (signal(7); Modules/signalmodule.c).
_IGNORED = (signal.SIGPIPE, signal.SIGXFSZ)


class Interpreter(NamedTuple):
    """Where this interpreter keeps the name of the file that it was started for.

    filenames are addresses of pointers to that text: run_filename, and argv[0]. position is its place in sys.orig_argv.
    """

    filenames: tuple[int, ...]
    position: int


def find(placeholder: str) -> Interpreter:
    """Look for the places of a file name that no file has. OSError (ENOTSUP): this Python keeps it elsewhere."""
    if placeholder not in sys.orig_argv or sys.argv[:1] != [placeholder]:
        raise OSError(errno.ENOTSUP, "this Python was not started for the file of a zygote")
    memory = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        written = {start: _read(memory, start, end - start) for start, end in _allocated()}
        state = _state()
        words = memoryview(_read(memory, state, _STATE_BYTES)).cast("P")
    finally:
        os.close(memory)
    names = set(_places(written, _wide(placeholder)))
    firsts = {at for name in names for at in _places(written, name.to_bytes(_WORD, sys.byteorder))}
    run_filename = [state + number * _WORD for number, word in enumerate(words) if word in names]
    argv = [word for word in words if word in firsts]
    if len(run_filename) != 1 or len(argv) != 1:
        raise OSError(errno.ENOTSUP, f"this Python ({sys.version.split()[0]}) keeps its file's name elsewhere")
    return Interpreter((run_filename[0], argv[0]), sys.orig_argv.index(placeholder))


def show(argv: Sequence[bytes], environment: dict[bytes, bytes]) -> None:
    """Have /proc/self/cmdline and environ tell these, as if this process had been executed with them."""
    variables = [name + b"=" + value for name, value in environment.items()]
    set_memory_map(_kept(_strings(argv)), _kept(_strings(variables)))


def run_next(interpreter: Interpreter, argv: Sequence[bytes], environment: dict[bytes, bytes]) -> None:
    """Have the interpreter run the file of that command line as its main program once it has finished starting.

    Until then it is as freshly started on the standard streams that there are now.
    """
    show(argv, environment)
    words = [os.fsdecode(word) for word in argv]
    for pointer in interpreter.filenames:
        text = _kept(_wide(words[interpreter.position]))
        ctypes.memmove(pointer, text[0].to_bytes(_WORD, sys.byteorder), _WORD)
    sys.orig_argv[:] = words
    sys.argv[:] = words[interpreter.position :]
    os.environ.clear()
    os.environb.update(environment)
    for descriptor, (name, mode) in enumerate(_STREAMS):
        stream = _reopened(getattr(sys, f"__{name}__"), descriptor, mode)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    ctypes.set_errno(0)  # a job's own ctypes would show what went wrong here
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _reopened(was: io.TextIOWrapper, descriptor: int, mode: str) -> io.TextIOWrapper | None:
    """Return what CPython makes of a standard stream (create_stdio in Python/pylifecycle.c).

    was is what it made of that stream of the zygote, with the same options and environment.
    """
    unbuffered = was.write_through
    buffering = 0 if unbuffered and mode == "w" else -1
    try:
        buffer: Any = open(descriptor, f"{mode}b", buffering, closefd=False)  # noqa: SIM115 - for as long as it runs
    except OSError:  # nothing that a program could use: a folder
        return None
    raw = buffer if buffering == 0 else buffer.raw
    raw.name = was.name
    stream = io.TextIOWrapper(
        buffer,
        was.encoding,
        was.errors,
        newline="\n",
        line_buffering=not unbuffered and (descriptor == 2 or raw.isatty()),  # noqa: PLR2004 - stderr
        write_through=unbuffered,
    )
    stream.mode = mode  # type: ignore[misc] # as C does
    return stream


# --- memory -------------------------------------------------------------------------------------------------------


def _state() -> int:
    """Return where the state of this interpreter lies."""
    get = ctypes.pythonapi.PyInterpreterState_Get
    get.restype = ctypes.c_void_p
    return int(get())


def _allocated() -> Iterator[tuple[int, int]]:
    """Return start and end of the memory that was allocated while this process ran."""
    return (span for span, mapped in writable() if mapped in {"", "[heap]"})


def _places(written: dict[int, bytes], wanted: bytes) -> Iterator[int]:
    """Yield where that stands, at the beginning of a word."""
    for start, content in written.items():
        at = content.find(wanted)
        while at >= 0:
            if at % _WORD == 0:
                yield start + at
            at = content.find(wanted, at + 1)


def _read(memory: int, start: int, length: int) -> bytes:
    """Return what lies there, whole words as far as there is memory."""
    content = os.pread(memory, length, start)
    return content[: len(content) // _WORD * _WORD]


def _wide(text: str) -> bytes:
    return f"{text}\0".encode(_WIDE, "surrogatepass")


def _strings(texts: Sequence[bytes]) -> bytes:
    return b"".join(text + b"\0" for text in texts)


def _kept(content: bytes) -> tuple[int, int]:
    """Return start and end of a copy of the content that the interpreter may free, as it does what it has made."""
    allocate = ctypes.pythonapi.PyMem_RawMalloc
    allocate.restype, allocate.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    start = allocate(len(content) or 1)
    if not start:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    ctypes.memmove(start, content, len(content))
    return start, start + len(content)
