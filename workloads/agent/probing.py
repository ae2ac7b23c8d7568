"""Is this model, on this site's own hardware, the one that was exported? Recorded requests, asked of the site's Triton.

The bundle says what its ranker was asked and answered when it was made (`workloads.bundle.probes`). The same rows go
through the site's Triton in every batch size that serving uses, which warms the model up, and the answers are held
against the recorded ones: numbers within a limit by site class and type, no NaN, and in time. Knows one model.
"""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import numpy as np

from workloads.agent.door import Array, TritonDoor
from workloads.bundle.probes import Probes
from workloads.contract.sites import SiteClass
from workloads.contract.slo import CANDIDATES_RANKED, STAGE_P99_MS, Stage
from workloads.contract.tensors import RANKER

WARM_BATCHES: Final = (1, 32, CANDIDATES_RANKED, 256)
"""Batch sizes asked before a model counts as ready: the first request of a size pays for its memory."""

PARITY_LIMIT: Final[Mapping[tuple[SiteClass, str], float]] = MappingProxyType(
    {(SiteClass.CPU, "float32"): 1e-4, (SiteClass.GPU, "float32"): 2e-3}
)
"""Largest difference of a probability. On a CPU the same ONNX Runtime sums in another order at most; a GPU multiplies
float32 in TF32, with 10 bits of mantissa."""

LATENCY_BUDGET_MS: Final = STAGE_P99_MS[Stage.RANK]
"""What the median call with CANDIDATES_RANKED rows may take: the promise of the rank stage, of which a good model takes
a tenth. A model whose median is at the promise breaks it with every second request."""
TIMED_CALLS: Final = 9
ROUNDS: Final = 3
"""Of timed calls, the best one counts: a model is not slow because the machine was busy for a second."""
BETWEEN_ROUNDS_S: Final = 1.0


class ProbeFault(Exception):  # noqa: N818 - as BundleFault
    """A model that must not serve here; `reason` is one of `nonsense`, `parity`, `slow`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a probe found."""

    max_abs_error: float
    rows: int
    median_ms: float | None = None
    """Of a call with CANDIDATES_RANKED rows; None where it was not timed."""


@dataclasses.dataclass(frozen=True)
class Recorded:
    """Recorded requests of a bundle's ranker, and what its answers here are held to."""

    probes: Probes
    limit: float
    budget_ms: float = LATENCY_BUDGET_MS

    @classmethod
    def of(cls, probes: Probes, site_class: SiteClass, *, planted_delay_ms: float = 0.0) -> Recorded:
        """With the limits of a class of site. A delay that a rehearsal planted is not the model's."""
        limit = PARITY_LIMIT[site_class, RANKER.outputs[0].dtype]
        return cls(probes, limit, LATENCY_BUDGET_MS + planted_delay_ms)


async def warm(door: TritonDoor, model: str, recorded: Recorded) -> Measured:
    """Ask every recorded row, over every batch size. Raises TritonError, and ProbeFault: `nonsense` or `parity`."""
    worst, start, asked = 0.0, 0, 0
    sizes = [size for size in WARM_BATCHES if size <= RANKER.max_batch]
    while sizes or asked < len(recorded.probes):
        rows = sizes.pop(0) if sizes else min(WARM_BATCHES[-1], len(recorded.probes) - asked)
        inputs, expected = recorded.probes.batch(rows, start)
        answered = _checked(await door.infer(model, inputs), rows)
        worst = max(worst, float(np.abs(answered.astype(np.float64) - expected).max()))
        start, asked = start + rows, asked + rows
    if worst > recorded.limit:
        raise ProbeFault(
            "parity",
            f"{model} answers up to {worst:.3g} from what was recorded when it was made; the limit here is "
            f"{recorded.limit:.3g}",
        )
    return Measured(worst, asked)


async def probe(
    door: TritonDoor,
    model: str,
    recorded: Recorded,
    *,
    clock: Callable[[], float] = time.perf_counter,
    pause_s: float | None = None,
) -> Measured:
    """`warm`, and then in time. Raises as `warm`, and ProbeFault `slow`."""
    measured = await warm(door, model, recorded)
    inputs, _ = recorded.probes.batch(CANDIDATES_RANKED)
    best = float("inf")
    for round_ in range(ROUNDS):
        if round_:
            await asyncio.sleep(BETWEEN_ROUNDS_S if pause_s is None else pause_s)
        times = []
        for _ in range(TIMED_CALLS):
            begun = clock()
            await door.infer(model, inputs)
            times.append((clock() - begun) * 1000)
        best = min(best, statistics.median(times))
        if best <= recorded.budget_ms:
            return dataclasses.replace(measured, median_ms=best)
    raise ProbeFault(
        "slow",
        f"{model} takes {best:.1f} ms for {CANDIDATES_RANKED} rows here (median of {TIMED_CALLS}, best of {ROUNDS} "
        f"rounds); the budget is {recorded.budget_ms:g} ms",
    )


def _checked(outputs: Mapping[str, Array], rows: int) -> Array:
    """The probabilities of an answer. Raises ProbeFault."""
    spec = RANKER.outputs[0]
    found = outputs.get(spec.name)
    wanted = (rows, *spec.shape)
    if found is None or found.shape != wanted or not np.isfinite(found).all():
        what = "nothing" if found is None else f"{found.dtype.name}{list(found.shape)}"
        if found is not None and found.shape == wanted:
            what += " with NaN or infinity in it"
        raise ProbeFault(
            "nonsense",
            f"asked with {rows} rows it answered {what} as {spec.name!r}, not finite {spec.dtype} {[*wanted]}",
        )
    return found
