"""Emptying nodes over fakes: order, budgets, deadlines, deaths in between, and what AWS is told."""

from __future__ import annotations

import datetime
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from workloads.contract.operators import IN_ROTATION, ROTATION_LABEL, SITE_LABEL, WITHDRAWN
from workloads.operators.cloud import CloudFault
from workloads.operators.cluster import MemoryCluster, Node, Pod
from workloads.operators.draining import HOLD_S, Handler, Times
from workloads.operators.notices import Hook, Kind, MemoryHooks, MemoryNotices
from workloads.operators.router import Services

INSTANCE = "i-0aaaaaaaaaaaaaaaa"
HOOK = Hook("g", "drained", "87654321-4321-4321-4321-210987654321")
START = 1_800_000_000.0


def body(kind: Kind, *, at: float = START, instance: str = INSTANCE) -> str:
    detail = {"instance-id": instance}
    if kind is Kind.TERMINATING:
        detail = {
            "EC2InstanceId": instance,
            "AutoScalingGroupName": HOOK.group,
            "LifecycleHookName": HOOK.name,
            "LifecycleActionToken": HOOK.token,
            "LifecycleTransition": "autoscaling:EC2_INSTANCE_TERMINATING",
        }
    time = datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat()
    return json.dumps({"detail-type": kind, "time": time, "detail": detail})


def pod(name: str, **changes: object) -> Pod:
    made: dict[str, object] = {"stays": False, "leaving": False, "labels": {ROTATION_LABEL: IN_ROTATION}}
    return Pod("serving", name, **{**made, **changes})  # type: ignore[arg-type]  # a test's own names


class Scene:
    """One node that ends, one at home, a queue and a clock."""

    def __init__(self, *bodies: str, times: Times | None = None) -> None:
        here = Node(INSTANCE, f"aws:///eu-central-1a/{INSTANCE}", {SITE_LABEL: "aws"}, ready=True)
        home = Node("worker-1", "k3s://worker-1", {SITE_LABEL: "onprem"}, ready=True)
        pods = [pod("triton"), pod("gateway"), pod("plugin", stays=True, labels={})]
        self.cluster = MemoryCluster([here, home], {INSTANCE: pods, "worker-1": [pod("home")]})
        self.notices = MemoryNotices(*bodies)
        self.hooks = MemoryHooks()
        self.now = START
        self.times = times or Times()
        self.begin()

    def begin(self) -> None:
        """A handler of its own, as after a restart."""
        self.registry = CollectorRegistry()
        self.handler = Handler(
            self.cluster,
            Services(self.cluster, ["serving"]),
            self.notices,
            self.hooks,
            site="aws",
            region="eu-central-1",
            times=self.times,
            clock=lambda: self.now,
            registry=self.registry,
        )

    def step(self, seconds: float = 0) -> str:
        self.now += seconds
        self.handler.offer(self.notices.receive(0, HOLD_S))
        return self.handler.step()

    def count(self, metric: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"rankbridge_spot_{metric}_total", labels)


def test_a_node_loses_its_weight_then_new_pods_then_its_pods_and_is_let_go_last():
    scene = Scene(body(Kind.TERMINATING))
    scene.step()
    assert scene.hooks.completed == []
    assert scene.cluster.log == [
        ("label", "serving", "triton", ROTATION_LABEL, WITHDRAWN),
        ("label", "serving", "gateway", ROTATION_LABEL, WITHDRAWN),
        ("cordon", INSTANCE),
        ("evict", "serving", "triton", "None"),
        ("evict", "serving", "gateway", "None"),
    ]
    scene.step(1)
    assert scene.hooks.completed == [(INSTANCE, HOOK)]
    assert scene.notices.deleted == ["m0"]
    assert [p.name for p in scene.cluster.bound[INSTANCE]] == ["plugin"]
    assert [p.name for p in scene.cluster.bound["worker-1"]] == ["home"]
    assert not scene.handler.busy
    assert scene.count("instances", outcome="drained") == 1


