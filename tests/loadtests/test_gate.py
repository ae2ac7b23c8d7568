"""The gate fails in every way it promises to, names the guilty, and passes what is right."""

from collections.abc import Callable

import msgspec
import pytest

from loadtests import budgets
from loadtests.gate import EXIT_BREACHED, EXIT_PASSED, LoadResult, judge
from loadtests.samples import Run, RunHeader, Sample

RECOMMEND, SEARCH, EVENTS = "/v1/recommend", "/v1/search", "/v1/events"
HEADER = RunHeader(suite="mix", started_ms=0.0, warmup_s=0.0, arrivals="poisson", rate_per_user=1.0, seed=1, targets=[])
SECONDS = 120.0


def good(endpoint: str, index: int) -> Sample:
    """A healthy answer, a little different from the next one."""
    spread = 1 + (index % 10) / 20
    if endpoint == EVENTS:
        return Sample(
            endpoint=endpoint, site="onprem", at_s=index / 40, latency_ms=6 * spread, lateness_ms=0.5, status=200
        )
    return Sample(
        endpoint=endpoint,
        site="aws" if index % 4 == 0 else "onprem",
        at_s=index / 40,
        latency_ms=20 * spread,
        lateness_ms=0.5,
        status=200,
        rung=1,
        best_rung=1,
        ranked=200,
        stages_ms={"features": 1.0 * spread, "candidates": 5 * spread, "rank": 9 * spread, "rules": 0.5 * spread},
        bundle="abcdef012345",
    )


def promised_run(change: Callable[[Sample, int], Sample] = lambda s, _: s) -> Run:
    """The promised traffic for two minutes, every sample passed through `change` with its index."""
    counts = {RECOMMEND: 4800, SEARCH: 1200, EVENTS: 1200}
    samples = [change(good(endpoint, i), i) for endpoint, count in counts.items() for i in range(count)]
    return Run(header=HEADER, samples=samples, seconds=SECONDS)


def having(sample: Sample, **changes: object) -> Sample:
    return msgspec.structs.replace(sample, **changes)


def whats(result: LoadResult) -> list[tuple[str, str | None]]:
    return [(b.what, b.endpoint) for b in result.breaches]


def test_the_promised_traffic_answered_well_passes():
    result = judge(promised_run(), budgets.promise())
    assert result.breaches == []
    assert result.passed
    assert result.exit_code == EXIT_PASSED


def test_a_run_without_requests_fails():
    result = judge(Run(header=HEADER, samples=[], seconds=60.0), budgets.promise())
    assert whats(result) == [("no_requests", None)]
    assert result.exit_code == EXIT_BREACHED


def test_an_endpoint_that_nobody_asked_fails_even_when_the_others_hold():
    run = promised_run()
    run = msgspec.structs.replace(run, samples=[s for s in run.samples if s.endpoint != SEARCH])
    assert whats(judge(run, budgets.promise())) == [("no_requests", SEARCH)]


def test_a_run_without_budgets_fails():
    result = judge(promised_run(), budgets.promise().only([]))
    assert whats(result) == [("run", None)]


def test_too_few_samples_fail_whatever_they_say():
    run = promised_run()
    run = msgspec.structs.replace(run, samples=[s for s in run.samples if s.endpoint != EVENTS or s.at_s < 24.9])
    result = judge(run, msgspec.structs.replace(budgets.promise()))
    assert ("few_samples", EVENTS) in whats(result)
    assert "996 requests were made and 1000 must stand behind" in result.breaches[0].sentence


def test_samples_of_warm_up_do_not_count_towards_the_thousand():
    result = judge(promised_run(lambda s, i: having(s, warmup=s.endpoint == EVENTS and i < 300)), budgets.promise())
    assert ("few_samples", EVENTS) in whats(result)


def test_a_tenth_of_the_promised_traffic_proves_nothing():
    run = msgspec.structs.replace(promised_run(), seconds=SECONDS * 10)
    assert {("rate", RECOMMEND), ("rate", SEARCH), ("rate", EVENTS)} == set(whats(judge(run, budgets.promise())))


def test_a_small_run_is_judged_by_its_own_number_of_samples():
    run = promised_run()
    few = msgspec.structs.replace(run, samples=[s for s in run.samples if s.at_s < 1], seconds=SECONDS)
    assert judge(few, budgets.small(20)).passed
    assert not judge(few, budgets.small(50)).passed


