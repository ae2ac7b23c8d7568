"""When the intake turns callers away before anything breaks, and when it takes them again.

A gate closes at one level and opens at another, so that it does not flutter where the level hovers: the
callers that it turned away come back together. Knows what neither disks nor queues are.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

RESERVE_BYTES: Final = 256 * 1024 * 1024
"""Room below which no event is taken: what waits already, a write-ahead log that is overdue, its move into the
database, and what a trim writes before it frees anything must fit in it."""
LOG_SHARE: Final = 4
"""Into the reserve a log must fit so often."""
OPENS_AT: Final = 1.25
"""Times what closes the gate of the disk."""

FreeBytes = Callable[[], int]
"""The door to the disk's room. Raises OSError."""


class Gate:
    """Closed once `room` is below `closes_below`, until it is `opens_at` or more."""

    def __init__(self, closes_below: int, opens_at: int) -> None:
        if opens_at < closes_below:
            raise ValueError(f"a gate that closes below {closes_below} cannot open at {opens_at}")
        self.closes_below = closes_below
        self.opens_at = opens_at
        self._closed = False

    def is_closed(self, room: int) -> bool:
        """Whether callers are turned away at this room; remembers it for the next question."""
        self._closed = room < (self.opens_at if self._closed else self.closes_below)
        return self._closed


def free_bytes_beside(path: Path) -> FreeBytes:
    """What the file system of `path`'s folder has left for us."""
    folder = path.absolute().parent
    return lambda: shutil.disk_usage(folder).free