def test_a_budget_is_respected_until_it_gives_way():
    scene = Scene(body(Kind.INTERRUPTION))
    scene.cluster.refuses = lambda one: one.name == "triton"
    for _ in range(10):
        scene.step(2)
    assert [p.name for p in scene.cluster.bound[INSTANCE]] == ["triton", "plugin"]
    assert scene.notices.deleted == []
    scene.cluster.refuses = lambda _: False
    scene.step(2)
    scene.step(2)
    assert scene.notices.deleted == ["m0"]
    assert scene.count("evictions", result="refused") == 10


def test_what_a_budget_holds_at_the_deadline_is_left_to_the_nodes_end():
    scene = Scene(body(Kind.INTERRUPTION))
    scene.cluster.refuses = lambda one: one.name == "triton"
    scene.step(119)
    assert scene.handler.busy
    scene.step(2)
    assert not scene.handler.busy
    assert scene.notices.deleted == ["m0"]
    assert scene.count("pods_left") == 1
    assert scene.count("instances", outcome="left") == 1


def test_two_minutes_count_from_the_notice_and_not_from_its_arrival():
    scene = Scene(body(Kind.INTERRUPTION, at=START - 300))
    scene.cluster.refuses = lambda _: True
    scene.step()
    assert ("cordon", INSTANCE) in scene.cluster.log
    assert not scene.handler.busy


def test_pods_get_no_more_time_to_end_than_their_node_has():
    scene = Scene(body(Kind.INTERRUPTION, at=START - 100))
    scene.step()
    assert ("evict", "serving", "triton", "20") in scene.cluster.log


def test_a_rebalance_recommendation_only_cordons():
    scene = Scene(body(Kind.REBALANCE))
    scene.step()
    assert scene.cluster.log == [("cordon", INSTANCE)]
    assert scene.notices.deleted == ["m0"]


def test_a_later_notice_for_the_same_node_shortens_its_time_and_all_are_answered():
    scene = Scene(body(Kind.TERMINATING))
    scene.cluster.refuses = lambda _: True
    scene.step()
    scene.notices.waiting = MemoryNotices("", body(Kind.INTERRUPTION), body(Kind.REBALANCE)).waiting[1:]
    scene.step(1)
    scene.step(118)
    assert scene.hooks.completed == []
    scene.step(2)
    assert scene.hooks.completed == [(INSTANCE, HOOK)]
    assert sorted(scene.notices.deleted) == ["m0", "m1", "m2"]


def test_a_lifecycle_action_is_kept_waiting_by_heartbeats_and_its_message_from_others():
    scene = Scene(body(Kind.TERMINATING))
    scene.cluster.refuses = lambda _: True
    for _ in range(30):
        scene.step(10)
    assert len(scene.hooks.beats) == 4
    assert len(scene.notices.held) == 29
    assert scene.hooks.completed == []
    scene.step(301)
    assert scene.hooks.completed == [(INSTANCE, HOOK)]


@pytest.mark.parametrize("instance", ["i-0bbbbbbbbbbbbbbbb", "worker-1"])
def test_an_unknown_instance_is_let_go_at_once(instance: str):
    scene = Scene(body(Kind.TERMINATING, instance=instance), body(Kind.INTERRUPTION, instance=instance))
    scene.step()
    assert scene.cluster.log == []
    if instance.startswith("i-"):
        assert sorted(scene.notices.deleted) == ["m0", "m1"]
        assert scene.hooks.completed == [(instance, HOOK)]
    else:  # no instance at all: nothing a message says makes a host of ours an instance
        assert scene.notices.deleted == []
        assert scene.count("poison") == 2


def test_poison_is_counted_and_left_to_its_queue():
    scene = Scene("{", body(Kind.INTERRUPTION))
    scene.step()
    scene.step(1)
    assert scene.count("poison") == 1
    assert scene.notices.deleted == ["m1"]
    assert list(scene.notices.taken) == ["m0"]


