"""Is the exported model the trained one? Both are asked the same real inputs, and both numbers and orders compared.

Numbers differ in the last bits, because operators are fused and summed in another order; limits say how
much. Orders are what a person sees: the top k must stay the top k. Limits are for float32, but for the student's,
which is compared across its quantisation to 8 bits: what that may cost is a budget, and the ladder's loss another.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np

from workloads.bundle.manifest import Parity
from workloads.bundle.tables import Array

VECTOR_LIMIT: Final = 1e-4
"""Largest difference of one component of a tower's vector, relative to the largest component seen."""
PROBABILITY_LIMIT: Final = 1e-4
"""Largest difference of a probability."""
STUDENT_LIMIT: Final = 0.05
"""The same for the student, INT8 against the trained one."""
STUDENT_AGREEMENT_FLOOR: Final = 0.9
"""Of its top k; 8 bits swap neighbours at the edge of it."""
AGREEMENT_FLOOR: Final = 0.99
"""Ties may fall either way; more than one place in a hundred is no tie."""
TOP_K: Final = 10


class ParityFault(Exception):  # noqa: N818 - a fault is what the domain calls it
    """An exported model that is not the trained one; the bundle is not written."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a comparison is held to."""

    error: float
    agreement: float = AGREEMENT_FLOOR


def compare(role: str, *, trained: Array, exported: Array, scores: tuple[Array, Array], limits: Limits) -> Parity:
    """Compare outputs [S, ...] and the orders that follow from them.

    `scores` are [R, C] by the trained and by the exported model: rows are requests, columns
    candidates; -inf marks a column that is no candidate. Raises ParityFault with the figure at fault.
    """
    if trained.shape != exported.shape:
        raise ParityFault(
            f"{role}: the exported model answers {list(exported.shape)}, the trained {list(trained.shape)}"
        )
    if not np.isfinite(trained).all():
        raise ParityFault(f"{role}: the trained model answers NaN or infinity to real inputs")
    if not np.isfinite(exported).all():
        raise ParityFault(f"{role}: the exported model answers NaN or infinity to real inputs")
    parity = Parity(
        max_abs_error=float(np.abs(trained.astype(np.float64) - exported).max(initial=0.0)),
        limit=limits.error,
        top_k_agreement=top_k_agreement(*scores, k=TOP_K),
        agreement_floor=limits.agreement,
        k=TOP_K,
        samples=len(trained),
    )
    if parity.max_abs_error > parity.limit:
        raise ParityFault(
            f"{role}: outputs differ by up to {parity.max_abs_error:.3g} on {parity.samples} real inputs; "
            f"the limit is {parity.limit:.3g}"
        )
    if parity.top_k_agreement < parity.agreement_floor:
        raise ParityFault(
            f"{role}: only {parity.top_k_agreement:.2%} of the top {TOP_K} stay the top {TOP_K}; "
            f"the floor is {parity.agreement_floor:.2%}"
        )
    return parity


def top_k_agreement(trained: Array, exported: Array, *, k: int) -> float:
    """Share of each row's top k by the first score that is in its top k by the second; 1 without rows. Both [R, C]."""
    kept = total = 0
    for first, second in zip(trained, exported, strict=True):
        places = min(k, int(np.isfinite(first).sum()))
        kept += len(np.intersect1d(np.argsort(-first)[:places], np.argsort(-second)[:places]))
        total += places
    return kept / total if total else 1.0


def vector_limit(trained: Array) -> Limits:
    """`VECTOR_LIMIT` for vectors of this size."""
    return Limits(error=VECTOR_LIMIT * max(1.0, float(np.abs(trained).max(initial=0.0))))
