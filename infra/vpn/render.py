"""A tunnel router's files: strongSwan, FRR, packet filter and tunnel interfaces, from the plan and AWS's answer.

The private router's are used in production. The same functions render the other end as AWS keeps it, and both in a form
without kernel ESP, for `rankbridge.rig`, which has to play AWS.

Every value that is written has a type that cannot hold a line break (addresses, numbers, checked names and keys), so a
hostile configuration XML can at most be refused. AWS's XML is read by a parser without entities and compared with the
plan; nothing of it is copied. Pure: no file is written here.

Sources: strongSwan 5.9 swanctl.conf(5), "Route-based VPN" (XFRM interfaces) and "kernel-libipsec"; FRR 8.4 BGP manual;
nft(8); AWS Site-to-Site VPN, "Download the configuration file" for the XML, "Tunnel options" for AWS's limits.
"""

from __future__ import annotations

import dataclasses
import enum
import hmac
import json
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Final
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from infra.plan import Fault, FaultsError, Site
from infra.vpn.plan import PSK_FORM, PSK_PATTERN, Cipher, DhGroup, Link, Transport, Tunnel

SWANCTL: Final = "etc/swanctl/conf.d/rankbridge.conf"
STRONGSWAN: Final = "etc/strongswan.d/rankbridge.conf"
FRR: Final = "etc/frr/frr.conf"
NFT: Final = "etc/nftables.d/rankbridge-vpn.nft"
INTERFACES: Final = "usr/local/sbin/rankbridge-vpn-interfaces"

FIRST_IF_ID: Final = 101
"""XFRM interface ids start here: above what an operator is likely to have given by hand."""
BGP_WEIGHT: Final = 100
BGP_LOCAL_PREFERENCE: Final = 100
"""Equal on both tunnels: AWS tells by MED which one it prefers, during its maintenance too."""

AWS_DPD_TIMEOUT: Final = 30
"""AWS's end gives a silent peer at least so many seconds, which no option makes shorter."""
AWS_BGP_KEEPALIVE: Final = 10
AWS_BGP_HOLD: Final = 30
"""What AWS proposes, in seconds; BGP then uses the shorter hold time of both ends."""

LIBIPSEC_DEVICE: Final = "ipsec0"
LIBIPSEC_MTU: Final = 1_400
"""charon takes so many bytes of a packet from its device, whatever the device's MTU is (strongSwan 5.9.8)."""

_XML_LIMIT: Final = 65_536
_ASKS: Final = 7
_AWS_DPD_ASKS: Final = 3
_AWAIT_DEVICE: Final = """{
        for _ in $(seq 100); do ip link show dev "$device" >/dev/null 2>&1 && break; sleep 0.1; done
        ip link show dev "$device" >/dev/null || { echo "no $device: is charon up? ($if_id)" >&2; exit 1; }
    }"""
_PRF: Final = {DhGroup.P256: "sha256", DhGroup.P384: "sha384", DhGroup.P521: "sha512"}
_CURVE: Final = {DhGroup.P256: "ecp256", DhGroup.P384: "ecp384", DhGroup.P521: "ecp521"}
_SWAN_CIPHER: Final = {Cipher.AES128_GCM: "aes128gcm16", Cipher.AES256_GCM: "aes256gcm16"}


class Dataplane(enum.StrEnum):
    """Who encrypts packets."""

    XFRM = "xfrm"
    """The kernel: an interface for each tunnel."""
    LIBIPSEC = "libipsec"
    """charon itself, where the kernel has no ESP: always inside UDP, and all of a daemon's tunnels on its one TUN
    device, so that there is one tunnel for each daemon here."""


