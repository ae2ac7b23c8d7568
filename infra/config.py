"""A foundation stack's configuration: read from the stack file's values, typed and frozen, or refused whole.

`read` takes the raw strings of one stack and gives a `FoundationConfig`, or raises `FaultsError` with every fault.
Secrets are checked where they lie and are no part of the result: the program gets them by `require_secret` only, and no
message holds one. Pure: the caller says what the stack file says; nothing here knows Pulumi, files or the environment.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import re
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from infra import plan
from infra.plan import Fault, FaultsError, Site
from infra.reading import NOWHERE, Reader, as_network
from infra.vpn import plan as vpn_plan
from infra.vpn.plan import Cipher, DhGroup, Link, Transport
from workloads.contract.sites import SiteKind

NOT_SHOWN: Final = "<not shown>"
LAYER: Final = "foundation"
_NAME: Final = r"[a-z][a-z0-9-]{0,18}[a-z0-9]"
_NAME_FORM: Final = "2 to 20 lower-case letters, digits or hyphens, beginning with a letter"
_REGION: Final = r"[a-z]{2}(-[a-z]+)+-\d"
_SHA256: Final = r"[0-9a-f]{64}"
_INSTANCE_TYPE: Final = r"[a-z0-9-]+\.[a-z0-9]+"
_TOKEN: Final = re.compile(r"[A-Za-z0-9._-]{32,128}")
_PEM: Final = re.compile(r"-----BEGIN CERTIFICATE-----\n[A-Za-z0-9+/=\n]+-----END CERTIFICATE-----\n?")
_SSH_KEY: Final = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----\n[A-Za-z0-9+/=\n]+-----END [A-Z ]*PRIVATE KEY-----\n?"
)

INTERFACE_ENDPOINTS: Final = (
    "autoscaling",
    "ec2",
    "ec2messages",
    "ecr.api",
    "ecr.dkr",
    "kms",
    "logs",
    "secretsmanager",
    "sqs",
    "ssm",
    "ssmmessages",
    "sts",
)
"""Services that may be reached by an interface endpoint inside a VPC. S3's two endpoints are always there."""


class Egress(enum.StrEnum):
    """How nodes of a VPC reach the internet; with none, everything comes through endpoints and the VPN."""

    NONE = "none"
    NAT_SINGLE = "nat-single"
    NAT_PER_ZONE = "nat-per-zone"


class Attach(enum.StrEnum):
    """What a VPN connection ends at in AWS."""

    VIRTUAL_PRIVATE_GATEWAY = "virtual-private-gateway"
    TRANSIT_GATEWAY = "transit-gateway"


class Routes(enum.StrEnum):
    """How a VPC's route tables learn the private ranges."""

    PROPAGATED = "propagated"
    STATIC = "static"


class Trust(enum.StrEnum):
    """Who may take the workload roles: holders of a certificate, or (emulator only) the account itself."""

    ROLES_ANYWHERE = "roles-anywhere"
    ACCOUNT = "account"


class HostRole(enum.StrEnum):
    """What k3s runs as on a host."""

    SERVER = "server"
    AGENT = "agent"


@dataclasses.dataclass(frozen=True)
class Emulator:
    """An AWS that is not AWS. Its presence is what allows the checks to be switched off that it cannot pass."""

    endpoint: str


@dataclasses.dataclass(frozen=True)
class CloudSite:
    """What a cloud site has beyond its network."""

    site: Site
    egress: Egress
    egress_cidrs: tuple[IPv4Network, ...]
    """Ranges outside that nodes may reach over HTTPS; never everything."""
    endpoints: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Network:
    """Ranges and sizes that all sites share."""

    pods: IPv4Network
    services: IPv4Network
    path_mtu: int
    mtu: int


@dataclasses.dataclass(frozen=True)
class Vpn:
    """The VPN's switches; the tunnels themselves are `FoundationConfig.links`."""

    attach: Attach
    routes: Routes
    verify_xml: bool
    nat_traversal: bool
    transport: Transport


