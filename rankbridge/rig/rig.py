"""The rig: both sites' namespaces, two real tunnels with BGP over them, a wire under each that can be harmed.

`opened` makes it and removes it, and whatever a killed run left. The rig keeps the door `rankbridge.link.Link`, starts
no process of a site (`entry` is what to put before its command line), and says what the daemons say.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from infra import config, stackfile
from infra.emulator import STACK, throw_away_secrets
from infra.vpn.plan import Link, Transport, tunnel_mtu
from infra.vpn.render import LIBIPSEC_MTU, Endpoint
from rankbridge.faults import DeskError
from rankbridge.interrupts import shield
from rankbridge.link import Shape
from rankbridge.rig import boxes, namespaces, relay
from rankbridge.rig.boxes import Box, Daemons, Routes, Sa
from rankbridge.rig.packets import Seen
from rankbridge.rig.wiring import Wiring, box_name, other_site, relay_device
from workloads.contract.sites import SiteName

UP_WITHIN_S: Final = 30.0
_POLL_S: Final = 0.05


@dataclasses.dataclass(frozen=True)
class TunnelState:
    """One tunnel, as both of its ends say."""

    number: int
    sas: Mapping[SiteName, Sa]
    bgp: Mapping[SiteName, str]
    """The state of the session over it, `Established` when routes are exchanged."""
    refusals: Mapping[SiteName, str | None]
    """Why an end was refused last, in words."""

    @property
    def up(self) -> bool:
        """Whether both ends can send and know where."""
        return all(sa.up for sa in self.sas.values()) and all(one == "Established" for one in self.bgp.values())


@dataclasses.dataclass(frozen=True)
class RigState:
    """The VPN as it is now."""

    tunnels: tuple[TunnelState, ...]
    routes: Mapping[SiteName, tuple[int, ...]]
    """Tunnels over which a site's packets to the other go now; none when there is no way."""

    @property
    def up(self) -> bool:
        """Whether everything is."""
        return all(one.up for one in self.tunnels) and all(
            used == tuple(one.number for one in self.tunnels) for used in self.routes.values()
        )


@dataclasses.dataclass(frozen=True)
class Planned:
    """What the rig is built from: the plan's link, with what AWS would say of it."""

    link: Link
    transport: Transport

    @classmethod
    def of(cls, stack: str = STACK) -> Planned:
        """From a foundation's stack file; ESP in UDP, and charon as the one who encrypts, take smaller packets."""
        given = throw_away_secrets() if stack == STACK else {}
        plan = config.read(stack, stackfile.values(stack) | given, frozenset(given))
        room = tunnel_mtu(plan.network.path_mtu, nat_traversal=True)
        transport = dataclasses.replace(
            plan.vpn.transport,
            mtu=min(plan.network.mtu, room, LIBIPSEC_MTU),
        )
        return cls(plan.links[0], transport)

    def endpoints(self, wiring: Wiring) -> tuple[Endpoint, ...]:
        """Both tunnels with outside addresses and keys of this run alone."""
        return tuple(
            # A key may not begin with 0, hexadecimal digits may.
            Endpoint(self.link, tunnel, wiring.outside(SiteName.AWS, tunnel), f"k{secrets.token_hex(24)}")
            for tunnel in self.link.tunnels
        )


