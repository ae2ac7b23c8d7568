"""Items that came with a delta: the ranker reads all about them but which they are."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from workloads.contract.events import EventType
from workloads.contract.tensors import (
    ITEM_TABLES,
    NEIGHBOURS,
    PAD,
    RANKER_DENSE,
    RANKER_SPARSE,
    VECTOR_DIM,
    FeatureSchema,
)
from workloads.data.features import DAY_MS, ItemTables, UserState, rank_features, stand_ins
from workloads.data.fusion import Candidates
from workloads.data.profiles import Touch

NOW = 1_800_000_000_000
KNOWN, ALL = 6, 9
INDEX = {f"item-{at}": at for at in range(1, ALL + 1)}
SCHEMA = FeatureSchema(
    items=KNOWN,
    categories=["a", "b", "c"],
    price_edges=[5.0],
    dense_mean=[0.0] * len(RANKER_DENSE),
    dense_scale=[1.0] * len(RANKER_DENSE),
    reference_ms=NOW,
)


def tables(items: int) -> ItemTables:
    """Items 1 to 6 are the bundle's; 7 looks like 9 and then 2, 8 like nothing, 9 like 7 only."""
    axes = {"N+1": ALL + 1, "VECTOR_DIM": VECTOR_DIM, "NEIGHBOURS": NEIGHBOURS}
    arrays = {name: np.zeros([axes[a] for a in shape], dtype) for name, (dtype, shape) in ITEM_TABLES.items()}
    arrays["category"][1:] = [1, 1, 2, 2, 3, 3, 1, 2, 3]
    arrays["price"][1:] = np.arange(1, ALL + 1)
    arrays["price_band"][1:] = [1, 1, 1, 1, 1, 2, 2, 2, 2]
    arrays["popularity"][1 : KNOWN + 1] = 1 / KNOWN
    arrays["first_seen_ms"][1:] = NOW - 100 * DAY_MS
    arrays["first_seen_ms"][KNOWN + 1 :] = NOW - DAY_MS
    arrays["neighbours"][7, :2], arrays["neighbours"][9, 0] = [9, 2], 7
    return ItemTables.of({name: rows[: items + 1] for name, rows in arrays.items()})


def candidates(*items: int) -> Candidates:
    zeros = np.zeros(len(items), dtype=np.float32)
    return Candidates(np.array(items, dtype=np.int32), zeros, zeros, zeros.astype(np.int32))


def state(*items: int) -> UserState:
    """Touched in this order."""
    touches = [Touch(f"item-{item}", EventType.VIEW, 1, 0, NOW - (9 - at) * DAY_MS) for at, item in enumerate(items)]
    return UserState.of(touches, [], NOW, INDEX)


def sparse_of(touched: UserState, *items: int) -> dict[str, list[int]]:
    sparse, _ = rank_features(touched, candidates(*items), tables(ALL), SCHEMA)
    return dict(zip(RANKER_SPARSE, sparse.T.tolist(), strict=True))


def test_a_new_item_is_nobody_to_the_ranker_but_has_its_category_price_and_age():
    assert sparse_of(state(1), 3, 7, 9)["item"] == [3, PAD, PAD]
    assert sparse_of(state(1), 3, 7, 9)["category"] == [2, 1, 3]
    assert sparse_of(state(1), 3, 7, 9)["price_band"] == [1, 2, 2]
    _, dense = rank_features(state(1), candidates(3, 7), tables(ALL), SCHEMA)
    named = dict(zip(RANKER_DENSE, dense.T.tolist(), strict=True))
    np.testing.assert_allclose(named["item_age_days"], np.log1p([100, 1]), rtol=1e-5)
    np.testing.assert_allclose(named["price"], np.log1p([3, 7]), rtol=1e-5)
    assert named["popularity"][1] == 0


def test_a_new_item_touched_last_is_read_as_the_bundles_item_that_it_looks_like():
    assert sparse_of(state(1, 7), 3)["last_item"] == [2]
    assert sparse_of(state(1, 7), 3)["last_category"] == [1]
    assert sparse_of(state(1, 8), 3)["last_item"] == [PAD]
    assert sparse_of(state(1, 8), 3)["last_category"] == [2]


def test_deltas_change_nothing_in_what_the_ranker_reads_of_the_bundles_own_items():
    for before, after in zip(
        rank_features(state(1, 4), candidates(3, 5), tables(KNOWN), SCHEMA),
        rank_features(state(1, 4), candidates(3, 5), tables(ALL), SCHEMA),
        strict=True,
    ):
        np.testing.assert_array_equal(before, after)


@given(st.lists(st.integers(1, ALL), max_size=12), st.lists(st.integers(1, ALL), min_size=1, max_size=12, unique=True))
def test_no_index_beyond_the_models_tables_ever_reaches_them(touched: list[int], proposed: list[int]):
    seen = sparse_of(state(*dict.fromkeys(touched)), *proposed)
    assert max(seen["item"] + seen["last_item"]) <= KNOWN
    history = stand_ins(np.array(touched, dtype=np.int32), tables(ALL).neighbours, KNOWN)
    assert len(history) == len(touched)
    assert max(history.tolist(), default=0) <= KNOWN


def test_stand_ins_leave_the_bundles_items_and_the_callers_array_alone():
    history = np.array([3, 7, 8, 9, 1], dtype=np.int32)
    assert stand_ins(history, tables(ALL).neighbours, KNOWN).tolist() == [3, 2, PAD, PAD, 1]
    assert history.tolist() == [3, 7, 8, 9, 1]
