"""Every packet between every pair of parties is let through if the table says so, and only then."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from infra import apps_manifests, edges
from infra.edges import NAMESPACES, OTHERS, TABLE, Endpoint, Party, Place, World, allowed, is_in_table
from infra.recording import Recording
from workloads.contract.sites import SiteKind

Policies = list[dict[str, Any]]
PROD = World(
    (Place("onprem", SiteKind.HOME, "onprem"), Place("aws", SiteKind.CLOUD, "aws")),
    ("10.10.0.0/16",),
    ("10.20.0.0/16",),
)
EDGE = World((*PROD.places, Place("shop-1", SiteKind.EDGE, "onprem")), PROD.api, PROD.aws)
PORTS = sorted({p.number for e in TABLE for p in e.ports} | {80, 1023, 8083, 10250, 65_535})


def policies_of(run: Recording) -> Policies:
    return [m for m in apps_manifests.manifests(run) if m["kind"] == "NetworkPolicy"]


def rendered(world: World) -> Policies:
    """Each party at each site, whether a stack would have it or not."""
    found: Policies = [
        {"metadata": {"namespace": n}, "spec": edges.default_deny()} for n in sorted(set(NAMESPACES.values()))
    ]
    for party, place in itertools.product(NAMESPACES, world.places):
        found.append({"metadata": {"namespace": NAMESPACES[party]}, "spec": edges.policy(world, party, place.name)})
    return found


def ends(world: World, present: set[tuple[str, str]] | None) -> list[tuple[Party | None, str, Endpoint]]:
    """All who may send or get a packet; `present` limits pods of ours to (party, site) that there are."""
    found: list[tuple[Party | None, str, Endpoint]] = []
    for party, place in itertools.product(NAMESPACES, world.places):
        if present is None or (party.value, place.name) in present:
            found.append((party, place.name, Endpoint(NAMESPACES[party], edges.labels(party, place.name))))
    found += [(party, "", Endpoint(where, labels)) for party, (where, labels) in OTHERS.items()]
    found += [
        (Party.API, "", Endpoint(address="10.10.0.11")),
        (Party.AWS, "", Endpoint(address="10.20.64.9")),
        (None, "", Endpoint(address="203.0.113.7")),
        (None, "", Endpoint("kube-system", {"app": "somebody"})),
        (None, "", Endpoint("default", edges.labels(Party.GATEWAY, world.places[0].name))),
        (None, "", Endpoint("rankbridge", {"app": "intruder"})),
    ]
    return found


def differences(policies: Policies, world: World, present: set[tuple[str, str]] | None) -> list[str]:
    wrong = []
    judged = 0
    everyone = ends(world, present)
    for (source, at, a), (target, there, b) in itertools.product(everyone, everyone):
        if "rankbridge" not in a.namespace + b.namespace:
            continue  # none of our policies stands between them
        for port, protocol in itertools.product(PORTS, ("TCP", "UDP")):
            meant = bool(source and target) and is_in_table(world, (source, at), (target, there), port, protocol)  # type: ignore[arg-type] -- both are parties here
            judged += 1
            if allowed(policies, a, b, port, protocol) != meant:
                wrong.append(f"{source}@{at} -> {target}@{there} {port}/{protocol}: must {'' if meant else 'not '}pass")
    assert judged > 10_000
    return wrong


def test_the_policies_of_prod_allow_exactly_the_table(apps: Callable[..., Recording]):
    policies = policies_of(apps("apps-prod"))
    present = {
        (labels[edges.ROLE_LABEL], labels[edges.SITE_LABEL])
        for p in policies
        if (labels := p["spec"]["podSelector"].get("matchLabels"))
    }
    assert len(present) > 15
    assert differences(policies, PROD, present) == []


def test_an_edge_site_gets_the_edges_of_its_kind():
    assert differences(rendered(EDGE), EDGE, None) == []
    at = {name: Endpoint("rankbridge", edges.labels(Party.GATEWAY, name)) for name in ("shop-1", "aws")}
    triton = {name: Endpoint("rankbridge", edges.labels(Party.TRITON, name)) for name in ("onprem", "aws")}
    assert allowed(rendered(EDGE), at["shop-1"], triton["onprem"], 8000)
    assert not allowed(rendered(EDGE), at["shop-1"], triton["aws"], 8000)
    assert not allowed(rendered(EDGE), at["aws"], triton["onprem"], 8000)


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec["egress"].pop(0),
        lambda spec: spec["ingress"].pop(0),
        lambda spec: spec["egress"].append({"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}),
        lambda spec: spec["ingress"].append({}),
        lambda spec: spec["policyTypes"].remove("Egress"),
    ],
    ids=["one way out less", "one way in less", "the world", "everybody in", "not judged on the way out"],
)
def test_a_policy_that_differs_from_the_table_is_seen(change: Callable[[dict[str, Any]], object]):
    policies = copy.deepcopy(rendered(PROD))
    spec = next(
        p["spec"]
        for p in policies
        if p["spec"]["podSelector"] == {"matchLabels": edges.labels(Party.GATEWAY, "onprem")}
    )
    change(spec)
    assert differences(policies, PROD, None)


POLICY = {
    "metadata": {"namespace": "a"},
    "spec": {"podSelector": {"matchLabels": {"x": "1"}}, "policyTypes": ["Ingress"]},
}


def test_a_pod_that_no_policy_selects_is_open_and_one_that_is_selected_is_shut():
    world, pod = Endpoint(address="203.0.113.7"), Endpoint("a", {"x": "1"})
    assert allowed([], world, pod, 80)
    assert not allowed([POLICY], world, pod, 80)
    assert allowed([POLICY], world, Endpoint("a", {"x": "2"}), 80)
    assert allowed([POLICY], pod, world, 80), "only the way in is judged"


@pytest.mark.parametrize(
    ("peer", "address", "passes"),
    [
        ({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}, "10.2.0.1", True),
        ({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}, "10.1.0.1", False),
    ],
)
def test_a_range_has_holes(peer: dict[str, Any], address: str, passes: bool):  # noqa: FBT001
    spec = {**POLICY["spec"], "ingress": [{"from": [peer]}]}
    assert allowed([{**POLICY, "spec": spec}], Endpoint(address=address), Endpoint("a", {"x": "1"}), 80) is passes


@pytest.mark.parametrize(
    ("term", "passes"),
    [
        ({"key": "y", "operator": "In", "values": ["1"]}, True),
        ({"key": "y", "operator": "NotIn", "values": ["1"]}, False),
        ({"key": "y", "operator": "Exists"}, True),
        ({"key": "y", "operator": "DoesNotExist"}, False),
    ],
)
def test_expressions_select_as_kubernetes_says(term: dict[str, Any], passes: bool):  # noqa: FBT001
    spec = {**POLICY["spec"], "ingress": [{"from": [{"podSelector": {"matchExpressions": [term]}}]}]}
    source = Endpoint("a", {"y": "1"})
    assert allowed([{**POLICY, "spec": spec}], source, Endpoint("a", {"x": "1"}), 80) is passes


def test_an_operator_that_is_not_known_is_no_guess():
    spec = {
        **POLICY["spec"],
        "ingress": [{"from": [{"podSelector": {"matchExpressions": [{"key": "y", "operator": "Gt"}]}}]}],
    }
    with pytest.raises(ValueError, match="Gt"):
        allowed([{**POLICY, "spec": spec}], Endpoint("a"), Endpoint("a", {"x": "1"}), 80)
