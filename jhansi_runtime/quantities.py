"""Sizes and durations as people write them: "512M" is bytes, "1h30m" is seconds; and back.

A size unit is a power of 1024 whether it is written M, MB or MiB, as in docker and systemd. A number without a unit
is bytes, or seconds. What `size_text` and `duration_text` write, `parse_size` and `parse_duration` read.
"""

import re

from jhansi_runtime.errors import InvalidRequestError

__all__ = ["duration_text", "parse_duration", "parse_size", "size_text"]

SIZE_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
DURATION_UNITS = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}  # milliseconds, largest first

# Compiled when first used: most commands name no quantity.
_NUMBER = r"([0-9]{1,15}(?:\.[0-9]{1,9})?)"
_SIZE = _NUMBER + "(?:([KMGTkmgt])[Ii]?)?[Bb]?"
_DURATION_PART = _NUMBER + "(ms|[smhd])"


def parse_size(text: str) -> int:
    """Bytes: "0", "4096", "64K", "1.5G". InvalidRequestError for anything else."""
    match = re.fullmatch(_SIZE, text)
    if match is None:
        raise InvalidRequestError(f"not a size: {text!r}", remedy="write a number of bytes, or one with K, M, G or T")
    number, unit = match.groups()
    factor = SIZE_UNITS[(unit or "").upper()]
    return int(number) * factor if number.isdigit() else int(float(number) * factor)


def size_text(size: int) -> str:
    """The size in its largest unit: exact when it is a whole number of them ("512M"), else one decimal ("1.4M")."""
    unit, factor = next((unit, factor) for unit, factor in reversed(SIZE_UNITS.items()) if size >= factor or not unit)
    return f"{size // factor}{unit}" if size % factor == 0 else f"{size / factor:.1f}{unit}"


def parse_duration(text: str) -> float:
    """Seconds: "30", "0.5s", "500ms", "2h", "1h30m". InvalidRequestError for anything else."""
    if re.fullmatch(_NUMBER, text):
        return float(text)
    parts = re.findall(_DURATION_PART, text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise InvalidRequestError(
            f"not a duration: {text!r}", remedy="write seconds, or a number with ms, s, m, h or d"
        )
    return sum(float(number) * DURATION_UNITS[unit] for number, unit in parts) / 1_000


def duration_text(seconds: float) -> str:
    """The duration in whole units, largest first ("1h30m"), to the millisecond."""
    rest = round(seconds * 1_000)
    words = []
    for unit, factor in DURATION_UNITS.items():
        count, rest = divmod(rest, factor)
        if count:
            words.append(f"{count}{unit}")
    return "".join(words) or "0s"
