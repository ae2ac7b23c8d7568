"""The clock's door, and a request's time by it: since it came in, until its deadline, stage by stage.

And how far the event loop is behind: what a request waited before anybody looked at it is in no timer.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final, Protocol

from workloads.contract.slo import Stage

_WAITED: Final = (Stage.CANDIDATES.value, Stage.RANK.value)


class Clock(Protocol):
    """What time it is."""

    def now_s(self) -> float:
        """Seconds on a clock that does not go back."""
        ...

    def wall_ms(self) -> int:
        """Milliseconds since 1970, UTC."""
        ...


class SystemClock:
    """The machine's."""

    now_s = staticmethod(time.perf_counter)

    @staticmethod
    def wall_ms() -> int:
        """See `Clock`."""
        return time.time_ns() // 1_000_000


class FakeClock:
    """Stands still unless somebody sleeps by it, or lets it run."""

    def __init__(self, wall_ms: int) -> None:
        self._passed_s = 0.0
        self._wall_ms = wall_ms

    def now_s(self) -> float:
        """See `Clock`."""
        return self._passed_s

    def wall_ms(self) -> int:
        """See `Clock`."""
        return self._wall_ms + round(self._passed_s * 1000)

    def run(self, seconds: float) -> None:
        """Let time pass."""
        self._passed_s += seconds

    async def sleep(self, seconds: float) -> None:
        """What a fake neighbour waits by: time passes, and nobody waits."""
        self.run(seconds)


class LoopLag:
    """How late the event loop comes to what is due: a glance every so often, and the latest lateness that it met."""

    EVERY_S: Final = 0.02

    def __init__(self) -> None:
        self.lag_s = 0.0
        self._due: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Look from now on; belongs to the running loop."""
        loop = asyncio.get_running_loop()
        self._due = loop.call_at(loop.time() + self.EVERY_S, self._look, loop, loop.time() + self.EVERY_S)

    def stop(self) -> None:
        """Look no more."""
        if self._due is not None:
            self._due.cancel()
        self._due = None

    def _look(self, loop: asyncio.AbstractEventLoop, due_s: float) -> None:
        now = loop.time()
        self.lag_s = max(now - due_s, 0.0)
        self._due = loop.call_at(now + self.EVERY_S, self._look, loop, now + self.EVERY_S)


class Timer:
    """One request's time; it starts when it is made. A stage may be timed in several pieces."""

    def __init__(self, clock: Clock, deadline_ms: float) -> None:
        self._now_s = clock.now_s
        self._start_s = self._lap_s = clock.now_s()
        self.deadline_ms = deadline_ms
        self.stages_ms: dict[str, float] = {}

    def spent_ms(self) -> float:
        """Since the start."""
        return (self._now_s() - self._start_s) * 1000.0

    def left_ms(self) -> float:
        """Until the deadline; below 0 after it."""
        return self.deadline_ms - self.spent_ms()

    def lap(self, stage: Stage) -> None:
        """What passed since the last lap belongs to `stage`."""
        now = self._now_s()
        self.stages_ms[stage.value] = self.stages_ms.get(stage.value, 0.0) + (now - self._lap_s) * 1000.0
        self._lap_s = now

    def waited_ms(self) -> float:
        """Spent in the stages that call a neighbour; the rest is the gateway's own time."""
        return sum(self.stages_ms.get(stage, 0.0) for stage in _WAITED)
