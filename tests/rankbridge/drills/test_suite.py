"""The suite over a scene and a driver that are fakes: each row is judged, and every expectation can fail."""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loadtests.drive import Drive
from loadtests.samples import Run, RunHeader, Sample
from rankbridge.drills import page, records
from rankbridge.drills.catalogue import chosen
from rankbridge.drills.evidence import (
    answers_at_rung,
    goodput_at_least,
    hedges_at_most,
    late_at_most,
    on_time_within,
    recovers_within,
    refuses_nobody,
    says,
)
from rankbridge.drills.fault import Fault, Load, Need
from rankbridge.drills.records import Capacity, Kept, Row, Suite
from rankbridge.drills.scene import FakeScene
from rankbridge.drills.suite import Driven, FaultSuite, hedges_in, kept
from rankbridge.drills.table import checks_table, faults_table, markdown
from rankbridge.faults import DeskError
from workloads.contract.sites import HOME, Site
from workloads.contract.slo import Rung

BUNDLE = "0" * 12
Answers = Callable[[float], dict[str, object]]
CAPACITY = Capacity(in_time_per_s=100.0, peak_per_s=150.0)


class FakeGround(FakeScene):
    """A scene that offers everything but a rig."""

    def __init__(self, events: Path) -> None:
        super().__init__()
        self.offers = frozenset({Need.CLOUD, Need.TUNNELS})
        self.published = frozenset({BUNDLE})
        self.events = events
        self.notes: dict[str, str] = {}

    def gateway(self, site: Site) -> str:
        return "http://127.0.0.1:9"

    def restore(self) -> None:
        self.told.append("restore")


class FakeDriver:
    """Answers every request that is due as it is told, without any time passing."""

    def __init__(self, answers: Answers, *, acknowledged: tuple[str, ...] = (), stray: int = 0, lost: int = 0) -> None:
        self._answers, self._acknowledged, self._stray, self._lost = answers, acknowledged, stray, lost

    def __call__(self, drive: Drive, steps: Iterator[float], before_s: float, name: str) -> Driven:
        waits = list(steps)
        samples = [a_sample(at, self._answers(at)) for at in drive.due()]
        header = RunHeader(
            suite="driver", started_ms=0, warmup_s=0, arrivals="constant", rate_per_user=1, seed=1, targets=[]
        )
        run = Run(header=header, samples=samples[self._lost :], seconds=drive.seconds, stray=self._stray)
        during = sum(waits)
        return Driven(run, self._acknowledged, "a fake", before_s, before_s + during)


def a_sample(at: float, changes: dict[str, object]) -> Sample:
    fields: dict[str, object] = {
        "endpoint": "/v1/recommend",
        "site": "onprem",
        "at_s": at,
        "latency_ms": 12.0,
        "lateness_ms": 0.1,
        "status": 200,
        "rung": 1,
        "best_rung": 1,
        "bundle": BUNDLE,
        "ranked": 200,
        "sent_to": "onprem",
    }
    return Sample(**(fields | changes))  # type: ignore[arg-type]  # a test's own table


def well(_: float) -> dict[str, object]:
    return {}


@pytest.fixture
def events(tmp_path: Path) -> Path:
    path = tmp_path / "events.sqlite"
    with sqlite3.connect(path) as store:
        store.execute("CREATE TABLE events (event_id TEXT)")
        store.executemany("INSERT INTO events VALUES (?)", [("a",), ("b",)])
    store.close()
    return path


def a_fault(*expects: object, **changes: object) -> Fault:
    (fault,) = chosen(["F8"])
    return dataclasses.replace(fault, expects=expects, load=Load(share=1.0), **changes)  # type: ignore[arg-type]


def row(events: Path, fault: Fault, driver: FakeDriver) -> Row:
    return FaultSuite(FakeGround(events), driver, say=lambda _: None).row(fault, CAPACITY)


def test_a_fault_that_nobody_feels_passes_and_the_scene_is_restored(events: Path):
    ground = FakeGround(events)
    found = FaultSuite(ground, FakeDriver(well, acknowledged=("a", "b")), say=lambda _: None).row(
        a_fault(refuses_nobody(), late_at_most(0.001), recovers_within(1.0)), CAPACITY
    )
    assert found.passed
    assert ground.told == ["restore", "kill tritonserver at onprem", "bring back", "restore"]
    assert found.seen_after_s is None
    assert found.recovered_after_s == 0.0