@dataclasses.dataclass(frozen=True)
class XmlTunnel:
    """What AWS's configuration XML says about one tunnel. The key is compared, never shown."""

    aws_outside: IPv4Address
    aws_inside: IPv4Address
    aws_asn: int
    home_outside: IPv4Address
    home_inside: IPv4Address
    home_asn: int
    psk: str = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """One tunnel with what only AWS knows (its outside address) and what only the stack's secrets hold (the key)."""

    link: Link
    tunnel: Tunnel
    aws_outside: IPv4Address
    psk: str = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        """Refuse a key that could leave its quotes."""
        if not PSK_PATTERN.fullmatch(self.psk):
            raise FaultsError([Fault(self.tunnel.psk_key, "<not shown>", PSK_FORM)])

    @property
    def name(self) -> str:
        """`<link>-<number>`, the connection's name in strongSwan."""
        return f"{self.link.name}-{self.tunnel.number}"

    def seen_from(self, site: Site) -> Sight:
        """The tunnel as one of its two sites sees it."""
        if site.is_cloud:
            return Sight(
                outside=self.aws_outside,
                peer_outside=self.link.private.router,
                inside=self.tunnel.aws_inside,
                peer_inside=self.tunnel.home_inside,
                peer_asn=self.link.private.asn,
            )
        return Sight(
            outside=self.link.private.router,
            peer_outside=self.aws_outside,
            inside=self.tunnel.home_inside,
            peer_inside=self.tunnel.aws_inside,
            peer_asn=self.link.cloud.asn,
        )


@dataclasses.dataclass(frozen=True)
class Sight:
    """One end of a tunnel: its own addresses, outside and inside, and the peer's."""

    outside: IPv4Address | None
    peer_outside: IPv4Address | None
    inside: IPv4Address
    peer_inside: IPv4Address
    peer_asn: int


def parse_configuration(xml: str) -> tuple[XmlTunnel, ...]:
    """The tunnels in a VPN connection's configuration XML.

    Raises FaultsError for anything else: entities, document types, missing or malformed values, more than 64 KiB.
    """
    form = "the customer gateway configuration XML of an AWS VPN connection"
    if len(xml) > _XML_LIMIT:
        raise FaultsError([Fault("vpn configuration XML", f"{len(xml)} characters", form)])
    try:
        root = fromstring(xml, forbid_dtd=True, forbid_entities=True, forbid_external=True)
        return tuple(_xml_tunnel(element) for element in root.iter("ipsec_tunnel"))
    except (ParseError, DefusedXmlException, ValueError, LookupError) as error:
        raise FaultsError([Fault("vpn configuration XML", type(error).__name__, form)]) from None


def _xml_tunnel(element: Element) -> XmlTunnel:
    def text(path: str) -> str:
        value = element.findtext(path)
        if value is None:
            raise LookupError(path)
        return value.strip()

    return XmlTunnel(
        aws_outside=IPv4Address(text("vpn_gateway/tunnel_outside_address/ip_address")),
        aws_inside=IPv4Address(text("vpn_gateway/tunnel_inside_address/ip_address")),
        aws_asn=int(text("vpn_gateway/bgp/asn")),
        home_outside=IPv4Address(text("customer_gateway/tunnel_outside_address/ip_address")),
        home_inside=IPv4Address(text("customer_gateway/tunnel_inside_address/ip_address")),
        home_asn=int(text("customer_gateway/bgp/asn")),
        psk=text("ike/pre_shared_key"),
    )


def configuration_faults(endpoints: Sequence[Endpoint], tunnels: Sequence[XmlTunnel]) -> list[Fault]:
    """Where AWS's XML and the plan of one link differ. Keys are compared and not shown."""
    where = f"vpn connection {endpoints[0].link.name}"
    if len(tunnels) != len(endpoints):
        return [Fault(where, f"{len(tunnels)} tunnels in its XML", f"one with {len(endpoints)}, as planned")]
    by_inside = {t.aws_inside: t for t in tunnels}
    faults = []
    for endpoint in endpoints:
        key = f"{where}, tunnel {endpoint.tunnel.number}"
        found = by_inside.get(endpoint.tunnel.aws_inside)
        if found is None:
            inside = ", ".join(str(t.aws_inside) for t in tunnels)
            allowed = f"{endpoint.tunnel.aws_inside} as planned: was the connection changed by hand?"
            faults.append(Fault(f"{key}, AWS's inside address", inside, allowed))
            continue
        compared: list[tuple[str, object, object]] = [
            ("AWS's outside address", found.aws_outside, endpoint.aws_outside),
            ("AWS's ASN", found.aws_asn, endpoint.link.cloud.asn),
            ("the private outside address", found.home_outside, endpoint.link.private.router),
            ("the private inside address", found.home_inside, endpoint.tunnel.home_inside),
            ("the private ASN", found.home_asn, endpoint.link.private.asn),
        ]
        faults += [
            Fault(f"{key}, {what}", str(is_), f"{ought} as planned") for what, is_, ought in compared if is_ != ought
        ]
        if not hmac.compare_digest(found.psk.encode(), endpoint.psk.encode()):
            faults.append(
                Fault(f"{key}, pre-shared key", "<not shown>", f"the stack's secret {endpoint.tunnel.psk_key}")
            )
    if len({t.aws_outside for t in tunnels}) != len(tunnels):
        faults.append(Fault(f"{where}, outside addresses", "the same twice", "different for each tunnel"))
    return faults


