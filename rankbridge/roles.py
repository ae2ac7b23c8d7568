"""The processes of both sites: which there are, their exact command lines, and how each says that it is ready.

Pure: a plan is made from addresses, what is served and what is injected; `rankbridge.supervisor` carries it out.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from rankbridge.cloud import CloudForm
from rankbridge.faults import DeskError
from rankbridge.layout import Layout
from rankbridge.triton import Triton
from workloads.agent.injection import parse_injections
from workloads.contract.editions import EDITIONS_FILE
from workloads.contract.http import PATH_READY
from workloads.contract.sites import SITES, AddressBook, Listener, Site, SiteClass, SiteName


class Role(enum.StrEnum):
    """A long-running process of a site, in the order of starting."""

    INTAKE = "intake"
    FEEDBACK = "feedback"
    TRITON = "tritonserver"
    RETRIEVAL = "retrieval"
    AGENT = "agent"
    GATEWAY = "gateway"


LISTENERS: Final[Mapping[Role, tuple[Listener, ...]]] = {
    Role.INTAKE: (Listener.INTAKE,),
    Role.FEEDBACK: (Listener.FEEDBACK,),
    Role.TRITON: (Listener.TRITON_HTTP, Listener.TRITON_GRPC, Listener.TRITON_METRICS),
    Role.RETRIEVAL: (Listener.RETRIEVAL,),
    Role.AGENT: (Listener.AGENT,),
    Role.GATEWAY: (Listener.GATEWAY,),
}
"""Sockets of each role; the first is the one that answers for it."""

READY_PATHS: Final[Mapping[Role, str]] = dict.fromkeys(Role, PATH_READY) | {Role.TRITON: "/v2/health/ready"}

READY_WITHIN_S: Final[Mapping[Role, float]] = {
    Role.INTAKE: 30.0,
    Role.FEEDBACK: 60.0,
    Role.TRITON: 60.0,
    Role.RETRIEVAL: 60.0,
    Role.AGENT: 120.0,  # loads the ranker and warms it up, on a machine that starts everything else, too
    Role.GATEWAY: 60.0,
}

STOP_WAVES: Final[tuple[tuple[Role, ...], ...]] = (
    (Role.GATEWAY, Role.AGENT, Role.FEEDBACK),
    (Role.RETRIEVAL, Role.INTAKE, Role.TRITON),
)
"""Who asks stops before who is asked: a stop is not a fault and should not look like one in the logs."""


def injection_faults(injections: Sequence[str]) -> list[DeskError]:
    """One for each injection that the agents would refuse."""
    faults = []
    for text in injections:
        try:
            parse_injections([text])
        except ValueError as error:
            faults.append(DeskError(f"cannot inject: {error}", "write it as --inject ranker-delay=80ms"))
    return faults


def parse_ports(settings: Sequence[str]) -> tuple[AddressBook, list[DeskError]]:
    """`["gateway=9080"]` as an address book, and everything that is wrong with it; then the book is the usual one."""
    overrides: dict[Listener, int] = {}
    faults = []
    known = ", ".join(listener.value for listener in Listener)
    for text in settings:
        name, _, number = text.partition("=")
        if name not in set(Listener):
            faults.append(DeskError(f"--port {text}: no listener is called {name!r}", f"one of {known}"))
        elif not number.isdecimal():
            faults.append(DeskError(f"--port {text}: {number!r} is no port", "write it as --port gateway=9080"))
        else:
            overrides[Listener(name)] = int(number)
    try:
        return AddressBook(overrides), faults
    except ValueError as error:
        remedy = "give each listener a free port of its own between 1024 and 65535"
        return AddressBook(), [*faults, DeskError(str(error), remedy)]


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the sites are on this machine, when it is not loopback."""

    hosts: Mapping[SiteName, str] = dataclasses.field(default_factory=dict)
    """The address at which a site's processes listen."""
    entries: Mapping[SiteName, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """What to put before a command line so that it runs there."""


LOOPBACK: Final = Places()


@dataclasses.dataclass(frozen=True)
class Process:
    """One process to run: everything needed to start it and to ask it how it is."""

    site: SiteName
    role: Role
    command: tuple[str, ...]
    sockets: tuple[tuple[str, int], ...]
    url: str
    ready_url: str
    ready_within_s: float
    grace_s: float = 8.0
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    entry: tuple[str, ...] = ()
    """What its command line begins with to run in a network of its own, where every port is free."""

    @property
    def name(self) -> str:
        """`<site>-<role>`: its log's name."""
        return f"{self.site.value}-{self.role.value}"

    @property
    def title(self) -> str:
        """How a person is told of it."""
        return f"{self.role.value} at {self.site.value}"


@dataclasses.dataclass(frozen=True)
class Followed:
    """A channel of the registry, the bucket that the registry is in, and the cloud that the bucket is in."""

    channel: str
    models_bucket: str
    aws: CloudForm


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `up` brings about: one bundle at both sites, or whatever a channel points to."""

    layout: Layout
    addresses: AddressBook
    serves: Path | Followed
    """A finished bundle, `<bundles>/<64 hex>`, for ever; or the channel that both sites follow."""
    injections: tuple[str, ...] = ()
    entries: Mapping[SiteName, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """As in `Places`."""

    @property
    def bundle(self) -> Path | None:
        """The bundle, where it is fixed."""
        return self.serves if isinstance(self.serves, Path) else None

    def install(self, site: Site) -> list[str] | None:
        """The one-shot that verifies a fixed bundle, copies it to the site and renders its Triton repository."""
        if self.bundle is None:
            return None
        return [*self._module("agent"), "install", *self._agent_arguments(site), "--bundle", str(self.bundle)]

    def processes(self, triton: Triton, environment: Mapping[str, str]) -> list[Process]:
        """Every process of both sites, in the order of starting."""
        return [
            self._process(site, role, triton, environment)
            for role in Role
            for site in SITES.values()
            if LISTENERS[role][0] in site.listeners
        ]

    def editions(self, site: Site) -> Path:
        """The file by which the site's agent says what is served."""
        return self.layout.site(site.name) / EDITIONS_FILE

    def _process(self, site: Site, role: Role, triton: Triton, environment: Mapping[str, str]) -> Process:
        listeners = LISTENERS[role]
        url = self.addresses.url(site, listeners[0])
        command, own = self._command(site, role, triton), dict(environment)
        if role is Role.TRITON:
            own = triton.environment(environment)
        else:
            # One thread in each numeric library: parallelism here is between processes.
            own |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        entry = self.entries.get(site.name, ())
        if entry:
            from workloads.telemetry.service import LISTEN_ANYWHERE, LISTEN_VARIABLE  # noqa: PLC0415 - half a second

            own[LISTEN_VARIABLE] = LISTEN_ANYWHERE  # nobody else is in that network
        return Process(
            site=site.name,
            role=role,
            command=(*entry, *command),
            sockets=tuple((self.addresses.host(site), self.addresses.port(listener)) for listener in listeners),
            url=url,
            ready_url=url + READY_PATHS[role],
            ready_within_s=READY_WITHIN_S[role],
            environment=own,
            entry=entry,
        )

    def _command(self, site: Site, role: Role, triton: Triton) -> list[str]:
        at = self.addresses
        listen = ["--listen", at.host_port(site, LISTENERS[role][0])]
        match role:
            case Role.TRITON:
                repository = self.layout.site(site.name) / "triton"
                return triton.command(site, at, repository=repository, scratch=self.layout.run / site.name.value)
            case Role.INTAKE:
                return [*self._module("intake"), *listen, "--store", str(self.layout.events)]
            case Role.FEEDBACK:
                return [*self._module("feedback"), "run", *listen, *self._feedback_arguments(site)]
            case Role.RETRIEVAL:
                editions = ["--editions", str(self.editions(site))]
                return [*self._module("retrieval"), "--site", site.name.value, *listen, *editions]
            case Role.AGENT:
                return [*self._module("agent"), "run", *self._agent_arguments(site), *self._watching(site), *listen]
            case Role.GATEWAY:
                return [*self._module("gateway"), "--site", site.name.value, *listen, *self._gateway_arguments(site)]

    def _gateway_arguments(self, site: Site) -> list[str]:
        at, home = self.addresses, SITES[SiteName.ONPREM]
        arguments = [
            *("--editions", str(self.editions(site))),
            *("--retrieval", at.url(site, Listener.RETRIEVAL)),
            *("--triton", at.host_port(site, Listener.TRITON_HTTP)),
            *("--intake", at.url(home, Listener.INTAKE)),
            *(
                f"--peer={other.name.value}={at.url(other, Listener.GATEWAY)}"
                for other in SITES.values()
                if other != site
            ),
        ]
        if site.is_home:
            arguments += [
                *("--profiles", str(self.layout.profiles)),
                *("--vault", str(self.layout.vault)),
                *("--users-sample", str(self.layout.users_sample)),
            ]
        return arguments

    def _feedback_arguments(self, site: Site) -> list[str]:
        return [
            *("--spool", str(self.layout.events)),
            *("--profiles", str(self.layout.profiles)),
            *("--lake", str(self.layout.lake)),
            *("--trim", self.addresses.url(site, Listener.INTAKE)),
        ]

    def _watching(self, site: Site) -> list[str]:
        """What the agent serves, and to whom it brings it."""
        at, serves = self.addresses, self.serves
        source = (
            ["--bundle", str(serves)]
            if isinstance(serves, Path)
            else ["--channel", serves.channel, "--models-bucket", serves.models_bucket]
        )
        return [
            *source,
            *("--triton", at.host_port(site, Listener.TRITON_HTTP)),
            *("--retrieval", at.url(site, Listener.RETRIEVAL)),
            *("--gateway", at.url(site, Listener.GATEWAY)),
        ]

    def _agent_arguments(self, site: Site) -> list[str]:
        # Both sites run on this machine's CPU; the verdict's ledger says that the GPU of aws is emulated.
        arguments = [
            *("--site", site.name.value),
            *("--site-class", SiteClass.CPU.value),
            *("--site-dir", str(self.layout.site(site.name))),
        ]
        for text in self.injections:
            arguments += ["--inject", text]
        return arguments

    @staticmethod
    def _module(name: str) -> list[str]:
        return [sys.executable, "-m", f"workloads.{name}"]
