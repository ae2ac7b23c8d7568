"""Which sites there are, which addresses and names belong to each, and what is wrong with them.

Pure arithmetic on values that `infra.config` has already read: nothing here knows Pulumi, AWS's API or a file. A second
region or an edge site is one more `Site`.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from workloads.contract.sites import SiteKind

PRIVATE_RANGES: Final = tuple(
    IPv4Network(n) for n in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10")
)
"""RFC 1918, and RFC 6598 which AWS accepts for a VPC too."""

VPC_PREFIXES: Final = (16, 22)
"""A VPC is cut into four quarters (three zones, one for public subnets); AWS takes no subnet smaller than a /28."""

PRIVATE_ASNS: Final = ((64_512, 65_534), (4_200_000_000, 4_294_967_294))
"""RFC 6996."""

ASN_FORM: Final = "a private ASN, 64512-65534 or 4200000000-4294967294, different for each site"

AWS_SUBNET_RESERVED: Final = 5
"""Addresses of every subnet that AWS keeps: network, router, DNS, future use, broadcast."""

NODE_PREFIX: Final = 24
"""The slice of the pod range that each node gets (k3s: node-cidr-mask-size)."""

PROJECT: Final = "rankbridge"


@dataclasses.dataclass(frozen=True)
class Fault:
    """One wrong value in a stack file, and what it may be instead. `value` is already safe to print."""

    key: str
    value: str
    allowed: str

    def __str__(self) -> str:
        """`key = value: must be allowed`."""
        return f"{self.key} = {self.value}: must be {self.allowed}"


class FaultsError(ValueError):
    """Everything that is wrong with a stack's configuration, in one message."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        lines = "\n".join(f"  {fault}" for fault in self.faults)
        super().__init__(f"{len(self.faults)} fault(s) in the stack's configuration; nothing was touched:\n{lines}")


@dataclasses.dataclass(frozen=True)
class Site:
    """A place that holds nodes. `region` is an AWS region for a cloud site and a label elsewhere."""

    name: str
    kind: SiteKind
    region: str
    cidr: IPv4Network
    asn: int
    zones: tuple[str, ...] = ()
    """Availability zones, cloud only."""
    router: IPv4Address | None = None
    """Public address of the VPN router, home and edge only."""

    @property
    def is_cloud(self) -> bool:
        """Whether the site is a VPC."""
        return self.kind is SiteKind.CLOUD

    def labels(self, zone: str | None = None) -> dict[str, str]:
        """Node labels that place a node: by the well-known topology keys, and by our own site name."""
        return {
            "topology.kubernetes.io/region": self.region,
            "topology.kubernetes.io/zone": zone or f"{self.region}-{self.name}",
            "rankbridge.io/site": self.name,
        }


@dataclasses.dataclass(frozen=True)
class Subnet:
    """One subnet of a VPC."""

    name: str
    zone: str
    cidr: IPv4Network

    @property
    def usable(self) -> int:
        """Addresses that instances and endpoints may have."""
        return self.cidr.num_addresses - AWS_SUBNET_RESERVED


@dataclasses.dataclass(frozen=True)
class VpcPlan:
    """How a cloud site's range is cut: a quarter per zone for nodes, the last quarter for public subnets."""

    site: Site
    private: tuple[Subnet, ...]
    public: tuple[Subnet, ...]

    @property
    def resolver(self) -> IPv4Address:
        """The VPC's DNS resolver: network address plus two."""
        return self.site.cidr.network_address + 2


def vpc_plan(site: Site) -> VpcPlan:
    """Cut the range of a cloud site with two or three zones."""
    quarters = list(site.cidr.subnets(prefixlen_diff=2))
    public = list(quarters[3].subnets(prefixlen_diff=4))
    return VpcPlan(
        site=site,
        private=tuple(
            Subnet(f"private-{zone}", zone, cidr) for zone, cidr in zip(site.zones, quarters[:3], strict=False)
        ),
        public=tuple(Subnet(f"public-{zone}", zone, cidr) for zone, cidr in zip(site.zones, public, strict=False)),
    )