def test_one_error_in_seven_thousand_fails():
    def change(sample: Sample, index: int) -> Sample:
        broken = sample.endpoint == SEARCH and index == 7
        return having(sample, status=503, error="http 503: Busy") if broken else sample

    result = judge(promised_run(change), budgets.promise())
    assert whats(result) == [("errors", SEARCH)]
    assert "1 of 1200 requests failed" in result.breaches[0].sentence
    assert "http 503: Busy (1)" in result.breaches[0].sentence


def test_an_overrun_of_the_generator_is_an_error():
    def change(sample: Sample, index: int) -> Sample:
        lost = sample.endpoint == EVENTS and index == 0
        return having(sample, status=0, error="generator_overrun") if lost else sample

    assert whats(judge(promised_run(change), budgets.promise())) == [("errors", EVENTS)]


def test_a_planted_slow_ranker_is_named():
    def change(sample: Sample, index: int) -> Sample:
        if sample.endpoint != RECOMMEND or index % 50:
            return sample
        return having(sample, latency_ms=sample.latency_ms + 90, stages_ms=sample.stages_ms | {"rank": 99.0})

    result = judge(promised_run(change), budgets.promise())
    assert whats(result) == [("p99", RECOMMEND), ("stage_p99", RECOMMEND)]
    tail, stage = result.breaches
    assert tail.stage == stage.stage == "rank"
    assert "the ranker (stage rank)" in tail.sentence
    assert "the ranker (stage rank) took 99.0 ms at p99, allowed 50.0 ms" in stage.sentence
    assert "onprem" in tail.sentence
    assert "aws" in tail.sentence


@pytest.mark.parametrize(
    ("stage", "whom"),
    [("features", "the profile store"), ("candidates", "retrieval"), ("rules", "the gateway's rules")],
)
def test_every_stage_can_be_the_guilty_one(stage: str, whom: str):
    def change(sample: Sample, _: int) -> Sample:
        return having(sample, stages_ms=sample.stages_ms | {stage: 45.0}) if sample.endpoint == SEARCH else sample

    result = judge(promised_run(change), budgets.promise())
    assert [(b.what, b.stage) for b in result.breaches] == [("stage_p99", stage)]
    assert whom in result.breaches[0].sentence


def test_a_slow_middle_fails_although_the_tail_holds():
    def change(sample: Sample, _: int) -> Sample:
        return having(sample, latency_ms=60.0) if sample.endpoint == RECOMMEND else sample

    assert whats(judge(promised_run(change), budgets.promise())) == [("p50", RECOMMEND)]


def test_a_site_that_is_slow_by_itself_is_named_though_all_sites_together_hold():
    def change(sample: Sample, index: int) -> Sample:
        slow = sample.endpoint == RECOMMEND and sample.site == "aws" and index % 60 == 0
        return having(sample, latency_ms=150.0) if slow else sample

    loose = budgets.promise()
    recommend = msgspec.structs.replace(loose.endpoints[0], stage_p99_ms={})
    result = judge(promised_run(change), msgspec.structs.replace(loose, endpoints=(recommend,)))
    # 80 of 4800 answers are slow: more than 1 % of all, and 6.7 % of the 1200 from aws
    assert [(b.what, b.site) for b in result.breaches] == [("p95", "aws"), ("p99", None)]


def test_a_slow_events_endpoint_fails_without_stages_to_blame():
    def change(sample: Sample, index: int) -> Sample:
        return having(sample, latency_ms=45.0) if sample.endpoint == EVENTS and index % 20 == 0 else sample

    result = judge(promised_run(change), budgets.promise())
    assert whats(result) == [("p99", EVENTS)]
    assert result.breaches[0].stage == "outside"


def test_answers_without_the_ranker_breach_the_rung_mix_and_name_it():
    def change(sample: Sample, index: int) -> Sample:
        if sample.endpoint == EVENTS or index % 40:
            return sample
        return having(sample, rung=3, reason="ranker_late", ranked=None, stages_ms=sample.stages_ms | {"rank": 48.0})

    result = judge(promised_run(change), budgets.promise())
    assert whats(result) == [("rung_mix", RECOMMEND), ("rung_mix", SEARCH)]
    sentence = result.breaches[0].sentence
    assert "2.5 % of the answers came from below the best configured rung, allowed 1 %" in sentence
    assert "the ranker was late or gone (stage rank)" in sentence
    assert "120 had waited for it, 48.0 ms at the median" in sentence
    assert "ranker_late (120)" in sentence


