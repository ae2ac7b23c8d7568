"""All checks in their order: the plan, this machine, the VPN, the path, calls, clocks, names and what expires.

Each check stands alone: a tunnel that is down must not hide an expired certificate. What does not apply is skipped,
with the reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import http.client
import socket
from collections.abc import Callable, Iterator, Sequence

from rankbridge import preflight
from rankbridge.doctor import ages, calls, echo, expected, hole, routers
from rankbridge.doctor.expected import Expected
from rankbridge.doctor.findings import Finding, Findings, fault, ok, skipped, warn
from rankbridge.faults import DeskError
from rankbridge.layout import Layout
from rankbridge.roles import Process

_NO_TUNNEL = "there is no tunnel: both sites are on this machine (--stack and --peer examine a real one)"
LOSS_WARN = 0.02
FLOWS = 4
"""Source ports that are tried: routers share flows among tunnels, and one in eight times all of four take the same."""


def udp() -> socket.socket:
    """A UDP socket of this machine's namespace."""
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


@dataclasses.dataclass(frozen=True)
class Place:
    """A site's gateway and Triton as they are reached from here."""

    name: str
    gateway: tuple[str, int]
    triton_grpc: tuple[str, int]
    needed: bool = True
    """Whether it is a fault when nobody answers there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is examined, from where."""

    layout: Layout
    here: str = "onprem"
    there: str = "aws"
    plan: Expected | None = None
    """None: both sites are on loopback."""
    places: Sequence[Place] = ()
    """Whose gateways are called; with a plan, the other site's."""
    echo: tuple[str, int] | None = None
    """The echo end at the other site; None: there is none."""
    routers: Sequence[routers.Router] = ()
    names: Sequence[str] = ()
    certificates: Sequence[str] = ()
    clocks: Sequence[str] = ()
    """URLs whose Date header tells another clock."""
    to_start: Sequence[Process] = ()
    """What would be started here, and must find its ports free."""
    socket: Callable[[], socket.socket] = udp
    now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC)


def examine(options: Options) -> Findings:
    """Every check, once."""
    return Findings.of(_checks(options))


def _checks(options: Options) -> Iterator[Finding]:
    yield skipped("plan", _NO_TUNNEL) if options.plan is None else expected.sizes(options.plan)
    yield from _machine(options)
    yield from routers.examine(options.routers, options.plan.peers if options.plan and options.routers else ())
    yield from _path(options)
    for place in options.places:
        mss = None if options.plan is None else options.plan.mss
        yield from calls.gateway(place.name, place.gateway, mss=mss, needed=place.needed)
        yield calls.triton(place.name, place.triton_grpc)
    yield from _clocks(options)
    yield from ages.names([*(options.plan.names if options.plan else ()), *options.names])
    if not options.certificates:
        yield skipped("certificates", "none is named (--certificate)")
    for where in options.certificates:
        yield from ages.certificate(where, options.now())
    yield ages.credentials(options.now())


def _machine(options: Options) -> Iterator[Finding]:
    for name, faults in (
        ("tools", preflight.tools(options.layout)),
        ("disk", preflight.disk(options.layout.home, preflight.DISK_REHEARSE_GB)),
        ("memory", preflight.memory(preflight.MEMORY_SERVE_GB)),
        ("shared memory", preflight.shared_memory()),
        ("ports", preflight.ports(options.to_start)),
    ):
        if not faults:
            yield ok(name, "as a start needs it")
        for one in faults:
            yield _told(name, one)


def _told(name: str, error: DeskError) -> Finding:
    return fault(name, error.fault, "as a start needs it", error.remedy)


def _path(options: Options) -> Iterator[Finding]:
    there, back = f"{options.here} to {options.there}", f"{options.there} to {options.here}"
    if options.plan is None or options.echo is None:
        answer = f"no echo end: run `rankbridge doctor --answer ADDRESS:{echo.PORT}` at {options.there}"
        why = _NO_TUNNEL if options.plan is None else f"{answer}, and name it with --echo"
        yield from (skipped(f"mtu {way}", why) for way in (there, back))
        return
    with contextlib.ExitStack() as stack:
        flows = [echo.Asking(stack.enter_context(options.socket()), options.echo) for _ in range(FLOWS)]
        try:
            met = [flow.meet() for flow in flows]
            answered = [one for answers, _ in met for one in answers]
            yield _loss(there, len(answered), sum(lost for _, lost in met))
            best = min(answered, key=lambda one: one.round_trip_s)
            yield ages.clock(f"clock of {options.there}", best.offset_s, best.round_trip_s / 2)
            yield hole.name(
                hole.search([flow.there() for flow in flows], options.plan.mtu),
                options.plan,
                options.here,
                options.there,
            )
            yield hole.name(
                hole.search([flow.back() for flow in flows], options.plan.mtu),
                options.plan,
                options.there,
                options.here,
            )
        except (echo.NoEcho, OSError) as error:
            remedy = (
                f"run `rankbridge doctor --answer` at {options.there}; if it runs, see the tunnels and BGP sessions"
            )
            yield fault(f"mtu {there}", str(error), "an echo end that answers", remedy)


def _loss(way: str, answered: int, lost: int) -> Finding:
    name, measured = f"loss {way} and back", f"{lost} of {answered + lost} lost"
    if lost <= LOSS_WARN * (answered + lost):
        return ok(name, measured, "none")
    return warn(name, measured, "none", "look for a full or broken link under the tunnels")


def _clocks(options: Options) -> Iterator[Finding]:
    if not options.clocks and options.echo is None:
        yield skipped("clock", "no other clock is named (--clock URL, or --echo)")
    for url in options.clocks:
        name = f"clock of {url}"
        try:
            yield ages.clock(name, calls.date(url), 0.5)
        except (OSError, http.client.HTTPException, ValueError) as error:
            yield fault(name, str(error), "an HTTP answer with a Date", "give the URL of a server that says its date")
