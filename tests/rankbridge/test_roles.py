"""The plan of both sites: which processes there are, and what each is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankbridge.cloud import CloudForm
from rankbridge.layout import Layout
from rankbridge.roles import LISTENERS, READY_PATHS, READY_WITHIN_S, STOP_WAVES, Followed, Plan, Process, Role
from rankbridge.triton import Triton
from workloads.contract.sites import AWS, ONPREM, AddressBook, Listener, SiteName

BUNDLE_ID = "ab" * 32


@pytest.fixture
def triton(tmp_path: Path) -> Triton:
    return Triton(
        server=tmp_path / "tritonserver",
        libraries=tmp_path / "libs",
        backend_files=(tmp_path / "stub",),
        python=tmp_path / "python",
        python_libraries=None,
    )


def plan(layout: Layout, **changes: object) -> Plan:
    return Plan(layout, AddressBook(), layout.bundles / BUNDLE_ID, **changes)  # type: ignore[arg-type]  # a test's shorthand


def processes(layout: Layout, triton: Triton, **changes: object) -> dict[str, Process]:
    return {one.name: one for one in plan(layout, **changes).processes(triton, {"PATH": "/usr/bin"})}


def test_each_site_has_its_own_of_every_role_and_home_alone_intake_and_feedback(layout: Layout, triton: Triton):
    roles = {"tritonserver", "retrieval", "agent", "gateway"}
    expected = {f"{site}-{role}" for site in SiteName for role in roles} | {"onprem-intake", "onprem-feedback"}
    assert set(processes(layout, triton)) == expected


def test_every_socket_is_on_its_own_sites_loopback_address(layout: Layout, triton: Triton):
    for one in processes(layout, triton).values():
        address = (ONPREM if one.site is SiteName.ONPREM else AWS).address
        assert {host for host, _ in one.sockets} == {address}
    sockets = [socket for one in processes(layout, triton).values() for socket in one.sockets]
    assert len(sockets) == len(set(sockets))


def test_a_cloud_gateway_gets_neither_key_nor_profiles_nor_raw_ids(layout: Layout, triton: Triton):
    found = processes(layout, triton)
    home, cloud = " ".join(found["onprem-gateway"].command), " ".join(found["aws-gateway"].command)
    for option in ("--vault", "--profiles", "--users-sample"):
        assert option in home
        assert option not in cloud
    assert "/onprem/" not in cloud


def test_gateways_and_retrieval_serve_what_their_sites_agent_says(layout: Layout, triton: Triton):
    found = processes(layout, triton)
    for site in SiteName:
        for role in ("gateway", "retrieval"):
            command = found[f"{site}-{role}"].command
            assert command[command.index("--editions") + 1] == str(layout.site(site) / "editions.json")


def test_agents_serve_one_bundle_for_ever_or_follow_a_channel(layout: Layout, triton: Triton):
    followed = Plan(layout, AddressBook(), Followed("canary", "models", CloudForm.LOCALSTACK))
    assert followed.install(ONPREM) is None
    for site in SiteName:
        fixed = processes(layout, triton)[f"{site}-agent"].command
        assert fixed[fixed.index("--bundle") + 1] == str(layout.bundles / BUNDLE_ID)
        watching = {one.name: one for one in followed.processes(triton, {})}[f"{site}-agent"].command
        assert watching[watching.index("--channel") + 1] == "canary"
        assert watching[watching.index("--models-bucket") + 1] == "models"
        assert "--bundle" not in watching


def test_an_agent_waits_for_its_own_sites_retrieval_and_gateway_alone(layout: Layout, triton: Triton):
    found = processes(layout, triton)
    for site in (ONPREM, AWS):
        command = found[f"{site.name}-agent"].command
        assert command[command.index("--retrieval") + 1] == f"http://{site.address}:8081"
        assert command[command.index("--gateway") + 1] == f"http://{site.address}:8080"


def test_both_gateways_hand_events_to_the_intake_at_home(layout: Layout, triton: Triton):
    for site in SiteName:
        command = processes(layout, triton)[f"{site}-gateway"].command
        assert command[command.index("--intake") + 1] == "http://127.0.10.1:8082"


def test_an_injected_fault_reaches_the_agents_at_install_and_run(layout: Layout, triton: Triton):
    fault = ("ranker-delay=80ms",)
    for site in (ONPREM, AWS):
        install = plan(layout, injections=fault).install(site)
        assert install is not None
        assert "ranker-delay=80ms" in install
        assert "ranker-delay=80ms" in processes(layout, triton, injections=fault)[f"{site.name}-agent"].command


def test_a_port_override_holds_at_both_sites_and_for_those_who_call_it(layout: Layout, triton: Triton):
    changed = Plan(layout, AddressBook({Listener.RETRIEVAL: 9081}), layout.bundles / BUNDLE_ID)
    found = {one.name: one for one in changed.processes(triton, {})}
    for site in (ONPREM, AWS):
        assert found[f"{site.name}-retrieval"].sockets == ((site.address, 9081),)
        assert f"http://{site.address}:9081" in found[f"{site.name}-gateway"].command


def test_sites_in_networks_of_their_own_have_other_addresses_the_same_ports_and_a_way_in(
    layout: Layout, triton: Triton
):
    hosts = {ONPREM.name: "10.210.1.10", AWS.name: "10.220.1.10"}
    entries = {site: ("nsenter", f"--net=/run/netns/{site}", "--") for site in SiteName}
    elsewhere = Plan(layout, AddressBook(hosts=hosts), layout.bundles / BUNDLE_ID, entries=entries)
    found = {one.name: one for one in elsewhere.processes(triton, {})}
    for name, here in processes(layout, triton).items():
        there = found[name]
        assert there.command[:3] == entries[there.site] == there.entry
        assert len(there.command) == len(here.command) + 3
        assert [port for _, port in there.sockets] == [port for _, port in here.sockets]
        assert {host for host, _ in there.sockets} == {hosts[there.site]}
        assert "127.0." not in " ".join(there.command)
        if there.role is not Role.TRITON:
            assert there.environment["RANKBRIDGE_LISTEN"] == "anywhere"
            assert "RANKBRIDGE_LISTEN" not in here.environment


def test_each_gateway_is_told_of_the_other_sites_and_of_no_other_process(layout: Layout, triton: Triton):
    found = processes(layout, triton)
    for site, other in ((ONPREM, AWS), (AWS, ONPREM)):
        told = [word for word in found[f"{site.name}-gateway"].command if word.startswith("--peer")]
        assert told == [f"--peer={other.name}={AddressBook().url(other, Listener.GATEWAY)}"]


def test_every_role_has_what_starting_waiting_and_stopping_need():
    for role in Role:
        assert LISTENERS[role]
        assert READY_PATHS[role].startswith("/")
        assert READY_WITHIN_S[role] > 0
    assert sorted(role for wave in STOP_WAVES for role in wave) == sorted(Role)
