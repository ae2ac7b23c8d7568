"""Who may talk to whom: one table, rendered as NetworkPolicies, and an evaluator that judges policies against it.

Everything that is not in `TABLE` is refused in both directions. Nodes played for tests enforce nothing, so `allowed`
says what Kubernetes' documentation says a policy does (https://kubernetes.io/docs/concepts/services-networking/
network-policies/). Pure: manifests are mappings as the API takes them.
"""

from __future__ import annotations

import dataclasses
import enum
import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from workloads.contract.sites import PORTS, Listener, SiteKind

SERVING: Final = "rankbridge"
JOBS: Final = "rankbridge-jobs"
PLATFORM: Final = "rankbridge-platform"
DEVICES: Final = "rankbridge-devices"
ROLE_LABEL: Final = "rankbridge.io/role"
SITE_LABEL: Final = "rankbridge.io/site"
NAMESPACE_LABEL: Final = "kubernetes.io/metadata.name"

Manifest = Mapping[str, Any]


class Party(enum.StrEnum):
    """Whoever sends or gets packets."""

    GATEWAY = "gateway"
    RETRIEVAL = "retrieval"
    TRITON = "triton"
    FEATURE_STORE = "feature-store"
    INTAKE = "intake"
    TRAINING = "training"
    INDEX = "index"
    TENSORRT = "tensorrt"
    EVALUATION = "evaluation"
    LOAD_MASTER = "load-master"
    LOAD_WORKER = "load-worker"
    AUTOSCALER = "cluster-autoscaler"
    HYGIENE = "node-hygiene"
    SPOT = "spot-handler"
    DEVICE_PLUGIN = "device-plugin"
    INGRESS = "ingress"
    PROMETHEUS = "prometheus"
    DNS = "dns"
    API = "api"
    AWS = "aws"


NAMESPACES: Final[Mapping[Party, str]] = {
    **dict.fromkeys((Party.GATEWAY, Party.RETRIEVAL, Party.TRITON, Party.FEATURE_STORE, Party.INTAKE), SERVING),
    **dict.fromkeys(
        (Party.TRAINING, Party.INDEX, Party.TENSORRT, Party.EVALUATION, Party.LOAD_MASTER, Party.LOAD_WORKER), JOBS
    ),
    **dict.fromkeys((Party.AUTOSCALER, Party.HYGIENE, Party.SPOT), PLATFORM),
    Party.DEVICE_PLUGIN: DEVICES,
}
"""Our own parties, each under policies of its namespace."""

OTHERS: Final[Mapping[Party, tuple[str, Mapping[str, str]]]] = {
    Party.INGRESS: ("kube-system", {"app.kubernetes.io/name": "traefik"}),
    Party.PROMETHEUS: ("monitoring", {"app.kubernetes.io/name": "prometheus"}),
    Party.DNS: ("kube-system", {"k8s-app": "kube-dns"}),
}
"""Pods that are the cluster's: namespace and labels."""

OUTSIDE: Final = (Party.API, Party.AWS)
"""Known by address only."""


class Reach(enum.StrEnum):
    """Between which sites an edge runs."""

    SITE = "its own site"
    RANKING = "the site that ranks for it"
    HOME = "home"
    ANY = "any site"


@dataclasses.dataclass(frozen=True)
class Port:
    """A port, or a range up to `end`."""

    number: int
    protocol: str = "TCP"
    end: int | None = None

    def has(self, number: int, protocol: str) -> bool:
        """Whether a packet to this port is meant."""
        return protocol == self.protocol and self.number <= number <= (self.end or self.number)

    def manifest(self) -> dict[str, Any]:
        """As a NetworkPolicyPort."""
        found: dict[str, Any] = {"protocol": self.protocol, "port": self.number}
        return found | ({"endPort": self.end} if self.end else {})


@dataclasses.dataclass(frozen=True)
class Edge:
    """Some may ask some at some ports."""

    source: Party
    target: Party
    ports: tuple[Port, ...]
    reach: Reach
    why: str


REDIS_PORT: Final = 6379
LOCUST_PORT: Final = 5557
TORCHRUN_PORT: Final = 29_500
API_PORT: Final = 6443


def _at(*listeners: Listener) -> tuple[Port, ...]:
    return tuple(Port(PORTS[listener]) for listener in listeners)


_DNS: Final = (Port(53, "UDP"), Port(53))
_HTTPS: Final = (Port(443),)
_METRICS: Final[Mapping[Party, tuple[Port, ...]]] = {
    Party.GATEWAY: _at(Listener.GATEWAY, Listener.AGENT),
    Party.RETRIEVAL: _at(Listener.RETRIEVAL, Listener.AGENT),
    Party.TRITON: _at(Listener.TRITON_METRICS, Listener.AGENT),
    Party.INTAKE: _at(Listener.INTAKE, Listener.FEEDBACK),
}
_WITH_AWS: Final = (
    Party.GATEWAY,
    Party.RETRIEVAL,
    Party.TRITON,
    Party.TRAINING,
    Party.INDEX,
    Party.TENSORRT,
    Party.EVALUATION,
    Party.AUTOSCALER,
    Party.HYGIENE,
    Party.SPOT,
)
_WITH_API: Final = (Party.AUTOSCALER, Party.HYGIENE, Party.SPOT)
_SILENT: Final = (Party.FEATURE_STORE, Party.DEVICE_PLUGIN)
"""Ask nobody anything, not even for a name."""