@dataclasses.dataclass(frozen=True)
class GpuType:
    """An instance type that may be asked for: how many GPUs it has and where it exists."""

    name: str
    gpus: int
    regions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class NodeGroup:
    """One Auto Scaling group of GPU nodes.

    AWS takes no warm pool on a group with a mixed-instances policy or spot instances, so `warm_pool > 0` means one
    on-demand type; anything else is a mixed group.
    """

    name: str
    site: str
    types: tuple[GpuType, ...]
    minimum: int
    maximum: int
    on_demand_base: int
    spot_percent: int
    """Share of spot above the on-demand base."""
    warm_pool: int
    volume_gib: int
    image_parameter: str | None
    """SSM parameter that names the AMI; exactly one of this and `image_id` is set."""
    image_id: str | None

    @property
    def is_mixed(self) -> bool:
        """Whether the group buys several types or spot."""
        return self.warm_pool == 0

    @property
    def root_device(self) -> str:
        """The image's root volume: under another name a second volume would be made, and the root left unencrypted."""
        amazon_linux = re.search(r"al2023|amazon-linux", self.image_parameter or "")
        return "/dev/xvda" if amazon_linux else "/dev/sda1"


@dataclasses.dataclass(frozen=True)
class K3s:
    """The one k3s that all nodes run."""

    version: str
    sha256: str
    api: IPv4Address
    """Address of the Kubernetes API in the home range: a virtual address, a balancer or the only server."""

    @property
    def binary_url(self) -> str:
        """Where the release is published."""
        return f"https://github.com/k3s-io/k3s/releases/download/{self.version.replace('+', '%2B')}/k3s"


@dataclasses.dataclass(frozen=True)
class Host:
    """A machine at a private site that k3s is installed on over SSH."""

    name: str
    address: IPv4Address
    role: HostRole
    site: Site


@dataclasses.dataclass(frozen=True)
class OnPrem:
    """The private machines; none in local, where the files are rendered and tested only."""

    hosts: tuple[Host, ...]
    ssh_user: str
    ssh_host_keys: Mapping[str, str]
    """Public host key by host name, so that the first connection is not a guess."""
    airgap: bool
    """The operator has put the k3s binary and image archive on each host; nothing is downloaded."""

    @property
    def servers(self) -> tuple[Host, ...]:
        """Hosts of the control plane, in the order they join."""
        return tuple(h for h in self.hosts if h.role is HostRole.SERVER)

    @property
    def agents(self) -> tuple[Host, ...]:
        """Hosts that only run pods."""
        return tuple(h for h in self.hosts if h.role is HostRole.AGENT)


@dataclasses.dataclass(frozen=True)
class Storage:
    """Buckets and how long things stay in them."""

    region: str
    lock_days: int
    """Object Lock of published models, governance mode."""
    snapshot_days: int
    log_days: int
    replica_region: str | None
    force_destroy: bool
    """Whether `destroy` empties buckets and forgets secrets at once; throw-away environments only."""


@dataclasses.dataclass(frozen=True)
class Identity:
    """Who workloads outside AWS are."""

    trust: Trust
    trust_anchor: str | None
    """PEM of the CA whose certificates workloads hold."""


@dataclasses.dataclass(frozen=True)
class Alarms:
    """Whom to tell, and about how much money."""

    email: str | None
    budget_usd: int | None
    """None only on an emulator, which cannot hold a budget's subscribers."""


