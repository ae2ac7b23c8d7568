"""Which private site is linked to which cloud site, by which tunnels, and how large a packet may be inside them.

Every home or edge site has one VPN connection of two tunnels to every cloud site. Pure; knows no Pulumi and no file.

Sources: AWS Site-to-Site VPN user guide, "Tunnel options" (inside ranges, pre-shared keys) and "Best practices for a
customer gateway device" (MTU and MSS per algorithm); RFC 4303 (ESP layout); RFC 4106 (AES-GCM in ESP).
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from infra.plan import Fault, Site, repeated

LINK_LOCAL: Final = IPv4Network("169.254.0.0/16")
AWS_RESERVED_INSIDE: Final = tuple(
    IPv4Network(n)
    for n in (
        "169.254.0.0/30",
        "169.254.1.0/30",
        "169.254.2.0/30",
        "169.254.3.0/30",
        "169.254.4.0/30",
        "169.254.5.0/30",
        "169.254.169.252/30",
    )
)
"""Inside ranges that AWS keeps for itself."""

INSIDE_FORM: Final = (
    "a /30 of 169.254.0.0/16, not one that AWS reserves (169.254.0.0/30 to 169.254.5.0/30, 169.254.169.252/30), "
    "used by one tunnel only"
)

PSK_PATTERN: Final = re.compile(r"[A-Za-z1-9._][A-Za-z0-9._]{31,63}")
PSK_FORM: Final = "32 to 64 letters, digits, dots or underscores, the first one not 0"
"""AWS takes 8 to 64; a key that both ends read from a file has no reason to be short."""

MTU_FLOOR: Final = 1_280
"""What IPv6 would need (RFC 8200); a path that carries less has a fault to be found first."""
AWS_MTU: Final = 1_446
"""The largest packet that AWS's end of a tunnel takes."""
VXLAN_OVERHEAD: Final = 50
"""Outer IPv4 20, UDP 8, VXLAN 8, inner Ethernet 14 (RFC 7348)."""
IPV4_TCP_HEADERS: Final = 40

_OUTER_IPV4: Final = 20
_UDP: Final = 8
_ESP_HEADER: Final = 8
_ESP_TRAILER: Final = 2
"""Pad length and next header, which the padding aligns together with the payload."""


class Cipher(enum.StrEnum):
    """Authenticated ciphers only; AWS's names are in `infra.vpn.component`, strongSwan's in `infra.vpn.render`."""

    AES128_GCM = "aes128-gcm"
    AES256_GCM = "aes256-gcm"


class DhGroup(enum.IntEnum):
    """Elliptic curve groups over primes (RFC 5903): NIST P-256, P-384, P-521."""

    P256 = 19
    P384 = 20
    P521 = 21


@dataclasses.dataclass(frozen=True)
class EspFraming:
    """What ESP adds to a packet. Sizes in bytes."""

    initialisation_vector: int
    check_value: int
    alignment: int


GCM_FRAMING: Final = EspFraming(initialisation_vector=8, check_value=16, alignment=4)


def tunnel_mtu(path_mtu: int, *, nat_traversal: bool, framing: EspFraming = GCM_FRAMING) -> int:
    """Largest inner IPv4 packet that leaves as one outer packet of `path_mtu` bytes."""
    outer = _OUTER_IPV4 + (_UDP if nat_traversal else 0) + _ESP_HEADER
    room = path_mtu - outer - framing.initialisation_vector - framing.check_value
    return room - room % framing.alignment - _ESP_TRAILER


def clamp_mss(mtu: int) -> int:
    """TCP segment that fits a packet of `mtu` bytes."""
    return mtu - IPV4_TCP_HEADERS


def pod_mtu(mtu: int) -> int:
    """What is left for pods when the overlay's packets must fit the tunnel whole."""
    return mtu - VXLAN_OVERHEAD


@dataclasses.dataclass(frozen=True)
class Tunnel:
    """One of a link's two tunnels."""

    number: int
    inside: IPv4Network
    psk_key: str
    """Name of the stack secret that holds the pre-shared key; never the key."""

    @property
    def aws_inside(self) -> IPv4Address:
        """AWS takes the first host of the /30."""
        return self.inside.network_address + 1

    @property
    def home_inside(self) -> IPv4Address:
        """The private router takes the second."""
        return self.inside.network_address + 2


@dataclasses.dataclass(frozen=True)
class Link:
    """The VPN connection of one private site to one cloud site."""

    private: Site
    cloud: Site
    tunnels: tuple[Tunnel, Tunnel]

    @property
    def name(self) -> str:
        """`<private site>-<cloud site>`."""
        return link_name(self.private, self.cloud)

    @property
    def psk_keys(self) -> tuple[str, str]:
        """The stack secrets of both tunnels."""
        return self.tunnels[0].psk_key, self.tunnels[1].psk_key


@dataclasses.dataclass(frozen=True)
class Transport:
    """What both ends of every tunnel agree on. Times in seconds."""

    cipher: Cipher
    dh_group: DhGroup
    mtu: int
    ike_lifetime: int = 28_800
    child_lifetime: int = 3_600
    dpd_delay: int = 3
    """The private end's alone: AWS's timeout cannot be set below 30 s."""
    bgp_keepalive: int = 3
    bgp_hold: int = 9
    """AWS proposes 30 s, and BGP takes the shorter of both (RFC 4271): a dead tunnel loses its routes within 15 s."""

    @property
    def mss(self) -> int:
        """What TCP through a tunnel is clamped to."""
        return clamp_mss(self.mtu)


def link_name(private: Site, cloud: Site) -> str:
    """Name of a link, also its key under `vpn.inside`."""
    return f"{private.name}-{cloud.name}"


def pairs(sites: Sequence[Site]) -> list[tuple[Site, Site]]:
    """(private, cloud) for every link there must be, in the order of the list of sites."""
    return [(p, c) for c in sites if c.is_cloud for p in sites if not p.is_cloud]


def links(sites: Sequence[Site], inside: Mapping[str, tuple[IPv4Network, IPv4Network]]) -> tuple[Link, ...]:
    """Every link, once `inside_faults` has nothing to say."""
    return tuple(
        Link(
            private,
            cloud,
            (
                Tunnel(1, inside[name][0], f"psk-{name}-1"),
                Tunnel(2, inside[name][1], f"psk-{name}-2"),
            ),
        )
        for private, cloud in pairs(sites)
        for name in (link_name(private, cloud),)
    )


def inside_fault(key: str, network: IPv4Network) -> list[Fault]:
    """What is wrong with one inside range on its own."""
    good = network.prefixlen == 30 and network.subnet_of(LINK_LOCAL) and network not in AWS_RESERVED_INSIDE
    return [] if good else [Fault(key, str(network), INSIDE_FORM)]


def inside_faults(keyed: Sequence[tuple[str, IPv4Network]]) -> list[Fault]:
    """What is wrong with all inside ranges, alone and together."""
    faults = [fault for key, network in keyed for fault in inside_fault(key, network)]
    return faults + repeated(keyed, INSIDE_FORM)


def mtu_fault(key: str, mtu: int, *, path_mtu: int, nat_traversal: bool) -> list[Fault]:
    """Whether packets of `mtu` bytes pass the tunnel in one piece."""
    largest = min(tunnel_mtu(path_mtu, nat_traversal=nat_traversal), AWS_MTU)
    if MTU_FLOOR <= mtu <= largest:
        return []
    how = "with" if nat_traversal else "without"
    return [Fault(key, str(mtu), f"{MTU_FLOOR} to {largest} (AES-GCM {how} NAT traversal over a path of {path_mtu})")]
