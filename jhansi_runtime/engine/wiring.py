"""Which of the job's streams is a pipe, which the container's pty, and what on the host each is joined to."""

import os
import stat
from contextlib import ExitStack
from typing import NamedTuple, Self

from jhansi_runtime.engine.pump import Input, Output
from jhansi_runtime.errors import InvalidRequestError

__all__ = ["Streams", "Wiring"]


class Streams(NamedTuple):
    """The host's side of the job's streams: descriptors, or None for an empty stdin and a captured output.

    control is readable when a signal is to be passed on: each byte is a number (signal.set_wakeup_fd writes such).
    With `terminal`, a stream that is a terminal on the host is one in the container too: a pty of its own.
    """

    stdin: int | None = None
    stdout: int | None = None
    stderr: int | None = None
    control: int | None = None
    terminal: bool = False


class Wiring:
    """The pipes of one exec, and its pty once init has made it. A context manager: leaving it closes what is ours.

    passed are the descriptors for the order, in its sequence; `passed_on` closes our copies once it has been sent.
    """

    def __init__(self, streams: Streams, stdin: bytes) -> None:
        self._streams = streams
        self._stack = ExitStack()
        self._master: int | None = None
        self.passed: list[int] = []
        self.on_terminal = _terminals(streams)
        self.input: Input | None = None
        self.stdout: Output | None = None
        self.stderr: Output | None = None
        self._owned: list[int] = []
        self._connect_input(stdin)
        self._connect_outputs()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.passed_on()
        for stream in (self.input, self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self._stack.close()

    @property
    def outputs(self) -> list[Output]:
        """The streams that come out of the job."""
        return [output for output in (self.stdout, self.stderr) if output is not None]

    @property
    def size(self) -> tuple[int, int] | None:
        """Rows and columns for the job's pty, if it is to have one."""
        return self._host_size() if any(self.on_terminal) else None

    def passed_on(self) -> None:
        """Close our copies of the job's ends: its end of file is ours only when nobody else can write."""
        while self._owned:
            os.close(self._owned.pop())

    def connect_terminal(self, master: int) -> None:
        """Join the pty that init has made to the host's terminal."""
        from jhansi_runtime.engine import terminal  # noqa: PLC0415 - termios and tty are for those who have one

        self._master = master
        self.resize()  # it may have changed since the order was written
        os.set_blocking(master, False)
        on_stdin, on_stdout, _ = self.on_terminal
        sink = os.dup(master)  # one descriptor for each direction, so that each stream closes its own
        if on_stdin and self._streams.stdin is not None:
            self._stack.enter_context(terminal.raw(self._streams.stdin))
            self.input = Input(self._streams.stdin, sink)
        else:
            terminal.untranslated(master)
            self._stack.callback(os.close, sink)
        output = Output(master, self._visible())
        if on_stdout:
            self.stdout = output
        else:
            self.stderr = output

    def resize(self) -> None:
        """Copy the size of the host's terminal to the job's."""
        if self._master is not None:
            from jhansi_runtime.isolation.terminal import resize  # noqa: PLC0415 - likewise

            resize(self._master, *self._host_size())

    def _host_size(self) -> tuple[int, int]:
        """Return the rows and columns of the host's terminal."""
        columns, rows = os.get_terminal_size(self._visible())
        return rows, columns

    def _visible(self) -> int:
        """Return the host's terminal that the job's pty writes to."""
        sink = self._streams.stdout if self.on_terminal[1] else self._streams.stderr
        assert sink is not None  # noqa: S101 - a stream is on the terminal only if it has a descriptor
        return sink

    def _connect_input(self, content: bytes) -> None:
        source = self._streams.stdin
        if self.on_terminal[0]:
            return
        if source is not None and stat.S_ISDIR(os.fstat(source).st_mode):
            raise InvalidRequestError("stdin is a directory", remedy="redirect stdin from a file")
        if source is not None and os.isatty(source):
            # Someone else may be reading this terminal (`jhansi-run ... | less`), so it must not be read ahead.
            self.passed.append(source)
            return
        ours = self._pipe(job_reads=True)
        self.input = Input(content if source is None else source, ours)

    def _connect_outputs(self) -> None:
        _, stdout_on_terminal, stderr_on_terminal = self.on_terminal
        if not stdout_on_terminal:
            self.stdout = Output(self._pipe(job_reads=False), self._streams.stdout)
        if stderr_on_terminal:
            return
        if not stdout_on_terminal and _same_file(self._streams.stdout, self._streams.stderr):
            # `2>&1`: in one pipe the two stay in the order in which they were written.
            self.passed.append(self.passed[-1])
            return
        self.stderr = Output(self._pipe(job_reads=False), self._streams.stderr)

    def _pipe(self, *, job_reads: bool) -> int:
        readable, writable = os.pipe2(os.O_CLOEXEC)
        ours, theirs = (writable, readable) if job_reads else (readable, writable)
        os.set_blocking(ours, False)
        self.passed.append(theirs)
        self._owned.append(theirs)
        return ours


def _terminals(streams: Streams) -> tuple[bool, bool, bool]:
    """Say which streams are to be a terminal. stdin is one only beside stdout, for its echo has to go somewhere."""
    stdin, stdout, stderr = (
        streams.terminal and stream is not None and os.isatty(stream)
        for stream in (streams.stdin, streams.stdout, streams.stderr)
    )
    return stdin and stdout, stdout, stderr


def _same_file(one: int | None, other: int | None) -> bool:
    return one is not None and other is not None and os.path.sameopenfile(one, other)