@dataclasses.dataclass(frozen=True)
class FoundationConfig:
    """Everything a foundation stack is told, checked."""

    environment: str
    account: str
    owner: str
    emulator: Emulator | None
    sites: tuple[Site, ...]
    clouds: tuple[CloudSite, ...]
    network: Network
    vpn: Vpn
    links: tuple[Link, ...]
    node_groups: tuple[NodeGroup, ...]
    k3s: K3s
    onprem: OnPrem
    storage: Storage
    identity: Identity
    repositories: tuple[str, ...]
    alarms: Alarms

    @property
    def home(self) -> Site:
        """The site with the control plane."""
        return next(s for s in self.sites if s.kind is SiteKind.HOME)

    @property
    def names(self) -> plan.Names:
        """The environment's naming scheme."""
        return plan.Names(self.environment, self.owner)

    def emulator_forgets(self, *properties: str) -> list[str] | None:
        """Properties that an emulator answers otherwise than they were set: no change of ours there, and only there.

        tests/infra/test_emulator.py shows each of them.
        """
        return list(properties) if self.emulator is not None else None

    @property
    def secret_keys(self) -> tuple[str, ...]:
        """Stack secrets that the program will require."""
        return required_secrets(self.links, has_hosts=bool(self.onprem.hosts))


def required_secrets(links: Sequence[Link], *, has_hosts: bool) -> tuple[str, ...]:
    """Names of the secrets that a stack with these links and hosts must hold."""
    keys = [key for link in links for key in link.psk_keys]
    keys += ["k3s-server-token", "k3s-agent-token"]
    return (*keys, "ssh-private-key") if has_hosts else tuple(keys)


def read(
    stack: str, values: Mapping[str, str], secrets: frozenset[str] = frozenset(), *, namespace: str = plan.PROJECT
) -> FoundationConfig:
    """The configuration of `stack` from its raw values (`namespace:key` -> string, structured ones as JSON).

    `secrets` names the keys that the stack file holds encrypted. Raises FaultsError with everything that is wrong.
    """
    faults: list[Fault] = []
    own = {k.partition(":")[2]: v for k, v in values.items() if k.startswith(f"{namespace}:")}
    encrypted = {k.partition(":")[2] for k in secrets if k.startswith(f"{namespace}:")}
    environment = _environment(stack, faults)

    plain: dict[str, object] = {}
    secret_like = {k for k in own if k.startswith(("psk-", "k3s-", "ssh-"))}
    for key, value in own.items():
        if key in secret_like:
            continue
        if key in encrypted:
            faults.append(Fault(key, NOT_SHOWN, "plain text: it is no secret, and secrets have keys of their own"))
            continue
        plain[key] = _decoded(value)
    root = Reader("", plain, faults)

    emulator = _emulator(root, environment)
    account = root.text("account", r"\d{12}", "the 12 digits of the AWS account, in quotes")
    owner = root.text("owner", r"[A-Za-z0-9][A-Za-z0-9 ._@-]{0,63}", "a team's name, 1 to 64 letters or digits")
    keyed_sites, clouds = _sites(root)
    sites = tuple(site for _, site in keyed_sites)
    network, vpn, inside = _network_and_vpn(root, keyed_sites, emulator)
    regions = {c.site.name: c.site.region for c in clouds}
    groups = _node_groups(root, regions, clouds)
    k3s = _k3s(root, sites, emulator)
    onprem = _onprem(root, sites)
    storage = _storage(root, tuple(regions.values()), emulator)
    identity = _identity(root, emulator)
    repositories = root.texts("repositories", r"[a-z][a-z0-9-]{0,39}[a-z0-9]", "a list of different image names")
    alarms = _alarms(root, emulator)
    root.finish()

    # A node anywhere takes a slice of the pod range.
    nodes = sum(g.maximum + g.warm_pool for g in groups) + len(onprem.hosts)
    if network.pods != NOWHERE and nodes > plan.node_room(network.pods):
        allowed = f"large enough for {nodes} nodes with a /{plan.NODE_PREFIX} each"
        faults.append(Fault("network.pods", str(network.pods), allowed))

    links = vpn_plan.links(sites, inside) if len(inside) == len(vpn_plan.pairs(sites)) else ()
    required = required_secrets(links, has_hosts=bool(onprem.hosts))
    faults += _secret_faults(own, encrypted, required, namespace=namespace)
    if links or not inside:
        for key in sorted(secret_like - set(required)):
            faults.append(Fault(key, NOT_SHOWN, "removed (unknown key), or one of: " + ", ".join(required)))
    if faults:
        raise FaultsError(faults)
    return FoundationConfig(
        environment=environment,
        account=account,
        owner=owner,
        emulator=emulator,
        sites=sites,
        clouds=clouds,
        network=network,
        vpn=vpn,
        links=links,
        node_groups=groups,
        k3s=k3s,
        onprem=onprem,
        storage=storage,
        identity=identity,
        repositories=repositories,
        alarms=alarms,
    )


