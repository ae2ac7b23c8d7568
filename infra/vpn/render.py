"""The private router's files: strongSwan, FRR, packet filter and tunnel interfaces, from the plan and AWS's answer.

Every value that is written has a type that cannot hold a line break (addresses, numbers, checked names and keys), so a
hostile configuration XML can at most be refused. AWS's XML is read by a parser without entities and compared with the
plan; nothing of it is copied. Pure: no file is written here.

Sources: strongSwan 5.9 swanctl.conf(5) and "Route-based VPN" (XFRM interfaces); FRR 8.4 BGP manual; nft(8); AWS
Site-to-Site VPN, "Download the configuration file" for the XML.
"""

from __future__ import annotations

import dataclasses
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

_XML_LIMIT: Final = 65_536
_PRF: Final = {DhGroup.P256: "sha256", DhGroup.P384: "sha384", DhGroup.P521: "sha512"}
_CURVE: Final = {DhGroup.P256: "ecp256", DhGroup.P384: "ecp384", DhGroup.P521: "ecp521"}
_SWAN_CIPHER: Final = {Cipher.AES128_GCM: "aes128gcm16", Cipher.AES256_GCM: "aes256gcm16"}


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
) -> dict[str, str]:
    """All files of a private site's router by path; `reachable` are the ranges it may learn through the tunnels."""
    numbered = [(FIRST_IF_ID + i, e) for i, e in enumerate(endpoints)]
    return {
        SWANCTL: swanctl(numbered, transport, nat_traversal=nat_traversal),
        STRONGSWAN: strongswan(),
        FRR: frr(site, endpoints, transport, reachable),
        NFT: nft([if_id for if_id, _ in numbered], transport),
        INTERFACES: interfaces(numbered, transport),
    }


def device(if_id: int) -> str:
    """Name of the tunnel interface with an id."""
    return f"xfrm{if_id}"


def ike_proposal(transport: Transport) -> str:
    """The one proposal for IKE: authenticated cipher, PRF and curve of equal strength."""
    return f"{_SWAN_CIPHER[transport.cipher]}-prf{_PRF[transport.dh_group]}-{_CURVE[transport.dh_group]}"


def esp_proposal(transport: Transport) -> str:
    """The one proposal for ESP, with perfect forward secrecy."""
    return f"{_SWAN_CIPHER[transport.cipher]}-{_CURVE[transport.dh_group]}"


def swanctl(numbered: Sequence[tuple[int, Endpoint]], transport: Transport, *, nat_traversal: bool) -> str:
    """Connections and secrets for swanctl; mode 0600."""
    connections = "".join(_connection(i, e, transport, nat_traversal=nat_traversal) for i, e in numbered)
    secrets = "".join(_secret(e) for _, e in numbered)
    return f"connections {{\n{connections}}}\n\nsecrets {{\n{secrets}}}\n"


def _connection(if_id: int, endpoint: Endpoint, transport: Transport, *, nat_traversal: bool) -> str:
    # Behind NAT the router does not own its public address, so it may only name it.
    local = "%any" if nat_traversal else str(endpoint.link.private.router)
    return f"""\
    {endpoint.name} {{
        version = 2
        local_addrs = {local}
        remote_addrs = {endpoint.aws_outside}
        proposals = {ike_proposal(transport)}
        encap = {"yes" if nat_traversal else "no"}
        mobike = no
        keyingtries = 0
        dpd_delay = {transport.dpd_delay}s
        rekey_time = {transport.ike_lifetime * 9 // 10}s
        over_time = {transport.ike_lifetime // 10}s
        if_id_in = {if_id}
        if_id_out = {if_id}
        local {{
            auth = psk
            id = {endpoint.link.private.router}
        }}
        remote {{
            auth = psk
            id = {endpoint.aws_outside}
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
                start_action = start
                close_action = start
                dpd_action = restart
            }}
        }}
    }}
"""


