"""Load users ask what people would, the same way under the same seed."""

import random
from collections import Counter

import msgspec
import pytest

from loadtests.draws import Shopper, check
from workloads.contract.events import is_uuid7
from workloads.contract.http import CatalogueSample, EventsRequest, RecommendRequest, SearchRequest

HOME = CatalogueSample(
    items=[f"i{n}" for n in range(100)],
    item_weights=[1.0 / (n + 1) for n in range(100)],
    queries=["red mug", "lantern"],
    users=[f"u{n}" for n in range(40)],
    best_rung={"/v1/recommend": 1},
)
CLOUD = msgspec.structs.replace(HOME, users=[])
ALL = ["/v1/recommend", "/v1/search", "/v1/events"]


def shopper(sample: CatalogueSample = HOME, seed: int = 1) -> Shopper:
    return Shopper(sample, random.Random(seed))


def test_the_same_seed_asks_the_same_things():
    one, two, other = shopper(seed=1), shopper(seed=1), shopper(seed=2)
    asked = [(s.recommend(), s.search()) for s in (one, two, other) for _ in range(50)]
    assert asked[:50] != asked[100:]
    assert [shopper(seed=1).recommend() for _ in range(3)] == [shopper(seed=1).recommend() for _ in range(3)]
    assert [one.recommend() for _ in range(20)] == [two.recommend() for _ in range(20)]


def test_items_are_drawn_by_the_catalogues_popularity():
    source = shopper()
    drawn = Counter(e.item for _ in range(4000) for e in source.events(1_700_000_000_000).events if e.item)
    share = drawn["i0"] / sum(drawn.values())
    assert share == pytest.approx(1 / sum(HOME.item_weights), rel=0.1)
    assert drawn["i0"] > drawn["i9"] > drawn["i90"]


def test_at_home_people_are_named_and_strangers_bring_a_session():
    source = shopper()
    asked = [source.recommend() for _ in range(500)]
    assert {a.user for a in asked if a.user} <= set(HOME.users)
    strangers = [a for a in asked if a.user is None]
    assert 20 < len(strangers) < 90
    assert all(s.history for s in strangers)


def test_in_the_cloud_nobody_is_named_and_everybody_brings_a_history():
    source = shopper(CLOUD)
    asked = [source.recommend() for _ in range(100)]
    assert all(a.user is None and a.history for a in asked)
    assert all(e.user is None for _ in range(50) for e in source.events(1_700_000_000_000).events)


def test_what_is_asked_keeps_the_contract():
    source = shopper()
    for _ in range(300):
        for drawn in (source.recommend(), source.search(), source.events(1_700_000_000_000)):
            encoded = msgspec.json.encode(drawn)
            assert msgspec.json.decode(encoded, type=type(drawn)) == drawn
    assert isinstance(source.recommend(), RecommendRequest)
    assert isinstance(source.search(), SearchRequest)


def test_event_ids_are_uuid7_and_new_under_the_same_seed():
    batches: list[EventsRequest] = [shopper(seed=1).events(1_700_000_000_000) for _ in range(50)]
    ids = [e.event_id for b in batches for e in b.events]
    assert all(is_uuid7(i) for i in ids)
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        (msgspec.structs.replace(HOME, items=[], item_weights=[]), "no items"),
        (msgspec.structs.replace(HOME, item_weights=[1.0]), "100 items and 1 weights"),
        (msgspec.structs.replace(HOME, item_weights=[0.0] * 100), "positive sum"),
        (msgspec.structs.replace(HOME, item_weights=[float("nan")] * 100), "not all numbers"),
        (msgspec.structs.replace(HOME, queries=[]), "no queries"),
    ],
)
def test_a_sample_that_nothing_can_be_drawn_from_is_refused(sample: CatalogueSample, said: str):
    assert said in (check(sample, ALL) or "")


def test_a_sample_without_queries_is_enough_for_who_does_not_search():
    assert check(msgspec.structs.replace(HOME, queries=[]), ["/v1/recommend"]) is None
    assert check(HOME, ALL) is None
