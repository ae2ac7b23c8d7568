"""The two sites, the roles that run at each, and the address of every role.

Sites differ by loopback address and never by port, so that the same configuration serves the form
with network namespaces. It does not know which processes really run; `rankbridge.supervisor` does.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Mapping
from types import MappingProxyType


class SiteName(enum.StrEnum):
    """The sites of the rehearsal. Sites are data: a deployment has its own, with names of `SITE_PATTERN`."""

    ONPREM = "onprem"
    AWS = "aws"


SITE_PATTERN = r"[a-z][a-z0-9-]{0,18}[a-z0-9]"


def site_name(text: str) -> str:
    """A site's name as a command line has it. Raises ValueError for what can be none."""
    if not re.fullmatch(SITE_PATTERN, text, re.ASCII):
        raise ValueError(f"{text!r} is no name of a site: 2 to 20 lower-case letters, digits or hyphens")
    return text


class SiteKind(enum.StrEnum):
    """Home holds behaviour data and the pseudonym key; a cloud or edge site never sees either."""

    HOME = "home"
    CLOUD = "cloud"
    EDGE = "edge"


PRICE_PER_1000: Mapping[SiteKind, float] = MappingProxyType(
    {SiteKind.HOME: 0.02, SiteKind.CLOUD: 0.07, SiteKind.EDGE: 0.02}
)
"""Ranking a thousand requests where a site does it itself, in US cents, at 200 a second: a GPU instance at list price,
a server's power at home. Only order and ratios matter to the router; a deployment gives its own (`--price`)."""
PRICE_OF_THE_WAY = 0.23
"""Added where another site ranks them: 26 kB a request at what a cloud bills for traffic out of it."""


class SiteClass(enum.StrEnum):
    """What Triton may use there: KIND_GPU fails on a node without one."""

    CPU = "cpu"
    GPU = "gpu"


class Listener(enum.StrEnum):
    """A listening socket of a role; the value is the name used in `--port NAME=NUMBER`."""

    GATEWAY = "gateway"
    RETRIEVAL = "retrieval"
    INTAKE = "intake"
    AGENT = "agent"
    FEEDBACK = "feedback"
    TRITON_HTTP = "triton-http"
    TRITON_GRPC = "triton-grpc"
    TRITON_METRICS = "triton-metrics"


PORTS: Mapping[Listener, int] = MappingProxyType(
    {
        Listener.GATEWAY: 8080,
        Listener.RETRIEVAL: 8081,
        Listener.INTAKE: 8082,
        Listener.AGENT: 8083,
        Listener.FEEDBACK: 8084,
        Listener.TRITON_HTTP: 8000,
        Listener.TRITON_GRPC: 8001,
        Listener.TRITON_METRICS: 8002,
    }
)


@dataclasses.dataclass(frozen=True)
class Site:
    """One site as the rehearsal lays it out on loopback."""

    name: SiteName
    kind: SiteKind
    address: str
    listeners: tuple[Listener, ...]

    @property
    def is_home(self) -> bool:
        """Whether behaviour data and the pseudonym key live here."""
        return self.kind is SiteKind.HOME


_SERVING = (
    Listener.GATEWAY,
    Listener.RETRIEVAL,
    Listener.AGENT,
    Listener.TRITON_HTTP,
    Listener.TRITON_GRPC,
    Listener.TRITON_METRICS,
)

ONPREM = Site(SiteName.ONPREM, SiteKind.HOME, "127.0.10.1", (*_SERVING, Listener.INTAKE, Listener.FEEDBACK))
AWS = Site(SiteName.AWS, SiteKind.CLOUD, "127.0.20.1", _SERVING)

SITES: Mapping[SiteName, Site] = MappingProxyType({s.name: s for s in (ONPREM, AWS)})
HOME: Site = ONPREM


@dataclasses.dataclass(frozen=True)
class AddressBook:
    """Where every listener is, with the operator's port overrides applied.

    `overrides` maps a listener to a port for all sites, `hosts` a site to an address in the place of its loopback one.
    Raises ValueError when a port is out of range, or when two listeners would share one.
    """

    overrides: Mapping[Listener, int] = dataclasses.field(default_factory=dict)
    hosts: Mapping[SiteName, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse ports that cannot work, naming every fault at once."""
        faults = [
            f"port {name.value}={port}: must be between 1024 and 65535"
            for name, port in self.overrides.items()
            if not 1024 <= port <= 65535
        ]
        taken: dict[int, Listener] = {}
        for name in Listener:
            port = self.port(name)
            if port in taken:
                faults.append(f"port {port} is given to both {taken[port].value} and {name.value}")
            taken.setdefault(port, name)
        if faults:
            raise ValueError("; ".join(faults))

    def port(self, listener: Listener) -> int:
        """The port of a listener, the same at each site."""
        return self.overrides.get(listener, PORTS[listener])

    def host(self, site: Site) -> str:
        """The address of a site, the same for each listener."""
        return self.hosts.get(site.name, site.address)

    def url(self, site: Site, listener: Listener) -> str:
        """Base URL of a listener at a site, without a trailing slash."""
        return f"http://{self.host_port(site, listener)}"

    def host_port(self, site: Site, listener: Listener) -> str:
        """`host:port` of a listener at a site."""
        return f"{self.host(site)}:{self.port(listener)}"
