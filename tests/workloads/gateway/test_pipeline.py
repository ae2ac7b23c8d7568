"""Down the ladder and up again: what is answered when neighbours are late, lost, wrong or of another bundle."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import msgspec
import numpy as np
import pytest

from workloads.bundle.store import Bundle
from workloads.contract.http import CandidatesAnswer, CandidatesQuery, ItemsAnswer
from workloads.contract.slo import CANDIDATES_RANKED, DEADLINE_MS, STAGE_P99_MS, Endpoint, Stage
from workloads.data.fusion import Candidates
from workloads.data.profiles import MemoryProfiles
from workloads.gateway.doors import DoorFault, FakeRanker, FakeRetrieval
from workloads.gateway.ladder import FAILURES_IN_A_ROW, Reason
from workloads.gateway.ranking import DIFFERS_FOR_S
from workloads.gateway.timing import FakeClock

Counted = Callable[[str], float]


async def recommend(client: httpx.AsyncClient, deadline_ms: float | None = None, **message: object) -> ItemsAnswer:
    headers = {} if deadline_ms is None else {"rankbridge-deadline-ms": str(deadline_ms)}
    return await ask(client, "/v1/recommend", message, headers)


async def ask(
    client: httpx.AsyncClient, path: str, message: dict[str, object], headers: dict[str, str] | None = None
) -> ItemsAnswer:
    answer = await client.post(path, json=message, headers=headers)
    assert answer.status_code == 200, answer.text
    return msgspec.json.decode(answer.content, type=ItemsAnswer)


def items_of(answer: ItemsAnswer) -> list[str]:
    return [item.item for item in answer.items]


async def test_with_all_neighbours_well_an_answer_comes_from_the_full_ranker(
    client: httpx.AsyncClient, bundle: Bundle, user: str, ranker: FakeRanker, retrieval: FakeRetrieval
):
    answer = await recommend(client, user=user, k=20)
    assert (answer.served.rung, answer.served.reason) == (1, None)
    assert (answer.served.site, answer.served.bundle) == ("onprem", bundle.id[:12])
    assert set(answer.served.stages_ms) == {"features", "candidates", "rank", "rules"}
    assert len(answer.items) == len(set(items_of(answer))) == 20
    assert [item.score for item in answer.items] == sorted((item.score for item in answer.items), reverse=True)
    assert (ranker.calls, retrieval.calls) == (1, 1)


async def test_the_ranker_decides_the_order_over_all_candidates_in_one_call(
    client: httpx.AsyncClient, ranker: FakeRanker, retrieval: FakeRetrieval
):
    answer = await recommend(client, k=5)
    assert retrieval.queries[0].count >= CANDIDATES_RANKED
    assert answer.served.ranked == len(retrieval.items)
    assert ranker.calls == 1
    # The fake ranker prefers high indices; the fake retrieval proposed low ones first.
    assert min(items_of(answer)) > "item-00150"


async def test_a_lost_ranker_steps_down_to_rung_three_in_the_order_of_retrieval(
    client: httpx.AsyncClient, bundle: Bundle, ranker: FakeRanker, retrieval: FakeRetrieval, counted: Counted
):
    ranker.fault = DoorFault(Reason.RANKER_DOWN, "connection refused")
    answer = await recommend(client, k=3)
    assert (answer.served.rung, answer.served.reason, answer.served.ranked) == (3, "ranker_down", None)
    shown = [item for item in retrieval.items if bundle.tables["in_stock"][item]][:3]
    assert items_of(answer) == [bundle.item_ids[item] for item in shown]
    await asyncio.sleep(0)  # counted once the answer is on its way
    assert counted('rankbridge_answers_total{endpoint="/v1/recommend",reason="ranker_down",rung="3"}') == 1


@pytest.mark.parametrize(
    "reason", [Reason.RANKER_NOT_LOADED, Reason.RANKER_BUSY, Reason.RANKER_FAULT, Reason.RANKER_LATE]
)
async def test_every_way_a_ranker_fails_is_an_answer_with_its_reason(
    client: httpx.AsyncClient, ranker: FakeRanker, reason: Reason
):
    ranker.fault = DoorFault(reason, "as told")
    answer = await recommend(client)
    assert (answer.served.rung, answer.served.reason) == (3, reason.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.1, 1.1])
async def test_scores_that_are_no_probabilities_order_nothing(
    client: httpx.AsyncClient, ranker: FakeRanker, bad: float
):
    def one_bad(sparse: np.ndarray, _: np.ndarray) -> np.ndarray:
        scores = np.full(len(sparse), 0.5, dtype=np.float32)
        scores[-1] = bad
        return scores

    ranker.score = one_bad
    answer = await recommend(client)
    assert (answer.served.rung, answer.served.reason) == (3, "ranker_nonsense")
    assert all(item.score == item.score for item in answer.items)


async def test_a_late_ranker_costs_its_share_of_the_deadline_and_no_more(
    client: httpx.AsyncClient, ranker: FakeRanker, clock: FakeClock
):
    ranker.delay_s = 0.080
    answer = await recommend(client)
    assert (answer.served.rung, answer.served.reason) == (3, "ranker_late")
    assert clock.now_s() * 1000 < 60
    assert 40 < answer.served.stages_ms["rank"] < 60


async def test_a_ranker_known_to_be_late_is_not_waited_for_by_every_request(
    client: httpx.AsyncClient, ranker: FakeRanker, clock: FakeClock
):
    ranker.delay_s = 5.0
    for _ in range(FAILURES_IN_A_ROW):
        await recommend(client)
    waited, calls = clock.now_s(), ranker.calls
    for _ in range(100):
        answer = await recommend(client)
        assert (answer.served.rung, answer.served.reason) == (3, "ranker_late")
    assert ranker.calls == calls
    assert clock.now_s() == waited


async def test_a_ranker_that_comes_back_answers_within_a_second_and_has_all_requests_again_in_a_few(
    client: httpx.AsyncClient, ranker: FakeRanker, clock: FakeClock
):
    ranker.fault = DoorFault(Reason.RANKER_DOWN, "connection refused")
    for _ in range(200):
        clock.run(0.05)
        assert (await recommend(client)).served.rung == 3
    assert ranker.calls < 60
    ranker.fault = None
    served = []
    for _ in range(round(8 / 0.05)):
        clock.run(0.05)
        served.append((await recommend(client)).served)
    assert 1 in {one.rung for one in served[: round(1 / 0.05) + 1]}
    assert {(one.rung, one.reason) for one in served[-20:]} == {(1, None)}


@pytest.mark.parametrize("which", ["ranker", "retrieval"])
async def test_a_probe_that_ends_in_a_bug_is_not_the_last_one(
    client: httpx.AsyncClient, ranker: FakeRanker, retrieval: FakeRetrieval, clock: FakeClock, which: str
):
    lost, reason = (ranker, Reason.RANKER_DOWN) if which == "ranker" else (retrieval, Reason.RETRIEVAL_DOWN)
    lost.fault = DoorFault(reason, "connection refused")
    for _ in range(FAILURES_IN_A_ROW):
        await recommend(client)
    clock.run(1.0)  # the router lets a probe go once a second, however few requests there are
    lost.fault = RuntimeError("a bug")
    assert (await client.post("/v1/recommend", json={})).status_code == 500
    lost.fault = None
    clock.run(1.0)
    assert (await recommend(client)).served.rung == 1


async def test_a_killed_ranker_steps_down_to_the_student_at_once_and_not_further(
    laddered: httpx.AsyncClient, ranker: FakeRanker, student: FakeRanker
):
    ranker.fault = DoorFault(Reason.RANKER_DOWN, "connection refused")
    for asked in range(1, 51):
        answer = await recommend(laddered, k=5)
        assert (answer.served.rung, answer.served.reason, answer.served.ranked_at) == (2, "ranker_down", "onprem")
        assert answer.served.ranked == 200
        assert student.calls == asked
    # The student prefers low indices, the ranker high ones.
    assert max(items_of(answer)) < "item-00020"


async def test_a_hung_ranker_leaves_the_student_its_time_and_the_answer_is_not_late(
    laddered: httpx.AsyncClient, ranker: FakeRanker, clock: FakeClock
):
    ranker.delay_s = 60.0
    for _ in range(20):
        begun = clock.now_s()
        answer = await recommend(laddered)
        assert (answer.served.rung, answer.served.reason) == (2, "ranker_late")
        assert (clock.now_s() - begun) * 1000 < 60


async def test_without_its_own_ranker_home_is_ranked_at_the_other_site_at_the_best_rung(
    paired: httpx.AsyncClient, ranker: FakeRanker, counted: Counted
):
    ranker.fault = DoorFault(Reason.RANKER_DOWN, "connection refused")
    served = [(await recommend(paired)).served for _ in range(100)]
    best = [one for one in served if one.rung == 1]
    assert len(best) >= 90, "retries have a budget: until the route is drained a few answers are the student's"
    assert {(one.site, one.ranked_at, one.reason) for one in best} == {("onprem", "aws", None)}
    assert {one.rung for one in served} <= {1, 2}
    assert counted('rankbridge_route_choices_total{reason="",rung="1",site="aws"}') == len(best)


async def test_what_home_can_rank_itself_does_not_go_to_the_dearer_site(
    paired: httpx.AsyncClient, ranker: FakeRanker, peer: FakeRanker
):
    ranker.delay_s, peer.delay_s = 0.005, 0.001
    served = [(await recommend(paired)).served for _ in range(50)]
    assert {(one.rung, one.ranked_at) for one in served} == {(1, "onprem")}
    assert peer.calls == 0


async def test_another_edition_next_door_is_counted_and_left_alone_and_harms_no_answer(
    paired: httpx.AsyncClient, ranker: FakeRanker, peer: FakeRanker, faults: list[Reason], clock: FakeClock
):
    ranker.fault = DoorFault(Reason.RANKER_DOWN, "gone")
    peer.fault = DoorFault(Reason.PEER_OTHER_BUNDLE, "the other one")
    for _ in range(100):
        clock.run(0.01)
        assert (await recommend(paired)).served.rung == 2
    assert Reason.PEER_OTHER_BUNDLE in faults
    assert peer.calls <= 1 / DIFFERS_FOR_S + 2
    peer.fault = None
    clock.run(DIFFERS_FOR_S)
    assert 1 in {(await recommend(paired)).served.rung for _ in range(20)}


async def test_an_answer_says_what_its_rung_loses_and_what_was_predicted(laddered: httpx.AsyncClient, bundle: Bundle):
    measured = {row.rung: row.loss for row in bundle.manifest.quality.rungs if row.protocol == "novel"}
    best = (await recommend(laddered)).served
    assert best.loss == (0.0 if measured else None)
    assert best.predicted_ms is not None
    assert best.predicted_ms > 0
    for rung in (2, 3, 4):
        served = (await ask(laddered, "/v1/recommend", {}, {"rankbridge-rung": str(rung)})).served
        assert (served.rung, served.reason, served.loss) == (rung, "asked", measured.get(rung))
    assert served.predicted_ms is None


@pytest.mark.parametrize(
    ("path", "message"), [("/v1/search", {"query": "red"}), ("/v1/similar", {"item": "item-00007"})]
)
async def test_a_rung_that_is_no_step_down_is_no_wish(
    client: httpx.AsyncClient, path: str, message: dict[str, object], retrieval: FakeRetrieval
):
    for rung, served in ((1, (3, None)), (2, (3, None)), (3, (3, None)), (4, (4, "asked"))):
        answer = (await ask(client, path, message, {"rankbridge-rung": str(rung)})).served
        assert (answer.rung, answer.reason) == served
    assert retrieval.calls == 3


async def test_who_asks_for_the_student_gets_it_though_the_ranker_is_well(
    paired: httpx.AsyncClient, ranker: FakeRanker, peer: FakeRanker, student: FakeRanker
):
    served = (await ask(paired, "/v1/recommend", {}, {"rankbridge-rung": "2"})).served
    assert (served.rung, served.reason) == (2, "asked")
    assert (ranker.calls, peer.calls, student.calls) == (0, 0, 1)


async def test_a_bundle_without_a_student_answers_below_it_when_that_is_asked_for(client: httpx.AsyncClient):
    served = (await ask(client, "/v1/recommend", {}, {"rankbridge-rung": "2"})).served
    assert (served.rung, served.reason) == (3, "asked")


async def test_what_the_traditional_recommender_proposes_is_ranked_by_nobody(
    paired: httpx.AsyncClient, ranker: FakeRanker, peer: FakeRanker, student: FakeRanker, retrieval: FakeRetrieval
):
    retrieval.fault = DoorFault(Reason.RETRIEVAL_DOWN, "gone")
    assert (await recommend(paired)).served.rung == 4
    assert (ranker.calls, peer.calls, student.calls) == (0, 0, 0)


async def test_clients_in_haste_do_not_take_the_ranker_from_the_others(client: httpx.AsyncClient, ranker: FakeRanker):
    ranker.delay_s = 0.020
    for _ in range(5 * FAILURES_IN_A_ROW):
        assert (await recommend(client, deadline_ms=20)).served.reason == "ranker_slow"
    assert (await recommend(client)).served.rung == 1


async def test_a_deadline_that_leaves_no_time_is_answered_at_once_by_the_last_rung(
    client: httpx.AsyncClient, ranker: FakeRanker, retrieval: FakeRetrieval
):
    answer = await recommend(client, deadline_ms=1, k=10)
    assert (answer.served.rung, answer.served.reason) == (4, "no_time")
    assert len(answer.items) == 10
    assert (ranker.calls, retrieval.calls) == (0, 0)


async def test_slow_candidates_leave_the_ranker_less_and_never_the_answer_late(
    client: httpx.AsyncClient, ranker: FakeRanker, retrieval: FakeRetrieval, clock: FakeClock
):
    retrieval.delay_s, ranker.delay_s = 0.040, 5.0
    assert (await recommend(client)).served.rung == 3
    assert clock.now_s() * 1000 <= 100


@pytest.mark.parametrize("reason", [Reason.RETRIEVAL_DOWN, Reason.RETRIEVAL_LATE, Reason.RETRIEVAL_FAULT])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/v1/recommend", {"history": ["item-00007"]}),
        ("/v1/search", {"query": "red lantern"}),
        ("/v1/similar", {"item": "item-00007"}),
    ],
)
async def test_a_lost_retrieval_steps_down_to_the_traditional_recommender(
    client: httpx.AsyncClient,
    retrieval: FakeRetrieval,
    ranker: FakeRanker,
    path: str,
    message: dict[str, object],
    reason: Reason,
):
    retrieval.fault = DoorFault(reason, "as told")
    answer = await ask(client, path, {**message, "k": 7})
    assert (answer.served.rung, answer.served.reason) == (4, reason.value)
    assert len(answer.items) == 7
    assert ranker.calls == 0


async def test_a_late_retrieval_costs_its_share_and_the_answer_is_in_time(
    client: httpx.AsyncClient, retrieval: FakeRetrieval, clock: FakeClock
):
    retrieval.delay_s = 60.0
    answer = await recommend(client)
    assert (answer.served.rung, answer.served.reason) == (4, "retrieval_late")
    assert clock.now_s() * 1000 < 70
    before = clock.now_s()
    await ask(client, "/v1/search", {"query": "lantern"})
    assert (clock.now_s() - before) * 1000 < 120


async def test_candidates_that_break_their_promise_are_ranked_while_there_is_time(
    client: httpx.AsyncClient, retrieval: FakeRetrieval, clock: FakeClock
):
    retrieval.delay_s = 1.5 * STAGE_P99_MS[Stage.CANDIDATES] / 1000
    answer = await recommend(client)
    assert (answer.served.rung, answer.served.reason) == (1, None)
    assert clock.now_s() * 1000 < DEADLINE_MS[Endpoint.RECOMMEND]


async def test_candidates_of_another_bundle_are_never_mixed_in(
    client: httpx.AsyncClient, retrieval: FakeRetrieval, faults: list[Reason]
):
    retrieval.bundle = "f" * 64
    answer = await recommend(client)
    assert (answer.served.rung, answer.served.reason) == (4, "retrieval_other_bundle")
    assert faults == [Reason.RETRIEVAL_OTHER_BUNDLE]


@pytest.mark.parametrize(
    ("item", "score", "ann", "source"),
    [
        (0, 0.5, 0.5, 0),
        (-1, 0.5, 0.5, 0),
        (201, 0.5, 0.5, 0),
        (2**31 - 1, 0.5, 0.5, 0),
        (5, float("nan"), 0.5, 0),
        (5, 0.5, float("inf"), 0),
        (5, 0.5, 0.5, 6),
        (5, 0.5, 0.5, -1),
    ],
)
async def test_candidates_that_the_bundle_cannot_hold_are_refused(
    client: httpx.AsyncClient,
    retrieval: FakeRetrieval,
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    item: int,
    score: float,
    ann: float,
    source: int,
):
    async def nonsense(_: CandidatesQuery, __: float) -> CandidatesAnswer:
        return Candidates.of([item], [score], [ann], [source]).answer(bundle.id, 0)

    monkeypatch.setattr(retrieval, "candidates", nonsense)
    answer = await recommend(client)
    assert (answer.served.rung, answer.served.reason) == (4, "retrieval_fault")


@pytest.mark.parametrize("scores", [np.float32([0.5, 0.4]).tobytes(), b"\0\0\0"], ids=["too many", "cut"])
async def test_columns_of_different_lengths_are_refused(
    client: httpx.AsyncClient, retrieval: FakeRetrieval, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, scores: bytes
):
    async def nonsense(_: CandidatesQuery, __: float) -> CandidatesAnswer:
        return msgspec.structs.replace(Candidates.of([5], [0.5], [0.5], [0]).answer(bundle.id, 0), scores=scores)

    monkeypatch.setattr(retrieval, "candidates", nonsense)
    answer = await recommend(client)
    assert (answer.served.rung, answer.served.reason) == (4, "retrieval_fault")


async def test_no_candidates_is_an_answer_of_popular_items_and_no_sign_of_a_lost_neighbour(
    client: httpx.AsyncClient, retrieval: FakeRetrieval
):
    retrieval.items = []
    for _ in range(2 * FAILURES_IN_A_ROW):
        answer = await recommend(client, k=5)
        assert (answer.served.rung, answer.served.reason, len(answer.items)) == (4, "retrieval_empty", 5)
    retrieval.items = [1, 2, 3]
    assert (await recommend(client)).served.rung == 1


async def test_one_client_with_queries_that_break_retrieval_does_not_cost_the_others_their_rung(
    client: httpx.AsyncClient, retrieval: FakeRetrieval
):
    for _ in range(5 * FAILURES_IN_A_ROW):
        retrieval.fault = DoorFault(Reason.RETRIEVAL_FAULT, "500")
        await ask(client, "/v1/search", {"query": "poison"})
        retrieval.fault = None
        assert (await recommend(client)).served.rung == 1


async def test_who_asks_for_no_model_gets_none_and_it_is_no_fault(
    client: httpx.AsyncClient, ranker: FakeRanker, retrieval: FakeRetrieval, user: str
):
    answer = await recommend(client, user=user, use_model=False)
    assert (answer.served.rung, answer.served.reason) == (4, "asked")
    assert len(answer.items) == 10
    assert (ranker.calls, retrieval.calls) == (0, 0)


async def test_everything_dead_is_still_an_answer(
    client: httpx.AsyncClient,
    ranker: FakeRanker,
    retrieval: FakeRetrieval,
    profiles: MemoryProfiles,
    user: str,
):
    profiles.fault = "disk I/O error"
    ranker.fault = DoorFault(Reason.RANKER_DOWN, "gone")
    retrieval.fault = DoorFault(Reason.RETRIEVAL_DOWN, "gone")
    answer = await recommend(client, user=user, k=100)
    assert (answer.served.rung, len(answer.items)) == (4, 100)
    ready = (await client.get("/readyz")).json()
    assert ready["missing"] == ["triton", "retrieval", "profiles"]


async def test_unknown_users_and_items_are_cold_starts_and_not_errors(client: httpx.AsyncClient):
    for message in ({"user": "never seen"}, {"history": ["no-such-item"]}, {"user": "never seen", "history": ["x"]}):
        answer = await recommend(client, **message)
        assert (answer.served.rung, len(answer.items)) == (1, 10)
    answer = await ask(client, "/v1/similar", {"item": "no-such-item"})
    assert (answer.served.rung, len(answer.items)) == (3, 10)
    assert (await ask(client, "/v1/search", {"query": "zzz qqq"})).served.rung == 3


async def test_bought_and_just_seen_items_are_left_out_unless_repeats_are_wanted(
    client: httpx.AsyncClient, user: str, retrieval: FakeRetrieval, bundle: Bundle
):
    everything = {item for item in bundle.item_ids[1:] if bundle.tables["in_stock"][bundle.index[item]]}
    bought, viewed, seen = "item-00003", "item-00004", "item-00009"
    assert {bought, viewed, seen} <= everything
    answer = await recommend(client, user=user, history=[seen], k=100)
    assert not {bought, seen} & set(items_of(answer))
    assert {bundle.index[bought], bundle.index[seen]} == set(retrieval.queries[-1].exclude)
    retrieval.items = [bundle.index[item] for item in (bought, viewed, seen)]
    answer = await recommend(client, user=user, history=[seen], repeats=True, k=3)
    assert set(items_of(answer)) == {bought, viewed, seen}


async def test_what_is_out_of_stock_is_never_answered(client: httpx.AsyncClient, bundle: Bundle):
    out = {bundle.item_ids[row] for row in np.flatnonzero(bundle.tables["in_stock"] == 0) if row}
    assert out
    for path, message in (
        ("/v1/recommend", {}),
        ("/v1/search", {"query": "red"}),
        ("/v1/similar", {"item": "item-00001"}),
    ):
        assert not out & set(items_of(await ask(client, path, {**message, "k": 100})))


async def test_a_short_list_of_candidates_is_filled_with_popular_items(
    client: httpx.AsyncClient, retrieval: FakeRetrieval
):
    retrieval.items = [5, 6]
    answer = await recommend(client, k=10)
    assert [item.source for item in answer.items] == ["ann"] * 2 + ["popular"] * 8
    assert [item.score for item in answer.items] == sorted((item.score for item in answer.items), reverse=True)


async def test_a_similar_answer_does_not_hold_the_item_itself(client: httpx.AsyncClient, retrieval: FakeRetrieval):
    for fault in (None, DoorFault(Reason.RETRIEVAL_DOWN, "gone")):
        retrieval.fault = fault
        assert "item-00007" not in items_of(await ask(client, "/v1/similar", {"item": "item-00007", "k": 100}))


async def test_retrieval_gets_the_profile_and_the_session_oldest_first(
    client: httpx.AsyncClient, user: str, retrieval: FakeRetrieval, bundle: Bundle
):
    await recommend(client, user=user, history=["item-00010", "unknown", "item-00011"])
    query = retrieval.queries[0]
    assert [bundle.item_ids[item] for item in query.history] == ["item-00003", "item-00004", "item-00010", "item-00011"]
    assert query.history_age_hours == [40 * 24, 24, 0, 0]
    assert len(query.context) == 4
    assert query.bundle == bundle.id


async def test_a_search_tells_retrieval_the_query_and_nothing_of_the_person(
    client: httpx.AsyncClient, user: str, retrieval: FakeRetrieval
):
    answer = await ask(client, "/v1/search", {"query": "red lantern", "user": user})
    assert retrieval.queries[0].query == "red lantern"
    assert retrieval.queries[0].history == []
    assert (answer.served.rung, answer.served.reason) == (3, None)


async def test_a_pseudonym_in_the_cloud_is_no_profile_but_history_counts(
    cloud: httpx.AsyncClient, retrieval: FakeRetrieval
):
    pseudonym = "p1-" + "0a" * 16
    answer = await recommend(cloud, user=pseudonym, history=["item-00002"])
    assert (answer.served.site, answer.served.rung) == ("aws", 1)
    assert retrieval.queries[0].history == [2]
