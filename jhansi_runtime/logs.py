"""The server's log: one JSON object a line on stderr, for journald and whatever reads it there.

Every line has time, level and event; the rest are the event's own fields. A log goes further than what it tells of, so
no line may hold a path of the host, a key or the value of an environment variable: an event's fields are what its
writer chose, and of an exception there is the class and where it was raised, never its message. Of what a library logs
there is the text it always writes, without what it put into it.
"""

import json
import logging
import sys
from types import TracebackType
from typing import TypeAlias

from jhansi_runtime.spec import instant

__all__ = ["configure", "log"]

Field: TypeAlias = str | int | float | bool | list[str] | None

_LOGGER = logging.getLogger("jhansi")
_FRAMES = 8  # of a traceback, the innermost


def configure() -> None:
    """Send what this process logs to stderr, as these lines: our own from info on, a library's from warning on."""
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(_Lines())
    root = logging.getLogger()
    root.handlers[:] = [lines]
    root.setLevel(logging.WARNING)
    _LOGGER.setLevel(logging.INFO)


def log(event: str, *, error: BaseException | None = None, **fields: Field) -> None:
    """Write one line. event is a name like those of the audit log; error is told by its class and place."""
    level = logging.INFO if error is None else logging.ERROR
    if _LOGGER.isEnabledFor(level):
        _LOGGER.log(level, event, exc_info=error, extra={"fields": fields})


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of ASCII."""
        line: dict[str, object] = {"time": instant(record.created), "level": record.levelname.lower()}
        if record.name == _LOGGER.name:
            line |= {"event": record.msg} | getattr(record, "fields", {})
        else:
            line |= {"event": "library", "logger": record.name, "message": _template(record.msg)}
        if record.exc_info and record.exc_info[1] is not None:
            error = _first(record.exc_info[1])
            line |= {"exception": type(error).__name__, "raised_in": _places(error.__traceback__)}
        return json.dumps(line)


def _template(message: object) -> str:
    """What a library's message always says: the text that its values are put into, to the end of the first line."""
    if not isinstance(message, str):
        return type(message).__name__
    return message.partition("\n")[0]


def _first(error: BaseException) -> BaseException:
    """What was raised first of what came out together."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _places(traceback: TracebackType | None) -> list[str]:
    """Module, function and line of the innermost frames, outermost first."""
    places = []
    while traceback is not None:
        frame = traceback.tb_frame
        places.append(f"{frame.f_globals.get('__name__')}.{frame.f_code.co_name}:{traceback.tb_lineno}")
        traceback = traceback.tb_next
    return places[-_FRAMES:]
