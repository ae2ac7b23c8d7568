"""The largest packet that passes, by binary search, and a hole in the path with its name. Pure.

A packet that is too large for a link should come back as ICMP "fragmentation needed"; where that is filtered, or a
tunnel swallows it, large packets vanish while small ones pass, and connections hang after their first kilobytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from infra.vpn.plan import MTU_FLOOR, pod_mtu
from rankbridge.doctor.expected import Expected
from rankbridge.doctor.findings import Finding, fault, ok, warn

SMALLEST = 68
"""Every IPv4 link carries this much (RFC 791)."""


@dataclasses.dataclass(frozen=True)
class Sent:
    """What became of packets of one size. `told` is the MTU that a router, or the own machine, named instead."""

    passed: bool
    told: int | None = None


class Prober(Protocol):
    """Sends packets that may not be fragmented, in one direction."""

    def send(self, size: int) -> Sent:
        """A packet of `size` bytes, with its IPv4 header, as often as it takes to tell loss from a hole."""
        ...


class FakePath:
    """A path with a limit that tells its size, or swallows what is larger."""

    def __init__(self, mtu: int, *, tells: bool) -> None:
        self.mtu = mtu
        self.tells = tells
        self.sizes: list[int] = []

    def send(self, size: int) -> Sent:
        """See `Prober`."""
        self.sizes.append(size)
        return Sent(size <= self.mtu, self.mtu if self.tells and size > self.mtu else None)


@dataclasses.dataclass(frozen=True)
class Found:
    """`mtu` is the largest that passed, 0 when nothing did; `silent` that what is larger vanished untold."""

    mtu: int
    silent: bool
    short: int = 1
    """Of `flows`, those in which the largest packet did not pass: one tunnel of several has its share."""
    flows: int = 1


def search(flows: Sequence[Prober], largest: int) -> Found:
    """How much of `largest` passes in every flow: tunnels share the traffic by flow, and each may have a hole."""
    firsts = [(flow, flow.send(largest)) for flow in flows]
    short = [(flow, first) for flow, first in firsts if not first.passed]
    if not short:
        return Found(largest, silent=False, short=0, flows=len(flows))
    found = _search(*short[0], largest)
    return dataclasses.replace(found, short=len(short), flows=len(flows))


def _search(prober: Prober, first: Sent, largest: int) -> Found:
    if not prober.send(SMALLEST).passed:
        return Found(0, silent=True)
    low, high, silent = SMALLEST, largest, first.told is None
    if first.told is not None and SMALLEST <= first.told < largest and prober.send(first.told).passed:
        low = first.told  # what we were told is tried, and not believed
    while high - low > 1:
        middle = (low + high) // 2
        sent = prober.send(middle)
        if sent.passed:
            low = middle
        else:
            high, silent = middle, sent.told is None
    return Found(low, silent=silent)


def name(found: Found, expected: Expected, origin: str, target: str) -> Finding:
    """One direction's finding."""
    check, wanted = f"mtu {origin} to {target}", f"{expected.mtu} bytes pass"
    if found.mtu >= expected.mtu:
        return ok(check, f"packets of {found.mtu} bytes pass", wanted)
    if found.mtu == 0:
        return fault(check, f"nothing passes from {origin} to {target}", wanted, "see the tunnels and BGP sessions")
    outer = expected.outer(found.mtu)
    cause = f"a link outside carries less than {expected.outer(found.mtu + 1)} bytes, about {outer}"
    if found.mtu >= MTU_FLOOR:
        ways = (
            f"lower `network.mtu` in the stack file to {found.mtu} "
            f"(MSS {found.mtu - 40}, pods {pod_mtu(found.mtu)}) and deploy, or mend that link"
        )
    else:
        ways = f"mend that link: below {MTU_FLOOR} no plan is made"
    sizes = f"packets of {found.mtu + 1}..{expected.mtu} bytes"
    facts = f"path MTU is {found.mtu}, the plan needs {expected.mtu}"
    if found.short < found.flows:
        facts += f" (in {found.short} of {found.flows} flows: not in every tunnel)"
    if found.silent:
        return fault(
            check,
            f"{sizes} vanish between {origin} and {target}: {facts}",
            wanted,
            f"{cause}; {ways}; the router before it must clear DF or answer ICMP type 3 code 4, which nobody may drop",
        )
    return warn(check, f"{sizes} are refused between {origin} and {target}: {facts}", wanted, f"{cause}; {ways}")
