"""The agent as a server: the keeper's loop, and what it says about itself. Ready means models loaded and warm."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Final

from prometheus_client import CollectorRegistry, Gauge

from workloads.agent.door import TritonDoor
from workloads.agent.keeper import Keeper
from workloads.telemetry import log
from workloads.telemetry.metrics import StageMetrics
from workloads.telemetry.service import Service

PERIOD_S: Final = 0.5
"""Between two looks at Triton: a server that came back has its models again within a second or two."""

_logger = log.get(component="agent")


def create_app(
    open_door: Callable[[], AbstractAsyncContextManager[TritonDoor]],
    make_keeper: Callable[[TritonDoor], Keeper],
    registry: CollectorRegistry,
    *,
    period_s: float = PERIOD_S,
) -> Service:
    """The agent's ASGI application; the loop runs while the application does."""
    agent = _Agent(open_door, make_keeper, registry, period_s)
    return Service(routes={}, metrics=StageMetrics(registry), missing=agent.missing, start=agent.start, stop=agent.stop)


class _Agent:
    def __init__(
        self,
        open_door: Callable[[], AbstractAsyncContextManager[TritonDoor]],
        make_keeper: Callable[[TritonDoor], Keeper],
        registry: CollectorRegistry,
        period_s: float,
    ) -> None:
        self._open_door = open_door
        self._make_keeper = make_keeper
        self._period_s = period_s
        self._keeper: Keeper | None = None
        self._task: asyncio.Task[None] | None = None
        ready = Gauge("rankbridge_agent_ready", "1 while every model is loaded and warm", registry=registry)
        ready.set_function(lambda: float(not self.missing()))
        loads = Gauge("rankbridge_agent_model_loads", "Times that a model was brought in", registry=registry)
        loads.set_function(lambda: float(self._keeper.loads if self._keeper else 0))

    def missing(self) -> dict[str, str]:
        """What the agent still waits for."""
        return self._keeper.missing if self._keeper else {"agent": "is starting"}

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        async with self._open_door() as door:
            self._keeper = self._make_keeper(door)
            while True:
                try:
                    await self._keeper.step()
                except Exception:  # the loop is the agent: a fault in one round must not end it
                    _logger.exception("a round failed")
                await asyncio.sleep(self._period_s)
