"""Keeping a bundle's models loaded and warm in a Triton that may vanish and come back at any moment.

One `step` looks and mends; calling it again and again is the whole of the agent's work. It knows the
door, and neither processes nor files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from workloads.agent.door import TritonDoor, TritonError
from workloads.contract.slo import CANDIDATES_RANKED
from workloads.contract.tensors import Signature
from workloads.telemetry import log

WARM_BATCHES: Final = (1, 32, CANDIDATES_RANKED, 256)
"""Batch sizes asked before a model counts as ready: the first request of a size pays for its memory."""
RETIRE_AFTER_S: Final = 30.0
"""How long other bundles' models stay loaded beside ours: a gateway that still has the old bundle is
pointed to the new one in that time."""

_logger = log.get(component="keeper")


class Keeper:
    """Brings `models` (Triton name -> signature) into Triton and keeps them there.

    `missing` is empty when all of them are loaded and warm. Models of other bundles are unloaded last,
    `retire_after_s` after that. `clock` is monotonic, in seconds.
    """

    def __init__(
        self,
        door: TritonDoor,
        models: Mapping[str, Signature],
        *,
        retire_after_s: float = RETIRE_AFTER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._door = door
        self._models = dict(models)
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
            for model, signature in self._models.items():
                try:
                    await self._bring_in(model, signature)
                except TritonError as error:
                    self._current.discard(model)
                    missing[model] = str(error)
        self._say(missing)
        self.missing = missing
        if missing:
            self._complete_since = None
        else:
            await self._retire()

    async def _bring_in(self, model: str, signature: Signature) -> None:
        """Load and warm a model, unless it is as we left it.

        The first time it is loaded even if it is there: its files may be newer than what runs. What runs
        serves on until then.
        """
        if model in self._current and await self._door.is_ready(model):
            return
        self._current.discard(model)
        begun = self._clock()
        await self._door.load(model)
        for batch in WARM_BATCHES:
            if batch <= signature.max_batch:
                await self._warm(model, signature, batch)
        self._current.add(model)
        self.loads += 1
        _logger.info("model is loaded and warm", model=model, seconds=round(self._clock() - begun, 3))

    async def _warm(self, model: str, signature: Signature, batch: int) -> None:
        inputs = {spec.name: np.zeros((batch, *(spec.shape or (1,))), spec.dtype) for spec in signature.inputs}
        outputs = await self._door.infer(model, inputs)
        for spec in signature.outputs:
            found = outputs.get(spec.name)
            if found is None or found.shape != (batch, *spec.shape) or not np.isfinite(found).all():
                what = "nothing" if found is None else f"{found.dtype}{list(found.shape)}"
                raise TritonError(
                    f"asked with {batch} rows it answered {what} as {spec.name!r}, not finite {spec.dtype} "
                    f"{[batch, *spec.shape]}"
                )

    async def _retire(self) -> None:
        now = self._clock()
        if self._complete_since is None:
            self._complete_since = now
        if now - self._complete_since < self._retire_after_s:
            return
        try:
            for model in await self._door.loaded():
                if model not in self._models:
                    await self._door.unload(model)
                    _logger.info("model of another bundle is unloaded", model=model)
        except TritonError as error:
            _logger.warning("could not unload", fault=str(error))

    def _say(self, missing: Mapping[str, str]) -> None:
        """Log what changed, and not the same thing twice a second."""
        for name, reason in missing.items():
            if self._said.get(name) != reason:
                _logger.warning("not ready", missing=name, reason=reason)
        self._said = dict(missing)
