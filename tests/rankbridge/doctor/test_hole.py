"""The search finds the very limit, and its sentence names the packets, both ends, and what to do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.vpn.plan import tunnel_mtu
from rankbridge.doctor.expected import Expected
from rankbridge.doctor.findings import Verdict
from rankbridge.doctor.hole import SMALLEST, FakePath, Found, Sent, name, search

PLAN = Expected(mtu=1438, path_mtu=1500, nat_traversal=True, peers=())


@given(mtu=st.integers(SMALLEST, 1600), tells=st.booleans())
def test_the_limit_is_found_to_the_byte_and_whether_the_path_tells(mtu: int, tells: bool):  # noqa: FBT001 - drawn
    found = search([FakePath(mtu, tells=tells)], PLAN.mtu)
    assert found.mtu == min(mtu, PLAN.mtu)
    assert found.silent == (mtu < PLAN.mtu and not tells)


@given(mtus=st.lists(st.integers(SMALLEST, 1600), min_size=2, max_size=4))
def test_one_flow_with_a_hole_is_enough(mtus: list[int]):
    found = search([FakePath(mtu, tells=False) for mtu in mtus], PLAN.mtu)
    short = [mtu for mtu in mtus if mtu < PLAN.mtu]
    assert (found.short, found.flows) == (len(short), len(mtus))
    assert found.mtu == (short[0] if short else PLAN.mtu)


def test_a_search_costs_few_packets_and_one_where_all_is_well():
    whole, cut = FakePath(1500, tells=False), FakePath(1300, tells=False)
    search([whole], PLAN.mtu)
    search([cut], PLAN.mtu)
    assert whole.sizes == [PLAN.mtu]
    assert len(cut.sizes) <= 13


def test_what_a_router_tells_is_tried_and_not_believed():
    class Liar(FakePath):
        def send(self, size: int) -> Sent:
            sent = super().send(size)
            return sent if sent.passed else Sent(passed=False, told=1400)

    assert search([Liar(1300, tells=True)], PLAN.mtu).mtu == 1300


def test_where_nothing_passes_no_size_is_named():
    assert search([FakePath(0, tells=False)], PLAN.mtu) == Found(0, silent=True, short=1, flows=1)
    found = name(Found(0, silent=True), PLAN, "onprem", "aws")
    assert (found.verdict, found.measured) == (Verdict.FAULT, "nothing passes from onprem to aws")


def test_a_silent_hole_is_named_with_its_sizes_and_both_ways_out():
    found = name(Found(1300, silent=True), PLAN, "onprem", "aws")
    assert found.verdict is Verdict.FAULT
    assert found.measured == (
        "packets of 1301..1438 bytes vanish between onprem and aws: path MTU is 1300, the plan needs 1438"
    )
    assert "lower `network.mtu` in the stack file to 1300 (MSS 1260, pods 1250)" in found.remedy
    assert "clear DF or answer ICMP" in found.remedy


def test_a_hole_in_one_tunnel_of_several_is_told_apart():
    assert (
        "(in 1 of 4 flows: not in every tunnel)"
        in name(Found(1300, silent=True, short=1, flows=4), PLAN, "a", "b").measured
    )
    assert "flows" not in name(Found(1300, silent=True, short=4, flows=4), PLAN, "a", "b").measured


def test_a_path_that_tells_is_a_warning_since_connections_find_their_size():
    assert name(Found(1300, silent=False), PLAN, "a", "b").verdict is Verdict.WARN


def test_below_the_smallest_plan_there_is_nothing_to_lower():
    assert "below 1280 no plan is made" in name(Found(1200, silent=True), PLAN, "a", "b").remedy


@pytest.mark.parametrize("nat", [True, False])
@given(size=st.integers(500, 1446))
def test_the_outer_packet_that_is_named_is_the_smallest_that_carries_the_inner_one(nat: bool, size: int):  # noqa: FBT001
    plan = Expected(mtu=1400, path_mtu=1500, nat_traversal=nat, peers=())
    outer = plan.outer(size)
    assert tunnel_mtu(outer, nat_traversal=nat) >= size > tunnel_mtu(outer - 1, nat_traversal=nat)
