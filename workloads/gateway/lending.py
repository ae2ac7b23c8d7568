"""Ranking for the other site: what its gateway asks is checked, scored by this site's own Triton, and never passed on.

The other site sends features of a request that it cannot rank in time itself. It gets scores of the very edition that
it names, or a refusal at once, so that it can still answer from its student. It has places of its own, and none while
this site's own requests are crowded. Knows no candidate and no HTTP.
"""

from __future__ import annotations

import random
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from workloads.bundle.store import Bundle
from workloads.contract.http import SOURCES, RankAnswer, RankQuery
from workloads.contract.slo import STAGE_P99_MS, Priority, Stage
from workloads.contract.tensors import RANKER
from workloads.gateway import problems
from workloads.gateway.admission import Admission, AdmissionPolicy, Admitted, Shed
from workloads.gateway.doors import DoorFault
from workloads.gateway.editions import Serving
from workloads.gateway.timing import Timer
from workloads.telemetry.metrics import RouteMetrics

WAY_MS: Final = 1.0
"""Kept back of the other site's time for the answer's encoding and its way out of here."""
POLICY: Final = AdmissionPolicy(least=2, most=64, start=16, target_ms=STAGE_P99_MS[Stage.RANK])
"""The limit shrinks as soon as ranking here takes longer than it may, whoever's requests it is that make it so."""
BORROWER: Final = "peer"

_SPARSE, _DENSE = RANKER.inputs


class Lending:
    """This site's ranker as far as others may have it."""

    def __init__(self, site: str, metrics: RouteMetrics, admission: Admission | None = None) -> None:
        self._site = site
        self._metrics = metrics
        self.admission = admission or Admission(POLICY, random=random.random)
        self._decode = msgspec.msgpack.Decoder(RankQuery).decode
        self._encode = msgspec.msgpack.Encoder().encode

    def enter(self, now_s: float, *, crowded: bool) -> Admitted:
        """A place, to be given back to `admission`. Raises Refused; `crowded`: own requests want them all."""
        if crowded:
            self._metrics.shed("crowded", BORROWER)
            raise problems.no_ranking("this site needs its ranker for itself")
        place = self.admission.admit(Priority.HIGH, BORROWER, now_s)
        if isinstance(place, Shed):
            self._metrics.shed(place.reason.value, BORROWER)
            raise problems.no_ranking("as many are ranked for others as may be", place.retry_after_s)
        return place

    async def answer(self, body: bytes, serving: Serving, timer: Timer) -> bytes:
        """A RankAnswer for a RankQuery. Raises Refused: no such query, another edition, or no scores in time."""
        try:
            query = self._decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise problems.undecodable_rank(error) from None
        edition = serving.edition
        if (query.bundle, query.delta) != (edition.bundle, edition.delta):
            self._metrics.mismatch("asked")
            raise problems.other_edition(f"{query.bundle[:12]!r}+{query.delta}", str(edition))
        sparse, dense = _tensors(query, serving.pipeline.bundle)
        begun_ms = timer.spent_ms()
        try:
            scores = await serving.pipeline.ranking.rank_here(sparse, dense, timer.left_ms() - WAY_MS)
        except DoorFault as fault:
            raise problems.no_ranking(fault.reason.value) from None
        return self._encode(
            RankAnswer(
                bundle=edition.bundle,
                delta=edition.delta,
                site=self._site,
                probability=scores.astype("<f4", copy=False).tobytes(),
                rank_ms=round(timer.spent_ms() - begun_ms, 3),
            )
        )


def _tensors(query: RankQuery, bundle: Bundle) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The ranker's inputs. Raises Refused for what the model has no row for.

    Triton would refuse it too, and look as if it were the one at fault.
    """
    rows = query.rows
    for name, given, width in (
        ("sparse", query.sparse, 8 * _SPARSE.shape[0]),
        ("dense", query.dense, 4 * _DENSE.shape[0]),
    ):
        if len(given) != rows * width:
            raise problems.bad_tensor(name, f"{rows} rows are {rows * width} bytes")
    sparse = np.frombuffer(query.sparse, dtype="<i8").reshape(rows, -1)
    dense = np.frombuffer(query.dense, dtype="<f4").reshape(rows, -1)
    schema = bundle.features
    categories, bands = len(schema.categories), len(schema.price_edges) + 1
    most = np.array([schema.items, categories, bands, schema.items, categories, len(SOURCES) - 1])
    if not ((sparse >= 0) & (sparse <= most)).all():
        raise problems.bad_tensor("sparse", "indices of the edition, 0 for unknown")
    if not np.isfinite(dense).all():
        raise problems.bad_tensor("dense", "finite numbers")
    return sparse, dense
