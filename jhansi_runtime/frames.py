"""The frames of a journal: what a job wrote to one stream, as one piece of a file that both streams go to.

Eight bytes of header (from the highest: where the frame begins, 40 bits; length of the payload, 16; stream, 8), then
the payload. Because a frame says where it begins, a reader that is told to resume anywhere else than at the end of one
notices. Half a frame at the end of a file is what a kill has left, or what is being written: it is passed over.
"""

import os
from collections.abc import Iterator
from typing import Literal, NamedTuple

from jhansi_runtime.errors import InvalidRequestError, JhansiError

__all__ = ["LONGEST_PAYLOAD", "Frame", "Stream", "encoded", "frames"]

_HEADER = 8  # bytes
_BLOCK = 64 * 1024  # the longest frame, and all that a reader holds
LONGEST_PAYLOAD = _BLOCK - _HEADER

Stream = Literal["stdout", "stderr"]

_NUMBERS: dict[Stream, int] = {"stdout": 1, "stderr": 2}
_STREAMS: dict[int, Stream] = {number: stream for stream, number in _NUMBERS.items()}


class Frame(NamedTuple):
    """Up to 64 KiB that the job wrote to one stream. position is where the frame ends: what a reader resumes after."""

    position: int
    stream: Stream
    data: bytes


def encoded(position: int, stream: Stream, payload: bytes) -> bytes:
    """Return the frame that begins at a position; its payload has 1 to LONGEST_PAYLOAD bytes."""
    return (position << 24 | len(payload) << 8 | _NUMBERS[stream]).to_bytes(_HEADER, "big") + payload


def frames(journal: int, after: int) -> Iterator[Frame]:
    """Yield the whole frames of an open file beyond a position. InvalidRequestError when no frame ends there."""
    if not 0 <= after <= os.fstat(journal).st_size:
        raise _no_position(after)
    position = after
    while True:
        # No frame is longer than this, so what holds no whole one ends with the journal.
        block = os.pread(journal, _BLOCK, position)
        start = 0
        while len(block) - start >= _HEADER:
            header = int.from_bytes(block[start : start + _HEADER], "big")
            length, stream = header >> 8 & 0xFFFF, _STREAMS.get(header & 0xFF)
            if header >> 24 != position + start or stream is None or not 0 < length <= LONGEST_PAYLOAD:
                raise _no_position(after) if position + start == after != 0 else _damaged(position + start)
            end = start + _HEADER + length
            if end > len(block):
                break
            yield Frame(position + end, stream, block[start + _HEADER : end])
            start = end
        if start == 0:
            return
        position += start


def _no_position(after: int) -> InvalidRequestError:
    return InvalidRequestError(
        f"{after} is no position in the output of this run", remedy="resume after an id that it has given, or after 0"
    )


def _damaged(position: int) -> JhansiError:
    return JhansiError(
        f"the output of this run is damaged after byte {position} of its journal",
        remedy="what comes before it can be read; forget the run when that is done",
    )
