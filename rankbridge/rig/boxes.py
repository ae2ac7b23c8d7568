"""The daemons of a rig's routers: charon for a tunnel, zebra and bgpd for routes, told by the rendered files.

A box is one end of one tunnel; its files come from `infra.vpn.render`, as the real router's do. A site's core router is
the rig's own: it learns from both boxes and spreads flows over them. State is what the daemons themselves say.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from infra.plan import Site
from infra.vpn import render
from infra.vpn.plan import Transport
from infra.vpn.render import Dataplane, Endpoint
from rankbridge import processes
from rankbridge.faults import DeskError
from rankbridge.processes import Started
from rankbridge.rig.namespaces import enter

CHARON: Final = "/usr/sbin/charon-systemd"
FRR: Final = Path("/usr/lib/frr")
TOOLS: Final = (CHARON, "/usr/sbin/swanctl", str(FRR / "zebra"), str(FRR / "bgpd"), "/usr/bin/vtysh", "/usr/sbin/nft")
REMEDY: Final = "`make system-tools`"

_PLUGINS: Final = (
    "random nonce openssl sha1 sha2 aes gcm hmac kdf pem pkcs1 kernel-libipsec kernel-netlink socket-default vici"
)
_START_WITHIN_S: Final = 15.0
_GRACE_S: Final = 3.0
_ASK_WITHIN_S: Final = 10.0
_POLL_S: Final = 0.05
_LOADED: Final = "loaded IKE shared key"
_REFUSED_WITHIN_LINES: Final = 200
_REFUSALS: Final = (
    ("AUTHENTICATION_FAILED", "the peer refused our proof: the pre-shared keys differ"),
    ("MAC mismatched", "the peer's proof is not ours: the pre-shared keys differ"),
    ("no shared key found", "there is no key for this peer"),
    ("NO_PROPOSAL_CHOSEN", "the peers have no cipher in common"),
)
# Ahead of the sites' own processes: a router is a machine of its own, and these share two cores with everything.
_FIRST: Final = ("nice", "-n", "-10")


@dataclasses.dataclass(frozen=True)
class Sa:
    """A tunnel as its daemon says it is."""

    ike: str
    """`ESTABLISHED`, `CONNECTING`, ..."""
    child: str
    """`INSTALLED` when packets can pass; empty when there is none."""
    cipher: str

    @property
    def up(self) -> bool:
        """Whether packets can pass."""
        return self.ike == "ESTABLISHED" and self.child == "INSTALLED"


class Daemons:
    """Processes in one namespace, with a folder for their sockets and one for their logs."""

    def __init__(self, namespace: str, folder: Path, logs: Path, *, environment: Mapping[str, str]) -> None:
        self.namespace = namespace
        self.folder = folder
        self._logs = logs
        self._environment = dict(environment)
        self._running: dict[str, Started] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def log(self, name: str) -> Path:
        """What a daemon says."""
        return self._logs / f"{self.folder.name}-{name}.log"

    def start(self, name: str, command: Sequence[str], ready: Callable[[], bool], **more: str) -> None:
        """Start a daemon and wait until it is ready. Raises DeskError with the end of its log."""
        self.log(name).unlink(missing_ok=True)
        try:
            started = processes.start(
                [*_FIRST, *enter(self.namespace), *command],
                environment={**self._environment, **more},
                folder=self.folder,
                log=self.log(name),
                notes=self.folder / "notes" / name,
                tether=True,
            )
        except OSError as error:
            raise DeskError(f"cannot start {name}: {error}", REMEDY) from error
        self._running[name] = started
        deadline = time.monotonic() + _START_WITHIN_S
        while not ready():
            if not processes.is_alive(started.process) or time.monotonic() > deadline:
                raise DeskError(
                    f"{name} of {self.namespace} does not come up",
                    f"its whole log is {self.log(name)}",
                    detail=processes.tail(self.log(name)),
                )
            time.sleep(_POLL_S)

    def stop(self, *names: str, grace_s: float = _GRACE_S) -> None:
        """End these, or with no name all of them."""
        chosen = names or tuple(self._running)
        processes.end([self._running.pop(name) for name in chosen if name in self._running], grace_s=grace_s)

    def process(self, name: str) -> Started | None:
        """A running daemon."""
        return self._running.get(name)

    def run(self, *command: str, text: str | None = None) -> str:
        """What a command says, run inside. Raises DeskError when it fails."""
        return _run([*enter(self.namespace), *command], text)


class Routes:
    """zebra and bgpd of one namespace."""

    def __init__(self, daemons: Daemons) -> None:
        self._daemons = daemons

    def start(self, settings: str) -> None:
        """Both daemons, with FRR's one file. Raises DeskError."""
        folder = self._daemons.folder
        shutil.chown(folder, "frr", "frr")  # they give root up, but for the capabilities that they need
        for name in ("zebra", "bgpd"):
            arguments = [
                *("--vty_socket", str(folder), "-z", str(folder / "zserv.api"), "-i", str(folder / f"{name}.pid")),
                *("-P", "0", "--log", "stdout", "--log-level", "informational"),
            ]
            vty = folder / f"{name}.vty"
            vty.unlink(missing_ok=True)
            self._daemons.start(name, [str(FRR / name), *arguments], vty.exists)
        file = folder / "frr.conf"
        file.write_text(settings)
        _run(["vtysh", "--vty_socket", str(folder), "-f", str(file)])

    def stop(self) -> None:
        """End both."""
        self._daemons.stop("bgpd", "zebra")

    def peers(self) -> dict[IPv4Address, str]:
        """Each peer's state, `Established` when routes are exchanged."""
        try:
            told = self._show("show bgp ipv4 unicast summary json")
        except DeskError:
            return {}
        return {IPv4Address(peer): str(one["state"]) for peer, one in told.get("peers", {}).items()}

    def _show(self, what: str) -> dict[str, dict[str, dict[str, str]]]:
        said = _run(["vtysh", "--vty_socket", str(self._daemons.folder), "-c", what])
        found: dict[str, dict[str, dict[str, str]]] = json.loads(said or "{}")
        return found