def test_answers_without_candidates_breach_the_rung_mix_and_name_retrieval():
    def change(sample: Sample, index: int) -> Sample:
        return (
            having(sample, rung=4, reason="retrieval_down") if sample.endpoint == SEARCH and index % 10 == 0 else sample
        )

    result = judge(promised_run(change), budgets.promise())
    assert whats(result) == [("rung_mix", SEARCH)]
    assert result.breaches[0].stage == "candidates"


@pytest.mark.parametrize(
    ("rung", "reason", "stage"),
    [
        (3, "ranker_down", "rank"),
        (4, "ranker_down", "rank"),
        (4, "retrieval_late", "candidates"),
        (4, "something new", "candidates"),
        (3, None, "rank"),
        (3, "no_time", None),
    ],
)
def test_the_gateways_own_reason_says_who_was_lost(rung: int, reason: str | None, stage: str | None):
    def change(sample: Sample, _: int) -> Sample:
        return having(sample, rung=rung, reason=reason) if sample.endpoint == SEARCH else sample

    result = judge(promised_run(change), budgets.promise())
    assert [(b.what, b.stage) for b in result.breaches] == [("rung_mix", stage)]


def test_one_answer_in_two_hundred_may_step_down():
    def change(sample: Sample, index: int) -> Sample:
        return having(sample, rung=3, reason="late") if sample.endpoint == RECOMMEND and index % 200 == 0 else sample

    assert judge(promised_run(change), budgets.promise()).passed


def test_a_site_whose_best_rung_is_two_is_not_blamed_for_rung_two():
    def change(sample: Sample, _: int) -> Sample:
        return having(sample, rung=2, best_rung=2) if sample.site == "onprem" and sample.rung else sample

    assert judge(promised_run(change), budgets.promise()).passed


def test_answers_that_cannot_be_placed_on_the_ladder_fail():
    result = judge(promised_run(lambda s, _: having(s, best_rung=None)), budgets.promise())
    assert set(whats(result)) == {("rung_mix", RECOMMEND), ("rung_mix", SEARCH)}


def test_too_few_ranked_candidates_fail():
    def change(sample: Sample, index: int) -> Sample:
        return having(sample, ranked=150) if sample.endpoint == RECOMMEND and index == 3 else sample

    result = judge(promised_run(change), budgets.promise())
    assert whats(result) == [("ranked", RECOMMEND)]
    assert "150 ranked candidates" in result.breaches[0].sentence


def test_a_gateway_that_does_not_tell_what_it_ranked_is_noted():
    result = judge(promised_run(lambda s, _: having(s, ranked=None)), budgets.promise())
    assert result.passed
    assert any("is not judged" in note for note in result.notes)


def test_a_starved_generator_cannot_pass_as_a_quiet_server():
    result = judge(promised_run(lambda s, i: having(s, lateness_ms=25.0 if i % 50 == 0 else 0.5)), budgets.promise())
    assert whats(result) == [("lateness", None)]
    assert "load generator was late" in result.breaches[0].sentence


def test_a_run_that_could_not_start_says_why():
    run = Run(header=HEADER, samples=[], seconds=0.0, fault="No catalogue sample.")
    assert judge(run, budgets.promise()).breaches[0].sentence == "No catalogue sample."


def test_all_breaches_are_listed_and_not_only_the_first():
    def change(sample: Sample, index: int) -> Sample:
        if sample.endpoint == EVENTS:
            return having(sample, status=500, error="http 500") if index == 1 else sample
        return having(sample, latency_ms=200.0, rung=3, reason="late", stages_ms=sample.stages_ms | {"rank": 150.0})

    found = set(whats(judge(promised_run(change), budgets.promise())))
    for endpoint in (RECOMMEND, SEARCH):
        for what in ("p50", "p95", "p99", "stage_p99", "rung_mix"):
            assert (what, endpoint) in found
    assert ("errors", EVENTS) in found


def test_during_a_surge_a_step_down_is_allowed_and_an_error_is_not():
    def change(sample: Sample, index: int) -> Sample:
        if sample.endpoint == EVENTS:
            return having(sample, status=503, error="http 503") if index == 0 else sample
        return having(sample, rung=4, reason="late")

    assert whats(judge(promised_run(change), budgets.surge())) == [("errors", EVENTS)]


def test_a_result_survives_its_file():
    result = judge(promised_run(lambda s, _: having(s, lateness_ms=25.0)), budgets.promise())
    assert msgspec.json.decode(msgspec.json.encode(result), type=LoadResult) == result