def test_a_handler_that_dies_in_between_goes_on_where_it_was():
    scene = Scene(body(Kind.TERMINATING))
    scene.cluster.refuses = lambda one: one.name == "triton"
    scene.step()
    scene.begin()
    scene.notices.expire()
    scene.cluster.refuses = lambda _: False
    scene.step(20)
    scene.step(1)
    done = [entry for entry in scene.cluster.log if entry[0] != "refuse"]
    assert len(done) == len(set(done)) == 5
    assert scene.hooks.completed == [(INSTANCE, HOOK)]
    assert scene.notices.deleted == ["m0"]


def test_a_cluster_that_does_not_answer_is_asked_until_the_deadline_and_the_instance_let_go_after():
    scene = Scene(body(Kind.TERMINATING))
    scene.cluster.fault = "cannot list nodes"
    assert scene.step() == "cannot list nodes"
    scene.step(599)
    assert scene.hooks.completed == []
    scene.step(2)
    assert scene.hooks.completed == [(INSTANCE, HOOK)]
    assert scene.count("instances", outcome="unreached") == 1


def test_a_denied_step_keeps_nobody_from_the_next():
    scene = Scene(body(Kind.INTERRUPTION))
    scene.cluster.denies = frozenset({"label_pod", "cordon"})
    scene.step()
    assert [entry[0] for entry in scene.cluster.log] == ["evict", "evict"]
    scene.step(1)
    assert scene.notices.deleted == ["m0"]


def test_a_cloud_that_does_not_take_the_answer_is_asked_again_and_then_gets_its_message_back():
    scene = Scene(body(Kind.TERMINATING))
    scene.hooks.fault = CloudFault("throttled")
    scene.step()
    scene.step(1)
    assert scene.notices.deleted == []
    scene.hooks.fault = None
    scene.step(1)
    assert scene.notices.deleted == ["m0"]
    assert len(scene.hooks.completed) == 1

    scene = Scene(body(Kind.TERMINATING))
    scene.hooks.fault = CloudFault("denied")
    scene.step()
    scene.step(1)
    scene.step(901)
    assert not scene.handler.busy
    assert scene.notices.deleted == []
    assert scene.count("instances", outcome="given-up") == 1


EVENTS = st.sampled_from(["step", "wait", "die", "refuse", "allow", "fault", "heal", "aws-fault", "aws-heal", "slow"])


@settings(max_examples=200, deadline=None)
@given(st.permutations(list(Kind)), st.lists(EVENTS, max_size=30))
def test_whatever_happens_no_message_is_deleted_before_its_node_was_dealt_with(kinds: list[Kind], events: list[str]):
    scene = Scene(*(body(kind) for kind in kinds))
    for event in events:
        match event:
            case "step":
                scene.step(1)
            case "wait":
                scene.step(60)
            case "die":
                scene.begin()
                scene.notices.expire()
            case "refuse" | "allow":
                refuses = event == "refuse"
                scene.cluster.refuses = lambda _, refuses=refuses: refuses  # type: ignore[misc]  # bound now
            case "fault" | "heal":
                scene.cluster.fault = "down" if event == "fault" else ""
            case "aws-fault" | "aws-heal":
                scene.hooks.fault = CloudFault("down") if event == "aws-fault" else None
            case "slow":
                scene.cluster.ends_slowly = True
        left = [one for one in scene.cluster.bound[INSTANCE] if not one.stays]
        emptying = {f"m{n}" for n, kind in enumerate(kinds) if kind is not Kind.REBALANCE}
        if left and scene.now < START + scene.times.notice_s:
            assert not emptying & set(scene.notices.deleted)
            assert not scene.hooks.completed
        if f"m{kinds.index(Kind.TERMINATING)}" in scene.notices.deleted:
            assert scene.hooks.completed
    scene.cluster.fault, scene.hooks.fault = "", None
    for _ in range(4):
        scene.begin()
        scene.notices.expire()
        scene.step(400)
    assert sorted(scene.notices.deleted) == ["m0", "m1", "m2"]
    assert scene.hooks.completed
    if "fault" not in events:  # nobody cordons by an API server that is away until the deadline
        assert scene.cluster.held[INSTANCE].unschedulable
