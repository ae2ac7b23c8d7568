"""The decision which Nodes may go: any story of answers, and what must never happen in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.contract.operators import SITE_LABEL
from workloads.operators.cloud import Group
from workloads.operators.cluster import Node, instance_of
from workloads.operators.hygiene import NOTHING_SEEN, Decision, History, Limits, Round, decide

SITE, REGION, GROUP = "aws", "eu-central-1", "rankbridge-prod-aws-gpu"
LIMITS = Limits(rounds=3, unknown_s=900, per_round=2)
PERIOD_S = 10.0


def name(number: int) -> str:
    return f"i-{number:017x}"


def node(number: int, *, ready: bool = False, **changes: object) -> Node:
    instance = name(number)
    made = Node(instance, f"aws:///{REGION}a/{instance}", {SITE_LABEL: SITE}, ready)
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]  # a test's own names


HOME = Node("worker-1", "k3s://worker-1", {SITE_LABEL: "onprem"}, ready=False)


def seen(nodes: list[Node], states: Mapping[str, str], *, desired: int = 1, in_service: frozenset[str] = frozenset()):
    return Round(SITE, REGION, nodes, [GROUP], {GROUP: Group(desired, in_service)}, states)


def story(*rounds: Round, limits: Limits = LIMITS, period_s: float = PERIOD_S) -> list[Decision]:
    history: History = NOTHING_SEEN
    decisions = []
    for number, one in enumerate(rounds):
        decisions.append(decide(one, history, number * period_s, limits))
        history = decisions[-1].history
    return decisions


def removed(decisions: list[Decision]) -> list[list[str]]:
    return [[deletion.node for deletion in decision.deletions] for decision in decisions]


def test_a_terminated_instances_node_goes_once_three_rounds_agree():
    one = seen([node(1), node(2, ready=True), HOME], {name(1): "terminated", name(2): "running"})
    decisions = story(one, one, one)
    assert removed(decisions) == [[], [], [name(1)]]
    assert decisions[-1].deletions[0].reason == "EC2 says terminated, 3 rounds and 20 s on end"


def test_a_round_that_disagrees_starts_the_count_again():
    gone = seen([node(1)], {name(1): "terminated", name(9): "running"})
    back = seen([node(1)], {name(1): "shutting-down", name(9): "running"})
    assert removed(story(gone, gone, back, gone, gone)) == [[]] * 5


def test_a_held_round_starts_the_count_again():
    gone = seen([node(1)], {name(1): "terminated", name(9): "running"})
    held = dataclasses.replace(gone, groups={})
    decisions = story(gone, gone, held, gone, gone)
    assert removed(decisions) == [[]] * 5
    assert decisions[2].hold == f"the answer lacks the group {GROUP}"


def test_an_empty_answer_removes_nothing_however_often_it_comes():
    empty = seen([node(1), node(2)], {}, desired=2)
    assert removed(story(*[empty] * 200)) == [[]] * 200


def test_everything_gone_at_once_removes_nothing_while_the_group_wants_nodes():
    nodes = [node(1), node(2)]
    states = {name(1): "terminated", name(2): "terminated"}
    decisions = story(*[seen(nodes, states, desired=2)] * 5)
    assert removed(decisions) == [[]] * 5
    assert "while the groups want 2" in decisions[-1].hold
    assert removed(story(*[seen(nodes, states, desired=0)] * 3))[-1] == [name(1), name(2)]


def test_an_answer_without_an_instance_that_the_group_counts_on_is_not_whole():
    half = seen([node(1)], {name(1): "terminated", name(3): "running"}, in_service=frozenset({name(2), name(3)}))
    decisions = story(*[half] * 5)
    assert removed(decisions) == [[]] * 5
    assert f"EC2 does not know {name(2)}" in decisions[-1].hold


def test_an_instance_that_ec2_does_not_know_goes_only_after_long_and_only_if_its_node_is_not_ready():
    rounds = int(LIMITS.unknown_s / PERIOD_S)
    silent = seen([node(1)], {name(9): "running"})
    assert removed(story(*[silent] * (rounds + 1))) == [[]] * rounds + [[name(1)]]
    speaks = seen([node(1, ready=True)], {name(9): "running"})
    assert removed(story(*[speaks] * (rounds + 5))) == [[]] * (rounds + 5)


def test_no_more_than_the_limit_go_in_one_round():
    nodes = [node(number) for number in range(1, 6)]
    states = {name(number): "terminated" for number in range(1, 6)} | {name(9): "running"}
    assert len(removed(story(*[seen(nodes, states)] * 3))[-1]) == LIMITS.per_round


@pytest.mark.parametrize(
    "other",
    [
        HOME,
        node(1, provider_id="k3s://" + name(1)),
        node(1, provider_id=""),
        node(1, labels={}),
        node(1, labels={SITE_LABEL: "onprem"}),
        node(1, name="ip-10-0-0-1"),
        node(1, provider_id=f"aws:///us-east-1a/{name(1)}"),
        node(1, provider_id=f"aws:///{REGION}a/{name(1)}/x"),
    ],
)
def test_a_node_that_is_not_certainly_ours_is_never_removed(other: Node):
    assert instance_of(other, site=SITE, region=REGION) is None
    states = {name(1): "terminated", name(9): "running"}
    assert removed(story(*[seen([other], states)] * 10)) == [[]] * 10


@pytest.mark.parametrize("limits", [{"rounds": 1}, {"unknown_s": 1.0}, {"per_round": 0}])
def test_limits_that_would_remove_at_a_glance_are_refused(limits: dict[str, float]):
    with pytest.raises(ValueError, match=r"."):
        Limits(**limits)  # type: ignore[arg-type]  # wrong on purpose


# Any story

KNOWN = st.sampled_from(["pending", "running", "stopping", "stopped", "shutting-down", "terminated"])
NUMBERS = range(1, 5)


@st.composite
def answers(draw: st.DrawFn) -> Round:
    nodes = [node(n, ready=draw(st.booleans())) for n in NUMBERS if draw(st.booleans())]
    nodes += [HOME, node(8, labels={SITE_LABEL: "onprem"}, provider_id="k3s://x")]
    states = {name(n): draw(KNOWN) for n in (*NUMBERS, 8, 9) if draw(st.booleans())}
    in_service = frozenset(name(n) for n in NUMBERS if draw(st.integers(0, 9)) == 0)
    groups = {} if draw(st.integers(0, 9)) == 0 else {GROUP: Group(draw(st.integers(0, 3)), in_service)}
    return Round(SITE, REGION, nodes, [GROUP], groups, states)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(answers(), max_size=12).flatmap(lambda rounds: st.lists(st.sampled_from(rounds or [None]), max_size=40))
)
def test_whatever_was_answered_a_removed_node_is_one_that_every_round_lately_said_was_gone(rounds: list[Round | None]):
    told = [one for one in rounds if one is not None]
    for number, decision in enumerate(story(*told, limits=Limits(3, 60, 2))):
        assert len(decision.deletions) <= 2
        for deletion in decision.deletions:
            lately = told[number - 2 : number + 1]
            assert len(lately) == 3
            for one in lately:
                (there,) = [n for n in one.nodes if n.name == deletion.node]
                assert there.provider_id.startswith("aws:///")
                assert there.labels[SITE_LABEL] == SITE
                state = one.states.get(deletion.instance)
                assert state == "terminated" or (state is None and not there.ready)
                (group,) = one.groups.values()
                assert group.in_service <= set(one.states)
                assert group.desired == 0 or {"pending", "running"} & set(one.states.values())


@settings(max_examples=100, deadline=None)
@given(answers())
def test_what_stays_terminated_goes_in_the_end(one: Round):
    whole = dataclasses.replace(one, groups={GROUP: Group(1)}, states={**one.states, name(9): "running"})
    nodes = list(whole.nodes)
    history: History = NOTHING_SEEN
    for number in range(10):
        decision = decide(dataclasses.replace(whole, nodes=nodes), history, number * PERIOD_S, LIMITS)
        history = decision.history
        gone = {deletion.node for deletion in decision.deletions}
        nodes = [n for n in nodes if n.name not in gone]
    assert not [n for n in nodes if n.labels[SITE_LABEL] == SITE and whole.states.get(n.name) == "terminated"]
