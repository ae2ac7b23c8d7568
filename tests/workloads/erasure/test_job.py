"""Places are emptied in order, again and again, until nobody in the queue can be named by anything under way."""

from __future__ import annotations

import io
import time
from pathlib import Path

import msgspec
import pytest

from workloads.erasure.job import ACTION, SETTLE_MS, run_pass
from workloads.erasure.places import MemoryPlace, PlaceError, places_of
from workloads.privacy.audit import MemoryAudit
from workloads.privacy.vault import MemoryVault
from workloads.telemetry.progress import Progress


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def quiet() -> Progress:
    return Progress(io.StringIO())


def forgotten(*users: str) -> tuple[MemoryVault, dict[str, str]]:
    vault = MemoryVault()
    names = vault.admit(users)
    for user in users:
        vault.forget(user)
    return vault, names


def test_every_place_is_emptied_then_it_is_said_and_only_then_the_queue_forgets():
    vault, names = forgotten("ada", "bob")
    places = [MemoryPlace("spool", {names["ada"]: 3, "p1-other": 9}), MemoryPlace("lake", {names["bob"]: 2})]
    audit = MemoryAudit()
    tickets = [erasure.ticket for erasure in vault.queue()]
    assert run_pass(vault, places, audit, quiet(), clock=now_ms, settle_ms=0) == 0
    assert [place.holds for place in places] == [{"p1-other": 9}, {}]
    assert vault.queue() == []
    assert [(entry.action, entry.subject) for entry in audit.entries] == [(ACTION, ticket) for ticket in tickets]
    assert audit.entries[0].detail["spool"] == 3
    assert audit.entries[0].detail["people_in_pass"] == 2
    text = msgspec.json.encode(audit.entries).decode()
    assert not any(name in text for name in (*names, *names.values()))


def test_nobody_leaves_the_queue_before_a_pass_that_began_after_every_request_on_its_way_has_ended():
    vault, names = forgotten("ada")
    place, audit = MemoryPlace("spool", {names["ada"]: 1}), MemoryAudit()
    asked = vault.queue()[0].asked_ms
    assert run_pass(vault, [place], audit, quiet(), clock=lambda: asked + 5_000) == SETTLE_MS - 5_000
    assert place.holds == {}
    assert len(vault.queue()) == 1
    place.holds = {names["ada"]: 1}  # an event that was on its way
    assert run_pass(vault, [place], audit, quiet(), clock=lambda: asked + SETTLE_MS) == 0
    assert place.holds == {}
    assert vault.queue() == []
    assert len(audit.entries) == 1


class Killed(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("step", range(4))
def test_a_job_that_is_killed_anywhere_is_completed_by_the_next(step: int):
    vault, names = forgotten("ada")
    places = [MemoryPlace(name, {names["ada"]: 1}) for name in ("spool", "lake", "profiles")]
    audit = MemoryAudit()
    if step < 3:
        places[step].fault = Killed()
    else:
        vault.done = lambda _: (_ for _ in ()).throw(Killed())  # type: ignore[method-assign] - killed before its commit
    with pytest.raises(Killed):
        run_pass(vault, places, audit, quiet(), clock=now_ms, settle_ms=0)
    assert len(vault.queue()) == 1
    vars(vault).pop("done", None)
    run_pass(vault, places, audit, quiet(), clock=now_ms, settle_ms=0)
    assert all(place.holds == {} for place in places)
    assert vault.queue() == []


def test_a_place_that_cannot_be_emptied_keeps_everybody_in_the_queue():
    vault, names = forgotten("ada")
    places = [MemoryPlace("spool", {names["ada"]: 1}), MemoryPlace("lake", {names["ada"]: 1})]
    places[1].fault = PlaceError("the lake is busy", "wait")
    audit = MemoryAudit()
    with pytest.raises(PlaceError, match="busy; wait"):
        run_pass(vault, places, audit, quiet(), clock=now_ms, settle_ms=0)
    assert len(vault.queue()) == 1
    assert audit.entries == []


def test_a_home_with_a_spool_and_no_intake_is_refused(tmp_path: Path):
    (tmp_path / "onprem").mkdir()
    (tmp_path / "onprem" / "events.sqlite").touch()
    spool, *_ = places_of(tmp_path, intake=None, profiles=None, bucket=None, knows=lambda _: False)
    with pytest.raises(PlaceError, match="only a running intake may change it; start it"):
        spool.remove({"p1-x"})
    spool, *_ = places_of(tmp_path, intake="http://127.0.0.1:1", profiles=None, bucket=None, knows=lambda _: False)
    with pytest.raises(PlaceError, match="does not answer"):
        spool.remove({"p1-x"})