class Rig:
    """A running rig; made by `opened`."""

    def __init__(self, wiring: Wiring, planned: Planned, logs: Path) -> None:
        self.wiring = wiring
        self.transport = planned.transport
        self.logs = logs
        self.endpoints = planned.endpoints(wiring)
        self._folder = namespaces.folder(wiring.slot)
        self._environment = dict(os.environ)
        self.boxes: Mapping[tuple[SiteName, int], Box] = {
            (site, endpoint.tunnel.number): self._box(site, endpoint)
            for site in SiteName
            for endpoint in self.endpoints
        }
        self.cores = {site: self._daemons(site.value) for site in SiteName}
        self._relays = self._daemons("relay")

    @property
    def tunnels(self) -> Sequence[int]:
        """See `rankbridge.link.Link`."""
        return tuple(endpoint.tunnel.number for endpoint in self.endpoints)

    @property
    def hosts(self) -> dict[SiteName, str]:
        """The address at which each site's processes listen, for `AddressBook`; the desk reaches both."""
        return {site: str(self.wiring.service(site)) for site in SiteName}

    @property
    def mtu(self) -> int:
        """The largest packet that passes a tunnel."""
        return self.transport.mtu

    def namespace(self, site: SiteName) -> str:
        """A site's network namespace."""
        return self.wiring.namespace(site.value)

    def entry(self, site: SiteName) -> tuple[str, ...]:
        """What to put before a command line to run it at a site."""
        return namespaces.enter(self.namespace(site))

    def shape(self, shape: Shape, tunnel: int | None = None) -> None:
        """See `rankbridge.link.Link`. Raises DeskError when a relay is gone."""
        for number in self.tunnels if tunnel is None else (tunnel,):
            self._tell(number, shape)

    def heal(self) -> None:
        """See `rankbridge.link.Link`."""
        self.shape(Shape())

    def passed(self, tunnel: int) -> relay.Answer:
        """What a tunnel's wire does now, and what went over it."""
        return self._tell(tunnel, None)

    def state(self) -> RigState:
        """The VPN as its daemons say it is now."""
        peers = {key: box.routes.peers() for key, box in self.boxes.items()}
        found = []
        for endpoint in self.endpoints:
            number = endpoint.tunnel.number
            at = {site: endpoint.seen_from(self.wiring.plan(site)) for site in SiteName}
            found.append(
                TunnelState(
                    number=number,
                    sas={site: self.boxes[site, number].sa() for site in SiteName},
                    bgp={site: peers[site, number].get(at[site].peer_inside, "") for site in SiteName},
                    refusals={site: self.boxes[site, number].refusal() for site in SiteName},
                )
            )
        return RigState(tuple(found), {site: self.routes(site) for site in SiteName})

    def routes(self, site: SiteName) -> tuple[int, ...]:
        """Tunnels over which a site's packets to the other go now."""
        other = other_site(site)
        listed = subprocess.run(
            ["ip", "-n", self.namespace(site), "-j", "route", "show", str(self.wiring.plan(other).cidr)],
            capture_output=True,
            check=False,
        )
        routes = msgspec.json.decode(listed.stdout or b"[]", type=list[_Route])
        devices = {route.dev for route in routes} | {hop.dev for route in routes for hop in route.nexthops}
        return tuple(number for number in self.tunnels if f"box{number}" in devices)

    def await_up(self, within_s: float = UP_WITHIN_S) -> float:
        """Seconds until everything is up. Raises DeskError with what is not."""
        return until(lambda: self.state().up, within_s, lambda: f"the VPN is not up: {self.described()}")

    def described(self) -> str:
        """The state in words, for errors."""
        state = self.state()
        words = [
            f"tunnel {one.number} at {site.value}: IKE {one.sas[site].ike or 'none'}, "
            f"ESP {one.sas[site].child or 'none'}, BGP {one.bgp[site] or 'none'}"
            + (f", {one.refusals[site]}" if one.refusals[site] else "")
            for one in state.tunnels
            for site in SiteName
        ]
        return "; ".join(words)

    def use_key(self, site: SiteName, tunnel: int, psk: str) -> None:
        """Give one end of a tunnel another key and have the tunnel made anew. Raises DeskError, FaultsError."""
        self.boxes[site, tunnel].use_key(psk)
        self.boxes[SiteName.ONPREM, tunnel].call()

    def replace_box(self, site: SiteName, tunnel: int) -> None:
        """A box loses its power, and another one takes its place: the peer is told nothing. Raises DeskError."""
        before = self.passed(tunnel).shape
        # Nobody may meet it half made: charon takes a peer's refusal for final, and this one knows no keys yet.
        self.shape(Shape(cut=True), tunnel)
        self.boxes[site, tunnel].stop()
        self.boxes[site, tunnel].start()
        self.shape(before, tunnel)

    @contextlib.contextmanager
    def watched(self, name: str = "packets") -> Iterator[Callable[[], Seen]]:
        """Every frame on the wires is looked at within the context; the callable gives the result after it.

        Raises DeskError when nobody can look.
        """
        report = self._folder / f"{name}.json"
        report.unlink(missing_ok=True)
        words = [sys.executable, "-m", "rankbridge.rig.packets", "--report", str(report)]
        for number in self.tunnels:
            for site in SiteName:
                words += ["--device", relay_device(site, number)]
        words += [word for one in self.wiring.outer for word in ("--outer", str(one))]
        words += [word for one in self.wiring.inner for word in ("--inner", str(one))]
        self._relays.start(name, words, report.exists)

        def seen() -> Seen:
            return msgspec.json.decode(report.read_bytes(), type=Seen)

        try:
            yield seen
        finally:
            with shield():
                self._relays.stop(name)

    def inside(self, site: SiteName, make: Callable[[], socket.socket]) -> socket.socket:
        """A socket made in a site's namespace; it stays there and can be used from here."""
        return namespaces.inside(self.namespace(site), make)

    def start(self) -> None:
        """Wires, boxes and core routers. Raises DeskError."""
        for number in self.tunnels:
            self._start_relay(number)
        for site, core in self.cores.items():
            service = self.wiring.service(site)
            core.run("ip", "address", "add", f"{service}/32", "dev", "lo")
            near = [self.wiring.lan(site, endpoint.tunnel)[1].ip for endpoint in self.endpoints]
            plan, other = self.wiring.plan(site), self.wiring.plan(other_site(site))
            Routes(core).start(boxes.core_settings(plan, other, service, near, self.transport))
        for site in (SiteName.AWS, SiteName.ONPREM):  # the end that waits is there first
            for number in self.tunnels:
                self.boxes[site, number].start()

    def _start_relay(self, number: int) -> None:
        control = self._control(number)
        words = [sys.executable, "-m", "rankbridge.rig.relay", "--control", str(control), "--seed", str(number)]
        words += ["--home", relay_device(SiteName.ONPREM, number), "--cloud", relay_device(SiteName.AWS, number)]
        self._relays.start(f"relay{number}", words, control.exists)

    def _tell(self, number: int, shape: Shape | None) -> relay.Answer:
        try:
            return relay.tell(self._control(number), shape)
        except (OSError, msgspec.DecodeError) as error:
            raise DeskError(
                f"the relay of tunnel {number} does not answer: {error}", f"see {self._relays.log(f'relay{number}')}"
            ) from error

    def _control(self, number: int) -> Path:
        return self._folder / f"relay{number}"

    def _daemons(self, part: str) -> Daemons:
        return Daemons(self.wiring.namespace(part), self._folder / part, self.logs, environment=self._environment)

    def _box(self, site: SiteName, endpoint: Endpoint) -> Box:
        core, _ = self.wiring.lan(site, endpoint.tunnel)
        other = other_site(site)
        return Box(
            self._daemons(box_name(site, endpoint.tunnel.number)),
            self.wiring.plan(site),
            endpoint,
            self.transport,
            reachable=[self.wiring.plan(other)],
            core=core.ip,
        )


