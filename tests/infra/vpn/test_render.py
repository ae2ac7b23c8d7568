"""The router's files say what was planned, and nothing that AWS's XML could smuggle in."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import time
from ipaddress import AddressValueError, IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.plan import FaultsError, Site
from infra.vpn import plan, render
from infra.vpn.plan import Cipher, DhGroup, Link, Transport, Tunnel
from infra.vpn.render import Dataplane, Endpoint
from workloads.contract.sites import SiteKind

HOME = Site("onprem", SiteKind.HOME, "home", IPv4Network("10.10.0.0/16"), 65010, router=IPv4Address("203.0.113.10"))
AWS = Site(
    "aws", SiteKind.CLOUD, "eu-central-1", IPv4Network("10.20.0.0/16"), 64620, ("eu-central-1a", "eu-central-1b")
)
LINK = Link(
    HOME,
    AWS,
    (
        Tunnel(1, IPv4Network("169.254.10.0/30"), "psk-onprem-aws-1"),
        Tunnel(2, IPv4Network("169.254.10.4/30"), "psk-onprem-aws-2"),
    ),
)
TRANSPORT = Transport(Cipher.AES256_GCM, DhGroup.P384, 1446)
PSKS = ("a" * 40, "b" * 40)
OUTSIDE = ("198.51.100.1", "198.51.100.2")
ENDPOINTS = render.endpoints_of(LINK, OUTSIDE, PSKS)


def xml(endpoints: tuple[Endpoint, ...] = ENDPOINTS, **changed: object) -> str:
    """AWS's configuration XML for the endpoints, in AWS's layout; `changed` replaces a value in the first tunnel."""

    def one(e: Endpoint, at: dict[str, object]) -> str:
        v: dict[str, object] = {
            "home_outside": e.link.private.router,
            "home_inside": e.tunnel.home_inside,
            "home_asn": e.link.private.asn,
            "aws_outside": e.aws_outside,
            "aws_inside": e.tunnel.aws_inside,
            "aws_asn": e.link.cloud.asn,
            "psk": e.psk,
        } | at
        return f"""
  <ipsec_tunnel>
    <customer_gateway>
      <tunnel_outside_address><ip_address>{v["home_outside"]}</ip_address></tunnel_outside_address>
      <tunnel_inside_address><ip_address>{v["home_inside"]}</ip_address><network_mask>255.255.255.252</network_mask>
        <network_cidr>30</network_cidr></tunnel_inside_address>
      <bgp><asn>{v["home_asn"]}</asn><hold_time>30</hold_time></bgp>
    </customer_gateway>
    <vpn_gateway>
      <tunnel_outside_address><ip_address>{v["aws_outside"]}</ip_address></tunnel_outside_address>
      <tunnel_inside_address><ip_address>{v["aws_inside"]}</ip_address><network_mask>255.255.255.252</network_mask>
        <network_cidr>30</network_cidr></tunnel_inside_address>
      <bgp><asn>{v["aws_asn"]}</asn><hold_time>30</hold_time></bgp>
    </vpn_gateway>
    <ike><authentication_protocol>sha1</authentication_protocol><pre_shared_key>{v["psk"]}</pre_shared_key></ike>
    <ipsec><protocol>esp</protocol></ipsec>
  </ipsec_tunnel>"""

    tunnels = "".join(one(e, changed if i == 0 else {}) for i, e in enumerate(endpoints))
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<vpn_connection id="vpn-1">{tunnels}\n</vpn_connection>'


def rendered(**options: bool) -> dict[str, str]:
    return render.files(HOME, ENDPOINTS, TRANSPORT, reachable=[AWS.cidr], **options)


def test_xml_as_planned_is_accepted():
    render.verify(ENDPOINTS, xml())


def test_the_order_of_tunnels_in_the_xml_does_not_matter():
    render.verify(ENDPOINTS, xml(ENDPOINTS[::-1]))


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("aws_inside", "169.254.77.1", "AWS's inside address"),
        ("aws_outside", "198.51.100.9", "AWS's outside address"),
        ("aws_asn", 64999, "AWS's ASN"),
        ("home_outside", "203.0.113.99", "the private outside address"),
        ("home_inside", "169.254.10.9", "the private inside address"),
        ("home_asn", 64998, "the private ASN"),
        ("psk", "c" * 40, "pre-shared key"),
    ],
)
def test_xml_that_differs_from_the_plan_is_refused(field: str, value: object, named: str):
    with pytest.raises(FaultsError, match=named) as caught:
        render.verify(ENDPOINTS, xml(**{field: value}))
    assert not [key for key in (*PSKS, "c" * 40) if key in str(caught.value)]


def test_two_tunnels_to_one_address_are_refused():
    with pytest.raises(FaultsError, match="different for each tunnel"):
        render.verify(ENDPOINTS, xml(aws_outside=OUTSIDE[1]))


def test_a_connection_with_one_tunnel_is_refused():
    with pytest.raises(FaultsError, match="1 tunnels"):
        render.verify(ENDPOINTS, xml(ENDPOINTS[:1]))


HOSTILE = [
    '<!DOCTYPE x [<!ENTITY a "b">]><vpn_connection/>',
    '<!DOCTYPE x SYSTEM "file:///etc/passwd"><vpn_connection/>',
    "<vpn_connection><ipsec_tunnel></vpn_connection>",
    "not xml",
    "",
    "<a>" + "x" * 70_000 + "</a>",
    xml(aws_outside="198.51.100.1\n    local_addrs = 0.0.0.0"),
    xml(aws_outside="198.51.100.1; rm -rf /"),
    xml(aws_asn="64620\n neighbor 1.2.3.4 remote-as 1"),
    xml(aws_inside="169.254.10.1/30"),
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_xml_is_refused_without_being_repeated(text: str):
    with pytest.raises(FaultsError) as caught:
        render.verify(ENDPOINTS, text)
    assert "rm -rf" not in str(caught.value)
    assert "\n neighbor" not in str(caught.value)


@given(st.text(max_size=200))
def test_any_text_in_a_field_of_the_xml_changes_no_rendered_line(text: str):
    safe = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    before = rendered()
    with pytest.raises(FaultsError):
        render.verify(ENDPOINTS, xml(aws_asn=f"x{safe}"))
    assert rendered() == before


@given(st.text(max_size=80).filter(lambda t: not plan.PSK_PATTERN.fullmatch(t)))
def test_a_key_that_could_leave_its_quotes_never_becomes_an_endpoint(text: str):
    with pytest.raises(FaultsError):
        render.endpoints_of(LINK, OUTSIDE, (text, PSKS[1]))


@pytest.mark.parametrize("address", ["198.51.100.1\n", "x", "198.51.100.1 # "])
def test_an_outside_address_that_is_none_is_refused(address: str):
    with pytest.raises(AddressValueError):
        render.endpoints_of(LINK, (address, OUTSIDE[1]), PSKS)


def test_keys_are_in_no_file_but_the_secrets_and_in_no_repr():
    for path, text in rendered().items():
        assert any(key in text for key in PSKS) == (path == render.SWANCTL)
    assert not [key for key in PSKS if key in repr(ENDPOINTS)]


def test_both_tunnels_are_alike_but_for_their_addresses_and_keys():
    text = render.frr(HOME, ENDPOINTS, TRANSPORT, [AWS.cidr])
    for endpoint in ENDPOINTS:
        assert f" neighbor {endpoint.tunnel.aws_inside} weight 100" in text
    assert text.count("set local-preference") == 1
    assert "maximum-paths 2" in text


def test_only_known_ranges_are_learnt_and_only_the_own_is_told():
    text = rendered()[render.FRR]
    assert "ip prefix-list RANKBRIDGE-OUT seq 10 permit 10.10.0.0/16\n" in text
    assert "ip prefix-list RANKBRIDGE-IN seq 10 permit 10.20.0.0/16 le 28\n" in text
    assert text.count(" permit ") == 4


def test_ike_is_version_two_with_authenticated_ciphers_only():
    text = rendered()[render.SWANCTL]
    assert text.count("version = 2") == text.count("proposals = aes256gcm16-prfsha384-ecp384") == 2
    assert text.count("esp_proposals = aes256gcm16-ecp384") == 2
    assert "copy_df = no" in text


@pytest.mark.parametrize(
    ("group", "proposal"),
    [
        (DhGroup.P256, "aes256gcm16-prfsha256-ecp256"),
        (DhGroup.P384, "aes256gcm16-prfsha384-ecp384"),
        (DhGroup.P521, "aes256gcm16-prfsha512-ecp521"),
    ],
)
def test_prf_and_curve_are_of_equal_strength(group: DhGroup, proposal: str):
    assert render.ike_proposal(Transport(Cipher.AES256_GCM, group, 1446)) == proposal


def test_behind_nat_the_public_address_is_named_and_not_bound():
    text = rendered(nat_traversal=True)[render.SWANCTL]
    assert text.count("local_addrs = %any") == text.count("encap = yes") == 2
    assert text.count("id = 203.0.113.10") == 2


def test_routes_come_from_bgp_only():
    assert "install_routes = no" in rendered()[render.STRONGSWAN]


def test_one_mtu_and_its_segment_size_are_everywhere():
    text = rendered()
    assert "mtu=1446" in text[render.INTERFACES]
    assert text[render.NFT].count("maxseg size set 1406") == 3


# The other end, and the form without kernel ESP: what the rig is made from.

USERSPACE = dataclasses.replace(TRANSPORT, mtu=1400)


def userspace(site: Site, number: int = 0, **options: object) -> dict[str, str]:
    other = AWS if site is HOME else HOME
    chosen: dict[str, Any] = {"reachable": [other.cidr], "dataplane": Dataplane.LIBIPSEC} | options
    return render.files(site, [ENDPOINTS[number]], USERSPACE, **chosen)


def test_both_ends_of_a_tunnel_name_each_other_and_agree_on_everything_else():
    home, cloud = userspace(HOME)[render.SWANCTL], userspace(AWS)[render.SWANCTL]
    assert "local_addrs = 203.0.113.10\n        remote_addrs = 198.51.100.1\n" in home
    assert "local_addrs = 198.51.100.1\n        remote_addrs = 203.0.113.10\n" in cloud
    for agreed in ("proposals = aes256gcm16-prfsha384-ecp384", "esp_proposals = aes256gcm16-ecp384", PSKS[0]):
        assert agreed in home
        assert agreed in cloud


def test_home_calls_and_aws_waits():
    home, cloud = userspace(HOME)[render.SWANCTL], userspace(AWS)[render.SWANCTL]
    assert "start_action = start" in home
    assert "dpd_action = restart" in home
    assert "start_action = none" in cloud
    assert "dpd_action = clear" in cloud


def test_aws_gives_a_silent_peer_no_less_than_its_thirty_seconds():
    text = userspace(AWS)[render.STRONGSWAN]
    (every,) = re.findall(r"retransmit_timeout = (\S+)", text)
    (again,) = re.findall(r"retransmit_tries = (\d+)", text)
    assert "retransmit_base = 1.0" in text
    assert float(every) * (int(again) + 1) >= render.AWS_DPD_TIMEOUT


def test_home_finds_a_silent_peer_seven_seconds_after_its_question():
    text = rendered()[render.STRONGSWAN]
    assert "retransmit_timeout = 1.0\n    retransmit_base = 1.0\n    retransmit_tries = 6\n" in text


def test_bgp_of_both_ends_names_the_other_with_the_timers_of_each():
    home, cloud = userspace(HOME)[render.FRR], userspace(AWS)[render.FRR]
    assert " neighbor 169.254.10.1 remote-as 64620\n" in home
    assert " neighbor 169.254.10.2 remote-as 65010\n" in cloud
    assert " neighbor 169.254.10.2 timers 10 30\n" in cloud
    assert "permit 10.20.0.0/16\n" in cloud.split("RANKBRIDGE-IN")[0], "AWS tells its own range"


def test_a_router_of_the_site_learns_what_its_box_learns():
    text = userspace(HOME, neighbours=[IPv4Address("10.10.255.1")])[render.FRR]
    assert " neighbor 10.10.255.1 remote-as 65010\n" in text
    assert "  neighbor 10.10.255.1 next-hop-self\n" in text


def test_without_kernel_esp_packets_travel_in_udp_on_charons_own_device():
    text = userspace(HOME)
    assert "encap = yes" in text[render.SWANCTL]
    assert "if_id" not in text[render.SWANCTL]
    assert "kernel-libipsec" in text[render.STRONGSWAN]
    assert "ensure ipsec0 101 169.254.10.2/30\n" in text[render.INTERFACES]
    assert "ip link add" not in text[render.INTERFACES]
    assert text[render.NFT].count('"ipsec0"') == 3


def test_what_charon_cannot_do_by_itself_is_refused():
    with pytest.raises(ValueError, match="2 tunnels"):
        render.files(HOME, ENDPOINTS, USERSPACE, reachable=[], dataplane=Dataplane.LIBIPSEC)
    with pytest.raises(ValueError, match="mtu 1446"):
        render.files(HOME, ENDPOINTS[:1], TRANSPORT, reachable=[], dataplane=Dataplane.LIBIPSEC)


# The real parsers. A tool that is not installed is a reason, not a pass.


def tool(name: str) -> str:
    path = shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/bin")
    if path is None:
        pytest.skip(f"{name} is not installed; the runbook in docs/foundation.md says which packages have the tools")
    return path


def run(*command: str, **options: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=options.get("env"))


def test_frr_accepts_its_file_and_refuses_a_broken_one(tmp_path: Path):
    vtysh = tool("vtysh")
    good, bad = tmp_path / "frr.conf", tmp_path / "bad.conf"
    good.write_text(rendered()[render.FRR])
    bad.write_text(rendered()[render.FRR].replace("maximum-paths", "maximum-roads"))
    accepted, refused = (run(vtysh, "-C", "-f", str(path)) for path in (good, bad))
    assert accepted.returncode == 0, accepted.stdout + accepted.stderr
    assert refused.returncode != 0


def test_nft_accepts_its_file_and_refuses_a_broken_one(tmp_path: Path):
    command = tool("nft")
    good, bad = tmp_path / "good.nft", tmp_path / "bad.nft"
    good.write_text(rendered()[render.NFT])
    bad.write_text(rendered()[render.NFT].replace("maxseg", "maxsegment"))
    accepted = run(command, "-c", "-f", str(good))
    if "Operation not permitted" in accepted.stderr:
        pytest.skip("nft asks the kernel even for a check, and this user may not")
    assert accepted.returncode == 0, accepted.stderr
    assert run(command, "-c", "-f", str(bad)).returncode != 0


@pytest.mark.parametrize(
    "text", [rendered()[render.INTERFACES], userspace(HOME)[render.INTERFACES]], ids=["xfrm", "tun"]
)
def test_shellcheck_has_nothing_to_say(tmp_path: Path, text: str):
    script = tmp_path / "interfaces.sh"
    script.write_text(text)
    assert run("sh", "-n", str(script)).returncode == 0
    found = run(tool("shellcheck"), "--severity=style", str(script))
    assert found.returncode == 0, found.stdout


@pytest.mark.real_parts
@pytest.mark.parametrize("nat", [False, True])
def test_strongswan_loads_both_connections_and_their_keys(tmp_path: Path, nat: bool):  # noqa: FBT001 -- a table
    swanctl, charon = tool("swanctl"), tool("charon-systemd")
    socket = f"unix://{tmp_path}/vici"
    settings = tmp_path / "strongswan.conf"
    plugins = "random nonce openssl sha1 sha2 aes gcm hmac kdf pem pkcs1 kernel-netlink socket-default vici"
    settings.write_text(
        f"charon {{\n port = 0\n port_nat_t = 0\n load = {plugins}\n"
        f" plugins {{ vici {{ socket = {socket} }} }}\n}}\n" + rendered()[render.STRONGSWAN]
    )
    connections = tmp_path / "swanctl.conf"
    connections.write_text(
        rendered(nat_traversal=nat)[render.SWANCTL].replace("start_action = start", "start_action = none")
    )
    environment = {"STRONGSWAN_CONF": str(settings), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    with (tmp_path / "log").open("w") as log:
        daemon = subprocess.Popen([charon], env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 15
        while not (tmp_path / "vici").exists():
            if daemon.poll() is not None or time.monotonic() > deadline:
                pytest.skip("charon does not run here: " + (tmp_path / "log").read_text()[-300:])
            time.sleep(0.1)
        loaded = run(swanctl, "--load-all", "--noprompt", "--uri", socket, "--file", str(connections), env=environment)
        listed = run(swanctl, "--list-conns", "--uri", socket, env=environment)
    finally:
        daemon.terminate()
        daemon.wait(timeout=20)
    assert loaded.returncode == 0, loaded.stdout + loaded.stderr
    assert "successfully loaded 2 connections" in loaded.stdout
    assert loaded.stdout.count("loaded ike secret") == 2
    assert "onprem-aws-1: IKEv2" in listed.stdout
