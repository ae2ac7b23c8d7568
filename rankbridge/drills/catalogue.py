"""Every fault of the suite: how it is made, how long it lasts, and what must hold. What cannot be had says so.

Bounds are the product's promises (`workloads.contract.slo`) or a step that the design allows; none was measured first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from rankbridge.drills.evidence import (
    answers_at_rung,
    fact,
    fact_within,
    goodput_at_least,
    hedges_at_most,
    late_at_most,
    on_time_within,
    reads_are_answered,
    recovers_within,
    refused_at,
    refuses_nobody,
    says,
)
from rankbridge.drills.fault import Fault, Load, Need, Script
from rankbridge.drills.scene import HOURS, IN_ALL, NOWHERE, OFF, OWN_CLOCK, RESOLVED, BadBundle, Scene, StoreFault
from rankbridge.faults import DeskError
from rankbridge.link import Direction, Shape
from rankbridge.roles import Role
from workloads.contract.sites import AWS, HOME, SiteName
from workloads.contract.slo import Rung

CI: Final = ("F1", "F2", "F8", "F10")
"""What every change must pass."""
CUT_S: Final = 20.0
"""How long both tunnels are cut, unless asked otherwise."""
ROUTE_MOVES_S: Final = 15.0
"""One tunnel cut: by then BGP has moved traffic, from home's side."""

_BACK_S: Final = 30.0
_STARTS_S: Final = 4.0
"""What a process takes to start on a busy machine."""
_GREY_TIMES: Final = 10.0
_WAN: Final = Load(share=0.5, aws_share=0.25)
_HOME: Final = HOME.name.value
_OVERLOAD: Final = ((5.0, 2.0), (5.0, 5.0), (6.0, 10.0))
_BEFORE_S: Final = 5.0
_UNLOADED: Final = Load(share=0.3)
_HOUR_S: Final = 3600
_A_NAME: Final = "s3.amazonaws.com"


def link(*shapes: tuple[Shape, int | None]) -> Script:
    """The way between the sites does this."""

    def script(scene: Scene, during_s: float) -> Iterator[float]:
        for shape, tunnel in shapes:
            scene.link.shape(shape, tunnel)
        yield during_s
        scene.link.heal()

    return script


def _one_tunnel(harm: Callable[[Scene], None], mend: Callable[[Scene], None]) -> Script:
    """Tunnel 1 is harmed, and the route is watched as it leaves and comes back."""

    def script(scene: Scene, during_s: float) -> Iterator[float]:
        harm(scene)
        yield during_s - scene.await_route(1, away=True, within_s=during_s)
        mend(scene)
        scene.await_route(1, away=False, within_s=_BACK_S)

    return script


def kill(*roles: Role, site: SiteName = HOME.name) -> Script:
    """SIGKILL, and started again at the end."""

    def script(scene: Scene, during_s: float) -> Iterator[float]:
        for role in roles:
            scene.kill(role, site)
        yield during_s
        scene.bring_back()

    return script


def store(fault: StoreFault) -> Script:
    """The object store misbehaves."""

    def script(scene: Scene, during_s: float) -> Iterator[float]:
        scene.store(fault)
        yield during_s
        scene.store(StoreFault.NONE)

    return script


def clock(site: SiteName) -> Script:
    """A site's clock is an hour off, to either side."""

    def script(scene: Scene, during_s: float) -> Iterator[float]:
        for off_s in (_HOUR_S, -_HOUR_S):
            scene.set_clock(site, off_s)
            yield during_s / 2
        scene.set_clock(site, 0)

    return script


def _without_dns(scene: Scene, during_s: float) -> Iterator[float]:
    """Namespaces have no way out: what needs a name fails there at any time, and here it is looked whether it is so."""
    scene.look_up(_A_NAME)
    yield during_s


def own_clock(site: SiteName) -> Callable[[Scene], None]:
    """What `clock` needs beforehand."""
    return lambda scene: scene.give_clock(site)


def publish(what: BadBundle) -> Script:
    """A bad bundle is published, and the channel points to it."""

    def script(scene: Scene, during_s: float) -> Iterator[float]:
        scene.publish_bad(what)
        yield during_s
        scene.publish_good()

    return script


def without_profiles(*roles: Role) -> Script:
    """The feature store is down, and these with it."""

    def script(scene: Scene, during_s: float) -> Iterator[float]:
        scene.hide_profiles(hidden=True)
        for role in roles:
            scene.kill(role, HOME.name)
        yield during_s
        scene.hide_profiles(hidden=False)
        scene.bring_back()

    return script