def test_what_is_prepared_is_done_before_the_load_and_undone_with_the_rest(events: Path):
    ground = FakeGround(events)
    fault = dataclasses.replace(a_fault(), prepare=lambda scene: scene.give_clock(HOME.name))
    FaultSuite(ground, FakeDriver(well), say=lambda _: None).row(fault, CAPACITY)
    assert ground.told == ["restore", "give onprem a clock", "kill tritonserver at onprem", "bring back", "restore"]


@pytest.mark.parametrize(
    ("expects", "bad"),
    [
        (refuses_nobody(), {"status": 503, "error": "busy", "rung": None, "problem": "/problems/busy"}),
        (refuses_nobody(), {"status": 429, "error": "busy", "rung": None, "problem": "/problems/busy"}),
        (refuses_nobody(), {"status": 0, "error": "connection broke", "rung": None}),
        (late_at_most(0.001), {"latency_ms": 150.0}),
        (answers_at_rung(Rung.DISTILLED_RANKER), {"rung": 3}),
        (on_time_within(3.0), {"latency_ms": 150.0}),
        (recovers_within(3.0), {"rung": 3}),
        (goodput_at_least(0.6, 5.0, 13.0), {"latency_ms": 500.0}),
    ],
)
def test_every_expectation_can_fail(events: Path, expects: object, bad: dict[str, object]):
    fault = a_fault(expects)
    assert row(events, fault, FakeDriver(well)).checks[-1].held
    assert not row(events, fault, FakeDriver(lambda at: bad if at >= 5.0 else {})).checks[-1].held


def test_a_row_with_one_broken_expectation_fails(events: Path):
    found = row(events, a_fault(late_at_most(0.001), refuses_nobody()), FakeDriver(lambda _: {"latency_ms": 150.0}))
    assert [check.held for check in found.checks[-2:]] == [False, True]
    assert found.passed is False


@pytest.mark.parametrize(
    "driver",
    [
        FakeDriver(well, stray=1),
        FakeDriver(well, lost=1),
        FakeDriver(well, acknowledged=("a", "never stored")),
        FakeDriver(lambda at: {"bundle": "f" * 12} if at > 6 else {}),
        FakeDriver(lambda at: {"status": 502, "error": "http 502", "rung": None} if at > 6 else {}),
        FakeDriver(lambda at: {"error": "9 items instead of 10"} if at > 6 else {}),
    ],
    ids=["stray", "lost", "not stored", "unpublished", "untyped", "wrong"],
)
def test_what_holds_under_every_fault_can_fail_too(events: Path, driver: FakeDriver):
    assert row(events, a_fault(late_at_most(1.0)), driver).passed is False


def test_an_event_that_is_stored_twice_is_seen(events: Path):
    assert kept(("a", "b"), events) == Kept(acknowledged=2, stored=2, rows=2)
    with sqlite3.connect(events) as store:
        store.execute("INSERT INTO events VALUES ('a')")
    store.close()
    assert kept(("a", "b"), events) == Kept(acknowledged=2, stored=2, rows=3)
    assert kept(("a",), events.with_name("none.sqlite")).stored == 0


def test_hedges_that_nobody_counts_are_not_within_their_budget(events: Path):
    assert not row(events, a_fault(hedges_at_most()), FakeDriver(well)).checks[-1].held


def test_hedges_are_summed_over_sites_and_none_yet_is_not_none_counted():
    counter = "# TYPE rankbridge_hedges_total counter\n"
    assert hedges_in("# TYPE rankbridge_answers_total counter\n") is None
    assert hedges_in(counter) == 0.0
    lines = 'rankbridge_hedges_total{site="aws"} 3.0\nrankbridge_hedges_total{site="onprem"} 1.0\n'
    assert hedges_in(counter + lines) == 4.0


def test_a_fault_that_does_not_bite_is_no_proof(events: Path):
    fault = a_fault(says("profiles_down"))
    assert not row(events, fault, FakeDriver(well)).checks[-1].held
    found = row(events, fault, FakeDriver(lambda at: {"reason": "profiles_down"} if at >= 5.5 else {}))
    assert found.checks[-1].held
    assert found.seen_after_s is not None