class _Hop(msgspec.Struct, frozen=True):
    dev: str = ""


class _Route(msgspec.Struct, frozen=True):
    dev: str = ""
    nexthops: tuple[_Hop, ...] = ()


def faults() -> list[DeskError]:
    """What speaks against a rig here; empty when nothing does. One line each."""
    if not namespaces.is_root():
        remedy = "run it as root, or without SITES=netns, where both sites are on loopback"
        return [DeskError("network namespaces and tunnels need root", remedy)]
    found = []
    if missing := boxes.missing_tools():
        found.append(DeskError(f"the rig needs {', '.join(missing)}", boxes.REMEDY))
    if not Path("/dev/net/tun").exists():
        remedy = "load the module tun; in a container: --device /dev/net/tun --cap-add NET_ADMIN --cap-add SYS_ADMIN"
        found.append(DeskError("/dev/net/tun, the tunnels' device, is missing", remedy))
    return found


@contextlib.contextmanager
def opened(logs: Path, planned: Planned | None = None, *, wait: bool = True) -> Iterator[Rig]:
    """A rig for as long as the context lasts, its daemons' logs in `logs`; with `wait` the VPN is up.

    Ends with the thread that opened it, however that ends; what is left then is removed by the next. Raises DeskError.
    """
    if found := faults():
        raise found[0]
    chosen = planned or Planned.of()
    logs.mkdir(parents=True, exist_ok=True)
    namespaces.remove_leftovers(lambda slot: Wiring(chosen.link, slot))
    with namespaces.slot() as slot:
        wiring = Wiring(chosen.link, slot)
        try:
            with shield():
                namespaces.remove(wiring)
                namespaces.make(wiring)
            rig = Rig(wiring, chosen, logs)
            rig.start()
            if wait:
                rig.await_up()
            yield rig
        finally:
            with shield():
                namespaces.remove(wiring)


def remove_leftovers() -> list[str]:
    """Remove what killed rigs left on this machine; the names of their namespaces."""
    link = Planned.of().link
    return namespaces.remove_leftovers(lambda slot: Wiring(link, slot))


def until(holds: Callable[[], bool], within_s: float, otherwise: Callable[[], str]) -> float:
    """Seconds until something holds. Raises DeskError with `otherwise`'s words."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > within_s:
            raise DeskError(f"after {within_s:.0f} s {otherwise()}", "see the rig's logs")
        time.sleep(_POLL_S)
    return time.monotonic() - began