class Box:
    """One end of one tunnel: a router whose files are rendered from the plan."""

    def __init__(
        self,
        daemons: Daemons,
        site: Site,
        endpoint: Endpoint,
        transport: Transport,
        *,
        reachable: Sequence[Site],
        core: IPv4Address,
    ) -> None:
        self.daemons = daemons
        self.routes = Routes(daemons)
        self._site = site
        self._endpoint = endpoint
        self._transport = transport
        self._reachable = [one.cidr for one in reachable]
        self._core = core

    @property
    def namespace(self) -> str:
        """Where it is."""
        return self.daemons.namespace

    @property
    def name(self) -> str:
        """The connection's name in strongSwan."""
        return self._endpoint.name

    def files(self) -> dict[str, str]:
        """What the renderer makes for it."""
        return render.files(
            self._site,
            [self._endpoint],
            self._transport,
            reachable=self._reachable,
            dataplane=Dataplane.LIBIPSEC,
            neighbours=[self._core],
        )

    def start(self) -> None:
        """charon, the tunnel's device, the packet filter, BGP. Raises DeskError."""
        files = self.files()
        self._start_charon(files)
        self.daemons.run("sh", "-s", text=files[render.INTERFACES])
        self.daemons.run("nft", "-f", "-", text=files[render.NFT])
        self.routes.start(files[render.FRR])
        self._load(files)

    def stop(self) -> None:
        """As if its power was cut: nobody is told."""
        self.daemons.stop(grace_s=0.0)

    def use_key(self, psk: str) -> None:
        """Another pre-shared key, and an end of what was made with the old one.

        Raises DeskError, FaultsError for a key that could not be one.
        """
        self._endpoint = dataclasses.replace(self._endpoint, psk=psk)
        self._load(self.files())
        self._swanctl("--terminate", "--ike", self.name, "--force", "--timeout", "1", may_fail=True)

    def call(self) -> None:
        """Ask the peer for the tunnel, as an operator does after a refusal: charon itself takes no for an answer."""
        self._swanctl("--initiate", "--child", self.name, "--timeout", "3", may_fail=True)

    def sa(self) -> Sa:
        """The tunnel, as charon says; the best one where there are several."""
        try:
            said = self._swanctl("--list-sas", "--raw")
        except DeskError:
            return Sa("", "", "")
        found = [Sa("", "", "")]
        for text in said.split("list-sa event")[1:]:
            ike, _, children = text.partition("child-sas")
            states = re.findall(r"\bstate=(\w+)", ike)
            inner = re.search(r"\bstate=(\w+)", children)
            cipher = re.search(r"\bencr-alg=(\S+)", children)
            found.append(Sa(states[0] if states else "", inner[1] if inner else "", cipher[1] if cipher else ""))
        return max(found, key=lambda one: (one.up, one.ike))

    def refusal(self) -> str | None:
        """Why the tunnel was refused last, in words; None when it was not since charon was told its keys."""
        for line in reversed(processes.tail(self._ike_log, _REFUSED_WITHIN_LINES)):
            if _LOADED in line or "established between" in line:
                return None
            for mark, words in _REFUSALS:
                if mark in line:
                    return f"{words} ({mark})"
        return None

    def _start_charon(self, files: Mapping[str, str]) -> None:
        folder = self.daemons.folder
        settings = folder / "strongswan.conf"
        settings.write_text(
            f"charon {{\n load = {_PLUGINS}\n plugins {{ vici {{ socket = {self._vici} }} }}\n"
            f" filelog {{ ike {{ path = {self._ike_log}\n default = 1\n time_format = %b %e %T\n flush_line = yes }}\n"
            " }\n}\n"
            "charon-systemd { journal { default = -1 } }\n" + files[render.STRONGSWAN]
        )
        socket = folder / "vici"
        socket.unlink(missing_ok=True)
        self.daemons.start("charon", [CHARON], socket.exists, STRONGSWAN_CONF=str(settings))

    def _load(self, files: Mapping[str, str]) -> None:
        file = self.daemons.folder / "swanctl.conf"
        file.touch(mode=0o600)
        file.write_text(files[render.SWANCTL])
        self._swanctl("--load-creds", "--clear", "--noprompt", "--file", str(file))
        self._swanctl("--load-conns", "--file", str(file))

    @property
    def _ike_log(self) -> Path:
        return self.daemons.log("ike")

    @property
    def _vici(self) -> str:
        return f"unix://{self.daemons.folder / 'vici'}"

    def _swanctl(self, *words: str, may_fail: bool = False) -> str:
        environment = {"STRONGSWAN_CONF": str(self.daemons.folder / "strongswan.conf")}
        return _run(["swanctl", *words, "--uri", self._vici], environment=environment, may_fail=may_fail)


