"""The agent as a server: its three loops, and what it says about itself.

One loop keeps models in Triton, one reads the channel, one brings the site from edition to edition; none waits for
another, so that a cloud that hangs keeps nobody from a rollback. Ready means that something is served, loaded and warm
(that bundle, where one was given for ever): a release that was refused, or a cloud that is gone, stands in the detail
and costs no readiness.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Final

from prometheus_client import CollectorRegistry, Gauge

from workloads.agent.deployment import Deployment
from workloads.agent.keeper import Keeper
from workloads.agent.refusal import Hindrance
from workloads.agent.releases import Releases
from workloads.telemetry import log
from workloads.telemetry.beside import in_thread
from workloads.telemetry.metrics import StageMetrics
from workloads.telemetry.service import Service

PERIOD_S: Final = 0.5
"""Between two looks at Triton, and at what is wanted: a server that came back has its models within a second or two."""
MOVING_S: Final = 0.1
"""Between two steps of a flip."""
POLL_S: Final = 1.0
POLL_LAST_S: Final = 30.0
"""Between two looks at the channel, and the most while it cannot be read."""

_logger = log.get(component="agent")

Work = tuple[Keeper, Deployment]
Open = Callable[[CollectorRegistry], AbstractAsyncContextManager[Work]]
"""Opens the doors, for as long as the server runs."""


def create_app(
    open_work: Open, releases: Releases, registry: CollectorRegistry, *, period_s: float = PERIOD_S
) -> Service:
    """The agent's ASGI application; the loops run while the application does."""
    agent = _Agent(open_work, releases, registry, period_s)
    return Service(
        routes={},
        metrics=StageMetrics(registry),
        missing=agent.missing,
        detail=agent.detail,
        start=agent.start,
        stop=agent.stop,
    )


class _Agent:
    def __init__(self, open_work: Open, releases: Releases, registry: CollectorRegistry, period_s: float) -> None:
        self._open_work = open_work
        self._releases = releases
        self._registry = registry
        self._period_s = period_s
        self._work: Work | None = None
        self._task: asyncio.Task[None] | None = None
        self._channel_fault = ""
        ready = Gauge("rankbridge_agent_ready", "1 while an edition is served, loaded and warm", registry=registry)
        ready.set_function(lambda: float(not self.missing()))
        loads = Gauge("rankbridge_agent_model_loads", "Times that a model was brought in", registry=registry)
        loads.set_function(lambda: float(self._work[0].loads if self._work else 0))
        reached = Gauge("rankbridge_agent_channel_reached", "1 while the channel can be read", registry=registry)
        reached.set_function(lambda: float(not self._channel_fault))

    def missing(self) -> dict[str, str]:
        """What the agent still waits for."""
        if self._work is None:
            return {"agent": "is starting"}
        keeper, deployment = self._work
        return {**deployment.missing(), **keeper.missing}

    def detail(self) -> dict[str, object]:
        """What else `/readyz` says."""
        if self._work is None:
            return {}
        channel = {"channel": self._releases.channel, "channel_fault": self._channel_fault}
        return channel | self._work[1].detail()

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        async with self._open_work(self._registry) as work:
            self._work = keeper, deployment = work
            async with _together(self._keep(keeper), self._watch(deployment), self._deploy(deployment)):
                await asyncio.Event().wait()

    async def _keep(self, keeper: Keeper) -> None:
        while True:
            await _one_round(keeper.step())
            await asyncio.sleep(self._period_s)

    async def _deploy(self, deployment: Deployment) -> None:
        while True:
            moving = await _one_round(deployment.step())
            await asyncio.sleep(min(MOVING_S, self._period_s) if moving else self._period_s)

    async def _watch(self, deployment: Deployment) -> None:
        patience_s = POLL_S
        while True:
            try:
                deployment.offer(await in_thread(self._releases.wanted))
            except (Hindrance, OSError) as error:
                if not self._channel_fault:
                    _logger.warning("the channel cannot be read; what is served is served on", fault=str(error))
                self._channel_fault = str(error)
                patience_s = min(2 * patience_s, POLL_LAST_S)
            except Exception as error:  # as in _one_round
                _logger.exception("a round failed")
                self._channel_fault = repr(error)
                patience_s = min(2 * patience_s, POLL_LAST_S)
            else:
                if self._channel_fault:
                    _logger.info("the channel can be read again")
                self._channel_fault, patience_s = "", POLL_S
            await asyncio.sleep(patience_s)


async def _one_round(step: Awaitable[bool | None]) -> bool:
    try:
        return bool(await step)
    except Exception:  # the loop is the agent: a fault in one round must not end it
        _logger.exception("a round failed")
        return False


@contextlib.asynccontextmanager
async def _together(*loops: Awaitable[None]) -> AsyncIterator[None]:
    tasks = [asyncio.ensure_future(loop) for loop in loops]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
