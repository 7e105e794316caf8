"""The events of a run (text/event-stream), read from its journal at the reader's own pace.

    start             {"run_id", "sandbox_id", "started_at"}
    stdout, stderr    {"data": text}, of which nothing is repeated; its `id` is where a reader resumes
    end               the ExecResult; its stdout and stderr are null, for they were told

Text is decoded across frames, so a character that was written in two pieces arrives whole.
"""

import asyncio
import codecs
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

from jhansi_runtime.api.service import Service
from jhansi_runtime.detached import POLL_INTERVAL, Frame
from jhansi_runtime.spec import Encoding, RunInfo, to_json

__all__ = ["MEDIA_TYPE", "NOT_STORED", "events", "frames"]

MEDIA_TYPE = "text/event-stream"
NOT_STORED = {"Cache-Control": "no-store"}
_AT_ONCE = 32 * 1024  # bytes that one reader holds, or one frame of more
_EACH = 512  # bytes that a frame counts for beyond its data
_SILENCE = 15.0  # seconds after which a comment is sent, so that whoever is between does not give the reader up


async def frames(service: Service, run_id: str, after: int, *, follow: bool) -> AsyncIterator[list[Frame]]:
    """Yield what is in the journal beyond a position, in lists; with follow until the run has ended.

    An empty list says that there was nothing for a while.
    """
    changed = asyncio.Event()
    loop = asyncio.get_running_loop()
    with ExitStack() as stack:

        def tell() -> None:
            loop.call_soon_threadsafe(changed.set)

        is_told = stack.enter_context(service.runs.watch(run_id, tell))
        while True:
            changed.clear()
            ended = await service.in_thread(service.runs.is_ended, run_id)  # first: what came before is read below
            while some := await service.in_thread(_some, service, run_id, after):
                after = some[-1].position
                yield some
            if ended or not follow:
                return
            try:
                await asyncio.wait_for(changed.wait(), _SILENCE if is_told else POLL_INTERVAL)
            except TimeoutError:
                if is_told:
                    yield []


async def events(
    service: Service, info: RunInfo, *, after: int = 0, follow: bool = True, encoding: Encoding = "text"
) -> AsyncIterator[bytes]:
    """Yield the events of a run, from a position on; with follow until its end."""
    if after == 0:
        start = {"run_id": info.run_id, "sandbox_id": info.sandbox_id, "started_at": info.started_at}
        yield _event("start", start)
    text = {stream: codecs.getincrementaldecoder("utf-8")(errors="replace") for stream in ("stdout", "stderr")}
    async for some in frames(service, info.run_id, after, follow=follow):
        if not some:
            yield b": nothing yet\n\n"
        for frame in some:
            data = b64encode(frame.data).decode() if encoding == "base64" else text[frame.stream].decode(frame.data)
            if data:
                yield _event(frame.stream, {"data": data}, frame.position)
    for stream, decoder in text.items():
        if rest := decoder.decode(b"", final=True):
            yield _event(stream, {"data": rest})
    ended = await service.in_thread(service.runs.find, info.run_id)
    if ended.result is not None:
        yield _event("end", ended.result)
    elif ended.status == "lost":
        yield _event("lost", {"run_id": info.run_id})


def _some(service: Service, run_id: str, after: int) -> list[Frame]:
    some, held = [], 0
    for frame in service.runs.frames(run_id, after):
        some.append(frame)
        held += len(frame.data) + _EACH
        if held >= _AT_ONCE:
            break
    return some


def _event(name: str, value: Any, position: int | None = None) -> bytes:  # noqa: ANN401 - any record
    number = "" if position is None else f"id: {position}\n"
    return f"event: {name}\n{number}data: {to_json(value)}\n\n".encode("ascii")
