"""Popularity, the recommender everything must beat, and a person's own habits.

Counts of what happened before a cut, as shares. It knows no user beyond the habit it is asked for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from workloads.contract.tensors import PAD
from workloads.data.definitions import DAY_MS, RECENT_DAYS, window_start_ms

Floats = npt.NDArray[np.float32]


def all_time(person: npt.NDArray[np.int64], item: npt.NDArray[np.int64], items: int) -> Floats:
    """Share [items + 1] of each item in all distinct (person, item): how many people it drew."""
    distinct = np.unique(person * (items + 1) + item) % (items + 1)
    return _shares(np.bincount(distinct, minlength=items + 1))


def recent(
    item: npt.NDArray[np.int64],
    strength: npt.NDArray[np.float32],
    time_ms: npt.NDArray[np.int64],
    *,
    items: int,
    cut_ms: int,
    days: float = RECENT_DAYS,
) -> Floats:
    """Share [items + 1] of each item in what happened in the `days` before the cut, weighed by strength.

    The feature `strength_recent` of `data.definitions`, its window included. Raises ValueError where an event lies at
    or after the cut.
    """
    if len(time_ms) and int(time_ms.max()) >= cut_ms:
        raise ValueError("events reach beyond the cut: popularity would know the future")
    late = time_ms >= window_start_ms(cut_ms, int(days * DAY_MS))
    return _shares(np.bincount(item[late], weights=strength[late], minlength=items + 1))


def within_category(popularity: Floats, category: npt.NDArray[np.int32]) -> Floats:
    """Share [items + 1] of each item in its own category's popularity."""
    total = np.bincount(category, weights=popularity)
    share = popularity / np.maximum(total[category], 1e-12)
    share[PAD] = 0.0
    return np.asarray(share, dtype=np.float32)


def personal_frequency(
    items: npt.NDArray[np.int32], bought: Floats, count: Floats, popularity: Floats
) -> npt.NDArray[np.int32]:
    """A person's items [n] from most to least often bought, then touched; popularity decides ties."""
    return items[np.lexsort((-popularity[items], -count, -bought))]


def _shares(counts: npt.NDArray[Any]) -> Floats:
    counts[PAD] = 0
    shares: Floats = (counts / max(float(counts.sum()), 1e-12)).astype(np.float32)
    return shares
