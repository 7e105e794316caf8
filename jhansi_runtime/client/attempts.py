"""When a call may be sent again, and after how long.

A call is repeated when nothing of it can have been carried out: no connection was made, or the server said that it was
too busy (429). One that may have been carried out is repeated only where twice is as good as once. Nothing here sends
or sleeps.
"""

import random
from typing import Any

import httpx

from jhansi_runtime.client.calls import Call
from jhansi_runtime.client.problems import connection_error, from_response, retry_after

__all__ = ["Attempts"]

FIRST_DELAY = 0.1
LONGEST_DELAY = 5.0
LONGEST_RETRY_AFTER = 30.0  # what asks for more is told to the caller, who knows better what to do meanwhile

_NOTHING_WAS_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_TOO_MANY, _UNAVAILABLE, _NOT_FOUND = 429, 503, 404


class Attempts:
    """The attempts at one call: `left` more may follow the one under way. address is what messages call the server."""

    def __init__(self, call: Call[Any], *, left: int, address: str) -> None:
        self._call = call
        self._left = left
        self._address = address
        self._delay = FIRST_DELAY
        self._may_be_done = False

    def after_failure(self, error: httpx.RequestError) -> float:
        """The seconds to wait before the next attempt; raise HostError when there is to be none."""
        was_sent = not isinstance(error, _NOTHING_WAS_SENT)
        if not self._may_follow(is_safe=self._call.can_repeat or not was_sent):
            raise connection_error(error, self._address) from error
        self._may_be_done = self._may_be_done or was_sent
        return self._next_delay()

    def after_answer(self, response: httpx.Response) -> float | None:
        """None when the answer is the one to decode, else the seconds to wait; raise what an error tells of.

        The content of an error has been read.
        """
        if not response.is_error:
            return None
        if response.status_code == _NOT_FOUND and self._call.method == "DELETE" and self._may_be_done:
            return None  # an earlier attempt, whose answer was lost, had removed it
        seconds = retry_after(response)
        if response.status_code == _TOO_MANY:
            is_safe = True
        else:
            is_safe = response.status_code == _UNAVAILABLE and seconds is not None and self._call.can_repeat
        if (seconds or 0.0) > LONGEST_RETRY_AFTER or not self._may_follow(is_safe=is_safe):
            raise from_response(response)
        return max(self._next_delay(), (seconds or 0.0) * _jitter(1.0, 1.2))

    def _may_follow(self, *, is_safe: bool) -> bool:
        body = self._call.body
        return is_safe and self._left > 0 and (isinstance(body, bytes) or body.can_repeat)

    def _next_delay(self) -> float:
        self._left -= 1
        delay = self._delay
        self._delay = min(2 * delay, LONGEST_DELAY)
        return delay * _jitter(0.5, 1.0)


def _jitter(least: float, most: float) -> float:
    """A factor that keeps clients that failed together from coming back together."""
    return random.uniform(least, most)  # noqa: S311 - it need not be hard to guess