@dataclasses.dataclass(frozen=True)
class Names:
    """The one scheme of names and tags of an environment."""

    environment: str
    owner: str

    @property
    def prefix(self) -> str:
        """What every named resource starts with."""
        return f"{PROJECT}-{self.environment}"

    def of(self, *parts: str) -> str:
        """A resource's name in the account."""
        return "-".join((self.prefix, *parts))

    def path(self, *parts: str) -> str:
        """The path of a parameter or secret."""
        return "/" + "/".join((PROJECT, self.environment, *parts))

    def tags(self, name: str, *, site: str = "shared", **more: str) -> dict[str, str]:
        """Tags that every taggable resource carries (`infra.rules` holds this)."""
        return {
            "Name": self.of(name) if not name.startswith(self.prefix) else name,
            "project": PROJECT,
            "environment": self.environment,
            "owner": self.owner,
            "site": site,
            "managed-by": "pulumi",
            **more,
        }


REQUIRED_TAGS: Final = ("Name", "project", "environment", "owner", "site", "managed-by")


def is_private(network: IPv4Network) -> bool:
    """Whether a range lies in private address space."""
    return any(network.subnet_of(block) for block in PRIVATE_RANGES)


def is_private_asn(asn: int) -> bool:
    """Whether RFC 6996 sets an ASN aside for private use."""
    return any(low <= asn <= high for low, high in PRIVATE_ASNS)


def overlap_faults(ranges: Sequence[tuple[str, IPv4Network]]) -> list[Fault]:
    """One fault for each pair of (key, range) that share an address, named after the later key."""
    return [
        Fault(later, str(later_range), f"a range that does not overlap {earlier} ({earlier_range})")
        for (earlier, earlier_range), (later, later_range) in itertools.combinations(ranges, 2)
        if earlier_range.overlaps(later_range)
    ]


def repeated(values: Iterable[tuple[str, object]], allowed: str) -> list[Fault]:
    """A fault for each (key, value) whose value an earlier key already has."""
    seen: dict[object, str] = {}
    faults = []
    for key, value in values:
        if value in seen:
            faults.append(Fault(key, str(value), f"{allowed} (also given in {seen[value]})"))
        seen.setdefault(value, key)
    return faults


def zone_faults(key: str, region: str, zones: Sequence[str]) -> list[Fault]:
    """What is wrong with a cloud site's zones."""
    form = f"2 or 3 different zones of {region}, such as {region}a"
    wrong = [z for z in zones if not re.fullmatch(re.escape(region) + r"[a-z]", z)]
    if wrong or not 2 <= len(zones) <= 3 or len(set(zones)) != len(zones):
        return [Fault(key, ", ".join(zones) or "none", form)]
    return []


def site_faults(keyed: Sequence[tuple[str, Site]]) -> list[Fault]:
    """What the sites get wrong together: exactly one home, a cloud, names and ASNs that differ."""
    faults = []
    kinds = [site.kind for _, site in keyed]
    if kinds.count(SiteKind.HOME) != 1:
        faults.append(Fault("sites", f"{kinds.count(SiteKind.HOME)} of kind home", "a list with exactly one home"))
    if SiteKind.CLOUD not in kinds:
        faults.append(Fault("sites", "none of kind cloud", "a list with at least one cloud site"))
    faults += repeated([(f"{key}.name", site.name) for key, site in keyed], "a name of its own")
    faults += repeated([(f"{key}.asn", site.asn) for key, site in keyed], ASN_FORM)
    return faults


def node_room(pods: IPv4Network) -> int:
    """How many nodes the pod range has a slice for."""
    return int(2 ** (NODE_PREFIX - pods.prefixlen)) if pods.prefixlen <= NODE_PREFIX else 0
