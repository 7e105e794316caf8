"""Which bytes of a file are asked for (RFC 9110, section 14), and whether the caller has them already (section 13)."""

import re
from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["Span", "is_unchanged", "requested"]

_ONE_RANGE = re.compile(r"bytes=\s*([0-9]*)-([0-9]*)\s*", re.IGNORECASE | re.ASCII)
_LONGEST_NUMBER = 18  # digits


class Span(NamedTuple):
    """From `start` up to, not including, `end`."""

    start: int
    end: int


def requested(headers: Mapping[str, str], size: int, etag: str) -> Span | None:
    """The one range that is asked for, within a file of that size; None for all of it.

    Several ranges, or what is no range of bytes, are ignored, as the RFC allows. ValueError: none of it is there.
    """
    asked = _ONE_RANGE.fullmatch(headers.get("range", ""))
    condition = headers.get("if-range")
    if asked is None or (condition is not None and condition != etag) or not any(asked.groups()):
        return None
    first, last = asked.groups()
    if max(len(first), len(last)) > _LONGEST_NUMBER:
        return None
    if not first:
        span = Span(max(0, size - int(last)), size)
    else:
        span = Span(int(first), min(size, int(last) + 1) if last else size)
        if last and int(last) < int(first):
            return None
    if span.start >= span.end:
        raise ValueError("no byte of the range is there")
    return span


def is_unchanged(headers: Mapping[str, str], etag: str) -> bool:
    """Whether the caller has this very content already (If-None-Match, compared weakly)."""
    tags = headers.get("if-none-match")
    if tags is None:
        return False
    return tags.strip() == "*" or _weak(etag) in {_weak(tag) for tag in tags.split(",")}


def _weak(tag: str) -> str:
    return tag.strip().removeprefix("W/")
