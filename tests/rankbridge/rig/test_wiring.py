"""Addresses of a rig follow the plan, and no two rigs of a machine share one that the desk can reach."""

from __future__ import annotations

import itertools

import pytest

from infra.vpn.render import LIBIPSEC_MTU
from rankbridge.rig.rig import Planned
from rankbridge.rig.wiring import SLOTS, Wiring
from workloads.contract.sites import SiteName

PLANNED = Planned.of()
WIRINGS = [Wiring(PLANNED.link, slot) for slot in range(SLOTS)]


def test_what_the_plan_says_stands_on_the_wires():
    wiring = WIRINGS[0]
    assert wiring.outside(SiteName.ONPREM, PLANNED.link.tunnels[0]) == PLANNED.link.private.router
    assert len(set(wiring.outer)) == 3, "home's one address, and one for each end at AWS"
    for site in SiteName:
        assert wiring.service(site) in wiring.plan(site).cidr
        for tunnel in PLANNED.link.tunnels:
            assert all(one in wiring.plan(site).cidr for one in wiring.lan(site, tunnel))


@pytest.mark.parametrize("site", SiteName)
def test_no_two_rigs_share_a_name_or_an_address_at_the_desk(site: SiteName):
    for one, other in itertools.combinations(WIRINGS, 2):
        assert one.service(site) != other.service(site)
        assert one.desk(site)[0].network != other.desk(site)[0].network
        assert not set(one.namespaces) & set(other.namespaces)
        assert one.desk_device(site) != other.desk_device(site)


def test_devices_have_names_that_the_kernel_takes():
    for cable in WIRINGS[-1].cables:
        assert max(len(cable.left_device), len(cable.right_device)) <= 15


def test_every_end_of_a_cable_is_a_namespace_of_the_rig_or_the_desk():
    wiring = WIRINGS[3]
    ends = {end for cable in wiring.cables for end in (cable.left, cable.right)}
    assert ends == {None, *wiring.namespaces}


def test_no_site_has_a_way_to_the_other_but_what_bgp_tells_it():
    wiring = WIRINGS[0]
    sites = {wiring.namespace(site.value) for site in SiteName}
    assert not [way for way in wiring.ways if way.namespace in sites]


def test_packets_of_the_rig_are_as_large_as_its_charon_takes_them():
    assert PLANNED.transport.mtu == LIBIPSEC_MTU


def test_each_run_has_keys_of_its_own():
    one, other = (PLANNED.endpoints(WIRINGS[0]) for _ in range(2))
    assert len({endpoint.psk for endpoint in (*one, *other)}) == 4