def _decoded(value: str) -> object:
    """A value as the stack file had it: structured values and booleans reach the program as JSON."""
    if value[:1] in "[{" or value in ("true", "false"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _environment(stack: str, faults: list[Fault]) -> str:
    layer, _, environment = stack.partition("-")
    if layer != LAYER or not re.fullmatch(_NAME, environment):
        faults.append(Fault("stack", stack, f"named {LAYER}-<environment>, the environment {_NAME_FORM}"))
        return "unknown"
    return environment


def _emulator(root: Reader, environment: str) -> Emulator | None:
    if not root.has("emulator"):
        return None
    section = root.section("emulator")
    endpoint = section.text(
        "endpoint", r"http://[a-z0-9.-]+:\d{2,5}", "http://<host>:<port> of the emulator, such as http://127.0.0.1:4566"
    )
    section.finish()
    if environment != "local":
        root.fault("emulator", endpoint, "removed: only foundation-local may run on an emulator")
    return Emulator(endpoint)


def _sites(root: Reader) -> tuple[list[tuple[str, Site]], tuple[CloudSite, ...]]:
    keyed: list[tuple[str, Site]] = []
    clouds: list[CloudSite] = []
    for entry in root.sections("sites"):
        before = len(root.faults)
        name = entry.text("name", _NAME, _NAME_FORM)
        kind = entry.choice("kind", SiteKind, SiteKind.EDGE)
        if not entry.has("kind"):
            entry.fault("kind", None, "one of " + ", ".join(k.value for k in SiteKind))
        low, high = plan.VPC_PREFIXES if kind is SiteKind.CLOUD else (8, 28)
        cidr = entry.network(
            "cidr",
            f"a private IPv4 range (RFC 1918 or 100.64.0.0/10), /{low} to /{high}, without host bits",
            lambda n, low=low, high=high: plan.is_private(n) and low <= n.prefixlen <= high,  # type: ignore[misc]
            # (mypy cannot infer a lambda whose defaults bind the loop's variables)
        )
        asn = entry.parsed(
            "asn",
            lambda v: v if isinstance(v, int) and plan.is_private_asn(v) else None,
            plan.ASN_FORM,
            0,
            optional=False,
        )
        if kind is SiteKind.CLOUD:
            region = entry.text("region", _REGION, "an AWS region such as eu-central-1")
            zones = entry.texts("zones", r"[a-z0-9-]+", "a list of different availability zones", optional=False)
            if zones and region:
                root.faults += plan.zone_faults(entry.key("zones"), region, zones)
            router = None
        else:
            region = entry.text(
                "region", r"[a-z0-9][a-z0-9-]{0,61}", "a label: lower-case letters, digits, hyphens", name
            )
            zones = ()
            router = entry.address("router", "the public IPv4 address of the site's VPN router")
            if entry.has("router") and (
                router.is_multicast or router.is_loopback or plan.is_private(IPv4Network(router))
            ):
                entry.fault("router", router, "a public IPv4 address: AWS sees nothing else")
        site = Site(name, kind, region, cidr, asn, zones, router)
        if kind is SiteKind.CLOUD:
            clouds.append(_cloud(entry, site))
        entry.finish()
        # Comparing sites with each other makes sense only for those that are right on their own.
        if len(root.faults) == before:
            keyed.append((entry.path, site))
    if len(keyed) == len(root.sections("sites", optional=True)):
        root.faults += plan.site_faults(keyed)
    else:
        root.faults += plan.repeated([(f"{k}.asn", s.asn) for k, s in keyed], plan.ASN_FORM)
    return keyed, tuple(c for c in clouds if any(c.site is s for _, s in keyed))


def _cloud(entry: Reader, site: Site) -> CloudSite:
    egress = entry.choice("egress", Egress, Egress.NONE)
    allowed = "a list of IPv4 ranges that nodes may reach over HTTPS, none of them larger than a /8"

    def parse(value: object) -> tuple[IPv4Network, ...] | None:
        found = [as_network(v) for v in value] if isinstance(value, list) else [None]
        good = tuple(n for n in found if n is not None and n.prefixlen >= 8)
        return good if len(good) == len(found) else None

    nothing: tuple[IPv4Network, ...] = ()
    cidrs = entry.parsed("egress_cidrs", parse, allowed, nothing, optional=True)
    if cidrs and egress is Egress.NONE:
        entry.fault("egress_cidrs", ", ".join(map(str, cidrs)), "removed while egress is none: there is no way out")
    names = "|".join(re.escape(e) for e in INTERFACE_ENDPOINTS)
    endpoints = entry.texts("endpoints", names, "a list of: " + ", ".join(INTERFACE_ENDPOINTS))
    return CloudSite(site, egress, cidrs, endpoints)


def _network_and_vpn(
    root: Reader, keyed: list[tuple[str, Site]], emulator: Emulator | None
) -> tuple[Network, Vpn, dict[str, tuple[IPv4Network, IPv4Network]]]:
    section = root.section("network")
    pods = section.network(
        "pods", "a private IPv4 range, /8 to /22", lambda n: plan.is_private(n) and 8 <= n.prefixlen <= 22
    )
    services = section.network(
        "services", "a private IPv4 range, /12 to /24", lambda n: plan.is_private(n) and 12 <= n.prefixlen <= 24
    )
    path_mtu = section.number("path_mtu", 1_400, 9_001, 1_500, "largest packet between the routers")
    mtu = section.parsed(
        "mtu",
        lambda v: v if isinstance(v, int) and not isinstance(v, bool) else None,
        "a whole number",
        0,
        optional=False,
    )

    vpn = root.section("vpn")
    nat_traversal = vpn.flag("nat_traversal", default=False)
    if mtu:
        root.faults += vpn_plan.mtu_fault("network.mtu", mtu, path_mtu=path_mtu, nat_traversal=nat_traversal)
    cipher = vpn.choice("cipher", Cipher, Cipher.AES256_GCM)
    group = vpn.parsed(
        "dh_group",
        lambda v: next((g for g in DhGroup if isinstance(v, int) and g.value == v), None),
        "19, 20 or 21 (elliptic curve groups, RFC 5903)",
        DhGroup.P384,
        optional=True,
    )
    attach = vpn.choice("attach", Attach, Attach.VIRTUAL_PRIVATE_GATEWAY)
    routes = vpn.choice("routes", Routes, Routes.PROPAGATED)
    verify_xml = vpn.flag("verify_xml", default=True)
    if not verify_xml and emulator is None:
        vpn.fault("verify_xml", "false", "true: only an emulator's XML may go unchecked")
    inside = _inside(vpn, [s for _, s in keyed])
    section.finish()
    vpn.finish()

    ranges = [(f"{key}.cidr", site.cidr) for key, site in keyed]
    ranges += [(f"network.{k}", n) for k, n in (("pods", pods), ("services", services)) if n != NOWHERE]
    root.faults += plan.overlap_faults(ranges)
    transport = Transport(cipher, group, mtu)
    return (
        Network(pods, services, path_mtu, mtu),
        Vpn(attach, routes, verify_xml, nat_traversal, transport),
        inside,
    )


def _inside(vpn: Reader, sites: Sequence[Site]) -> dict[str, tuple[IPv4Network, IPv4Network]]:
    """The tunnels' inside ranges by link; a key for each link and no other."""
    section = vpn.section("inside")
    expected = [vpn_plan.link_name(p, c) for p, c in vpn_plan.pairs(sites)]
    vpn.faults += plan.repeated(
        [("sites", name) for name in expected],
        "sites whose names give each link another name when joined",
    )
    inside: dict[str, tuple[IPv4Network, IPv4Network]] = {}
    keyed: list[tuple[str, IPv4Network]] = []
    given = section.keys()
    for name in dict.fromkeys((*expected, *given)):
        value = section.raw(name)
        if expected and name not in expected:
            section.fault(name, "(unknown key)", "removed, or one of: " + ", ".join(expected))
            continue
        found = [as_network(v) for v in value] if isinstance(value, list) else []
        networks = [n for n in found if n is not None]
        if len(networks) != 2 or len(found) != 2:
            section.fault(name, value, "a list of two ranges, one for each tunnel, each " + vpn_plan.INSIDE_FORM)
            continue
        keyed += [(f"{section.key(name)}[{i}]", n) for i, n in enumerate(networks)]
        inside[name] = (networks[0], networks[1])
    vpn.faults += vpn_plan.inside_faults(keyed)
    return {name: inside[name] for name in expected if name in inside}


def _gpu_types(root: Reader) -> dict[str, GpuType]:
    section = root.section("gpu_types")
    types = {}
    for name in section.keys():  # noqa: SIM118 -- not a mapping: reading the keys marks them as known
        if not re.fullmatch(_INSTANCE_TYPE, name):
            section.fault(name, "(as a key)", "an EC2 instance type such as g6.xlarge")
        entry = section.section(name)
        gpus = entry.number("gpus", 1, 16)
        regions = entry.texts("regions", _REGION, "a list of AWS regions that have the type", optional=False)
        entry.finish()
        types[name] = GpuType(name, gpus, regions)
    return types


def _node_groups(root: Reader, regions: Mapping[str, str], clouds: Sequence[CloudSite]) -> tuple[NodeGroup, ...]:
    table = _gpu_types(root)
    groups = []
    keyed = []
    for entry in root.sections("node_groups"):
        name = entry.text("name", _NAME, _NAME_FORM)
        keyed.append((entry.key("name"), name))
        site = entry.text("site", _NAME, "the name of a cloud site")
        if regions and site and site not in regions:
            entry.fault("site", site, "a cloud site: " + ", ".join(regions))
        types = _types(entry, table, regions.get(site))
        maximum = entry.number("max", 1, 1_000)
        minimum = entry.number("min", 0, maximum, 0, "up to max")
        warm_pool = entry.number("warm_pool", 0, 100, 0)
        base = entry.number("on_demand_base", 0, maximum, 0, "up to max")
        spot = entry.number("spot_percent", 0, 100, 0, "share of spot above the on-demand base")
        if warm_pool and (len(types) > 1 or spot):
            entry.fault(
                "warm_pool",
                warm_pool,
                "0 with several types or spot: AWS takes a warm pool only with one on-demand type",
            )
        volume = entry.number("volume_gib", 40, 16_384, 200)
        parameter, image = _image(entry)
        entry.finish()
        groups.append(NodeGroup(name, site, types, minimum, maximum, base, spot, warm_pool, volume, parameter, image))
    root.faults += plan.repeated(keyed, "a name of its own")
    # Hyphens join names and may be in them: aws + eu-gpu is aws-eu + gpu.
    joined = [(key, f"{group.site}-{group.name}") for (key, _), group in zip(keyed, groups, strict=True) if group.name]
    root.faults += plan.repeated(joined, "a name that differs from every other with its site before it")
    for cloud in clouds:
        wanted = sum(g.maximum + g.warm_pool for g in groups if g.site == cloud.site.name)
        room = sum(s.usable for s in plan.vpc_plan(cloud.site).private)
        if wanted > room:
            key = f"sites ({cloud.site.name}).cidr"
            root.faults.append(
                Fault(key, str(cloud.site.cidr), f"large enough: {wanted} nodes do not fit {room} addresses")
            )
    return tuple(groups)


def _types(entry: Reader, table: Mapping[str, GpuType], region: str | None) -> tuple[GpuType, ...]:
    names = entry.texts("types", _INSTANCE_TYPE, "a list of different instance types from gpu_types", optional=False)
    known = []
    for name in names:
        if name not in table:
            entry.fault("types", name, "an instance type of the table gpu_types: " + ", ".join(table))
        elif region is not None and region not in table[name].regions:
            entry.fault(
                "types",
                name,
                f"a type that {region} has; gpu_types.{name}.regions lists " + ", ".join(table[name].regions),
            )
        else:
            known.append(table[name])
    if entry.has("types") and not names:
        entry.fault("types", "an empty list", "at least one instance type")
    if len({t.gpus for t in known}) > 1:
        entry.fault(
            "types", ", ".join(names), "types with the same number of GPUs: pods are placed before the type is known"
        )
    return tuple(known)


def _image(entry: Reader) -> tuple[str | None, str | None]:
    parameter = (
        entry.text("image_parameter", r"/[A-Za-z0-9_./-]+", "the path of an SSM parameter that names an AMI", "")
        or None
    )
    image = entry.text("image_id", r"ami-[0-9a-f]{8,17}", "an AMI id such as ami-0123456789abcdef0", "") or None
    if (parameter is None) == (image is None):
        entry.fault("image_parameter", parameter, "given, unless image_id is; and only one of the two")
    return parameter, image


def _k3s(root: Reader, sites: Sequence[Site], emulator: Emulator | None) -> K3s:
    section = root.section("k3s")
    version = section.text("version", r"v\d+\.\d+\.\d+\+k3s\d+", "a k3s release such as v1.34.2+k3s1")
    api = section.address("api", "an IPv4 address in the home site's range")
    home = next((s for s in sites if s.kind is SiteKind.HOME), None)
    if home and section.has("api") and api not in home.cidr:
        section.fault("api", api, f"an address of the home range {home.cidr}")
    sha256 = section.text(
        "sha256", _SHA256, "the SHA-256 of the release's k3s binary, 64 hex digits from its sha256sum-amd64.txt"
    )
    if sha256 and len(set(sha256)) == 1 and emulator is None:
        section.fault("sha256", sha256, "a real digest from the release's sha256sum-amd64.txt")
    section.finish()
    return K3s(version, sha256, api)


def _onprem(root: Reader, sites: Sequence[Site]) -> OnPrem:
    section = root.section("onprem")
    private = {s.name: s for s in sites if not s.is_cloud}
    home = next((s.name for s in sites if s.kind is SiteKind.HOME), "")
    hosts = []
    for entry in section.sections("hosts"):
        name = entry.text(
            "name", r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", "a host name: lower-case letters, digits, hyphens"
        )
        address = entry.address("address", "the host's IPv4 address")
        role = entry.choice("role", HostRole, HostRole.AGENT)
        where = entry.text("site", _NAME, "the name of a home or edge site", home or "none")
        entry.finish()
        site = private.get(where)
        if site is None:
            if private:
                entry.fault("site", where, "a home or edge site: " + ", ".join(private))
            continue
        if entry.has("address") and address not in site.cidr:
            entry.fault("address", address, f"an address of {where}'s range {site.cidr}")
        if role is HostRole.SERVER and site.kind is not SiteKind.HOME:
            entry.fault("role", role.value, "agent: etcd never stretches over the VPN, servers are at home")
        hosts.append(Host(name, address, role, site))
    root.faults += plan.repeated(
        [(f"onprem.hosts[{i}].name", h.name) for i, h in enumerate(hosts)], "a name of its own"
    )
    root.faults += plan.repeated(
        [(f"onprem.hosts[{i}].address", h.address) for i, h in enumerate(hosts)], "an address of its own"
    )
    servers = sum(h.role is HostRole.SERVER for h in hosts)
    if hosts and servers not in (1, 3, 5):
        section.fault("hosts", f"{servers} servers", "a list with 1, 3 or 5 servers: etcd needs an odd number")
    user = section.text("ssh_user", r"[a-z_][a-z0-9_-]{0,31}", "a login name", "root")
    keys = section.section("ssh_host_keys", optional=True)
    form = "the host's public key, such as `ssh-ed25519 AAAA...`"
    host_keys = {h.name: keys.text(h.name, r"(ssh|ecdsa)-[a-z0-9-]+ [A-Za-z0-9+/=]+", form, "") for h in hosts}
    keys.finish()
    airgap = section.flag("airgap", default=False)
    section.finish()
    return OnPrem(tuple(hosts), user, {k: v for k, v in host_keys.items() if v}, airgap)


def _storage(root: Reader, regions: Sequence[str], emulator: Emulator | None) -> Storage:
    section = root.section("storage")
    region = regions[0] if regions else ""
    lock = section.number("lock_days", 1, 3_650, 30, "Object Lock of published models")
    snapshots = section.number("snapshot_days", 1, 3_650, 30)
    logs = section.number("log_days", 1, 3_650, 90)
    replica = section.text("replica_region", _REGION, "an AWS region", "") or None
    if replica is not None and replica == region:
        section.fault("replica_region", replica, f"another region than {region}, or it protects from nothing")
    force = section.flag("force_destroy", default=False)
    if force and emulator is None:
        section.fault("force_destroy", "true", "false: only an emulator's buckets are thrown away with their contents")
    section.finish()
    return Storage(region, lock, snapshots, logs, replica, force)


def _identity(root: Reader, emulator: Emulator | None) -> Identity:
    section = root.section("identity")
    trust = section.choice("trust", Trust, Trust.ROLES_ANYWHERE)
    if trust is Trust.ACCOUNT and emulator is None:
        section.fault("trust", trust.value, f"{Trust.ROLES_ANYWHERE.value}: only an emulator goes without certificates")
    form = "the PEM of one CA certificate"
    anchor = section.text("trust_anchor", _PEM.pattern, form, "") or None
    if trust is Trust.ROLES_ANYWHERE and not section.has("trust_anchor"):
        section.fault("trust_anchor", None, form + " whose private key is kept at home")
    section.finish()
    return Identity(trust, anchor)


def _alarms(root: Reader, emulator: Emulator | None) -> Alarms:
    section = root.section("alarms", optional=emulator is not None)
    email = section.text("email", r"[^@\s]+@[^@\s]+\.[a-z]{2,}", "an e-mail address", "") or None
    budget = None
    if section.has("budget_usd") or emulator is None:
        budget = section.number("budget_usd", 1, 10_000_000, None, "a month")
    section.finish()
    return Alarms(email, budget)


def _secret_faults(
    own: Mapping[str, str],
    encrypted: set[str],
    required: Sequence[str],
    *,
    namespace: str,
) -> list[Fault]:
    """What is wrong with the secrets; their values appear in no fault."""
    faults = []
    for key in required:
        pattern, form = _secret_form(key)
        remedy = f"{form}; set it with: pulumi config set --secret {namespace}:{key}"
        if key not in own:
            faults.append(Fault(key, "nothing", remedy))
        elif key not in encrypted:
            faults.append(Fault(key, NOT_SHOWN, f"encrypted, it lies in plain text: replace it, and take {remedy}"))
        elif not pattern.fullmatch(own[key]):
            faults.append(Fault(key, NOT_SHOWN, remedy))
    seen: dict[str, str] = {}
    for key in required:
        value = own.get(key)
        if value is not None and value in seen:
            faults.append(Fault(key, NOT_SHOWN, f"different from {seen[value]}"))
        elif value is not None:
            seen[value] = key
    return faults


def _secret_form(key: str) -> tuple[re.Pattern[str], str]:
    if key.startswith("psk-"):
        return vpn_plan.PSK_PATTERN, vpn_plan.PSK_FORM
    if key == "ssh-private-key":
        return _SSH_KEY, "a private key in PEM form"
    return _TOKEN, "32 to 128 letters, digits, dots, underscores or hyphens"
