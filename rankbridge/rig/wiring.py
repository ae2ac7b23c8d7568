"""Which namespaces, devices and addresses a rig has: pure, from the plan's link and the rig's place on this machine.

    onprem --box1-- home1 --wan-- relay --wan-- aws1 --box1-- aws
           --box2-- home2 --wan-- relay --wan-- aws2 --box2--

Two boxes per side, because charon without kernel ESP has one device for all its tunnels. Each wire is a segment of its
own, so both boxes at home have the one outside address that the plan gives the private router. The desk has a way of
its own to each site, over which nothing is forwarded: it sees both sites while the tunnels are cut.

It makes nothing; `rankbridge.rig.namespaces` does.
"""

from __future__ import annotations

import dataclasses
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Final

from infra.plan import Site
from infra.vpn.plan import Link, Tunnel
from workloads.contract.sites import SiteName

SLOTS: Final = 16
"""Rigs that one machine may have at a time."""
PREFIX: Final = "rankbridge"
OUTSIDE: Final = IPv4Network("198.51.100.0/24")
"""Outside addresses of AWS's ends (RFC 5737); the private router's is in the plan."""
DESK: Final = IPv4Network("198.18.0.0/16")
"""Between the desk and the sites (RFC 2544): nobody routes it."""

_SERVICE_HOST: Final = 10
_LAN_THIRD_OCTET: Final = 255
_SLOT_HOSTS: Final = 256

LAN: Final = "lan"
WAN: Final = "wan"
DESK_DEVICE: Final = "desk"


@dataclasses.dataclass(frozen=True)
class Cable:
    """A veth pair. `None` is the namespace that the desk is in."""

    left: str | None
    left_device: str
    left_address: IPv4Interface | None
    right: str | None
    right_device: str
    right_address: IPv4Interface | None


@dataclasses.dataclass(frozen=True)
class Way:
    """A route: through a neighbour, or on the device itself."""

    namespace: str | None
    to: IPv4Network
    device: str
    through: IPv4Address | None = None


@dataclasses.dataclass(frozen=True)
class Wiring:
    """The rig in one of the machine's slots."""

    link: Link
    slot: int

    def namespace(self, part: str) -> str:
        """Full name of `onprem`, `home1`, `relay`, `aws2`, ..."""
        return f"{PREFIX}{self.slot}-{part}"

    @property
    def parts(self) -> tuple[str, ...]:
        """Every namespace, short."""
        boxes = [box_name(site, tunnel.number) for site in SiteName for tunnel in self.link.tunnels]
        return (*(site.value for site in SiteName), *boxes, "relay")

    @property
    def namespaces(self) -> tuple[str, ...]:
        """Every namespace."""
        return tuple(self.namespace(part) for part in self.parts)

    def plan(self, site: SiteName) -> Site:
        """What the plan says of a site."""
        return self.link.private if site is SiteName.ONPREM else self.link.cloud

    def service(self, site: SiteName) -> IPv4Address:
        """The one address at which all of a site's processes listen."""
        return self.plan(site).cidr.network_address + _SLOT_HOSTS * (self.slot + 1) + _SERVICE_HOST

    def outside(self, site: SiteName, tunnel: Tunnel) -> IPv4Address:
        """A box's address on the wire."""
        if site is SiteName.AWS:
            return OUTSIDE.network_address + tunnel.number
        router = self.link.private.router
        if router is None:
            raise ValueError(f"the plan names no router of {self.link.private.name}")
        return router

    def lan(self, site: SiteName, tunnel: Tunnel) -> tuple[IPv4Interface, IPv4Interface]:
        """The site's and the box's address between them."""
        base = self.plan(site).cidr.network_address + _SLOT_HOSTS * _LAN_THIRD_OCTET + 4 * (tunnel.number - 1)
        return IPv4Interface(f"{base + 1}/30"), IPv4Interface(f"{base + 2}/30")

    def desk(self, site: SiteName) -> tuple[IPv4Interface, IPv4Interface]:
        """The desk's and the site's address between them."""
        base = DESK.network_address + _SLOT_HOSTS * self.slot + 4 * list(SiteName).index(site)
        return IPv4Interface(f"{base + 1}/30"), IPv4Interface(f"{base + 2}/30")

    def desk_device(self, site: SiteName) -> str:
        """The desk's end of its way to a site."""
        return f"rbrig{self.slot}-{site.value}"

    @property
    def inner(self) -> tuple[IPv4Network, ...]:
        """What must never be seen on a wire in clear."""
        return (self.link.private.cidr, self.link.cloud.cidr, *(tunnel.inside for tunnel in self.link.tunnels))

    @property
    def outer(self) -> tuple[IPv4Address, ...]:
        """Who may speak on the wires."""
        return tuple({self.outside(site, tunnel): None for site in SiteName for tunnel in self.link.tunnels})

    @property
    def cables(self) -> tuple[Cable, ...]:
        """All of them."""
        found = []
        for site in SiteName:
            home = self.namespace(site.value)
            ours, theirs = self.desk(site)
            found.append(Cable(None, self.desk_device(site), ours, home, DESK_DEVICE, theirs))
            for tunnel in self.link.tunnels:
                box = self.namespace(box_name(site, tunnel.number))
                core, edge = self.lan(site, tunnel)
                outside = IPv4Interface(f"{self.outside(site, tunnel)}/32")
                found.append(Cable(home, f"box{tunnel.number}", core, box, LAN, edge))
                relay = self.namespace("relay")
                found.append(Cable(box, WAN, outside, relay, relay_device(site, tunnel.number), None))
        return tuple(found)

    @property
    def ways(self) -> tuple[Way, ...]:
        """Routes that are there from the start: all others come from BGP."""
        found = []
        for site in SiteName:
            _, theirs = self.desk(site)
            there = IPv4Network(f"{self.service(site)}/32")
            found.append(Way(None, there, self.desk_device(site), theirs.ip))
            for tunnel in self.link.tunnels:
                box = self.namespace(box_name(site, tunnel.number))
                core, _ = self.lan(site, tunnel)
                found.append(Way(box, self.plan(site).cidr, LAN, core.ip))
                found.append(Way(box, IPv4Network(f"{self.outside(other_site(site), tunnel)}/32"), WAN))
        return tuple(found)


def other_site(site: SiteName) -> SiteName:
    """The site at the other end."""
    return SiteName.AWS if site is SiteName.ONPREM else SiteName.ONPREM


def box_name(site: SiteName, tunnel: int) -> str:
    """`home1` or `aws2`: a box, short."""
    return f"{'home' if site is SiteName.ONPREM else 'aws'}{tunnel}"


def relay_device(site: SiteName, tunnel: int) -> str:
    """The relay's end of a box's wire."""
    return box_name(site, tunnel)
