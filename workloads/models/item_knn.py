"""Item-to-item neighbours from co-occurrence: the traditional recommender, and one candidate source of ours.

Two items go together when the same person (or anonymous basket) touched them near each other, later
meetings counting more, long baskets and busy items counting less (inverse user frequency: Breese,
Heckerman, Kadie, UAI 1998; time decay: Ding, Li, CIKM 2005; order-aware windows: Ludewig, Jannach,
UMUAI 2018). numpy only, no training. It knows nothing of scores for a user; those are
`workloads.data.fusion.item_to_item_scores`, the same offline and online.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from workloads.contract.tensors import NEIGHBOURS, PAD

DAY_MS = 86_400_000
FORGOTTEN = 12
"""Half-lives after which a touch no longer counts: it would weigh less than 1/4000."""
MERGE_AT = 20_000_000
"""Pairs held before equal ones are added up; bounds memory to about 0.5 GB, not results."""


class ItemKnnConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What counts as going together."""

    half_life_days: float = 14.0
    """A meeting this long before the cut counts half."""
    window: int = 30
    """Touches between two items of a sequence, at most."""
    across_visits: float = 0.3
    """Say of a pair from two visits against one from the same visit, before it fades with their distance."""
    across_half_life_days: float = 30.0
    backwards: float = 0.5
    """Say of later -> earlier against earlier -> later, across visits."""
    basket_damping: float = 0.5
    """Pairs of a basket of n items count log(1 + n) ** -basket_damping."""
    from_damping: float = 0.7
    to_damping: float = 0.3
    """Exponents of the two items' own counts in the normalisation; 0.5 and 0.5 is the cosine."""
    shrinkage: float = 1.0
    """Added to the counts, so that one old meeting of two rare items is no certainty."""
    neighbours: int = NEIGHBOURS


class Visits(msgspec.Struct, frozen=True):
    """Touches in the order of people: one row per (visit, item), sorted by (person, time)."""

    person: npt.NDArray[np.int64]
    """A user, or an anonymous basket standing for one."""
    visit: npt.NDArray[np.int64]
    item: npt.NDArray[np.int64]
    strength: npt.NDArray[np.float32]
    time_ms: npt.NDArray[np.int64]

    @classmethod
    def of(
        cls,
        person: npt.NDArray[np.int64],
        visit: npt.NDArray[np.int64],
        item: npt.NDArray[np.int64],
        strength: npt.NDArray[np.float32],
        time_ms: npt.NDArray[np.int64],
    ) -> Visits:
        """From touches in order of time: an item touched twice in a visit counts once, at its strongest."""
        order = np.lexsort((-strength, item, visit))
        first = np.r_[True, (visit[order][1:] != visit[order][:-1]) | (item[order][1:] != item[order][:-1])]
        kept = np.sort(order[first])
        kept = kept[np.lexsort((kept, time_ms[kept], person[kept]))]
        return cls(person[kept], visit[kept], item[kept], strength[kept], time_ms[kept])


def fit(
    visits: Visits, *, items: int, cut_ms: int, config: ItemKnnConfig
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Neighbours int32 [items + 1, K] and their scores float32, best first; PAD and 0 where there are fewer.

    Nothing at or after `cut_ms` may be in `visits`; raises ValueError where something is.
    """
    if len(visits.time_ms) and int(visits.time_ms.max()) >= cut_ms:
        raise ValueError("visits reach beyond the cut: neighbours would know the future")
    kept = np.flatnonzero(visits.time_ms >= cut_ms - FORGOTTEN * config.half_life_days * DAY_MS)
    seen = Visits(*(getattr(visits, name)[kept] for name in visits.__struct_fields__))
    recency = np.exp2((seen.time_ms - cut_ms) / DAY_MS / config.half_life_days).astype(np.float32)
    count = np.bincount(seen.item, weights=recency * seen.strength, minlength=items + 1) + config.shrinkage
    keys, together = _pairs(seen, recency, items, config)
    source, target = np.divmod(keys, items + 1)
    scores = together / (count**config.from_damping)[source] / (count**config.to_damping)[target]
    return _best(source, target, scores.astype(np.float32), items, config.neighbours)


def _pairs(
    visits: Visits, recency: npt.NDArray[np.float32], items: int, config: ItemKnnConfig
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Distinct ordered pairs as source * (items + 1) + target, ascending, and their weight together."""
    length = np.maximum(np.bincount(visits.visit, minlength=1), 1)
    damping = (np.log1p(length) ** -config.basket_damping).astype(np.float32)[visits.visit]
    late_weight = recency * visits.strength
    days = ((visits.time_ms - visits.time_ms.min(initial=0)) / DAY_MS).astype(np.float32)
    keys: list[npt.NDArray[np.int64]] = []
    weights: list[npt.NDArray[np.float32]] = []
    held = 0
    for lag in range(1, config.window + 1):
        near = (visits.person[:-lag] == visits.person[lag:]) & (visits.item[:-lag] != visits.item[lag:])
        early = np.flatnonzero(near)
        late = early + lag
        weight = visits.strength[early] * late_weight[late]
        source, target = visits.item[early], visits.item[late]
        across = np.flatnonzero(visits.visit[early] != visits.visit[late])
        fading = np.exp2((days[early[across]] - days[late[across]]) / np.float32(config.across_half_life_days))
        factor = damping[early]
        factor[across] = np.float32(config.across_visits) * fading
        weight *= factor
        keys += [source * (items + 1) + target, target * (items + 1) + source]
        weights += [weight, weight.copy()]
        weights[-1][across] *= np.float32(config.backwards)
        held += 2 * len(early)
        if held > MERGE_AT:
            merged = _merge(keys, weights)
            keys, weights, held = [merged[0]], [merged[1]], len(merged[0])
    return _merge(keys, weights)


def _merge(
    keys: list[npt.NDArray[np.int64]], weights: list[npt.NDArray[np.float32]]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Equal keys added up, ascending."""
    if not keys:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
    joined, together = np.concatenate(keys), np.concatenate(weights)
    order = np.argsort(joined)
    joined, together = joined[order], together[order]
    first = np.flatnonzero(np.r_[True, joined[1:] != joined[:-1]])[: len(joined)]
    return joined[first], np.add.reduceat(together, first) if len(first) else together


def _best(
    source: npt.NDArray[np.int64],
    target: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float32],
    items: int,
    kept: int,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """The `kept` best targets of each source; ties go to the lower index."""
    # One sort key instead of two: positive floats order as their bits do, and a stable sort of pairs
    # that come ascending leaves ties to the lower target.
    falling = np.int64(0x7FFFFFFF) - scores.view(np.int32).astype(np.int64)
    order = np.argsort((source << 32) | falling, kind="stable")
    source, target, scores = source[order], target[order], scores[order]
    place = np.arange(len(source)) - np.searchsorted(source, source, side="left")
    top = place < kept
    neighbours = np.full((items + 1, kept), PAD, dtype=np.int32)
    neighbour_scores = np.zeros((items + 1, kept), dtype=np.float32)
    neighbours[source[top], place[top]] = target[top]
    neighbour_scores[source[top], place[top]] = scores[top]
    return neighbours, neighbour_scores
