"""Bytes between the host's streams and the job's, while an exec is under way.

The job never holds a descriptor of the host's files: it could reopen one through /proc/self/fd with other rights. It
gets pipes, or a pty of its own container, and what flows is counted, hashed and bounded here. Nothing here blocks on
one stream: a reader that stalls holds the job up, never the clock.
"""

import errno
import os
import select
import stat

from jhansi_runtime.digest import sha256

__all__ = ["Input", "Output"]

_CHUNK = 1 << 16
# A pipe that polls as writable takes this much without blocking (PIPE_BUF, pipe(7)); the host's own descriptors
# are not ours to make non-blocking.
_ATOMIC = 4096
_GONE = frozenset({errno.EPIPE, errno.EIO, errno.ECONNRESET})


class Output:
    """One stream of the job on its way out. `sink` is a descriptor of the host's, or None to capture.

    count, digest and truncated describe what was taken from the job. `close` closes the source, never the sink.
    """

    def __init__(self, source: int, sink: int | None) -> None:
        self.source = source
        self.count = 0
        self.truncated = False
        self.captured = bytearray()
        self._sink = sink
        self._sink_block = _CHUNK if sink is None or stat.S_ISREG(os.fstat(sink).st_mode) else _ATOMIC
        self._hash = sha256()
        self._pending = memoryview(b"")
        self._open = True

    @property
    def digest(self) -> str:
        """SHA-256 of what was taken from the job, in hexadecimal."""
        return self._hash.hexdigest()

    def interest(self) -> tuple[int, int] | None:
        """Return the descriptor and the poll events this stream waits for; None once it is done."""
        if self._pending and self._sink is not None:
            return self._sink, select.POLLOUT
        return (self.source, select.POLLIN) if self._open else None

    def advance(self, allowance: int) -> bool:
        """Take a step: write what is pending, or read up to `allowance` bytes. False when the job wrote more."""
        if self._pending:
            self._write()
            return True
        # One byte more than allowed tells a job that wrote exactly its limit from one that goes on.
        chunk = self._read(min(_CHUNK, allowance + 1))
        within = len(chunk) <= allowance
        self._take(chunk[: max(0, allowance)])
        if not within:
            self.truncated = True
            self.close()
        return within

    def close(self) -> None:
        """Close the job's side: it gets SIGPIPE at its next write."""
        if self._open:
            self._open = False
            os.close(self.source)

    def abandon(self) -> None:
        """Give up what the host has not taken."""
        self._pending = memoryview(b"")
        self.close()

    def _read(self, size: int) -> bytes:
        try:
            chunk = os.read(self.source, size)
        except BlockingIOError:
            return b""
        except OSError as error:
            if error.errno != errno.EIO:  # a pty whose last slave is closed
                raise
            chunk = b""
        if not chunk:
            self.close()
        return chunk

    def _take(self, chunk: bytes) -> None:
        self.count += len(chunk)
        self._hash.update(chunk)
        if self._sink is None:
            self.captured += chunk
        else:
            self._pending = memoryview(chunk)

    def _write(self) -> None:
        assert self._sink is not None  # noqa: S101 - only a stream with a sink has something pending
        try:
            written = os.write(self._sink, self._pending[: self._sink_block])
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno not in _GONE:
                raise
            # The reader has left; the job learns of it as it would have from the reader itself.
            self.abandon()
            return
        self._pending = self._pending[written:]


class Input:
    """What the job reads: bytes, or a descriptor of the host's, towards `sink`, the job's pipe or pty.

    `close` closes the sink and never the source.
    """

    def __init__(self, source: int | bytes, sink: int) -> None:
        self._source = None if isinstance(source, bytes) else source
        self._pending = memoryview(source if isinstance(source, bytes) else b"")
        self._sink = sink
        self._open = True
        if self._source is None and not self._pending:
            self.close()

    def interest(self) -> tuple[int, int] | None:
        """Return the descriptor and the poll events this stream waits for; None once it is done."""
        if not self._open:
            return None
        if self._pending or self._source is None:
            return self._sink, select.POLLOUT
        return self._source, select.POLLIN

    def advance(self) -> None:
        """Take a step: write what is pending, or read more."""
        if self._pending:
            self._write()
        elif self._source is not None:
            self._read(self._source)
        if self._source is None and not self._pending:
            self.close()

    def close(self) -> None:
        """Give the job its end of file."""
        if self._open:
            self._open = False
            os.close(self._sink)

    def _read(self, source: int) -> None:
        try:
            chunk = os.read(source, _CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno not in _GONE:
                raise
            chunk = b""
        if chunk:
            self._pending = memoryview(chunk)
        else:
            self._source = None

    def _write(self) -> None:
        try:
            written = os.write(self._sink, self._pending)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno not in _GONE:
                raise
            self.close()  # the job has closed its stdin, and wants no more
            return
        self._pending = self._pending[written:]
