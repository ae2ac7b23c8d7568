"""What the routers say of tunnels and routes: security associations from strongSwan, BGP sessions from FRR.

One narrow door, two texts: `swanctl --list-sas --raw` and vtysh's JSON. It knows no rig and starts no daemon.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
from collections.abc import Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import Protocol

from rankbridge.doctor.findings import Finding, fault, ok, skipped

_ASK_WITHIN_S = 10.0
_SUMMARY = "show bgp ipv4 unicast summary json"


class RouterFault(Exception):  # noqa: N818 - a state of the router, not a mistake of ours
    """It cannot be asked."""


class Router(Protocol):
    """One router, or one box of it, that ends tunnels."""

    def sas(self) -> str:
        """What `swanctl --list-sas --raw` says. Raises RouterFault."""
        ...

    def sessions(self) -> str:
        """What vtysh says of the BGP sessions, as JSON. Raises RouterFault."""
        ...


@dataclasses.dataclass(frozen=True)
class CommandRouter:
    """The real door: both daemons' own commands, and the words before them where the daemons are elsewhere."""

    before: tuple[str, ...] = ()

    def sas(self) -> str:
        """See `Router`."""
        return self._said("swanctl", "--list-sas", "--raw")

    def sessions(self) -> str:
        """See `Router`."""
        return self._said("vtysh", "-c", _SUMMARY)

    def _said(self, *words: str) -> str:
        # ssh gives a shell at the other end one line, whatever words it was given.
        over_ssh = bool(self.before) and Path(self.before[0]).name == "ssh"
        command = [*self.before, *([shlex.join(words)] if over_ssh else words)]
        try:
            done = subprocess.run(command, capture_output=True, check=False, timeout=_ASK_WITHIN_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RouterFault(f"cannot ask {command[0]}: {error}") from None
        if done.returncode != 0:
            raise RouterFault(f"{command[0]} fails: {done.stderr.decode(errors='replace').strip()[-200:]}")
        return done.stdout.decode(errors="replace")


@dataclasses.dataclass(frozen=True)
class FakeRouter:
    """Says what it was given, or is not there."""

    told_sas: str | None = ""
    told_sessions: str | None = "{}"

    def sas(self) -> str:
        """See `Router`."""
        return _there(self.told_sas)

    def sessions(self) -> str:
        """See `Router`."""
        return _there(self.told_sessions)


def examine(routers: Sequence[Router], peers: Sequence[IPv4Address]) -> list[Finding]:
    """All tunnels and sessions; `peers` are those that there must be."""
    if not routers:
        return [skipped("tunnels", "no router to ask"), skipped("BGP", "no router to ask")]
    findings, met = [], set()
    for router in routers:
        try:
            findings += _tunnels(router.sas())
        except RouterFault as error:
            findings.append(fault("tunnels", str(error), "an answer of charon", "start strongSwan, and ask as root"))
        try:
            for address, finding in _sessions(router.sessions(), peers):
                met.add(address)
                findings.append(finding)
        except RouterFault as error:
            findings.append(fault("BGP", str(error), "an answer of bgpd", "start FRR, and ask as root"))
    findings += [
        fault(
            f"BGP {peer}", "no session with this peer", "Established", "render the router's files from the stack again"
        )
        for peer in peers
        if peer not in met
    ]
    return findings


def _tunnels(said: str) -> list[Finding]:
    events = said.split("list-sa event")[1:]
    if not events:
        remedy = "see charon's log: peer unreachable, another key, or no proposal in common"
        return [fault("tunnels", "there is no security association", "one for each tunnel", remedy)]
    best: dict[str, Finding] = {}
    for event in events:
        name = re.search(r"\{\s*([\w.-]+)\s*\{", event)
        ike, _, children = event.partition("child-sas")
        state, child = (re.search(r"\bstate=(\w+)", part) for part in (ike, children))
        cipher = re.search(r"\bencr-alg=(\S+)", children)
        check = f"tunnel {name[1] if name else '?'}"
        words = f"IKE {state[1] if state else 'none'}, ESP {child[1] if child else 'none'}"
        if state and child and (state[1], child[1]) == ("ESTABLISHED", "INSTALLED"):
            best[check] = ok(check, f"{words}, {cipher[1] if cipher else 'unknown cipher'}", "ESTABLISHED, INSTALLED")
        elif check not in best:  # one that is being replaced does not count against the one that works
            remedy = "see charon's log: peer unreachable, another key, or no proposal in common"
            best[check] = fault(check, words, "ESTABLISHED, INSTALLED", remedy)
    return list(best.values())


def _sessions(said: str, wanted: Sequence[IPv4Address]) -> list[tuple[IPv4Address, Finding]]:
    try:
        peers = json.loads(said or "{}").get("peers", {})
        facts = [(IPv4Address(peer), str(one["state"]), int(one.get("pfxRcd", 0))) for peer, one in peers.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RouterFault(f"vtysh says what is no summary of BGP: {error}") from None
    return [(peer, _session(peer, state, routes, needed=not wanted or peer in wanted)) for peer, state, routes in facts]


def _session(peer: IPv4Address, state: str, routes: int, *, needed: bool) -> Finding:
    name, wanted = f"BGP {peer}", "Established, with routes"
    if state != "Established":
        return fault(name, state, wanted, "see its tunnel first; then ASNs and TCP port 179 on both sides")
    if routes == 0 and needed:  # a neighbour of the same site may have nothing to tell
        return fault(name, "Established, and no route is learnt", wanted, "compare the ranges with the prefix lists")
    return ok(name, f"Established, {routes} route{'' if routes == 1 else 's'} learnt", wanted)


def _there(told: str | None) -> str:
    if told is None:
        raise RouterFault("cannot be asked")
    return told