def endpoints_of(link: Link, outside: Sequence[str], psks: Sequence[str]) -> tuple[Endpoint, Endpoint]:
    """A link's two endpoints from the connection's outputs; raises ValueError for what is no address."""
    first, second = (
        Endpoint(link, tunnel, IPv4Address(address), psk)
        for tunnel, address, psk in zip(link.tunnels, outside, psks, strict=True)
    )
    return first, second


def verify(endpoints: Sequence[Endpoint], xml: str) -> None:
    """Raise FaultsError unless AWS's XML says what was planned."""
    faults = configuration_faults(endpoints, parse_configuration(xml))
    if faults:
        raise FaultsError(faults)


def files(
    site: Site,
    endpoints: Sequence[Endpoint],
    transport: Transport,
    *,
    reachable: Sequence[IPv4Network],
    nat_traversal: bool = False,
    dataplane: Dataplane = Dataplane.XFRM,
    neighbours: Sequence[IPv4Address] = (),
) -> dict[str, str]:
    """All files of a site's router by path; `reachable` are the ranges it may learn through the tunnels.

    `neighbours` are routers of the same site that learn from this one what it learns. Raises ValueError for what a
    daemon that encrypts by itself cannot do: several tunnels, and packets of more than 1,400 bytes.
    """
    if dataplane is Dataplane.LIBIPSEC and len(endpoints) != 1:
        raise ValueError(f"{len(endpoints)} tunnels: kernel-libipsec has one device for all, so it is given one tunnel")
    if dataplane is Dataplane.LIBIPSEC and transport.mtu > LIBIPSEC_MTU:
        raise ValueError(f"mtu {transport.mtu}: kernel-libipsec would cut packets off after {LIBIPSEC_MTU} bytes")
    numbered = [(FIRST_IF_ID + i, e) for i, e in enumerate(endpoints)]
    devices = [device(if_id, dataplane) for if_id, _ in numbered]
    return {
        SWANCTL: swanctl(site, numbered, transport, nat_traversal=nat_traversal, dataplane=dataplane),
        STRONGSWAN: strongswan(site, dataplane),
        FRR: frr(site, endpoints, transport, reachable, neighbours),
        NFT: nft(devices, transport),
        INTERFACES: interfaces(site, numbered, transport, dataplane),
    }


def device(if_id: int, dataplane: Dataplane = Dataplane.XFRM) -> str:
    """Name of the tunnel interface with an id; charon itself names the one it makes."""
    return f"xfrm{if_id}" if dataplane is Dataplane.XFRM else LIBIPSEC_DEVICE


def ike_proposal(transport: Transport) -> str:
    """The one proposal for IKE: authenticated cipher, PRF and curve of equal strength."""
    return f"{_SWAN_CIPHER[transport.cipher]}-prf{_PRF[transport.dh_group]}-{_CURVE[transport.dh_group]}"


def esp_proposal(transport: Transport) -> str:
    """The one proposal for ESP, with perfect forward secrecy."""
    return f"{_SWAN_CIPHER[transport.cipher]}-{_CURVE[transport.dh_group]}"


def swanctl(
    site: Site,
    numbered: Sequence[tuple[int, Endpoint]],
    transport: Transport,
    *,
    nat_traversal: bool,
    dataplane: Dataplane = Dataplane.XFRM,
) -> str:
    """Connections and secrets for swanctl; mode 0600."""
    connections = "".join(
        _connection(site, i, e, transport, nat_traversal=nat_traversal, dataplane=dataplane) for i, e in numbered
    )
    secrets = "".join(_secret(site, e) for _, e in numbered)
    return f"connections {{\n{connections}}}\n\nsecrets {{\n{secrets}}}\n"


