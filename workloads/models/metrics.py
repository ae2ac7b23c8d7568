"""How good lists and probabilities are: recall, NDCG and hit rate at k, coverage; AUC, log-loss, calibration.

Lists are judged against sets of relevant items with binary relevance; definitions as in Jarvelin,
Kekalainen (TOIS 2002) for NDCG and Fawcett (2006) for AUC. Plain functions of arrays: they know
neither models nor data sets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.floating[Any]]


def recall_at(ranked: Ints, relevant: Ints, k: int) -> float:
    """Share of the relevant items (distinct, at least one) that are among the first `k`."""
    return float(np.isin(relevant, ranked[:k]).mean())


def hit_at(ranked: Ints, relevant: Ints, k: int) -> float:
    """1 when any relevant item is among the first `k`, else 0."""
    return float(np.isin(relevant, ranked[:k]).any())


def ndcg_at(ranked: Ints, relevant: Ints, k: int) -> float:
    """Discounted gain of the first `k` over that of the best possible list; gain 1, discount log2(place + 1)."""
    discount = 1.0 / np.log2(np.arange(2, k + 2))
    gained = float((np.isin(ranked[:k], relevant) * discount[: len(ranked[:k])]).sum())
    return gained / float(discount[: len(relevant)].sum())


def list_metrics(
    lists: Sequence[Ints], relevant: Sequence[Ints], *, ks: Iterable[int], items: int, coverage_k: int
) -> dict[str, float]:
    """Means over requests of recall@k, ndcg@k, hr@k for each k, and coverage@k over all of them.

    `items` is the size of the catalogue: coverage is the share of it that stands in any list. Raises
    ValueError where there is no request or a request has nothing relevant.
    """
    if not lists or len(lists) != len(relevant):
        raise ValueError(f"{len(lists)} lists for {len(relevant)} requests: nothing can be measured")
    if any(len(wanted) == 0 for wanted in relevant):
        raise ValueError("a request without relevant items measures nothing; leave it out")
    pairs = list(zip(lists, relevant, strict=True))
    metrics: dict[str, float] = {}
    for k in ks:
        metrics[f"recall@{k}"] = float(np.mean([recall_at(ranked, wanted, k) for ranked, wanted in pairs]))
        metrics[f"ndcg@{k}"] = float(np.mean([ndcg_at(ranked, wanted, k) for ranked, wanted in pairs]))
        metrics[f"hr@{k}"] = float(np.mean([hit_at(ranked, wanted, k) for ranked, wanted in pairs]))
    shown = np.unique(np.concatenate([np.asarray(ranked[:coverage_k]) for ranked in lists]))
    metrics[f"coverage@{coverage_k}"] = len(shown) / items
    return metrics


def auc(labels: Ints, scores: Floats) -> float:
    """Probability that a positive scores above a negative, ties counting half; NaN where one kind is missing."""
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2.0
    total = float(ranks[inverse][labels > 0].sum())
    return (total - positives * (positives + 1) / 2.0) / (positives * negatives)


def log_loss(labels: Ints, probabilities: Floats) -> float:
    """Mean negative log-likelihood in nats."""
    p = np.clip(probabilities.astype(np.float64), 1e-7, 1.0 - 1e-7)
    return float(-np.mean(np.where(labels > 0, np.log(p), np.log1p(-p))))


def calibration(labels: Ints, probabilities: Floats) -> float:
    """Sum of predicted probabilities over sum of labels; 1 is calibrated, NaN without positives."""
    positives = float(labels.sum())
    return float(probabilities.sum(dtype=np.float64)) / positives if positives else float("nan")


def reliability(labels: Ints, probabilities: Floats, bins: int = 10) -> list[tuple[float, float, int]]:
    """(mean predicted, mean observed, rows) in `bins` bins of equal size by predicted probability."""
    order = np.argsort(probabilities, kind="stable")
    return [
        (float(probabilities[part].mean()), float(labels[part].mean()), len(part))
        for part in np.array_split(order, bins)
        if len(part)
    ]
