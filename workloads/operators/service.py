"""The operators as servers: their loops, and what they say about themselves.

Work is done in threads, one call after another, so that health and metrics answer whatever AWS or the API server do.
Ready means that the last whole round is not long ago.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import functools
import time
from collections.abc import Awaitable, Callable
from typing import Final

from prometheus_client import CollectorRegistry, Gauge

from workloads.operators.cloud import CloudFault
from workloads.operators.draining import HOLD_S, Handler
from workloads.operators.notices import Message, Notices
from workloads.operators.sweeper import Sweeper
from workloads.telemetry import log
from workloads.telemetry.beside import in_thread
from workloads.telemetry.metrics import StageMetrics
from workloads.telemetry.service import Service

STALE_S: Final = 60.0
"""An operator whose last whole round is longer ago than this, beside its period, is not ready."""
WAIT_S: Final = 10
"""How long one look into the queue waits for a message; shorter than any limit on the way."""
STEP_S: Final = 1.0
"""Between two steps while a node is being emptied."""
IDLE_S: Final = 10.0
"""Between two steps while none is: they show that the cluster can be reached."""
RETRY_S: Final = 2.0

_logger = log.get(component="operators")


class Pulse:
    """When something was last whole, and what is wrong with it since."""

    def __init__(self, name: str, stale_s: float, registry: CollectorRegistry) -> None:
        self._name = name
        self._stale_s = stale_s
        self._last: float | None = None
        self._begun = time.monotonic()
        self._at = ""
        self._fault = ""
        gauge = Gauge(
            f"rankbridge_{name}_last_success_seconds", "When it was last whole, since 1970", registry=registry
        )
        self._gauge = gauge

    def beat(self, fault: str = "") -> None:
        """A round ended; `fault` is why it was not whole."""
        self._fault = fault
        if not fault:
            self._last = time.monotonic()
            self._gauge.set_to_current_time()
            self._at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

    def missing(self) -> dict[str, str]:
        """Empty while the last whole round is recent."""
        if self._last is not None and time.monotonic() - self._last <= self._stale_s:
            return {}
        since = f"since {self._at}" if self._last is not None else "yet"
        return {self._name: f"no whole round {since}: {self._fault or 'none has ended'}"}

    def detail(self) -> dict[str, object]:
        """For `/readyz`."""
        return {self._name: {"last_success": self._at or None, "fault": self._fault or None}}


def hygiene_service(sweeper: Sweeper, registry: CollectorRegistry, *, period_s: float) -> Service:
    """Rounds of node hygiene, one every `period_s`, as a server."""
    pulse = Pulse("hygiene", period_s + STALE_S, registry)

    async def sweep() -> None:
        while True:
            began = time.monotonic()
            pulse.beat(await _guarded(sweeper.round))
            await asyncio.sleep(max(period_s - (time.monotonic() - began), 0.1))

    return _served([pulse], registry, sweep)


def spot_service(handler: Handler, notices: Notices, registry: CollectorRegistry) -> Service:
    """Notices received and nodes emptied, side by side, as a server."""
    received = Pulse("notices", WAIT_S + STALE_S, registry)
    stepped = Pulse("cluster", IDLE_S + STALE_S, registry)
    arrived = asyncio.Event()

    def look(wait_s: int) -> tuple[str, list[Message]]:
        try:
            return "", list(notices.receive(wait_s, HOLD_S))
        except CloudFault as error:
            return str(error), []

    async def receive() -> None:
        wait_s = 0  # the first look shows at once whether there is a queue
        while True:
            fault, messages = await in_thread(functools.partial(look, wait_s))
            wait_s = WAIT_S
            received.beat(fault)
            if fault:
                _logger.warning("no notices", fault=fault)
                await asyncio.sleep(RETRY_S)
            elif messages:
                handler.offer(messages)
                arrived.set()

    async def step() -> None:
        while True:
            arrived.clear()
            fault = await _guarded(handler.step)
            if fault:
                _logger.warning("cluster", fault=fault)
            stepped.beat(fault)
            with contextlib.suppress(TimeoutError):
                if handler.busy:
                    await asyncio.sleep(STEP_S)
                else:
                    await asyncio.wait_for(arrived.wait(), RETRY_S if fault else IDLE_S)

    return _served([received, stepped], registry, receive, step)


async def _guarded(work: Callable[[], str]) -> str:
    """What the work says is wrong; a fault of our own is one too, and no reason for a loop to end."""
    try:
        return await in_thread(work)
    except Exception as error:
        _logger.exception("round failed")
        return f"{type(error).__name__}: {error}"


def _served(pulses: list[Pulse], registry: CollectorRegistry, *loops: Callable[[], Awaitable[None]]) -> Service:
    tasks: list[asyncio.Task[None]] = []

    async def start() -> None:
        tasks.extend(asyncio.ensure_future(loop()) for loop in loops)

    async def stop() -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    return Service(
        routes={},
        metrics=StageMetrics(registry),
        missing=lambda: {name: why for pulse in pulses for name, why in pulse.missing().items()},
        detail=lambda: {name: what for pulse in pulses for name, what in pulse.detail().items()},
        start=start,
        stop=stop,
    )
