"""What the catalogue promises to do: every fault of the suite is in it, does something, undoes it, and can fail."""

from __future__ import annotations

import pytest

from rankbridge.drills.catalogue import CI, FAULTS, chosen, lasting
from rankbridge.drills.fault import Fault
from rankbridge.drills.scene import FakeScene
from rankbridge.faults import DeskError
from workloads.contract.sites import SiteName

SUITE = (
    "F1",
    "F2",
    "F3",
    "F4",
    "F5",
    "F6",
    "F7",
    "F8",
    "F9",
    "F10",
    "F11",
    "F12",
    "F15",
    "F16",
    "F17",
    "F18",
    "F21",
    "A1",
)
MADE = [fault for fault in FAULTS if fault.script is not None]


def play(fault: Fault) -> tuple[FakeScene, list[float]]:
    assert fault.script is not None
    scene = FakeScene()
    return scene, list(fault.script(scene, fault.during_s))


def test_every_fault_of_the_suite_has_a_row_in_its_order():
    assert tuple(dict.fromkeys(fault.number for fault in FAULTS)) == SUITE
    assert len({fault.id for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", [one for one in FAULTS if one.script is None], ids=lambda one: one.id)
def test_what_cannot_be_had_says_why(fault: Fault):
    assert fault.absent or fault.needs


@pytest.mark.parametrize("fault", MADE, ids=lambda one: one.id)
def test_a_fault_waits_does_something_and_expects_something(fault: Fault):
    scene, waits = play(fault)
    assert waits
    assert all(wait >= 0 for wait in waits)
    assert scene.told or scene.link.told or fault.load.overload
    assert fault.expects


@pytest.mark.parametrize("fault", MADE, ids=lambda one: one.id)
def test_what_a_fault_does_it_undoes(fault: Fault):
    scene, _ = play(fault)
    assert not scene.link.told or scene.link.told[-1] == (None, None)
    undone = {
        "kill": "bring back",
        "freeze": "thaw",
        "slow": "thaw",
        "hide": "show",
        "fill": "free",
        "publish bad": "publish good",
    }
    for does, undoes in undone.items():
        places = [place for place, told in enumerate(scene.told) if told.startswith(does)]
        if places:
            assert any(told.startswith(undoes) for told in scene.told[places[-1] :])
    stores = [told for told in scene.told if told.startswith("store ")]
    assert not stores or stores[-1] == "store none"


def test_the_intake_is_killed_three_times_and_always_brought_back():
    (fault,) = chosen(["F15"])
    scene, waits = play(fault)
    assert scene.told == ["kill intake at onprem", "bring back"] * 3
    assert sum(waits) <= fault.during_s


def test_faults_are_chosen_by_number_and_by_id():
    assert [fault.id for fault in chosen(["F8", "F18-profiles"])] == ["F8", "F18-profiles"]
    assert {fault.id for fault in chosen(["F16"])} == {"F16-500", "F16-503", "F16-slow", "F16-reset"}
    assert len(chosen([])) == len(FAULTS)
    assert [fault.number for fault in chosen(CI)] == ["F1", "F2", "F8", "F10"]
    with pytest.raises(DeskError, match="no fault is called F99"):
        chosen(["F8", "F99"])


def test_a_cut_lasts_as_long_as_asked_and_until_its_requests_were_sent():
    (cut,) = chosen(["F2"])
    assert lasting(cut, 120.0).during_s == 120.0
    few = cut.lasting(100.0)
    whole = few.before_s + few.during_s + few.after_s
    assert whole * few.load.rate(100.0) >= 5000
    assert few.load.rate(100.0) <= 60.0
    assert cut.lasting(10_000.0).during_s == cut.during_s


def test_a_cuts_load_enters_at_both_sites_and_asks_no_events_of_aws():
    (cut,) = chosen(["F2"])
    drive = cut.drive("http://home", "http://aws", 100.0, 150.0, seed=1)
    home, aws = drive.aims
    assert "/v1/events" in home.mix
    assert "/v1/events" not in aws.mix


def test_an_overload_is_a_multiple_of_homes_capacity_or_of_the_measured_peak_and_open_loop():
    rates = {"F11-capacity": [50.0, 200.0, 500.0, 1000.0, 50.0], "F11-peak": [50.0, 400.0, 1000.0, 2000.0, 50.0]}
    for fault in chosen(["F11"]):
        drive = fault.lasting(100.0).drive("http://home", "http://aws", 100.0, 200.0, seed=1)
        assert [leg.rate for leg in drive.legs] == rates.pop(fault.id)
    assert not rates


def test_a_clock_is_an_hour_before_then_behind_then_right():
    for fault, site in zip(chosen(["F21"])[1:3], SiteName, strict=True):
        scene, waits = play(fault)
        assert scene.told == [f"clock of {site} {off} s" for off in ("+3600", "-3600", "+0")]
        assert len(waits) == 2
