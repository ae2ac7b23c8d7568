"""How the two sites of a drill are laid out: on loopback with a relay between them, or in namespaces with real tunnels.

A form says what becomes of a process's command line, where the desk reaches it, and how the way between the sites is
harmed. In both the object store is in the cloud, so that home's way to it is the way between the sites.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, Protocol

from rankbridge.drills.fault import Need
from rankbridge.drills.object_store import StoreProxy
from rankbridge.drills.relay import TcpLink, Way
from rankbridge.faults import DeskError
from rankbridge.link import Direction, Link
from rankbridge.rig import rig as rigs
from rankbridge.rig.rig import Rig
from rankbridge.roles import Process
from workloads.contract.sites import AWS, HOME, SITES, AddressBook, Listener, SiteName
from workloads.telemetry.service import LISTEN_ANYWHERE, LISTEN_VARIABLE

Address = tuple[str, int]
_SEEN_FROM: Final[Mapping[SiteName, str]] = {HOME.name: "127.0.110.1", AWS.name: "127.0.120.1"}
"""Where a site on loopback meets the relay: what it believes to be the other one."""
ENDPOINT: Final = "AWS_ENDPOINT_URL"
_LOOK_S: Final = 0.05
_NOT_FOUND: Final = 2
"""What getent says of a name without an address."""
_NAME_WITHIN_S: Final = 60.0
"""Longer than a resolver tries."""


class Form(Protocol):
    """A layout that is open."""

    @property
    def name(self) -> str:
        """`relay` or `rig`."""
        ...

    @property
    def link(self) -> Link:
        """The way between the sites."""
        ...

    @property
    def proxy(self) -> StoreProxy | None:
        """The door before the object store; None where there is none that can be misused."""
        ...

    @property
    def offers(self) -> frozenset[Need]:
        """What can be had."""
        ...

    def process(self, process: Process) -> Process:
        """As it runs here."""
        ...

    def url(self, url: str) -> str:
        """Where the desk reaches what the plan says is at `url`."""
        ...

    def replace_endpoint(self, tunnel: int) -> None:
        """End the cloud's box of a tunnel without a word and put another in its place."""

    def use_key(self, tunnel: int, *, wrong: bool) -> None:
        """Set a tunnel up anew with another key at one end, or with the right one again."""

    def resolves(self, site: SiteName, name: str) -> bool:
        """Whether a process of a site gets the address of a name."""
        ...

    def moved_after_s(self, tunnel: int, *, away: bool, within_s: float) -> float | None:
        """Seconds until home's packets leave a tunnel, or come back to it; None where they do not, or nobody knows."""
        ...


class RelayForm:
    """Both sites on loopback. Everything that one is told of the other is the relay's address."""

    name = "relay"

    def __init__(self, link: TcpLink, proxy: StoreProxy | None) -> None:
        self.link = link
        self.proxy = proxy

    @property
    def offers(self) -> frozenset[Need]:
        """See Form."""
        return frozenset({Need.TUNNELS, *([Need.CLOUD] if self.proxy is not None else [])})

    def process(self, process: Process) -> Process:
        """See Form."""
        command, environment = list(process.command), dict(process.environment)
        for other in SITES.values():
            if other.name is not process.site:
                command = [word.replace(f"{other.address}:", f"{_SEEN_FROM[process.site]}:") for word in command]
        if self.proxy is not None and ENDPOINT in environment:
            host, port = self.proxy.address
            environment[ENDPOINT] = f"http://{_SEEN_FROM[HOME.name] if process.site is HOME.name else host}:{port}"
        return dataclasses.replace(process, command=tuple(command), environment=environment)

    def url(self, url: str) -> str:
        """See Form."""
        return url

    def replace_endpoint(self, tunnel: int) -> None:
        """See Form."""
        raise NotImplementedError("a relay's tunnels have no boxes")

    def use_key(self, tunnel: int, *, wrong: bool) -> None:
        """See Form."""
        raise NotImplementedError("a relay's tunnels have no keys")

    def resolves(self, site: SiteName, name: str) -> bool:
        """See Form."""
        raise NotImplementedError("both sites ask the machine's own name servers")

    def moved_after_s(self, tunnel: int, *, away: bool, within_s: float) -> float | None:  # noqa: ARG002 - see below
        """See Form. The relay moves when it was told to: there is nothing to measure."""
        return None