def _frozen(scene: Scene, during_s: float) -> Iterator[float]:
    scene.freeze(Role.TRITON, HOME.name)
    yield during_s
    scene.thaw(Role.TRITON, HOME.name)


def _grey(scene: Scene, during_s: float) -> Iterator[float]:
    scene.slow_down(Role.TRITON, HOME.name, _GREY_TIMES)
    yield during_s
    scene.thaw(Role.TRITON, HOME.name)


def _nothing(_: Scene, during_s: float) -> Iterator[float]:
    yield during_s


def _intake_at_random(scene: Scene, during_s: float) -> Iterator[float]:
    """Three kills at moments of chance; it is down for one second each time, and as long as it takes to start."""
    each = during_s / 3 - _STARTS_S
    for _ in range(3):
        yield scene.waits() * max(0.0, each - 1.0)
        scene.kill(Role.INTAKE, HOME.name)
        yield 1.0
        scene.bring_back()


def _full_disk(scene: Scene, during_s: float) -> Iterator[float]:
    scene.fill_disk(full=True)
    yield during_s
    scene.fill_disk(full=False)


def _alone(scene: Scene, during_s: float) -> Iterator[float]:
    """With the cloud gone: restart the private site's parts, roll a bundle, scale, retrain."""
    scene.link.shape(Shape(cut=True))
    scene.store(StoreFault.RESET)
    yield during_s / 4
    for role in (Role.RETRIEVAL, Role.TRITON, Role.GATEWAY):
        scene.restart(role, HOME.name)
    yield 1.0
    scene.roll()
    yield 1.0
    scene.scale_up()
    yield 1.0
    scene.retrain()
    yield during_s / 4
    scene.store(StoreFault.NONE)
    scene.link.heal()


_UNFELT: Final = (
    refuses_nobody(),
    late_at_most(0.001, of_at_least=1000),
    answers_at_rung(Rung.DISTILLED_RANKER, at=_HOME),
    recovers_within(5.0),
)
_LOSSY: Final = (
    refuses_nobody(),
    late_at_most(0.01),
    answers_at_rung(Rung.RETRIEVAL_SCORE, at=_HOME),
    recovers_within(5.0),
)

