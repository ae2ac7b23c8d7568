"""Keeping models loaded and warm in a Triton that may vanish and come back at any moment.

One `step` looks and mends; calling it again and again is its whole work. Which models is decided elsewhere
(`workloads.agent.deployment`). It knows the door, and neither processes nor files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final

from workloads.agent.door import TritonDoor, TritonError
from workloads.agent.probing import ProbeFault, Recorded, warm
from workloads.telemetry import log

RETIRE_AFTER_S: Final = 30.0
"""How long models that nobody wants stay loaded: gateways that are not asked may still be on them."""

_logger = log.get(component="keeper")


class Keeper:
    """Brings `models` (Triton name -> its recorded requests) into Triton and keeps them there.

    `missing` is empty when all of them are loaded and warm, and answer what was recorded. Other models are
    unloaded `retire_after_s` after that, but for those in `spared`. `clock` is monotonic, in seconds.
    """

    def __init__(
        self,
        door: TritonDoor,
        models: Mapping[str, Recorded],
        *,
        retire_after_s: float = RETIRE_AFTER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._door = door
        self.models = dict(models)
        self.spared: set[str] = set()
        """Being brought in by somebody else: left alone."""
        self._retire_after_s = retire_after_s
        self._clock = clock
        self._said: dict[str, str] = {}
        self._current: set[str] = set()
        self._complete_since: float | None = None
        self.missing: dict[str, str] = {"tritonserver": "not asked yet"}
        self.loads = 0
        """Times that a model was brought in; more than one each means that Triton had lost them."""

    async def step(self) -> None:
        """Look once and mend what is wrong. Never raises TritonError: what it could not mend is in `missing`."""
        missing: dict[str, str] = {}
        if not await self._door.is_live():
            missing["tritonserver"] = "does not answer"
            self._current.clear()
        else:
            for model, recorded in list(self.models.items()):
                try:
                    await self._bring_in(model, recorded)
                except (TritonError, ProbeFault) as error:
                    self._current.discard(model)
                    if model in self.models:  # nobody dropped it meanwhile
                        missing[model] = str(error)
        self._say(missing)
        self.missing = missing
        if missing:
            self._complete_since = None
        else:
            await self._retire()

    def is_warm(self, model: str) -> bool:
        """Whether a model was there, warm and right when it was looked at last."""
        return model in self._current and model not in self.missing

    def adopt(self, model: str, recorded: Recorded) -> None:
        """Keep a model that was just loaded and probed."""
        self.models[model] = recorded
        self._current.add(model)
        self.spared.discard(model)
        self.loads += 1

    async def drop(self, model: str) -> None:
        """Keep a model no longer, and unload it. Raises TritonError."""
        self.models.pop(model, None)
        self._current.discard(model)
        self.spared.discard(model)
        if model in await self._door.loaded():
            await self._door.unload(model)
            _logger.info("model is unloaded", model=model)

    async def _bring_in(self, model: str, recorded: Recorded) -> None:
        """Load and warm a model, unless it is as we left it.

        The first time it is loaded even if it is there: its files may be newer than what runs. What runs
        serves on until then.
        """
        if model in self._current and await self._door.is_ready(model):
            return
        self._current.discard(model)
        begun = self._clock()
        await self._door.load(model)
        await warm(self._door, model, recorded)
        self._current.add(model)
        self.loads += 1
        _logger.info("model is loaded and warm", model=model, seconds=round(self._clock() - begun, 3))

    async def _retire(self) -> None:
        now = self._clock()
        if self._complete_since is None:
            self._complete_since = now
        if now - self._complete_since < self._retire_after_s:
            return
        try:
            for model in await self._door.loaded():
                if model not in self.models and model not in self.spared:
                    await self._door.unload(model)
                    _logger.info("model that nobody wants is unloaded", model=model)
        except TritonError as error:
            _logger.warning("could not unload", fault=str(error))

    def _say(self, missing: Mapping[str, str]) -> None:
        """Log what changed, and not the same thing twice a second."""
        for name, reason in missing.items():
            if self._said.get(name) != reason:
                _logger.warning("not ready", missing=name, reason=reason)
        self._said = dict(missing)