TABLE: Final[tuple[Edge, ...]] = (
    Edge(Party.INGRESS, Party.GATEWAY, _at(Listener.GATEWAY), Reach.ANY, "clients"),
    Edge(Party.GATEWAY, Party.RETRIEVAL, _at(Listener.RETRIEVAL), Reach.SITE, "candidates"),
    Edge(Party.GATEWAY, Party.TRITON, _at(Listener.TRITON_HTTP), Reach.RANKING, "ranking, and its agent"),
    Edge(Party.RETRIEVAL, Party.TRITON, _at(Listener.TRITON_HTTP), Reach.RANKING, "its agent"),
    Edge(Party.GATEWAY, Party.GATEWAY, _at(Listener.GATEWAY), Reach.ANY, "ranking for another site"),
    Edge(Party.GATEWAY, Party.INTAKE, _at(Listener.INTAKE), Reach.HOME, "events"),
    Edge(Party.GATEWAY, Party.FEATURE_STORE, (Port(REDIS_PORT),), Reach.SITE, "profiles, home only"),
    Edge(Party.INTAKE, Party.FEATURE_STORE, (Port(REDIS_PORT),), Reach.SITE, "feedback beside the intake"),
    Edge(Party.TRAINING, Party.TRAINING, (Port(1024, end=65_535),), Reach.SITE, "torchrun and its collectives"),
    Edge(Party.LOAD_WORKER, Party.LOAD_MASTER, (Port(LOCUST_PORT),), Reach.SITE, "locust"),
    Edge(Party.LOAD_WORKER, Party.GATEWAY, _at(Listener.GATEWAY), Reach.ANY, "load"),
    *(Edge(Party.PROMETHEUS, p, ports, Reach.ANY, "metrics") for p, ports in _METRICS.items()),
    *(Edge(p, Party.AWS, _HTTPS, Reach.ANY, "its role and what it may do") for p in _WITH_AWS),
    *(Edge(p, Party.API, (Port(API_PORT), Port(443)), Reach.ANY, "nodes and pods") for p in _WITH_API),
    *(Edge(p, Party.DNS, _DNS, Reach.ANY, "names") for p in NAMESPACES if p not in _SILENT),
)
"""Every edge there is."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A site as the table needs to know it."""

    name: str
    kind: SiteKind
    ranks_at: str


@dataclasses.dataclass(frozen=True)
class World:
    """The sites, and the ranges in which the cluster's API and AWS are."""

    places: tuple[Place, ...]
    api: tuple[str, ...]
    aws: tuple[str, ...]
    """Ranges of the cloud sites, where AWS's interface endpoints are; or an emulator's."""
    aws_port: int = 443

    def outside(self, party: Party) -> tuple[str, ...]:
        """The ranges of a party that is known by address only."""
        return self.api if party is Party.API else self.aws

    def ports(self, edge: Edge) -> tuple[Port, ...]:
        """Ports of an edge here: an emulator of AWS has another than 443."""
        return (Port(self.aws_port),) if edge.target is Party.AWS else edge.ports

    def targets(self, edge: Edge, source: str) -> tuple[str, ...]:
        """Names of the sites that a source at a site reaches by an edge."""
        here = next((p for p in self.places if p.name == source), None)
        match edge.reach:
            case Reach.ANY:
                return tuple(p.name for p in self.places)
            case Reach.HOME:
                return tuple(p.name for p in self.places if p.kind is SiteKind.HOME)
            case Reach.RANKING:
                return (here.ranks_at,) if here else ()
            case Reach.SITE:
                return (source,)

    def is_meant(self, edge: Edge, source: str, target: str) -> bool:
        """Whether an edge runs from one site to another."""
        return target in self.targets(edge, source)


# Rendering


def labels(party: Party, site: str) -> dict[str, str]:
    """What tells a pod's party and site."""
    return {ROLE_LABEL: party.value, SITE_LABEL: site}


