"""`python -m rankbridge.rig.packets`: looks at every frame on the wires and says what should not have been there.

A frame may be ARP between outside addresses, IKE or ESP in UDP between them, or ICMP about these. Nothing else, and in
none of them a whole IPv4 header between inner addresses: that is what a packet in clear has and a cipher does not make.
It reads beside the relay with sockets of its own and trusts nobody's count.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import selectors
import signal
import socket
import struct
import sys
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from types import FrameType
from typing import Final

import msgspec

from rankbridge.rig.tap import ETHERNET, FRAME_MAX, missed, tap

_IPV4: Final = 0x0800
_ARP: Final = 0x0806
_ICMP: Final = 1
_UDP: Final = 17
_IKE_PORT: Final = 500
_ESP_PORT: Final = 4500
_ICMP_HEADER: Final = 8
_FRAGMENT: Final = 0x1FFF
_FAULTS_KEPT: Final = 20
_BUFFER_BYTES: Final = 32 << 20
_LOOK_EVERY_S: Final = 0.2


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What was on the wires."""

    frames: int
    kinds: dict[str, int]
    """Frames by kind: arp, ike, esp, keepalive, icmp."""
    largest: int
    """Bytes of the largest packet."""
    missed: int
    """Frames that the kernel could not hand over in time: nobody knows what was in them."""
    faults: tuple[str, ...]
    """The first that should not have been there, in words."""
    wrong: int
    """How many there were."""

    @property
    def clean(self) -> bool:
        """Whether something was seen, all of it, and nothing wrong."""
        return self.frames > 0 and self.kinds.get("esp", 0) > 0 and self.missed == 0 and self.wrong == 0


class Wrong(ValueError):  # noqa: N818 - a frame, not an error of ours
    """Why a frame should not have been there."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """Who may speak on a wire, and which addresses must never be read there."""

    outer: frozenset[IPv4Address]
    inner: tuple[IPv4Network, ...]

    def kind(self, frame: bytes) -> str:
        """What a frame is. Raises Wrong, in words."""
        if len(frame) < ETHERNET:
            raise Wrong(f"a frame of {len(frame)} bytes")
        (protocol,) = struct.unpack_from("!H", frame, ETHERNET - 2)
        packet = frame[ETHERNET:]
        if protocol == _ARP:
            return self._arp(packet)
        if protocol != _IPV4:
            raise Wrong(f"protocol 0x{protocol:04x} beside IPv4 and ARP")
        kind, payload = self._ipv4(packet)
        self._look_inside(payload, kind)
        return kind

    def _arp(self, packet: bytes) -> str:
        for at in (14, 24):
            self._outer(packet[at : at + 4], "ARP")
        return "arp"

    def _ipv4(self, packet: bytes) -> tuple[str, bytes]:
        """The kind of an IPv4 packet, and its payload."""
        if len(packet) < 20 or packet[0] >> 4 != 4:
            raise Wrong("something that calls itself IPv4 and is not")
        header = (packet[0] & 0xF) * 4
        protocol = packet[9]
        name = {_UDP: "UDP", _ICMP: "ICMP"}.get(protocol, f"IP protocol {protocol}")
        ends = [self._outer(packet[at : at + 4], name) for at in (12, 16)]
        payload = packet[header:]
        if protocol == _ICMP:
            return "icmp", payload
        if protocol != _UDP:
            raise Wrong(f"{name} from {ends[0]} to {ends[1]}")
        if struct.unpack_from("!H", packet, 6)[0] & _FRAGMENT:
            return "esp", payload  # a later fragment has no ports; what it holds is looked at all the same
        if len(payload) < 8:
            raise Wrong(f"a cut-off UDP header from {ends[0]}")
        ports = set(struct.unpack_from("!HH", payload))
        datagram = payload[8:]
        if ports == {_IKE_PORT}:
            return "ike", datagram
        if ports != {_ESP_PORT}:
            raise Wrong(f"UDP between ports {' and '.join(map(str, sorted(ports)))} of {ends[0]} and {ends[1]}")
        if datagram == b"\xff":
            return "keepalive", datagram
        return ("ike" if datagram[:4] == bytes(4) else "esp"), datagram  # RFC 3948: no SPI is zero

    def _outer(self, address: bytes, name: str) -> IPv4Address:
        found = IPv4Address(address)
        if found not in self.outer:
            what = "an inner address in clear" if any(found in one for one in self.inner) else "not of the wire"
            raise Wrong(f"{name} with {found}: {what}")
        return found

    def _look_inside(self, payload: bytes, kind: str) -> None:
        """Refuse a whole IPv4 header between inner addresses anywhere; an ICMP error quotes what it is about."""
        for found in _HEADER.finditer(payload):
            at = found.start()
            header = payload[at : at + 20]
            ends = [IPv4Address(header[place : place + 4]) for place in (12, 16)]
            if all(any(end in one for one in self.inner) for end in ends) and _checksum(header) == 0xFFFF:
                raise Wrong(f"inside {kind}, in clear: a packet from {ends[0]} to {ends[1]}")


_HEADER: Final = re.compile(rb"(?=\x45[\s\S]{8}[\x01\x06\x11][\s\S]{10})")
"""Where an IPv4 header without options may begin that carries ICMP, TCP or UDP."""


def _checksum(header: bytes) -> int:
    """The ones' complement sum of a header: 0xffff for one whose checksum is right (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{len(header) // 2}H", header))
    total = (total & 0xFFFF) + (total >> 16)
    return (total & 0xFFFF) + (total >> 16)


