"""Sites and addresses as arithmetic."""

from __future__ import annotations

from ipaddress import IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import plan
from infra.plan import Fault, Site
from workloads.contract.sites import SiteKind


def cloud(cidr: str, zones: int = 3) -> Site:
    return Site(
        "aws",
        SiteKind.CLOUD,
        "eu-central-1",
        IPv4Network(cidr),
        64620,
        tuple(f"eu-central-1{c}" for c in "abc"[:zones]),
    )


vpcs = st.builds(
    lambda prefix, bits, zones: cloud(
        str(IPv4Network(((10 << 24) | (bits << 10), 32)).supernet(new_prefix=prefix)), zones
    ),
    st.integers(*plan.VPC_PREFIXES),
    st.integers(0, 2**14 - 1),
    st.integers(2, 3),
)


@given(vpcs)
def test_subnets_of_any_vpc_lie_inside_it_and_never_overlap(site: Site):
    cut = plan.vpc_plan(site)
    subnets = (*cut.private, *cut.public)
    assert all(s.cidr.subnet_of(site.cidr) for s in subnets)
    assert plan.overlap_faults([(s.name, s.cidr) for s in subnets]) == []
    assert len(cut.private) == len(cut.public) == len(site.zones)


@given(vpcs)
def test_no_subnet_is_smaller_than_aws_takes(site: Site):
    cut = plan.vpc_plan(site)
    assert all(s.cidr.prefixlen <= 28 for s in (*cut.private, *cut.public))


def test_each_zone_has_one_private_and_one_public_subnet():
    cut = plan.vpc_plan(cloud("10.20.0.0/16"))
    assert (
        [s.zone for s in cut.private]
        == [s.zone for s in cut.public]
        == ["eu-central-1a", "eu-central-1b", "eu-central-1c"]
    )
    assert [str(s.cidr) for s in cut.private] == ["10.20.0.0/18", "10.20.64.0/18", "10.20.128.0/18"]
    assert [str(s.cidr) for s in cut.public] == ["10.20.192.0/22", "10.20.196.0/22", "10.20.200.0/22"]


def test_the_vpc_resolver_is_the_second_address():
    assert str(plan.vpc_plan(cloud("10.20.0.0/16")).resolver) == "10.20.0.2"


networks = st.builds(
    lambda prefix, bits: IPv4Network(((10 << 24) | (bits << 8), 24)).supernet(new_prefix=prefix),
    st.integers(12, 24),
    st.integers(0, 2**16 - 1),
)


@given(st.lists(networks, max_size=6))
def test_overlaps_are_found_exactly_when_two_ranges_share_an_address(ranges: list[IPv4Network]):
    faults = plan.overlap_faults([(f"k{i}", n) for i, n in enumerate(ranges)])
    shared = [
        (i, j)
        for i, a in enumerate(ranges)
        for j, b in enumerate(ranges)
        if i < j and max(a[0], b[0]) <= min(a[-1], b[-1])
    ]
    assert len(faults) == len(shared)
    assert {f.key for f in faults} == {f"k{j}" for _, j in shared}


@pytest.mark.parametrize(
    ("asn", "private"), [(64511, False), (64512, True), (65534, True), (65535, False), (4200000000, True)]
)
def test_private_asns_are_those_of_rfc_6996(asn: int, private: bool):  # noqa: FBT001 -- a table's column
    assert plan.is_private_asn(asn) is private


def test_a_name_is_never_prefixed_twice():
    names = plan.Names("prod", "team")
    assert names.tags("x")["Name"] == names.tags(names.of("x"))["Name"] == "rankbridge-prod-x"
    assert set(plan.REQUIRED_TAGS) <= set(names.tags("x"))


def test_two_homes_no_cloud_and_twins_are_all_named_at_once():
    home = Site("a", SiteKind.HOME, "a", IPv4Network("10.0.0.0/16"), 64512)
    faults = plan.site_faults([("sites[0]", home), ("sites[1]", home)])
    assert [f.key for f in faults] == ["sites", "sites", "sites[1].name", "sites[1].asn"]


def test_zones_must_be_of_the_region():
    assert plan.zone_faults("z", "eu-central-1", ["eu-central-1a", "eu-central-1b"]) == []
    for zones in (
        ["eu-central-1a"],
        ["eu-west-1a", "eu-west-1b"],
        ["eu-central-1a"] * 2,
        ["eu-central-11", "eu-central-1a"],
    ):
        assert plan.zone_faults("z", "eu-central-1", zones)


def test_the_pod_range_has_room_for_a_slice_per_node():
    assert plan.node_room(IPv4Network("10.42.0.0/16")) == 256
    assert plan.node_room(IPv4Network("10.42.0.0/25")) == 0


def test_all_faults_are_in_one_message():
    message = str(plan.FaultsError([Fault("a", "1", "2"), Fault("b", "3", "4")]))
    assert "a = 1: must be 2" in message
    assert "b = 3: must be 4" in message
