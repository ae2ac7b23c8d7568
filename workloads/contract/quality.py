"""How good a set of models is, as it travels from training into a bundle and onto the report.

One row per recommender, all measured on the same test requests, so that popularity and kNN stand
beside ours in the same table.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Protocol = Literal["novel", "repeats", "search"]
"""`novel`: items the user has not bought before; `repeats`: all items; `search`: the item behind a query."""


class QualityRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One recommender under one protocol. Metrics: recall@k, ndcg@k, hr@k, coverage@k (name -> value)."""

    name: str
    """`popularity`, `popularity_30d`, `item_knn`, `personal_frequency`, `two_tower`, `ours`, `oracle`..."""
    protocol: Protocol
    rung: int | None = None
    """The rung of the quality ladder that serves this ordering, if one does."""
    metrics: dict[str, float]
    requests: int
    """Test requests behind the row."""


class RankerQuality(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Pointwise quality of the CTR ranker on the test period."""

    auc: float
    log_loss: float
    calibration: float
    """Sum of predicted probabilities over sum of labels; 1 is calibrated."""
    base_rate: float
    rows: int
    reliability: list[tuple[float, float, int]]
    """(mean predicted, mean observed, rows) per bin of predicted probability."""


class RungQuality(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rung of the ladder against rung 1, on the same test requests and candidates."""

    rung: Annotated[int, msgspec.Meta(ge=1, le=4)]
    protocol: Protocol
    ndcg_at_10: float
    auc: float | None = None
    """Pointwise, over the rows that rung 1 scored; None for an order without scores of its own."""
    loss: float
    """1 - NDCG@10 / rung 1's NDCG@10; negative where the rung is better."""
    loss_error: float = 0.0
    """Standard error of `loss`, from the differences request by request."""
    requests: int


class QualityBudget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`row.metric >= at_least x other.metric`, one protocol."""

    protocol: Protocol
    row: str
    other: str
    metric: str
    at_least: float


class QualityReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything measured about a training run; `metrics.json` of a work directory, part of a manifest."""

    schema_version: int = 1
    dataset: str
    rows: list[QualityRow]
    ranker: RankerQuality
    statements: list[str]
    """Plain words about the table, made from it: where ours is below kNN, one of these says so."""
    rungs: list[RungQuality] = []
    """The measured ladder, a row per rung and protocol. A search is not ranked: it has no rung 1 to lose against."""

    def loss(self, rung: int, protocol: Protocol = "novel") -> float | None:
        """What a rung loses against rung 1, or None when it was not measured."""
        return next((row.loss for row in self.rungs if (row.rung, row.protocol) == (rung, protocol)), None)

    def metric(self, row: str, protocol: Protocol, metric: str) -> float | None:
        """One cell of the table, or None when it was not measured."""
        for candidate in self.rows:
            if candidate.name == row and candidate.protocol == protocol:
                return candidate.metrics.get(metric)
        return None


BUDGETS: tuple[QualityBudget, ...] = (
    QualityBudget(protocol="novel", row="ours", other="popularity", metric="recall@20", at_least=1.0),
    QualityBudget(protocol="novel", row="ours", other="popularity_30d", metric="recall@20", at_least=1.0),
)
"""What every data set must show for a rehearsal to pass; a data set's own goals come on top."""

DATASET_BUDGETS: dict[str, tuple[QualityBudget, ...]] = {
    "online-retail": (
        QualityBudget(protocol="novel", row="ours", other="popularity", metric="recall@20", at_least=2.0),
        QualityBudget(protocol="novel", row="ours", other="popularity_30d", metric="recall@20", at_least=1.15),
        QualityBudget(protocol="repeats", row="ours", other="personal_frequency", metric="recall@20", at_least=1.0),
    )
}