class RigForm:
    """Each site in a namespace, two real tunnels between them. The object store is a door at aws."""

    name = "rig"

    def __init__(self, rig: Rig, proxy: StoreProxy | None) -> None:
        self._rig = rig
        self.link: Link = rig
        self.proxy = proxy

    @property
    def offers(self) -> frozenset[Need]:
        """See Form."""
        return frozenset({Need.TUNNELS, Need.RIG, *([Need.CLOUD] if self.proxy is not None else [])})

    def process(self, process: Process) -> Process:
        """See Form. It runs in its site's namespace, where every address is the rig's."""
        environment = dict(process.environment) | {LISTEN_VARIABLE: LISTEN_ANYWHERE}  # nobody else is in there
        if self.proxy is not None and ENDPOINT in environment:
            host, port = self.proxy.address
            environment[ENDPOINT] = f"http://{host}:{port}"
        command = [self.url(word) for word in process.command]
        return dataclasses.replace(
            process,
            command=(*self._rig.entry(process.site), *command),
            environment=environment,
            url=self.url(process.url),
            ready_url=self.url(process.ready_url),
        )

    def url(self, url: str) -> str:
        """See Form."""
        for site in SITES.values():
            url = url.replace(site.address, self._rig.hosts[site.name])
        return url

    def replace_endpoint(self, tunnel: int) -> None:
        """See Form."""
        self._rig.replace_box(AWS.name, tunnel)

    def use_key(self, tunnel: int, *, wrong: bool) -> None:
        """See Form."""
        right = next(one.psk for one in self._rig.endpoints if one.tunnel.number == tunnel)
        self._rig.use_key(AWS.name, tunnel, right[0] + right[:0:-1] if wrong else right)

    def resolves(self, site: SiteName, name: str) -> bool:
        """See Form."""
        command = [*self._rig.entry(site), "getent", "ahosts", name]
        try:
            code = subprocess.run(command, capture_output=True, timeout=_NAME_WITHIN_S, check=False).returncode
        except subprocess.TimeoutExpired:
            return False
        if code not in {0, _NOT_FOUND}:
            raise DeskError(f"{name} could not be looked up at {site}: code {code}", "is getent there?")
        return code == 0

    def moved_after_s(self, tunnel: int, *, away: bool, within_s: float) -> float | None:
        """See Form."""
        began = time.monotonic()
        while (tunnel in self._rig.routes(HOME.name)) is away:
            if time.monotonic() - began > within_s:
                return None
            time.sleep(_LOOK_S)
        return time.monotonic() - began


@contextlib.contextmanager
def relay(addresses: AddressBook, store: Address | None) -> Iterator[RelayForm]:
    """The form of who is not root. `store` is where the object store is, on this machine."""
    with contextlib.ExitStack() as stack:
        proxy = None if store is None else stack.enter_context(StoreProxy(store, ("127.0.0.1", 0)))
        ways = [
            Way((_SEEN_FROM[site.name], addresses.port(listener)), (other.address, addresses.port(listener)), asks)
            for site, other, asks in ((HOME, AWS, Direction.TO_CLOUD), (AWS, HOME, Direction.FROM_CLOUD))
            for listener in (Listener.GATEWAY, Listener.INTAKE)
            if listener in other.listeners
        ]
        if proxy is not None:
            ways.append(Way((_SEEN_FROM[HOME.name], proxy.address[1]), proxy.address, Direction.TO_CLOUD))
        yield RelayForm(stack.enter_context(TcpLink(ways)), proxy)


@contextlib.contextmanager
def rig(logs: Path, store: Address | None) -> Iterator[RigForm]:
    """The form with real tunnels. Raises DeskError where it cannot be had (`rankbridge.rig.rig.faults`)."""
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(rigs.opened(logs))
        proxy = None
        if store is not None:
            there = opened.inside(AWS.name, lambda: socket.create_server((opened.hosts[AWS.name], store[1])))
            proxy = stack.enter_context(StoreProxy(store, there))
        yield RigForm(opened, proxy)