def _connection(
    site: Site, if_id: int, endpoint: Endpoint, transport: Transport, *, nat_traversal: bool, dataplane: Dataplane
) -> str:
    seen = endpoint.seen_from(site)
    # Behind NAT the router does not own its public address, so it may only name it.
    local = "%any" if nat_traversal and not site.is_cloud else str(seen.outside)
    encapsulated = nat_traversal or dataplane is Dataplane.LIBIPSEC
    bound = f"        if_id_in = {if_id}\n        if_id_out = {if_id}\n" if dataplane is Dataplane.XFRM else ""
    if site.is_cloud:  # AWS waits for the private end, and forgets one that is gone
        dpd_delay = max(transport.dpd_delay, AWS_DPD_TIMEOUT // _AWS_DPD_ASKS)
        actions = {"start_action": "none", "close_action": "none", "dpd_action": "clear"}
    else:
        dpd_delay = transport.dpd_delay
        actions = {"start_action": "start", "close_action": "start", "dpd_action": "restart"}
    acts = "".join(f"                {name} = {action}\n" for name, action in actions.items())
    return f"""\
    {endpoint.name} {{
        version = 2
        local_addrs = {local}
        remote_addrs = {seen.peer_outside}
        proposals = {ike_proposal(transport)}
        encap = {"yes" if encapsulated else "no"}
        mobike = no
        keyingtries = 0
        dpd_delay = {dpd_delay}s
        rekey_time = {transport.ike_lifetime * 9 // 10}s
        over_time = {transport.ike_lifetime // 10}s
{bound}        local {{
            auth = psk
            id = {seen.outside}
        }}
        remote {{
            auth = psk
            id = {seen.peer_outside}
        }}
        children {{
            {endpoint.name} {{
                mode = tunnel
                local_ts = 0.0.0.0/0
                remote_ts = 0.0.0.0/0
                esp_proposals = {esp_proposal(transport)}
                rekey_time = {transport.child_lifetime * 9 // 10}s
                life_time = {transport.child_lifetime}s
                copy_df = no
{acts}            }}
        }}
    }}
"""


def _secret(site: Site, endpoint: Endpoint) -> str:
    seen = endpoint.seen_from(site)
    return f"""\
    ike-{endpoint.name} {{
        id-local = {seen.outside}
        id-remote = {seen.peer_outside}
        secret = "{endpoint.psk}"
    }}
"""


def strongswan(site: Site, dataplane: Dataplane = Dataplane.XFRM) -> str:
    """Daemon settings: routes are BGP's business, and a dead peer is found 7 s after it leaves a question unanswered.

    A question is asked again every second, so that a healed tunnel is made within one. AWS's end gives its peer 30 s.
    """
    every, times = (AWS_DPD_TIMEOUT / _AWS_DPD_ASKS, _AWS_DPD_ASKS) if site.is_cloud else (1.0, _ASKS)
    # kernel-libipsec installs routes whatever it is told (5.9.8): only packets with a mark that nobody sets see them.
    plugins = """\
    plugins {
        kernel-libipsec {
            load = yes
        }
        kernel-netlink {
            fwmark = 0x52
        }
    }
"""
    return f"""\
charon {{
    install_routes = no
    install_virtual_ip = no
    retransmit_timeout = {every:.1f}
    retransmit_base = 1.0
    retransmit_tries = {times - 1}
{plugins if dataplane is Dataplane.LIBIPSEC else ""}}}
"""


def frr(
    site: Site,
    endpoints: Sequence[Endpoint],
    transport: Transport,
    reachable: Sequence[IPv4Network],
    neighbours: Sequence[IPv4Address] = (),
) -> str:
    """BGP over the tunnels of every link: own range out, known ranges in, all tunnels used at once."""
    learnt = "".join(
        f"ip prefix-list RANKBRIDGE-IN seq {10 * i} permit {network} le 28\n" for i, network in enumerate(reachable, 1)
    )
    seen = [(e, e.seen_from(site)) for e in endpoints]
    keepalive, hold = (
        (AWS_BGP_KEEPALIVE, AWS_BGP_HOLD) if site.is_cloud else (transport.bgp_keepalive, transport.bgp_hold)
    )
    peers = "".join(
        f"""\
 neighbor {at.peer_inside} remote-as {at.peer_asn}
 neighbor {at.peer_inside} description {e.name}
 neighbor {at.peer_inside} update-source {at.inside}
 neighbor {at.peer_inside} timers {keepalive} {hold}
 neighbor {at.peer_inside} timers connect 5
"""
        for e, at in seen
    )
    active = "".join(
        f"""\
  neighbor {at.peer_inside} activate
  neighbor {at.peer_inside} soft-reconfiguration inbound
  neighbor {at.peer_inside} weight {BGP_WEIGHT}
  neighbor {at.peer_inside} route-map RANKBRIDGE-IN in
  neighbor {at.peer_inside} route-map RANKBRIDGE-OUT out
"""
        for _, at in seen
    )
    peers += "".join(
        f"""\
 neighbor {address} remote-as {site.asn}
 neighbor {address} timers {transport.bgp_keepalive} {transport.bgp_hold}
 neighbor {address} timers connect 5
"""
        for address in neighbours
    )
    active += "".join(
        f"""\
  neighbor {address} activate
  neighbor {address} next-hop-self
"""
        for address in neighbours
    )
    return f"""\
frr defaults traditional
hostname rankbridge-{site.name}
log syslog informational
!
ip prefix-list RANKBRIDGE-OUT seq 10 permit {site.cidr}
{learnt}!
route-map RANKBRIDGE-OUT permit 10
 match ip address prefix-list RANKBRIDGE-OUT
exit
!
route-map RANKBRIDGE-IN permit 10
 match ip address prefix-list RANKBRIDGE-IN
 set local-preference {BGP_LOCAL_PREFERENCE}
exit
!
router bgp {site.asn}
 bgp router-id {seen[0][1].inside}
 no bgp default ipv4-unicast
 no bgp network import-check
 bgp bestpath as-path multipath-relax
{peers} !
 address-family ipv4 unicast
  network {site.cidr}
{active}  maximum-paths {len(endpoints)}
 exit-address-family
exit
!
"""


def nft(devices: Sequence[str], transport: Transport) -> str:
    """Clamp TCP's segment size in both directions; loading the file again replaces the table."""
    named = ", ".join(f'"{name}"' for name in devices)
    rule = f"tcp flags syn tcp option maxseg size > {transport.mss} tcp option maxseg size set {transport.mss}"
    return f"""\
table inet rankbridge_vpn
delete table inet rankbridge_vpn
table inet rankbridge_vpn {{
    chain forward {{
        type filter hook forward priority mangle; policy accept;
        oifname {{ {named} }} {rule}
        iifname {{ {named} }} {rule}
    }}
    chain output {{
        type route hook output priority mangle; policy accept;
        oifname {{ {named} }} {rule}
    }}
}}
"""


def interfaces(
    site: Site,
    numbered: Sequence[tuple[int, Endpoint]],
    transport: Transport,
    dataplane: Dataplane = Dataplane.XFRM,
) -> str:
    """A script that brings the tunnel interfaces to the planned state, however often it runs."""
    calls = "".join(
        f"ensure {device(i, dataplane)} {i} {e.seen_from(site).inside}/{e.tunnel.inside.prefixlen}\n"
        for i, e in numbered
    )
    # charon's own device is there once charon is, and goes with it.
    make = 'ip link add "$device" type xfrm if_id "$if_id"' if dataplane is Dataplane.XFRM else _AWAIT_DEVICE
    return f"""\
#!/bin/sh
# Tunnel interfaces of the rankbridge VPN: one MTU everywhere, routes from BGP only.
set -eu

mtu={transport.mtu}

ensure() {{
    device=$1 if_id=$2 address=$3
    ip link show dev "$device" >/dev/null 2>&1 || {make}
    ip link set "$device" mtu "$mtu" up
    ip address replace "$address" dev "$device"
    sysctl -q -w "net.ipv4.conf.$device.disable_policy=1" "net.ipv4.conf.$device.rp_filter=2"
}}

sysctl -q -w net.ipv4.ip_forward=1
{calls}"""


def bundle(rendered: Mapping[str, str]) -> str:
    """All files as one JSON document: the form in which they leave the stack as a secret output."""
    return json.dumps(rendered, indent=1, sort_keys=True)
