"""A limit on bytes per second, shared fairly by all that send: a token bucket with a queue.

Knows nothing of what is sent. A caller says how much it is about to send and waits for its turn; turns are given in
the order in which they were asked for, so no sender starves another. One turn is sent at the speed of the line, so the
limit holds over a few turns and not within one.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from typing import Final

_UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_AMOUNT: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmg]i?|)b?\s*(/s)?\s*", re.IGNORECASE)


def parse_bytes(text: str, *, per_second: bool = False) -> int:
    """`10MB`, `64 MiB`, `500000`; with `per_second` also `10MB/s`. Bytes. Raises ValueError."""
    found = _AMOUNT.fullmatch(text)
    if found is None or (found[3] and not per_second):
        example = "10MB/s" if per_second else "64MiB"
        raise ValueError(f"{text!r} is no amount of bytes; write it as {example}")
    return int(float(found[1]) * _UNITS[found[2].lower()])


class StoppedError(Exception):
    """The job ends; nobody gets another turn."""


class Bandwidth:
    """`rate` bytes per second over all threads; None is no limit.

    A turn begins when everything before it has been paid for: after a turn of n bytes the next one begins n / rate
    seconds later. What was not used in the past is not saved up.
    """

    def __init__(self, rate: int | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        if rate is not None and rate <= 0:
            raise ValueError(f"{rate} bytes per second: must be above 0")
        self._rate = rate
        self._clock = clock
        self._mutex = threading.Lock()
        self._free_at = 0.0
        self._stopped = threading.Event()

    def turn(self, size: int) -> None:
        """Wait until `size` bytes may be sent. Raises StoppedError when the job ends meanwhile."""
        with self._mutex:
            now = self._clock()
            begins = max(now, self._free_at)
            self._free_at = begins + (size / self._rate if self._rate else 0.0)
        if self._stopped.wait(max(0.0, begins - now)):
            raise StoppedError

    def stop(self) -> None:
        """Wake all who wait, and give no more turns."""
        self._stopped.set()