def default_deny() -> Any:  # noqa: ANN401 -- a manifest, as an SDK's typed input takes it
    """Spec of the policy that shuts a namespace, both ways."""
    return {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def policy(world: World, party: Party, site: str) -> dict[str, Any]:
    """Spec of the policy that opens the table's edges for a party's pods at a site."""
    egress = []
    for edge in (e for e in TABLE if e.source is party):
        peers = _peers(world, edge.target, world.targets(edge, site), NAMESPACES[party])
        if peers:
            egress.append({"to": peers, "ports": [p.manifest() for p in world.ports(edge)]})
    ingress = []
    for edge in (e for e in TABLE if e.target is party):
        sources = tuple(p.name for p in world.places if world.is_meant(edge, p.name, site))
        if edge.source in OTHERS or sources:
            peers = _peers(world, edge.source, sources, NAMESPACES[party])
            ingress.append({"from": peers, "ports": [p.manifest() for p in world.ports(edge)]})
    # An empty list is dropped by the API server, and every apply of one makes a new generation.
    rules = {"ingress": ingress, "egress": egress}
    return {
        "podSelector": {"matchLabels": labels(party, site)},
        "policyTypes": ["Ingress", "Egress"],
        **{way: some for way, some in rules.items() if some},
    }


def _peers(world: World, party: Party, sites: Sequence[str], namespace: str) -> list[dict[str, Any]]:
    if party in OUTSIDE:
        return [{"ipBlock": {"cidr": cidr}} for cidr in world.outside(party)]
    if party in OTHERS:
        where, marks = OTHERS[party]
        return [
            {
                "namespaceSelector": {"matchLabels": {NAMESPACE_LABEL: where}},
                "podSelector": {"matchLabels": dict(marks)},
            }
        ]
    where = NAMESPACES[party]
    elsewhere = {} if where == namespace else {"namespaceSelector": {"matchLabels": {NAMESPACE_LABEL: where}}}
    return [{**elsewhere, "podSelector": {"matchLabels": labels(party, site)}} for site in sites]


# Judging


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """One end of a packet: a pod of a namespace, or only an address."""

    namespace: str = ""
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    address: str = ""

    @property
    def namespace_labels(self) -> Mapping[str, str]:
        """The label that every namespace has."""
        return {NAMESPACE_LABEL: self.namespace}


def allowed(policies: Iterable[Manifest], source: Endpoint, target: Endpoint, port: int, protocol: str = "TCP") -> bool:
    """Whether NetworkPolicy manifests let a packet through: the source's out, and the target's in."""
    known = list(policies)
    return _passes(known, source, target, port, protocol, "Egress") and _passes(
        known, target, source, port, protocol, "Ingress"
    )


def _passes(  # noqa: PLR0917 -- a packet and the end that is judged, inside this module only
    policies: Sequence[Manifest], own: Endpoint, other: Endpoint, port: int, protocol: str, way: str
) -> bool:
    if not own.namespace:
        return True
    rules, peers = ("egress", "to") if way == "Egress" else ("ingress", "from")
    bound = [
        p["spec"]
        for p in policies
        if p["metadata"]["namespace"] == own.namespace
        and way in p["spec"].get("policyTypes", ["Ingress"])
        and _selects(p["spec"].get("podSelector"), own.labels)
    ]
    if not bound:
        return True
    return any(
        _is_port(rule.get("ports"), port, protocol) and _is_peer(rule.get(peers), other, own.namespace)
        for spec in bound
        for rule in spec.get(rules) or ()
    )


def _is_port(ports: Sequence[Manifest] | None, port: int, protocol: str) -> bool:
    if not ports:
        return True
    for one in ports:
        if one.get("protocol", "TCP") != protocol:
            continue
        low = one.get("port")
        if low is None or low <= port <= one.get("endPort", low):
            return True
    return False


def _is_peer(peers: Sequence[Manifest] | None, other: Endpoint, namespace: str) -> bool:
    return not peers or any(_matches(peer, other, namespace) for peer in peers)


def _matches(peer: Manifest, other: Endpoint, namespace: str) -> bool:
    if "ipBlock" in peer:
        if not other.address:
            return False
        address, block = ipaddress.ip_address(other.address), peer["ipBlock"]
        return address in ipaddress.ip_network(block["cidr"]) and not any(
            address in ipaddress.ip_network(hole) for hole in block.get("except") or ()
        )
    if not other.namespace:
        return False
    if "namespaceSelector" in peer:
        if not _selects(peer["namespaceSelector"], other.namespace_labels):
            return False
    elif other.namespace != namespace:
        return False
    return "podSelector" not in peer or _selects(peer["podSelector"], other.labels)


def _selects(selector: Manifest | None, found: Mapping[str, str]) -> bool:
    """Whether a label selector selects; an empty one selects all. Raises ValueError for an operator that it lacks."""
    selector = selector or {}
    if any(found.get(k) != v for k, v in (selector.get("matchLabels") or {}).items()):
        return False
    for term in selector.get("matchExpressions") or ():
        value, wanted = found.get(term["key"]), term.get("values") or ()
        match term["operator"]:
            case "In":
                fits = value in wanted
            case "NotIn":
                fits = value not in wanted
            case "Exists":
                fits = value is not None
            case "DoesNotExist":
                fits = value is None
            case operator:
                raise ValueError(f"no such operator of a selector: {operator}")
        if not fits:
            return False
    return True


def is_in_table(world: World, source: tuple[Party, str], target: tuple[Party, str], port: int, protocol: str) -> bool:
    """Whether the table names an edge from one (party, site) to another at a port. Sites of others do not matter."""
    (asks, at), (answers, there) = source, target
    for edge in TABLE:
        if edge.source is not asks or edge.target is not answers:
            continue
        ours = asks in NAMESPACES and answers in NAMESPACES
        if ours and not world.is_meant(edge, at, there):
            continue
        if any(p.has(port, protocol) for p in world.ports(edge)):
            return True
    return False