def test_what_cannot_be_had_is_a_row_that_says_so(events: Path):
    (fault,) = chosen(["F4"])
    found = row(events, fault, FakeDriver(well))
    assert found.passed is None
    assert "tunnels" in (found.left_out or "")


def test_a_fault_that_cannot_be_healed_has_failed_and_the_others_are_made(events: Path):
    class Stubborn(FakeGround):
        def bring_back(self) -> None:
            raise DeskError("tritonserver does not come up", "see its log")

    suite = FaultSuite(Stubborn(events), FakeDriver(well), say=lambda _: None)
    found = suite.run([a_fault(late_at_most(0.001)), *chosen(["F2"])], lambda _: None)
    assert [one.passed for one in found.rows] == [False, True]
    assert "does not come up" in found.rows[0].checks[0].measured
    assert "does not come up" in page.render(found)


def test_a_machine_that_was_late_before_the_fault_is_told_of_and_excuses_nothing(events: Path):
    found = row(events, a_fault(late_at_most(0.001)), FakeDriver(lambda at: {"latency_ms": 150.0} if at < 6 else {}))
    assert found.notes[0].startswith("500 of 500 reads were late before the fault")
    assert found.passed is False


def test_capacity_is_the_highest_rate_that_is_still_in_time(events: Path):
    class Saturating(FakeDriver):
        def __call__(self, drive: Drive, steps: Iterator[float], before_s: float, name: str) -> Driven:
            slow = drive.legs[0].rate > 135.0
            return FakeDriver(lambda _: {"latency_ms": 400.0} if slow else {})(drive, steps, before_s, name)

    found = FaultSuite(FakeGround(events), Saturating(well), say=lambda _: None).capacity()
    assert found.in_time_per_s == 135.0
    assert found.peak_per_s == pytest.approx(135.0)
    assert [rate for rate, _, _ in found.legs] == [40.0, 60.0, 90.0, 135.0, 200.0, 300.0]


def test_a_suite_is_written_shown_and_drawn(events: Path, tmp_path: Path):
    faults = [a_fault(late_at_most(0.001)), *chosen(["F4", "F21-dns"])]
    kept_suites: list[Suite] = []
    bad = FakeDriver(lambda at: {"latency_ms": 300.0, "rung": 3} if 6 < at < 8 else {})
    found = FaultSuite(FakeGround(events), bad, say=lambda _: None).run(faults, kept_suites.append)
    assert [len(one.rows) for one in kept_suites] == [1, 2, 3]
    assert not found.passed
    records.write(found, tmp_path)
    assert records.read(tmp_path) == found
    text = page.render(found)
    assert "NOT HELD" in text
    assert text.count("<svg") == 3
    assert "left out" in text
    assert len(faults_table(found).rows) == 3
    assert markdown(found).count("\n") == 5
    assert len(checks_table(found).rows) == 1


@pytest.mark.parametrize(("acknowledged", "counted"), [((), True), (("never stored",), False)])
def test_a_slow_machine_fails_the_times_and_never_what_was_counted(
    events: Path, acknowledged: tuple[str, ...], *, counted: bool
):
    slow = FakeDriver(lambda _: {"latency_ms": 150.0}, acknowledged=acknowledged)
    faults = [a_fault(late_at_most(0.001), refuses_nobody())]
    found = FaultSuite(FakeGround(events), slow, say=lambda _: None).run(faults, lambda _: None)
    assert not found.passed
    assert found.counted is counted


def test_a_suite_in_which_nothing_was_made_has_not_passed(events: Path):
    found = FaultSuite(FakeGround(events), FakeDriver(well), say=lambda _: None).run(chosen(["F4"]), lambda _: None)
    assert not found.passed


def test_the_vpn_cut_of_a_suite_is_found_where_it_was_made(events: Path, tmp_path: Path):
    assert page.vpn_cut(tmp_path) is None
    found = FaultSuite(FakeGround(events), FakeDriver(well), say=lambda _: None).run(
        chosen(["F2", "F4"]), lambda _: None
    )
    records.write(found, tmp_path)
    cut = page.vpn_cut(tmp_path)
    assert cut is not None
    assert cut.id == "F2"
    drawn = page.timelines(cut)
    assert drawn is not None
    assert drawn.latency.startswith("<svg")