class Watch:
    """Counts frames and keeps what is wrong with them."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._kinds: dict[str, int] = {}
        self._faults: list[str] = []
        self._frames = self._largest = self._wrong = 0

    def look(self, frame: bytes) -> None:
        """One frame more."""
        self._frames += 1
        self._largest = max(self._largest, len(frame) - ETHERNET)
        try:
            kind = self._rules.kind(frame)
        except Wrong as wrong:
            self._wrong += 1
            if len(self._faults) < _FAULTS_KEPT:
                self._faults.append(str(wrong))
        else:
            self._kinds[kind] = self._kinds.get(kind, 0) + 1

    def seen(self, missed: int = 0) -> Seen:
        """All of it."""
        return Seen(
            frames=self._frames,
            kinds=dict(sorted(self._kinds.items())),
            largest=self._largest,
            missed=missed,
            faults=tuple(self._faults),
            wrong=self._wrong,
        )


def watch(devices: Iterable[str], rules: Rules, report: Path) -> None:
    """Look at what comes in at the devices until SIGTERM; the report is there from the moment of looking on."""
    looker, ended = Watch(rules), []

    def end(number: int, _: FrameType | None) -> None:
        ended.append(number)

    signal.signal(signal.SIGTERM, end)
    lost = 0
    with selectors.DefaultSelector() as selector:
        taps = [tap(device, buffer_bytes=_BUFFER_BYTES) for device in devices]
        for one in taps:
            selector.register(one, selectors.EVENT_READ, one)
        _write(report, looker.seen())
        while True:
            last = bool(ended)  # what has arrived by then is still looked at
            for key, _ in selector.select(0 if last else _LOOK_EVERY_S):
                _drain(key.data, looker)
            lost += sum(missed(one) for one in taps)
            if last:
                break
    _write(report, looker.seen(lost))


def _drain(source: socket.socket, looker: Watch) -> None:
    while True:
        try:
            frame = source.recv(FRAME_MAX)
        except BlockingIOError:
            return
        looker.look(frame)


def _write(report: Path, seen: Seen) -> None:
    new = report.with_suffix(".new")
    new.write_bytes(msgspec.json.encode(seen))
    new.replace(report)


def main() -> int:
    """Look until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m rankbridge.rig.packets")
    parser.add_argument("--device", action="append", required=True, help="where to look; may be repeated")
    parser.add_argument("--outer", action="append", required=True, type=IPv4Address, help="who may speak")
    parser.add_argument("--inner", action="append", required=True, type=IPv4Network, help="what must stay hidden")
    parser.add_argument("--report", required=True, type=Path, help="file for what was seen")
    given = parser.parse_args()
    watch(given.device, Rules(frozenset(given.outer), tuple(given.inner)), given.report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
