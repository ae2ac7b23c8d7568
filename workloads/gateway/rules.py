"""From a ranked list to an answer: what may not be shown goes, variety comes in, and k is filled.

Pure, over item indices of one bundle. It knows neither the request nor the user: only which items may
be shown and which categories they are of.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from workloads.contract.tensors import PAD

Ints = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]
Places = npt.NDArray[np.intp]

CATEGORY_SHARE: Final = 0.6
"""One category takes at most this share of a varied answer while others have something to show."""


def showable(in_stock: Flags, exclude: Ints) -> Flags:
    """For each item [N+1] whether an answer may hold it: in stock, not left out, not PAD."""
    # A copy of a flag per item is cheaper than a set operation on two short lists up to a million items.
    flags = in_stock.copy()
    flags[exclude] = False
    flags[PAD] = False
    return flags


def choose(ranked: Ints, k: int, shown: Flags, category: Ints | None = None) -> Places:
    """Places in `ranked` [C] (best first, no item twice) of the at most k items to answer, rising.

    `shown` is of `showable`. With `category` [N+1], no category but the unknown one (0) gets more than
    `CATEGORY_SHARE` of k, unless k could not be filled otherwise: then the best of those held back come in again.
    """
    places = np.flatnonzero(shown[ranked])
    if category is None or len(places) <= k:
        return places[:k]
    return _varied(places, category[ranked[places]], k)


def fill(chosen: Ints, k: int, popular: Ints, shown: Flags) -> Ints:
    """Items of `popular` (best first) that may be shown and are not in `chosen`, to make `chosen` up to k."""
    there = set(chosen.tolist())
    added: list[int] = []
    for item in popular[shown[popular]].tolist():
        if len(there) >= k:
            break
        if item not in there:
            there.add(item)
            added.append(item)
    return np.array(added, dtype=np.int32)


def _varied(places: Places, category: Ints, k: int) -> Places:
    """The first k of `places` such that no known category exceeds its share; if that is short, the rest fills."""
    most = max(1, math.ceil(CATEGORY_SHARE * k))
    kept: list[int] = []
    held: list[int] = []
    taken: dict[int, int] = {}
    for place, kind in zip(places.tolist(), category.tolist(), strict=True):
        times = taken.get(kind, 0)
        if kind != PAD and times >= most:
            held.append(place)
            continue
        taken[kind] = times + 1
        kept.append(place)
        if len(kept) == k:
            break
    if len(kept) < k:
        kept = sorted(kept + held[: k - len(kept)])
    return np.array(kept, dtype=np.intp)
