"""The points at which an agent may die, by name: tests kill a real process at each of them.

Every step of a flip ends at one. What holds at all of them: the site serves the old edition or the new one, whole,
and an agent that is started again brings it to the new one. Knows no step's inside.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Final

POINTS: Final[tuple[str, ...]] = (
    "begun",
    "fetched",
    "checked",
    "rendered",
    "loaded",
    "probed",
    "announced",
    "held",
    "turned",
    "drained",
    "alone",
    "unloaded",
    "cleaned",
)
"""In the order in which a flip passes them; a first edition passes those up to `probed`, then `alone` and the rest."""

Reached = Callable[[str], None]
"""Told of every point that is reached."""


def nowhere(_: str) -> None:
    """Dies at no point."""


def kill_at(point: str) -> Reached:
    """A hook that ends this very process at `point` as a power cut would: nothing is cleaned up. Raises ValueError."""
    if point not in POINTS:
        raise ValueError(f"no crash point is called {point!r}; there are {', '.join(POINTS)}")

    def reached(name: str) -> None:
        if name == point:
            os.kill(os.getpid(), signal.SIGKILL)

    return reached
