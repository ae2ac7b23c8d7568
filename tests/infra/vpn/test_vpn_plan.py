"""Links, tunnels and what fits into them."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.plan import Site
from infra.vpn import plan
from workloads.contract.sites import SiteKind


def site(name: str, kind: SiteKind) -> Site:
    return Site(name, kind, "r", IPv4Network("10.0.0.0/16"), 64512)


# AWS Site-to-Site VPN user guide, "Adjust MTU and MSS sizes according to the algorithms in use".
AWS_TABLE = [(False, 1446, 1406), (True, 1438, 1398)]


@pytest.mark.parametrize(("nat_traversal", "mtu", "mss"), AWS_TABLE)
def test_mtu_and_mss_agree_with_the_table_of_aws(nat_traversal: bool, mtu: int, mss: int):  # noqa: FBT001 -- a table
    assert plan.tunnel_mtu(1500, nat_traversal=nat_traversal) == mtu
    assert plan.clamp_mss(mtu) == mss


@given(st.integers(1300, 9001), st.booleans())
def test_the_largest_packet_fits_and_four_more_bytes_do_not(path: int, nat: bool):  # noqa: FBT001 -- drawn
    def outer(inner: int) -> int:
        padded = -(-(inner + 2) // 4) * 4
        return 20 + (8 if nat else 0) + 8 + 8 + padded + 16

    mtu = plan.tunnel_mtu(path, nat_traversal=nat)
    assert outer(mtu) <= path < outer(mtu + 4)


def test_pods_leave_room_for_the_overlay_inside_the_tunnel():
    assert plan.pod_mtu(1446) == 1396


def test_every_private_site_is_linked_to_every_cloud():
    home, edge = site("onprem", SiteKind.HOME), site("shop", SiteKind.EDGE)
    one, two = site("aws", SiteKind.CLOUD), site("aws2", SiteKind.CLOUD)
    names = [plan.link_name(p, c) for p, c in plan.pairs([home, one, edge, two])]
    assert names == ["onprem-aws", "shop-aws", "onprem-aws2", "shop-aws2"]


def test_aws_has_the_first_address_of_a_tunnel_and_home_the_second():
    tunnel = plan.Tunnel(1, IPv4Network("169.254.10.0/30"), "psk-x-1")
    assert (tunnel.aws_inside, tunnel.home_inside) == (IPv4Address("169.254.10.1"), IPv4Address("169.254.10.2"))


@pytest.mark.parametrize("network", [str(n) for n in plan.AWS_RESERVED_INSIDE] + ["10.0.0.0/30", "169.254.9.0/29"])
def test_an_inside_range_that_aws_would_refuse_is_refused(network: str):
    (fault,) = plan.inside_fault("k", IPv4Network(network))
    assert fault.value == network
    assert "169.254.0.0/16" in fault.allowed


def test_the_same_inside_range_twice_is_refused():
    twin = IPv4Network("169.254.10.0/30")
    assert [f.key for f in plan.inside_faults([("a", twin), ("b", twin)])] == ["b"]


@pytest.mark.parametrize(
    ("mtu", "nat", "good"), [(1446, False, True), (1446, True, False), (1438, True, True), (1279, False, False)]
)
def test_an_mtu_must_fit_the_tunnel(mtu: int, nat: bool, good: bool):  # noqa: FBT001 -- a table
    assert (plan.mtu_fault("network.mtu", mtu, path_mtu=1500, nat_traversal=nat) == []) is good


def test_jumbo_frames_between_routers_do_not_lift_the_limit_of_aws():
    assert plan.mtu_fault("network.mtu", 1500, path_mtu=9001, nat_traversal=False)


@pytest.mark.parametrize(
    ("key", "good"),
    [("x" * 32, True), ("x" * 31, False), ("x" * 65, False), ("0" + "x" * 40, False), ("x" * 31 + "!", False)],
)
def test_a_psk_is_long_and_does_not_start_with_zero(key: str, good: bool):  # noqa: FBT001 -- a table
    assert bool(plan.PSK_PATTERN.fullmatch(key)) is good
