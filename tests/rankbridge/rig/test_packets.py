"""What may be on a wire passes, and whatever else is there is named: above all an inner address in clear."""

from __future__ import annotations

import random
import struct
from ipaddress import IPv4Address, IPv4Network

import pytest

from rankbridge.rig.packets import Rules, Watch

HOME, CLOUD = "203.0.113.30", "198.51.100.1"
RULES = Rules(
    frozenset({IPv4Address(HOME), IPv4Address(CLOUD)}),
    (IPv4Network("10.210.0.0/16"), IPv4Network("10.220.0.0/16")),
)


def ipv4(source: str, target: str, protocol: int, payload: bytes, fragment: int = 0) -> bytes:
    def header(check: int) -> bytes:
        ends = IPv4Address(source).packed + IPv4Address(target).packed
        return struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 1, fragment, 64, protocol, check) + ends

    total = sum(struct.unpack("!10H", header(0)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return header(~total & 0xFFFF) + payload


def udp(ports: tuple[int, int], payload: bytes) -> bytes:
    return struct.pack("!HHHH", *ports, 8 + len(payload), 0) + payload


def frame(packet: bytes, protocol: int = 0x0800) -> bytes:
    return bytes(12) + struct.pack("!H", protocol) + packet


def arp(source: str, target: str) -> bytes:
    ends = bytes(6) + IPv4Address(source).packed + bytes(6) + IPv4Address(target).packed
    return frame(struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + ends, 0x0806)


def esp(payload: bytes) -> bytes:
    return frame(ipv4(HOME, CLOUD, 17, udp((4500, 4500), struct.pack("!II", 0xC0FFEE, 7) + payload)))


RANDOM = random.Random(1)
"""The same bytes in every process that collects these tests."""
INNER = ipv4("10.210.1.10", "10.220.1.10", 6, bytes(40))

GOOD = [
    ("arp", arp(HOME, CLOUD)),
    ("ike", frame(ipv4(HOME, CLOUD, 17, udp((500, 500), RANDOM.randbytes(200))))),
    ("ike", frame(ipv4(CLOUD, HOME, 17, udp((4500, 4500), bytes(4) + RANDOM.randbytes(200))))),
    ("keepalive", frame(ipv4(HOME, CLOUD, 17, udp((4500, 4500), b"\xff")))),
    ("esp", esp(RANDOM.randbytes(1400))),
    ("icmp", frame(ipv4(CLOUD, HOME, 1, bytes(8) + ipv4(HOME, CLOUD, 17, udp((4500, 4500), RANDOM.randbytes(8)))))),
]

BAD = [
    ("in clear", frame(INNER)),
    ("in clear", frame(ipv4("10.210.1.10", CLOUD, 17, udp((4500, 4500), RANDOM.randbytes(50))))),
    ("in clear", arp("10.210.1.10", CLOUD)),
    ("inside esp, in clear", esp(INNER)),  # a null cipher
    ("inside esp, in clear", esp(RANDOM.randbytes(333) + INNER)),
    ("inside ike, in clear", frame(ipv4(HOME, CLOUD, 17, udp((500, 500), INNER)))),
    ("inside icmp, in clear", frame(ipv4(CLOUD, HOME, 1, bytes(8) + INNER))),
    ("IP protocol 4 ", frame(ipv4(HOME, CLOUD, 4, INNER))),
    ("inside esp, in clear", frame(ipv4(HOME, CLOUD, 17, INNER, fragment=100))),
    ("ports 53 and 4000", frame(ipv4(HOME, CLOUD, 17, udp((4000, 53), b"?")))),
    ("not of the wire", frame(ipv4("192.0.2.1", CLOUD, 17, udp((500, 500), b"?")))),
    ("protocol 0x86dd", frame(bytes(40), 0x86DD)),
    ("a frame of 3 bytes", b"abc"),
    ("calls itself IPv4", frame(b"\x60" + bytes(40))),
    ("cut-off UDP", frame(ipv4(HOME, CLOUD, 17, b"1234"))),
]


@pytest.mark.parametrize(("kind", "seen"), GOOD)
def test_what_a_tunnel_needs_is_no_fault(kind: str, seen: bytes):
    watch = Watch(RULES)
    watch.look(seen)
    assert watch.seen().kinds == {kind: 1}
    assert not watch.seen().faults


@pytest.mark.parametrize(("named", "seen"), BAD, ids=range(len(BAD)))
def test_everything_else_is_named(named: str, seen: bytes):
    watch = Watch(RULES)
    watch.look(seen)
    assert watch.seen().wrong == 1
    assert named in watch.seen().faults[0]


def test_bytes_that_only_look_like_a_header_are_no_fault():
    watch = Watch(RULES)
    broken = bytearray(INNER)
    broken[10] ^= 1  # its checksum
    watch.look(esp(bytes(broken)))
    assert watch.seen().wrong == 0


def test_a_wire_on_which_nothing_or_not_all_was_seen_is_not_clean():
    watch = Watch(RULES)
    assert not watch.seen().clean
    watch.look(arp(HOME, CLOUD))
    assert not watch.seen().clean, "no ESP: there was nothing that could have been in clear"
    watch.look(esp(RANDOM.randbytes(99)))
    assert watch.seen().clean
    assert not watch.seen(missed=1).clean
    watch.look(frame(INNER))
    assert not watch.seen().clean
