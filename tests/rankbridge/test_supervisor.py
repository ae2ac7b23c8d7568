"""Starting, finding, judging and ending the processes of both sites, with stubs in their place."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest

from rankbridge import processes
from rankbridge.faults import DeskError
from rankbridge.layout import Layout
from rankbridge.processes import Identity
from rankbridge.roles import Process, Role
from rankbridge.supervisor import Condition, Facts, Owner, Probe, State, Supervisor, best_rung
from workloads.contract.http import BackendState, Readiness
from workloads.contract.sites import SiteName
from workloads.contract.slo import Rung

MakeStub = Callable[..., Process]
FACTS = Facts(bundle="bundles/abc")


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def supervisor(layout: Layout, said: list[str]) -> Iterator[Supervisor]:
    supervisor = Supervisor(layout, say=said.append)
    yield supervisor
    supervisor.down()


def test_up_waits_until_all_are_ready_and_down_leaves_nothing(supervisor: Supervisor, stub: MakeStub, said: list[str]):
    wanted = [stub(Role.TRITON), stub(Role.GATEWAY, behaviour="gateway")]
    supervisor.up(wanted, FACTS, owner=Owner.UP)
    assert [one.state for one in supervisor.status(wanted)] == [Condition.READY, Condition.READY]
    assert all(one.pss_bytes > 1_000_000 for one in supervisor.status(wanted))
    assert len(said) == 2
    pids = [one.handle.process for one in supervisor.alive()]
    assert sorted(supervisor.down()) == ["onprem-gateway", "onprem-tritonserver"]
    assert not any(processes.is_alive(pid) for pid in pids)
    assert [one.state for one in supervisor.status(wanted)] == [Condition.DOWN, Condition.DOWN]


def test_up_again_starts_only_what_is_missing(supervisor: Supervisor, stub: MakeStub):
    wanted = [stub(Role.TRITON), stub(Role.RETRIEVAL)]
    supervisor.up(wanted, FACTS, owner=Owner.UP)
    before = {one.name: one.pid for one in supervisor.alive()}
    os.kill(before["onprem-tritonserver"], signal.SIGKILL)
    while len(supervisor.alive()) > 1:
        time.sleep(0.02)
    status = supervisor.status(wanted)[0]
    assert status.state is Condition.EXITED
    assert status.detail == "signal SIGKILL"
    started: list[str] = []
    supervisor.up(wanted, FACTS, owner=Owner.UP, before=lambda process: started.append(process.name))
    after = {one.name: one.pid for one in supervisor.alive()}
    assert started == ["onprem-tritonserver"]
    assert after["onprem-retrieval"] == before["onprem-retrieval"]
    assert after["onprem-tritonserver"] != before["onprem-tritonserver"]


def test_a_process_that_dies_is_named_with_its_log_and_the_others_are_ended(
    supervisor: Supervisor, layout: Layout, stub: MakeStub
):
    wanted = [stub(Role.TRITON), stub(Role.AGENT, SiteName.AWS, behaviour="dies")]
    with pytest.raises(DeskError) as error:
        supervisor.up(wanted, FACTS, owner=Owner.UP)
    assert error.value.fault == "agent at aws ended (code 7) before it was ready"
    assert "home/run/logs/aws-agent.log" in error.value.remedy
    assert "stub: something is wrong with the bundle" in error.value.detail
    assert supervisor.alive() == []
    assert layout.log("aws-agent").exists()


def test_a_process_that_dies_while_the_missing_are_started_is_named(supervisor: Supervisor, stub: MakeStub):
    wanted = [stub(Role.TRITON), stub(Role.RETRIEVAL)]
    supervisor.up(wanted[:1], FACTS, owner=Owner.UP)
    (first,) = supervisor.alive()

    def kill(_: Process) -> None:
        os.kill(first.pid, signal.SIGKILL)
        while processes.is_alive(first.handle.process):
            time.sleep(0.02)

    with pytest.raises(DeskError, match=r"tritonserver at onprem ended \(signal SIGKILL\)"):
        supervisor.up(wanted, FACTS, owner=Owner.UP, before=kill)


def test_a_process_that_is_never_ready_is_named_with_what_it_waits_for(supervisor: Supervisor, stub: MakeStub):
    with pytest.raises(DeskError, match=r"agent at onprem is not ready after 1 s .*a model"):
        supervisor.up([stub(Role.AGENT, behaviour="never-ready", within_s=1)], FACTS, owner=Owner.UP)
    assert supervisor.alive() == []


def test_a_gateway_without_its_neighbours_is_ready_alone_but_not_up(supervisor: Supervisor, stub: MakeStub):
    wanted = [stub(Role.GATEWAY, behaviour="gateway-alone", within_s=1)]
    with pytest.raises(DeskError, match="waits for triton"):
        supervisor.up(wanted, FACTS, owner=Owner.UP)


def test_an_interrupted_up_ends_what_it_started(layout: Layout, stub: MakeStub):
    def interrupted(_url: str) -> Probe:
        raise KeyboardInterrupt

    supervisor = Supervisor(layout, prober=interrupted)
    with pytest.raises(KeyboardInterrupt):
        supervisor.up([stub()], FACTS, owner=Owner.UP)
    assert supervisor.alive() == []


def test_a_later_desk_finds_what_a_killed_one_left(layout: Layout, stub: MakeStub):
    Supervisor(layout).up([stub(behaviour="stubborn")], FACTS, owner=Owner.UP)
    later = Supervisor(layout)
    left = [one.handle.process for one in later.alive()]
    assert len(left) == 1
    later.down()
    assert not processes.is_alive(left[0])


def test_a_recycled_pid_in_the_state_is_neither_alive_nor_killed(
    supervisor: Supervisor, layout: Layout, stub: MakeStub
):
    wanted = [stub()]
    supervisor.up(wanted, FACTS, owner=Owner.UP)
    real = supervisor.alive()[0].handle
    file = layout.run / "state.json"
    state = msgspec.json.decode(file.read_bytes(), type=State)
    stale = msgspec.structs.replace(state.processes[0], started=1, keeper_started=1, mark="another")
    file.write_bytes(msgspec.json.encode(msgspec.structs.replace(state, processes=(stale,))))
    assert supervisor.alive() == []
    assert supervisor.status(wanted)[0].state is Condition.EXITED
    supervisor.down()
    assert processes.is_alive(real.process)
    processes.end([real], grace_s=1)


def test_a_state_of_an_earlier_boot_means_nothing(supervisor: Supervisor, layout: Layout, stub: MakeStub):
    supervisor.up([stub()], FACTS, owner=Owner.UP)
    real = supervisor.alive()[0].handle
    file = layout.run / "state.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps({**state, "boot": "another"}))
    assert supervisor.state() is None
    processes.end([real], grace_s=1)


def test_a_state_that_cannot_be_read_is_a_fault_with_a_remedy(supervisor: Supervisor, layout: Layout):
    layout.run.mkdir(parents=True)
    (layout.run / "state.json").write_text("{")
    with pytest.raises(DeskError, match="cannot be read"):
        supervisor.state()
    (layout.run / "state.json").unlink()


def test_two_commands_do_not_start_and_end_processes_at_once(supervisor: Supervisor, layout: Layout):
    with supervisor.lock(), pytest.raises(DeskError, match="another rankbridge command"), Supervisor(layout).lock():
        pytest.fail("the second command got the lock")


def test_the_owner_of_a_state_is_known_to_be_alive_or_gone(supervisor: Supervisor, stub: MakeStub):
    supervisor.up([stub()], FACTS, owner=Owner.REHEARSAL)
    state = supervisor.state()
    assert state is not None
    assert state.owner_is_alive
    me = processes.identify(os.getpid())
    assert me == Identity(state.owner_pid, state.owner_started)
    assert not msgspec.structs.replace(state, owner_started=state.owner_started - 1).owner_is_alive


@pytest.mark.parametrize(
    ("down", "rung"),
    [
        (set(), Rung.FULL_RANKER),
        ({"intake"}, Rung.FULL_RANKER),
        ({"peer"}, Rung.FULL_RANKER),
        ({"triton"}, Rung.FULL_RANKER),
        ({"triton", "peer"}, Rung.DISTILLED_RANKER),
        ({"triton", "peer", "student"}, Rung.RETRIEVAL_SCORE),
        ({"retrieval"}, Rung.TRADITIONAL),
        ({"triton", "retrieval"}, Rung.TRADITIONAL),
    ],
)
def test_the_best_rung_follows_from_the_neighbours_that_are_up(down: set[str], rung: Rung):
    backends = {
        name: BackendState(up=name not in down, detail="asked")
        for name in ("triton", "peer", "student", "retrieval", "intake", "profiles")
    }
    readiness = Readiness(ready=True, site="onprem", bundle="0" * 12, backends=backends, missing=sorted(down))
    assert best_rung(readiness) is rung
