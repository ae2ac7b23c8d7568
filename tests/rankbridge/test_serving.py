"""Who may start and end processes: an operator's sites are never taken away, a dead rehearsal's leftovers are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import msgspec
import pytest

from rankbridge import processes
from rankbridge.faults import DeskError
from rankbridge.layout import Layout
from rankbridge.roles import Process, Role
from rankbridge.serving import Serving
from rankbridge.supervisor import Facts, Owner, State, Supervisor
from workloads.bundle import manifest as manifests
from workloads.bundle.fake import build_fake_bundle
from workloads.contract.sites import SiteName
from workloads.data.profiles import write_profiles

MakeStub = Callable[..., Process]
FACTS = Facts(bundle="bundles/abc")


@pytest.fixture
def serving(layout: Layout) -> Iterator[Serving]:
    serving = Serving(layout, Supervisor(layout), dict(os.environ))
    layout.run.mkdir(parents=True)
    yield serving
    serving.down()


def test_a_rehearsal_does_not_take_an_operators_sites_away(serving: Serving, stub: MakeStub):
    serving.supervisor.up([stub()], FACTS, owner=Owner.UP)
    with pytest.raises(DeskError, match="the sites are up already") as error:
        serving.make_way(Owner.REHEARSAL)
    assert "rankbridge down" in error.value.remedy
    assert len(serving.supervisor.alive()) == 1


def test_what_a_dead_rehearsal_left_is_ended_without_asking(serving: Serving, layout: Layout, stub: MakeStub):
    serving.supervisor.up([stub()], FACTS, owner=Owner.REHEARSAL)
    left = serving.supervisor.alive()[0].handle.process
    state = serving.supervisor.state()
    assert state is not None
    dead = msgspec.structs.replace(state, owner_pid=state.owner_pid, owner_started=1)
    (layout.run / "state.json").write_bytes(msgspec.json.encode(dead, order="sorted"))
    assert msgspec.json.decode((layout.run / "state.json").read_bytes(), type=State) == dead
    serving.make_way(Owner.REHEARSAL)
    assert not processes.is_alive(left)


def test_a_living_rehearsal_is_left_alone(serving: Serving, layout: Layout, stub: MakeStub):
    serving.supervisor.up([stub()], FACTS, owner=Owner.REHEARSAL)
    state = serving.supervisor.state()
    parent = processes.identify(os.getppid())
    assert state is not None
    assert parent is not None
    other = msgspec.structs.replace(state, owner_pid=parent.pid, owner_started=parent.started)
    (layout.run / "state.json").write_bytes(msgspec.json.encode(other))
    with pytest.raises(DeskError, match=f"a rehearsal is running \\(pid {parent.pid}\\)"):
        serving.make_way(Owner.UP, FACTS)


def test_running_sites_do_not_change_their_bundle(serving: Serving, stub: MakeStub):
    serving.supervisor.up([stub()], FACTS, owner=Owner.UP)
    serving.make_way(Owner.UP, FACTS)
    with pytest.raises(DeskError, match="that cannot change while they run"):
        serving.make_way(Owner.UP, Facts(bundle="bundles/other"))


def test_a_bundle_is_named_by_the_begin_of_its_id_or_is_the_newest(serving: Serving, layout: Layout):
    first = build_fake_bundle(layout.bundles)
    assert serving.bundle(None) == first
    assert serving.bundle(first.name[:6]) == first
    with pytest.raises(DeskError, match="no bundle") as error:
        serving.bundle("zz")
    assert first.name[:12] in error.value.remedy


def test_profiles_of_another_data_set_are_told(serving: Serving, layout: Layout):
    bundle = build_fake_bundle(layout.bundles)
    trained_on = manifests.decode((bundle / manifests.MANIFEST).read_bytes()).dataset_digest
    assert "home has no profiles" in (serving.mismatch(bundle) or "")
    write_profiles(layout.profiles, [], {"dataset": f"fake-{trained_on[:12]}"})
    assert serving.mismatch(bundle) is None
    write_profiles(layout.profiles, [], {"dataset": "retail-0123456789ab"})
    assert "are of data set retail-0123456789ab" in (serving.mismatch(bundle) or "")


def test_a_role_that_a_site_does_not_have_is_refused(serving: Serving):
    with pytest.raises(DeskError, match="nothing is up"):
        serving.restart(Role.INTAKE, SiteName.AWS)
