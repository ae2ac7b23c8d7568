"""When a fault is seen, when all is well again, and that neither is found where it is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from loadtests.samples import Sample
from loadtests.windows import goodput_per_s, on_time_after_s, recovered_after_s, seen_after_s, windows


def drive(seconds: int, change: Callable[[float], dict[str, object]], rate: int = 100) -> list[Sample]:
    """Evenly spaced reads of 10 ms, each changed by what `change` says of its moment."""
    samples = []
    for number in range(seconds * rate):
        at_s = number / rate
        fields: dict[str, object] = {"latency_ms": 10.0, "status": 200, "rung": 1, "ranked_at": "onprem"} | change(at_s)
        samples.append(
            Sample(
                endpoint="/v1/recommend",
                site="onprem",
                at_s=at_s,
                lateness_ms=0.0,
                best_rung=1,
                sent_to="onprem",
                **fields,  # type: ignore[arg-type]  # a test's own table
            )
        )
    return samples


def test_a_fault_is_seen_when_its_first_answer_is_there():
    samples = drive(10, lambda at: {"rung": 3, "latency_ms": 60.0} if 4.0 <= at < 6.0 else {})
    assert seen_after_s(samples, 4.0) == pytest.approx(0.06)


def test_another_sites_ranker_shows_a_fault_too():
    samples = drive(10, lambda at: {"ranked_at": "aws"} if at >= 5.0 else {})
    assert seen_after_s(samples, 4.0) == pytest.approx(1.01)


def test_a_fault_that_no_answer_shows_is_not_seen():
    assert seen_after_s(drive(10, lambda _: {}), 4.0) is None


def test_recovered_is_the_first_of_three_calm_seconds_on_end():
    # Two calm seconds from 5 on are not enough: another bad answer comes at 7.
    def change(at: float) -> dict[str, object]:
        return {"rung": 3} if 4.0 <= at < 5.0 or 7.0 <= at < 7.5 else {}

    assert recovered_after_s(drive(12, change), 4.0, 12.0) == pytest.approx(3.5)


def test_what_never_recovers_or_is_not_watched_for_long_enough_has_not_recovered():
    samples = drive(10, lambda at: {"status": 0, "error": "timeout"} if at >= 4.0 else {})
    assert recovered_after_s(samples, 4.0, 10.0) is None
    assert recovered_after_s(drive(10, lambda _: {}), 8.0, 10.0) is None


def test_silence_is_not_calm():
    assert recovered_after_s(drive(4, lambda _: {}), 4.0, 10.0) is None


def test_on_time_counts_to_the_last_second_with_too_many_late():
    samples = drive(10, lambda at: {"latency_ms": 150.0} if 4.0 <= at < 4.5 or 5.0 <= at < 5.1 or at == 8.0 else {})
    assert on_time_after_s(samples, 4.0, 10.0) == 2.0
    assert on_time_after_s(drive(10, lambda at: {"latency_ms": 150.0 if at > 4 else 1.0}), 4.0, 10.0) is None


def test_windows_cover_a_stretch_without_a_gap_and_failures_are_slower_than_every_answer():
    samples = drive(3, lambda at: {"status": 0, "error": "timeout"} if 1.0 <= at < 1.05 else {})
    found = windows(samples, start_s=0.0, end_s=3.0)
    assert [one.requests for one in found] == [100, 100, 100]
    assert found[0].p99_ms == 10.0
    assert found[1].p99_ms is None
    assert found[1].late_share == pytest.approx(0.05)


def test_goodput_counts_answers_in_time_alone():
    samples = drive(2, lambda at: {"latency_ms": 500.0} if at >= 1.5 else {})
    assert goodput_per_s(samples, 0.0, 2.0) == pytest.approx(75.0)
