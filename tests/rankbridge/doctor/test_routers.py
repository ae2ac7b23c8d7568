"""What strongSwan 5.9.8 and FRR 8.4 say is read as it is, and silence is a fault and never health."""

from __future__ import annotations

import json
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from rankbridge.doctor.findings import Finding, Verdict
from rankbridge.doctor.routers import CommandRouter, FakeRouter, examine

PEER, OTHER = IPv4Address("169.254.210.1"), IPv4Address("169.254.210.5")
SA = (
    "list-sa event {onprem-aws-1 {uniqueid=2 version=2 state=%s local-host=203.0.113.30 encr-alg=AES_GCM_16 "
    "child-sas {%s}}}\n"
)
CHILD = "onprem-aws-1-2 {name=onprem-aws-1 reqid=1 state=%s mode=TUNNEL protocol=ESP encr-alg=AES_GCM_16 }"
UP = SA % ("ESTABLISHED", CHILD % "INSTALLED")
END = "list-sas reply {}\n"


def sessions(state: str = "Established", routes: int = 1, peer: IPv4Address = PEER) -> str:
    return json.dumps({"routerId": "169.254.210.2", "peers": {str(peer): {"state": state, "pfxRcd": routes}}})


def found(router: FakeRouter, *peers: IPv4Address) -> dict[str, Finding]:
    return {one.name: one for one in examine([router], peers or (PEER,))}


def test_an_established_tunnel_and_session_are_ok_and_say_their_cipher_and_routes():
    told = found(FakeRouter(UP + END, sessions()))
    assert {one.verdict for one in told.values()} == {Verdict.OK}
    assert "AES_GCM_16" in told["tunnel onprem-aws-1"].measured
    assert told[f"BGP {PEER}"].measured == "Established, 1 route learnt"


@pytest.mark.parametrize(
    "said",
    [
        SA % ("CONNECTING", ""),
        SA % ("ESTABLISHED", ""),
        SA % ("ESTABLISHED", CHILD % "REKEYED"),
        SA % ("CONNECTING", CHILD % "INSTALLED"),
    ],
)
def test_half_a_tunnel_is_a_fault(said: str):
    assert found(FakeRouter(said + END, sessions()))["tunnel onprem-aws-1"].verdict is Verdict.FAULT


@pytest.mark.parametrize("order", [1, -1])
def test_an_association_that_is_being_replaced_does_not_count_against_the_one_that_works(order: int):
    said = "".join([UP, SA % ("DELETING", "")][::order])
    assert found(FakeRouter(said + END, sessions()))["tunnel onprem-aws-1"].verdict is Verdict.OK


def test_no_association_at_all_is_a_fault():
    assert found(FakeRouter(END, sessions()))["tunnels"].verdict is Verdict.FAULT


def test_a_planned_peer_without_a_session_is_named():
    told = found(FakeRouter(UP, sessions()), PEER, OTHER)
    assert told[f"BGP {OTHER}"].verdict is Verdict.FAULT
    assert "no session" in told[f"BGP {OTHER}"].measured


@pytest.mark.parametrize("state", ["Active", "Connect", "Idle", "OpenSent"])
def test_a_session_that_is_not_established_is_a_fault_with_its_state(state: str):
    told = found(FakeRouter(UP, sessions(state, 0)))[f"BGP {PEER}"]
    assert (told.verdict, told.measured) == (Verdict.FAULT, state)


def test_a_planned_peer_that_tells_no_route_is_a_fault_and_a_neighbour_of_the_same_site_is_not():
    assert found(FakeRouter(UP, sessions(routes=0)))[f"BGP {PEER}"].verdict is Verdict.FAULT
    near = IPv4Address("10.210.255.1")
    assert found(FakeRouter(UP, sessions(routes=0, peer=near)))[f"BGP {near}"].verdict is Verdict.OK


@pytest.mark.parametrize(
    "said", ["no json", "[]", '{"peers": 5}', '{"peers": {"x": {}}}', '{"peers": {"10.0.0.1": []}}']
)
def test_what_is_no_summary_is_a_fault_and_no_traceback(said: str):
    assert found(FakeRouter(UP, said))["BGP"].verdict is Verdict.FAULT


def test_daemons_that_cannot_be_asked_are_a_fault_each():
    told = found(FakeRouter(None, None))
    assert told["tunnels"].verdict is told["BGP"].verdict is told[f"BGP {PEER}"].verdict is Verdict.FAULT


def test_without_a_router_nothing_is_claimed():
    assert {one.verdict for one in examine([], [PEER])} == {Verdict.SKIPPED}


@pytest.mark.parametrize("command", [("/nowhere/ssh",), ("false",)])
def test_a_command_that_is_missing_or_fails_is_a_fault(command: tuple[str, ...]):
    told = examine([CommandRouter(command)], [])
    assert {one.verdict for one in told} == {Verdict.FAULT}
    assert command[0] in told[0].measured


@pytest.mark.parametrize(("name", "runs"), [("ssh", 'exec sh -c "$*"'), ("enter", 'exec "$@"')])
def test_words_arrive_whole_at_the_daemons_directly_and_over_ssh(tmp_path: Path, name: str, runs: str):
    tools = {"swanctl": f"printf %s '{UP}'", "vtysh": f"[ $# = 2 ] && printf %s '{sessions()}'"}
    for tool, body in {**tools, name: f"PATH={tmp_path}:$PATH; {runs}"}.items():
        (tmp_path / tool).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / tool).chmod(0o755)
    told = examine([CommandRouter((str(tmp_path / name),))], [PEER])
    assert {one.verdict for one in told} == {Verdict.OK}, told