FAULTS: Final[tuple[Fault, ...]] = (
    Fault(
        "F1",
        "one tunnel cut",
        "everything on tunnel 1 vanishes both ways; tunnel 2 carries on",
        _one_tunnel(lambda scene: scene.link.shape(Shape(cut=True), 1), lambda scene: scene.link.heal()),
        _UNFELT,
        on_rig=(fact_within("route moved away", ROUTE_MOVES_S),),
        load=_WAN,
        during_s=ROUTE_MOVES_S + 5.0,
        requests=2000,
        needs=(Need.TUNNELS,),
    ),
    Fault(
        "F2",
        "both tunnels cut, then healed",
        "everything between the sites vanishes both ways",
        link((Shape(cut=True), None)),
        (
            refuses_nobody(),
            late_at_most(0.001, of_at_least=5000),
            answers_at_rung(Rung.DISTILLED_RANKER, at=_HOME),
            recovers_within(5.0),
        ),
        load=Load(share=0.6, aws_share=0.25),
        during_s=CUT_S,
        requests=5000,
    ),
    *(
        Fault(
            f"F3-{name}",
            title,
            how,
            link((shape, None)),
            (
                refuses_nobody(),
                late_at_most(0.01),
                answers_at_rung(Rung.RETRIEVAL_SCORE, at=_HOME),
                recovers_within(5.0),
            ),
            load=_WAN,
        )
        for name, title, how, shape in (
            (
                "one-way",
                "loss in one direction",
                "nothing gets to the cloud, what comes from it does",
                Shape(cut=True, direction=Direction.TO_CLOUD),
            ),
            ("5", "5 % random loss", "one packet in twenty vanishes, both ways", Shape(loss=0.05)),
            ("30", "30 % random loss", "three packets in ten vanish, both ways", Shape(loss=0.3)),
        )
    ),
    Fault(
        "F4",
        "tunnel endpoint replaced",
        "the cloud's box of tunnel 1 is ended without a word and another takes its place",
        _one_tunnel(lambda scene: scene.replace_endpoint(1), lambda _: None),
        _UNFELT,
        load=_WAN,
        during_s=ROUTE_MOVES_S,
        after_s=30.0,
        needs=(Need.RIG,),
    ),
    Fault(
        "F5",
        "MTU black hole",
        "packets of more than 1,200 bytes vanish without a word",
        link((Shape(largest=1200), None)),
        _LOSSY,
        load=_WAN,
        needs=(Need.RIG,),
    ),
    Fault(
        "F6",
        "slow link",
        "150 ms more each way and 2 Mbit/s",
        link((Shape(delay_ms=150.0, rate_mbit=2.0), None)),
        (
            refuses_nobody(),
            late_at_most(0.01),
            answers_at_rung(Rung.DISTILLED_RANKER, at=_HOME, share=0.99),
            recovers_within(5.0),
        ),
        load=_WAN,
    ),
    Fault(
        "F7",
        "wrong key of a tunnel",
        "tunnel 1 is set up anew with a key at the cloud's end that home does not have; then with the right one",
        _one_tunnel(lambda scene: scene.use_key(1, wrong=True), lambda scene: scene.use_key(1, wrong=False)),
        _UNFELT,
        on_rig=(fact_within("route moved away", ROUTE_MOVES_S),),
        load=_WAN,
        during_s=ROUTE_MOVES_S,
        after_s=20.0,
        needs=(Need.RIG,),
    ),
    Fault(
        "F8",
        "ranker killed",
        "SIGKILL to home's tritonserver and its children; started again at the end",
        kill(Role.TRITON),
        (refuses_nobody(), late_at_most(0.01), recovers_within(10.0)),
        after_s=14.0,
    ),
    Fault(
        "F9",
        "ranker stopped and continued",
        "SIGSTOP to home's tritonserver and its children: connections stay, nothing is answered; then SIGCONT",
        _frozen,
        (refuses_nobody(), late_at_most(0.01), on_time_within(3.0), recovers_within(5.0)),
        load=Load(share=0.5, at_least=100.0),
    ),
    Fault(
        "F10",
        "ranker ten times slower (grey)",
        "home's tritonserver and its children run one tenth of the time (SIGSTOP and SIGCONT in slices of 20 ms)",
        _grey,
        (refuses_nobody(), on_time_within(3.0), hedges_at_most(), recovers_within(5.0)),
        load=Load(share=0.5, at_least=100.0),
    ),
    *(
        Fault(
            f"F11-{name}",
            f"overload: 2, 5 and 10 times {title}",
            "open loop, from a generator on the same machine: it and the servers share the cores",
            _nothing,
            (
                goodput_at_least(share, _BEFORE_S + 11.0, _BEFORE_S + 16.0),
                recovers_within(10.0),
            ),
            load=Load(share=0.5, overload=_OVERLOAD, of_peak=name == "peak"),
            before_s=_BEFORE_S,
            after_s=15.0,
        )
        for name, title, share in (
            ("capacity", "what home answers in time", 0.75),
            # Answers from the tables make the peak, which is several times the capacity: ten times as much is more than
            # one loop can refuse beside a generator on the same cores. It may not collapse, though.
            ("peak", "the most that home ever answered in time", 0.1),
        )
    ),
    *(
        Fault(
            f"F12-{what.value}",
            f"bad bundle published: {title}",
            how,
            publish(what),
            (refuses_nobody(), late_at_most(0.05), refused_at(_HOME), refused_at(AWS.name.value)),
            load=Load(share=0.3, aws_share=0.25),
            during_s=40.0 if what is BadBundle.SLOW else 14.0,
            needs=(Need.CLOUD,),
        )
        for what, title, how in (
            (BadBundle.SIGNATURE, "signature", "signed by a key that the sites do not trust"),
            (BadBundle.TRUNCATED, "truncation", "one of its objects is cut short in the store"),
            (BadBundle.SHAPE, "shape", "its ranker takes one feature more than the contract says; well signed"),
            (BadBundle.NAN, "NaN", "its ranker answers NaN; well signed"),
            (BadBundle.SLOW, "slow", "its ranker takes a hundred times the arithmetic; well signed"),
        )
    ),
    Fault(
        "F15",
        "intake killed at random",
        "three SIGKILLs at moments of chance, one second down each time",
        _intake_at_random,
        (reads_are_answered(), late_at_most(0.01), recovers_within(5.0)),
        during_s=24.0,
        after_s=14.0,
    ),
    *(
        Fault(
            f"F16-{fault.value}",
            f"object store: {title}",
            how,
            store(fault),
            (refuses_nobody(), late_at_most(0.01), recovers_within(3.0)),
            load=_UNLOADED,
            needs=(Need.CLOUD,),
        )
        for fault, title, how in (
            (StoreFault.ERROR_500, "500", "every request of the agents is answered 500"),
            (StoreFault.ERROR_503, "503", "every request of the agents is answered 503 SlowDown"),
            (StoreFault.SLOW, "slow", "every piece of an answer comes three seconds late"),
            (StoreFault.RESET, "reset", "every connection is reset after its first request"),
        )
    ),
    Fault(
        "F17-full",
        "intake's disk full",
        "the intake's files may not grow (RLIMIT_FSIZE of the running process): every commit fails",
        _full_disk,
        (reads_are_answered(), late_at_most(0.01), recovers_within(3.0)),
    ),
    Fault(
        "F17-read-only",
        "intake's disk read-only",
        "the file system under the spool is remounted",
        None,
        absent="the spool shares its file system with everything else here; the intake's own tests do it",
    ),
    Fault(
        "F18-retrieval",
        "retrieval killed",
        "SIGKILL to home's retrieval",
        kill(Role.RETRIEVAL),
        (refuses_nobody(), late_at_most(0.01), recovers_within(10.0)),
        after_s=14.0,
    ),
    Fault(
        "F18-profiles",
        "feature store down",
        "the table of profiles is renamed under its readers: every look-up fails",
        without_profiles(),
        (refuses_nobody(), late_at_most(0.01), says("profiles_down"), recovers_within(3.0)),
    ),
    Fault(
        "F18-retrieval+profiles",
        "retrieval killed, feature store down",
        "both at once",
        without_profiles(Role.RETRIEVAL),
        (refuses_nobody(), late_at_most(0.01), recovers_within(10.0)),
        after_s=14.0,
    ),
    Fault(
        "F18-ranker+retrieval",
        "ranker and retrieval killed",
        "SIGKILL to both of home's",
        kill(Role.TRITON, Role.RETRIEVAL),
        (refuses_nobody(), late_at_most(0.01), recovers_within(10.0)),
        after_s=14.0,
    ),
    Fault(
        "F18-ranker+profiles",
        "ranker killed, feature store down",
        "both at once",
        without_profiles(Role.TRITON),
        (refuses_nobody(), late_at_most(0.01), recovers_within(10.0)),
        after_s=14.0,
    ),
    Fault(
        "F18-cache",
        "cache down",
        "there is none to take away",
        None,
        absent="no answer is cached anywhere: profiles are read from their store, everything else is in the processes",
    ),
    Fault(
        "F21-credentials",
        "credentials expired mid-run",
        "the object store answers 403 ExpiredToken to every request of the agents",
        store(StoreFault.EXPIRED),
        (refuses_nobody(), late_at_most(0.01), recovers_within(3.0)),
        load=_UNLOADED,
        needs=(Need.CLOUD,),
    ),
    *(
        Fault(
            f"F21-clock-{site.value}",
            f"{site.value}'s clock an hour before, then an hour behind",
            "its processes, Triton's server apart, run under libfaketime, which reads its offset from a file",
            clock(site),
            (refuses_nobody(), late_at_most(0.01), recovers_within(3.0), fact(OWN_CLOCK, IN_ALL), fact(OFF, HOURS)),
            load=Load(share=0.3, aws_share=0.25),
            prepare=own_clock(site),
            needs=(Need.CLOCK,),
        )
        for site in SiteName
    ),
    Fault(
        "F21-dns",
        "DNS dead",
        "no site has a way to a name server: sites are addresses to each other, and so is the local object store",
        _without_dns,
        (refuses_nobody(), late_at_most(0.01), fact(RESOLVED, NOWHERE)),
        load=Load(share=0.3, aws_share=0.25),
        needs=(Need.RIG,),
    ),
    Fault(
        "A1",
        "autonomy: the cloud is gone",
        "both tunnels cut and the object store out of reach; home's parts are restarted, a bundle is rolled, a second "
        "gateway is started, and home trains on its own data",
        _alone,
        (
            fact("restarted", "ready"),
            fact("rolled", "there and back"),
            fact("scaled", "both gateways answer"),
            fact("retrained", "done"),
            recovers_within(10.0),
        ),
        load=_UNLOADED,
        during_s=12.0,
        steps_s=150.0,
        after_s=15.0,
    ),
)


def chosen(names: Sequence[str]) -> list[Fault]:
    """Faults by id (`F18-retrieval`) or number (`F18`), in the suite's order; all where none is named.

    Raises DeskError for a name that no fault has.
    """
    known = {fault.id for fault in FAULTS} | {fault.number for fault in FAULTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        numbers = ", ".join(dict.fromkeys(fault.number for fault in FAULTS))
        raise DeskError(f"no fault is called {', '.join(unknown)}", f"choose of {numbers}")
    return [fault for fault in FAULTS if not names or fault.id in names or fault.number in names]


def lasting(fault: Fault, cut_s: float) -> Fault:
    """With another length of the cut, where it is the one that has one."""
    return dataclasses.replace(fault, during_s=cut_s) if fault.id == "F2" else fault