def _secret(endpoint: Endpoint) -> str:
    return f"""\
    ike-{endpoint.name} {{
        id-local = {endpoint.link.private.router}
        id-remote = {endpoint.aws_outside}
        secret = "{endpoint.psk}"
    }}
"""


def strongswan() -> str:
    """Daemon settings: routes are BGP's business, and a dead peer is found in 9 s after the last DPD."""
    return """\
charon {
    install_routes = no
    install_virtual_ip = no
    retransmit_timeout = 1.0
    retransmit_base = 2.0
    retransmit_tries = 2
}
"""


def frr(site: Site, endpoints: Sequence[Endpoint], transport: Transport, reachable: Sequence[IPv4Network]) -> str:
    """BGP over both tunnels of every link: own range out, known ranges in, both tunnels used at once."""
    learnt = "".join(
        f"ip prefix-list RANKBRIDGE-IN seq {10 * i} permit {network} le 28\n" for i, network in enumerate(reachable, 1)
    )
    peers = "".join(
        f"""\
 neighbor {e.tunnel.aws_inside} remote-as {e.link.cloud.asn}
 neighbor {e.tunnel.aws_inside} description {e.name}
 neighbor {e.tunnel.aws_inside} update-source {e.tunnel.home_inside}
 neighbor {e.tunnel.aws_inside} timers {transport.bgp_keepalive} {transport.bgp_hold}
 neighbor {e.tunnel.aws_inside} timers connect 5
"""
        for e in endpoints
    )
    active = "".join(
        f"""\
  neighbor {e.tunnel.aws_inside} activate
  neighbor {e.tunnel.aws_inside} soft-reconfiguration inbound
  neighbor {e.tunnel.aws_inside} weight {BGP_WEIGHT}
  neighbor {e.tunnel.aws_inside} route-map RANKBRIDGE-IN in
  neighbor {e.tunnel.aws_inside} route-map RANKBRIDGE-OUT out
"""
        for e in endpoints
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
 bgp router-id {endpoints[0].tunnel.home_inside}
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


def nft(if_ids: Sequence[int], transport: Transport) -> str:
    """Clamp TCP's segment size in both directions; loading the file again replaces the table."""
    devices = ", ".join(f'"{device(i)}"' for i in if_ids)
    rule = f"tcp flags syn tcp option maxseg size > {transport.mss} tcp option maxseg size set {transport.mss}"
    return f"""\
table inet rankbridge_vpn
delete table inet rankbridge_vpn
table inet rankbridge_vpn {{
    chain forward {{
        type filter hook forward priority mangle; policy accept;
        oifname {{ {devices} }} {rule}
        iifname {{ {devices} }} {rule}
    }}
    chain output {{
        type route hook output priority mangle; policy accept;
        oifname {{ {devices} }} {rule}
    }}
}}
"""


def interfaces(numbered: Sequence[tuple[int, Endpoint]], transport: Transport) -> str:
    """A script that brings the tunnel interfaces to the planned state, however often it runs."""
    calls = "".join(f"ensure {device(i)} {i} {e.tunnel.home_inside}/{e.tunnel.inside.prefixlen}\n" for i, e in numbered)
    return f"""\
#!/bin/sh
# Tunnel interfaces of the rankbridge VPN: one MTU everywhere, routes from BGP only.
set -eu

mtu={transport.mtu}

ensure() {{
    device=$1 if_id=$2 address=$3
    ip link show dev "$device" >/dev/null 2>&1 || ip link add "$device" type xfrm if_id "$if_id"
    ip link set "$device" mtu "$mtu" up
    ip address replace "$address" dev "$device"
    sysctl -q -w "net.ipv4.conf.$device.disable_policy=1" "net.ipv4.conf.$device.rp_filter=2"
}}

sysctl -q -w net.ipv4.ip_forward=1
{calls}"""


def bundle(rendered: Mapping[str, str]) -> str:
    """All files as one JSON document: the form in which they leave the stack as a secret output."""
    return json.dumps(rendered, indent=1, sort_keys=True)
