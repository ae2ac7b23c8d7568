"""A wire delays, loses, narrows and swallows just what it was told to, and never changes the order."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankbridge.link import Shape
from rankbridge.rig.relay import ETHERNET, QUEUE_S, Wire


def wire(shape: Shape | None = None) -> Wire:
    made = Wire(random.Random(1))
    made.tell(shape or Shape())
    return made


def test_a_whole_wire_passes_everything_on_at_once():
    assert wire().due(1514, 7.0) == 7.0


def test_a_cut_wire_passes_nothing_on():
    assert wire(Shape(cut=True)).due(60, 7.0) is None


def test_delay_is_added_once():
    assert wire(Shape(delay_ms=150)).due(60, 7.0) == pytest.approx(7.15)


def test_loss_is_the_share_that_was_asked_for():
    lossy = wire(Shape(loss=0.3))
    lost = sum(lossy.due(60, float(i)) is None for i in range(10_000))
    assert lost == pytest.approx(3000, abs=200)


def test_a_narrow_wire_takes_its_time_for_each_bit():
    narrow = wire(Shape(rate_mbit=2))
    assert narrow.due(1250, 0.0) == pytest.approx(0.005)
    assert narrow.due(1250, 0.0) == pytest.approx(0.010), "behind the first"
    assert narrow.due(1250, 1.0) == pytest.approx(1.005), "a free wire has no memory"


def test_a_narrow_wire_keeps_no_more_than_its_queue():
    narrow = wire(Shape(rate_mbit=1))
    dues = [narrow.due(1250, 0.0) for _ in range(100)]
    kept = [due for due in dues if due is not None]
    assert len(kept) < 100
    assert max(kept) <= QUEUE_S + 0.010 + 1e-9


def test_a_hole_swallows_packets_larger_than_it_and_no_others():
    holed = wire(Shape(largest=1300))
    assert holed.due(1300 + ETHERNET, 0.0) == 0.0
    assert holed.due(1301 + ETHERNET, 0.0) is None


@given(st.lists(st.tuples(st.integers(60, 1514), st.floats(0, 0.1)), max_size=50), st.floats(0, 80))
def test_jitter_changes_no_order_and_nothing_comes_before_it_was_sent(frames: list[tuple[int, float]], jitter: float):
    shaking, now, last = wire(Shape(delay_ms=40, jitter_ms=jitter, rate_mbit=10)), 0.0, 0.0
    for size, pause in frames:
        now += pause
        due = shaking.due(size, now)
        if due is not None:
            assert due >= max(now, last)
            last = due