def core_settings(
    site: Site, other: Site, service: IPv4Address, boxes: Sequence[IPv4Address], transport: Transport
) -> str:
    """FRR's file for a site's own router: learns of the other site from both boxes, uses both, tells nothing."""
    peers = "".join(
        f" neighbor {box} remote-as {site.asn}\n"
        f" neighbor {box} timers {transport.bgp_keepalive} {transport.bgp_hold}\n"
        f" neighbor {box} timers connect 5\n"
        for box in boxes
    )
    active = "".join(
        f"  neighbor {box} activate\n"
        f"  neighbor {box} prefix-list RANKBRIDGE-OTHER in\n"
        f"  neighbor {box} prefix-list RANKBRIDGE-NONE out\n"
        for box in boxes
    )
    return f"""\
frr defaults traditional
hostname rankbridge-{site.name}-core
log syslog informational
!
ip prefix-list RANKBRIDGE-OTHER seq 10 permit {other.cidr} le 28
ip prefix-list RANKBRIDGE-NONE seq 10 deny any
!
route-map RANKBRIDGE-SOURCE permit 10
 set src {service}
exit
!
ip protocol bgp route-map RANKBRIDGE-SOURCE
!
router bgp {site.asn}
 bgp router-id {service}
 no bgp default ipv4-unicast
{peers} !
 address-family ipv4 unicast
{active}  maximum-paths ibgp {len(boxes)}
 exit-address-family
exit
!
"""


def missing_tools() -> list[str]:
    """Programs that a rig needs and this machine lacks."""
    return [tool for tool in (*TOOLS, "nsenter", "ip", "nice") if shutil.which(tool) is None]


def _run(
    command: Sequence[str],
    text: str | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    may_fail: bool = False,
) -> str:
    try:
        done = subprocess.run(
            command,
            input=text,
            capture_output=True,
            text=True,
            check=False,
            timeout=_ASK_WITHIN_S,
            env={**os.environ, **(environment or {})},
        )
    except subprocess.TimeoutExpired as error:
        raise DeskError(f"`{' '.join(command)}` does not answer", "see the rig's logs") from error
    if done.returncode != 0 and not may_fail:
        said = (done.stderr + done.stdout).strip().splitlines()
        raise DeskError(
            f"`{' '.join(command)}` ended with {done.returncode}", "see the rig's logs", detail=tuple(said[-8:])
        )
    return done.stdout
